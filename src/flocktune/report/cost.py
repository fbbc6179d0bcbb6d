"""What an experiment cost: time by activity, operations, memory, bytes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from flocktune.report.charts import Bar, bar_panel
from flocktune.report.emulator import spoken_flops
from flocktune.report.figures import Figure
from flocktune.report.outcome import main_method
from flocktune.report.runs import Experiment, Run
from flocktune.report.summaries import Summary, method_label, number, travelled
from flocktune.report.tables import NOTHING, Cell, Grid, cell_of, format_bytes, format_seconds

_WORK = ("load", "data", "align", "forward and backward", "aggregate", "diagnose", "evaluate", "save")


def cost_grid(experiment: Experiment) -> Grid:
    """A row a method: bytes of all clients, privacy spent, operations of training, memory, time; means over seeds."""
    columns = {
        # Heading -> the cell of a method.
        "Down": lambda key, summary: cell_of(travelled(key, summary, "bytes_down"), format_bytes),
        "Up": lambda key, summary: cell_of(travelled(key, summary, "bytes_up"), format_bytes),
        "Emulator": lambda key, summary: cell_of(travelled(key, summary, "bytes_emulator"), format_bytes),
        "Epsilon": lambda _, summary: cell_of(_epsilon(summary), _three),
        "Training": lambda key, _: cell_of(training_flops(experiment.methods.get(key) or []), _flops),
        "Peak memory": lambda _, summary: cell_of(number(summary.get("peak_memory_bytes")), format_bytes),
        "Time": lambda _, summary: cell_of(number(summary.get("seconds")), format_seconds),
    }
    cells = {
        heading: [build(key, summary) for key, summary in experiment.summaries.items()]
        for heading, build in columns.items()
    }
    told = {heading: column for heading, column in cells.items() if any(cell.value for cell in column)}
    names = [Cell(method_label(key, summary)) for key, summary in experiment.summaries.items()]
    return Grid(("Method", *told), tuple(zip(names, *told.values(), strict=True)))


def where_time_went(experiment: Experiment) -> Figure | None:
    """Seconds of the main method by part of the work, summed over rounds; in the table, of every method."""
    by_method = {}
    for key, runs in experiment.methods.items():
        tables = [seconds_of(run) for run in runs]
        names = dict.fromkeys(part for table in tables for part in table)
        by_method[key] = {part: statistics.fmean(table.get(part, 0.0) for table in tables) for part in names}
    main = by_method.get(main_method(experiment)) or {}
    parts = [*_WORK, *(part for table in by_method.values() for part in table)]
    used = [part for part in dict.fromkeys(parts) if any(table.get(part) for table in by_method.values())]
    if not any(main.values()):
        return None
    bars = [Bar(part, main[part], "m-0") for part in used if main.get(part)]
    highest = max(bar.value or 0.0 for bar in bars)
    said = "; ".join(f"{bar.label} {format_seconds(bar.value)}" for bar in bars)
    label = method_label(main_method(experiment), experiment.summaries[main_method(experiment)])
    title = f"Where the time went, {label}"
    picture = bar_panel(
        bars, title=title, description=said, highest=highest, value_format=format_seconds, width=480
    )  # fmt: skip
    labels = [method_label(key, experiment.summaries[key]) for key in by_method]
    rows = (
        (Cell(part), *(cell_of(table.get(part) or None, format_seconds) for table in by_method.values()))
        for part in used
    )
    return Figure(title, picture, Grid(("Activity", *labels), tuple(rows)))


def training_flops(runs: Sequence[Run]) -> float | None:
    """Operations of all local steps, mean over seeds: the first step's for a token, times the tokens trained on.

    A later epoch on an emulator whose lower layers are cached takes fewer, so that it is the most there were.
    """
    found = []
    for run in runs:
        cost = run.summary.get("client_cost")
        each = number(cost.get("flops_per_token_first")) if isinstance(cost, dict) else None
        tokens = sum(number(event.get("tokens")) or 0.0 for event in run.rounds)
        found += [each * tokens] if each and tokens else []
    return statistics.fmean(found) if found else None


def seconds_of(run: Run) -> dict[str, float]:
    """Seconds by part, summed over rounds; evaluations have their own events."""
    parts: dict[str, float] = {}
    for event in run.rounds:
        for name, value in (event.get("seconds") or {}).items():
            part = name.replace("_", " and ")
            parts[part] = parts.get(part, 0.0) + (number(value) or 0.0)
    if "evaluate" not in parts:
        parts["evaluate"] = sum(number(event.get("seconds")) or 0.0 for event in run.evaluations)
    return parts


def _epsilon(summary: Summary) -> float | None:
    told = summary.get("privacy")
    return number(told.get("epsilon")) if isinstance(told, Mapping) else None


def _three(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3g}"


def _flops(value: float | None) -> str:
    return NOTHING if value is None else spoken_flops(value)
