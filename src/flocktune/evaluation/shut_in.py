"""Programs that a model wrote, run where they can do no harm: each in a process that has given up everything.

What holds a program (:mod:`flocktune.evaluation.shut_in_child`), whoever the user is, root too: a seccomp filter that
leaves it no file, socket, process, thread or signal; limits on processor time and memory; nothing of the user's
environment, an empty working folder, no input; and a process of its own, killed when its time is up or whoever waits
for it is gone. Before the first program it is tried whether all that holds on this machine; where it does not, nothing
is run.

What it does not do: code and tests share a process, so code that sets out to deceive its tests can.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from flocktune.errors import Problem, UserError

CHILD = Path(__file__).with_name("shut_in_child.py")
FLAGS = ("-s", "-P", "-S", "-B")
"""Nothing of the user's, of the folder at hand, or that is installed is imported, and nothing is written."""

ENVIRONMENT = {"PYTHONHASHSEED": "0"}
"""So that sets of texts have the same order every time: what passes once passes again."""

WALL, START_S = 3, 5
"""Seconds on the clock for one of the processor, and for the start: a machine may be busy, and a program may sleep."""

_HARM = """
import ctypes, os
def refused(harm):
    try:
        harm()
    except (OSError, ImportError):
        return
    raise RuntimeError
refused(lambda: open("/proc/self/environ"))
refused(lambda: open("a file", "w"))
refused(lambda: os.fork())
refused(lambda: os.kill(os.getppid(), 0))
refused(lambda: os.unlink("/nothing there"))
assert ctypes.CDLL(None).socket(2, 1, 0) == -1
assert set(os.environ) <= {"LC_CTYPE", "PYTHONHASHSEED"}  # Python itself sets the first
"""


@dataclass(frozen=True)
class Limits:
    """``timeout_s``: processor seconds; ``memory_bytes``: address space."""

    timeout_s: float = 5.0
    memory_bytes: int = 512 * 2**20


def run_shut_in(program: str, limits: Limits) -> str:
    """Run Python code: ``passed``, ``raised NAME``, ``out of time`` or ``ended early``.

    That it passed means that it ran to its end and raised nothing. Raises UserError as :func:`refuse`.
    """
    refuse()
    return _run(program, limits)


@cache
def refuse() -> None:
    """Raise UserError unless programs are shut in on this machine, which is tried once."""
    found = _run(_HARM, Limits())
    if found != "passed":
        raise UserError(
            Problem(
                "generated code",
                "a machine on which it can be shut in: Linux with seccomp, on x86-64 or ARM-64",
                found,
                "It is not run here. Evaluate on such a machine.",
            )
        )


def _run(program: str, limits: Limits) -> str:
    nonce = secrets.token_hex(16)  # else a program could write the verdict itself, and end
    request = {
        "program": program,
        "nonce": nonce,
        "parent": os.getpid(),
        "cpu_s": limits.timeout_s,
        "memory_bytes": limits.memory_bytes,
    }
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as asked:
        asked.write(json.dumps(request).encode())
        asked.seek(0)
        process = subprocess.Popen(
            [sys.executable, *FLAGS, str(CHILD)],
            stdin=asked,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=ENVIRONMENT,
            start_new_session=True,
        )
        assert process.stdout is not None
        with process.stdout:
            try:
                code = process.wait(timeout=WALL * limits.timeout_s + START_S)
            except subprocess.TimeoutExpired:
                return "out of time"
            finally:
                process.kill()
                process.wait()
            told = os.read(process.stdout.fileno(), 200)  # of a pipe that it may have filled, no more
    given, _, verdict = told.decode(errors="replace").partition(" ")
    if given == nonce:
        return verdict
    return "out of time" if code in (-signal.SIGXCPU, -signal.SIGKILL) else "ended early"
