"""A run's settings as its recipe.yaml has them, read leniently: a report is made of damaged folders too."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

_NAMELESS = frozenset({"name", "compare", "seed"})
"""Settings in which runs differ without being other runs: their name, what stands beside them, their seeds."""


def read_settings(recipe: str) -> dict[str, Any]:
    """The recipe as a tree; empty when it is none."""
    try:
        tree = yaml.safe_load(recipe)
    except yaml.YAMLError:
        return {}
    return tree if isinstance(tree, dict) else {}


def differing(recipes: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Dotted setting -> its value in each recipe (``–``: it has none), of those in which not all are equal."""
    return {
        name: values
        for name, values in _apart([read_settings(recipe) for recipe in recipes])
        if name.partition(".")[0] not in _NAMELESS
    }


def _apart(trees: Sequence[Mapping[str, Any]], above: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
    """What is a group of settings in all recipes is looked into; what is one in some is told as a whole."""
    for key in dict.fromkeys(key for tree in trees for key in tree):
        values = [tree.get(key) for tree in trees]
        if all(value == values[0] for value in values):
            continue
        if all(isinstance(value, Mapping) for value in values):
            yield from _apart([value for value in values if isinstance(value, Mapping)], f"{above}{key}.")
        else:
            yield f"{above}{key}", tuple(map(_spoken, values))


def _spoken(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_spoken(inner)}" for key, inner in value.items() if inner is not None)
    if isinstance(value, list):
        return "; ".join(map(_spoken, value))
    return value if isinstance(value, str) else f"{value:.6g}" if isinstance(value, float) else json.dumps(value)
