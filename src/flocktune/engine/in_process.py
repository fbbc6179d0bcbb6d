"""The default engine: every client in this process, one after another, on one resident base model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from flocktune.engine.client import answer
from flocktune.interfaces import ClientHalf, Memory, Transform
from flocktune.types import ClientTask, Failure, Update


@dataclass
class InProcess:
    """Runs tasks lazily: the next client starts when its reply is asked for."""

    half: ClientHalf
    transforms: Sequence[Transform] = ()
    memories: dict[str, Memory] = field(default_factory=dict)

    def run(self, tasks: Iterable[ClientTask], wanted: int) -> Iterator[Update | Failure]:
        """One reply for each task, in task order."""
        for task in tasks:
            reply, memory = answer(task, self.half, self.memories.get(task.client, {}), self.transforms)
            if memory:
                self.memories[task.client] = memory
            yield reply
