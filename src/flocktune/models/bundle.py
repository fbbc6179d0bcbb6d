"""The emulator as a folder: a normal transformers checkpoint of fewer layers, and a manifest that says what it is.

    BUNDLE/config.json, model.safetensors, tokenizer files    any tool loads them
    BUNDLE/emulator.json                                      the split, a digest of every file, what it discloses

It is the one large thing that a client of FedBiOT gets, once; it is known by its digest.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flocktune.config.schema import ModelConfig
from flocktune.errors import Problem, UserError
from flocktune.files import open_to_readers, read_json, sha256_bytes, sha256_file, sync_folder, write_json
from flocktune.models.layers import drop_layers
from flocktune.models.load import load_model, quietly
from flocktune.models.split import SplitPlan, read_plan

_LOG = logging.getLogger(__name__)

MANIFEST = "emulator.json"
FORMAT = "flocktune-emulator/1"


@dataclass(frozen=True)
class Bundle:
    """A sound emulator folder. ``digest`` is of its files and its split; ``full_digest`` the full model's."""

    folder: Path
    plan: SplitPlan
    digest: str
    full_digest: str
    bytes: int
    parameters: int
    full_parameters: int


def write_bundle(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: SplitPlan, full_digest: str, folder: Path
) -> Bundle:
    """Write the emulator of ``model`` (which loses its dropped layers) as a new ``folder``, whole or not at all.

    It is loaded again and must give the same logits before it counts. Raises UserError when it does not (the
    architecture's layers depend on their place in a way that we do not know), and OSError.
    """
    full_parameters = _parameters(model)
    drop_layers(model, plan)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    remove_dead(folder.parent, f"{folder.name}.*")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        with quietly():
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
        open_to_readers(unfinished)
        _refuse_others(model, unfinished)
        files = sorted(file for file in unfinished.iterdir() if file.is_file())
        entries = {file.name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)} for file in files}
        manifest = {
            "format": FORMAT,
            "split": plan.as_dict(),
            "digest": _digest(entries, plan),
            "full_model_digest": full_digest,
            "parameters": {"emulator": _parameters(model), "full_model": full_parameters},
            "discloses": {
                "decoder_layers_unchanged": f"{len(plan.held)} of {plan.layers}",
                "share_of_parameters": round(_parameters(model) / full_parameters, 4),
                "also": ["token embeddings", "final norm", "output head", "tokenizer", "widths and number of layers"],
            },
            "files": entries,
        }
        write_json(unfinished / MANIFEST, manifest)
        unfinished.rename(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return read_bundle(folder)


def read_bundle(folder: Path, *, digest: str | None = None) -> Bundle:
    """Check every file of a bundle against its manifest, and the whole against ``digest`` when one is given.

    Raises UserError naming each file that is missing or damaged, or saying that it is another run's emulator.
    """
    if not (folder / MANIFEST).is_file():
        raise UserError(
            Problem(
                str(folder),
                f"an emulator bundle (a folder with {MANIFEST})",
                "nothing there" if not folder.exists() else f"one without {MANIFEST}",
                "Make one with: flocktune compress MODEL --to FOLDER",
            )
        )
    manifest = read_json(folder / MANIFEST)
    try:
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}")
        plan, files, sizes = read_plan(manifest["split"]), manifest["files"], manifest["parameters"]
        bundle = Bundle(
            folder,
            plan,
            str(manifest["digest"]),
            str(manifest["full_model_digest"]),
            sum(int(entry["bytes"]) for entry in files.values()),
            int(sizes["emulator"]),
            int(sizes["full_model"]),
        )
        if bundle.digest != _digest(files, plan):
            raise ValueError("its digest is not that of what it lists")
        problems = list(_damage(folder, files))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        got = f"a damaged one ({type(error).__name__}: {error})"
        raise UserError(Problem(str(folder / MANIFEST), f"a manifest of {FORMAT}", got, "Copy it again.")) from None
    UserError.raise_all(problems)
    if digest is not None and bundle.digest != digest:
        raise UserError(other_emulator(digest, bundle.digest))
    return bundle


