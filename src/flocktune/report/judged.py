"""A judge's table for a terminal, as Markdown, and as a section of a page: all from the content of judge.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from flocktune.report.tables import Cell, Grid

JUDGED = "judge.json"
"""In a run's or a comparison's folder: the newest table."""

COLUMNS = ("Baseline", "Scores", "Relative Score", "95 % interval", "Won/tied/lost")
SCORES_NOTE = "Scores: sums over the questions (baseline, {ours}), each answer's the mean of both orders and all draws."

FAULTS = {
    "no verdict": "without scores",
    "out of range": "with scores that are not from 1 to 10",
    "ambiguous": "with several scores that differ",
    "cut off": "cut off at the token limit",
    "withheld": "withheld by the server",
    "rejected": "of requests that the server did not take",
    "no reply": "that never came",
}


def judged_rows(data: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table in the paper's form, a baseline a row, in the order of :data:`COLUMNS`."""
    return [(str(pair["baseline"]), *_figures(pair)) for pair in data["pairs"]]


def category_rows(pair: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The same figures for every category of one pairing."""
    return [(f"{name} ({one['questions']})", *_figures(one)) for name, one in pair["categories"].items()]


def judged_table(data: Mapping[str, Any]) -> Table:
    """For a terminal of 80 columns."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for number, name in enumerate(COLUMNS):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in judged_rows(data):
        table.add_row(*row)
    return table


def judged_notes(data: Mapping[str, Any]) -> list[str]:
    """What must be read beside the table, a sentence a line."""
    settings, usage = data["judge"], data["usage"]
    several = len(data["pairs"]) > 1
    notes = [SCORES_NOTE.format(ours=data["ours"]["label"])]
    for pair in data["pairs"]:
        lines = _pair_notes(pair)
        notes += [f"{pair['baseline']}: {line}" if several else line[:1].upper() + line[1:] for line in lines]
    notes.append(
        f"Judge: {settings['model']} at {settings['url']}, temperature {_plain(settings['temperature'])}, both orders,"
        f" {_count(settings['draws'], 'draw')}."
    )
    if settings["same_draws"]:
        notes.append(
            "All draws of every question are the same reply: this server does not draw, and more tell nothing."
        )
    tokens = f"{usage['tokens'][0]:,} tokens read and {usage['tokens'][1]:,} written"
    cost = f", {usage['cost']:.2f} at the prices given" if usage["priced"] else ""
    guessed = " (partly by the rule: the server did not count)" if usage["tokens_guessed"] else ""
    notes.append(
        f"{_count(usage['replies'], 'reply', 'replies')}, {tokens}{guessed}{cost};"
        f" {_count(usage['requests_now'], 'request')} made this time, the rest from the cache."
    )
    return notes


def judged_markdown(data: Mapping[str, Any]) -> str:
    """judge.md: the table, what to read beside it, and the categories."""
    lines = [f"# {data['ours']['label']} judged", "", *_markdown_table(COLUMNS, judged_rows(data)), ""]
    lines += [f"- {note}" for note in judged_notes(data)]
    for pair in data["pairs"]:
        if len(pair["categories"]) > 1:
            lines += ["", f"## {pair['baseline']}, by category", ""]
            lines += _markdown_table(("Category (questions)", *COLUMNS[1:]), category_rows(pair))
    return "\n".join(lines) + "\n"


def judged_section(folder: Path) -> dict[str, Any] | None:
    """What a page shows of a folder's judge.json: a table, its notes, and a table a pairing by category.

    None where nothing was judged. Raises KeyError, TypeError or ValueError for a damaged file.
    """
    if not (folder / JUDGED).is_file():
        return None
    data = json.loads((folder / JUDGED).read_text(encoding="utf-8"))
    categories = {
        str(pair["baseline"]): _grid(("Category (questions)", *COLUMNS[1:]), category_rows(pair))
        for pair in data["pairs"]
        if len(pair["categories"]) > 1
    }
    return {
        "ours": str(data["ours"]["label"]),
        "table": _grid(COLUMNS, judged_rows(data)),
        "notes": judged_notes(data),
        "categories": categories,
    }


def _grid(headings: tuple[str, ...], rows: Sequence[Sequence[str]]) -> Grid:
    return Grid(headings, tuple(tuple(Cell(text) for text in row) for row in rows))


def _figures(one: Mapping[str, Any]) -> tuple[str, ...]:
    if not one["questions"]:
        return "none", "-", "-", "-"
    low_high = one["relative_interval"]
    return (
        f"({one['sum_baseline']:.1f}, {one['sum_ours']:.1f})",
        f"{one['relative_score']:.3f}",
        f"{low_high[0]:.3f} to {low_high[1]:.3f}" if low_high else "-",
        f"{one['wins']} / {one['ties']} / {one['losses']}",
    )


def _pair_notes(pair: Mapping[str, Any]) -> list[str]:
    notes = []
    if pair["questions"]:
        low, high = (100 * share for share in pair["wins_interval"])
        notes.append(
            f"won {100 * pair['wins'] / pair['questions']:.0f} % of {_count(pair['questions'], 'question')}"
            f" (95 % interval {low:.0f} to {high:.0f} %){_meaning(pair)}. The order of the answers changed the winner"
            f" in {100 * pair['order_changes_winner']:.0f} % of {_count(pair['draws'], 'draw')}; standing first was"
            f" worth {pair['first_place_points']:+.2f} points."
        )
    if pair["faults"]:
        bad = sum(pair["faults"].values())
        kinds = ", ".join(f"{count} {FAULTS.get(kind, kind)}" for kind, count in pair["faults"].items())
        notes.append(f"{bad} of {pair['verdicts']} replies are no verdicts: {kinds}. They count for neither side.")
    if left := pair["asked"] - pair["questions"]:
        notes.append(f"{_count(left, 'question')} of {pair['asked']} left out for want of verdicts in both orders.")
    if pair["unanswered"]:
        notes.append(f"{_count(pair['unanswered'], 'question')} left out that one of the two has not answered.")
    return notes


def _meaning(pair: Mapping[str, Any]) -> str:
    """Whether the figures can tell the two apart."""
    interval = pair["relative_interval"]
    if interval is None:
        return "; one question says nothing of others"
    if interval[0] <= 1 <= interval[1]:
        return "; the Relative Score's interval holds 1, so these questions do not tell the two apart"
    return ""


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    return [line(head), line(["---", *["---:"] * (len(head) - 1)]), *map(line, rows)]


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _plain(value: Any) -> str:
    return "as the server has it" if value is None else f"{value:g}"
