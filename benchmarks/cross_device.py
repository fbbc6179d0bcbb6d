"""Ten thousand clients on one machine, a hundred of them a round, beside a hundred: what the others cost.

Whole runs from file to adapter, each in a fresh process: reading, allocation, selection, training, checkpoints.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.paired import Options, Result, Spread, ratio, say

GOAL = 1.1
MEGABYTE = 1e6
ROWS_EACH = 4


@dataclass(frozen=True)
class Case:
    """``cohort`` of ``clients`` train one step a round, or with ``buffered`` their updates are taken as they come."""

    clients: int
    cohort: int = 100
    rounds: int = 5
    buffered: bool = False


def run(options: Options) -> Result:
    """Every case in turn. Raises CalledProcessError when a run fails."""
    few, many = (20, 200) if options.quick else (100, 10_000)
    cohort, rounds = (10, 2) if options.quick else (100, 5)
    cases = [Case(few, cohort, rounds), Case(many, cohort, rounds), Case(many, cohort, rounds, buffered=True)]
    found = [measured(case, options) for case in cases]
    growth = found[1]["peak_bytes"] / found[0]["peak_bytes"]
    slower = ratio(found[1]["round_s"], found[0]["round_s"])
    rows = [
        (
            f"{case.clients:,} clients, " + ("FedBuff, a buffer of" if case.buffered else "a cohort of") + f" {cohort}",
            f"{Spread.of(seen['round_s'])} s",
            f"{seen['start_s']:.1f} s",
            f"{seen['peak_bytes'] / MEGABYTE:.0f} MB",
        )
        for case, seen in zip(cases, found, strict=True)
    ]
    return Result(
        title="Ten thousand clients, a hundred a round",
        goal=f"at most {GOAL} times the memory of {few} clients",
        met=None if options.quick else growth <= GOAL,
        header=("", "a round", "until the first round", "peak memory"),
        rows=rows,
        notes=(
            f"{ROWS_EACH} rows a client, one step of 4 rows a round. {many:,} clients need {growth:.2f} times the"
            f" memory of {few}, and a round takes {slower} times as long.",
        ),
        measured=f"{growth:.2f}",
        floor=f"what {few} clients need, {found[0]['peak_bytes'] / MEGABYTE:.0f} MB: {100 / growth:.0f} % reached",
        values={"growth": growth, "cases": [{**asdict(case), **seen} for case, seen in zip(cases, found, strict=True)]},
    )


def measured(case: Case, options: Options) -> dict[str, Any]:
    """Seconds and peak memory of one run in a fresh process."""
    say(f"  {case}")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.cross_device", json.dumps(asdict(case)), json.dumps(asdict(options))],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _measure(case: Case, options: Options) -> dict[str, Any]:
    """In the fresh process."""
    import time

    from flocktune.api import run as run_recipe
    from flocktune.config.load import build_config

    with tempfile.TemporaryDirectory(prefix="flocktune-devices-") as place:
        rows = Path(place) / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in _rows(case, options)))
        selection: dict[str, Any] = {"kind": "uniform", "fraction": case.cohort / case.clients}
        scheduling: dict[str, Any] = {"selection": selection}
        if case.buffered:
            at_work = min(3 * case.cohort, case.clients)
            scheduling = {"buffered": {"size": case.cohort, "concurrency": at_work}}
        config = build_config(
            {
                "rounds": case.rounds,
                "model": {"path": options.model},
                "data": {"train": str(rows), "test_rows_per_category": 0, "template": "short", "max_tokens": 128},
                "allocation": {"kind": "natural"},
                "scheduling": scheduling,
                "local": {"steps": 1, "batch_size": 4, "lr": 1e-3},
                "evaluation": {"generate": False},
                "runtime": {"device": "cpu", "threads": options.threads},
            }
        )
        watch = _Watch()
        started = time.time()
        summary = run_recipe(config, Path(place) / "run", listeners=[watch])
        rounds = [time for name, time in watch.seen if name == "round"]
        first = watch.seen[0][1]
        return {
            "round_s": [after - before for before, after in zip([first, *rounds], rounds, strict=False)][1:],
            "start_s": first - started,
            "peak_bytes": summary["peak_memory_bytes"],
        }


class _Watch:
    """When what happened."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float]] = []

    def on_event(self, event: Mapping[str, Any]) -> None:
        self.seen.append((event["event"], event["time"]))

    def on_client(self, done: int, total: int, client: str) -> None:
        pass


def _rows(case: Case, options: Options) -> Iterator[dict[str, str]]:
    """``ROWS_EACH`` rows a client, the data's over and over."""
    from flocktune.config.schema import Columns
    from flocktune.data.sources import read_examples

    examples = read_examples(options.data, Columns())
    for number in range(case.clients * ROWS_EACH):
        example = examples[number % len(examples)]
        yield {
            "instruction": example.instruction,
            "context": example.context,
            "response": example.response,
            "category": example.category,
            "client": f"client-{number // ROWS_EACH:05d}",
        }


if __name__ == "__main__":
    import torch

    given = Options(**json.loads(sys.argv[2]))
    torch.set_num_threads(given.threads)
    print(json.dumps(_measure(Case(**json.loads(sys.argv[1])), given)))
