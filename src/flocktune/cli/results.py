"""Verbs after a run: what it answers, files to take away."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flocktune.cli.common import Method, Result, RunFolder, app, console, existing_run, problems


@app.command()
def generate(
    result: Result,
    prompt: Annotated[str | None, typer.Option(help="An instruction.")] = None,
    context: Annotated[str, typer.Option(help="Text the instruction is about.")] = "",
    method: Method = None,
    base: Annotated[str | None, typer.Option(help="The base model, if not the one the adapter names.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="What every random draw follows from.")] = 0,
) -> None:
    """One answer, for scripts. To talk to the result: flocktune chat."""
    from flocktune.cli.talking import printable
    from flocktune.errors import Problem, UserError
    from flocktune.results import answer_stream, open_result

    if prompt is None:
        raise UserError(
            Problem("--prompt", "an instruction", "none", f"To talk to the result: flocktune chat {result}")
        )
    tuned = open_result(result, method, base)
    for piece in answer_stream(tuned, prompt, context, max_new_tokens, temperature, seed):
        console.file.write(printable(piece) if console.is_terminal else piece)  # a script gets every letter
        console.file.flush()
    console.print()


@app.command()
def export(
    folder: RunFolder,
    to: Annotated[Path, typer.Option(help="The folder to write.")],
    merged: Annotated[bool, typer.Option("--merged", help="The whole model with the adapter in its weights.")] = False,
    method: Method = None,
    base_name: Annotated[
        str | None,
        typer.Option(help="What the base is called elsewhere, such as its hub id; default: as the recipe has it."),
    ] = None,
) -> None:
    """Write a PEFT adapter (default) or a merged transformers model, with a model card."""
    from flocktune.exporting import export_result

    export_result(existing_run(folder), method, to, merged=merged, base_name=base_name)
    console.print(f"Wrote {to}. README.md in it is a model card; some of it only you can fill in.", soft_wrap=True)


@app.command()
def memorisation(
    folder: RunFolder,
    method: Method = None,
    max_rows: Annotated[int, typer.Option(min=2, help="The most rows of each kind that are looked at.")] = 1000,
    candidates: Annotated[int, typer.Option(min=1, help="Other secrets that a canary is compared with.")] = 511,
) -> None:
    """Attack a finished run: can its result tell rows that were trained on, and secrets among them?"""
    from flocktune.files import read_json
    from flocktune.leakage import leakage_table
    from flocktune.leakage import memorisation as attack

    written = attack(existing_run(folder), method, max_rows=max_rows, candidates=candidates)
    console.print(leakage_table(read_json(written)))
    console.print(f"Wrote {written}", soft_wrap=True)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="A run's folder; several are compared.")],
    to: Annotated[
        Path | None, typer.Option(help="The page to write; default: RUN/report.html, of several ./comparison.html.")
    ] = None,
) -> None:
    """Write a self-contained HTML page about a run or a comparison, or about several side by side."""
    from flocktune.report.compare import in_words, write_comparison
    from flocktune.report.html import write_report

    found = [existing_run(folder) for folder in folders]
    if len(found) == 1:
        console.print(f"Wrote {write_report(found[0], to)}", soft_wrap=True)
        return
    place = to or Path("comparison.html")
    compared = write_comparison(found, place)
    for obstacle in compared.obstacles:
        problems.print(f"warning: {obstacle}", style="yellow", markup=False, soft_wrap=True)
    console.print(in_words(compared), markup=False)
    console.print(f"Wrote {place}", soft_wrap=True)
