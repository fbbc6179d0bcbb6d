"""A run's log, read as it grows: each time only what is new, kept as a few numbers a round and a client."""

from __future__ import annotations

import os
import statistics
from array import array
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flocktune.report.events import Event, parse_event
from flocktune.report.summaries import Summary, number

_KNOWN_BY_BYTES = 128
"""A log is known again by so many bytes before the place that was reached: each event ends with its time."""
_READ_BYTES = 4_000_000
_PACES = 20
"""The pace of a run is the median over so many rounds."""
FAILURES_KEPT = 100
_MOST_ROUNDS, _LATEST_S = 10_000_000, 32_503_680_000
"""Beyond them (the year 3000) a number is damage."""
_HEAVY = ("clients", "selected", "answered", "failures")
"""What of a round's event is added up, and not kept."""


@dataclass(frozen=True)
class Mark:
    """How far a log was read: the file, the bytes of whole lines, and the last few of these."""

    inode: int = 0
    offset: int = 0
    before: bytes = b""


def read_on(path: Path, mark: Mark) -> tuple[Mark, list[bytes], bool]:
    """The whole lines after ``mark``, some megabytes at most, and whether they are the first of another log.

    A run that is resumed writes its log anew, up to where it goes on: then it is read from its start. A last line that
    is not whole yet is left for the next time. Raises OSError.
    """
    with path.open("rb") as file:
        file.seek(mark.offset - len(mark.before))
        same = os.fstat(file.fileno()).st_ino == mark.inode and file.read(len(mark.before)) == mark.before
        if not same:
            mark = Mark(os.fstat(file.fileno()).st_ino)
        file.seek(mark.offset)
        data = file.read(_READ_BYTES)
        if b"\n" not in data:
            data += file.readline()
    data = data[: data.rfind(b"\n") + 1]
    reached = Mark(mark.inode, mark.offset + len(data), (mark.before + data)[-_KNOWN_BY_BYTES:])
    return reached, data.splitlines(), not same


@dataclass
class Client:
    """What a client did: the rounds (from 0) in which it was asked, answered and failed; the last loss it told."""

    asked: array[int] = field(default_factory=lambda: array("I"))
    answered: array[int] = field(default_factory=lambda: array("I"))
    failed: array[int] = field(default_factory=lambda: array("I"))
    weight: float = 0.0
    seconds: float = 0.0
    loss: float | None = None


