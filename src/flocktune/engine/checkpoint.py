"""Checkpoints: a state and the number of the next round. Atomic, verified, with the one before kept.

    RUN/state/round-00007.safetensors   the server's state, and clients' memories, after 7 rounds
    RUN/state/round-00007.json          the manifest: sha256 of that file, and digests of what the run stands on

The manifest is written last. A state without a manifest was never finished, one whose bytes do not match it is damaged:
the one before is used, saying so.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load

from flocktune.errors import FlocktuneError, UserError
from flocktune.files import read_json, sha256_bytes, write_atomic, write_json
from flocktune.interfaces import Memory, State
from flocktune.tensors import group, prefixed
from flocktune.types import Tensors
from flocktune.wire import encoded_pieces

_LOG = logging.getLogger(__name__)

_UNSOUND = (UserError, OSError, KeyError, TypeError, ValueError)
"""What reading a damaged checkpoint raises."""


class CheckpointDamaged(FlocktuneError):
    """No checkpoint of the run can be read; the message names each one and what is wrong with it."""


@dataclass(frozen=True)
class Checkpoint:
    """``rounds_done`` rounds are in ``state``. ``identity``: recipe, data and model the run stands on."""

    rounds_done: int
    state: State
    memories: Mapping[str, Memory]
    identity: Mapping[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int) -> None:
    """Write a checkpoint, durably, then remove all but the newest ``keep``.

    Raises OSError (full disk); the checkpoints before stand.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = prefixed("state", checkpoint.state)
    for client, memory in checkpoint.memories.items():
        tensors |= prefixed(f"memory/{client}", memory)
    path = folder / f"round-{checkpoint.rounds_done:05d}.safetensors"
    digest, pieces = hashlib.sha256(), encoded_pieces(tensors)
    for piece in pieces:
        digest.update(piece)
    write_atomic(path, pieces)
    manifest = {
        "rounds_done": checkpoint.rounds_done,
        "sha256": digest.hexdigest(),
        "clients_with_memory": sorted(checkpoint.memories),
        "identity": checkpoint.identity,
    }
    write_json(path.with_suffix(".json"), manifest)
    for old in _newest_first(folder.glob("round-*.json"))[keep:]:
        old.unlink()  # the manifest first: a state without one counts for nothing
    for state in folder.glob("round-*.safetensors"):
        if not state.with_suffix(".json").exists():
            state.unlink()  # the old ones', and what a kill between the two files left


def forget_after(folder: Path, rounds_done: int) -> None:
    """Remove the checkpoints of more rounds than that: they are of rounds that are about to happen again."""
    for manifest in folder.glob("round-*.json"):
        if int(manifest.stem.removeprefix("round-")) > rounds_done:
            manifest.unlink()


def checkpoint_of(folder: Path, rounds_done: int) -> Checkpoint:
    """That of so many rounds and no other. Raises CheckpointDamaged when it is not sound or not there."""
    path = folder / f"round-{rounds_done:05d}.json"
    try:
        return _read(path)
    except _UNSOUND as error:
        raise CheckpointDamaged(
            f"{path.with_suffix('.safetensors')}: expected the state after {rounds_done} rounds, got: {error}\n"
            "Bring it back from a copy, or start a new run."
        ) from None


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest sound checkpoint, or None when none was ever finished. Warns of those that are not sound.

    Raises CheckpointDamaged when there are checkpoints and none of them is sound.
    """
    problems = []
    manifests = _newest_first({path.with_suffix(".json") for path in folder.glob("round-*.*")})
    for path in manifests:
        try:
            checkpoint = _read(path)
        except _UNSOUND as error:
            problems.append(f"{path.with_suffix('.safetensors')}: {error}")
            continue
        for problem in problems:
            _LOG.warning(
                "damaged checkpoint: %s. Using the one before: %d rounds done.", problem, checkpoint.rounds_done
            )
        return checkpoint
    if len(manifests) > 1 or any(path.exists() for path in manifests):
        shown = "\n".join(f"  {problem}" for problem in problems)
        raise CheckpointDamaged(f"no sound checkpoint:\n{shown}\nBring one back from a copy, or start a new run.")
    return None  # nothing, or the very first state, killed before its manifest


def _newest_first(paths: Iterable[Path]) -> list[Path]:
    """By number: the names of rounds from 100000 on are longer."""
    return sorted(paths, key=lambda path: (len(path.name), path.name), reverse=True)


def _read(manifest_path: Path) -> Checkpoint:
    manifest = read_json(manifest_path)
    blob = manifest_path.with_suffix(".safetensors").read_bytes()
    found = sha256_bytes(blob)
    if found != manifest["sha256"]:
        raise ValueError(f"expected sha256 {manifest['sha256'][:12]}..., got {found[:12]}...")
    tensors: Tensors = load(blob)
    memories = {client: group(tensors, f"memory/{client}") for client in manifest["clients_with_memory"]}
    return Checkpoint(manifest["rounds_done"], group(tensors, "state"), memories, manifest["identity"])
