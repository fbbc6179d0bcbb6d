"""The pictures and tables of a run's page, from what its log has told; drawn as a report draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from flocktune.dashboard.logs import Told, scored_on
from flocktune.dashboard.watching import Seen
from flocktune.report.charts import Bar, bar_panel
from flocktune.report.curves import category_curves, health
from flocktune.report.curves import learning as curves
from flocktune.report.figures import Figure
from flocktune.report.grids import Participation
from flocktune.report.grids import participation as drawn_participation
from flocktune.report.runs import Experiment, Run
from flocktune.report.summaries import METRIC_NAMES, SHARES, Value, number
from flocktune.report.tables import NOTHING, Cell, Grid, format_metric, format_seconds

_POINTS = 400
"""Rounds that a curve is drawn through at most."""
_MARKS = 5_000_000
"""Clients times rounds that are drawn at most: a second's work."""
_CLIENTS = 200
"""Clients in the table at most."""
_ACTIVITIES = ("load", "data", "align", "forward and backward", "aggregate", "diagnose", "evaluate", "save")


@dataclass(frozen=True)
class Learning:
    """Curves over rounds: of the run as a whole, and by category of its held-out rows."""

    whole: Sequence[Figure] = ()
    categories: Sequence[Figure] = ()


@dataclass(frozen=True)
class Clients:
    """The table of clients; ``left_out`` of them are not in it."""

    grid: Grid
    left_out: int


def learning(seen: Seen, told: Told) -> Learning:
    """Losses and scores over rounds, by category too."""
    places = sorted(told.rounds)
    every = -(-len(places) // _POINTS) if places else 1
    shown = [told.rounds[place] for index, place in enumerate(places) if index % every == 0 or place == places[-1]]
    key = str(seen.summary.get("method") or "run")
    run = Run(
        key=key,
        folder=seen.place.folder,
        start=told.start,
        rounds=shown,
        evaluations=sorted(told.evaluations, key=lambda event: event["round"]),
        alignments=[],
        resumed=told.resumed,
        ended=seen.state == "finished",
        summary=seen.summary,
        answers=[],
        recipe="",
        notes=[],
    )
    experiment = Experiment(seen.place.folder, {key: [run]}, {key: seen.summary}, "")
    return Learning([*curves(experiment), *health(experiment)], category_curves(experiment))


def by_category(summary: Mapping[str, Any]) -> Grid | None:
    """The newest scores on held-out rows: a row a category, and one of all."""
    dataset = scored_on(summary)
    scores = (summary.get("metrics") or {}).get(dataset) or {}
    overall = scores.get("overall") or {}
    names = [name for name in METRIC_NAMES if number(overall.get(name)) is not None]
    if not names:
        return None
    lines = [*sorted((scores.get("categories") or {}).items()), ("all", overall)]
    headings = [METRIC_NAMES[name] + (" %" if name in SHARES else "") for name in names]
    return Grid(("Category", "Rows", *headings), tuple(_scores(category, values, names) for category, values in lines))


def _scores(category: str, values: Mapping[str, Any], names: list[str]) -> tuple[Cell, ...]:
    found = ((name, number(values.get(name))) for name in names)
    texts = [format_metric(name, None if value is None else Value(value)) for name, value in found]
    rows = number(values.get("rows"))
    said = NOTHING if rows is None else f"{rows:,.0f}"
    return tuple(Cell(text) for text in (category.replace("_", " "), said, *texts))


def participation(told: Told) -> Markup | None:
    """Clients by rounds; None when there are too many to draw."""
    names = list(dict.fromkeys([*_named(told), *told.clients]))
    if not told.clients or len(names) * told.done > _MARKS:
        return None
    grid = {}
    for name in names:
        client = told.clients.get(name)
        answered, failed, asked = (frozenset(rounds) for rounds in (
            (client.answered, client.failed, client.asked) if client else ((), (), ())
        ))  # fmt: skip
        grid[name] = Participation(answered, failed, asked - answered - failed)
    return drawn_participation(grid, told.done, title="Who took part")


def told_of_clients(told: Told) -> Clients | None:
    """How often each was asked and answered, its share of the weight, and the last loss it told."""
    names = list(dict.fromkeys([*_named(told), *told.clients]))
    if not told.clients:
        return None
    rows_of = told.start.get("clients") or {}
    whole = sum(client.weight for client in told.clients.values())
    lines = []
    for name in names[:_CLIENTS]:
        client, told_rows = told.clients.get(name), rows_of.get(name)
        rows = number(told_rows.get("rows")) if isinstance(told_rows, Mapping) else None
        texts = [name, NOTHING if rows is None else f"{rows:,.0f}"]
        if client is None:
            texts += ["0 of 0", "0", NOTHING, NOTHING, NOTHING]
        else:
            texts += [
                f"{len(client.answered):,} of {len(client.asked):,}",
                f"{len(client.failed):,}",
                f"{100 * client.weight / whole:.1f} %" if whole else NOTHING,
                NOTHING if client.loss is None else f"{client.loss:.3f}",
                format_seconds(client.seconds),
            ]
        lines.append(tuple(Cell(text) for text in texts))
    headings = ("Client", "Rows", "Answered", "Failed", "Weight", "Last loss", "Time")
    return Clients(Grid(headings, tuple(lines)), max(0, len(names) - _CLIENTS))


def where_time_went(told: Told) -> Markup | None:
    """Seconds by activity, over all rounds."""
    spent = {name: seconds for name, seconds in told.seconds.items() if seconds > 0}
    parts = [name for name in dict.fromkeys([*_ACTIVITIES, *spent]) if name in spent]
    if not parts:
        return None
    said = ", ".join(f"{part} {format_seconds(spent[part])}" for part in parts)
    bars = [Bar(part, spent[part], "m-0") for part in parts]
    most = max(spent.values())
    return bar_panel(bars, title="Where the time went", description=said, highest=most, value_format=format_seconds)


def _named(told: Told) -> list[str]:
    """Everyone who could be asked: clients whose rows are known here, or owners elsewhere."""
    clients, owners = told.start.get("clients"), told.start.get("owners")
    return [*(clients if isinstance(clients, Mapping) else ()), *(owners if isinstance(owners, list) else ())]
