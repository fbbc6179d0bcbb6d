"""What an owner's side remembers from one task of a run to the next: a client's private state, on its own disk alone.

HOME/memory/DIGEST.safetensors   one file a run, by the SHA-256 of the run's name, mode 0600

A task whose answer was lost comes again, and must find what it found the first time. So a file holds the memory before
the newest task, too: a task of the same round and seed starts from that one, a later task from what the newest left.
A round of secure aggregation is one task in phases: its first phase begins anew, the others go on.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from flocktune.config.secure_aggregation import PHASES
from flocktune.enrolment import write_private
from flocktune.errors import Problem, UserError
from flocktune.interfaces import Memory
from flocktune.owner.home import MEMORY
from flocktune.owner.policy import MB
from flocktune.owner.reading import Refused
from flocktune.privacy.secagg.messages import without_secrets
from flocktune.tensors import digest, group, prefixed, size_bytes
from flocktune.types import ClientTask

FORMAT = "flocktune-memory/1"


@dataclass(frozen=True)
class Kept:
    """One run's memory: ``before`` and ``after`` the newest task, which was of ``round`` and ``seed``."""

    round: int = -1
    seed: int = -1
    before: Memory = field(default_factory=dict)
    after: Memory = field(default_factory=dict)

    def for_task(self, task: ClientTask) -> Memory:
        """What ``task`` starts from. Raises Refused for a round that is over: what it started from is gone."""
        if not self.before and not self.after:
            return {}
        if task.round < self.round:
            raise Refused(
                f"round {task.round + 1} is over: this owner's memory of the run is of round {self.round + 1}, "
                "and of the state before that"
            )
        return self.before if self._is_newest(task) and not _goes_on(task) else self.after

    def following(self, task: ClientTask, memory: Memory) -> Kept:
        """What is kept when ``task`` has left ``memory``."""
        before = self.before if self._is_newest(task) and _goes_on(task) else self.for_task(task)
        return Kept(task.round, task.seed, without_secrets(before), memory)

    def _is_newest(self, task: ClientTask) -> bool:
        return (task.round, task.seed) == (self.round, self.seed)


def _goes_on(task: ClientTask) -> bool:
    """Whether it is a later phase of a round that the phases before it have begun."""
    return task.kind in PHASES[1:]


def load_memory(home: Path, run: str) -> Kept:
    """What is kept of ``run``; nothing when it has left no memory. Raises UserError for a file that is damaged."""
    path = _path(home, run)
    try:
        if not path.exists():
            return Kept()
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in json.loads(said["names"])}
        kept = Kept(int(said["round"]), int(said["seed"]), group(tensors, "before"), group(tensors, "after"))
        if said["sha256"] != _sha256(run, kept):
            raise ValueError("its digest is another one")
        return kept
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        got = f"one that can not be read ({error})"
        fix = "Bring it back from a copy; or delete it, and this owner starts the run's private state anew."
        raise UserError(Problem(str(path), "this owner's memory of a run", got, fix)) from None


def save_memory(home: Path, run: str, kept: Kept, most_mb: int) -> None:
    """Write ``kept``, durably; no file is made for a run that has left no memory.

    Raises Refused when it is larger than ``most_mb``, OSError (a full disk); the file is then as it was.
    """
    path = _path(home, run)
    before, after = kept.before, kept.after
    if not before and not after and not path.exists():
        return
    size = size_bytes(before) + size_bytes(after)
    if size > most_mb * MB:
        raise Refused(f"policy: max_memory_mb: expected at most {most_mb} MB, got {size / MB:.1f} MB")
    tensors = {**prefixed("before", before), **prefixed("after", after)}
    said = {
        "format": FORMAT,
        "round": str(kept.round),
        "seed": str(kept.seed),
        "names": json.dumps(list(tensors)),  # in their order: sums over tensors round by it
        "sha256": _sha256(run, kept),
    }
    path.parent.mkdir(mode=0o700, exist_ok=True)
    # Copies: the two may share tensors, which a file can not.
    write_private(path, save({name: value.contiguous().clone() for name, value in tensors.items()}, metadata=said))


def _path(home: Path, run: str) -> Path:
    return home / MEMORY / f"{hashlib.sha256(run.encode()).hexdigest()}.safetensors"


def _sha256(run: str, kept: Kept) -> str:
    parts = [FORMAT, run, str(kept.round), str(kept.seed), digest(kept.before), digest(kept.after)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
