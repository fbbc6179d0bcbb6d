"""The process that keeps an owner's base model, rows and caches, between the coordinator's tasks.

It listens on a unix socket in the owner's home that only its user can open, does one task at a time, and ends when
nothing has come for a while. The network is another process's business (:mod:`join`): that one holds no model, and a
worker that dies is started again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Client, Connection
from pathlib import Path

from flocktune.engine.parcels import FAILURE, Parcel, from_text, to_text
from flocktune.errors import FlocktuneError, Problem, UpdateRefused, UserError
from flocktune.owner.home import CACHE, POLICY
from flocktune.owner.policy import load_policy

_LOG = logging.getLogger(__name__)

SOCKET, LOG = "worker.sock", "worker.log"

IDLE_S = 900.0
"""A worker without a task for so long ends, and gives its memory back."""

START_S = 60.0
"""So long may a new worker take to listen: it imports nothing large before."""

HELLO_S = 180.0
"""So long may it take to say hello: it imports torch before. Longer is at a task that nobody waits for any more."""

GRACE_S = 30
"""A worker whose network side was killed ends itself so long after the time that a task may take."""

_LOOK_S = 0.2
"""Between two looks whether to stop."""

_SOCKET_PATH_BYTES = 100
"""Unix sockets' paths may have 107 bytes."""


STOPPED = "was stopped in the middle of a task"


class WorkerDied(FlocktuneError):
    """The worker ended in the middle of a task."""


@dataclass(frozen=True)
class Settings:
    """What a worker is for: an :class:`~flocktune.owner.tasks.Owner` as plain values. Other settings, other worker."""

    client: str
    home: str
    data: str
    model: str | None = None
    emulator: str | None = None
    device: str = "auto"
    threads: int = 0
    max_gpu_memory_gb: float | None = None

    @property
    def digest(self) -> str:
        """By which a running worker is known to be for the same."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def socket(self) -> Path:
        """Where it listens."""
        return Path(self.home) / SOCKET


class Worker:
    """The owner's running worker, started when it is not there. Used by one process at a time."""

    def __init__(self, settings: Settings, *, idle_s: float = IDLE_S) -> None:
        if len(str(settings.socket).encode()) > _SOCKET_PATH_BYTES:
            expected = f"a path of at most {_SOCKET_PATH_BYTES - len(SOCKET) - 1} bytes"
            raise UserError(Problem("--home", expected, settings.home, "A unix socket needs a short one."))
        self.settings, self._idle_s = settings, idle_s
        self._connection: Connection | None = None
        self.process_id = 0

    def ask(self, parcel: Parcel, timeout_s: float, stop: threading.Event | None = None) -> Parcel:
        """The worker's reply. One that takes longer than ``timeout_s`` is killed, and one at work when ``stop`` is set.

        Raises WorkerDied, UserError, UpdateRefused for fields that can not be sent on.
        """
        try:
            text = to_text(parcel).encode()
        except (ValueError, RecursionError) as error:
            raise UpdateRefused(f"message: expected plain fields, got others ({error})") from None
        stop = stop or threading.Event()
        connection = self._connected(stop)
        try:
            connection.send_bytes(text)
            connection.send_bytes(parcel.blob)
            if not _comes(connection, timeout_s, stop):
                raise WorkerDied(f"took longer than {timeout_s / 60:g} minutes, and was stopped")
            return _receive(connection)
        except WorkerDied:
            self.kill()
            raise
        except (EOFError, OSError) as error:
            self._forget()
            raise WorkerDied(f"the worker ended in the middle of a task ({type(error).__name__})") from None

    def kill(self) -> None:
        """End it now; nothing is lost but what it was at."""
        if self.process_id:
            with suppress(ProcessLookupError):
                os.kill(self.process_id, signal.SIGKILL)
        self._forget()

    def stop(self) -> None:
        """End it now, also one that is still on its way."""
        if self._connection is None:
            with suppress(OSError), Client(str(self.settings.socket), "AF_UNIX") as connection:
                os.kill(_peer(connection)[0], signal.SIGKILL)
        self.kill()

    def _connected(self, stop: threading.Event) -> Connection:
        if self._connection is not None and self._connection.poll(0):
            self._forget()  # nothing is to be read between tasks but the end: it was idle for long, or died
        if self._connection is None:
            self._connection = self._greet(stop) or self._start(stop)
        return self._connection

    def _greet(self, stop: threading.Event) -> Connection | None:
        """Connect to a worker that is there. One for other settings is stopped, and one that does not get to it.

        Raises WorkerDied when ``stop`` is set meanwhile.
        """
        try:
            connection = Client(str(self.settings.socket), "AF_UNIX")
        except OSError:
            return None
        try:
            if _comes(connection, HELLO_S, stop):
                told = json.loads(connection.recv_bytes(10_000))
                if told["settings"] == self.settings.digest:
                    self.process_id = int(told["process"])
                    return connection
            process_id, _ = _peer(connection)
            os.kill(process_id, signal.SIGKILL)
        except WorkerDied:
            connection.close()
            raise
        except (OSError, EOFError, ValueError, KeyError, TypeError):
            pass
        connection.close()
        return None

    def _start(self, stop: threading.Event) -> Connection:
        log = Path(self.settings.home) / LOG
        with os.fdopen(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "flocktune.owner.worker", json.dumps(asdict(self.settings)), str(self._idle_s)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,  # it outlives the network side, which finds it again
            )
        until = time.monotonic() + START_S
        try:
            while time.monotonic() < until and process.poll() is None:
                if connection := self._greet(stop):
                    return connection
                if stop.wait(0.05):
                    raise WorkerDied(STOPPED)
        except WorkerDied:
            process.kill()
            raise
        process.kill()
        raise UserError(Problem(str(log), "a worker that starts", "one that does not", "Its log says why."))

    def _forget(self) -> None:
        if self._connection:
            self._connection.close()
        self._connection, self.process_id = None, 0


