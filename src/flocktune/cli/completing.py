"""What a shell offers for an argument when Tab is pressed. Where nothing is offered, it offers files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def recipes(incomplete: str) -> list[str]:
    """Recipes here and in recipes/."""
    return _beginning(incomplete, (str(path) for folder in (Path(), Path("recipes")) for path in folder.glob("*.yaml")))


def runs(incomplete: str) -> list[str]:
    """Folders of runs and comparisons below runs/, newest first; else those where ``incomplete`` leads."""
    typed = Path(incomplete)
    places = [Path("runs"), typed if incomplete.endswith("/") else typed.parent]
    found = {path.parent: path.stat().st_mtime for place in places for path in place.glob("*/recipe.yaml")}
    return _beginning(incomplete, (str(path) for path in sorted(found, key=lambda path: -found[path])))


def settings(incomplete: str) -> list[str]:
    """Keys of a recipe, each with the sign that its value follows."""
    from flocktune.config.mistakes import settings_that_take_a_value

    return _beginning(incomplete, (f"{key}=" for key in settings_that_take_a_value()))


def methods(incomplete: str) -> list[str]:
    """Methods of a comparison."""
    return _beginning(incomplete, ("base", "local_1", "fedit", "fedbiot", "centralised"))


def federated_methods(incomplete: str) -> list[str]:
    """Methods that have a commented recipe."""
    return _beginning(incomplete, ("fedit", "fedbiot"))


def _beginning(incomplete: str, offered: Iterable[str]) -> list[str]:
    return [each for each in dict.fromkeys(offered) if each.startswith(incomplete)]
