"""How methods look and are called in pictures: the same in all of a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flocktune.report.summaries import SHARES, is_baseline, method_label

_DASHES = (None, "7 3", "2 3", "9 3 2 3")


def style_of(key: str, keys: Sequence[str]) -> tuple[str, str | None]:
    """CSS class and dash pattern of a method; local baselines share a colour and differ in their dashes."""
    if key.startswith("local"):
        local = [other for other in keys if other.startswith("local")]
        return "m-local", _DASHES[(local.index(key) + 1) % len(_DASHES)]
    if key in ("base", "centralised"):
        return f"m-{key}", None if key == "base" else "10 4"
    others = [other for other in keys if not is_baseline(other)]
    return f"m-{others.index(key) % 4}", _DASHES[others.index(key) // 4 % len(_DASHES)]


def short_label(key: str, summary: Mapping[str, Any]) -> str:
    """A method's name where room is short."""
    return method_label(key, summary).replace("Base model", "Base")


def spoken_as(name: str) -> Callable[[float], str]:
    """How values of a metric are written in pictures."""
    return (lambda value: f"{value * 100:.0f} %") if name in SHARES else (lambda value: f"{value:.2f}")
