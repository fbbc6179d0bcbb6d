"""Many questions to a judge: at its pace, within a price, from the cache where they were asked before.

Stopped or killed at any instant, what was answered is on disk, and the same call goes on with the rest.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from flocktune.errors import FlocktuneError, Problem, UserError
from flocktune.evaluation.judge.cache import Reply, reply_key, store_reply, stored_reply
from flocktune.evaluation.judge.client import Endpoint, Pace, Rejected, Stopped, Unavailable, connect, send
from flocktune.evaluation.judge.rubric import question_to_judge
from flocktune.evaluation.judge.verdicts import Fault, Verdict, read_verdict

BYTES_A_TOKEN = 4
"""The rule by which tokens are guessed before they are counted: so many UTF-8 bytes of a text each, and a few more."""

_TOKENS_A_MESSAGE = 8
_LONGEST_FRAME = 64
_GIVE_UP_AFTER = 3
"""So many requests in a row that the server did not answer, after all tries of each, end the work."""


@dataclass(frozen=True)
class Duel:
    """Two answers to one question in one order, for the ``draw``-th time."""

    instruction: str
    context: str
    first: str
    second: str
    draw: int = 0

    def message(self, attempt: int) -> str:
        return question_to_judge(self.instruction, self.context, self.first, self.second, reminded=attempt > 0)


@dataclass(frozen=True)
class Judge:
    """Who judges and how. ``parameters`` go into each request as they are; None takes one out that is there by default.

    ``attempts``: how often a reply that is no verdict is asked for in all.
    """

    endpoint: Endpoint
    temperature: float = 0.0
    max_tokens: int = 512
    attempts: int = 2
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def body(self, duel: Duel, attempt: int) -> dict[str, Any]:
        """A request, as the server gets it."""
        body = {
            "model": self.endpoint.model,
            "messages": [{"role": "user", "content": duel.message(attempt)}],
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            **self.parameters,
        }
        return {name: value for name, value in body.items() if value is not None}

    def key(self, duel: Duel, attempt: int) -> str:
        return reply_key(self.endpoint.url, self.body(duel, attempt), duel.draw, attempt)


@dataclass(frozen=True)
class Outcome:
    """What came of a duel: scores or why there are none, and the replies, one an attempt."""

    result: Verdict | Fault
    replies: Sequence[Reply] = ()
    reason: str = ""


@dataclass(frozen=True)
class Prices:
    """What a million tokens cost, read and written, in any currency."""

    tokens_in: float = 0.0
    tokens_out: float = 0.0

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        return (tokens_in * self.tokens_in + tokens_out * self.tokens_out) / 1e6


@dataclass
class Spent:
    """A running count. ``reserved`` is what requests that are out may still cost at most."""

    prices: Prices = field(default_factory=Prices)
    max_cost: float | None = None
    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    guessed: int = 0
    reserved: float = 0.0
    waiting: str = ""

    @property
    def cost(self) -> float:
        return self.prices.cost(self.tokens_in, self.tokens_out)

    def affords(self, more: float) -> bool:
        return self.max_cost is None or self.cost + self.reserved + more <= self.max_cost

    def add(self, guess: tuple[int, int], reply: Reply) -> None:
        """Count a reply; tokens that the server did not report are counted by the rule."""
        self.guessed += reply.tokens_in is None or reply.tokens_out is None
        counted_in, counted_out = counted(guess[0], reply)
        self.tokens_in += counted_in
        self.tokens_out += counted_out


Told: TypeAlias = Callable[[int, int, Spent], None]
"""Called with how many duels are done, of how many, and what was spent."""


def counted(guess_in: int, reply: Reply) -> tuple[int, int]:
    """Tokens read and written: as reported, else by the rule."""
    return (
        guess_in if reply.tokens_in is None else reply.tokens_in,
        guess_tokens(reply.text) if reply.tokens_out is None else reply.tokens_out,
    )


def guess_tokens(text: str) -> int:
    """By the rule: UTF-8 bytes / :data:`BYTES_A_TOKEN`, rounded up, and 8 for a message's frame."""
    return -(-len(text.encode()) // BYTES_A_TOKEN) + _TOKENS_A_MESSAGE


def most_tokens(judge: Judge, duel: Duel, attempt: int = 0) -> tuple[int, int]:
    """Tokens read, by the rule, and the most that may be written."""
    body = judge.body(duel, attempt)
    limits = [body[name] for name in ("max_tokens", "max_completion_tokens") if isinstance(body.get(name), int)]
    return guess_tokens(duel.message(attempt)), max(limits, default=judge.max_tokens)


def from_cache(judge: Judge, duel: Duel, folder: Path) -> Outcome | None:
    """What is known without asking; None when an attempt is still to be made."""
    replies: list[Reply] = []
    while (outcome := _outcome(replies, judge.attempts)) is None:
        reply = stored_reply(folder, judge.key(duel, len(replies)))
        if reply is None:
            return None
        replies.append(reply)
    return outcome


def _outcome(replies: Sequence[Reply], attempts: int) -> Outcome | None:
    """What the replies so far come to; None when one more is to be asked for."""
    result: Verdict | Fault = read_verdict(replies[-1].text, replies[-1].finish_reason) if replies else "no reply"
    ended = isinstance(result, Verdict) or len(replies) == attempts
    return Outcome(result, tuple(replies)) if ended else None


def ask_all(
    judge: Judge,
    duels: Sequence[Duel],
    folder: Path,
    spent: Spent,
    stop: threading.Event | None = None,
    told: Told = lambda done, total, spent: None,
) -> dict[Duel, Outcome]:
    """Outcomes of ``duels``; equal ones are asked once. Those that a stop or the price left out are not in it.

    A reply that is no verdict is asked for again, up to ``judge.attempts`` times in all, and then counted as what it
    is. Every reply is on disk, in ``folder``, before it counts. Raises UserError for what no try can mend,
    FlocktuneError when the server has stopped answering, OSError.
    """
    outcomes: dict[Duel, Outcome] = {}
    for duel in dict.fromkeys(duels):
        if known := from_cache(judge, duel, folder):
            outcomes[duel] = known
    total = len(set(duels))
    told(len(outcomes), total, spent)
    left = [duel for duel in dict.fromkeys(duels) if duel not in outcomes]
    if left:
        asyncio.run(_Asking(judge, folder, spent, stop or threading.Event(), told, outcomes, total).all(left))
    return outcomes


class _Asking:
    """The state that concurrent requests share."""

    def __init__(
        self,
        judge: Judge,
        folder: Path,
        spent: Spent,
        stop: threading.Event,
        told: Told,
        outcomes: dict[Duel, Outcome],
        total: int,
    ) -> None:
        self.judge, self.folder, self.spent, self.stop = judge, folder, spent, stop
        self.told, self.outcomes, self.total = told, outcomes, total
        self.pace = Pace(judge.endpoint.requests_per_minute, stop)
        self.unanswered = 0
        self.answered = False
        self.broke = False

    @property
    def _nothing_yet(self) -> bool:
        """Neither now nor before, as far as the cache knows."""
        return not self.answered and not self.outcomes

    async def all(self, left: Sequence[Duel]) -> None:
        waiting = iter(left)
        async with connect(self.judge.endpoint) as self.client:
            # The first goes alone: a wrong key or model is then one request and one message.
            await self._one(next(waiting))
            workers = [asyncio.create_task(self._work(waiting)) for _ in range(self.judge.endpoint.concurrency)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _work(self, waiting: Iterator[Duel]) -> None:
        for duel in waiting:
            if self.stop.is_set() or self.broke:
                return
            await self._one(duel)

    async def _one(self, duel: Duel) -> None:
        try:
            outcome = await self._ask(duel)
        except Stopped:
            return
        except Unavailable as error:
            self.unanswered += 1
            if self.unanswered >= _GIVE_UP_AFTER or self._nothing_yet:
                what = f"{self.judge.endpoint.url} did not answer: {error}."
                raise FlocktuneError(f"{what} All verdicts so far are kept: the same command goes on.") from None
            outcome = Outcome("no reply", reason=str(error))
        except Rejected as error:
            if self._nothing_yet:  # it may well take none
                fix = "Change what is sent with --parameter, for example --parameter temperature=null."
                wanted = "a server that takes the request"
                raise UserError(Problem(self.judge.endpoint.url, wanted, str(error), fix)) from None
            outcome = Outcome("rejected", reason=str(error))
        if outcome is not None:
            self.outcomes[duel] = outcome
        self.told(len(self.outcomes), self.total, self.spent)

    async def _ask(self, duel: Duel) -> Outcome | None:
        """All attempts; None when the price allows no more."""
        replies: list[Reply] = []
        while (outcome := _outcome(replies, self.judge.attempts)) is None:
            attempt = len(replies)
            reply = stored_reply(self.folder, self.judge.key(duel, attempt)) or await self._pay(duel, attempt)
            if reply is None:
                return None
            replies.append(reply)
        return outcome

    async def _pay(self, duel: Duel, attempt: int) -> Reply | None:
        guess = most_tokens(self.judge, duel, attempt)
        read = len(duel.message(attempt).encode()) + _LONGEST_FRAME  # no tokenizer makes more tokens than bytes
        most = self.spent.prices.cost(read, guess[1])
        while not self.spent.affords(most):
            if not self.spent.reserved:  # what is out may turn out cheaper than it might have been
                self.broke = True
                return None
            await asyncio.sleep(0.05)
        self.spent.reserved += most
        try:
            reply = await send(
                self.client,
                self.judge.body(duel, attempt),
                self.judge.endpoint,
                self.pace,
                sent=self._sent,
                waiting=self._waiting,
                answered_before=self.answered,
            )
        finally:
            self.spent.reserved -= most
        self.spent.add(guess, reply)
        self.unanswered, self.answered = 0, True
        store_reply(self.folder, self.judge.key(duel, attempt), reply)
        return reply

    def _sent(self) -> None:
        self.spent.requests += 1
        self.spent.waiting = ""

    def _waiting(self, reason: str) -> None:
        self.spent.waiting = reason
        self.told(len(self.outcomes), self.total, self.spent)
