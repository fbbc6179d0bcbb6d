"""The default engine: every client in this process, on one resident base model, several at once where they can be."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from statistics import NormalDist

from flocktune.engine.client import answer
from flocktune.gathering import Together
from flocktune.interfaces import ClientHalf, Issued, Memory, keep
from flocktune.seeds import derive_seed
from flocktune.types import ClientTask, Failure, Update


@dataclass
class InProcess:
    """Runs tasks lazily: the next client starts when its reply is asked for, and with it those that are trained at the
    same time (``together``; None is one after another)."""

    half: ClientHalf
    memories: dict[str, Memory] = field(default_factory=dict)
    together: Together | None = None

    def run(self, tasks: Iterable[ClientTask], wanted: int) -> Iterator[Update | Failure]:
        """One reply for each task, in task order. No more clients work than may be needed for ``wanted`` updates."""
        if self.together is None:
            yield from map(self._reply, tasks)
            return
        rest = iter(tasks)
        while some := list(islice(rest, max(1, min(self.together.width, wanted)))):
            for reply in self.together.run([partial(self._reply, task) for task in some]):
                wanted -= isinstance(reply, Update)
                yield reply

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
