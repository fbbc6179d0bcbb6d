"""Decide by rule whether a generated answer is right.

Every row of the embedded world carries a `check`, a small JSON object. There are
four rules, told apart by the key that names them:

    {"one_of": ["baker", "the baker"]}
        the whole answer equals one of these
    {"list_of": ["plum", "fig", "pear"], "count": 2}
        exactly `count` different items, comma-separated, all of them allowed
    {"fields": {"name": "Tom", "job": "smith"}}
        a filled form, "name: Tom; job: smith", the fields in any order
    {"contains": ["Tom", "goat"], "ends_with": ["coat", "boat"],
     "min_words": 4, "max_words": 12}
        every word or phrase of `contains` occurs, the last word is one of
        `ends_with`, and the length lies between the bounds; all but `contains`
        may be left out

Comparison ignores case, runs of white space, and final punctuation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

_END = " \t\n.,;:!?"


def passes(answer: str, check: Mapping[str, Any]) -> bool:
    """Whether `answer` satisfies `check`; ValueError if the check is malformed."""
    rules = [name for name in _RULES if name in check]
    if len(rules) != 1:
        raise ValueError(f"a check needs exactly one of {', '.join(_RULES)}; got keys {sorted(check)}")
    required, optional, judge = _RULES[rules[0]]
    missing = required - set(check)
    unknown = set(check) - required - optional
    if missing or unknown:
        raise ValueError(f"check {rules[0]!r}: missing keys {sorted(missing)}, unknown keys {sorted(unknown)}")
    return judge(answer, check)


def _normal(text: str) -> str:
    return " ".join(text.split()).rstrip(_END).casefold()


def _strings(check: Mapping[str, Any], key: str) -> list[str]:
    """The normalised strings of a list-valued key."""
    value = check[key]
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"check key {key!r} must be a non-empty list of strings, got {value!r}")
    if not all(isinstance(item, str) and _normal(item) for item in value):
        raise ValueError(f"check key {key!r} must hold non-empty strings, got {value!r}")
    return [_normal(item) for item in value]


def _whole_number(check: Mapping[str, Any], key: str, default: int) -> int:
    value = check.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"check key {key!r} must be a whole number of at least 1, got {value!r}")
    return value


def _one_of(answer: str, check: Mapping[str, Any]) -> bool:
    return _normal(answer) in _strings(check, "one_of")


def _list_of(answer: str, check: Mapping[str, Any]) -> bool:
    allowed = set(_strings(check, "list_of"))
    count = _whole_number(check, "count", 1)
    if count > len(allowed):
        raise ValueError(f"check asks for {count} items but allows only {len(allowed)}")
    items = [_normal(item) for item in answer.split(",")]
    return len(items) == count == len(set(items)) and set(items) <= allowed


def _fields(answer: str, check: Mapping[str, Any]) -> bool:
    fields = check["fields"]
    if not isinstance(fields, Mapping) or not fields:
        raise ValueError(f"check key 'fields' must be a non-empty object, got {fields!r}")
    if not all(isinstance(value, str) for value in fields.values()):
        raise ValueError(f"check key 'fields' must hold strings, got {fields!r}")
    parts = [part.partition(":") for part in _normal(answer).split(";")]
    given = {_normal(key): _normal(value) for key, _, value in parts}
    wanted = {_normal(key): _normal(value) for key, value in fields.items()}
    return len(parts) == len(wanted) and given == wanted


def _contains(answer: str, check: Mapping[str, Any]) -> bool:
    wanted = _strings(check, "contains")
    endings = _strings(check, "ends_with") if "ends_with" in check else None
    shortest = _whole_number(check, "min_words", 1)
    longest = _whole_number(check, "max_words", 10_000)
    if shortest > longest:
        raise ValueError(f"check has min_words {shortest} above max_words {longest}")
    text = _normal(answer)
    words = text.split()
    return (
        shortest <= len(words) <= longest
        and all(re.search(rf"(?<!\w){re.escape(item)}(?!\w)", text) for item in wanted)
        and (endings is None or words[-1] in endings)
    )


# rule -> (required keys, optional keys, judge)
_RULES: dict[str, tuple[set[str], set[str], Callable[[str, Mapping[str, Any]], bool]]] = {
    "one_of": ({"one_of"}, set(), _one_of),
    "list_of": ({"list_of", "count"}, set(), _list_of),
    "fields": ({"fields"}, set(), _fields),
    "contains": ({"contains"}, {"ends_with", "min_words", "max_words"}, _contains),
}