def other_emulator(expected: str, got: str) -> Problem:
    """Why a client refuses a task that is not for the emulator that it holds."""
    return Problem(
        "emulator",
        f"the one of this run, {expected[:12]}...",
        f"another one, {got[:12] or 'none'}...",
        "Get the run's bundle again, or join the run that yours is of.",
    )


def receive_bundle(digest: str, fetch: Callable[[Path], object], cache: Path) -> Bundle:
    """The bundle of ``digest``: from ``cache`` when it is there and sound, else by ``fetch(folder)``, once.

    A damaged one in the cache is fetched again. Raises UserError when what was fetched is damaged or another.
    """
    folder = bundle_folder(cache, digest)
    if folder.exists():
        try:
            return read_bundle(folder, digest=digest)
        except UserError as error:
            _LOG.warning("the emulator in the cache is damaged and is fetched again: %s", error)
            shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_dead(folder.parent)
    unfinished = folder.with_name(f".{digest}.{os.getpid()}.tmp")
    try:
        fetch(unfinished)
        bundle = read_bundle(unfinished, digest=digest)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster, and its is as good
                raise
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return replace(bundle, folder=folder)


def copy_bundle(source: Path, to: Path) -> None:
    """The same files once more, independent of each other: a hard link would carry damage from one to the other."""
    shutil.copytree(source, to)


def bundle_folder(cache: Path, digest: str) -> Path:
    """Where a cache keeps the bundle of ``digest``."""
    return cache / "emulators" / digest


def remove_dead(folder: Path, name: str = "*") -> None:
    """Remove the half-made ``name`` that processes which no longer are have left in ``folder``: whole models, maybe."""
    for stray in folder.glob(f".{name}.tmp"):
        process = re.search(r"\.(\d+)\.tmp$", stray.name)
        if process and stray.is_dir() and not _is_alive(int(process[1])):
            shutil.rmtree(stray, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _damage(folder: Path, files: dict[str, dict[str, Any]]) -> Iterator[Problem]:
    for name, entry in files.items():
        path = folder / Path(name).name  # never out of the folder
        if not path.is_file():
            yield Problem(str(path), "a file of the emulator", "nothing there", "Copy the bundle again.")
        elif (found := sha256_file(path)) != entry["sha256"]:
            yield Problem(
                str(path),
                f"sha256 {entry['sha256'][:12]}... ({entry['bytes']} bytes)",
                f"{found[:12]}... ({path.stat().st_size} bytes): damaged",
                "Copy the bundle again.",
            )


def _refuse_others(model: PreTrainedModel, folder: Path) -> None:
    """Raise UserError when what lies in ``folder`` does not answer as ``model`` does."""
    kind = model.config.model_type
    try:
        again = load_model(ModelConfig(path=str(folder)), model.device, stored_dtype=True)
    except UserError as error:  # its files do not fit what its configuration says of fewer layers
        raise _not_by_layers(f"{kind}, whose emulator can not be loaded again") from error
    ids = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        mine, theirs = (each(input_ids=ids, use_cache=False).logits for each in (model, again))
    if not torch.equal(mine, theirs):
        raise _not_by_layers(f"{kind}, whose emulator answers otherwise once it is loaded again")


def _not_by_layers(got: str) -> UserError:
    expected = "a model whose layers work the same in another place"
    return UserError(Problem("emulator", expected, got, "This model can not be compressed by leaving layers out."))


def _digest(files: dict[str, dict[str, Any]], plan: SplitPlan) -> str:
    """Of files and split: the same layers can be divided into emulator and adapter in several ways."""
    contents = {name: entry["sha256"] for name, entry in files.items()}
    return sha256_bytes(json.dumps([contents, plan.as_dict()], sort_keys=True).encode())


def _parameters(model: PreTrainedModel) -> int:
    return sum(value.numel() for value in model.parameters())
