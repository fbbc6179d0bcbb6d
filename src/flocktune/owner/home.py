"""An owner's folder for one federation.

HOME/key           the private key        HOME/policy.yaml   what this owner allows
HOME/ca.pem        whom it trusts         HOME/audit.jsonl   every task, refusal and update
HOME/worker.sock   where its worker is    HOME/worker.log    what that one said
HOME/node          what the coordinator calls this client    HOME/task   what it is at: given back after a crash
"""

from __future__ import annotations

import os
from dataclasses import dataclass
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
from flocktune.files import sha256_bytes
from flocktune.owner.policy import write_policy

AUDIT, POLICY = "audit.jsonl", "policy.yaml"


def default_home(invitation: Invitation) -> Path:
    """``$FLOCKTUNE_HOME`` or ``~/.flocktune``, below it one folder a federation and client."""
    root = Path(os.environ.get("FLOCKTUNE_HOME") or Path.home() / ".flocktune")
    return root / invitation.federation / invitation.client


@dataclass(frozen=True)
class Home:
    """An owner's folder for one federation: key, policy, audit log, the worker's socket. Its user's alone."""

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


def make_home(folder: Path, invitation: Invitation) -> Home:
    """Make what is missing: the folder, a key, a policy to edit. Raises UserError, also for another federation's home.

    A new invitation to a client that was let in before means that it was removed, and a removed key never comes back:
    then a new key is made, and the old one kept as ``key.before``.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        key, node, known = folder / "key", folder / "node", folder / "invited"
        mine = [invitation.federation_id, sha256_bytes((invitation.secret or invitation.private_key or "").encode())]
        before = known.read_text().split() if known.exists() else mine
        if before[0] != mine[0]:
            fix = "Its coordinator is another one. Choose another folder: --home"
            raise UserError(Problem(str(folder), f"the home for federation {mine[0]}", f"{before[0]}'s", fix))
        if before != mine and node.exists():
            key.replace(folder / "key.before")
            node.unlink()
        if invitation.private_key is not None:
            write_private(key, invitation.private_key)
        elif not key.exists():
            write_private(key, new_private_key())
        write_private(known, " ".join(mine))
        write_private(folder / "ca.pem", invitation.ca)
        if not (folder / POLICY).exists():
            write_policy(folder / POLICY)
    except OSError as error:
        raise UserError(
            Problem(str(folder), "a folder that can be written", str(error), "Choose another: --home")
        ) from None
    return Home(folder, public_key_of(key.read_bytes()))


def write_enrolment(home: Home, invitation: Invitation, path: Path) -> str:
    """Write the request that the coordinator must accept; gives the key's fingerprint. Raises UserError."""
    try:
        write_request(path, make_request(invitation, home.public_key))
    except OSError as error:
        raise UserError(
            Problem(str(path), "a file that can be written", str(error), "Join from another folder.")
        ) from None
    return fingerprint(home.public_key)
