"""The default engine: every client in this process, one after another, on one resident base model."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from statistics import NormalDist

from flocktune.engine.client import answer
from flocktune.interfaces import ClientHalf, Issued, Memory, keep
from flocktune.seeds import derive_seed
from flocktune.types import ClientTask, Failure, Update


@dataclass
class InProcess:
    """Runs tasks lazily: the next client starts when its reply is asked for."""

    half: ClientHalf
    memories: dict[str, Memory] = field(default_factory=dict)

    def run(self, tasks: Iterable[ClientTask], wanted: int) -> Iterator[Update | Failure]:
        """One reply for each task, in task order."""
        return map(self._reply, tasks)

    def stream(self, issue: Callable[[], Issued | None]) -> Iterator[tuple[ClientTask, Update | Failure]]:
        """Replies in the order in which clients that work at the same time would be done.

        A task is done at ``at`` plus :func:`duration`; of two that are done at once, the one that was given out first
        comes first. The client works when its reply is due: who is at work has changed nothing yet.
        """
        number = count()
        at_work: list[tuple[float, int, ClientTask]] = []
        while True:
            while issued := issue():
                done = issued.at + duration(issued.task.seed)
                heapq.heappush(at_work, (done, next(number), issued.task))
            if not at_work:
                return
            _, _, task = heapq.heappop(at_work)
            yield task, self._reply(task)

    def _reply(self, task: ClientTask) -> Update | Failure:
        reply, memory = answer(task, self.half, self.memories.get(task.client, {}))
        keep(self.memories, task.client, memory)
        return reply


def duration(seed: int) -> float:
    """How long the task of this seed takes, in logical time: half-normal, as in arXiv 2106.06639, with mean 1."""
    uniform = (derive_seed(seed, "pace") >> 11) / 2**52
    return NormalDist(0, math.sqrt(math.pi / 2)).inv_cdf(0.5 + uniform / 2)
