"""A judge's reply to two scores, or to the reason why it is none. What is not plain is never guessed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

LOWEST, HIGHEST = 1, 10

Fault: TypeAlias = Literal["no verdict", "out of range", "ambiguous", "cut off", "withheld", "rejected", "no reply"]
"""Why there are no scores: the reply has none; one is not from 1 to 10; it has several that differ; it ended at the
token limit; the server withheld it; the server took no such request (400, 413, 422); it did not answer at all."""

_KEYS = ("first", "second")


@dataclass(frozen=True)
class Verdict:
    """Two scores from 1 to 10, in the order in which the answers were shown."""

    first: float
    second: float


def read_verdict(text: str, finish_reason: str | None = "stop") -> Verdict | Fault:
    """The scores of the JSON object ``{"first": X, "second": Y}`` in ``text``, wherever it stands.

    Prose, code fences and other keys around it do no harm, nor do numbers in quotes; a reasoning model's thoughts
    are left out. Two objects that differ, or a key that comes twice, are ambiguous. A reply that ended at the token
    limit is none, whatever it holds: it might have gone on to say something else.
    """
    if finish_reason == "length":
        return "cut off"
    if finish_reason == "content_filter":
        return "withheld"
    read = (_scores(pairs) for pairs in _objects(_without_thoughts(text)))
    found = {one for one in read if one is not None}
    if len(found) > 1:
        return "ambiguous"
    return found.pop() if found else "no verdict"


def _without_thoughts(text: str) -> str:
    _, ends, said = text.rpartition("</think>")
    if ends:
        return said
    before, begins, _ = text.partition("<think>")
    return before if begins else text


def _objects(text: str) -> list[list[tuple[str, Any]]]:
    """Every JSON object in ``text`` that names both scores, as its pairs: a key that comes twice must be seen."""
    objects: list[list[tuple[str, Any]]] = []
    decoder = json.JSONDecoder(object_pairs_hook=list)
    place = text.find("{")
    while place >= 0:
        end = place + 1
        try:
            pairs, past = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            pairs = []
        if set(_KEYS) <= {name for name, _ in pairs}:
            objects.append(pairs)
            end = past
        place = text.find("{", end)
    return objects


def _scores(pairs: list[tuple[str, Any]]) -> Verdict | Fault | None:
    """None when a value is no number: then it is no verdict, and another object may be one."""
    values = [(name, value) for name, value in pairs if name in _KEYS]
    if len(values) > len(_KEYS):
        return "ambiguous"
    numbers = {name: _number(value) for name, value in values}
    first, second = (numbers[key] for key in _KEYS)
    if first is None or second is None:
        return None
    if not (LOWEST <= first <= HIGHEST and LOWEST <= second <= HIGHEST):
        return "out of range"
    return Verdict(float(first), float(second))


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
