"""The report of a run or a comparison: one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from flocktune.files import write_atomic
from flocktune.report import clients, curves, emulator, sections
from flocktune.report.cost import cost_grid, where_time_went
from flocktune.report.figures import Figure
from flocktune.report.glance import at_a_glance
from flocktune.report.judged import judged_section
from flocktune.report.outcome import headline, main_method, verdict, what_was_run
from flocktune.report.page import render_page
from flocktune.report.runs import Experiment, load_experiment
from flocktune.report.samples import sample_answers
from flocktune.report.styles import style_of
from flocktune.report.summaries import datasets, is_baseline, method_label, number
from flocktune.report.tables import Grid, comparison_grid, scores_only
from flocktune.report.taking_part import (
    client_grid,
    failures,
    holdings_figure,
    main_run,
    reasons,
    who_holds_what,
    who_took_part,
)

REPORT_NAME = "report.html"

T = TypeVar("T")


def write_report(run_folder: Path, to: Path | None = None) -> Path:
    """Write a run's or a comparison's page, ``report.html`` in its folder if not elsewhere, and return its path.

    Unfinished and damaged folders make a report too, which says what is missing. Raises UserError when
    the folder holds no run at all, and OSError.
    """
    path = to or run_folder / REPORT_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, render_report(load_experiment(run_folder)))
    return path


def render_report(experiment: Experiment) -> str:
    """The page as text."""
    notes = _notes(experiment)

    def drawn(what: str, build: Callable[[Experiment], T]) -> T | None:
        # A damaged log can hold anything: the page says so, and the other sections are still shown.
        try:
            return build(experiment)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            notes.append(f"{what} could not be shown: the log is damaged ({type(error).__name__}: {error}).")
            return None

    keys = list(experiment.summaries)
    main = main_method(experiment)
    context = {
        "lead": drawn("What was run", what_was_run),
        "headline": drawn("The headline", headline),
        "ladder": drawn("The methods", sections.ladder),
        "verdict": drawn("The outcome", verdict),
        "glances": drawn("The run at a glance", at_a_glance) or [],
        "results": drawn("The comparison", _results),
        "costs": drawn("The cost", cost_grid),
        "styles": [style_of(key, keys)[0] for key in keys],
        "main": style_of(main, keys)[0],
        "alone": len(keys) < 2,
        "seeds": max((len(runs) for runs in experiment.methods.values()), default=1),
        "learning": drawn("The curves", curves.learning) or [],
        "health": drawn("The rounds", curves.health) or [],
        "panels": drawn("The categories", sections.category_panels) or [],
        "category_numbers": drawn("The categories", sections.category_numbers),
        "category_curves": drawn("The categories' curves", curves.category_curves) or [],
        "participation": drawn("Who took part", who_took_part),
        "clients": drawn("The clients", client_grid),
        "holdings": drawn("Who holds what", who_holds_what),
        "heterogeneity": drawn("The heterogeneity", _heterogeneity) or "",
        "failures": drawn("Failures", failures) or [],
        "reasons": reasons(drawn("Failures", failures) or []),
        "by_client": drawn("How clients fared", clients.how_clients_fared),
        "split": drawn("What clients hold", _split),
        "fidelity": drawn("The fidelity", lambda e: emulator.fidelity(e.methods.get(main) or [])),
        "time": drawn("The time", where_time_went),
        "client_cost": drawn("A client's cost", _client_cost) or "",
        "judged": drawn("The judge's verdicts", lambda e: judged_section(e.folder)),
        "samples": drawn("Sample answers", sample_answers) or [],
        "recipe": experiment.recipe,
        "facts": drawn("The versions", _facts),
    }
    title, subtitle = drawn("The title", _title) or experiment.folder.name, drawn("The dates", _subtitle)
    return render_page(
        "page.html",
        kind="flocktune report",
        title=title,
        subtitle=subtitle,
        **context,
        notes=list(dict.fromkeys(notes)),
    )


def write_holdings(
    path: Path,
    clients: Mapping[str, Mapping[str, int]],
    heterogeneity: Mapping[str, Any] | None = None,
    *,
    title: str = "Who holds what",
) -> Path:
    """Write a page with the allocation alone: client -> category -> rows, and the measures of its heterogeneity.

    Raises OSError.
    """
    page = render_page(
        "split.html",
        kind="flocktune split",
        title=title,
        subtitle=f"{len(clients)} clients, {sum(sum(counts.values()) for counts in clients.values()):,} rows",
        holdings=holdings_figure(clients),
        heterogeneity=_spoken_heterogeneity(heterogeneity or {}),
    )
    write_atomic(path, page)
    return path


def _results(experiment: Experiment) -> tuple[str, Grid] | None:
    """The data set and the table of scores on it; costs have a table of their own."""
    dataset = next(iter(datasets(experiment.summaries)), "")
    if not dataset:
        return None
    return dataset, scores_only(comparison_grid(experiment.summaries, dataset))


def _title(experiment: Experiment) -> str:
    names = {str(run.start["name"]) for run in experiment.runs if run.start.get("name")}
    return names.pop() if len(names) == 1 else experiment.folder.resolve().name


def _subtitle(experiment: Experiment) -> str:
    start = _start(experiment)
    parts = [method_label(main_method(experiment))]
    if len(experiment.summaries) > 1:
        parts = [f"{len(experiment.summaries)} methods"]
    if start.get("model"):
        parts.append(f"model {Path(str(start['model'])).name}")
    if start.get("device"):
        parts.append(f"on {start['device']}")
    when = number(start.get("time"))
    if when:
        parts.append(datetime.fromtimestamp(when, UTC).strftime("%d %B %Y, %H:%M UTC"))
    return " · ".join(parts)


def _notes(experiment: Experiment) -> list[str]:
    several = len(experiment.runs) > 1
    notes = []
    for run in experiment.runs:
        place = f"{run.folder.relative_to(experiment.folder)}: " if several else ""
        notes += [place + note for note in run.notes]
        if run.resumed:
            notes.append(f"{place}Resumed {run.resumed} time{'s' if run.resumed > 1 else ''}.")
    return notes


def _split(experiment: Experiment) -> tuple[Figure, bool] | None:
    """What clients hold of the model as a picture that says it in words too, and whether it is a wide one."""
    found = emulator.read_emulator(experiment.methods.get(main_method(experiment)) or [])
    drawn = emulator.split_picture(found) if found else None
    return (Figure("Full model and emulator", drawn), emulator.is_wide(found)) if found and drawn else None


def _client_cost(experiment: Experiment) -> str:
    federated = {key: summary for key, summary in experiment.summaries.items() if not is_baseline(key)}
    labels = {key: method_label(key, summary) for key, summary in federated.items()}
    return emulator.client_cost(federated, labels)


def _heterogeneity(experiment: Experiment) -> str:
    return _spoken_heterogeneity(_start(experiment).get("heterogeneity") or {})


def _spoken_heterogeneity(values: Mapping[str, Any]) -> str:
    """The measures of heterogeneity as a sentence."""
    names = {
        "distance": "mean Jensen-Shannon distance between a client's categories and everyone's (0 same, 1 disjoint)",
        "mean_js_distance": "mean Jensen-Shannon distance between a client's categories and everyone's",
        "label_entropy_share": "mean entropy of a client's categories, as a share of an even mix",
        "mean_entropy": "mean entropy of a client's categories",
        "size_gini": "Gini coefficient of the clients' sizes (0 equal)",
    }
    told = [f"{name} {values[key]:.2f}" for key, name in names.items() if number(values.get(key)) is not None]
    spoken = "; ".join(told)
    return spoken[:1].upper() + spoken[1:] + "." if told else ""


def _facts(experiment: Experiment) -> list[tuple[str, str]]:
    """What is needed to do it again: versions, seeds, digests."""
    start = _start(experiment)
    seeds = sorted({str(run.start["seed"]) for run in experiment.runs if run.start.get("seed") is not None})
    facts = [(name, str(version)) for name, version in (start.get("versions") or {}).items()]
    facts += [("device", str(start["device"]))] if start.get("device") else []
    facts += [("seed" if len(seeds) == 1 else "seeds", ", ".join(seeds))] if seeds else []
    held = start.get("emulator")
    facts += [("emulator, digest", str(held["digest"]))] if isinstance(held, Mapping) and held.get("digest") else []
    for key, summary in experiment.summaries.items():
        if summary.get("adapter_sha256"):
            facts.append((f"adapter of {method_label(key, summary)}, SHA-256", str(summary["adapter_sha256"])))
    return facts


def _start(experiment: Experiment) -> Mapping[str, Any]:
    run = main_run(experiment) or next(iter(experiment.runs), None)
    return run.start if run else {}
