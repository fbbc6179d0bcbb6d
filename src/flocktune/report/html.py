"""The report of a run or a comparison: one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from flocktune.files import write_atomic
from flocktune.report import clients, emulator, sections
from flocktune.report.grids import legend
from flocktune.report.outcome import main_method, outcome, tiles, travel
from flocktune.report.runs import Experiment, load_experiment
from flocktune.report.summaries import DECISIVE, datasets, method_label, number
from flocktune.report.tables import comparison_grid

REPORT_NAME = "report.html"
_SAMPLES = 6

T = TypeVar("T")

_PARTICIPATION_KEY = legend(
    [("answered", "answered"), ("failed", "failed"), ("unused", "asked, not needed")]
)  # fmt: skip


def write_report(run_folder: Path) -> Path:
    """Write ``report.html`` into a run folder or a comparison folder and return its path.

    Unfinished and damaged folders make a report too, which says what is missing. Raises UserError when
    the folder holds no run at all, and OSError.
    """
    path = run_folder / REPORT_NAME
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

    chosen = next(iter(datasets(experiment.summaries)), "")
    grid = drawn("The comparison", lambda e: comparison_grid(e.summaries, chosen)) if chosen else None
    styles = [sections.style_of(key, list(experiment.summaries))[0] for key in experiment.summaries]
    context = {
        "title": drawn("The title", _title) or experiment.folder.name,
        "subtitle": drawn("The dates", _subtitle),
        "outcome": drawn("The outcome", outcome),
        "tiles": drawn("The headline numbers", tiles),
        "dataset": chosen,
        "grid": grid,
        "grid_rows": list(zip(styles, grid.rows, strict=True)) if grid else [],
        "seeds": max((len(runs) for runs in experiment.methods.values()), default=1),
        "split": drawn("What clients hold", _split),
        "fidelity": drawn("The fidelity", lambda e: emulator.fidelity(e.methods.get(main_method(e)) or [])),
        "client_cost": drawn("A client's cost", _client_cost) or "",
        "curves": drawn("The curves", sections.curves),
        "panels": drawn("The categories", sections.category_panels),
        "by_client": drawn("How clients fared", clients.how_clients_fared),
        "participation": drawn("Who took part", sections.who_took_part),
        "participation_key": _PARTICIPATION_KEY,
        "holdings": drawn("Who holds what", sections.who_holds_what),
        "heterogeneity": drawn("The heterogeneity", _heterogeneity) or "",
        "time": drawn("The time", sections.where_time_went),
        "bytes": drawn("The bytes", sections.what_travelled),
        "travel": drawn("The bytes in words", travel),
        "samples": drawn("Sample answers", _samples),
        "failures": drawn("Failures", _failures),
        "recipe": experiment.recipe,
        "facts": drawn("The versions", _facts),
    }
    return _environment().get_template("page.html").render(**context, notes=notes)


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
    page = _environment().get_template("split.html").render(
        title=title,
        subtitle=f"{len(clients)} clients, {sum(sum(counts.values()) for counts in clients.values()):,} rows",
        holdings=sections.holdings_chart(clients),
        heterogeneity=_spoken_heterogeneity(heterogeneity or {}),
    )  # fmt: skip
    write_atomic(path, page)
    return path


def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


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


def _split(experiment: Experiment) -> tuple[Markup, bool] | None:
    """What clients hold of the model as a picture, and whether it is a wide one."""
    found = emulator.read_emulator(experiment.methods.get(main_method(experiment)) or [])
    return (emulator.split_picture(found), emulator.is_wide(found)) if found else None


def _client_cost(experiment: Experiment) -> str:
    labels = {key: method_label(key, summary) for key, summary in experiment.summaries.items()}
    return emulator.client_cost(experiment.summaries, labels)


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


def _samples(experiment: Experiment) -> list[dict[str, Any]]:
    """Questions with the answers of every method, one of each category first."""
    main = main_method(experiment)
    tables = {key: {_question(row): row for row in runs[0].answers} for key, runs in experiment.methods.items() if runs}
    rows = list((tables.get(main) or next(iter(tables.values()), {})).values())
    by_category: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_category.setdefault(str(row.get("category") or ""), []).append(row)
    lists = list(by_category.values())
    spread = [rows[place] for place in range(max(map(len, lists), default=0)) for rows in lists if place < len(rows)]
    return [
        {
            "category": row.get("category") or "",
            "instruction": row.get("instruction") or "",
            "context": row.get("context") or "",
            "reference": row.get("reference") or "",
            "answers": [
                (
                    method_label(key, experiment.summaries[key]),
                    sections.style_of(key, list(tables))[0],
                    given.get("answer") or "",
                    _verdict(given),
                )
                for key, table in tables.items()
                for given in [table.get(_question(row))]
                if given
            ],
        }
        for row in spread[:_SAMPLES]
    ]


def _question(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(row.get(name)) for name in ("category", "instruction", "context", "reference"))


def _verdict(row: Mapping[str, Any]) -> str:
    """Right, wrong, or ROUGE-L when nothing decides."""
    scores = row.get("scores") or {}
    right = next((value for name in DECISIVE if (value := number(scores.get(name))) is not None), None)
    rouge = number(scores.get("rouge_l"))
    if right is not None:
        return {0.0: "wrong", 1.0: "right"}.get(right, f"{right * 100:.0f} % of its programs pass")
    return "" if rouge is None else f"ROUGE-L {rouge * 100:.0f} %"


def _failures(experiment: Experiment) -> list[tuple[str, int, str, str]]:
    """(run, round from 1, client, reason) of every failure of the main method, and of rounds that were rolled back."""
    runs = experiment.methods.get(main_method(experiment)) or []
    return [
        (run.folder.name if len(runs) == 1 else str(run.folder.relative_to(experiment.folder)), event["round"] + 1,
         str(failure.get("client")), str(failure.get("reason")))
        for run in runs
        for event in run.rounds
        for failure in [*(event.get("failures") or []), *_rolled_back(event)]
    ]  # fmt: skip


def _rolled_back(event: Mapping[str, Any]) -> list[Mapping[str, str]]:
    """A round that the gate did not let count, as a failure of all."""
    if not event.get("rolled_back"):
        return []
    return [{"client": "all (rolled back)", "reason": "; ".join((event.get("gate") or {}).get("reasons") or [])}]


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
    runs: Sequence[Any] = experiment.methods.get(main_method(experiment)) or experiment.runs
    return runs[0].start if runs else {}
