"""Runs the command line many times over, each in a process of its own that can be killed anywhere.

Importing torch takes seconds, so one server process imports everything once and forks a child for each order. A child
is ``flocktune ARGUMENTS`` in full: the same entry point, its own standard output and error, its own exit status.

``crash_at`` kills the child by SIGKILL before its n-th call of fsync, replace, unlink or truncate: every boundary
between two writes to the disk is one of them. At an fsync, half of what the file gained since it was last on the disk
is taken away first, as when the power goes. ``file_limit_bytes`` sets RLIMIT_FSIZE: writing beyond it fails for real.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COUNTED = ("fsync", "replace", "unlink", "truncate")


@dataclass(frozen=True)
class Outcome:
    """How a child ended: its exit status (negative: the signal), what it printed, its disk calls if it counted them."""

    code: int
    output: str
    disk_calls: int | None = None


class ForkedRuns:
    """The pytest side. A context manager."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.started = 0

    def __enter__(self) -> ForkedRuns:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.server.stdin:
            self.server.stdin.close()
        self.server.wait(timeout=30)

    def start(self, *arguments: object, crash_at: int = 0, file_limit_bytes: int = 0, count: bool = False) -> Child:
        """Fork a child that runs ``flocktune ARGUMENTS``, and return at once."""
        self.started += 1
        place = self.folder / f"{self.started:05d}"
        order = {
            "arguments": [str(argument) for argument in arguments],
            "crash_at": crash_at,
            "file_limit_bytes": file_limit_bytes,
            "output": f"{place}.out",
            "calls": f"{place}.calls" if count else None,
        }
        return Child(self, self._ask(order), Path(f"{place}.out"), Path(f"{place}.calls"))

    def run(self, *arguments: object, **options: Any) -> Outcome:
        """As :meth:`start`, and wait for the end."""
        return self.start(*arguments, **options).wait()

    def _ask(self, order: Any) -> int:
        assert self.server.stdin
        assert self.server.stdout
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        answer = self.server.stdout.readline()
        assert answer, "the server of forked runs died"
        return int(answer)


@dataclass
class Child:
    """A run on its way."""

    runs: ForkedRuns
    pid: int
    output: Path
    calls: Path

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal; until :meth:`wait` was called the process is there, dead or alive."""
        os.kill(self.pid, number)

    def until(self, reached: Callable[[], bool], timeout_s: float = 60.0) -> None:
        """Wait until something can be seen from outside."""
        deadline = time.monotonic() + timeout_s
        while not reached():
            assert time.monotonic() < deadline, f"nothing happened:\n{self.output.read_text()}"
            time.sleep(0.002)

    def wait(self) -> Outcome:
        code = self.runs._ask({"wait": self.pid})
        calls = int(self.calls.read_text()) if self.calls.exists() else None
        return Outcome(code, self.output.read_text(), calls)


# --- the server ------------------------------------------------------------------------------------


def serve() -> None:
    """Fork a child per order, or wait for one; answer with its process id, or its exit status."""
    import openai  # noqa: F401
    import torch

    # Whatever a run imports late, so that no child has to.
    import flocktune.cli
    import flocktune.evaluation.judge.client
    import flocktune.experiment
    import flocktune.judging.contest
    import flocktune.report.html
    import flocktune.report.live
    import flocktune.report.trackers
    import flocktune.results
    import flocktune.splitting  # noqa: F401

    torch.set_num_threads(1)
    warm_up()
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            _, status = os.waitpid(order["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            child(order)
        print(pid, flush=True)


def warm_up() -> None:
    """What the libraries do at first use is done once, here, where every child inherits it."""
    sys.path.insert(0, str(Path(__file__).parent))
    import pandas  # noqa: F401 - by pyarrow, when it reads a cached file's metadata
    import pyarrow.ipc  # noqa: F401
    import rouge_score.rouge_scorer  # noqa: F401 - more than a second, by the first score
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tiny_models import save_tiny

    with tempfile.TemporaryDirectory() as folder:
        save_tiny(Path(folder))
        AutoTokenizer.from_pretrained(folder)
        AutoModelForCausalLM.from_pretrained(folder)


def child(order: dict[str, Any]) -> None:
    """Be ``flocktune ARGUMENTS``. Never returns."""
    code = 99
    try:
        output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = ["flocktune", *order["arguments"]]
        calls = count_disk_calls(order["crash_at"])
        if order["file_limit_bytes"]:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_limit_bytes"], resource.RLIM_INFINITY))
        from flocktune.cli import main

        try:
            main()
            code = 0
        except SystemExit as leave:
            code = leave.code if isinstance(leave.code, int) else 0 if leave.code is None else 1
        if order["calls"]:
            Path(order["calls"]).write_text(str(calls()))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def count_disk_calls(crash_at: int) -> Callable[[], int]:
    """Count the calls that make something durable; die before number ``crash_at`` (0: never)."""
    calls = 0
    durable_bytes: dict[int, int] = {}

    def guarded(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if name == "fsync":
                lose = calls == crash_at
                _note_size(arguments[0], durable_bytes, lose)
            if calls == crash_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    for name in COUNTED:
        setattr(os, name, guarded(name, getattr(os, name)))
    return lambda: calls


def _note_size(descriptor: int, durable_bytes: dict[int, int], lose: bool) -> None:
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode):
        return
    before = min(durable_bytes.get(facts.st_ino, 0), facts.st_size)
    if lose:
        os.ftruncate(descriptor, before + (facts.st_size - before) // 2)
    durable_bytes[facts.st_ino] = facts.st_size


if __name__ == "__main__":
    serve()
