"""Grids as SVG: who holds what (clients x categories) and who took part when (clients x rounds)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from flocktune.report.svg import Box, clipped, drawing, linear, tag, text

_WIDTH = 1040.0
"""The width of a page, so that letters have one size in all pictures."""
_ROWS = 100
"""Clients drawn at most; more would be too thin to see."""
_DENSE = 40
"""With more rows than this they are thin, and their letters small."""
_NOTED = 4000
"""With more marks than this none carries its own note: the file would be megabytes."""
_COLUMNS = 200
"""Round columns drawn at most; with more rounds, a column stands for several."""


@dataclass(frozen=True)
class Participation:
    """What a client did: the rounds (from 0) in which it answered, failed, or was asked and not needed."""

    answered: frozenset[int]
    failed: frozenset[int]
    unused: frozenset[int] = frozenset()


def holdings(clients: Mapping[str, Mapping[str, int]], *, title: str = "Who holds what") -> Markup:
    """Clients x categories: the darker a cell, the more rows (the area of a square would show as much); totals right.

    ``clients``: name -> category -> rows. Beyond 100 clients the largest are drawn.
    """
    totals = {name: sum(counts.values()) for name, counts in clients.items()}
    chosen = set(sorted(totals, key=lambda name: -totals[name])[:_ROWS])
    names = [name for name in clients if name in chosen]
    columns = sorted({category for counts in clients.values() for category in counts})
    cell_height = 24.0 if len(names) <= _DENSE else 12.0
    left, head, total_width = 116.0, 22.0 + 3.5 * min(24, max(map(len, columns), default=4)), 190.0
    cell_width = max(20.0, min(90.0, (_WIDTH - left - total_width) / max(1, len(columns))))
    most = max((count for name in names for count in clients[name].values()), default=1) or 1
    drawn = [_slanted(category, left + (place + 0.5) * cell_width, head) for place, category in enumerate(columns)]
    edge = left + len(columns) * cell_width + 12
    drawn.append(text(edge, head - 6, "rows in all", class_="tick"))
    to_length = linear(0, max(totals.values(), default=1) or 1, 0, total_width - 70)
    for row, name in enumerate(names):
        y = head + row * cell_height
        drawn.append(text(left - 8, y + cell_height / 2 + 4, clipped(name, 15), class_="name", text_anchor="end"))
        for place, category in enumerate(columns):
            count = clients[name].get(category, 0)
            drawn.append(_heat_cell(name, category, count, most, left + place * cell_width, y, cell_width, cell_height))
        length = max(1.0, to_length(totals[name]))
        drawn.append(tag("rect", x=edge, y=y + cell_height / 4, width=length, height=cell_height / 2, class_="total"))
        drawn.append(text(edge + length + 6, y + cell_height / 2 + 4, f"{totals[name]:,}", class_="value"))
    left_out = len(clients) - len(names)
    if left_out:
        drawn.append(
            text(left, head + len(names) * cell_height + 16, f"and {left_out} smaller clients", class_="quiet")
        )
    largest = max(totals, key=lambda name: totals[name], default="none")
    description = (
        f"{len(clients)} clients, {len(columns)} categories, {sum(totals.values())} rows. "
        f"The largest client is {largest} with {totals.get(largest, 0)} rows."
    )
    height = head + len(names) * cell_height + (24 if left_out else 4)
    whole = tag("g", *drawn, class_="dense" if len(names) > _DENSE else None)
    return drawing(max(_WIDTH, edge + total_width), height, title, description, whole)


def participation(clients: Mapping[str, Participation], rounds: int, *, title: str) -> Markup:
    """Clients x rounds: filled where a client answered, a cross where it failed, a ring where it was not needed.

    With more than 200 rounds a column stands for several: the fuller, the more of them were answered.
    """
    names = list(clients)[:_ROWS]
    bucket = -(-rounds // _COLUMNS) if rounds else 1
    columns = -(-rounds // bucket) if rounds else 0
    left, top = 116.0, 8.0
    width = max(3.0, min(32.0, (_WIDTH - left - 70) / max(1, columns)))
    height = 20.0 if len(names) <= _DENSE else 11.0
    drawn = []
    for row, name in enumerate(names):
        y, who = top + row * height, clients[name]
        drawn.append(text(left - 8, y + height / 2 + 4, clipped(name, 15), class_="name", text_anchor="end"))
        drawn.append(tag("path", d=f"M{left:.1f} {y + height / 2:.1f}h{columns * width:.1f}", class_="grid"))
        spans = [range(start, min(rounds, start + bucket)) for start in range(0, rounds, bucket)]
        if len(names) * columns > _NOTED:
            drawn += _marks_together(who, spans, Box(left, y, width, height))
        else:
            cells = (Box(left + column * width, y, width, height) for column in range(columns))
            drawn += [_mark(who, span, name, cell) for span, cell in zip(spans, cells, strict=True)]
        end = left + columns * width + 10
        drawn.append(text(end, y + height / 2 + 4, str(len(who.answered)), class_="value"))
    bottom = top + len(names) * height
    every = max(1, -(-columns // 12))
    for column in range(0, columns, every):
        middle = left + (column + 0.5) * width
        drawn.append(text(middle, bottom + 16, str(column * bucket + 1), class_="tick", text_anchor="middle"))
    drawn.append(text(left - 8, bottom + 16, "round", class_="tick", text_anchor="end"))
    if len(clients) > len(names):
        drawn.append(text(left, bottom + 34, f"and {len(clients) - len(names)} more clients", class_="quiet"))
    answers = sum(len(who.answered) for who in clients.values())
    failures = sum(len(who.failed) for who in clients.values())
    whole = tag("g", *drawn, class_="dense" if len(names) > _DENSE else None)
    description = f"{len(clients)} clients over {rounds} rounds: {answers} answers, {failures} failures."
    return drawing(_WIDTH, bottom + (40 if len(clients) > len(names) else 22), title, description, whole)


def _mark(who: Participation, span: range, name: str, cell: Box) -> Markup:
    """The mark of one client in the rounds of ``span``."""
    answered, failed, unused = (sum(r in rounds for r in span) for rounds in (who.answered, who.failed, who.unused))
    when = f"round {span[0] + 1}" if len(span) == 1 else f"rounds {span[0] + 1} to {span[-1] + 1}"
    said = ", ".join(f"{n} {what}" for n, what in ((answered, "answered"), (failed, "failed"), (unused, "unused")) if n)
    note = tag("title", f"{name}, {when}: {said}")
    x, y = cell.left + cell.width / 2, cell.top + cell.height / 2
    half = max(1.0, min(cell.width, cell.height) / 2 - 3)
    if failed:
        side = f"{2 * half:.1f}"
        cross = f"M{x - half:.1f} {y - half:.1f}l{side} {side}m0 -{side}l-{side} {side}"
        return tag("path", note, d=cross, class_="failed")
    if answered:
        width, height = max(1.5, min(cell.width - 1, cell.height - 4)), cell.height - 4
        place = {"x": x - width / 2, "y": y - height / 2, "width": width, "height": height, "rx": min(2.0, width / 4)}
        share = 0.25 + 0.75 * answered / len(span)
        return tag("rect", note, **place, class_="answered", fill_opacity=share if share < 1 else None)
    if unused:
        return tag("circle", note, cx=x, cy=y, r=half, class_="unused")
    return Markup("")


def _marks_together(who: Participation, spans: Sequence[range], first: Box) -> list[Markup]:
    """A client's marks, a path for each kind and no note on any: a tenth of the time, and half the letters."""
    bucket = len(spans[0])
    failed = {number // bucket for number in who.failed}
    answered = Counter(number // bucket for number in who.answered)
    unused = {number // bucket for number in who.unused} - failed - set(answered)
    half, y = max(1.0, min(first.width, first.height) / 2 - 3), first.top + first.height / 2
    width, height = max(1.5, min(first.width - 1, first.height - 4)), first.height - 4

    def path(columns: Iterable[int], shape: str, **look: object) -> list[Markup]:
        middles = (first.left + (column + 0.5) * first.width for column in sorted(columns))
        places = "".join(f"M{middle:.1f} {y:.1f}{shape}" for middle in middles)
        return [tag("path", d=places, **look)] if places else []

    side = f"{2 * half:.1f}"
    bar = f"m{-width / 2:.1f} {-height / 2:.1f}h{width:.1f}v{height:.1f}h{-width:.1f}z"
    ring = f"m{-half:.1f} 0a{half:.1f} {half:.1f} 0 1 0 {side} 0a{half:.1f} {half:.1f} 0 1 0 -{side} 0"
    drawn = path(failed, f"m{-half:.1f} {-half:.1f}l{side} {side}m0 -{side}l-{side} {side}", class_="failed")
    by_share: dict[float, list[int]] = {}
    for column in set(answered) - failed:
        by_share.setdefault(math.ceil(4 * answered[column] / len(spans[column])) / 4, []).append(column)
    for share, columns in sorted(by_share.items()):
        drawn += path(columns, bar, class_="answered", fill_opacity=0.25 + 0.75 * share if share < 1 else None)
    return drawn + path(unused, ring, class_="unused")


def _heat_cell(
    name: str, category: str, count: int, most: int, x: float, y: float, width: float, height: float
) -> Markup:
    share = (
        count / most
    ) ** 0.5  # the eye tells small amounts apart better so; half dark at most, for the number on it
    note = tag("title", f"{name}, {category}: {count:,} rows")
    place = {"x": x + 1, "y": y + 1, "width": width - 2, "height": height - 2}
    drawn = [tag("rect", note, **place, rx=2, class_="track")]
    if count:
        drawn.append(tag("rect", note, **place, rx=2, class_="heat", fill_opacity=0.08 + 0.36 * share))
    if count and height >= 20 and width >= 26:
        drawn.append(text(x + width / 2, y + height / 2 + 4, f"{count:,}", text_anchor="middle"))
    return tag("g", *drawn)


def _slanted(label: str, x: float, y: float) -> Markup:
    place = f"translate({x:.1f} {y - 6:.1f}) rotate(-32)"
    return tag("text", clipped(label.replace("_", " "), 24), transform=place, class_="tick")


def legend(items: Sequence[tuple[str, str]]) -> Markup:
    """A key in HTML: CSS class of the swatch, and what it means."""
    entries = (
        tag("li", tag("span", class_=f"swatch {style}", aria_hidden="true"), meaning) for style, meaning in items
    )
    return tag("ul", *entries, class_="key")
