"""Starting and stopping the coordinator's programs: what is alive stays, what is not is started, nothing is left."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from flocktune.errors import FlocktuneError, Problem, UserError
from flocktune.federation.layout import LOOPBACK, Federation
from flocktune.federation.services import (
    NGINX,
    SUPEREXEC,
    SUPERLINK,
    Service,
    belonging,
    check_installed,
    inherited_environment,
    pid_of,
    processes_of_nginx,
    services,
)

START_S = 90.0
"""Seconds that a program may take until it answers. Flower's take about five on an idle machine."""
STOP_S = 15.0
"""Seconds that a program may take to end by itself."""

_POLL_S = 0.05
_LARGEST_LOG_BYTES = 20_000_000


class NotAnswering(FlocktuneError):
    """A program that ended, or did not answer in time; with the last lines of its log."""


@dataclass(frozen=True)
class Started:
    """One program as ``start`` left it. ``new``: it was not alive before."""

    name: str
    pid: int
    new: bool


def start(federation: Federation, name: str) -> Started:
    """Start one program unless it is alive, and wait until it answers.

    It is detached: it outlives this process and the terminal. Raises UserError when its port is another's, and
    NotAnswering.
    """
    service = services(federation)[name]
    spawned = None
    if pid_of(service) is None:
        if name == NGINX:
            _end(lambda: processes_of_nginx(federation))
        _check_port(federation, name)
        spawned = _spawn(federation, service)
    return Started(name, _wait_until_answering(federation, service, spawned), new=spawned is not None)


def check(federation: Federation) -> None:
    """Raise UserError, before anything is started, when a program is missing or nginx dislikes its configuration."""
    check_installed(federation)
    if NGINX not in services(federation):
        return
    said = subprocess.run(
        (*services(federation)[NGINX].command, "-t"),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        umask=0o077,  # it makes its log
    )
    if said.returncode:
        fix = f"Write it anew by: flocktune federation init {federation.folder} --renew"
        raise UserError(Problem(str(federation.nginx_config), "what nginx accepts", said.stderr.strip(), fix))


def stop(federation: Federation) -> list[str]:
    """End every program, the door first, and what they started. Gives the names of those that were alive.

    Raises UserError when something starts them again.
    """
    stopped = []
    for name in reversed(services(federation)):
        service = services(federation)[name]
        if pid_of(service) is not None:
            stopped.append(name)
            _end(lambda service=service: _found(pid_of(service)))  # type: ignore[misc]
    # Runs that the SuperExec has started, above all.
    _end(lambda: belonging(federation))
    if alive := [name for name, service in services(federation).items() if pid_of(service) is not None]:
        fix = "If systemd does: sudo systemctl stop 'flocktune-*'"
        raise UserError(Problem(", ".join(alive), "programs that end", "something that starts them again", fix))
    return stopped


def answers(federation: Federation, name: str) -> bool:
    """Whether a program does its work: the servers answer with the federation's certificates, the SuperExec asks."""
    try:
        match name:
            case "superlink":
                return _superlink_answers(federation)
            case "nginx":
                return _nginx_answers(federation)
            case _:
                pid = pid_of(services(federation)[name])
                return pid is not None and federation.superlink_port in _connected_ports(pid)
    except (OSError, http.client.HTTPException):
        return False


def last_lines(path: Path, count: int) -> list[str]:
    """The last lines of a log; none when there is no log."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 400 * count))
        return file.read().decode(errors="replace").splitlines()[-count:] if count else []


def _spawn(federation: Federation, service: Service) -> subprocess.Popen[bytes]:
    path = federation.log(service.name)
    if path.exists() and path.stat().st_size > _LARGEST_LOG_BYTES:
        path.replace(path.with_suffix(".log.1"))
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        return subprocess.Popen(
            service.command,
            env=inherited_environment(federation),
            cwd=federation.folder,
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            start_new_session=True,
            umask=0o077,
        )
    finally:
        os.close(descriptor)


def _check_port(federation: Federation, name: str) -> None:
    if name == SUPEREXEC:
        return
    host, port = (LOOPBACK, federation.superlink_port) if name == SUPERLINK else ("0.0.0.0", federation.port)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            fix = f"See who has it: ss -ltnp 'sport = :{port}'. End that, or make the federation with another port."
            if isinstance(error, PermissionError):
                fix = "A port below 1024 is for root, or for the systemd unit: start it so, or choose a higher port."
            raise UserError(Problem(f"port {port}", f"one that {name} can have", error.strerror or "", fix)) from None


def _wait_until_answering(federation: Federation, service: Service, spawned: subprocess.Popen[bytes] | None) -> int:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        pid = pid_of(service)
        if pid is not None and answers(federation, service.name):
            return pid
        if spawned.poll() is not None if spawned else pid is None:
            break
        time.sleep(_POLL_S)
    log = federation.log(service.name)
    tail = "\n  ".join(last_lines(log, 12))
    got = "ended" if pid_of(service) is None else f"did not answer within {START_S:.0f} seconds"
    raise NotAnswering(f"{service.name} {got}. The end of {log}:\n  {tail}")


def _superlink_answers(federation: Federation) -> bool:
    context = ssl.create_default_context(cafile=str(federation.authority))
    connection = http.client.HTTPSConnection(LOOPBACK, federation.superlink_port, timeout=5, context=context)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.HTTPStatus.OK
    finally:
        connection.close()


def _nginx_answers(federation: Federation) -> bool:
    context = ssl.create_default_context(cafile=str(federation.authority))
    with (
        socket.create_connection((LOOPBACK, federation.port), timeout=5) as connection,
        context.wrap_socket(connection, server_hostname=federation.host),
    ):
        return True


def _end(alive: Callable[[], Iterable[int]]) -> None:
    """SIGTERM, and SIGKILL for what is there after STOP_S."""
    for number, patience_s in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, STOP_S)):
        told: set[int] = set()
        deadline = time.monotonic() + patience_s
        while there := set(alive()):
            for pid in there - told:
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue
            told |= there
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_S)


def _found(pid: int | None) -> tuple[int, ...]:
    return () if pid is None else (pid,)


def _connected_ports(pid: int) -> set[int]:
    """Ports of this machine's IPv4 loopback that a process is connected to."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(os.readlink(entry))
        except OSError:
            continue
    found = set()
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        established = fields[3] == "01"
        if established and f"socket:[{fields[9]}]" in inodes:
            found.add(int(fields[2].partition(":")[2], 16))
    return found
