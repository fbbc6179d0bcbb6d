"""How a federation is: its programs, its clients, its runs, its certificates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from flocktune.errors import FlocktuneError
from flocktune.federation.certificates import days_left
from flocktune.federation.control import Node, list_nodes
from flocktune.federation.enrolled import clients
from flocktune.federation.layout import LOOPBACK, Federation
from flocktune.federation.processes import answers
from flocktune.federation.services import SUPERLINK, pid_of, services
from flocktune.files import is_held
from flocktune.report.events import LOG_NAME, read_events_leniently
from flocktune.run_folder import is_finished

_SOON_DAYS = 30


@dataclass(frozen=True)
class ProgramStatus:
    """``status``: answering, silent (alive, but does not answer) or down."""

    name: str
    status: str
    pid: int | None
    address: str


@dataclass(frozen=True)
class ClientStatus:
    """``status``: invited, accepted, registered (never connected), online, offline, removed, lost (the SuperLink does
    not know it), or unknown (it can not be asked). ``since``: of online and offline (UTC).
    """

    name: str
    status: str
    since: str
    node_id: str | None
    fingerprint: str | None
    enrolled_at: str | None


@dataclass(frozen=True)
class RunStatus:
    """A run's folder. ``status``: running, finished, or stopped (``--resume`` goes on with it). ``rounds_done`` of
    ``rounds``; None when its log does not say.
    """

    name: str
    status: str
    rounds_done: int
    rounds: int | None


@dataclass(frozen=True)
class Status:
    """Everything that ``status`` shows; ``asdict`` of it is what --json gives."""

    name: str
    address: str
    programs: tuple[ProgramStatus, ...]
    clients: tuple[ClientStatus, ...]
    runs: tuple[RunStatus, ...]
    certificate_days: int


def status_of(federation: Federation) -> Status:
    """Look at everything. Starts nothing, changes nothing. Raises UserError for damaged files."""
    programs = tuple(_program(federation, name) for name in services(federation))
    up = any(program.name == SUPERLINK and program.status == "answering" for program in programs)
    return Status(
        federation.name,
        f"{federation.host}:{federation.port}",
        programs,
        _clients(federation, up=up),
        tuple(_run(folder) for folder in sorted(federation.runs.iterdir()) if (folder / "recipe.yaml").exists()),
        min(days_left(federation.server_certificate), days_left(federation.tls("loopback.pem"))),
    )


def as_json(status: Status) -> dict[str, Any]:
    """What a script reads."""
    return asdict(status)


def as_tables(status: Status) -> Group:
    """What a person reads, 80 columns wide."""
    days = status.certificate_days
    certificate = Text(f"Certificates end in {days} days." if days >= 0 else "The certificates have ended.")
    if days < _SOON_DAYS:
        certificate.append(" Renew them: flocktune federation init DIR --renew", style="red")
    return Group(
        Text(f"Federation {status.name}, {status.address}", style="bold"),
        _table(
            ("Program", "Status", "Process", "Address"),
            [(item.name, item.status, str(item.pid or ""), item.address) for item in status.programs],
        ),
        _table(
            ("Client", "Status", "Since (UTC)", "Node"),
            [(item.name, item.status, item.since, item.node_id or "") for item in status.clients],
        )
        if status.clients
        else Text("No clients yet. Invite one: flocktune federation enrol DIR --name NAME"),
        _table(
            ("Run", "Status", "Rounds"),
            [(item.name, item.status, f"{item.rounds_done} of {item.rounds or '?'}") for item in status.runs],
        )
        if status.runs
        else Text("No runs yet."),
        certificate,
    )


def _program(federation: Federation, name: str) -> ProgramStatus:
    pid = pid_of(services(federation)[name])
    addresses = {
        "superlink": f"{LOOPBACK}:{federation.superlink_port}",
        "nginx": f"port {federation.port}, all addresses",
    }
    state = "down" if pid is None else "answering" if answers(federation, name) else "silent"
    return ProgramStatus(name, state, pid, addresses.get(name, ""))


def _clients(federation: Federation, *, up: bool) -> tuple[ClientStatus, ...]:
    known = clients(federation)
    nodes: Mapping[str, Node] | None = None
    if up and any(client.node_id for client in known):
        try:
            nodes = {node.id: node for node in list_nodes(federation)}
        except FlocktuneError:  # it went away meanwhile
            nodes = None
    found = []
    for client in known:
        state, since = client.status, ""
        if state == "registered":
            node = (nodes or {}).get(client.node_id or "")
            state, since = ("unknown", "") if nodes is None else (node.status, node.since) if node else ("lost", "")
        found.append(ClientStatus(client.name, state, since, client.node_id, client.fingerprint, client.enrolled_at))
    return tuple(found)


def _run(folder: Path) -> RunStatus:
    events, _ = read_events_leniently(folder / LOG_NAME)
    planned = [event.get("rounds") for event in events if event["event"] == "run_start"]
    done = {event.get("round") for event in events if event["event"] == "round"}
    state = "running" if is_held(folder) else "finished" if is_finished(folder) else "stopped"
    return RunStatus(folder.name, state, len(done), planned[-1] if planned else None)


def _table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 3, 0, 0))
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    return table


_STYLES = {"answering": "green", "online": "green", "running": "green", "down": "red", "silent": "red", "lost": "red",
           "offline": "yellow"}  # fmt: skip
