"""What all verbs share: the application, where it prints, the arguments that come again and again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flocktune.cli.completing import methods, recipes, runs, settings

app = typer.Typer(
    name="flocktune",
    help="Federated fine-tuning of large language models: the data never moves, only small adapters do.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"flocktune {version('flocktune')}")
        raise typer.Exit


@app.callback()
def _all(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """What stands before a verb."""


console = Console()
problems = Console(stderr=True)

Recipe = Annotated[Path, typer.Argument(autocompletion=recipes, help="A recipe (YAML). Write one with: flocktune init")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(autocompletion=settings, help="Settings to change: key=value, for example local.lr=1e-3"),
]
RunFolder = Annotated[Path, typer.Argument(autocompletion=runs, help="A run's folder.")]
Result = Annotated[Path, typer.Argument(autocompletion=runs, help="A run's folder, or a PEFT adapter's.")]
Method = Annotated[
    str | None, typer.Option(autocompletion=methods, help="Which run of a comparison; default: its main one.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="One line a round instead of the live view.")]


def existing_run(folder: Path) -> Path:
    from flocktune.errors import Problem, UserError, near

    if not (folder / "recipe.yaml").exists():
        got = "nothing there" if not folder.exists() else "a folder without recipe.yaml"
        fix = near(folder) or "Start one with: flocktune run RECIPE"
        raise UserError(Problem(str(folder), "a run's folder", got, fix))
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
        fix = f"Install it: pip install 'flocktune[{extra}]'. All extras: flocktune doctor"
        raise UserError(Problem(module, f"the library, which is of the extra {extra}", "nothing installed", fix))
