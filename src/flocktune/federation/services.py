"""The three programs of a coordinator: how each is started, and found again among the machine's processes.

    owners --TLS--> nginx, only /v1/fleet/ --TLS--> SuperLink on 127.0.0.1 <--TLS, secret-- SuperExec

The SuperLink's one port also serves the Control API, which asks nobody who they are, so it must never be reachable from
elsewhere. The SuperExec starts what the coordinator runs, and nobody can be one without the secret.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flocktune.errors import Problem, UserError
from flocktune.federation.layout import LOOPBACK, Federation

SUPERLINK, SUPEREXEC, NGINX = "superlink", "superexec", "nginx"
NAMES = (SUPERLINK, SUPEREXEC, NGINX)
"""In the order in which they start; they are stopped in the reverse order."""

RUN = "run"
"""The log of what the SuperExec starts: the coordinator's runs."""

MARK = "FLOCKTUNE_FEDERATION_ID"
"""In the environment of every process of a federation, and of those that these start."""


@dataclass(frozen=True)
class Service:
    """One program. ``own``: a path among its arguments that no other process has, which is how it is found."""

    name: str
    command: tuple[str, ...]
    own: str


def services(federation: Federation) -> dict[str, Service]:
    """The federation's programs, in starting order; without nginx when the door is the coordinator's own."""
    address = f"{LOOPBACK}:{federation.superlink_port}"
    secret = ("--superexec-auth-secret-file", str(federation.secret))
    superlink = (
        *(program("flower-superlink"), "--host", LOOPBACK, "--port", str(federation.superlink_port)),
        *("--ssl-certfile", str(federation.tls("loopback.pem")), "--ssl-keyfile", str(federation.tls("loopback.key"))),
        *("--ssl-ca-certfile", str(federation.authority), "--database", str(federation.database)),
        *("--isolation", "process", *secret, "--enable-supernode-auth", "--disable-runtime-dependency-installation"),
    )
    superexec = (
        *(program("flower-superexec"), "--runtime-api-address", address),
        *("--root-certificates", str(federation.authority), *secret),
    )
    nginx = (find_nginx() or "/usr/sbin/nginx", "-c", str(federation.nginx_config))
    found = (
        Service(SUPERLINK, superlink, str(federation.database)),
        Service(SUPEREXEC, superexec, str(federation.secret)),
        Service(NGINX, nginx, str(federation.nginx_config)),
    )
    return {service.name: service for service in found if service.name != NGINX or federation.door == NGINX}


def environment(federation: Federation) -> dict[str, str]:
    """What every Flower process gets beside the environment it inherits."""
    return {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        # Or every run builds a virtual environment of its own, from the internet.
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_HOME": str(federation.folder / "flower"),
        MARK: federation.id,
        # The SuperExec starts flwr-serverapp by its name.
        "PATH": f"{_programs()}:/usr/local/bin:/usr/bin:/bin",
        "PYTHONUNBUFFERED": "1",
    }


def inherited_environment(federation: Federation) -> dict[str, str]:
    """The whole environment of a process that ``up`` starts."""
    own = environment(federation)
    path = os.pathsep.join((str(_programs()), os.environ.get("PATH", "/usr/bin:/bin")))
    kept = {key: value for key, value in os.environ.items() if not key.startswith("FLWR_")}
    return {**kept, **own, "PATH": path}


def program(name: str) -> str:
    """The path of one of Flower's programs, which lie beside this Python."""
    return str(_programs() / name)


def find_nginx() -> str | None:
    """The path of nginx; its folder is often missing in the PATH of who is not root."""
    return shutil.which("nginx", path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin")))


def check_installed(federation: Federation) -> None:
    """Raise UserError, with how to install it, when a program is missing."""
    found = []
    if not Path(program("flower-superlink")).exists():
        fix = "Install it by: pip install 'flocktune[flower]'"
        found.append(Problem("flower-superlink", f"a program in {_programs()}", "nothing there", fix))
    if federation.door == NGINX and find_nginx() is None:
        fix = "Install it by: sudo apt install nginx-light (or: dnf install nginx). Its own service is not needed."
        found.append(Problem("nginx", "a program in PATH", "nothing there", fix))
    UserError.raise_all(found)


def pid_of(service: Service) -> int | None:
    """The process that runs ``service`` now, whoever started it, or None.

    It is told by its arguments, which hold a path of this federation, not by a number in a file: that may meanwhile be
    another's.
    """
    for pid, arguments in _processes():
        if service.name == NGINX:  # which writes a title of its own over its arguments
            is_it = len(arguments) == 1 and arguments[0].startswith("nginx: master process ")
            is_it = is_it and service.own in arguments[0].split()
        else:
            is_it = len(arguments) > 2 and Path(arguments[1]).name == f"flower-{service.name}"
            is_it = is_it and service.own in arguments[2:]
        if is_it:
            return pid
    return None


def belonging(federation: Federation) -> dict[int, str]:
    """Every process of the federation, pid -> command: its programs, and what they started."""
    mark = f"{MARK}={federation.id}".encode()
    found = processes_of_nginx(federation)
    for pid, arguments in _processes():
        try:
            if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found[pid] = " ".join(arguments)
        except OSError:  # gone meanwhile, or another user's
            continue
    return found


def processes_of_nginx(federation: Federation) -> dict[int, str]:
    """nginx's processes that write this federation's log. Its workers outlive a master that was killed, and keep the
    port; their titles, written over arguments and environment, do not say whose they are.
    """
    log = str(federation.log(NGINX))
    found = {}
    for pid, arguments in _processes():
        if arguments[0].startswith("nginx: "):
            try:
                if log in {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}:
                    found[pid] = arguments[0]
            except OSError:
                continue
    return found


def _processes() -> Iterator[tuple[int, list[str]]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                text = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if text:  # a dead one that nobody has waited for has none
                yield int(entry.name), text.rstrip(b"\0").decode(errors="replace").split("\0")


def _programs() -> Path:
    return Path(sys.prefix) / "bin"
