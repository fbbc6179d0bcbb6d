"""Verbs to try a result by hand: a conversation in the terminal, a page in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flocktune.cli.common import Result, app, as_emulator, console, needs_extra

Against = Annotated[
    str | None, typer.Option(help="Set a second answer beside it: 'base', another run's folder or an adapter's.")
]
Method = Annotated[str | None, typer.Option(help="Which run of a comparison; default: its main one.")]
Base = Annotated[str | None, typer.Option(help="The base model, if not the one the adapter names.")]
As = Annotated[str, typer.Option("--as", help="FedBiOT: in the full model (full), or on the emulator (emulator).")]
Longest = Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy.")]
Seed = Annotated[int, typer.Option(min=0, help="What every random draw follows from.")]


@app.command()
def chat(
    result: Result,
    against: Against = None,
    method: Method = None,
    base: Base = None,
    model: As = "full",
    max_new_tokens: Longest = 128,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
) -> None:
    """Talk to a result, or to two side by side. /help tells more; nothing is kept."""
    from flocktune.cli.talking import converse
    from flocktune.conversation import Settings, open_sides

    sides = open_sides(result, against, method=method, base_model=base, emulator=as_emulator(model))
    converse(sides, Settings(max_new_tokens, temperature, seed), console)


@app.command()
def playground(
    result: Result,
    against: Against = None,
    method: Method = None,
    base: Base = None,
    model: As = "full",
    max_new_tokens: Longest = 128,
    prompts: Annotated[
        Path | None, typer.Option(help="A text file of example instructions, one a line; default: a few of our own.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="On this machine alone; 0 is any that is free.")] = 7860,
) -> None:
    """The same in the browser: a page on this machine alone, with no public address."""
    needs_extra("gradio", "playground")
    from flocktune.conversation import Settings, open_sides
    from flocktune.playground.page import read_prompts, serve

    examples = read_prompts(prompts)
    sides = open_sides(result, against, method=method, base_model=base, emulator=as_emulator(model))
    serve(sides, Settings(max_new_tokens), examples, port, lambda address: console.print(f"{address}  Ctrl-C ends it."))
