"""The round loop, the same for every algorithm and engine.

    state -> prepare -> message -> tasks -> engine -> replies -> transforms reversed -> checks -> combine -> step

Nothing flows back inside a round, and updates are folded as they come: memory does not grow with clients.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol

from flocktune.aggregation.mean import weighted_mean
from flocktune.errors import RoundFailed, UpdateRefused
from flocktune.interfaces import Engine, ServerHalf, State, Transform
from flocktune.scheduling import Cohort
from flocktune.seeds import derive_seed
from flocktune.tensors import mismatches, norm
from flocktune.types import ClientTask, Failure, Mean, Tensors, Update
from flocktune.wire import encoded_size


@dataclass(frozen=True)
class ClientRecord:
    """What one usable update said of itself."""

    weight: float
    metrics: Mapping[str, Mean]


@dataclass(frozen=True)
class RoundRecord:
    """What happened in one round. ``seconds`` is split by activity; bytes are those of encoded messages."""

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
    hooks: Hooks | None = None,
) -> State:
    """Run rounds ``first_round .. rounds - 1`` and return the last state.

    ``schedule(round)`` gives the cohort. ``hooks.on_round`` gets every finished round with its state: that is where a
    checkpoint is written. Raises RoundFailed when fewer than the quorum answer; the state is then that of the
    round before.
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
        expected = server.returned(message)
        intake = _Intake(cohort, expected, transforms, hooks)
        tasks = (
            ClientTask(number, client, kind, message, derive_seed(seed, number, client), config_digest, model_digest)
            for client in intake.given_out()
        )
        started = time.perf_counter()
        updates = intake.usable(zip(cohort.asked, engine.run(tasks, cohort.wanted), strict=False))
        first = next(updates, None)
        combined = first and (server.combine or weighted_mean)(chain([first], updates))
        if combined is None or len(intake.clients) < cohort.quorum:
            raise RoundFailed(number, max(1, cohort.quorum), len(intake.clients), intake.failures)
        sent = intake.asked * encoded_size(message)
        state, record = finish_round(server, state, combined, intake, hooks, number, cohort.asked, sent, started)
        hooks.on_round(record, state)
    return state


class Taken(Protocol):
    """What an intake knows when the last update of a round is in it."""

    expected: Tensors
    clients: dict[str, ClientRecord]
    failures: list[Failure]
    kept: list[Update]
    bytes_up: int
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
    diagnostics = hooks.diagnose(intake.expected, intake.kept) if intake.kept else {}
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
        update_norm=norm(combined.delta),
        bytes_down=bytes_down,
        bytes_up=intake.bytes_up,
        seconds=seconds,
        diagnostics=diagnostics,
    )
    return state, record


class _Intake:
    """Takes replies one by one: measures, undoes transforms, checks, and lets usable updates through."""

    def __init__(self, cohort: Cohort, expected: Tensors, transforms: Sequence[Transform], hooks: Hooks) -> None:
        self.cohort, self.expected, self.transforms, self.hooks = cohort, expected, transforms, hooks
        self.clients: dict[str, ClientRecord] = {}
        self.failures: list[Failure] = []
        self.kept: list[Update] = []
        self.asked = self.answered = self.bytes_up = 0
        self.waiting_s = 0.0

    def given_out(self) -> Iterator[str]:
        """The cohort's clients, as the engine takes their tasks; counts them."""
        for client in self.cohort.asked:
            self.asked += 1
            yield client

    def usable(self, replies: Iterator[tuple[str, Update | Failure]]) -> Iterator[Update]:
        """The updates that may touch the state, at most as many as the cohort wants."""
        while len(self.clients) < self.cohort.wanted:
            started = time.perf_counter()
            pair = next(replies, None)
            self.waiting_s += time.perf_counter() - started
            if pair is None:
                return
            client, reply = pair
            self.answered += 1
            self.hooks.on_reply(self.answered, len(self.cohort.asked), client)
            if isinstance(reply, Update):
                self.bytes_up += encoded_size(reply.delta)
                reply = self._checked(client, reply)
            if isinstance(reply, Failure):
                self.failures.append(reply)
                continue
            self.clients[client] = ClientRecord(reply.weight, reply.metrics)
            if len(self.kept) < self.hooks.diagnose_clients:
                self.kept.append(reply)
            yield reply

    def _checked(self, client: str, update: Update) -> Update | Failure:
        try:
            for transform in reversed(self.transforms):
                update = transform.on_server(update)
            check_update(self.expected, update)
        except UpdateRefused as refusal:
            return Failure(client, str(refusal))
        return update


def check_update(expected: Tensors, update: Update) -> None:
    """Refuse an update that must not touch the state: every problem in one UpdateRefused.

    ``expected`` says which names and shapes a delta has; it must be float32, finite, with a positive finite weight.
    """
    problems = mismatches(expected, update.delta)
    if not (math.isfinite(update.weight) and update.weight > 0):
        problems.append(f"weight: expected a positive number, got {update.weight}")
    if update.clients < 1:
        problems.append(f"clients: expected at least 1, got {update.clients}")
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise UpdateRefused(f"update refused: {shown}")
