"""A method beside its baselines, over one or several seeds: run folders inside a folder, and one table.

    EXPERIMENT/base/ local_1/ ... fedit/ centralised/     with several seeds below seed-0/, seed-1/, ...
    EXPERIMENT/summary.json                               one entry per method

Every run is created and resumed as if it stood alone.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flocktune.allocation import allocate_clients
from flocktune.assemble import federation
from flocktune.config.load import load_recipe
from flocktune.config.schema import Named, RunConfig
from flocktune.errors import Problem, UserError
from flocktune.files import exclusive, read_json, write_json
from flocktune.outline import refuse_unreachable
from flocktune.report.summaries import combine_seeds
from flocktune.report.trackers import refuse_missing
from flocktune.run_folder import create_run, refuse_changes, remove_strays
from flocktune.runs import Listener, Stopped, execute
from flocktune.seeds import derive_seed
from flocktune.standing import EXPERIMENT, is_finished, told_ending


def is_experiment(config: RunConfig, seeds: Sequence[int]) -> bool:
    """Whether the recipe asks for more than one run."""
    compare = config.compare
    return bool(compare.base or compare.local or compare.centralised or compare.fedit or len(seeds) > 1)


def start(config: RunConfig, folder: Path, seeds: Sequence[int]) -> None:
    """Make the folder of what the recipe asks for, a run or an experiment, once all of it is there and fits.

    Raises UserError before a folder is made, so that a mended recipe can take the same one.
    """
    refuse_missing(config)
    refuse_unreachable(config)
    federation(config)
    plan(config, list(allocate_clients(config).clients))
    create_run(config, folder, seeds if is_experiment(config, seeds) else ())


def execute_experiment(
    folder: Path, listeners: Sequence[Listener] = (), stop: threading.Event | None = None
) -> dict[str, Any]:
    """Run, or go on with, every run of the experiment, and return its summary. Raises as :func:`execute`."""
    with exclusive(folder), told_ending(folder, Stopped):
        remove_strays(folder)
        config = load_recipe(folder / "recipe.yaml")
        seeds = read_json(folder / EXPERIMENT)["seeds"]
        plans = {}
        for seed in seeds:
            place = folder if len(seeds) == 1 else folder / f"seed-{seed}"
            seeded = replace(config, seed=seed)
            plans[place] = plan(seeded, list(allocate_clients(seeded).clients))
        if not all(is_finished(place / method) for place, runs in plans.items() for method in runs):
            _refuse_changes(folder, config)
        by_seed = [_execute_seed(place, runs, listeners, stop) for place, runs in plans.items()]
        if len(seeds) == 1:
            return by_seed[0]
        combined = {method: combine_seeds([summaries[method] for summaries in by_seed]) for method in by_seed[0]}
        write_json(folder / "summary.json", combined)
        return combined


def _execute_seed(
    place: Path, runs: Mapping[str, RunConfig], listeners: Sequence[Listener], stop: threading.Event | None
) -> dict[str, Any]:
    place.mkdir(exist_ok=True)
    summaries = {}
    for method, variant in runs.items():
        run = place / method
        if not (run / "recipe.yaml").exists():
            create_run(variant, run)
        summaries[method] = execute(run, listeners, stop)
    write_json(place / "summary.json", summaries)
    return summaries


def _refuse_changes(folder: Path, config: RunConfig) -> None:
    """Every run of an experiment stands on the same recipe, data and model, the ones that have not begun yet too."""
    settings = read_json(folder / EXPERIMENT)
    mine = federation(config).identity
    if "identity" in settings:
        refuse_changes(folder, settings["identity"], mine)
    else:
        write_json(folder / EXPERIMENT, {**settings, "identity": mine})


def plan(config: RunConfig, clients: Sequence[str]) -> Mapping[str, RunConfig]:
    """The runs of one seed, by name: ``base``, ``local_1`` ..., the method itself, ``fedit``, ``centralised``.

    Raises UserError when ``compare.local`` asks for clients that are not there.
    """
    compare = config.compare
    alone = replace(config, compare=type(compare)())
    whole = alone if config.method != "fedbiot" else _on_the_full_model(alone)
    runs = {"base": replace(whole, method="base")} if compare.base else {}
    for number, client in enumerate(_local_clients(config, clients), start=1):
        scheduling = replace(config.scheduling, selection=Named((client,)), over_select=0.0)
        runs[f"local_{number}"] = replace(whole, method="local", scheduling=scheduling)
    runs[config.method] = alone
    if compare.fedit:
        runs["fedit"] = replace(whole, method="fedit")
    if compare.centralised:
        runs["centralised"] = replace(whole, method="centralised")
    return runs


def _on_the_full_model(config: RunConfig) -> RunConfig:
    """FedBiOT's recipe for its baselines: without its proximal term, from no adapter, which would be of some layers."""
    local = replace(config.local, proximal_mu=0.0, proximal_on="factors")
    return replace(config, local=local, lora=replace(config.lora, start_from=None))


def _local_clients(config: RunConfig, clients: Sequence[str]) -> list[str]:
    wanted = config.compare.local
    if isinstance(wanted, int):
        if wanted > len(clients):
            raise UserError(Problem("compare.local", f"at most {len(clients)} clients", str(wanted)))
        draw = np.random.default_rng(derive_seed(config.seed, "local clients"))
        return [clients[index] for index in sorted(draw.permutation(len(clients))[:wanted])]
    UserError.raise_all(
        Problem("compare.local", f"names among {', '.join(clients[:20])}", json.dumps(name))
        for name in wanted
        if name not in clients
    )
    return list(wanted)
