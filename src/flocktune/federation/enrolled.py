"""Who takes part: a file a client, from the invitation to the node id that Flower's SuperLink knows the key by.

invited (a secret is open) -> accepted (a key, the secret is gone) -> registered (a node id); removed: to be shut out.
"""

from __future__ import annotations

import fcntl
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from flocktune.enrolment import (
    EnrolmentRequest,
    Invitation,
    checked_name,
    fingerprint,
    new_private_key,
    public_key_of,
    verify_request,
)
from flocktune.errors import Problem, UserError
from flocktune.federation.control import ControlFailed, list_nodes, register, unregister
from flocktune.federation.layout import Federation, write_json_private
from flocktune.files import read_json

FORMAT = "flocktune-client/1"


@dataclass(frozen=True)
class Client:
    """What the coordinator keeps of one client. Times are UTC, ISO 8601. ``secret`` is there until it is answered."""

    name: str
    invited_at: str
    secret: str | None = None
    public_key: str | None = None
    fingerprint: str | None = None
    enrolled_at: str | None = None
    node_id: str | None = None
    removed: bool = False

    @property
    def status(self) -> str:
        """invited, accepted, registered or removed."""
        if self.removed:
            return "removed"
        return "registered" if self.node_id else "accepted" if self.public_key else "invited"


def clients(federation: Federation) -> tuple[Client, ...]:
    """Every client, by name. Raises UserError for a damaged file."""
    return tuple(_read(path) for path in sorted((federation.folder / "clients").glob("*.json")))


def client_named(federation: Federation, name: str) -> Client:
    """One client. Raises UserError when there is none of this name."""
    path = _path(federation, checked_name(name))
    if not path.exists():
        known = ", ".join(client.name for client in clients(federation)) or "nobody yet"
        fix = f"Invite it by: flocktune federation enrol {federation.folder} --name {name}"
        raise UserError(Problem(name, f"an invited client ({known})", "another name", fix))
    return _read(path)


def invite(federation: Federation, name: str, *, with_key: bool = False) -> Invitation:
    """Invite ``name``. An older invitation that nobody has answered yet is void from now on.

    ``with_key`` makes the client's key here, and puts it into the invitation: there is nothing to answer then. Raises
    UserError when the client is enrolled.
    """
    with held(federation):
        path = _path(federation, checked_name(name))
        if path.exists() and (there := _read(path)).status != "invited":
            fix = f"To enrol it anew: flocktune federation enrol {federation.folder} --remove {name}"
            raise UserError(Problem(name, "a client that is not enrolled", f"one that is {there.status}", fix))
        client = Client(name, _now(), secret=None if with_key else secrets.token_hex(32))
        key = new_private_key().decode() if with_key else None
        if key:
            client = _with_key(client, public_key_of(key.encode()))
        _write(federation, client)
    ca = federation.authority.read_text()
    where = (federation.id, federation.name, name, federation.host, federation.port, ca)
    return Invitation(*where, secret=client.secret or "", private_key=key)


def accept(federation: Federation, request: EnrolmentRequest) -> Client:
    """Take a client's key, if the request answers the newest invitation, which it uses up. Raises UserError."""
    with held(federation):
        client = client_named(federation, request.client)
        if client.secret is None:
            got = "one that was answered already" + (
                " with this key" if request.public_key == client.public_key else ""
            )
            fix = f"To enrol it anew: flocktune federation enrol {federation.folder} --remove {client.name}"
            raise UserError(Problem(client.name, "an invitation that is open", got, fix))
        verify_request(request, federation.id, client.name, client.secret)
        if any(request.public_key == other.public_key for other in clients(federation)):
            fix = "Every client makes a key of its own."
            raise UserError(Problem(client.name, "a new key", "one that another client has", fix))
        accepted = _with_key(client, request.public_key)
        _write(federation, accepted)
    return accepted


def remove(federation: Federation, name: str) -> None:
    """Forget a client that has given no key; mark another, for ``shut_out_removed``. Raises UserError."""
    with held(federation):
        client = client_named(federation, name)
        if client.public_key is None:
            _path(federation, name).unlink()
        else:
            _write(federation, replace(client, removed=True))


def shut_out_removed(federation: Federation) -> list[str]:
    """Tell a SuperLink that answers whom to shut out, and forget them. Gives their names.

    Safe to repeat, and to be killed in. Raises UserError and ControlFailed.
    """
    with held(federation):
        removed = [client for client in clients(federation) if client.removed]
        for client in removed:
            _shut_out(federation, client)
            _path(federation, client.name).unlink()
    return [client.name for client in removed]


def let_in_accepted(federation: Federation) -> dict[str, str]:
    """Tell a SuperLink that answers whose keys to let in, and keep their node ids. Gives client -> node id.

    Safe to repeat, and to be killed in. Raises UserError for keys that it refuses, when the others are in, and
    ControlFailed.
    """
    found: dict[str, str] = {}
    problems: list[Problem | str] = []
    with held(federation):
        for client in clients(federation):
            if client.status == "accepted":
                try:
                    found[client.name] = _let_in(federation, client)
                except UserError as error:
                    problems += error.problems
                else:
                    _write(federation, replace(client, node_id=found[client.name]))
    UserError.raise_all(problems)
    return found


@contextmanager
def held(federation: Federation) -> Iterator[None]:
    """One process at a time changes who takes part; the next one waits."""
    with (federation.folder / "clients" / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _let_in(federation: Federation, client: Client) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "key.pub"
        path.write_text(f"{client.public_key}\n")
        try:
            return register(federation, path, client.name)
        except ControlFailed as error:
            if "already in use" not in error.answer:
                raise
    # Killed between the registration and our writing down its node id; or a key that was removed before.
    ours = {other.node_id for other in clients(federation)}
    lost = [node.id for node in list_nodes(federation) if node.id not in ours and node.status != "unregistered"]
    if len(lost) == 1:
        return lost[0]
    fix = f"Shut it out (--remove {client.name}) and invite it anew. It deletes key and node, and join makes a new key."
    raise UserError(Problem(client.name, "a key that was never registered before", "an old one", fix))


def _shut_out(federation: Federation, client: Client) -> None:
    node_id = client.node_id
    if node_id is None:  # it may be in all the same: killed before its node id was written down
        try:
            node_id = _let_in(federation, client)
        except UserError:
            return
    try:
        unregister(federation, node_id)
    except ControlFailed:
        gone = {node.id for node in list_nodes(federation) if node.status == "unregistered"}
        if node_id not in gone:
            raise


def _with_key(client: Client, public_key: str) -> Client:
    known = fingerprint(public_key)
    return replace(client, public_key=public_key, fingerprint=known, enrolled_at=_now(), secret=None)


def _path(federation: Federation, name: str) -> Path:
    return federation.folder / "clients" / f"{name}.json"


def _write(federation: Federation, client: Client) -> None:
    write_json_private(_path(federation, client.name), {"format": FORMAT, **asdict(client)})


def _read(path: Path) -> Client:
    entries = read_json(path)
    try:
        if entries.pop("format") != FORMAT:
            raise ValueError
        return Client(**entries)
    except (AttributeError, KeyError, ValueError, TypeError):
        fix = "Restore it from a backup."
        raise UserError(Problem(str(path), f"a client's file ({FORMAT})", "something else", fix)) from None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
