"""Verbs that run: one recipe, what was stopped, a whole study."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flocktune.cli.common import Overrides, Quiet, Recipe, RunFolder, app, console, escaped, existing_run, problems
from flocktune.cli.completing import recipes

if TYPE_CHECKING:
    from flocktune.config.schema import RunConfig


@app.command()
def run(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; default runs/<name of the recipe>.")] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Several seeds, for example 0,1,2: runs all, and shows mean and deviation.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Run a recipe. Ctrl-C once: finish the round, save, exit. Twice: stop now; nothing saved is lost."""
    from flocktune.config.load import load_recipe
    from flocktune.experiment import start

    config = load_recipe(recipe, overrides or ())
    folder = out or Path("runs") / config.name
    start(config, folder, _seeds(seeds, config))
    _go_on(folder, quiet)


@app.command()
def resume(folder: RunFolder, quiet: Quiet = False) -> None:
    """Go on with a run from its last saved round."""
    _go_on(existing_run(folder), quiet)


@app.command()
def study(
    file: Annotated[
        Path, typer.Argument(autocompletion=recipes, help="A study file (YAML), such as recipes/study_fedit.yaml.")
    ],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The study's folder; default runs/<name of the study>.")] = None,
    seeds: Annotated[str | None, typer.Option(help="In place of the file's seeds, for example 0 or 0,1,2.")] = None,
    quiet: Quiet = False,
) -> None:
    """Methods x settings x seeds in one table. The same command again goes on where it stopped."""
    from flocktune.config.schema import RunConfig
    from flocktune.config.study import load_study
    from flocktune.errors import FlocktuneError
    from flocktune.interrupts import stop_on_signals
    from flocktune.report.live import LiveView
    from flocktune.report.study_tables import study_in_terminal
    from flocktune.runs import Stopped
    from flocktune.study import execute_study

    plan = load_study(file, overrides or (), _seeds(seeds, RunConfig()) if seeds else None)
    folder = out or Path("runs") / plan.config.name
    again = f"flocktune {shlex.join(sys.argv[1:])}"
    try:
        with LiveView(console, plain=True if quiet else None) as view, stop_on_signals(view.console.print) as stop:
            result = execute_study(plan, folder, [view], stop, lambda line: view.console.print(escaped(line)))
    except (Stopped, KeyboardInterrupt):
        raise typer.Exit(_stopped(again)) from None
    except OSError as error:
        raise FlocktuneError(_not_written(folder, error, again)) from None
    console.print(study_in_terminal(result))
    console.print(f"Page: {folder / 'study.html'}; beside it study.md, study.csv, study.json", soft_wrap=True)
    failed = sum(outcome.state == "failed" for outcome in result.outcomes)
    if failed:
        raise FlocktuneError(f"{failed} of {len(result.outcomes)} cells. Mend what failed, then: {again}")


def _go_on(folder: Path, quiet: bool) -> None:
    """Run ``folder`` to its end, show the result, write the report."""
    from flocktune.config.load import load_recipe
    from flocktune.errors import FlocktuneError
    from flocktune.experiment import execute_experiment
    from flocktune.interrupts import stop_on_signals
    from flocktune.report.html import write_report
    from flocktune.report.live import LiveView
    from flocktune.report.summaries import choices
    from flocktune.report.tables import comparison_table
    from flocktune.report.trackers import Trackers
    from flocktune.run_folder import EXPERIMENT
    from flocktune.runs import Listener, Stopped, execute

    config = load_recipe(folder / "recipe.yaml")
    several = (folder / EXPERIMENT).exists()
    trackers = [Trackers(config, folder)] if config.trackers else []
    try:
        with LiveView(console, plain=True if quiet else None) as view, stop_on_signals(view.console.print) as stop:
            listeners: list[Listener] = [view, *trackers]
            summary = (execute_experiment if several else execute)(folder, listeners, stop)
    except (Stopped, KeyboardInterrupt):
        raise typer.Exit(_stopped(f"flocktune resume {folder}")) from None
    except OSError as error:
        raise FlocktuneError(_not_written(folder, error, f"flocktune resume {folder}")) from None
    summaries: Mapping[str, Any] = summary if several else {config.method: summary}
    console.print(comparison_table(summaries))
    for said in choices(summaries):
        console.print(escaped(said), highlight=False)
    console.print(f"Report: {write_report(folder)}", soft_wrap=True)


def _stopped(again: str) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on the way out already: one more Ctrl-C must not cut the advice off
    problems.print(f"Stopped. Go on with: {escaped(again)}", soft_wrap=True)
    return 130


def _not_written(folder: Path, error: OSError, again: str) -> str:
    from flocktune.errors import Problem, reason

    fix = f"Every saved round stands. Mend it, make room, then: {again}"
    return str(Problem(str(folder), "a disk that takes what the run writes", reason(error), fix))


def _seeds(text: str | None, config: RunConfig) -> tuple[int, ...]:
    from flocktune.errors import Problem, UserError

    if text is None:
        return (config.seed,)
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        seeds = ()
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UserError(Problem("--seeds", "different whole numbers, comma-separated, as 0,1,2", repr(text)))
    return seeds