@dataclass
class Told:
    """What a log has said so far. ``rounds`` have no lists of clients any more. Times are in seconds since 1970.

    ``failures``: the newest (round from 0, client, reason); ``failed`` counts them all. ``paces``: seconds from round
    to round, with what lies between them; ``since_s``: when the round at hand began; ``newest_s``: when the last event
    was. ``choice``: which round is the result, and why; empty for the last. ``unread``: lines that make no sense.
    """

    start: Event = field(default_factory=dict)
    rounds: dict[int, Event] = field(default_factory=dict)
    evaluations: list[Event] = field(default_factory=list)
    clients: dict[str, Client] = field(default_factory=dict)
    failures: deque[tuple[int, str, str]] = field(default_factory=lambda: deque(maxlen=FAILURES_KEPT))
    failed: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    bytes_up: float = 0.0
    bytes_down: float = 0.0
    resumed: int = 0
    choice: str = ""
    paces: deque[float] = field(default_factory=lambda: deque(maxlen=_PACES))
    since_s: float | None = None
    newest_s: float | None = None
    unread: int = 0

    @property
    def done(self) -> int:
        return max(self.rounds, default=-1) + 1

    @property
    def planned(self) -> int | None:
        planned = _within(self.start.get("rounds"), _MOST_ROUNDS)
        return None if planned is None else int(planned)

    @property
    def pace_s(self) -> float | None:
        """The median of the newest rounds."""
        return statistics.median(self.paces) if self.paces else None

    @property
    def until_s(self) -> float | None:
        """When the last round will be over, about; None when nothing is known."""
        if self.planned is None or self.since_s is None or self.pace_s is None:
            return None
        return self.since_s + self.pace_s * max(0, self.planned - self.done)

    def hear(self, line: bytes) -> None:
        """Take in one line of the log."""
        event = parse_event(line)
        if event is None:
            self.unread += bool(line.strip())
            return
        try:
            self._take(event)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            self.unread += 1  # a damaged log can hold anything

    def _take(self, event: Event) -> None:
        time_s = _within(event.get("time"), _LATEST_S)
        self.newest_s = self.newest_s if time_s is None else time_s
        match event["event"]:
            case "run_start":
                self.start, self.since_s = event, time_s
            case "resumed":
                self.resumed, self.since_s = self.resumed + 1, time_s
            case "evaluation":
                self.evaluations.append(event)
                self._spent("evaluate", event.get("seconds"))
            case "choice":
                self.choice = str(event["said"])
            case "round":
                self._round(event)
                if time_s is not None and self.since_s is not None:
                    self.paces.append(max(0.0, time_s - self.since_s))
                self.since_s = time_s

    def _round(self, event: Event) -> None:
        place = int(event["round"])
        if not 0 <= place < _MOST_ROUNDS:
            raise ValueError(place)
        self.rounds[place] = {key: value for key, value in event.items() if key not in _HEAVY}
        self.bytes_up += number(event.get("bytes_up")) or 0.0
        self.bytes_down += number(event.get("bytes_down")) or 0.0
        for activity, value in (event.get("seconds") or {}).items():
            self._spent(str(activity).replace("_", " and "), value)
        for name in event.get("selected") or []:
            self._client(name).asked.append(place)
        for name in event.get("answered") or []:
            self._client(name).answered.append(place)
        for name, values in (event.get("clients") or {}).items():
            client = self._client(name)
            client.weight += number(values.get("weight")) or 0.0
            client.seconds += number(values.get("seconds")) or 0.0
            client.loss = number(values.get("loss"))
        for failure in event.get("failures") or []:
            self._client(failure.get("client")).failed.append(place)
            self._failure(place, str(failure.get("client")), str(failure.get("reason")))
        if event.get("rolled_back"):
            reasons = (event.get("gate") or {}).get("reasons") or []
            self._failure(place, "all", f"rolled back: {'; '.join(map(str, reasons))}")

    def _spent(self, activity: str, seconds: object) -> None:
        self.seconds[activity] = self.seconds.get(activity, 0.0) + (number(seconds) or 0.0)

    def _client(self, name: object) -> Client:
        return self.clients.setdefault(str(name), Client())

    def _failure(self, place: int, client: str, reason: str) -> None:
        self.failures.append((place, client, reason))
        self.failed += 1

    def summary(self) -> dict[str, Any]:
        """What the run's summary would say by now."""
        latest = {str(event.get("dataset", "held_out")): event for event in self.evaluations}
        spent = [event["privacy"] for event in self.rounds.values() if isinstance(event.get("privacy"), Mapping)]
        return {
            "name": self.start.get("name"),
            "method": self.start.get("method"),
            "seed": self.start.get("seed"),
            "rounds": len(self.rounds),
            "metrics": {
                name: {"overall": event.get("overall") or {}, "categories": event.get("categories") or {}}
                for name, event in latest.items()
            },
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "seconds": sum(self.seconds.values()),
            **({"privacy": max(spent, key=lambda told: number(told.get("epsilon")) or 0.0)} if spent else {}),
        }


def _within(value: object, most: float) -> float | None:
    found = number(value)
    return found if found is not None and 0 <= found < most else None


@dataclass
class Log:
    """A log that is followed."""

    path: Path
    told: Told = field(default_factory=Told)
    mark: Mark = field(default_factory=Mark)

    def catch_up(self) -> Told:
        """Read what is new. A log that is not there, or not any more, has told nothing."""
        while True:
            try:
                self.mark, lines, anew = read_on(self.path, self.mark)
            except OSError:
                if self.mark != Mark():
                    self.mark, self.told = Mark(), Told()
                return self.told
            if anew:
                self.told = Told()
            for line in lines:
                self.told.hear(line)
            if not lines:
                return self.told


def scored_on(summary: Summary) -> str | None:
    """The data set that a run's scores are of: rows that chose nothing, if it was tried on them by now."""
    names = list(summary.get("metrics") or {})
    return "held_out" if "held_out" in names else next(iter(names), None)


def rows_called(dataset: str) -> str:
    """How the rows of a data set are called on the page."""
    return {"held_out": "held-out rows", "validation": "validation rows"}.get(dataset, dataset.replace("_", " "))
