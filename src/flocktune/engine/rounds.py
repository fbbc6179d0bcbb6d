"""The round loop, the same for every algorithm and engine.

    state -> prepare -> message -> tasks -> engine -> replies -> transforms reversed -> checks -> combine -> step

Nothing flows back inside a round, and updates are folded as they come: memory does not grow with clients. How replies
are had of an engine is ``collect``: one of each client, or one sum of all (secure aggregation).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Protocol, TypeAlias

from flocktune.aggregation.mean import unchanged, weighted_mean
from flocktune.engine.client import refuse_count, restored
from flocktune.errors import RoundFailed, TooFewUpdates, UpdateRefused
from flocktune.interfaces import Engine, Issued, ServerHalf, State, Transform
from flocktune.scheduling import Cohort
from flocktune.seeds import derive_seed
from flocktune.tensors import norm
from flocktune.types import ClientTask, Failure, Mean, Tensors, Update
from flocktune.wire import encoded_size


@dataclass(frozen=True)
class ClientRecord:
    """What one usable update said of itself, and its encoded size in bytes; None where only a sum was seen."""

    weight: float
    metrics: Mapping[str, Mean]
    bytes_up: int | None = None


@dataclass(frozen=True)
class RoundRecord:
    """What happened in one round. ``seconds`` is split by activity; bytes are those of encoded messages.

    ``bytes_plain``: of the usable updates when their transforms were undone; 0 where there are no transforms.
    """

    round: int
    selected: tuple[str, ...]
    failures: tuple[Failure, ...]
    clients: Mapping[str, ClientRecord]
    metrics: Mapping[str, Mean]
    update_norm: float
    bytes_down: int
    bytes_up: int
    seconds: Mapping[str, float]
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    bytes_plain: int = 0


@dataclass(frozen=True)
class Hooks:
    """Who is told what, while it happens.

    ``on_prepared(round, told, state)``: the server has done its own work before a round, when there was any.
    ``diagnose(tensors, updates)`` sees the first ``diagnose_clients`` updates of a round, and what they are changes of.
    """

    on_prepared: Callable[[int, Mapping[str, Any], State], None] = lambda round, told, state: None
    on_reply: Callable[[int, int, str], None] = lambda done, total, client: None
    on_round: Callable[[RoundRecord, State], None] = lambda record, state: None
    should_stop: Callable[[], bool] = lambda: False
    diagnose: Callable[[Tensors, Sequence[Update]], Mapping[str, float]] = lambda message, updates: {}
    diagnose_clients: int = 0


Collect: TypeAlias = Callable[
    [Engine, Iterator[ClientTask], Cohort], Iterator[tuple[tuple[str, ...], Update | Failure]]
]
"""Engine, the cohort's tasks, cohort -> replies, each with the clients that are in it."""


def one_by_one(
    engine: Engine, tasks: Iterator[ClientTask], cohort: Cohort
) -> Iterator[tuple[tuple[str, ...], Update | Failure]]:
    """Every client's own reply, in task order."""
    for client, reply in zip(cohort.asked, engine.run(tasks, cohort.wanted), strict=False):
        yield (client,), reply


def run_rounds(
    server: ServerHalf,
    engine: Engine,
    schedule: Callable[[int], Cohort],
    state: State,
    *,
    first_round: int = 0,
    rounds: int,
    kind: str,
    seed: int,
    config_digest: str = "",
    model_digest: str = "",
    transforms: Sequence[Transform] = (),
    collect: Collect = one_by_one,
    hooks: Hooks | None = None,
) -> State:
    """Run rounds ``first_round .. rounds - 1`` and return the last state.

    ``schedule(round)`` gives the cohort; one with quorum 0 may be empty, and its update is then no change.
    ``hooks.on_round`` gets every finished round with its state: that is where a checkpoint is written. Raises
    RoundFailed when fewer than the quorum answer; the state is then that of the round before.
    """
    hooks = hooks or Hooks()
    for number in range(first_round, rounds):
        if hooks.should_stop():
            break
        cohort = schedule(number)
        state, told = server.prepare(state, number)
        if told:
            hooks.on_prepared(number, told, state)
        message = server.message(state, number)
        intake = _Intake(server, message, cohort, transforms, hooks)
        task = ClientTask(number, "", kind, message, seed, config_digest, model_digest)
        tasks = (_for_client(task, server, client) for client in cohort.asked)
        started = time.perf_counter()
        metered = _Metered(engine)
        updates = intake.usable(collect(metered, tasks, cohort))
        first = next(updates, None)
        try:
            combined = (
                combine(server, chain([first], updates), message) if first else unchanged(server.returned(message))
            )
        except TooFewUpdates as error:
            few = len(intake.clients)
            raise RoundFailed(number, error.needed, few, intake.failures, error.setting) from None
        if len(intake.clients) < cohort.quorum:
            raise RoundFailed(number, cohort.quorum, len(intake.clients), intake.failures)
        intake.bytes_up = metered.bytes_up
        sent = metered.bytes_down
        state, record = finish_round(server, state, combined, intake, hooks, number, cohort.asked, sent, started)
        hooks.on_round(record, state)
    return state


