"""Buffered asynchronous rounds: FedBuff (Nguyen et al., arXiv 2106.06639), for any algorithm and engine.

    whoever is done -> check -> buffer;  after K updates:  w <- w + step( sum_k p_k s(t_k) delta_k / sum_k p_k s(t_k) )

M clients are at work at once, each from the message of the round in which it was given out; t_k is how many rounds ago
that was, and s(t) = (1 + t)^-exponent. A round is one server step, and nobody waits for the slowest client.

What we do differently from the paper: it divides by K, here the weights are normalised as everywhere else; a client may
weigh by its data, and is in a buffer once: it is not drawn again before the step; an update can be too old to count.
With M and K both all clients, rounds are those of the synchronous loop.

Why a killed run loses nothing: a checkpoint is written when a step is done, so the buffer is empty then, and the state
holds who is at work on what (names below ``buffered/``). They are given out again with the same seeds, which gives the
same updates; who is drawn next follows from the number of tasks given out so far.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from flocktune.aggregation.mean import weighted_mean
from flocktune.config.load import too_few_clients
from flocktune.config.schema import Buffered
from flocktune.engine.client import refuse_count, restored
from flocktune.engine.rounds import ClientRecord, Hooks, finish_round
from flocktune.errors import Problem, RoundFailed, UpdateRefused, UserError
from flocktune.interfaces import Engine, Issued, ServerHalf, State, Transform
from flocktune.seeds import derive_seed
from flocktune.tensors import group, prefixed
from flocktune.types import ClientTask, Failure, Tensors, Update
from flocktune.wire import encoded_size

_LOG = logging.getLogger(__name__)

PREFIX = "buffered"
"""Names of the loop's own part of a state begin so; no algorithm sees it."""


