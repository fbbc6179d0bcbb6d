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
    flat = [dict(_flattened(read_settings(recipe))) for recipe in recipes]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    found = {key: tuple(settings.get(key, "–") for settings in flat) for key in keys}
    return {
        key: values for key, values in found.items() if len(set(values)) > 1 and key.partition(".")[0] not in _NAMELESS
    }


def _flattened(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping) and value:
            yield from _flattened(value, f"{name}.")
        else:
            yield name, value if isinstance(value, str) else json.dumps(value, default=str)
