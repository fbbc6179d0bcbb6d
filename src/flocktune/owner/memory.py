"""What an owner's side remembers from one task of a run to the next: a client's private state, on its own disk alone.

HOME/memory/DIGEST.safetensors   one file a run, by the SHA-256 of the run's name, mode 0600

A task whose answer was lost comes again, and must find what it found the first time. So a file holds the memory before
the newest task, too: a task of the same round and seed starts from that one, a later task from what the newest left.
A round of secure aggregation is one task in phases: its first phase begins anew, the others go on.

The count of steps on rows that are hidden never goes back, whatever else does: an update that left is spent. Only the
very same task, whose answer is the same bits, is not counted again.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from flocktune.algorithms.private_rows import STEPS
from flocktune.config.secure_aggregation import MASKED, PHASES
from flocktune.enrolment import write_private
from flocktune.errors import Problem, UserError
from flocktune.interfaces import Memory
from flocktune.owner.home import MEMORY
from flocktune.owner.policy import MB
from flocktune.owner.reading import Refused
from flocktune.privacy.secagg.messages import method_part, without_secrets
from flocktune.tensors import digest, group, prefixed, size_bytes
from flocktune.types import ClientTask

FORMAT = "flocktune-memory/1"


@dataclass(frozen=True)
class Kept:
    """One run's memory: ``before`` and ``after`` the newest task, which was of ``round`` and ``seed``.

    ``spent``: the most steps that were ever counted; ``asked``: a digest of the task that was trained for last.
    """

    round: int = -1
    seed: int = -1
    before: Memory = field(default_factory=dict)
    after: Memory = field(default_factory=dict)
    spent: int = 0
    asked: str = ""

    def for_task(self, task: ClientTask, data: str = "") -> Memory:
        """What ``task`` starts from, on rows of the digest ``data``.

        Raises Refused for a round that is over: what it started from is gone.
        """
        if not self.before and not self.after and not self.spent:
            return {}
        if task.round < self.round:
            raise Refused(
                f"round {task.round + 1} is over: this owner's memory of the run is of round {self.round + 1}, "
                "and of the state before that"
            )
        found = self.before if self._is_newest(task) and not _goes_on(task) else self.after
        if _steps(found) < self.spent and _trains(task) and _digest(task, data) != self.asked:
            return {**found, STEPS: torch.tensor(self.spent)}
        return found

    def following(self, task: ClientTask, memory: Memory, data: str = "") -> Kept:
        """What is kept when ``task`` has left ``memory``."""
        before = self.before if self._is_newest(task) and _goes_on(task) else self.for_task(task, data)
        asked = _digest(task, data) if _trains(task) else self.asked
        spent = max(self.spent, _steps(memory))
        return Kept(task.round, task.seed, without_secrets(before), memory, spent, asked if spent else "")

    def _is_newest(self, task: ClientTask) -> bool:
        return (task.round, task.seed) == (self.round, self.seed)


def _goes_on(task: ClientTask) -> bool:
    """Whether it is a later phase of a round that the phases before it have begun."""
    return task.kind in PHASES[1:]


def _trains(task: ClientTask) -> bool:
    return task.kind not in PHASES or task.kind == MASKED


def _steps(memory: Memory) -> int:
    return int(memory.get(STEPS, torch.tensor(0)))


def _digest(task: ClientTask, data: str) -> str:
    """Of all that an update depends on: who is asked the same again, of the same rows, gives the same."""
    named = [data, task.config_digest, task.model_digest, str(task.round), str(task.seed)]
    parts = [*named, digest(method_part(task.tensors))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def load_memory(home: Path, run: str) -> Kept:
    """What is kept of ``run``; nothing when it has left no memory. Raises UserError for a file that is damaged."""
    path = _path(home, run)
    try:
        if not path.exists():
            return Kept()
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in json.loads(said["names"])}
        parts = group(tensors, "before"), group(tensors, "after"), int(said["spent"]), said["asked"]
        kept = Kept(int(said["round"]), int(said["seed"]), *parts)
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
        "spent": str(kept.spent),
        "asked": kept.asked,
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
    parts += [str(kept.spent), kept.asked]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
