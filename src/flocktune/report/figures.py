"""Pictures with what belongs to them: a title, a remark, and their numbers as a table for those who do not see them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from flocktune.report.charts import Bar, Line
from flocktune.report.tables import NOTHING, Cell, Grid

_ROUNDS = 60
"""Rows of a curve's table at most; of longer curves every so-manyth round is told, and the last."""


@dataclass(frozen=True)
class Figure:
    """A picture as the page shows it; ``numbers``: the same as a table, None where one stands beside it."""

    title: str
    picture: Markup
    numbers: Grid | None = None
    note: str = ""
    key: Markup | str = ""


def numbers_of_lines(lines: Sequence[Line], x_label: str, y_format: Callable[[float], str]) -> Grid:
    """A row for each place on the x axis, a column for each line."""
    tables = [dict(line.points) for line in lines]
    places = sorted({x for table in tables for x in table})
    every = -(-len(places) // _ROUNDS) if places else 1
    shown = [place for index, place in enumerate(places) if index % every == 0 or place == places[-1]]
    rows = tuple(
        (Cell(f"{x:g}"), *(Cell(y_format(table[x]) if x in table else NOTHING) for table in tables)) for x in shown
    )
    return Grid((x_label.capitalize(), *(line.label for line in lines)), rows)


def numbers_of_bars(bars: Sequence[Bar], first: str, value: str, value_format: Callable[[float], str]) -> Grid:
    """A row a bar."""
    rows = tuple((Cell(bar.label), Cell(_spoken(bar, value_format))) for bar in bars)
    return Grid((first, value), rows)


def _spoken(bar: Bar, value_format: Callable[[float], str]) -> str:
    if bar.value is None:
        return NOTHING
    return value_format(bar.value) + (f" ± {value_format(bar.std)}" if bar.std is not None else "")
