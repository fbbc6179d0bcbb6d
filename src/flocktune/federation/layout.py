"""A federation's folder: what lies where, made once, found again.

    DIR/federation.json   what it is: id, name, host, ports       DIR/ca/        the authority: ca.pem, ca.key
    DIR/tls/              server.pem for owners, loopback.pem     DIR/secrets/   what Flower's programs share
    DIR/clients/NAME.json one file a client                       DIR/state/     Flower's database
    DIR/flower/           Flower's home, with its config.toml     DIR/logs/      one file a program
    DIR/nginx/ systemd/ docker/ CHECKLIST.md                      DIR/runs/      the folders of runs

The folder is its owner's alone (0700); what must stay secret in it has mode 0600 besides.
"""

from __future__ import annotations

import json
import random
import re
import secrets
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flocktune.enrolment import checked_name, is_host, write_private
from flocktune.errors import Problem, UserError
from flocktune.federation.certificates import SERVER_DAYS, create_authority, issue
from flocktune.files import read_json

FORMAT = "flocktune-federation/1"
LOOPBACK = "127.0.0.1"
SUPERLINK_PORTS = 20_000, 30_000

_FOLDERS = ("ca", "tls", "secrets", "clients", "flower", "nginx", "nginx/temporary", "systemd", "docker", "state",
            "logs", "runs", "cache")  # fmt: skip
_PLAIN_PATH = re.compile(r"[A-Za-z0-9/._+@=-]+")
"""The path stands in files of nginx, systemd and docker, each with quoting of its own."""


@dataclass(frozen=True)
class Federation:
    """A federation on the coordinator's machine. ``host`` and ``port`` are what owners connect to (TLS, by nginx);
    the SuperLink listens on ``127.0.0.1:superlink_port`` only. ``folder`` is absolute. ``door``: ``nginx``, or ``own``
    when a TLS proxy of the coordinator's passes POST /v1/fleet/ on to the SuperLink, and nothing else.
    """

    folder: Path
    id: str
    name: str
    host: str
    port: int
    superlink_port: int
    door: str = "nginx"

    @property
    def authority(self) -> Path:
        return self.folder / "ca" / "ca.pem"

    @property
    def secret(self) -> Path:
        return self.folder / "secrets" / "superexec.secret"

    @property
    def database(self) -> Path:
        return self.folder / "state" / "superlink.db"

    @property
    def nginx_config(self) -> Path:
        return self.folder / "nginx" / "nginx.conf"

    @property
    def server_certificate(self) -> Path:
        return self.folder / "tls" / "server.pem"

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def tls(self, name: str) -> Path:
        return self.folder / "tls" / name

    def log(self, service: str) -> Path:
        return self.folder / "logs" / f"{service}.log"


def create_federation(
    folder: Path, host: str, port: int, name: str | None, superlink_port: int | None, door: str = "nginx"
) -> Federation:
    """Make a federation's folder with its keys. The files for nginx and others are ``configuration.write``'s.

    federation.json comes last: a folder without it was never finished. ``name``: the folder's, if None.
    ``superlink_port``: a free one, if None. Raises UserError, for a folder that is there too, and OSError.
    """
    folder = folder.expanduser().resolve()
    UserError.raise_all(_problems(folder, host, port, superlink_port, door))
    federation = Federation(
        folder,
        secrets.token_hex(8),
        checked_name(name or folder.name),
        host,
        port,
        superlink_port or _free_port(),
        door,
    )
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    for inner in _FOLDERS:
        (folder / inner).mkdir(mode=0o700, exist_ok=True)
    create_authority(folder / "ca", federation.name)
    renew_certificates(federation)
    write_private(federation.secret, secrets.token_hex(32))
    entries = {"format": FORMAT, **{key: value for key, value in asdict(federation).items() if key != "folder"}}
    write_json_private(folder / "federation.json", entries)
    return federation


def open_federation(folder: Path) -> Federation:
    """Find a federation again. Raises UserError when ``folder`` is none."""
    folder = folder.expanduser().resolve()
    fix = f"Make one by: flocktune federation init {folder} --host NAME"
    if not (folder / "federation.json").exists():
        got = "a folder without federation.json" if folder.is_dir() else "nothing there"
        raise UserError(Problem(str(folder), "a federation's folder", got, fix))
    entries = read_json(folder / "federation.json")
    if not isinstance(entries, dict) or entries.get("format") != FORMAT:
        raise UserError(Problem(str(folder / "federation.json"), FORMAT, "another format or version"))
    try:
        return Federation(
            folder,
            str(entries["id"]),
            str(entries["name"]),
            str(entries["host"]),
            int(entries["port"]),
            int(entries["superlink_port"]),
            str(entries["door"]),
        )
    except (KeyError, ValueError, TypeError) as error:
        where = str(folder / "federation.json")
        raise UserError(Problem(where, "what init wrote", f"no {error}", "Restore it from a backup.")) from None


def renew_certificates(federation: Federation) -> None:
    """New certificates and keys for both servers, from the same authority: clients notice nothing."""
    authority = federation.folder / "ca"
    issue(authority, federation.server_certificate, federation.tls("server.key"), [federation.host], SERVER_DAYS)
    # nginx verifies a name, Flower's programs the address.
    issue(
        authority, federation.tls("loopback.pem"), federation.tls("loopback.key"), ["localhost", LOOPBACK], SERVER_DAYS
    )


def write_json_private(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON that only this user can read, atomically. Raises OSError."""
    write_private(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def _problems(folder: Path, host: str, port: int, superlink_port: int | None, door: str) -> list[Problem]:
    found = []
    if door not in ("nginx", "own"):
        found.append(Problem("--door", "nginx or own", repr(door)))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        fix = "Choose another folder, or with --renew write this federation's certificates and configuration anew."
        found.append(Problem(str(folder), "a new or empty folder", "one with files in it", fix))
    if not _PLAIN_PATH.fullmatch(str(folder)):
        expected = "a path of letters, digits and . _ - + @ = only"
        found.append(Problem(str(folder), expected, "another", "nginx, systemd and docker all read it."))
    if not is_host(host):
        found.append(Problem("--host", "a DNS name in lower case, or an IP address", repr(host)))
    for where, number in (("--port", port), ("--superlink-port", superlink_port)):
        if number is not None and not 0 < number < 65536:
            found.append(Problem(where, "a port number", str(number)))
    if port == superlink_port and door == "nginx":
        found.append(Problem("--superlink-port", "another port than --port", str(port)))
    return found


def _free_port() -> int:
    """One inside the machine that is free now, and not the next federation's either: they are drawn."""
    ports = range(*SUPERLINK_PORTS)
    for port in random.SystemRandom().sample(ports, 100):
        with socket.socket() as probe:
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            return port
    where = f"ports {ports[0]} to {ports[-1]}"
    raise UserError(Problem(where, "one that is free", "none", "Give --superlink-port."))