def _for_client(task: ClientTask, server: ServerHalf, client: str) -> ClientTask:
    """A round's task, of its whole message and the run's seed, as ``client`` receives it."""
    seed = derive_seed(task.seed, task.round, client)
    return replace(task, client=client, tensors=server.addressed(task.tensors, client), seed=seed)


def combine(server: ServerHalf, updates: Iterable[Update], message: Tensors) -> Update:
    """At least one update -> one, by the server's own rule or the weighted mean."""
    return server.combine(updates, message) if server.combine else weighted_mean(updates)


class Taken(Protocol):
    """What an intake knows when the last update of a round is in it."""

    message: Tensors
    clients: dict[str, ClientRecord]
    failures: list[Failure]
    kept: list[Update]
    bytes_up: int
    bytes_plain: int
    waiting_s: float


def finish_round(
    server: ServerHalf,
    state: State,
    combined: Update,
    intake: Taken,
    hooks: Hooks,
    number: int,
    selected: tuple[str, ...],
    bytes_down: int,
    started: float,
) -> tuple[State, RoundRecord]:
    """The server's step, and what happened in the round that it ends; ``started`` is of ``time.perf_counter``."""
    state = server.step(state, combined)
    combined_at = time.perf_counter()
    diagnostics = hooks.diagnose(intake.message, intake.kept) if intake.kept else {}
    seconds = {
        "train": intake.waiting_s,
        "aggregate": combined_at - started - intake.waiting_s,
        "diagnose": time.perf_counter() - combined_at,
    }
    record = RoundRecord(
        round=number,
        selected=selected,
        failures=tuple(intake.failures),
        clients=intake.clients,
        metrics=combined.metrics,
        # What clients train has plain names; what else an update carries is in a group.
        update_norm=norm({name: value for name, value in combined.delta.items() if "/" not in name}),
        bytes_down=bytes_down,
        bytes_up=intake.bytes_up,
        seconds=seconds,
        diagnostics=diagnostics,
        bytes_plain=intake.bytes_plain,
    )
    return state, record


class _Metered:
    """An engine, and the bytes that went to its clients and came from them: those of encoded tensors."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.memories = engine, engine.memories
        self.bytes_down = self.bytes_up = 0
        self._last: tuple[Tensors, int] = ({}, encoded_size({}))

    def run(self, tasks: Iterable[ClientTask], wanted: int) -> Iterator[Update | Failure]:
        for reply in self.engine.run(map(self._sent, tasks), wanted):
            if isinstance(reply, Update):
                self.bytes_up += encoded_size(reply.delta)
            yield reply

    def stream(self, issue: Callable[[], Issued | None]) -> Iterator[tuple[ClientTask, Update | Failure]]:
        return self.engine.stream(issue)

    def _sent(self, task: ClientTask) -> ClientTask:
        if task.tensors is not self._last[0]:  # mostly all clients of a round receive the same
            self._last = task.tensors, encoded_size(task.tensors)
        self.bytes_down += self._last[1]
        return task


class _Intake:
    """Takes replies one by one: undoes transforms, checks, and lets usable updates through."""

    def __init__(
        self, server: ServerHalf, message: Tensors, cohort: Cohort, transforms: Sequence[Transform], hooks: Hooks
    ) -> None:
        self.server, self.message, self.cohort, self.transforms = server, message, cohort, transforms
        self.hooks = hooks
        self.clients: dict[str, ClientRecord] = {}
        self.failures: list[Failure] = []
        self.kept: list[Update] = []
        self.answered = self.bytes_up = self.bytes_plain = 0
        self.waiting_s = 0.0

    def usable(self, replies: Iterator[tuple[tuple[str, ...], Update | Failure]]) -> Iterator[Update]:
        """The updates that may touch the state, of at most as many clients as the cohort wants."""
        while len(self.clients) < self.cohort.wanted:
            started = time.perf_counter()
            found = next(replies, None)
            self.waiting_s += time.perf_counter() - started
            if found is None:
                return
            clients, reply = found
            for client in clients:
                self.answered += 1
                self.hooks.on_reply(self.answered, len(self.cohort.asked), client)
            size = None
            if isinstance(reply, Update):
                size = encoded_size(reply.delta) if len(clients) == 1 else None
                reply = self._checked(clients, reply)
            if isinstance(reply, Failure):
                self.failures.append(reply)
                continue
            for client in clients:  # of a sum of several, nothing is known of one
                alone = reply.metrics if len(clients) == 1 else {}
                self.clients[client] = ClientRecord(reply.weight / len(clients), alone, size)
            if len(self.kept) < self.hooks.diagnose_clients:
                self.kept.append(reply)
            yield reply

    def _checked(self, clients: tuple[str, ...], update: Update) -> Update | Failure:
        expected = self.server.returned(self.server.addressed(self.message, clients[0]))
        try:
            update = restored(update, self.transforms, expected)
            refuse_count(update, len(clients))
        except UpdateRefused as refusal:
            return Failure(", ".join(clients), str(refusal))
        self.bytes_plain += encoded_size(update.delta) if self.transforms else 0
        return update
