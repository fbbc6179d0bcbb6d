"""An owner's folder for one federation.

HOME/key           the private key        HOME/policy.yaml   what this owner allows
HOME/ca.pem        whom it trusts         HOME/audit.jsonl   every task, refusal and update
HOME/worker.sock   where its worker is    HOME/worker.log    what that one said
HOME/cache/        rows as tokens, emulators HOME/invited      which invitations were used here
HOME/identity      who it is to other owners HOME/peers.json  who they were when they were seen first
HOME/memory/       private state of runs, such as a factor that never leaves
HOME/privacy.key   what the noise is made of that hides rows; whoever has it can take the noise away
HOME/node          what the coordinator calls this client    HOME/task   what it is at: given back after a crash
"""

from __future__ import annotations

import os
import secrets
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from flocktune.audit import AuditLog
from flocktune.enrolment import (
    Invitation,
    fingerprint,
    make_request,
    new_private_key,
    public_key_of,
    write_private,
    write_request,
)
from flocktune.errors import Problem, UserError
from flocktune.files import exclusive, sha256_bytes
from flocktune.owner.policy import write_policy

AUDIT, POLICY, CACHE, INVITED = "audit.jsonl", "policy.yaml", "cache", "invited"
MEMORY, IDENTITY, PEERS = "memory", "identity", "peers.json"
PRIVACY_KEY = "privacy.key"


def default_home(invitation: Invitation) -> Path:
    """``$FLOCKTUNE_HOME`` or ``~/.flocktune``, below it one folder a federation and client."""
    root = Path(os.environ.get("FLOCKTUNE_HOME") or Path.home() / ".flocktune")
    return root / invitation.federation / invitation.client


@dataclass(frozen=True)
class Home:
    """An owner's folder for one federation: key, policy, audit log, rows as tokens. Its user's alone."""

    folder: Path
    public_key: str

    @property
    def key(self) -> Path:
        """The private key; it never leaves."""
        return self.folder / "key"

    @property
    def authority(self) -> Path:
        """The federation's certificate authority: the only one that is trusted."""
        return self.folder / "ca.pem"

    @property
    def policy(self) -> Path:
        """What this owner allows."""
        return self.folder / POLICY

    @property
    def node(self) -> Path:
        """What the coordinator called this client last."""
        return self.folder / "node"

    @property
    def audit(self) -> AuditLog:
        """What this owner did."""
        return AuditLog(self.folder / AUDIT)


def alone(folder: Path) -> AbstractContextManager[None]:
    """Hold an owner's folder for this process. Raises Held, a UserError, when another one does."""
    fix = "Another join is running with this home: end that one first, or choose another folder with --home."
    return exclusive(folder, "a home that no join is using", fix)


def make_home(folder: Path, invitation: Invitation, *, look: bool = False) -> Home:
    """Make what is missing: the folder, a key, a policy to edit. ``look``: change nothing when there is a key.

    A new invitation to a client that was let in before means that it was removed, and a removed key never comes back:
    then a new key is made, and the old one kept as ``key.before-1``, ``key.before-2``, ... An invitation that was used
    here before changes nothing. Raises UserError, also for another federation's home, for a folder with other things
    in it, and for one that another process holds.
    """
    key = folder / "key"
    try:
        _refuse_others(folder, invitation)
        if not (look and key.exists()):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.chmod(0o700)
            with alone(folder):
                _furnish(folder, invitation)
        return Home(folder, public_key_of(key.read_bytes()))
    except OSError as error:
        raise UserError(
            Problem(str(folder), "a folder that can be written", str(error), "Choose another: --home")
        ) from None


def _refuse_others(folder: Path, invitation: Invitation) -> None:
    """Raise UserError for a folder that is no home, or another federation's; nothing was touched then."""
    used = _invitations(folder)
    if used and used[0] != invitation.federation_id:
        fix = "Its coordinator is another one. Choose another folder: --home"
        raise UserError(
            Problem(str(folder), f"the home for federation {invitation.federation_id}", f"{used[0]}'s", fix)
        )
    others = [entry for entry in folder.iterdir() if entry.name != ".lock"] if folder.exists() else []
    if others and not used and not (folder / "key").exists():
        got = "one with other things in it"
        raise UserError(Problem(str(folder), "an empty folder, or an owner's home", got, "Choose another: --home"))


def _furnish(folder: Path, invitation: Invitation) -> None:
    """Key, authority and policy. Each step may be the last: the next call goes on from there."""
    key, node, used = folder / "key", folder / "node", _invitations(folder)
    brought = invitation.private_key
    mine = sha256_bytes((invitation.secret or brought or "").encode())
    if used and mine not in used[1:]:
        if key.exists() and (brought or node.exists()):
            key.replace(_free(folder))
        node.unlink(missing_ok=True)
    if not key.exists():
        if brought is None and node.exists():
            fix = "Restore it from a backup. If it is lost, ask the coordinator for a new invitation."
            raise UserError(Problem(str(key), "the key that the coordinator has let in", "nothing there", fix))
        write_private(key, brought or new_private_key())
    if mine not in used[1:]:
        write_private(folder / INVITED, " ".join([invitation.federation_id, *used[1:], mine]))
    write_private(folder / "ca.pem", invitation.ca)
    if not (folder / POLICY).exists():
        write_policy(folder / POLICY)


def _invitations(folder: Path) -> list[str]:
    """The federation's id, and the digest of each invitation that was used here."""
    known = folder / INVITED
    return known.read_text().split() if known.exists() else []


def _free(folder: Path) -> Path:
    """Where a key is kept that is used no more."""
    return next(path for path in (folder / f"key.before-{number}" for number in count(1)) if not path.exists())


def write_enrolment(home: Home, invitation: Invitation, path: Path) -> str:
    """Write the request that the coordinator must accept; gives the key's fingerprint. Raises UserError."""
    try:
        write_request(path, make_request(invitation, home.public_key))
    except OSError as error:
        raise UserError(
            Problem(str(path), "a file that can be written", str(error), "Join from another folder.")
        ) from None
    return fingerprint(home.public_key)


def identity_key(folder: Path) -> bytes:
    """The Ed25519 private key by which other owners know this one in secure aggregation, 32 bytes; made once.

    Raises UserError for one that is damaged.
    """
    path = folder / IDENTITY
    if not path.exists():
        write_private(path, secrets.token_bytes(32))
    key = path.read_bytes()
    if len(key) != 32:
        fix = "Bring it back from a copy. With a new one, other owners refuse this client: it is another to them."
        raise UserError(Problem(str(path), "a private key of 32 bytes", f"{len(key)} bytes", fix))
    return key


def public_identity(folder: Path) -> str:
    """What other owners' peers.json shall show for this one, in hex."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes(identity_key(folder)).public_key().public_bytes_raw().hex()
