"""A real federation on one machine, TLS and all, beside the same recipe in one process: results, bytes, seconds.

Coordinator and owners are the programs that users start: nginx, Flower's SuperLink and SuperExec, ``flocktune join``. A
round of theirs is told apart by both sides' audit logs: sent -> task_received -> update_left -> received.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.paired import Options, Result, Spread, say
from flocktune.audit import read_audit
from flocktune.config.engines import InProcessEngine
from flocktune.config.load import dump_recipe
from flocktune.config.schema import (
    AlignmentConfig,
    DataConfig,
    EmulatorConfig,
    EvaluationConfig,
    LocalConfig,
    LoraConfig,
    ModelConfig,
    Natural,
    RunConfig,
    RuntimeConfig,
)
from flocktune.report.events import read_events

GOAL = 1.02
MOVED = re.compile(r'"POST /v1/fleet/(?:push|pull)-(?:object|messages) [^"]*" 200 (\d+) (\d+)')
"""nginx's line for a message or a piece of one: bytes of the request and of the answer, headers too."""


@dataclass(frozen=True)
class Case:
    """``rank`` makes the adapter as large as those of models that are worth a federation."""

    clients: int
    rounds: int
    steps: int
    rank: int


def run(options: Options) -> Result:
    """Both methods on both sides. Raises RuntimeError when results differ or a command fails."""
    case = Case(2, 2, 1, 8) if options.quick else Case(4, 6, 5, 128)
    rows, notes = [], []
    values: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="fb-") as place:
        folder = Path(place)
        flocktune(folder, "split", options.data, "--to", "data", "--by", "iid", "--clients", str(case.clients))
        names = [path.stem for path in sorted((folder / "data" / "clients").glob("*.jsonl"))]
        with federation(folder, names) as coordinator:
            for config in recipes(options, case):
                measured = measure(folder, coordinator, config, names)
                values[config.method] = measured
                rows.append(row(config.method, measured))
    ratio = values["fedit"]["bytes_on_wire"] / values["fedit"]["bytes_of_adapters"]
    notes.append(
        f"{case.clients} owners on this machine, rank {case.rank}, {case.steps} steps a round; seconds are medians over"
        " rounds after the first. Bytes are requests and answers through nginx, with HTTP headers and without TLS;"
        " questions for work that found none are left out. Adapters are the same, bit for bit, on both sides."
    )
    return Result(
        title="A real federation beside one process",
        goal=f"bytes on the wire at most {GOAL} times the adapters' (FedIT)",
        met=None if options.quick else ratio <= GOAL,
        header=("", "round, federation", "of it: down", "at work", "up", "round, one process", "wire / adapters"),
        rows=rows,
        notes=notes,
        values=values,
        measured=f"{ratio:.4f}",
        floor=f"of bytes, the adapters themselves: {100 / ratio:.1f} % of what travels is they",
    )


def recipes(options: Options, case: Case) -> Iterator[RunConfig]:
    """FedIT and FedBiOT on the owners' files."""
    data = DataConfig(
        "data/clients", test="data/test.jsonl", template="short", max_tokens=128, test_rows_per_category=0
    )
    plain = RunConfig(
        name="fedit",
        rounds=case.rounds,
        model=ModelConfig(options.model),
        lora=LoraConfig(rank=case.rank),
        data=data,
        allocation=Natural(),
        local=LocalConfig(steps=case.steps, batch_size=8, lr=1e-3),
        evaluation=EvaluationConfig(generate=False),
        engine=InProcessEngine(stack=1),  # one after another, as what it is compared with
        runtime=RuntimeConfig(device="cpu", threads=options.threads),
    )
    yield plain
    alignment = AlignmentConfig(first_steps=2, steps=1, fidelity_rows=0)
    yield replace(plain, name="fedbiot", method="fedbiot", emulator=EmulatorConfig(), alignment=alignment)


