"""Charts as pure functions from numbers to SVG: lines and bars.

A series has a ``style``: a CSS class of the page that gives its colour. Colour never stands alone: lines
also differ in their dashes and carry their name at their end, bars carry name and value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from flocktune.report.svg import Box, Scale, clipped, drawing, linear, spread, tag, text, ticks

Format = Callable[[float], str]


@dataclass(frozen=True)
class Line:
    """A curve: points (x, y) by rising x, perhaps a band (x, low, high) around it.

    ``reference``: one value that holds everywhere, drawn as a level across the whole chart.
    """

    label: str
    points: Sequence[tuple[float, float]]
    style: str
    dash: str | None = None
    band: Sequence[tuple[float, float, float]] = ()
    reference: bool = False


@dataclass(frozen=True)
class Bar:
    """One bar, with the standard deviation of its value when there is one."""

    label: str
    value: float | None
    style: str
    std: float | None = None


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    description: str,
    x_label: str,
    y_format: Format,
    width: float = 540,
    mark: tuple[float, str] | None = None,
) -> Markup:
    """Curves over a shared x, each named at its end. The y axis spans the data, not zero: curves show change.

    ``mark``: a place on the x axis, and what there is to say of it.
    """
    box = Box(46, 14, width - 46 - 128, 216)
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for y in (*(p[1] for p in line.points), *(b for p in line.band for b in p[1:]))]
    low, high = min(ys, default=0.0), max(ys, default=1.0)
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    if low >= 0:
        low = max(0.0, low - margin)
    else:
        low -= margin
    high += margin
    first, last = min(xs, default=0.0), max(xs, default=1.0)
    to_x = linear(first, last if last > first else first + 1, box.left, box.right)
    to_y = linear(low, high, box.bottom, box.top)
    ends = [to_y(line.points[-1][1]) for line in lines]
    labels = spread(ends, 15, box.top, box.bottom)
    return drawing(
        width,
        box.bottom + 40,
        title,
        description,
        _axes(box, to_x, to_y, ticks(low, high, 5), _whole(ticks(first, last, 6)), x_label, y_format),
        *(_mark(mark, box, to_x) if mark and first <= mark[0] <= last else ()),
        *(_curve(line, box, to_x, to_y, y_format) for line in lines),
        *(_end_label(line, box, end, place) for line, end, place in zip(lines, ends, labels, strict=True)),
    )


def bar_panel(
    bars: Sequence[Bar], *, title: str, description: str, highest: float, value_format: Format, width: float = 320
) -> Markup:
    """Horizontal bars from 0 to ``highest``, one below the other, each with its name and value."""
    letters = min(24, max((len(bar.label) for bar in bars), default=0))
    row, left = 24.0, 8 + 6.9 * letters
    to_x = linear(0, highest or 1, left, width - 56)
    drawn = []
    for place, bar in enumerate(bars):
        middle = place * row + row / 2
        drawn.append(text(left - 7, middle + 4, clipped(bar.label, 24), class_="name", text_anchor="end"))
        drawn.append(tag("rect", x=left, y=middle - 6, width=to_x(highest or 1) - left, height=12, class_="track"))
        if bar.value is None:
            drawn.append(text(left + 6, middle + 4, "not measured", class_="quiet"))
            continue
        end = to_x(min(bar.value, highest))
        note = f"{bar.label}: {value_format(bar.value)}"
        if bar.std is not None:
            note += f" ± {value_format(bar.std)}"
        length = max(1.0, end - left)
        drawn.append(
            tag("rect", tag("title", note), x=left, y=middle - 6, width=length, height=12, class_=f"{bar.style} fill")
        )
        if bar.std is not None:
            low, high = to_x(max(0.0, bar.value - bar.std)), to_x(min(highest, bar.value + bar.std))
            drawn.append(tag("path", d=f"M{low:.1f} {middle:.1f}H{high:.1f}", class_="whisker"))
        drawn.append(text(width, middle + 4, value_format(bar.value), class_="value", text_anchor="end"))
    return drawing(width, len(bars) * row + 2, title, description, *drawn)


def _axes(
    box: Box, to_x: Scale, to_y: Scale, levels: Sequence[float], steps: Sequence[float], x_label: str, y_format: Format
) -> Markup:
    drawn = []
    for level in levels:
        y = to_y(level)
        drawn.append(tag("path", d=f"M{box.left:.1f} {y:.1f}H{box.right:.1f}", class_="grid"))
        drawn.append(text(box.left - 8, y + 4, y_format(level), class_="tick", text_anchor="end"))
    for step in steps:
        drawn.append(text(to_x(step), box.bottom + 17, f"{step:g}", class_="tick", text_anchor="middle"))
    drawn.append(tag("path", d=f"M{box.left:.1f} {box.bottom:.1f}H{box.right:.1f}", class_="axis"))
    drawn.append(text(box.left + box.width / 2, box.bottom + 35, x_label, class_="tick", text_anchor="middle"))
    return tag("g", *drawn, aria_hidden="true")


def _mark(mark: tuple[float, str], box: Box, to_x: Scale) -> list[Markup]:
    x = to_x(mark[0])
    return [
        tag("path", d=f"M{x:.1f} {box.top:.1f}V{box.bottom:.1f}", class_="mark"),
        text(min(x, box.right - 20), box.top - 3, mark[1], class_="tick", text_anchor="middle"),
    ]


def _curve(line: Line, box: Box, to_x: Scale, to_y: Scale, y_format: Format) -> Markup:
    if line.reference:
        y = to_y(line.points[-1][1])
        note = tag("title", f"{line.label}: {y_format(line.points[-1][1])}")
        path = f"M{box.left:.1f} {y:.1f}H{box.right:.1f}"
        return tag("path", note, d=path, class_=f"{line.style} stroke", stroke_dasharray="2 5")
    drawn = []
    if len(line.band) > 1:
        upper = [f"{to_x(x):.1f} {to_y(high):.1f}" for x, _, high in line.band]
        lower = [f"{to_x(x):.1f} {to_y(low):.1f}" for x, low, _ in reversed(line.band)]
        drawn.append(tag("path", d="M" + "L".join([*upper, *lower]) + "Z", class_=f"{line.style} band"))
    places = [f"{to_x(x):.1f} {to_y(y):.1f}" for x, y in line.points]
    drawn.append(tag("path", d="M" + "L".join(places), class_=f"{line.style} stroke", stroke_dasharray=line.dash))
    shown = line.points if len(line.points) <= 40 else line.points[-1:]
    for x, y in shown:
        note = tag("title", f"{line.label}, {x:g}: {y_format(y)}")
        drawn.append(tag("circle", note, cx=to_x(x), cy=to_y(y), r=2.6, class_=f"{line.style} fill"))
    return tag("g", *drawn)


def _end_label(line: Line, box: Box, end: float, place: float) -> Markup:
    return tag(
        "g",
        tag("path", d=f"M{box.right + 4:.1f} {end:.1f}L{box.right + 14:.1f} {place:.1f}", class_="leader"),
        text(box.right + 18, place + 4, clipped(line.label, 17), class_=f"{line.style} label"),
    )


def _whole(values: Sequence[float]) -> list[float]:
    """Rounds are whole numbers, and so are their ticks."""
    return [value for value in values if value == int(value)]
