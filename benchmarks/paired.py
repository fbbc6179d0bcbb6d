"""Paired measurements: the things compared take turns in one process, so that a slow minute slows them all.

A benchmark is a function (Options) -> Result; nothing here knows what is measured.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flocktune.config.schema import EMBEDDED


@dataclass(frozen=True)
class Options:
    """What the command line says. ``quick``: the smallest form that runs everything; its times mean nothing."""

    model: str = EMBEDDED
    data: str = EMBEDDED
    threads: int = 1
    quick: bool = False


@dataclass(frozen=True)
class Spread:
    """Several measurements of one quantity."""

    minimum: float
    median: float
    maximum: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return cls(min(values), statistics.median(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.minimum:.3g} to {self.maximum:.3g})"


@dataclass(frozen=True)
class Result:
    """A table and what it is to show.

    ``met``: whether the goal is; None when that is not judged: in the quick form, or without a goal. ``notes``: what
    was run. ``values``: all of it, for machines. ``measured``: the number that is held against the goal, in words.
    ``floor``: the least that is possible, and what of it is reached. ``not_run``: why nothing was measured.
    """

    title: str
    goal: str
    met: bool | None
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    values: Mapping[str, Any] = field(default_factory=dict)
    measured: str = ""
    floor: str = ""
    not_run: str = ""

    @property
    def verdict(self) -> str:
        """Whether the goal is met, in words."""
        if self.not_run:
            return f"not run: {self.not_run}"
        return {True: "met", False: "MISSED", None: "not judged"}[self.met]

    def markdown(self) -> str:
        """Ready to be pasted into a page."""
        floor = [f"Floor: {self.floor}."] if self.floor else []
        told = [*self.notes, *floor, f"Goal, {self.goal}: {self.verdict}."]
        return "\n".join([f"### {self.title}", "", *table(self.header, self.rows), "", *told])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of Markdown; numbers to the right."""
    return [_row(header), _row(["---", *["---:"] * (len(header) - 1)]), *(_row(row) for row in rows)]


def interleaved(
    measures: Mapping[str, Callable[[int], float]], turns: int, *, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of every measure in every turn: A B C, C B A, A B C, ...

    A measure is called with the turn's number (from 0) and says how many seconds its own work took. The first
    ``warm_up`` turns are run like the others and left out.
    """
    seconds: dict[str, list[float]] = {name: [] for name in measures}
    for turn in range(warm_up + turns):
        names = list(measures)[:: 1 if turn % 2 == 0 else -1]
        for name in names:
            gc.collect()
            spent = measures[name](turn)
            say(f"  turn {turn - warm_up + 1} of {turns}: {name}: {spent:.3f} s")
            if turn >= warm_up:
                seconds[name].append(spent)
    return seconds


def timed(work: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def ratio(slow: Sequence[float], fast: Sequence[float]) -> Spread:
    """Turn by turn, how many times ``fast`` fits into ``slow``."""
    return Spread.of([one / other for one, other in zip(slow, fast, strict=True)])


def environment(options: Options) -> dict[str, Any]:
    """Machine and versions: what a time is worth nothing without. ``load``: running processes, before we began."""
    from flocktune.environment import versions  # late: it imports torch, in the small processes too

    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": options.threads,
        "load": round(os.getloadavg()[0], 1),
        "system": platform.platform(terse=True),
        "model": Path(options.model).name,
        "data": Path(options.data).name,
        "quick": options.quick,
        "versions": versions(),
    }


def environment_line(found: Mapping[str, Any]) -> str:
    """:func:`environment` for people."""
    libraries = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    line = (
        f"{found['cpu']}, {found['cores']} cores, {found['threads']} thread(s), load {found['load']} at the start; "
        f"{found['system']}; {libraries}; model {found['model']}, data {found['data']}."
    )
    return line + (" QUICK: shows that it runs; the times mean nothing." if found["quick"] else "")


def cpu_model() -> str:
    """The processor's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def say(text: str) -> None:
    """Progress, beside the table: on the error stream."""
    print(text, file=sys.stderr, flush=True)


def in_fresh_process(benchmark: str, *arguments: str) -> int:
    """The number that ``python -m benchmarks.BENCHMARK ARGUMENTS`` prints, in a process that holds nothing yet."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{benchmark}", *arguments],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return int(done.stdout)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
