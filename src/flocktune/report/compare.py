"""Several runs on one page: what differs in their settings, what came out, what each cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flocktune.files import write_atomic
from flocktune.report import curves, sections
from flocktune.report.cost import cost_grid
from flocktune.report.outcome import main_method, spoken
from flocktune.report.page import render_page
from flocktune.report.runs import Experiment, Run, load_experiment
from flocktune.report.settings import differing, read_settings
from flocktune.report.styles import style_of
from flocktune.report.summaries import (
    METRIC_NAMES,
    SHARES,
    datasets,
    headline_metric,
    is_baseline,
    method_label,
    metric,
    number,
)
from flocktune.report.tables import Cell, Grid, comparison_grid, scores_only

_TRAVELLED = ("bytes_up", "bytes_down", "bytes_emulator")
_NAMED = 3
"""So many differing settings are named in a sentence; the table has all."""


@dataclass(frozen=True)
class Compared:
    """Runs side by side: an experiment whose methods are the runs, and why their scores can not be compared, if so."""

    experiment: Experiment
    differences: Mapping[str, tuple[str, ...]]
    obstacles: Sequence[str]
    notes: Sequence[str]

    @property
    def labels(self) -> list[str]:
        """How the runs are called."""
        return [method_label(key, summary) for key, summary in self.experiment.summaries.items()]


def compare(folders: Sequence[Path]) -> Compared:
    """Read several runs, or comparisons, of which the main method stands. Raises UserError for a folder without any."""
    loaded = [load_experiment(folder) for folder in folders]
    methods: dict[str, Sequence[Run]] = {}
    summaries: dict[str, Mapping[str, Any]] = {}
    for place, (experiment, label) in enumerate(zip(loaded, _labels(folders), strict=True)):
        key, main = f"run-{place:03d}", main_method(experiment)
        methods[key] = experiment.methods.get(main) or []
        still = dict.fromkeys(_TRAVELLED) if is_baseline(main) else {}  # whatever its log counts
        summaries[key] = {**experiment.summaries[main], **still, "label": label}
    whole = Experiment(Path(), methods, summaries, "")
    recipes = [next((run.recipe for run in runs), "") for runs in methods.values()]
    notes = [
        f"{summaries[key]['label']}: {note}" for key, runs in methods.items() for run in runs for note in run.notes
    ]
    return Compared(whole, {**differing(recipes), **_told_apart(methods)}, _obstacles(whole), notes)


def write_comparison(folders: Sequence[Path], path: Path) -> Compared:
    """Write the page of several runs and return what is on it. Raises UserError and OSError."""
    compared = compare(folders)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, render_comparison(compared))
    return compared


def render_comparison(compared: Compared) -> str:
    """The page as text."""
    experiment, labels = compared.experiment, compared.labels
    dataset = next(iter(datasets(experiment.summaries)), "")
    keys = list(experiment.summaries)
    rows = ((Cell(name), *(Cell(value) for value in values)) for name, values in sorted(compared.differences.items()))
    results = scores_only(comparison_grid(experiment.summaries, dataset), "Run") if dataset else None
    costs = cost_grid(experiment)
    if results and compared.obstacles:
        results = replace(results, rows=tuple(tuple(replace(c, best=False) for c in row) for row in results.rows))
    return render_page(
        "compare.html",
        kind="flocktune report",
        title=" · ".join(labels) if len(labels) <= _NAMED else f"{len(labels)} runs side by side",
        subtitle=f"{len(labels)} runs side by side" if len(labels) <= _NAMED else ", ".join(labels),
        lead=in_words(compared),
        obstacles=compared.obstacles,
        notes=compared.notes,
        ladder=sections.ladder(experiment),
        settings=Grid(("Setting", *labels), tuple(rows)),
        results=results,
        dataset=dataset,
        costs=replace(costs, headings=("Run", *costs.headings[1:])),
        styles=[style_of(key, keys)[0] for key in keys],
        seeds=max(len(summary.get("seeds") or [0]) for summary in experiment.summaries.values()),
        learning=curves.learning(experiment),
        panels=sections.category_panels(experiment),
        category_numbers=sections.category_numbers(experiment),
    )


def in_words(compared: Compared) -> str:
    """What differs, and which run did best, by how much."""
    names = sorted(compared.differences)
    if not names:
        differ = "Their settings are the same."
    elif len(names) <= _NAMED:
        differ = f"They differ in {', '.join(names)}."
    else:
        differ = f"They differ in {len(names)} settings."
    return f"{differ} {_best(compared)}".strip()


def _best(compared: Compared) -> str:
    summaries = compared.experiment.summaries
    dataset = next(iter(datasets(summaries)), "")
    name = headline_metric(summaries, dataset)
    values = {key: value for key, one in summaries.items() if name and (value := metric(one, dataset, name))}
    if compared.obstacles:
        return "Their scores can not be compared."
    if name is None or len(values) < 2:
        return "Fewer than two of them have been evaluated."
    order = sorted(values, key=lambda key: values[key].mean, reverse=name in SHARES)
    best, second = values[order[0]], values[order[1]]
    gap = abs(best.mean - second.mean)
    if gap == 0:
        return f"The best two are level: {METRIC_NAMES[name]} {spoken(name, best)}."
    first, next_one = (summaries[key]["label"] for key in order[:2])
    far = f"{gap * 100:.1f} points" if name in SHARES else f"{gap:.3f}"
    said = f"{first} does best: {METRIC_NAMES[name]} {spoken(name, best)}, {far} from the next, {next_one}"
    if best.std is None or second.std is None:
        return f"{said}; without several seeds of both, chance is not told apart."
    spread = math.hypot(best.std, second.std)
    return f"{said}, {'within' if gap <= spread else 'beyond'} the spread of their seeds."


def _labels(folders: Sequence[Path]) -> list[str]:
    """The end of each path, as long as it takes to tell all of them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(one[-length:]) for one in parts]
        if len(set(labels)) == len(set(parts)):
            break
    seen = [labels[: place + 1].count(label) for place, label in enumerate(labels)]  # the same folder may come twice
    return [label if times == 1 else f"{label} ({times})" for label, times in zip(labels, seen, strict=True)]


