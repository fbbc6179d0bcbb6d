"""The little that charts need of SVG: elements, scales, ticks. Colours are CSS classes of the page."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

Scale = Callable[[float], float]

MISSING = "–"


def tag(name: str, *children: str, **attributes: object) -> Markup:
    """An element. Children and attribute values are escaped unless they are Markup.

    ``class_`` and ``aria_label`` become ``class`` and ``aria-label``; attributes that are None are left out.
    """
    written = Markup("").join(
        Markup(' {}="{}"').format(key.strip("_").replace("_", "-"), _short(value))
        for key, value in attributes.items()
        if value is not None
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), written, Markup("").join(map(escape, children)))


def drawing(width: float, height: float, title: str, description: str, *children: str) -> Markup:
    """A whole picture with a title and a description for those who can not see it."""
    name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    return tag(
        "svg",
        tag("title", title, id=f"{name}-title"),
        tag("desc", description, id=f"{name}-text"),
        *children,
        viewBox=f"0 0 {_short(width)} {_short(height)}",
        role="img",
        aria_labelledby=f"{name}-title {name}-text",
        style=f"max-width:{_short(width)}px",
        preserveAspectRatio="xMinYMin meet",
    )


def text(x: float, y: float, content: str, **attributes: object) -> Markup:
    """A line of text."""
    return tag("text", content, x=x, y=y, **attributes)


@dataclass(frozen=True)
class Box:
    """A rectangle of the picture: where data are drawn."""

    left: float
    top: float
    width: float
    height: float

    @property
    def right(self) -> float:
        return self.left + self.width

    @property
    def bottom(self) -> float:
        return self.top + self.height


def linear(low: float, high: float, start: float, end: float) -> Scale:
    """The straight line that takes low to start and high to end."""
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers (steps of 1, 2 or 5 times a power of ten) within [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places moved as little as one pass can do so that neighbours are ``gap`` apart, within [low, high]."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = list(places)
    for before, here in zip([None, *order], order, strict=False):
        floor = low if before is None else moved[before] + gap
        moved[here] = max(moved[here], floor)
    for after, here in zip([None, *reversed(order)], reversed(order), strict=False):
        ceiling = high if after is None else moved[after] - gap
        moved[here] = min(moved[here], ceiling)
    return moved


def clipped(content: str, letters: int) -> str:
    """``content``, shortened to ``letters`` with an ellipsis when it is longer."""
    return content if len(content) <= letters else content[: letters - 1] + "…"


def _short(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
