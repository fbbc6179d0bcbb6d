"""A federation's run once more in one process: the same clients absent in the same rounds, and nothing else amiss."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flocktune.assemble import federation
from flocktune.config.load import load_recipe
from flocktune.engine.in_process import InProcess
from flocktune.interfaces import Issued, Memory
from flocktune.report.events import read_events
from flocktune.run_folder import create_run
from flocktune.runs import Elsewhere, execute
from flocktune.types import ClientTask, Failure, Update


@dataclass
class Absent:
    """Runs the tasks of those who answered; the others give none. ``answered``: round -> clients."""

    inner: InProcess
    answered: Mapping[int, Collection[str]]
    memories: dict[str, Memory] = field(default_factory=dict)

    def run(self, tasks: Iterable[ClientTask], wanted: int) -> Iterator[Update | Failure]:
        for task in tasks:
            if task.client in self.answered[task.round]:
                yield from self.inner.run([task], wanted)
            else:
                yield Failure(task.client, "absent")

    def stream(self, issue: Callable[[], Issued | None]) -> Iterator[tuple[ClientTask, Update | Failure]]:
        raise NotImplementedError


def rounds_of(run: Path) -> list[dict[str, Any]]:
    """The events of a run's rounds."""
    return [event for event in read_events(run / "metrics.jsonl") if event["event"] == "round"]


def replay(run: Path, clients: Collection[str], out: Path) -> dict[str, Any]:
    """The summary of such a run, made in the folder ``out`` from what ``run`` says of its rounds."""
    config = load_recipe(run / "recipe.yaml")
    create_run(config, out)
    answered = {event["round"]: event["answered"] for event in rounds_of(run)}
    engine = Absent(InProcess(federation(config).client), answered)
    return execute(out, elsewhere=Elsewhere(sorted(clients), lambda fed: engine))
