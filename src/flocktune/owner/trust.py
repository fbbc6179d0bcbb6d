"""Who this owner is to other owners, and who they were when they were seen first: for secure aggregation.

HOME/identity     an Ed25519 private key, 32 bytes, mode 0600; it never leaves
HOME/peers.json   name -> public identity key, in hex, of each client that a round listed

A coordinator that showed an owner keys of its own making under another owner's name would be let into the sum. So a
name keeps the key under which it was seen first, and owners can compare keys by telephone: ``flocktune join`` shows its
own.
"""

from __future__ import annotations

import re
from pathlib import Path

from flocktune.errors import Problem, UserError
from flocktune.files import read_json, write_json
from flocktune.interfaces import Memory
from flocktune.owner.home import PEERS, identity_key
from flocktune.privacy.secagg import messages

_KEY = re.compile(r"[0-9a-f]{64}")


def load_trust(home: Path) -> Memory:
    """Key and peers, as a part of the client's memory; the key is made when there is none. Raises UserError."""
    peers = _read_peers(home / PEERS) if (home / PEERS).exists() else {}
    return {messages.IDENTITY: messages.as_tensor(identity_key(home)), **messages.peers_memory(peers)}


def save_trust(home: Path, memory: Memory) -> Memory:
    """Write down new peers; gives the rest of the memory. Raises OSError."""
    peers = messages.peers_of(memory)
    path = home / PEERS
    if peers and (not path.exists() or peers != _read_peers(path)):
        write_json(path, {name: peers[name].hex() for name in sorted(peers)})
    return {name: value for name, value in memory.items() if name not in (messages.IDENTITY, messages.PEERS)}


def _read_peers(path: Path) -> dict[str, bytes]:
    said = read_json(path)
    if not isinstance(said, dict) or not all(isinstance(key, str) and _KEY.fullmatch(key) for key in said.values()):
        fix = "Bring it back from a copy: it says which keys the other owners had when they were seen first."
        raise UserError(Problem(str(path), "names with keys of 64 hexadecimal digits", "others", fix))
    return {name: bytes.fromhex(key) for name, key in said.items()}
