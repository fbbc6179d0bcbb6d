"""``up``: a federation that works, from whatever state it is in. Every step may be repeated."""

from __future__ import annotations

from collections.abc import Iterator

from flocktune.federation.enrolled import let_in_accepted, shut_out_removed
from flocktune.federation.layout import Federation
from flocktune.federation.processes import check, start
from flocktune.federation.services import NGINX, SUPEREXEC, SUPERLINK, services


def up(federation: Federation) -> Iterator[tuple[str, str]]:
    """Start what is not alive and settle who takes part; gives (who, what was done) as it happens.

    The door opens after those are out who must not come in. Raises UserError, NotAnswering and ControlFailed; another
    ``up`` goes on from there.
    """
    check(federation)
    for name in (SUPERLINK, SUPEREXEC):
        yield name, _started(federation, name)
    for client in shut_out_removed(federation):
        yield client, "shut out and forgotten"
    if NGINX in services(federation):
        yield NGINX, _started(federation, NGINX)
    for client, node_id in let_in_accepted(federation).items():
        yield client, f"registered as node {node_id}"


def _started(federation: Federation, name: str) -> str:
    done = start(federation, name)
    return f"{'started' if done.new else 'was running'}, process {done.pid}"
