"""The comparison of methods as a table: for the terminal (80 columns are enough) and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from flocktune.report.summaries import (
    METRIC_NAMES,
    SHARES,
    Summary,
    Value,
    best_methods,
    datasets,
    emulator_dataset,
    has_emulator,
    headline_metric,
    method_label,
    method_order,
    metric,
    number,
    plug_in_gap,
    table_metrics,
    travelled,
)

NOTHING = "–"
_COLUMNS = 80
"""Letters that a terminal is sure to have in a line."""
_METHOD_WIDTH = 15
_COSTS = ("Down", "Up", "Time")
_SPARED = ("Loss", "Time")
"""Columns that the terminal goes without, in this order, when an emulator's columns leave no room for them."""


@dataclass(frozen=True)
class Cell:
    """What stands in a cell, whether it is the best of its column, and the number by which it is sorted."""

    text: str
    best: bool = False
    value: float | None = None


@dataclass(frozen=True)
class Grid:
    """A comparison as text: column headings (the first is the method) and one row of cells a method."""

    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def comparison_grid(summaries: Mapping[str, Summary], dataset: str) -> Grid:
    """Methods x (scores, loss, bytes received and sent by all clients, time) on one data set.

    With an emulator the score is the headline metric alone, on the full model (AdapFu) and on the emulator (AdapEmu),
    and their difference.
    """
    headline = headline_metric(summaries, dataset) if has_emulator(summaries, dataset) else None
    names = [headline, *(["loss"] if headline != "loss" else [])] if headline else table_metrics(summaries, dataset)
    best = {name: best_methods(summaries, dataset, name) for name in names}
    rows = []
    for key in sorted(summaries, key=method_order):
        summary = summaries[key]
        scores = [score_cell(name, metric(summary, dataset, name), key in best[name]) for name in names]
        if headline:
            emulated = metric(summary, emulator_dataset(dataset), headline)
            gap = plug_in_gap(summary, dataset, headline)
            scores[1:1] = [
                score_cell(headline, emulated),
                Cell(format_gap(headline, gap), value=gap.mean if gap else None),
            ]
        costs = (
            cell_of(travelled(key, summary, "bytes_down"), format_bytes),
            cell_of(travelled(key, summary, "bytes_up"), format_bytes),
            cell_of(number(summary.get("seconds")), format_seconds),
        )
        rows.append((Cell(method_label(key, summary)), *scores, *costs))
    headings = _headings(names)
    if headline:
        unit = " %" if headline in SHARES else ""
        headings[:1] = [f"AdapFu{unit}", f"AdapEmu{unit}", "Gap"]
    return Grid(("Method", *headings, *_COSTS), tuple(rows))


def scores_only(grid: Grid, first: str = "Method") -> Grid:
    """A comparison without its costs, for pages that have a table of those; ``first`` heads the first column."""
    kept = [place for place, heading in enumerate(grid.headings) if heading not in _COSTS]
    rows = tuple(tuple(row[place] for place in kept) for row in grid.rows)
    return Grid((first, *(grid.headings[place] for place in kept[1:])), rows)


def comparison_table(summaries: Mapping[str, Summary], dataset: str | None = None) -> Table:
    """The comparison on one data set (default: the first) for the terminal; the best of a column is bold."""
    chosen = dataset or next(iter(datasets(summaries)), "")
    grid = comparison_grid(summaries, chosen)
    if has_emulator(summaries, chosen):
        grid = _narrowed(grid)
    table = Table(
        title=_title(summaries, chosen),
        title_justify="left",
        pad_edge=False,
        collapse_padding=True,
        box=box.SIMPLE_HEAD,
    )
    for place, heading in enumerate(grid.headings):
        table.add_column(
            heading, justify="right" if place else "left", no_wrap=True, min_width=0 if place else _METHOD_WIDTH
        )
    for row in grid.rows:
        table.add_row(*(Text(cell.text, style="bold" if cell.best else "") for cell in row))
    return table


