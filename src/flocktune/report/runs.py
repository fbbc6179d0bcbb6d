"""Run folders as values, for reports: complete, unfinished or damaged. What is missing becomes a note."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flocktune.errors import Problem, UserError
from flocktune.report.events import LOG_NAME, Event, read_events_leniently
from flocktune.report.summaries import Summary, combine_seeds, method_order, number

_ANSWERS_READ = 5000
"""Sample answers are chosen among so many rows of a run."""


@dataclass(frozen=True)
class Run:
    """One run: one method, one seed.

    ``key`` tells methods of a comparison apart (``fedit``, ``local_2``). ``rounds`` holds each round once,
    in order. ``start`` is empty when the log has none; ``summary`` is made from the log when the run has
    written none; ``ended`` says whether it has. ``alignments``: those of an emulator, one a round, in order.
    """

    key: str
    folder: Path
    start: Event
    rounds: Sequence[Event]
    evaluations: Sequence[Event]
    alignments: Sequence[Event]
    resumed: int
    ended: bool
    summary: Summary
    answers: Sequence[Mapping[str, Any]]
    recipe: str
    notes: Sequence[str]


@dataclass(frozen=True)
class Experiment:
    """A run, or a comparison: per method its runs (one a seed) and one summary."""

    folder: Path
    methods: Mapping[str, Sequence[Run]]
    summaries: Mapping[str, Summary]
    recipe: str

    @property
    def runs(self) -> list[Run]:
        """All runs, method by method."""
        return [run for runs in self.methods.values() for run in runs]


def load_experiment(folder: Path) -> Experiment:
    """Read a run folder, or a comparison folder (``<method>/`` or ``seed-<n>/<method>/``).

    Raises UserError when there is neither a log, a summary nor a recipe.
    """
    seeds = sorted(path for path in folder.glob("seed-*") if path.is_dir())
    homes = [path for parent in (seeds or [folder]) if parent.is_dir() for path in sorted(parent.iterdir())]
    folders = [path for path in homes if path.is_dir() and _is_run(path)]
    if not folders and not _is_run(folder):
        raise UserError(
            Problem(str(folder), f"a run folder (with recipe.yaml or {LOG_NAME}) or a comparison", "neither",
                    "Give the folder that a run wrote: --out, or the newest under runs/.")
        )  # fmt: skip
    runs = [load_run(path, path.name) for path in folders] or [load_run(folder)]
    whole = {key: one for key, one in _read_summary(folder)[0].items() if isinstance(one, Mapping) and "metrics" in one}
    if whole and not folders:  # a comparison of which only the summary is left
        runs = []
    methods = {
        key: [run for run in runs if run.key == key]
        for key in sorted({*(run.key for run in runs), *whole}, key=method_order)
    }
    summaries = {key: whole.get(key) or combine_seeds([run.summary for run in same]) for key, same in methods.items()}
    recipe = _read_text(folder / "recipe.yaml") or "".join(run.recipe for run in runs[:1])
    return Experiment(folder, methods, summaries, recipe)


def load_run(folder: Path, key: str | None = None) -> Run:
    """Read one run folder. Never raises for what is in it: damage becomes notes."""
    events, damaged = read_events_leniently(folder / LOG_NAME)
    start = next((event for event in reversed(events) if event["event"] == "run_start"), {})
    rounds = {event["round"]: event for event in events if event["event"] == "round"}
    alignments = {event["round"]: event for event in events if event["event"] == "alignment"}
    written, problem = _read_summary(folder)
    ended = bool(written) or any(event["event"] == "run_end" for event in events)
    ordered = [rounds[number] for number in sorted(rounds)]
    evaluations = [event for event in events if event["event"] == "evaluation"]
    ending = next((event.get("summary") for event in reversed(events) if event["event"] == "run_end"), None)
    summary = written or (ending if isinstance(ending, dict) else None) or _summarise(start, ordered, evaluations)
    recipe = _read_text(folder / "recipe.yaml")
    last = max(rounds, default=-1) + 1
    facts = {
        problem: bool(problem),
        f"{LOG_NAME} is missing or empty.": not events,
        f"{LOG_NAME}: {len(damaged)} damaged lines were left out.": bool(damaged),
        f"The log has {len(rounds)} of rounds 1 to {last}.": len(rounds) < last,
        f"Not finished: {len(rounds)} of {start.get('rounds', '?')} rounds done so far.": not ended,
        "recipe.yaml is missing.": not recipe,
    }
    return Run(
        key=key or str(start.get("method") or summary.get("method") or folder.name),
        folder=folder,
        start=start,
        rounds=ordered,
        evaluations=sorted(evaluations, key=lambda event: event["round"]),
        alignments=[alignments[number] for number in sorted(alignments)],
        resumed=sum(event["event"] == "resumed" for event in events),
        ended=ended,
        summary=summary,
        answers=_read_answers(folder / "answers.jsonl"),
        recipe=recipe,
        notes=[note for note, holds in facts.items() if holds],
    )


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (LOG_NAME, "recipe.yaml", "summary.json"))


def _summarise(start: Event, rounds: Sequence[Event], evaluations: Sequence[Event]) -> Summary:
    """What a summary would say by now."""
    latest = {event.get("dataset", "test"): event for event in sorted(evaluations, key=lambda event: event["round"])}
    emulator = start.get("emulator")
    size = number(emulator.get("bytes")) if isinstance(emulator, dict) else None
    return {
        "method": start.get("method"),
        "seed": start.get("seed"),
        "rounds": len(rounds),
        "metrics": {
            name: {"overall": event.get("overall") or {}, "categories": event.get("categories") or {}}
            for name, event in latest.items()
        },
        "bytes_up": sum(number(event.get("bytes_up")) or 0 for event in rounds),
        "bytes_down": sum(number(event.get("bytes_down")) or 0 for event in rounds),
        "seconds": sum(number(part) or 0 for event in rounds for part in (event.get("seconds") or {}).values()),
        "trainable_parameters": start.get("trainable_parameters"),
        "client": start.get("client"),
        **({"bytes_emulator": size * _asked(rounds)} if size else {}),
    }


def _asked(rounds: Sequence[Event]) -> int:
    """How many clients were asked at least once."""
    named = [event.get("selected") for event in rounds]
    return len({str(client) for clients in named if isinstance(clients, list) for client in clients})


def _read_summary(folder: Path) -> tuple[dict[str, Any], str]:
    """The summary of a folder (empty when there is none), and what is wrong with it."""
    path = folder / "summary.json"
    if not path.is_file():
        return {}, ""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        value = None
    return (value, "") if isinstance(value, dict) else ({}, "summary.json can not be read.")


def _read_answers(path: Path) -> list[Mapping[str, Any]]:
    """The rows of answers.jsonl that can be read."""
    rows: list[Mapping[str, Any]] = []
    for line in _read_text(path).split("\n", _ANSWERS_READ)[:_ANSWERS_READ]:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
