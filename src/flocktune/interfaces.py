"""The seams: what an algorithm, a wire transform and an engine must provide.

An algorithm is two halves in one file. They run in different processes in a deployment, yet are
read and tested together. All server functions are pure over an explicit state, so a checkpoint is
the state and the number of the next round, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from flocktune.types import ClientTask, Expected, Failure, Tensors, Update

State: TypeAlias = Tensors
"""A server's whole state, flat: ``group/name`` -> tensor. Scalars are 0-d tensors."""

Memory: TypeAlias = Tensors
"""A client's private state. It never travels. Empty when a method needs none."""

ClientHalf: TypeAlias = Callable[[ClientTask, Memory], tuple[Update, Memory]]
"""One client's part of one round."""


@dataclass(frozen=True)
class ServerHalf:
    """Pure functions over a serialisable state.

    init:    starting tensors -> state
    message: state, round -> tensors that go out in this round
    step:    state, combined update -> next state
    result:  state -> the tensors the run is for (the adapter)
    combine: updates (in task order), and the message that they are changes of -> one update. ``None`` means the
             weighted mean, and that is the licence for secure aggregation: only one linear sum leaves the clients.
    addressed: message, client -> what of it this client receives; all of it by default. Clients that receive the same
             are given the same object, which is encoded once.
    returned: what a client receives -> tensors of the names and shapes that its update must have; all of it by default
    prepare: state, round -> the state the round starts from, and what to tell of it: the server's own work before a
             round. What was told is empty when there was nothing to do. It may not depend on anything else, so that a
             round that was cut off is repeated to the same bits.
    """

    init: Callable[[Tensors], State]
    message: Callable[[State, int], Tensors]
    step: Callable[[State, Update], State]
    result: Callable[[State], Tensors]
    combine: Callable[[Iterable[Update], Tensors], Update] | None = None
    addressed: Callable[[Tensors, str], Tensors] = lambda message, client: message
    returned: Callable[[Tensors], Tensors] = lambda message: message
    prepare: Callable[[State, int], tuple[State, Mapping[str, Any]]] = lambda state, round: (state, {})


@dataclass(frozen=True)
class Transform:
    """A pair around the wire: what a client does last and the server undoes first.

    name:      also the group (``name/...``) of what a message holds for it, which no client half sees, and of its part
               of a client's memory
    on_client: update, task, its memory -> update that travels, its new memory. Runs in the client's process.
    on_server: update that came, expected -> update. Runs in the server's, in reverse order of the list; raises
               UpdateRefused. ``expected`` has the names and shapes that the update had before ``on_client``.
    on_wire:   expected before ``on_client`` -> expected after it. Only the last of a list may give AtMost.
    """

    name: str
    on_client: Callable[[Update, ClientTask, Memory], tuple[Update, Memory]]
    on_server: Callable[[Update, Tensors], Update]
    on_wire: Callable[[Tensors], Expected] = lambda expected: expected


@dataclass(frozen=True)
class Issued:
    """A task of buffered rounds as it is given out.

    ``at``: the logical time, in units of the mean duration of a task. Only an engine that simulates durations needs it.
    """

    task: ClientTask
    at: float


def keep(memories: dict[str, Memory], client: str, memory: Memory) -> None:
    """What ``client`` keeps from here on; one that keeps nothing any more leaves nothing of what it kept."""
    if memory:
        memories[client] = memory
    else:
        memories.pop(client, None)


class Engine(Protocol):
    """Runs tasks somewhere.

    ``memories``: every client's private state, as far as this side keeps it (in a deployment, clients do).
    """

    memories: dict[str, Memory]

    def run(self, tasks: Iterable[ClientTask], wanted: int) -> Iterator[Update | Failure]:
        """One reply for each task, in task order; tasks are taken lazily.

        ``wanted``: how many updates the round will use. When so many clients have answered, an engine whose clients
        work at the same time may give up those that have not.
        """
        ...

    def stream(self, issue: Callable[[], Issued | None]) -> Iterator[tuple[ClientTask, Update | Failure]]:
        """Replies as they come, each with its task; clients work at the same time.

        ``issue`` gives the next task, or None when enough clients are at work. It is asked until it gives None when the
        next reply is wanted, and never in between: what is done with a reply comes before the task that follows it.
        Ends when nobody is at work and there is no task.
        """
        ...
