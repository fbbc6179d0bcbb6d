"""A study as one HTML file that needs nothing else, with its figure; and all files of a study, written together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from markupsafe import Markup

from flocktune.config.study import EVERY_SETTING
from flocktune.files import write_atomic, write_json
from flocktune.report.charts import Bar, bar_panel
from flocktune.report.page import render_page
from flocktune.report.study_claims import checked_claims, claims_grid, claims_note
from flocktune.report.study_rows import Row, StudyResult, in_setting, rows, settings_of
from flocktune.report.study_tables import study_csv, study_grid, study_markdown, study_notes, study_title
from flocktune.report.summaries import METRIC_NAMES, SHARES, datasets, emulator_dataset, headline_metric, metric

FILES = ("study.json", "study.csv", "study.md", "study.html")


def write_study(result: StudyResult, folder: Path) -> None:
    """Write the study's files into its folder, each of them atomically. Raises OSError."""
    write_json(folder / "study.json", study_tree(result))
    write_atomic(folder / "study.csv", study_csv(result))
    write_atomic(folder / "study.md", study_markdown(result))
    write_atomic(folder / "study.html", study_page(result))


def study_tree(result: StudyResult) -> dict[str, Any]:
    """The study as plain values: its file, every cell with the summary of its run, the rows and the claims."""
    claims = []
    for item in checked_claims(result):
        paired = (
            None if item.paired is None else {**asdict(item.paired), "above_two_standard_errors": item.paired.above}
        )
        claims.append({**asdict(item.claim), "setting": item.setting, "paired": paired})
    table = [
        {
            "method": row.label,
            "setting": row.setting,
            "seeds": list(row.by_seed),
            "metrics": row.summary.get("metrics") or {},
            "metrics_std": row.summary.get("metrics_std") or {},
        }
        for row in rows(result)
    ]
    return {
        **asdict(result.config),
        "cells": [asdict(outcome) for outcome in result.outcomes],
        "rows": table,
        "tested": claims,
    }


def study_page(result: StudyResult) -> str:
    """The page as text."""
    found, grid = rows(result), study_grid(result)
    styles = _styles(result, found)
    measures = list(dict.fromkeys(name for name in (_headline(found), "loss") if name))
    context: dict[str, Any] = {
        "notes": study_notes(result),
        "grid": grid,
        "spread": study_title(result).partition(": ")[2],
        "left": sum(column.heading != "Seeds" for column in grid.names),
        "dots": [styles[row.label] for row in found],
        "panels": [panel for name in measures for panel in _panels(result, found, styles, name)],
        "seeds": len(result.config.seeds),
        "claims": claims_grid(result),
        "claims_note": claims_note(result),
    }
    return render_page(
        "study.html", kind="flocktune study", title=result.config.name, subtitle=_subtitle(result), **context
    )


def _subtitle(result: StudyResult) -> str:
    config, done = result.config, sum(outcome.state == "finished" for outcome in result.outcomes)
    parts = [f"{len(config.methods)} methods"]
    parts += [f"{len(config.settings)} settings"] if config.settings else []
    parts.append(f"seeds {', '.join(map(str, config.seeds))}" if len(config.seeds) > 1 else f"seed {config.seeds[0]}")
    return " · ".join([*parts, f"{done} of {len(result.outcomes)} cells finished"])


def _styles(result: StudyResult, found: Sequence[Row]) -> dict[str, str]:
    """A colour class for each method; baselines have the colours that they have in every report."""
    kinds = {row.label: row.kind for row in found}
    styles, others = {}, 0
    for label in result.config.methods:
        if kinds.get(label) in ("base", "local", "centralised"):
            styles[label] = f"m-{kinds[label]}"
        else:
            styles[label], others = f"m-{others % 4}", others + 1
    return styles


def _panels(
    result: StudyResult, found: Sequence[Row], styles: Mapping[str, str], name: str
) -> list[tuple[str, Markup]]:
    """For each setting a panel with a bar a method, all on one scale: (setting, picture)."""
    dataset = _dataset(found)
    by_setting = {
        setting: _bars(in_setting(found, setting), styles, dataset, name) for setting in settings_of(result.config)
    }
    reach = [(bar.value or 0.0) + (bar.std or 0.0) for bars in by_setting.values() for bar in bars]
    if not any(bar.value is not None for bars in by_setting.values() for bar in bars):
        return []
    highest = 1.0 if name in SHARES and max(reach) > 0.5 else max(reach)
    panels = []
    for setting, bars in by_setting.items():
        where = "" if setting == EVERY_SETTING else f", {setting}"
        heading = f"{METRIC_NAMES[name]}{where}: {'more' if name in SHARES else 'less'} is better"
        said = ", ".join(f"{bar.label} {_format(name, bar.value)}" for bar in bars if bar.value is not None)
        picture = bar_panel(
            bars, title=heading, description=said, highest=highest, value_format=lambda value: _format(name, value)
        )
        panels.append((heading, picture))
    return panels


def _bars(found: Sequence[Row], styles: Mapping[str, str], dataset: str, name: str) -> list[Bar]:
    bars = []
    for row in found:
        plain, emulated = (metric(row.summary, where, name) for where in (dataset, emulator_dataset(dataset)))
        style = styles[row.label]
        bars.append(Bar(row.label, plain.mean if plain else None, style, plain.std if plain else None))
        if emulated:
            bars.append(Bar("· AdapEmu", emulated.mean, style, emulated.std))
    return bars


def _format(name: str, value: float) -> str:
    return f"{value * 100:.1f} %" if name in SHARES else f"{value:.2f}"


def _dataset(found: Sequence[Row]) -> str:
    return next(iter(datasets({f"{row.label}\n{row.setting}": row.summary for row in found})), "")


def _headline(found: Sequence[Row]) -> str | None:
    return headline_metric({f"{row.label}\n{row.setting}": row.summary for row in found}, _dataset(found))
