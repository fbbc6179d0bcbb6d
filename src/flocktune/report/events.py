"""The log of a run: one JSON object a line in ``metrics.jsonl``. It is the one truth about a run.

Kinds of events (key ``event``): ``run_start``, ``round`` (``round`` counts from 0), ``alignment`` (of an emulator,
made before the round of the same number), ``evaluation`` and ``resumed`` (there ``round`` is the number of rounds
done before it; an evaluation that is ``final`` is of the result), ``choice`` (of the round that is the result, where
the recipe asks for one), ``run_end``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from flocktune.errors import Problem, UserError
from flocktune.files import sync_folder, write_atomic

Event: TypeAlias = dict[str, Any]

LOG_NAME = "metrics.jsonl"


class EventLog:
    """Appends events to a log. Each is on the disk when ``append`` returns: there are a few a round."""

    def __init__(self, path: Path) -> None:
        """Open ``path``, creating it; a torn last line, left by a killed process, is cut off. Raises OSError."""
        self.path = path
        if not path.exists():
            path.touch()
            sync_folder(path.parent)
        data = path.read_bytes()
        if not data.endswith(b"\n") and data:
            os.truncate(path, data.rfind(b"\n") + 1)

    def append(self, event: Mapping[str, Any]) -> None:
        """Write one event. NaN and infinities become null, since JSON has none. Raises OSError."""
        line = json.dumps(without_nan(dict(event)), allow_nan=False, ensure_ascii=False) + "\n"
        with self.path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())


def read_events(path: Path) -> list[Event]:
    """All events of a log, oldest first. A torn last line does not count; a missing log has no events.

    Raises UserError naming every other line that is not an event.
    """
    events, damaged = read_events_leniently(path)
    UserError.raise_all(
        Problem(f"{path}:{line}", "one event as a JSON object", "something else",
                "Mend or delete the line; the other lines are fine.")
        for line in damaged
    )  # fmt: skip
    return events


def read_events_leniently(path: Path) -> tuple[list[Event], list[int]]:
    """The events that can be read, and the numbers (from 1) of the lines before the last that can not."""
    if not path.exists():
        return [], []
    *lines, tail = path.read_bytes().split(b"\n")
    # A last line without its newline was torn by a kill, even when what is left of it parses.
    del tail
    events, damaged = [], []
    for number, line in enumerate(lines, start=1):
        event = parse_event(line)
        if event is not None:
            events.append(event)
        elif line.strip():
            damaged.append(number)
    return events, damaged


def truncate_after(path: Path, round: int, *, with_alignment: bool = False) -> None:
    """Forget what happened after ``round`` (from 0; -1 forgets every round), before a run resumes there.

    Drops the events of later rounds, the end of the run (its choice and its final evaluations too) and a torn last
    line; atomic. An evaluation after ``n`` rounds belongs to round ``n - 1``. An alignment belongs to the round that it
    was made before; ``with_alignment``, that of ``round + 1`` is kept as well, for a checkpoint that was written right
    after it. Raises UserError for a damaged log, and OSError.
    """
    added = ("alignment", round + 1) if with_alignment else None
    named = (((event["event"], event.get("round")), event) for event in read_events(path))
    kept = [event for name, event in named if name == added or _belongs(event, round)]
    lines = (json.dumps(event, allow_nan=False, ensure_ascii=False) + "\n" for event in kept)
    write_atomic(path, "".join(lines))


def without_nan(value: Any) -> Any:
    """A copy of nested dicts and lists in which NaN and infinities are None."""
    if isinstance(value, Mapping):
        return {str(key): without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _belongs(event: Event, round: int) -> bool:
    match event["event"]:
        case "round" | "alignment":
            return int(event["round"]) <= round
        case "evaluation" | "resumed":
            return int(event["round"]) <= round + 1 and not event.get("final")
        case "choice" | "run_end":
            return False
        case _:
            return True


def parse_event(line: bytes) -> Event | None:
    """The event on a line of a log; None when the line is none."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return None
    needs_round = event["event"] in ("round", "alignment", "evaluation", "resumed")
    return None if needs_round and not isinstance(event.get("round"), int) else event