def run_buffered(
    server: ServerHalf,
    engine: Engine,
    clients: Sequence[str],
    settings: Buffered,
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
    """Run rounds ``first_round .. rounds - 1`` and return the last state, with who is at work then.

    ``clients``: all of the federation, in an order that does not change. ``state`` is the algorithm's own, or one that
    this loop gave. ``hooks.on_round`` gets every finished round as in ``run_rounds``, with the mean staleness of its
    updates among the diagnostics. Raises UserError when the method does not average or clients are too few, and
    RoundFailed when all clients that are not in the buffer have failed since the last update came into it; the state is
    then that of the round before.
    """
    hooks = hooks or Hooks()
    _refuse(server, clients, settings)
    mine = at_work(state)
    state = {name: value for name, value in state.items() if name not in mine}
    task = ClientTask(0, "", kind, {}, seed, config_digest, model_digest)
    names = list(server.message(state, first_round))
    desk = _Desk(clients, settings.concurrency, task, mine, names, server.addressed)
    replies = engine.stream(desk.issue)
    for number in range(first_round, rounds):
        if hooks.should_stop():
            break
        state, told = server.prepare(state, number)
        if told:
            hooks.on_prepared(number, told, {**state, **desk.saved()})
        message = server.message(state, number)
        desk.open(number, message)
        sent_before = desk.bytes_sent
        intake = _Intake(number, desk, settings, server, transforms, hooks)
        started = time.perf_counter()
        combined = weighted_mean(intake.usable(replies))
        sent, replied = desk.bytes_sent - sent_before, tuple(dict.fromkeys(intake.replied))
        state, record = finish_round(server, state, combined, intake, hooks, number, replied, sent, started)
        staleness = intake.staleness / settings.size
        record = replace(record, diagnostics={**record.diagnostics, "staleness": staleness})
        hooks.on_round(record, {**state, **desk.saved()})
    return {**state, **desk.saved()}


def at_work(state: State) -> dict[str, torch.Tensor]:
    """The loop's own part of a state: empty before the first round, and of any other loop."""
    return {name: value for name, value in state.items() if name.startswith(f"{PREFIX}/")}


def in_order(saved: State, fresh: State) -> State:
    """``saved`` in the order of a fresh state: a file's order is another, and sums over tensors round by their order.

    The loop's own part comes last.
    """
    return {name: saved[name] for name in fresh if name in saved} | at_work(saved)


def _refuse(server: ServerHalf, clients: Sequence[str], settings: Buffered) -> None:
    """Raise UserError for what can not be buffered."""
    if server.combine is not None:
        raise UserError(
            Problem("scheduling.buffered", "a method that averages", "one that combines updates in its own way")
        )
    UserError.raise_all(too_few_clients(settings, len(clients), "the federation"))


@dataclass(frozen=True)
class _Work:
    """What one client is at: which task, from which round's message, and how many replies had come by then."""

    issue: int
    round: int
    replies: int


class _Desk:
    """Gives out tasks, and knows who is at work. All that it knows can be written as tensors, and read back.

    ``task`` has what all tasks have in common; its seed is the run's. ``names``: of a message, in their order, which a
    file does not keep. Two sets are not drawn: those of whom the round has an update, and those who failed since its
    last.
    """

    def __init__(
        self,
        clients: Sequence[str],
        concurrency: int,
        task: ClientTask,
        saved: Tensors,
        names: Iterable[str],
        addressed: Callable[[Tensors, str], Tensors],
    ) -> None:
        self.clients, self.concurrency, self.task, self.addressed = clients, concurrency, task, addressed
        self.bytes_sent = 0
        mine = group(saved, PREFIX)
        self.issued, self.replies = map(int, mine.get("counts", torch.zeros(2)))
        work = {client: _Work(*value.tolist()) for client, value in group(mine, "work").items()}
        self.work = dict(sorted(work.items(), key=lambda item: item[1].issue))
        self.again = deque(self.work)
        self.messages: dict[int, Tensors] = {}
        for number in {one.round for one in self.work.values()}:
            message = group(mine, f"message/{number}")
            self.messages[number] = {name: message[name] for name in names}
        self.round = -1
        self.answered: set[str] = set()
        self.failed: set[str] = set()

    def open(self, number: int, message: Tensors) -> None:
        """From here on, tasks are of this round. The copy is the desk's own: a file may hold no tensor twice."""
        self.messages = self._worked_on() | {number: {name: value.clone() for name, value in message.items()}}
        self.round = number
        self.answered.clear()

    def issue(self) -> Issued | None:
        """The next task: first those that were given out before the run was killed, in the order they were."""
        if self.again:
            return self._task(self.again.popleft())
        others = self.work.keys() | self.answered | self.failed
        idle = [client for client in self.clients if client not in others]
        if len(self.work) >= self.concurrency or not idle:
            return None
        client = idle[derive_seed(self.task.seed, self.issued, "client") % len(idle)]
        self.work[client] = _Work(self.issued, self.round, self.replies)
        self.issued += 1
        issued = self._task(client)
        self.bytes_sent += encoded_size(issued.task.tensors)
        return issued

    def _task(self, client: str) -> Issued:
        work = self.work[client]
        seed = derive_seed(self.task.seed, work.issue, client)
        received = self.addressed(self.messages[work.round], client)
        task = replace(self.task, round=work.round, client=client, tensors=received, seed=seed)
        # M clients at work give M replies in the mean duration of a task.
        return Issued(task, work.replies / self.concurrency)

    def take(self, task: ClientTask) -> _Work | None:
        """The client is done. None when it was not at work on this task: an answer that came twice, or from nowhere."""
        work = self.work.get(task.client)
        if work is None or task.seed != derive_seed(self.task.seed, work.issue, task.client):
            _LOG.warning("round %d: left out an answer of %s that nobody waits for", self.round + 1, task.client)
            return None
        del self.work[task.client]
        self.replies += 1
        return work

    def saved(self) -> dict[str, torch.Tensor]:
        """Who is at work on what. Each message that is still worked on is in it once."""
        tensors = {"counts": torch.tensor([self.issued, self.replies])}
        for client, work in self.work.items():
            tensors[f"work/{client}"] = torch.tensor([work.issue, work.round, work.replies])
        for number, message in self._worked_on().items():
            tensors |= prefixed(f"message/{number}", message)
        return prefixed(PREFIX, tensors)

    def _worked_on(self) -> dict[int, Tensors]:
        rounds = {work.round for work in self.work.values()}
        return {number: message for number, message in self.messages.items() if number in rounds}


class _Intake:
    """One round's replies: measured, transforms undone, checked, weighed by age; usable updates are let through."""

    def __init__(
        self,
        number: int,
        desk: _Desk,
        settings: Buffered,
        server: ServerHalf,
        transforms: Sequence[Transform],
        hooks: Hooks,
    ) -> None:
        self.number, self.desk, self.settings, self.server = number, desk, settings, server
        self.message = desk.messages[number]
        self.transforms, self.hooks = transforms, hooks
        self.clients: dict[str, ClientRecord] = {}
        self.replied: list[str] = []
        self.failures: list[Failure] = []
        self.kept: list[Update] = []
        self.staleness = self.bytes_up = self.bytes_plain = 0
        self.waiting_s = 0.0

    def usable(self, replies: Iterator[tuple[ClientTask, Update | Failure]]) -> Iterator[Update]:
        """As many updates as a step takes. Raises RoundFailed when there will not be so many."""
        while len(self.clients) < self.settings.size:
            started = time.perf_counter()
            pair = next(replies, None)
            self.waiting_s += time.perf_counter() - started
            if pair is None:
                raise RoundFailed(
                    self.number, self.settings.size, len(self.clients), self.failures, "scheduling.buffered.size"
                )
            task, reply = pair
            work = self.desk.take(task)
            if work is None:
                continue
            self.replied.append(task.client)
            size = None
            if isinstance(reply, Update):
                size = encoded_size(reply.delta)
                self.bytes_up += size
                reply = self._checked(task, reply)
            if isinstance(reply, Failure):
                self.desk.failed.add(task.client)
            else:
                reply = self._weighed(task.client, reply, self.number - work.round, size)
            if isinstance(reply, Failure):
                self.failures.append(reply)
                continue
            self.desk.answered.add(task.client)
            self.desk.failed.clear()
            self.hooks.on_reply(len(self.clients), self.settings.size, task.client)
            yield reply

    def _checked(self, task: ClientTask, update: Update) -> Update | Failure:
        try:
            update = restored(update, self.transforms, self.server.returned(task.tensors))
            refuse_count(update, 1)
        except UpdateRefused as refusal:
            return Failure(task.client, str(refusal))
        self.bytes_plain += encoded_size(update.delta) if self.transforms else 0
        return update

    def _weighed(self, client: str, update: Update, staleness: int, size: int | None) -> Update | Failure:
        """The update as it counts at its age. Its record keeps the weight that the client gave."""
        oldest = self.settings.max_staleness
        if oldest is not None and staleness > oldest:
            return Failure(client, f"too old: begun {staleness} rounds ago, the oldest that counts is {oldest}")
        self.clients[client] = ClientRecord(update.weight, update.metrics, size)
        if len(self.kept) < self.hooks.diagnose_clients:
            self.kept.append(update)
        self.staleness += staleness
        weight = update.weight * (1 + staleness) ** -self.settings.staleness_exponent
        return replace(update, weight=max(weight, sys.float_info.min))  # two that round to zero have no mean
