"""What all verbs share: the application, where it prints, the arguments that come again and again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    name="flocktune",
    help="Federated fine-tuning of large language models: the data never moves, only small adapters do.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
console = Console()
problems = Console(stderr=True)

Recipe = Annotated[Path, typer.Argument(help="A recipe (YAML). Write one with: flocktune init")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings to change: key=value, for example local.lr=1e-3")]
RunFolder = Annotated[Path, typer.Argument(help="A run's folder.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="One line a round instead of the live view.")]


def existing_run(folder: Path) -> Path:
    from flocktune.errors import Problem, UserError

    if not (folder / "recipe.yaml").exists():
        got = "nothing there" if not folder.exists() else "a folder without recipe.yaml"
        raise UserError(Problem(str(folder), "a run's folder", got, "Start one with: flocktune run RECIPE"))
    return folder


def as_emulator(model: str) -> bool:
    """What ``--as`` means. Raises UserError."""
    from flocktune.errors import Problem, UserError

    if model not in ("full", "emulator"):
        raise UserError(Problem("--as", "full or emulator", repr(model)))
    return model == "emulator"


def escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def needs_extra(module: str, extra: str) -> None:
    """Raise UserError, saying what to install, when a library of an extra is missing."""
    from importlib.util import find_spec

    from flocktune.errors import Problem, UserError

    if find_spec(module) is None:
        raise UserError(Problem(module, "installed", "not found", f"pip install 'flocktune[{extra}]'"))
