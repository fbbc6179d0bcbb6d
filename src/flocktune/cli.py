"""The command line. Verbs are thin: they read arguments, call the library, show what came out.

Heavy libraries are imported inside the verbs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from flocktune.config.schema import RunConfig

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


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="The recipe to write.")] = Path("my-run.yaml"),
    method: Annotated[str, typer.Option(help="The method the recipe is for: fedit or fedbiot.")] = "fedit",
) -> None:
    """Write a commented recipe to edit."""
    from flocktune.config.template import write_template

    write_template(path, method)
    console.print(f"Wrote {path}. Next: flocktune check {path}, then flocktune run {path}", soft_wrap=True)


@app.command()
def check(recipe: Recipe, overrides: Overrides = None) -> None:
    """Name every problem of recipe, files and model at once, and say what the run will cost. Trains nothing."""
    from flocktune.config.load import load_recipe
    from flocktune.estimate import estimate, estimate_table

    config = load_recipe(recipe, overrides or ())
    console.print(estimate_table(estimate(config)))
    console.print(f"{recipe} is sound.", style="green", soft_wrap=True)


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
    _go_on(_existing_run(folder), quiet)


@app.command()
def study(
    file: Annotated[Path, typer.Argument(help="A study file (YAML), such as recipes/study_fedit.yaml.")],
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
            result = execute_study(plan, folder, [view], stop, lambda line: view.console.print(_escape(line)))
    except (Stopped, KeyboardInterrupt):
        raise typer.Exit(_stopped(again)) from None
    except OSError as error:
        raise FlocktuneError(_not_written(folder, error, again)) from None
    console.print(study_in_terminal(result))
    console.print(f"Page: {folder / 'study.html'}; beside it study.md, study.csv, study.json", soft_wrap=True)
    failed = sum(outcome.state == "failed" for outcome in result.outcomes)
    if failed:
        raise FlocktuneError(f"{failed} of {len(result.outcomes)} cells. Mend what failed, then: {again}")


@app.command()
def split(
    data: Annotated[str, typer.Argument(help="A data file, folder or hub id, 'embedded' or 'embedded-public'.")],
    to: Annotated[
        Path, typer.Option(help="The folder to write: one JSONL file a client, test.jsonl, a picture.")
    ] = Path("clients"),
    by: Annotated[
        str, typer.Option(help="iid, by_category, dirichlet, cluster_dirichlet, quantity_skew or natural.")
    ] = "dirichlet",
    clients: Annotated[int, typer.Option(min=1, help="How many clients.")] = 10,
    alpha: Annotated[float, typer.Option(help="How even a Dirichlet draw is: small is uneven.")] = 0.5,
    categories_per_client: Annotated[int, typer.Option(min=1, help="For by_category.")] = 2,
    min_rows: Annotated[int, typer.Option(min=0, help="The fewest rows a client may have.")] = 1,
    test_rows_per_category: Annotated[int, typer.Option(min=0, help="Rows of each category held out first.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="What every random draw follows from.")] = 0,
) -> None:
    """Client data allocation as files, with a picture of who holds what."""
    from flocktune.config.load import build_config
    from flocktune.splitting import write_split

    settings: dict[str, Any] = {"kind": by, "min_rows": min_rows, "clients": clients}
    match by:
        case "natural":
            del settings["clients"]
        case "by_category":
            settings["categories_per_client"] = categories_per_client
        case "dirichlet" | "cluster_dirichlet" | "quantity_skew":
            settings["alpha"] = alpha
    config = build_config(
        {
            "seed": seed,
            "data": {"train": data, "test_rows_per_category": test_rows_per_category},
            "allocation": settings,
        }
    )
    console.print(write_split(config, to))


@app.command()
def compress(
    model: Annotated[str, typer.Argument(help="A model's folder or hub id, or 'embedded'.")],
    to: Annotated[Path, typer.Option(help="The folder to write: a checkpoint of fewer layers, with a manifest.")],
    adapter_layers: Annotated[int, typer.Option(min=1, help="Layers that clients tune: the last ones.")] = 2,
    drop: Annotated[float, typer.Option(help="The fraction of the other layers that is left out.")] = 0.5,
    placement: Annotated[str, typer.Option(help="last, or first_and_last: as many layers at either end.")] = "last",
    choice: Annotated[
        str, typer.Option(help="uniform: even steps; importance: keep what changes public rows' states most.")
    ] = "uniform",
    public: Annotated[str, typer.Option(help="Public instructions, for --choice importance.")] = "embedded-public",
) -> None:
    """Make an emulator of a model: what the clients of FedBiOT get instead of it."""
    from flocktune.results import compress_model

    settings = {"adapter_layers": adapter_layers, "drop": drop, "placement": placement, "choice": choice}
    bundle = compress_model(model, settings, public, to)
    plan, share = bundle.plan, bundle.parameters / bundle.full_parameters
    console.print(
        f"Wrote {to}\n"
        f"{len(plan.held)} of {plan.layers} layers, {share:.0%} of the parameters, {bundle.bytes:,} bytes.\n"
        f"Adapter: layers {_listed(plan.adapter)}. Kept: {_listed(plan.kept)}. Left out: {_listed(plan.dropped)}.\n"
        "What it holds, it discloses: real layers, embeddings, head.",
        soft_wrap=True,
    )


@app.command("eval")
def evaluate_command(
    result: Annotated[Path, typer.Argument(help="A run's folder, or a PEFT adapter's.")],
    data: Annotated[
        str | None, typer.Option(help="Instructions to evaluate on; default: the run's held-out rows.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="Which run of a comparison; default: its main one.")] = None,
    max_rows: Annotated[int | None, typer.Option(min=1, help="The most rows to evaluate; default: all.")] = None,
    base: Annotated[str | None, typer.Option(help="The base model, if not the one the adapter names.")] = None,
    model: Annotated[
        str, typer.Option("--as", help="FedBiOT: the adapter in the full model (full), or on the emulator (emulator).")
    ] = "full",
    output: Annotated[Path | None, typer.Option("--json", help="Also write the numbers to this file.")] = None,
) -> None:
    """Loss, perplexity, exact match, contains and ROUGE-L, by category."""
    from flocktune.files import write_json
    from flocktune.report.tables import evaluation_table
    from flocktune.results import evaluate_on, open_result

    tuned = open_result(result, method, base, emulator=_as_emulator(model))
    numbers = evaluate_on(tuned, data, max_rows).as_dict()
    console.print(evaluation_table(numbers))
    if output:
        write_json(output, numbers)


@app.command()
def generate(
    result: Annotated[Path, typer.Argument(help="A run's folder, or a PEFT adapter's.")],
    prompt: Annotated[str | None, typer.Option(help="An instruction. Without it: an interactive mode.")] = None,
    context: Annotated[str, typer.Option(help="Text the instruction is about.")] = "",
    method: Annotated[str | None, typer.Option(help="Which run of a comparison; default: its main one.")] = None,
    base: Annotated[str | None, typer.Option(help="The base model, if not the one the adapter names.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="What every random draw follows from.")] = 0,
) -> None:
    """Try the tuned model."""
    from flocktune.results import answer_stream, open_result

    tuned = open_result(result, method, base)

    def say(instruction: str) -> None:
        for piece in answer_stream(tuned, instruction, context, max_new_tokens, temperature, seed):
            console.file.write(piece)
            console.file.flush()
        console.print()

    if prompt is not None:
        say(prompt)
        return
    console.print("Type an instruction; an empty line ends.", style="dim")
    while instruction := _ask():
        say(instruction)


@app.command()
def export(
    folder: RunFolder,
    to: Annotated[Path, typer.Option(help="The folder to write.")],
    merged: Annotated[bool, typer.Option("--merged", help="The whole model with the adapter in its weights.")] = False,
    method: Annotated[str | None, typer.Option(help="Which run of a comparison; default: its main one.")] = None,
) -> None:
    """Write a PEFT adapter (default) or a merged transformers model."""
    from flocktune.results import export_result

    console.print(f"Wrote {export_result(_existing_run(folder), method, to, merged=merged)}", soft_wrap=True)


@app.command()
def report(folder: RunFolder) -> None:
    """Write a self-contained HTML page about a run or a comparison."""
    from flocktune.report.html import write_report

    console.print(f"Wrote {write_report(_existing_run(folder))}", soft_wrap=True)


def _go_on(folder: Path, quiet: bool) -> None:
    """Run ``folder`` to its end, show the result, write the report."""
    from flocktune.config.load import load_recipe
    from flocktune.errors import FlocktuneError
    from flocktune.experiment import execute_experiment
    from flocktune.interrupts import stop_on_signals
    from flocktune.report.html import write_report
    from flocktune.report.live import LiveView
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
    console.print(comparison_table(summary if several else {config.method: summary}))
    console.print(f"Report: {write_report(folder)}", soft_wrap=True)


def _stopped(again: str) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on the way out already: one more Ctrl-C must not cut the advice off
    problems.print(f"Stopped. Go on with: {_escape(again)}", soft_wrap=True)
    return 130


def _not_written(folder: Path, error: OSError, again: str) -> str:
    from flocktune.errors import Problem

    fix = f"Every saved round stands. Mend it, make room, then: {again}"
    return str(Problem(str(folder), "a disk that takes what the run writes", str(error), fix))


def _existing_run(folder: Path) -> Path:
    from flocktune.errors import Problem, UserError

    if not (folder / "recipe.yaml").exists():
        got = "nothing there" if not folder.exists() else "a folder without recipe.yaml"
        raise UserError(Problem(str(folder), "a run's folder", got, "Start one with: flocktune run RECIPE"))
    return folder


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


def _as_emulator(model: str) -> bool:
    from flocktune.errors import Problem, UserError

    if model not in ("full", "emulator"):
        raise UserError(Problem("--as", "full or emulator", repr(model)))
    return model == "emulator"


def _listed(numbers: Sequence[int]) -> str:
    return " ".join(str(number) for number in numbers) or "none"


def _ask() -> str:
    try:
        return console.input("[bold]> [/]").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


@contextmanager
def _polite_errors() -> Iterator[None]:
    """A user's mistake: every problem on stderr, exit code 2, no traceback. A failed round: exit code 1."""
    from flocktune.errors import FlocktuneError, UserError

    try:
        yield
    except UserError as error:
        for problem in error.problems:
            problems.print(f"[red]error:[/] {_escape(str(problem))}", soft_wrap=True, highlight=False)
        raise SystemExit(2) from None
    except FlocktuneError as error:
        problems.print(f"[red]failed:[/] {_escape(str(error))}", soft_wrap=True, highlight=False)
        raise SystemExit(1) from None
    except OSError as error:
        problems.print(
            f"[red]failed:[/] {_escape(str(error))}. What was saved before stands.", soft_wrap=True, highlight=False
        )
        raise SystemExit(1) from None


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def main() -> None:
    """Entry point of ``flocktune``."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # oneDNN keeps a compiled kernel, with buffers, per shape; batches have hundreds of shapes (1,024 kept by default).
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    with _polite_errors():
        app(prog_name="flocktune")


if __name__ == "__main__":
    main()
