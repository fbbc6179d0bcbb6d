"""Client by client in a report: the loss of each on its own held-out rows, as a table and as a strip of dots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flocktune.report.figures import Figure
from flocktune.report.runs import Experiment, Run
from flocktune.report.styles import style_of
from flocktune.report.summaries import Value, method_label, metric, number
from flocktune.report.svg import clipped, drawing, linear, tag, text, ticks
from flocktune.report.tables import NOTHING, Cell, Grid, format_metric

ADAPTERS = {"clients": "common", "clients_own": "own"}
"""Data sets of a run's metrics -> whose adapter each client was evaluated with."""

COLUMNS = ("loss", "loss_std", "loss_worst_tenth")
_HEADINGS = ("Method", "Adapter", "Mean", "Standard deviation", "Worst tenth")


@dataclass(frozen=True)
class Fared:
    """A row: a method with one kind of adapter, and how its clients fared; ``losses`` are of the first seed."""

    style: str
    label: str
    adapter: str
    cells: tuple[Cell, ...]
    losses: Mapping[str, float]


def how_clients_fared(experiment: Experiment) -> tuple[Grid, list[str], Figure | None] | None:
    """The table, its rows' styles, and the picture; None when no run was evaluated client by client."""
    keys = list(experiment.summaries)
    rows = []
    for key, summary in experiment.summaries.items():
        for dataset, adapter in ADAPTERS.items():
            values = [metric(summary, dataset, name) for name in COLUMNS]
            if any(values):
                cells = tuple(Cell(format_metric("loss", v), value=v.mean if v else None) for v in values)
                losses = _losses(next(iter(experiment.methods.get(key) or []), None), dataset)
                rows.append(Fared(style_of(key, keys)[0], method_label(key, summary), adapter, cells, losses))
    if not rows:
        return None
    grid = Grid(_HEADINGS, tuple((Cell(row.label), Cell(row.adapter), *row.cells) for row in rows))
    return grid, [row.style for row in rows], _strip(rows)


def _losses(run: Run | None, dataset: str) -> dict[str, float]:
    """Client -> loss, of the last evaluation."""
    found = [event for event in run.evaluations if event.get("dataset") == dataset] if run else []
    table = (found[-1].get("clients") or {}) if found else {}
    losses = {str(client): number((values or {}).get("loss")) for client, values in table.items()}
    return {client: loss for client, loss in losses.items() if loss is not None}


def _strip(rows: list[Fared]) -> Figure | None:
    """A dot a client on one scale, a line of dots a row; a dot's name is in its title."""
    shown = [row for row in rows if row.losses]
    if not shown:
        return None
    row_height, left, width = 26.0, 190.0, 1040.0
    losses = [loss for row in shown for loss in row.losses.values()]
    low, high = min(losses), max(losses)
    to_x = linear(low, high if high > low else low + 1, left, width - 30)
    bottom = len(shown) * row_height + 4
    drawn = []
    for tick in ticks(low, high, 8):
        drawn.append(tag("path", d=f"M{to_x(tick):.1f} 0V{bottom:.1f}", class_="grid"))
        drawn.append(text(to_x(tick), bottom + 16, f"{tick:g}", class_="tick", text_anchor="middle"))
    for place, row in enumerate(shown):
        y = place * row_height + row_height / 2
        name = clipped(f"{row.label}, {row.adapter}", 28)
        drawn.append(text(left - 14, y + 4, name, class_="name", text_anchor="end"))
        for client, loss in row.losses.items():
            note = tag("title", f"{row.label}, {row.adapter} adapter, {client}: {format_metric('loss', Value(loss))}")
            drawn.append(tag("circle", note, cx=to_x(loss), cy=y, r=4.5, class_=f"{row.style} fill", opacity="0.65"))
    said = "; ".join(
        f"{row.label}, {row.adapter} adapter: {min(row.losses.values()):.2f} to {max(row.losses.values()):.2f}"
        for row in shown
    )
    title = "Each client's loss on its own held-out rows"
    named = dict.fromkeys(client for row in shown for client in row.losses)
    numbers = (
        (Cell(client), *(Cell(f"{row.losses[client]:.3f}" if client in row.losses else NOTHING) for row in shown))
        for client in named
    )
    headings = ("Client", *(f"{row.label}, {row.adapter} adapter" for row in shown))
    return Figure(title, drawing(width, bottom + 26, title, said, *drawn), Grid(headings, tuple(numbers)))