def _comes(connection: Connection, timeout_s: float, stop: threading.Event) -> bool:
    """Whether there is something to read within ``timeout_s``. Raises WorkerDied when ``stop`` is set meanwhile."""
    until = time.monotonic() + timeout_s
    while not connection.poll(min(_LOOK_S, max(0.0, until - time.monotonic()))):
        if stop.is_set():
            raise WorkerDied(STOPPED)
        if time.monotonic() >= until:
            return False
    return True


def serve(settings: Settings, idle_s: float) -> None:
    """Do tasks until none has come for ``idle_s`` seconds."""
    with _listening(settings.socket) as listener:
        from flocktune.owner.tasks import Owner  # seconds of imports; who connects meanwhile waits

        owner = Owner(**{**asdict(settings), "home": Path(settings.home)})
        hello = json.dumps({"process": os.getpid(), "settings": settings.digest}).encode()
        listener.settimeout(idle_s)
        with suppress(TimeoutError):
            while True:
                accepted, _ = listener.accept()
                if _peer(accepted)[1] != os.getuid():
                    accepted.close()
                    continue
                with Connection(accepted.detach()) as connection, suppress(EOFError, ConnectionError):
                    connection.send_bytes(hello)
                    while connection.poll(idle_s):
                        reply = _reply(owner, connection)
                        connection.send_bytes(to_text(reply).encode())
                        connection.send_bytes(reply.blob)
                    break
    _LOG.info("idle for %g s: ending", idle_s)


def _reply(owner, connection: Connection) -> Parcel:  # type: ignore[no-untyped-def]
    try:
        parcel = _receive(connection)
    except FlocktuneError as error:  # nothing that could be answered: not even whose task it is
        _LOG.warning("%s", error)
        return Parcel(FAILURE, {"reason": str(error)})
    with _limited(owner.home):
        return owner.answer(parcel)


@contextmanager
def _limited(home: Path) -> Iterator[None]:
    """Inside, this process ends when its time is over, also when nobody is left to see to it."""
    with suppress(UserError):  # without a policy no task is done
        signal.setitimer(signal.ITIMER_REAL, load_policy(home / POLICY).max_minutes * 60 + GRACE_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _receive(connection: Connection) -> Parcel:
    text, blob = connection.recv_bytes(), connection.recv_bytes()
    return from_text(text.decode(errors="replace"), blob)


@contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    """Take the socket's place; what a dead worker left there is removed. Mode 0600 from the first moment."""
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        listener.listen(4)
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)


def _peer(connection: socket.socket | Connection) -> tuple[int, int]:
    """Process and user at the other end."""
    form = "3i"  # process, user, group
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        told = struct.unpack(form, same.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize(form)))
    return told[0], told[1]


def main() -> None:
    """``python -m flocktune.owner.worker SETTINGS IDLE_S``: started by :class:`Worker` alone."""
    form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, stream=sys.stderr)
    settings = Settings(**json.loads(sys.argv[1]))
    os.umask(0o077)
    # Rows as tokens are rows: they lie where only the owner looks.
    os.environ["FLOCKTUNE_CACHE"] = os.environ.get("FLOCKTUNE_CACHE") or str(Path(settings.home) / CACHE)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the network side, which ends this one
    serve(settings, float(sys.argv[2]))


if __name__ == "__main__":
    main()
