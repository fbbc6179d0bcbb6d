"""A federation as it is deployed, on this machine: a coordinator and owners, each as processes of their own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conftest import World, dolly_rows, write_rows
from flocktune.audit import read_audit
from flocktune.federation.layout import Federation, open_federation
from flocktune.federation.services import MARK, find_nginx, program
from flocktune.report.events import read_events

PATIENCE_S = 180.0
"""Long enough for a busy machine; nothing waits for it to pass."""


def verb(*arguments: object, code: int | None = 0) -> str:
    """``flocktune ARGUMENTS`` as a process of its own; gives what it said. ``code``: how it must end, if not None."""
    said = subprocess.run(
        (program("flocktune"), *map(str, arguments)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=2 * PATIENCE_S,
    )
    assert code is None or said.returncode == code, said.stdout
    return said.stdout


def wait_until(true: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
    """Look now and then, until something can be seen from outside."""
    until = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < until, f"waited in vain for {what}"
        time.sleep(0.05)


def free_ports(count: int) -> list[int]:
    """Ports that nobody has."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def is_alive(pid: int) -> bool:
    """Whether a process is there, and is not a dead one that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def processes_with(text: str) -> list[int]:
    """Processes in whose arguments ``text`` stands."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if text in (entry / "cmdline").read_bytes().decode(errors="replace") and is_alive(int(entry.name)):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


@dataclass
class Owner:
    """A data owner's machine. ``wrapped``: a command before ``flocktune join``; ``environment``: more of it."""

    name: str
    folder: Path
    bundle: Path
    data: Path
    model: Path
    wrapped: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def log(self) -> Path:
        """What ``flocktune join`` said, over all its starts."""
        return self.folder / "join.log"

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def join(self, **environment: str) -> None:
        """Start ``flocktune join``, in its own folder."""
        own = {"FLOCKTUNE_CACHE": str(self.folder / "cache"), "PYTHONUNBUFFERED": "1"}
        kept = {key: value for key, value in os.environ.items() if key != MARK}
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                (*self.wrapped, program("flocktune"), "join", self.bundle, "--data", self.data, "--model", self.model,
                 "--home", self.home, "--device", "cpu", "--threads", "1"),
                cwd=self.folder,
                env={**kept, **own, **self.environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )  # fmt: skip

    def kill(self) -> None:
        """``kill -9`` of the network's side; its worker stays."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def workers(self) -> list[int]:
        """The processes that hold model and rows."""
        return [
            pid for pid in processes_with(f'"home": "{self.home}"') if self.process is None or pid != self.process.pid
        ]

    def kill_worker(self) -> None:
        for pid in self.workers():
            os.kill(pid, signal.SIGKILL)

    def leave(self) -> None:
        """Ctrl-C, and wait for its end."""
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(PATIENCE_S)
            self.process = None

    def loads(self) -> int:
        """How often its workers loaded a model, over all its starts."""
        log = self.home / "worker.log"
        return len(re.findall(r"\bloaded\b", log.read_text())) if log.exists() else 0


@dataclass
class Deployed:
    """A federation that is up, and its owners."""

    federation: Federation
    owners: dict[str, Owner]
    recipe: Path

    @property
    def folder(self) -> Path:
        return self.federation.folder

    def events(self, run: str) -> list[dict[str, Any]]:
        """What happened in a run so far."""
        return read_events(self.federation.runs / run / "metrics.jsonl")

    def rounds(self, run: str) -> list[dict[str, Any]]:
        return [event for event in self.events(run) if event["event"] == "round"]

    def summary(self, run: str) -> dict[str, Any]:
        return dict(json.loads((self.federation.runs / run / "summary.json").read_text()))

    def audit(self, event: str) -> list[dict[str, Any]]:
        """The coordinator's records of one kind."""
        return [dict(record) for record in read_audit(self.folder / "audit.jsonl") if record["event"] == event]


def audit_of(owner: Owner, event: str) -> list[dict[str, Any]]:
    """An owner's records of one kind."""
    return [dict(record) for record in read_audit(owner.home / "audit.jsonl") if record["event"] == event]


SETTINGS = """\
name: NAME
method: fedit
rounds: 2
model: {path: MODEL}
lora: {rank: 2, targets: [q_proj, down_proj]}
data: {train: DATA, test: TEST, test_rows_per_category: 0, template: short, max_tokens: 96}
allocation: {kind: natural}
scheduling: {selection: {kind: uniform, fraction: 1.0}, quorum: 0.5}
local: {steps: 2, batch_size: 4, lr: 1.0e-2}
evaluation: {every: 0, generate: false}
runtime: {device: cpu, threads: 1}
"""


def write_world(folder: Path, world: World, names: Sequence[str]) -> Path:
    """One file of rows an owner, rows to test on, and a recipe that is good for one process and for a federation."""
    (folder / "rows").mkdir()
    for place, name in enumerate(names):
        size = 8 + 3 * place
        write_rows(folder / "rows" / f"{name}.jsonl", dolly_rows(20 * place + size)[20 * place :])
    write_rows(folder / "test.jsonl", dolly_rows(90)[84:])
    text = SETTINGS.replace("MODEL", str(world.model)).replace("TEST", str(folder / "test.jsonl"))
    recipe = folder / "recipe.yaml"
    recipe.write_text(text.replace("DATA", str(folder / "rows")).replace("NAME", "tiny"))
    return recipe


@contextmanager
def coordinator(folder: Path, host: str, recipe: Path) -> Iterator[Deployed]:
    """Make a federation; whatever happens, nothing of it is left behind."""
    port, superlink_port = free_ports(2)
    place = folder / "fed"
    # Without nginx owners go straight to the SuperLink, which has TLS of its own: all but the door is the same.
    door = ("--port", port) if find_nginx() else ("--port", superlink_port, "--door", "own")
    verb("federation", "init", place, "--host", host, "--superlink-port", superlink_port, *door)
    deployed = Deployed(open_federation(place), {}, recipe)
    try:
        yield deployed
    finally:
        for owner in deployed.owners.values():
            owner.kill()
            owner.kill_worker()
        verb("federation", "down", place)


def owner_of(deployed: Deployed, folder: Path, name: str, world: World, wrapped: Sequence[str] = ()) -> Owner:
    """An owner with files of its own, who is not invited yet."""
    own = folder / name
    own.mkdir()
    data = Path(shutil.copy(deployed.recipe.parent / "rows" / f"{name}.jsonl", own / "notes.jsonl"))
    deployed.owners[name] = owner = Owner(name, own, own / f"{name}.bundle", data, world.model, wrapped)
    return owner
