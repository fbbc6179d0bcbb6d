"""What pydantic finds wrong with plain values, in words for whoever wrote them."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_type_hints

from flocktune.config import schema
from flocktune.config.schema import RunConfig
from flocktune.errors import Problem


def explain(errors: Sequence[Any], known: Sequence[str] = ()) -> list[Problem]:
    """Pydantic's errors in our words; what the members of one union say about one place becomes one problem.

    ``known``: the keys that an unknown one may have been meant as; default: those of a recipe.
    """
    merged: dict[str, Problem] = {}
    for item in errors:
        top, below = item["loc"][:1], item["loc"][1:]  # "alignment" is a part of a recipe, and a kind of attack
        path = [str(part) for part in (*top, *(part for part in below if not _is_union_member(part)))]
        where = ".".join(path) or "recipe"
        got = json.dumps(item.get("input"), default=str)[:120]
        context = item.get("ctx", {})
        match item["type"]:
            case "unexpected_keyword_argument" | "extra_forbidden":
                problem = Problem(
                    where, "a known setting", "an unknown one", _of_kind(item["loc"], path) or _suggest(path, known)
                )
            case "union_tag_not_found":
                problem = Problem(f"{where}.kind", "a value", "nothing", "Each kind has settings of its own.")
            case "union_tag_invalid":
                problem = Problem(f"{where}.kind", f"one of {context['expected_tags']}", repr(context["tag"]))
            case "string_pattern_mismatch":
                problem = Problem(where, f"a text like {context['pattern']}", got)
            case "missing" | "missing_argument":
                problem = Problem(where, "a value", "nothing")
            case "dataclass_type" | "dict_type":
                problem = Problem(where, "a group of settings, {key: value}", got, _settings_of(path))
            case "too_short":
                if isinstance(item.get("input"), list) and len(item["input"]) >= context["min_length"]:
                    continue  # they are there, and what is wrong with them is said of each
                problem = Problem(where, f"at least {context['min_length']} of them", got)
            case "literal_error":
                problem = Problem(where, _wanted(item), got, _nearest_value(item))
            case _:
                problem = Problem(where, _wanted(item), got)
        if where in merged:
            problem = dataclasses.replace(problem, expected=f"{merged[where].expected}, or {problem.expected}")
        merged[where] = problem
    return list(merged.values())


_WORDS = {
    "greater than or equal to ": "at least ",
    "less than or equal to ": "at most ",
    "greater than ": "more than ",
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "string": "a text",
    "array": "a list",
}
"""How pydantic's messages begin -> how ours do."""


def _wanted(item: Any) -> str:
    wanted = item["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    for theirs, ours in _WORDS.items():
        if wanted.startswith(theirs):
            return ours + wanted.removeprefix(theirs)
    return wanted


def _nearest_value(item: Any) -> str:
    """Of a setting with few values, the one that was most likely meant."""
    values = re.findall(r"'([^']*)'", item["msg"])
    near = difflib.get_close_matches(str(item.get("input")), values, n=1, cutoff=0.6)
    return f"Did you mean {near[0]}?" if near else ""


def _of_kind(location: Sequence[Any], path: Sequence[str]) -> str:
    """For a key that a kind does not have: the kind's own settings, of which one was meant."""
    *_, kind, key = ("", *location)
    fields = [name for part in _PARTS_OF.get(kind, ()) for name in get_type_hints(part) if name != "kind"]
    near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.6)
    if near:
        return f"Did you mean {'.'.join([*path[:-1], near[0]])}?"
    return f"Settings of kind {kind}: {', '.join(dict.fromkeys(fields))}." if fields else ""


def _is_union_member(part: Any) -> bool:
    """Pydantic puts the union's member into the path (``iid``, ``tuple[str, ...]``); it is no key of the recipe."""
    return isinstance(part, str) and (
        part in _KINDS or part in ("int", "str", "CustomTemplate") or part.startswith("constrained-") or "[" in part
    )


def _parts(hint: Any) -> Iterator[type]:
    """The dataclasses that a value of this type may be, or have among its members."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint
    for inner in get_args(hint):
        yield from _parts(inner)


def _keys(part: type, prefix: str = "") -> Iterator[str]:
    """Every key below ``part``, whichever kinds are chosen."""
    for name, hint in get_type_hints(part).items():
        yield prefix + name
        for inner in _parts(hint):
            yield from _keys(inner, f"{prefix}{name}.")


_PARTS_OF: dict[str, list[type]] = {}
"""A kind -> the parts of a recipe that are of it."""

for _part in [part for part in vars(schema).values() if dataclasses.is_dataclass(part)]:
    if isinstance(_part, type) and "kind" in _part.__annotations__:
        for _tag in get_args(get_type_hints(_part)["kind"]):
            _PARTS_OF.setdefault(_tag, []).append(_part)

_KINDS = frozenset(_PARTS_OF)

_KEYS = tuple(dict.fromkeys(_keys(RunConfig)))


def settings_that_take_a_value() -> list[str]:
    """All keys of a recipe, without those of groups: ``local.lr``, not ``local``."""
    groups = {key.rpartition(".")[0] for key in _KEYS}
    return [key for key in _KEYS if key not in groups]


def _settings_of(path: Sequence[str]) -> str:
    """The keys of a group, where it is one of a recipe."""
    group = ".".join(part for part in path if not part.isdigit()) + "."
    names = [key.removeprefix(group) for key in _KEYS if key.startswith(group)]
    mine = [name for name in names if "." not in name]
    return f"Its settings: {', '.join(mine)}." if mine else ""


def _suggest(path: Sequence[str], known: Sequence[str] = ()) -> str:
    """The nearest key that exists at this place."""
    wanted = ".".join(part for part in path if not part.isdigit())
    near = difflib.get_close_matches(wanted, known or _KEYS, n=1, cutoff=0.6)
    return f"Did you mean {near[0]}?" if near else "See the commented recipe of: flocktune init"