def measure(folder: Path, coordinator: Path, config: RunConfig, names: Sequence[str]) -> dict[str, Any]:
    """One recipe on both sides. Bytes are those of its rounds."""
    recipe = folder / f"{config.name}.yaml"
    recipe.write_text(dump_recipe(config))
    log = coordinator / "logs" / "nginx.log"
    before = log.stat().st_size
    say(f"  {config.method}: the federation")
    flocktune(folder, "federation", "run", str(coordinator), str(recipe), "--quiet")
    moved = [sum(map(int, found)) for found in MOVED.findall(log.read_text()[before:])]
    say(f"  {config.method}: one process")
    flocktune(folder, "run", str(recipe), "--out", f"alone-{config.name}", "--quiet")
    there, here = coordinator / "runs" / config.name, folder / f"alone-{config.name}"
    summaries = [json.loads((run / "summary.json").read_text()) for run in (there, here)]
    if summaries[0]["adapter_sha256"] != summaries[1]["adapter_sha256"]:
        raise RuntimeError(f"{config.method}: expected one adapter on both sides, got two")
    emulator = summaries[0].get("bytes_emulator", 0)
    return {
        "bytes_on_wire": sum(moved),
        "bytes_of_adapters": summaries[0]["bytes_up"] + summaries[0]["bytes_down"] + emulator,
        "seconds_federation": rounds(there),
        "seconds_one_process": rounds(here),
        **stages(coordinator, folder, there, names),
    }


def rounds(run: Path) -> list[float]:
    """Seconds of every round after the first, from one round's event to the next."""
    times = [event["time"] for event in read_events(run / "metrics.jsonl") if event["event"] == "round"]
    return [after - before for before, after in pairwise(times)]


def stages(coordinator: Path, folder: Path, run: Path, names: Sequence[str]) -> dict[str, list[float]]:
    """Seconds on the way down, at work, and on the way up, of every client and round after the first."""
    number = json.loads((run / "roster.json").read_text())["run"]
    logs = [coordinator / "audit.jsonl", *(folder / "HOME" / name / "fed" / name / "audit.jsonl" for name in names)]
    seen: dict[str, dict[str, float]] = {}
    for record in (record for log in logs for record in read_audit(log)):
        if record.get("run") == number and record.get("round", 0) > 0:
            at = datetime.fromisoformat(str(record["time"])).timestamp()
            seen.setdefault(str(record["nonce"]), {})[str(record["event"])] = at
    whole = [times for times in seen.values() if len(times) == 4]
    marks = ("sent", "task_received", "update_left", "received")
    ways = zip(("down", "work", "up"), pairwise(marks), strict=True)
    return {name: [times[end] - times[start] for times in whole] for name, (start, end) in ways}


def row(method: str, measured: Mapping[str, Any]) -> tuple[str, ...]:
    """One line of the table."""
    ratio = measured["bytes_on_wire"] / measured["bytes_of_adapters"]
    seconds = [
        f"{Spread.of(measured[name])} s" if len(measured[name]) else "-"
        for name in ("seconds_federation", "down", "work", "up", "seconds_one_process")
    ]
    return method, *seconds, f"{ratio:.4f}"


@contextmanager
def federation(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """A federation that is up, with everybody connected; nothing of it is left afterwards."""
    coordinator, owners = folder / "fed", []
    flocktune(folder, "federation", "init", str(coordinator), "--host", "127.0.0.1", "--port", str(free_port()))
    try:
        flocktune(folder, "federation", "up", str(coordinator))
        for name in names:
            flocktune(folder, "federation", "enrol", str(coordinator), "--name", name, "--with-key")
            data = folder / "data" / "clients" / f"{name}.jsonl"
            owners.append(
                subprocess.Popen(
                    command("join", f"{name}.bundle", "--data", str(data)),
                    cwd=folder,
                    # A cache of its own: what another process of this machine made would not be sent.
                    env={**os.environ, **{f"FLOCKTUNE_{key}": str(folder / key / name) for key in ("HOME", "CACHE")}},
                    stdout=(folder / f"join-{name}.log").open("w"),
                    stderr=subprocess.STDOUT,
                )
            )
        while not all("connected" in (folder / f"join-{name}.log").read_text() for name in names):
            if any(owner.poll() is not None for owner in owners):
                raise RuntimeError("an owner did not join: " + (folder / f"join-{names[0]}.log").read_text())
            time.sleep(0.2)
        yield coordinator
    finally:
        for owner in owners:
            owner.send_signal(signal.SIGINT)
        for owner in owners:
            owner.wait()
        flocktune(folder, "federation", "down", str(coordinator))


def flocktune(folder: Path, *arguments: str) -> str:
    """What a verb printed. Raises RuntimeError when it failed."""
    done = subprocess.run(command(*arguments), cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"flocktune {' '.join(arguments)}: {done.stderr or done.stdout}")
    return done.stdout


def command(*arguments: str) -> list[str]:
    """This flocktune, from the command line."""
    return [sys.executable, "-m", "flocktune", *arguments]


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as end:
        end.bind(("127.0.0.1", 0))
        return int(end.getsockname()[1])