def comparison_markdown(summaries: Mapping[str, Summary], dataset: str | None = None) -> str:
    """The same numbers as a Markdown table, columns aligned; ends with a newline."""
    grid = comparison_grid(summaries, dataset or next(iter(datasets(summaries)), ""))
    texts = [[_escaped(f"**{c.text}**" if c.best else c.text) for c in row] for row in grid.rows]
    widths = [max(3, *(len(line[column]) for line in (grid.headings, *texts))) for column in range(len(grid.headings))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [_padded(grid.headings, widths), rule, *(_padded(line, widths) for line in texts)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def evaluation_table(evaluation: Mapping[str, Any]) -> Table:
    """One evaluation (``overall`` and ``categories``) for the terminal: a row a category, then all of them.

    Where a rule decides what is correct, the looser ``contains`` is left out: 80 columns are few.
    """
    overall = evaluation["overall"]
    left_out = ("contains",) if "checked" in overall else ()
    names = [name for name in METRIC_NAMES if name in overall and name not in left_out]
    table = Table(pad_edge=False, collapse_padding=True, box=box.SIMPLE_HEAD)
    for heading in ("Category", "Rows", *_headings(names)):
        table.add_column(heading, justify="left" if heading == "Category" else "right", no_wrap=True)
    rows = [*sorted(evaluation["categories"].items()), ("all", overall)]
    for place, (category, values) in enumerate(rows):
        found = ((name, number(values.get(name))) for name in names)
        texts = (format_metric(name, None if value is None else Value(value)) for name, value in found)
        style = "bold" if place == len(rows) - 1 else ""
        table.add_row(*(Text(text, style=style) for text in (category, f"{values['rows']:,}", *texts)))
    return table


def harness_table(tasks: Mapping[str, Mapping[str, Any]]) -> Table:
    """What lm-evaluation-harness measured, for the terminal: a row for each task and metric, as it calls them."""
    table = Table(pad_edge=False, collapse_padding=True, box=box.SIMPLE_HEAD)
    for heading in ("Task", "Rows", "Metric", "Value", "Standard error"):
        table.add_column(heading, justify="left" if heading in ("Task", "Metric") else "right", no_wrap=True)
    for task, told in tasks.items():
        for name, value in told["metrics"].items():
            error = told["standard_errors"].get(name)
            table.add_row(task, f"{told['rows']:,}", name, f"{value:.4f}", NOTHING if error is None else f"{error:.4f}")
    return table


def interval_line(evaluation: Mapping[str, Any]) -> str:
    """The 95 % interval of the first share of right answers there is, in words; empty when there is none."""
    found = evaluation.get("intervals") or {}
    name = next((name for name in METRIC_NAMES if name in found), None)
    if name is None:
        return ""
    low, high = (f"{found[name][end] * 100:.1f}" for end in ("low", "high"))
    return f"95 % interval: {METRIC_NAMES[name]} {low} to {high} %, of {evaluation['overall']['rows']:,} rows"


def cell_of(value: float | None, spoken: Callable[[float | None], str]) -> Cell:
    """A number as a cell, which is sorted by it."""
    return Cell(spoken(value), value=value)


def score_cell(name: str, value: Value | None, best: bool = False) -> Cell:
    """A metric as a cell."""
    return Cell(format_metric(name, value), best, value.mean if value else None)


def format_metric(name: str, value: Value | None) -> str:
    """A metric for a table: shares in percent with one decimal, others with three, or two beside a std over seeds."""
    if value is None:
        return NOTHING
    scale, decimals = (100, 1) if name in SHARES else (1, 3 if value.std is None else 2)
    mean = f"{value.mean * scale:.{decimals}f}"
    return mean if value.std is None else f"{mean} ± {value.std * scale:.{decimals}f}"


def format_gap(name: str, gap: Value | None) -> str:
    """A difference with its sign; of shares in points."""
    return NOTHING if gap is None else ("+" if gap.mean > 0 else "") + format_metric(name, gap)


def format_bytes(count: float | None) -> str:
    """Bytes in decimal units, three digits: ``12.3 MB``."""
    if count is None:
        return NOTHING
    units = ("B", "kB", "MB", "GB", "TB", "PB")
    place = 0
    while count >= 999.5 and place < len(units) - 1:
        count, place = count / 1000, place + 1
    return f"{count:.0f} {units[place]}" if count >= 99.95 or place == 0 else f"{count:.3g} {units[place]}"


def format_seconds(seconds: float | None) -> str:
    """A duration: ``0.42 s``, ``12.3 s``, ``4:05`` (minutes), ``1:02:03`` (hours)."""
    if seconds is None:
        return NOTHING
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _headings(names: Sequence[str]) -> list[str]:
    short = {"exact_match": "Exact", "reward_accuracy": "Reward", "prefers_chosen": "Chosen"}
    short |= {"choice_per_token": "By token", "choice_per_byte": "By byte"}
    called = {**METRIC_NAMES, **short}  # every letter counts at 80 columns
    return [f"{called[name]} %" if name in SHARES else called[name] for name in names]


def _title(summaries: Mapping[str, Summary], dataset: str) -> str:
    seeds = max((len(summary.get("seeds") or [0]) for summary in summaries.values()), default=1)
    headline = headline_metric(summaries, dataset) if has_emulator(summaries, dataset) else None
    measured = f": {_headings([headline])[0]}" if headline else ""
    over = f", mean ± std of {seeds} seeds" if seeds > 1 else ""
    return f"Comparison on {dataset or 'nothing yet'}{measured}{over}"


def _narrowed(grid: Grid) -> Grid:
    """The grid without the columns that do not fit into a terminal of 80 columns."""
    for heading in _SPARED:
        lines = (grid.headings, *([cell.text for cell in row] for row in grid.rows))
        first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
        if max(_METHOD_WIDTH, first) + sum(others) + 2 * len(others) <= _COLUMNS:  # two blanks part neighbours
            break
        if heading in grid.headings:
            place = grid.headings.index(heading)
            rows = tuple(row[:place] + row[place + 1 :] for row in grid.rows)
            grid = Grid(grid.headings[:place] + grid.headings[place + 1 :], rows)
    return grid


def _padded(line: tuple[str, ...] | list[str], widths: list[int]) -> list[str]:
    return [
        text.rjust(width) if place else text.ljust(width)
        for place, (text, width) in enumerate(zip(line, widths, strict=True))
    ]


def _escaped(text: str) -> str:
    return text.replace("|", r"\|")
