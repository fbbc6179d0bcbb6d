"""What one coordinator carries: owners that answer at once, with updates of a real adapter's size.

Everything is real but the training: nginx, SuperLink, SuperExec, the run's own process, and one connection an owner.
All of it shares this machine, the owners too.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.federation import flocktune, free_port, rounds
from benchmarks.paired import Options, Result, Spread, say

MEGABYTE = 1e6


@dataclass(frozen=True)
class Case:
    """``rank`` of LoRA on the base model decides how large an update is."""

    owners: int
    rank: int
    rounds: int = 4


def run(options: Options) -> Result:
    """Every case with one federation. Raises RuntimeError when a command fails."""
    cases = [Case(2, 8, 2)] if options.quick else [Case(4, 8), Case(4, 128), Case(16, 8), Case(16, 128)]
    found = []
    with tempfile.TemporaryDirectory(prefix="fb-") as place:
        folder = Path(place)
        coordinator = folder / "fed"
        flocktune(folder, "federation", "init", str(coordinator), "--host", "127.0.0.1", "--port", str(free_port()))
        for number in range(max(case.owners for case in cases)):
            flocktune(folder, "federation", "enrol", str(coordinator), "--name", f"owner-{number:02d}", "--with-key")
        flocktune(folder, "federation", "up", str(coordinator))
        try:
            found = [measured(folder, coordinator, case, options) for case in cases]
            asked_a_second = questions(
                folder, coordinator, 2 if options.quick else 8, seconds=2.0 if options.quick else 15.0
            )
        finally:
            flocktune(folder, "federation", "down", str(coordinator))
    rate = loopback_rate()
    floors = [2 * case.owners * seen["update_bytes"] / rate for case, seen in zip(cases, found, strict=True)]
    reached = [least / Spread.of(seen["round_s"]).median for least, seen in zip(floors, found, strict=True)]
    rows = [
        (
            f"{case.owners} owners x {seen['update_bytes'] / MEGABYTE:.1f} MB",
            f"{Spread.of(seen['round_s'])} s",
            f"{2 * case.owners * seen['update_bytes'] / MEGABYTE / Spread.of(seen['round_s']).median:.0f} MB/s",
            f"{case.owners / Spread.of(seen['round_s']).median:.1f}",
            f"{1000 * least:.1f} ms",
        )
        for case, seen, least in zip(cases, found, floors, strict=True)
    ]
    return Result(
        title="What one coordinator carries",
        goal="none: a measurement",
        met=None,
        header=("", "a round without training", "down and up", "updates a second", "the bytes alone"),
        rows=rows,
        notes=(
            "Coordinator and owners share this machine; owners answer at once. When they only ask for work, and there"
            f" is none, the SuperLink answers {asked_a_second:.0f} times a second (asked past nginx, which lets an"
            " address ask 100 times a second).",
        ),
        values={"cases": found, "questions_a_second": asked_a_second},
        measured=f"at best {max(float(row[3]) for row in rows)} updates a second",
        floor=f"the same bytes through one socket of this machine, {rate / 1e9:.1f} GB a second:"
        f" {100 * min(reached):.2g} to {100 * max(reached):.2g} % of a round is that",
    )


def loopback_rate(size: int = 1 << 28) -> float:
    """Bytes a second through a TCP connection to this machine, sent and read once."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sender:
        reader, _ = server.accept()
        started = time.perf_counter()
        thread = threading.Thread(target=sender.sendall, args=(bytes(size),))
        thread.start()
        left, into = size, bytearray(1 << 20)
        while left:
            left -= reader.recv_into(into)
        thread.join()
        reader.close()
        return size / (time.perf_counter() - started)


def measured(folder: Path, coordinator: Path, case: Case, options: Options) -> dict[str, Any]:
    """Seconds of every round after the first."""
    say(f"  {case}")
    name = f"load-{case.owners}-{case.rank}"
    names = [f"owner-{number:02d}" for number in range(case.owners)]
    recipe = folder / f"{name}.yaml"
    recipe.write_text(
        f"name: {name}\nrounds: {case.rounds}\nmodel: {{path: {json.dumps(options.model)}}}\n"
        f"lora: {{rank: {case.rank}}}\ndata: {{test_rows_per_category: 0}}\nallocation: {{kind: natural}}\n"
        f"scheduling: {{selection: {{kind: named, clients: {json.dumps(names)}}}, quorum: 1.0}}\n"
        f"runtime: {{device: cpu, threads: {options.threads}}}\n"
    )
    paths = [str(folder / f"{one}.bundle") for one in names]
    owners = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.coordinator", str(folder / "keys"), *paths],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    try:
        flocktune(folder, "federation", "run", str(coordinator), str(recipe), "--quiet")
    finally:
        owners.terminate()
        owners.wait()
    done = coordinator / "runs" / name
    summary = json.loads((done / "summary.json").read_text())
    return {"update_bytes": summary["bytes_up"] // (case.owners * case.rounds), "round_s": rounds(done)}


def questions(folder: Path, coordinator: Path, owners: int, seconds: float) -> float:
    """How often a second the coordinator says that there is nothing to do, to owners who do nothing but ask."""
    from flocktune.engine.flower.fleet import Fleet
    from flocktune.enrolment import read_invitation
    from flocktune.owner.home import make_home

    say("  questions for work")
    port = json.loads((coordinator / "federation.json").read_text())["superlink_port"]
    counts = [0] * owners

    def ask(number: int) -> None:
        invitation = read_invitation(folder / f"owner-{number:02d}.bundle")
        home = make_home(folder / "keys" / invitation.client, invitation)
        fleet = Fleet("127.0.0.1", port, home.authority, home.key, home.node, threading.Event())
        with fleet.connected():
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                fleet.receive(1 << 20)
                counts[number] += 1

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(owners)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / seconds


def answer_at_once(folder: Path, bundles: list[str]) -> None:
    """In a process of their own: owners who send back what they got, as if it were a change."""
    from flocktune.engine.flower.fleet import Fleet
    from flocktune.engine.parcels import UPDATE, Parcel
    from flocktune.enrolment import read_invitation
    from flocktune.errors import FlocktuneError
    from flocktune.owner.home import make_home

    metrics = {name: [1.0, 1.0] for name in ("loss", "tokens", "steps", "seconds", "data_seconds")}
    update = {"weight": 1.0, "clients": 1, "metrics": metrics}

    def stay(bundle: str) -> None:
        invitation = read_invitation(Path(bundle))
        home = make_home(folder / invitation.client, invitation)
        fleet = Fleet(invitation.host, invitation.port, home.authority, home.key, home.node, threading.Event())
        while True:
            try:
                with fleet.connected():
                    while True:
                        received = fleet.receive(1 << 30)
                        if received is None or received.parcel is None:
                            time.sleep(0.3)
                            continue
                        asked = received.parcel
                        named = {key: asked.fields[key] for key in ("run", "nonce", "round", "client")}
                        fleet.reply(received, Parcel(UPDATE, {**named, "update": update}, asked.blob))
            except FlocktuneError as error:
                say(f"  {error}")
                time.sleep(1)

    threads = [threading.Thread(target=stay, args=(bundle,), daemon=True) for bundle in bundles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    answer_at_once(Path(sys.argv[1]), sys.argv[2:])
