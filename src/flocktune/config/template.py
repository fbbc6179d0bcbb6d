"""The commented recipes that ``flocktune init`` writes."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from flocktune.errors import Problem, UserError, reason
from flocktune.files import write_atomic

_FOLDER = Path(__file__).parent / "templates"


def write_template(path: Path, method: str) -> None:
    """Write the commented recipe of ``method`` to ``path``. Raises UserError; never overwrites."""
    source = _FOLDER / f"{method}.yaml"
    if not source.exists():
        known = ", ".join(sorted(file.stem for file in _FOLDER.glob("*.yaml")))
        raise UserError(Problem("--method", f"one of {known}", repr(method)))
    if path.exists():
        raise UserError(Problem(str(path), "a path that is free", "a file", "Choose another name, or remove it."))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(
            path, source.read_text(encoding="utf-8").replace("name: my-run ", f"name: {_name(path.stem):<6} ", 1)
        )
    except OSError as error:
        raise UserError(Problem(str(path), "a path that can be written", reason(error))) from None


def _name(stem: str) -> str:
    """A run's name from a file's, quoted where YAML would read a number or a truth value."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip("._-") or "my-run"
    return name if name[0].isalpha() and isinstance(yaml.safe_load(name), str) else f'"{name}"'
