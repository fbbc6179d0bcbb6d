"""A run's folder: made, found finished, cleared of what a kill left, held to what it began with.

    RUN/recipe.yaml      the resolved recipe           RUN/state/        checkpoints
    RUN/metrics.jsonl    what happened, event by event RUN/adapter/      the result as a PEFT adapter
    RUN/answers.jsonl    answers to held-out rows      RUN/summary.json  written last: the run is finished
    RUN/run.log          warnings, if there were any
    RUN/ended.json       how the last attempt ended, if not with a summary; a killed one leaves none
    RUN/emulator/        FedBiOT: the bundle that clients get    RUN/emulator_adapter/   E and A, for the emulator

An experiment's folder holds such folders.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from flocktune.config.load import differences, dump_recipe, to_tree
from flocktune.config.schema import RunConfig
from flocktune.errors import Problem, UserError, reason
from flocktune.files import exclusive, sync_folder, write_atomic, write_json
from flocktune.models.bundle import Bundle, copy_bundle, read_bundle
from flocktune.models.peft_io import export_peft
from flocktune.standing import EXPERIMENT
from flocktune.standing import is_finished as is_finished
from flocktune.types import Tensors

PROMPTING = "flocktune.json"
"""In an adapter's folder: the prompt template that it was trained with."""


IDENTITY = {
    "data": "training data",
    "test": "test data",
    "validation": "validation data",
    "model": "base model",
    "public": "public data",
    "emulator": "emulator",
    "gate": "gate's files",
    "attack": "attackers' rows",
}
"""What a run stands on beside its recipe, and how it is called; the public data and the emulator are FedBiOT's."""


def create_run(config: RunConfig, folder: Path, seeds: Sequence[int] = ()) -> None:
    """Make the folder of a run, or with ``seeds`` that of an experiment. The recipe is written last.

    Raises UserError when there is something in the folder already, or it can not be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder):
            there = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}
            if there - {EXPERIMENT}:  # which alone is left of a start that was killed before the recipe was there
                raise UserError(
                    Problem(
                        str(folder),
                        "a new or empty run folder",
                        "one with files in it",
                        f"Go on with it by: flocktune resume {folder}, or choose another with --out.",
                    )
                )
            (folder / EXPERIMENT).unlink(missing_ok=True)
            if seeds:
                write_json(folder / EXPERIMENT, {"seeds": list(seeds)})
            write_atomic(folder / "recipe.yaml", dump_recipe(config))
    except OSError as error:
        fix = "Choose another: --out, or make room there."
        raise UserError(Problem(str(folder), "a folder that can be written", reason(error), fix)) from None


def write_adapter(folder: Path, adapter: Tensors, config: RunConfig, model: nn.Module, base: str | None = None) -> None:
    """Write a PEFT adapter folder, and beside it how to prompt it: what PEFT's own files do not say. Raises OSError.

    ``base``: what it plugs into, when that is not the recipe's model.
    """
    export_peft(adapter, config.lora, model, folder, base or config.model.path)
    data = to_tree(config)["data"]
    write_json(folder / PROMPTING, {key: data[key] for key in ("template", "max_tokens")})


@contextmanager
def logged(folder: Path) -> Iterator[None]:
    """Warnings of the package, tracebacks of failed clients among them, go to RUN/run.log too."""
    logger, handler = logging.getLogger("flocktune"), logging.FileHandler(folder / "run.log", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk has its own message
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def remove_strays(folder: Path) -> None:
    """Remove what a process that was killed while it wrote has left: half a file, under a name that nobody reads."""
    for stray in list(folder.rglob(".*.tmp")):
        if stray.is_dir():
            shutil.rmtree(stray, ignore_errors=True)
        else:
            stray.unlink(missing_ok=True)


def refuse_changes(folder: Path, saved: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Raise UserError that names every difference between two identities (``Assembly.identity``)."""
    changed = [f"recipe, {line}" for line in differences(saved["recipe"], mine["recipe"])]
    changed += [
        f"{what}: {saved.get(key, 'none')[:12]}... -> {mine.get(key, 'none')[:12]}..."
        for key, what in IDENTITY.items()
        if saved.get(key) != mine.get(key)
    ]
    UserError.raise_all(
        Problem(str(folder), "what the run began with", f"a change of {line}", "Undo the change, or start a new run.")
        for line in changed
    )


def show_bundle(bundle: Bundle, folder: Path) -> None:
    """What clients get lies in the run's folder, so that it can be handed out, tried, and found after years."""
    if bundle.folder == folder:  # it was read from there
        return
    if folder.exists():
        try:
            read_bundle(folder, digest=bundle.digest)
            return
        except UserError:
            shutil.rmtree(folder)
    unfinished = folder.with_name(".emulator.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    copy_bundle(bundle.folder, unfinished)
    unfinished.rename(folder)
    sync_folder(folder.parent)
