"""Clients who work at the same time in one process, so that what they train can be trained at once.

A client's half is one function from task to update, with whatever a recipe puts around its training. So that none of
that need know, each client's half runs in a thread of its own, one at a time: until it comes to its training, where it
waits (:func:`train`). When all wait or are done, what they wait for is trained together, and they go on.

Nothing runs at the same time as anything else: results do not depend on timing.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from flocktune.stacked import Job, Trained, fit_stacked

Result = TypeVar("Result")


class Abandoned(BaseException):
    """The round was broken off while this client waited. No half catches it."""


class Turn(Generic[Result]):
    """One client's thread: it runs while it has its turn, and gives it back when it waits or is done.

    ``clients``: how many there are at once.
    """

    def __init__(self, work: Callable[[], Result], clients: int = 1) -> None:
        self.work, self.clients = work, clients
        self.mine, self.others = threading.Semaphore(0), threading.Semaphore(0)
        self.job: Job | None = None
        self.found: Trained | BaseException | None = None
        self.result: Result | None = None
        self.error: BaseException | None = None
        self.seconds = 0.0
        self.since = 0.0
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def go_on(self) -> None:
        """Let it run until it waits or is done. Raises what its work raises."""
        self.job = None
        self.since = time.perf_counter()
        self.mine.release()
        self.others.acquire()
        self.seconds += time.perf_counter() - self.since
        if self.error is not None:
            raise self.error

    def leave(self) -> None:
        """Let it end now, if it has not, and wait for that."""
        self.found = Abandoned()
        self.mine.release()
        self.thread.join()

    def train(self, job: Job) -> Trained:
        """In the client's thread: wait until ``job`` is done. Raises what went wrong with it."""
        self.job = job
        self.others.release()
        self.mine.acquire()
        if isinstance(self.found, BaseException):
            raise self.found
        assert self.found is not None
        return self.found

    def stay(self) -> None:
        """In the client's thread, or for it: raise Abandoned when the round was broken off."""
        if isinstance(self.found, Abandoned):
            raise self.found

    def clock(self) -> float:
        """Seconds of this client's own work so far, and of its share of what was done together."""
        return self.seconds + time.perf_counter() - self.since

    def _run(self) -> None:
        self.mine.acquire()
        _HERE.turn = self
        try:
            self.stay()
            self.result = self.work()
        except BaseException as error:
            self.error = error
        finally:
            self.others.release()


def _told_in_words(error: Exception) -> None:
    """Its traceback, as a note: frames hold stacks and activations, and an error lives until all clients went on."""
    error.add_note("While clients were trained at once:\n" + "".join(traceback.format_tb(error.__traceback__)))
    error.__traceback__ = None


_HERE = threading.local()


def gathered() -> Turn | None:
    """The turn that this code runs in; None where clients work one after another."""
    return getattr(_HERE, "turn", None)


@dataclass(frozen=True)
class Together:
    """How clients are trained at once: ``width`` of them; see :func:`flocktune.stacked.fit_stacked` for the rest."""

    width: int
    tokens_at_once: int
    packed: bool

    def run(self, works: Sequence[Callable[[], Result]]) -> list[Result]:
        """What ``works`` return, in their order. Raises what one of them raises."""
        if len(works) == 1:
            return [works[0]()]
        turns: list[Turn[Result]] = []
        try:
            turns.extend(Turn(work, len(works)) for work in works)
            waiting = turns
            while waiting:
                for turn in waiting:
                    turn.go_on()
                waiting = [turn for turn in turns if turn.job is not None]
                self._train(waiting)
        finally:
            for turn in turns:
                turn.leave()
        return [turn.result for turn in turns]  # type: ignore[misc]

    def _train(self, waiting: Sequence[Turn]) -> None:
        rest = list(waiting)
        while rest:
            first = rest[0]
            assert first.job is not None
            some = [turn for turn in rest if turn.job is not None and first.job.goes_with(turn.job)]
            rest = [turn for turn in rest if turn not in some]
            jobs = [turn.job for turn in some if turn.job is not None]
            started = time.perf_counter()
            found: Sequence[Trained | Exception]
            try:
                found = fit_stacked(jobs, packed=self.packed, tokens_at_once=self.tokens_at_once)
            except Exception as error:  # such as too little memory: they fail as each would alone, and the run goes on
                found = [error] * len(jobs)
            seconds = time.perf_counter() - started
            for one in {each for each in found if isinstance(each, Exception)}:
                _told_in_words(one)
            tokens = [each.metrics["tokens"].total if isinstance(each, Trained) else 0.0 for each in found]
            for turn, each, own in zip(some, found, tokens, strict=True):
                turn.found = each
                turn.seconds += seconds * own / (sum(tokens) or 1.0)
