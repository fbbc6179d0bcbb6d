"""How a data owner becomes a client of a federation: two small JSON files, whose formats both sides share.

The coordinator hands out an **invitation** (NAME.bundle): where the federation is, the authority that its certificate
comes from, and a secret that is good for one answer. The owner makes a key, which never leaves, and sends back a
**request** (NAME.request): the public key, with a proof that whoever made it holds the invitation.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import json
import re
import ssl
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flocktune.errors import Problem, UserError
from flocktune.files import read_json, write_atomic

INVITATION_FORMAT = "flocktune-invitation/1"
REQUEST_FORMAT = "flocktune-request/1"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HOST = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")
_SECRET, _PROOF = re.compile("([0-9a-f]{2}){16,}"), re.compile("[0-9a-f]{64}")
_KEY_TYPE = "ecdsa-sha2-nistp384"
_MOST_BYTES = 64 * 1024
"""No invitation and no request is larger."""


@dataclass(frozen=True)
class Invitation:
    """What an owner needs to find a federation, to know it again, and to be let in.

    ``ca``: the federation's own certificate authority (PEM). ``secret``: hex, good for one request; empty when the key
    was made by the coordinator. ``private_key``: OpenSSH text, then only.
    """

    federation_id: str
    federation: str
    client: str
    host: str
    port: int
    ca: str
    secret: str = ""
    private_key: str | None = None


@dataclass(frozen=True)
class EnrolmentRequest:
    """An owner's public key (OpenSSH, one line), and the HMAC-SHA256 over it under the invitation's secret (hex)."""

    federation_id: str
    client: str
    public_key: str
    proof: str


def checked_name(name: str, where: str = "--name") -> str:
    """``name``, if it can name a client or a federation: it becomes a file's name, and stands in tables.

    Raises UserError.
    """
    if not _NAME.fullmatch(name):
        expected = "a name of at most 64 letters, digits, dots, dashes and underscores, a letter or digit first"
        raise UserError(Problem(where, expected, repr(name)))
    return name


def is_host(host: str) -> bool:
    """Whether that is a DNS name in lower case, or an IP address (without a scope, which may hold any letters)."""
    try:
        return not getattr(ipaddress.ip_address(host), "scope_id", None)
    except ValueError:
        return bool(_HOST.fullmatch(host))


def new_private_key() -> bytes:
    """A new EC P-384 key in OpenSSH's format, without a passphrase: what Flower's own client takes."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = ec.generate_private_key(ec.SECP384R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def public_key_of(private_key: bytes) -> str:
    """The public half as OpenSSH writes it, one line. Raises UserError when that is not a P-384 key of OpenSSH's."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_private_key

    try:
        key = load_ssh_private_key(private_key, password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
            raise ValueError("a key of another kind")
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UserError(Problem("private key", "a P-384 key in OpenSSH's format", str(error))) from None
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def fingerprint(public_key: str) -> str:
    """``SHA256:...`` of a public key, as ``ssh-keygen -l`` shows it.

    Raises UserError for all but a P-384 key, written as ``public_key_of`` writes it: so one key has one text.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

    try:
        key = load_ssh_public_key(public_key.encode())
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
            raise ValueError
        if key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode() != public_key:
            raise ValueError
    except (ValueError, UnsupportedAlgorithm):
        got = repr(public_key[:40])
        raise UserError(Problem("public key", f"a P-384 key, one line that begins with {_KEY_TYPE}", got)) from None
    digest = hashlib.sha256(base64.b64decode(public_key.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def write_invitation(path: Path, invitation: Invitation) -> None:
    """Write an invitation, readable by its owner alone. Atomic. Raises OSError."""
    write_private(path, _as_text({"format": INVITATION_FORMAT, **asdict(invitation)}))


def read_invitation(path: Path) -> Invitation:
    """Read an invitation. Raises UserError for another file, a damaged one, one of another version.

    Its names become folders, and its key and authority are written over older ones: all are sound when this returns.
    """
    entries = _read(path, INVITATION_FORMAT, "an invitation", "Ask the coordinator for it: flocktune federation enrol.")
    invitation = Invitation(
        _named(path, entries, "federation_id"),
        _named(path, entries, "federation"),
        _named(path, entries, "client"),
        _text(path, entries, "host"),
        entries.get("port"),  # type: ignore[arg-type]  # checked below
        _text(path, entries, "ca"),
        _text(path, entries, "secret", empty=True),
        _text(path, entries, "private_key") if entries.get("private_key") is not None else None,
    )
    if not is_host(invitation.host):
        raise _damaged(path, "host", "a DNS name in lower case, or an IP address", invitation.host[:300])
    if type(invitation.port) is not int or not 0 < invitation.port < 65536:
        raise _damaged(path, "port", "a port number", invitation.port)
    try:
        ssl.create_default_context(cadata=invitation.ca)
    except (ssl.SSLError, ValueError, TypeError):
        raise _damaged(path, "ca", "a certificate (PEM)", invitation.ca[:30]) from None
    if invitation.private_key is not None:
        try:
            public_key_of(invitation.private_key.encode(errors="replace"))
        except UserError:
            raise _damaged(path, "private_key", "a P-384 key in OpenSSH's format", "something else") from None
    elif not _SECRET.fullmatch(invitation.secret):
        raise _damaged(path, "secret", "at least 32 hex digits, an even number", "something else")
    return invitation


def make_request(invitation: Invitation, public_key: str) -> EnrolmentRequest:
    """The answer to an invitation. Raises UserError when ``public_key`` is none."""
    fingerprint(public_key)
    proof = _proof(invitation.secret, invitation.federation_id, invitation.client, public_key)
    return EnrolmentRequest(invitation.federation_id, invitation.client, public_key, proof)


def write_request(path: Path, request: EnrolmentRequest) -> None:
    """Write a request. It holds no secret, but nobody else needs it either. Atomic. Raises OSError."""
    write_private(path, _as_text({"format": REQUEST_FORMAT, **asdict(request)}))


def read_request(path: Path) -> EnrolmentRequest:
    """Read a request; the proof is not checked yet. Raises UserError as ``read_invitation`` does."""
    entries = _read(path, REQUEST_FORMAT, "a request", "The owner writes one by: flocktune join NAME.bundle")
    request = EnrolmentRequest(
        _named(path, entries, "federation_id"),
        _named(path, entries, "client"),
        _text(path, entries, "public_key"),
        _text(path, entries, "proof"),
    )
    fingerprint(request.public_key)
    return request


def verify_request(request: EnrolmentRequest, federation_id: str, client: str, secret: str) -> None:
    """Raise UserError unless ``request`` answers the invitation of ``client`` to this federation.

    The proof is compared in constant time. That an invitation is answered once is for the caller, who forgets it.
    """
    if request.federation_id != federation_id:
        raise UserError(
            Problem("request", f"one for federation {federation_id}", f"one for {request.federation_id}",
                    "Take it to the federation whose invitation it answers.")
        )  # fmt: skip
    if request.client != client:
        raise UserError(Problem("request", f"one of client {client}", f"one of {request.client}"))
    expected = _proof(secret, federation_id, client, request.public_key) if secret else ""
    if not secret or not _PROOF.fullmatch(request.proof) or not hmac.compare_digest(expected, request.proof):
        raise UserError(
            Problem("request", "a proof under the newest invitation's secret", "another",
                    "It answers an older invitation, or was changed on its way. Hand out a new one and ask why.")
        )  # fmt: skip


def write_private(path: Path, data: bytes | str) -> None:
    """Write ``data`` so that only this user can ever read it (0600 from the first byte), atomically. Raises OSError."""
    write_atomic(path, data, mode=0o600)


def _proof(secret: str, federation_id: str, client: str, public_key: str) -> str:
    said = [REQUEST_FORMAT, federation_id, client, public_key]
    canonical = json.dumps(said, separators=(",", ":"), ensure_ascii=True)
    return hmac.new(bytes.fromhex(secret), canonical.encode(), hashlib.sha256).hexdigest()


def _as_text(entries: Mapping[str, Any]) -> str:
    return json.dumps({key: value for key, value in entries.items() if value is not None}, indent=2) + "\n"


def _read(path: Path, format: str, what: str, fix: str) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(Problem(str(path), f"{what}, a small JSON file", f"{path.stat().st_size} bytes", fix))
    except OSError:
        raise UserError(Problem(str(path), what, "nothing there", fix)) from None
    entries = read_json(path)
    found = entries.get("format") if isinstance(entries, dict) else None
    if found == format:
        return dict(entries)
    found = found[:60] if isinstance(found, str) and found.isprintable() else ""
    kind, _, version = found.rpartition("/")
    if kind == format.rpartition("/")[0]:
        fix = "Coordinator and owner need the same version of flocktune."
        raise UserError(Problem(str(path), f"{what} of version {format.rpartition('/')[2]}", f"version {version}", fix))
    raise UserError(Problem(str(path), f"{what} ({format})", found or "another file", fix))


def _text(path: Path, entries: Mapping[str, Any], key: str, *, empty: bool = False) -> str:
    value = entries.get(key)
    if not isinstance(value, str) or not (value or empty):
        raise _damaged(path, key, "text", value)
    return value


def _named(path: Path, entries: Mapping[str, Any], key: str) -> str:
    return checked_name(_text(path, entries, key), f"{path}: {key}")


def _damaged(path: Path, key: str, expected: str, got: object) -> UserError:
    return UserError(Problem(f"{path}: {key}", expected, repr(got), "The file is damaged: ask for it again."))
