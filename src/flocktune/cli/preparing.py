"""Verbs before a run: a recipe, its costs, who holds what, what clients of FedBiOT get."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from flocktune.cli.common import Overrides, Recipe, app, console, escaped
from flocktune.cli.completing import federated_methods


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="The recipe to write.")] = Path("my-run.yaml"),
    method: Annotated[
        str, typer.Option(autocompletion=federated_methods, help="The method the recipe is for: fedit or fedbiot.")
    ] = "fedit",
) -> None:
    """Write a commented recipe to edit."""
    from flocktune.config.template import write_template

    write_template(path, method)
    console.print(f"Wrote {path}. Next: flocktune check {path}, then flocktune run {path}", soft_wrap=True)


@app.command()
def check(recipe: Recipe, overrides: Overrides = None) -> None:
    """Name every problem of recipe, files and model at once, and say what the run will cost. Trains nothing."""
    from flocktune.cli.estimated import estimate_table
    from flocktune.config.load import load_recipe
    from flocktune.estimate import estimate

    config = load_recipe(recipe, overrides or ())
    costs = estimate(config)
    console.print(estimate_table(costs))
    for text in costs.assumed:
        said, _, command = text.partition("\n")
        console.print(escaped(said), style="yellow")
        if command:
            console.print(escaped(command), soft_wrap=True)
    known = " as far as it can be seen without what is not here" if costs.assumed else ""
    console.print(f"{recipe} is sound{known}.", style="green", soft_wrap=True)


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


def _listed(numbers: Sequence[int]) -> str:
    return " ".join(str(number) for number in numbers) or "none"