def _told_apart(methods: Mapping[str, Sequence[Run]]) -> dict[str, tuple[str, ...]]:
    """What is not in a recipe: seeds, device, versions; where not all are equal."""
    tables = []
    for runs in methods.values():
        start = runs[0].start if runs else {}
        versions = {f"version of {name}": str(version) for name, version in (start.get("versions") or {}).items()}
        seeds = ", ".join(str(run.start.get("seed", "?")) for run in runs)
        tables.append({"seed": seeds, "device": str(start.get("device", "?")), **versions})
    names = dict.fromkeys(name for table in tables for name in table)
    found = {name: tuple(table.get(name, "–") for table in tables) for name in names}
    return {name: values for name, values in found.items() if len(set(values)) > 1}


def _obstacles(experiment: Experiment) -> list[str]:
    """Why scores can not be set side by side: other test rows, other metrics."""
    found = []
    labels = {key: summary["label"] for key, summary in experiment.summaries.items()}
    digests = all(run.start.get("test_digest") for run in experiment.runs)
    rows = {key: _tested_on(runs, digests) for key, runs in experiment.methods.items()}
    if len(set(rows.values())) > 1:
        told = "; ".join(f"{labels[key]}: {said}" for key, said in rows.items())
        found.append(
            f"Not the same test rows ({told}). A score on other rows is another score: give the runs one test file"
            " (data.test), or the same data and seeds."
        )
    scored = {}
    for key, summary in experiment.summaries.items():
        dataset = next(iter(datasets({key: summary})), "")
        scored[key] = METRIC_NAMES.get(headline_metric({key: summary}, dataset) or "", "")
    if len({name for name in scored.values() if name}) > 1:
        told = "; ".join(f"{labels[key]}: {name or 'nothing'}" for key, name in scored.items())
        found.append(f"Not the same metric ({told}): evaluate them alike, with flocktune eval.")
    return found


def _tested_on(runs: Sequence[Run], digests: bool) -> str:
    """The digests of a run's test rows, seed by seed; without them, how many rows there were, and of what."""
    if digests:
        return " and ".join(f"digest {str(run.start['test_digest'])[:8]}" for run in runs) or "not logged"
    told = []
    for run in runs:
        counts = [number(count) or 0 for count in (run.start.get("test") or {}).values()]
        source = (read_settings(run.recipe).get("data") or {}).get("train", "unknown data")
        told.append(f"{sum(counts):,.0f} rows of {len(counts)} categories, {source}, seed {run.start.get('seed')}")
    return " and ".join(told) or "not logged"
