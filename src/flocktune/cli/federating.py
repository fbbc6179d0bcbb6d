"""The coordinator's verb ``flocktune federation run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flocktune.cli.common import Overrides, Quiet, console, escaped, problems
from flocktune.cli.federation import Folder, federation


@federation.command()
def run(
    folder: Folder,
    recipe: Annotated[Path | None, typer.Argument(help="A recipe (YAML) with allocation natural.")] = None,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run: the newest, or the one named in RECIPE's place.")
    ] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Start it, and do not wait for its end.")] = False,
    quiet: Quiet = False,
) -> None:
    """Run a recipe with the enrolled owners. It goes on whoever watches; Ctrl-C once ends it after the round."""
    from flocktune.config.load import load_recipe
    from flocktune.errors import Problem, UserError
    from flocktune.federation.layout import open_federation
    from flocktune.federation.running import ask_to_stop, begin, follow, resumable, start
    from flocktune.interrupts import stop_on_signals
    from flocktune.report.html import write_report
    from flocktune.report.live import LiveView
    from flocktune.report.summaries import choices
    from flocktune.report.tables import comparison_table
    from flocktune.runs import Stopped

    opened = open_federation(folder)
    if not resume and recipe is None:
        fix = f"Or go on with one: flocktune federation run {folder} --resume"
        raise UserError(Problem("RECIPE", "a recipe (YAML)", "nothing", fix))
    if resume and overrides:
        fix = "A run goes on as it began; start another with other settings."
        raise UserError(Problem("--resume", "no settings", " ".join(overrides), fix))
    if resume:
        place = resumable(opened, None if recipe is None else recipe.name)
    else:
        place = begin(opened, load_recipe(recipe or Path(), overrides or ()))
    number = start(opened, place)
    again = f"flocktune federation run {escaped(str(folder))} --resume {place.name}"
    if detach:
        console.print(f"Started {place}. Watch it: {again}", soft_wrap=True)
        return
    try:
        with LiveView(console, plain=True if quiet else None) as view, stop_on_signals(view.console.print) as stop:
            summary = follow(opened, place, number, [view], stop.is_set)
    except Stopped:
        problems.print(f"Stopped. Go on with: {again}", soft_wrap=True)
        raise typer.Exit(130) from None
    except KeyboardInterrupt:
        ask_to_stop(place)
        problems.print(f"Not watching any more; the run ends after this round. Go on with: {again}", soft_wrap=True)
        raise typer.Exit(130) from None
    console.print(comparison_table({str(summary["method"]): summary}))
    for said in choices({str(summary["method"]): summary}):
        console.print(escaped(said), highlight=False)
    console.print(f"Report: {write_report(place)}", soft_wrap=True)
