"""What travels in each phase of a secure round, as tensors, and which shapes they have.

    phase            to a client                                    from it
    secagg/keys      attempt [32]                                   keys [160]: identity, two public keys, signature
    secagg/shares    names (JSON), keys [n, 160]                    shares [n, 148] sealed, commitment [32]
    secagg/masked    the method's message, shares [n, 148],         values [d] int32, totals [129] int64, masked
                     present [n]
    secagg/consistency   survivors [n]                              signature [64]
    secagg/unmask    signed [n], signatures [n, 64]                 revealed [n, 66]: for each client one share, of one
                                                                    kind or the other

All but values and totals are bytes (uint8). n clients are on the list of a round, in one order for all; lists are 0 and
1 for each of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from flocktune.errors import FlocktuneError
from flocktune.interfaces import Memory
from flocktune.privacy.secagg.fixed_point import TOTALS
from flocktune.tensors import prefixed, without
from flocktune.types import ClientTask, Tensors
from flocktune.wire import Variable

GROUP = "secagg"
ATTEMPT_BYTES, ENTRY_BYTES = 32, 160
SEALED_BYTES, COMMITMENT_BYTES, SHARE_BYTES, SIGNATURE_BYTES = 148, 32, 66, 64

MOST_CLIENTS = 10_000
"""Of one round."""


class SecureAggregationRefused(FlocktuneError):
    """A phase that a client does not do, or an answer that a server does not take; its text tells no secret."""


@dataclass(frozen=True)
class Entry:
    """One client of a round: who it is, its keys for masks and for shares, and its signature under both."""

    name: str
    identity: bytes
    mask_key: bytes
    share_key: bytes
    signature: bytes

    @property
    def packed(self) -> bytes:
        """All but the name, 160 bytes."""
        return self.identity + self.mask_key + self.share_key + self.signature


def unpacked(name: str, packed: bytes) -> Entry:
    """The inverse of :attr:`Entry.packed`."""
    return Entry(name, packed[:32], packed[32:64], packed[64:96], packed[96:])


def to_client() -> dict[str, Variable]:
    """Every tensor that a phase may bring beside the method's own: name -> dtype in a file, shape (None: any)."""
    return {
        f"{GROUP}/attempt": ("U8", (ATTEMPT_BYTES,)),
        f"{GROUP}/names": ("U8", (None,)),
        f"{GROUP}/keys": ("U8", (None, ENTRY_BYTES)),
        f"{GROUP}/shares": ("U8", (None, SEALED_BYTES)),
        f"{GROUP}/present": ("U8", (None,)),
        f"{GROUP}/survivors": ("U8", (None,)),
        f"{GROUP}/signed": ("U8", (None,)),
        f"{GROUP}/signatures": ("U8", (None, SIGNATURE_BYTES)),
    }


def from_client(task: ClientTask, method: Tensors) -> Tensors:
    """Names and shapes of the answer to a phase; ``method``: those of the method's own update."""

    def expected(**shapes: tuple[int, ...]) -> Tensors:
        return {f"{GROUP}/{name}": torch.empty(shape, dtype=torch.uint8) for name, shape in shapes.items()}

    match task.kind:
        case "secagg/keys":
            return expected(keys=(ENTRY_BYTES,))
        case "secagg/shares":
            count = len(task.tensors[f"{GROUP}/keys"])
            return expected(shares=(count, SEALED_BYTES), commitment=(COMMITMENT_BYTES,))
        case "secagg/masked":
            values = torch.empty(sum(value.numel() for value in method.values()), dtype=torch.int32, device="meta")
            return {f"{GROUP}/values": values, f"{GROUP}/totals": torch.empty(TOTALS, dtype=torch.int64)}
        case "secagg/consistency":
            return expected(signature=(SIGNATURE_BYTES,))
        case "secagg/unmask":
            return expected(revealed=(len(task.tensors[f"{GROUP}/signed"]), SHARE_BYTES))
        case other:
            raise ValueError(f"expected a phase of secure aggregation, got {other}")


def message(**parts: bytes | torch.Tensor) -> dict[str, torch.Tensor]:
    """Parts of a phase's message by their names."""
    tensors = {name: value if isinstance(value, torch.Tensor) else as_tensor(value) for name, value in parts.items()}
    return prefixed(GROUP, tensors)


def method_part(tensors: Tensors) -> Tensors:
    """All but a phase's own."""
    return without(tensors, GROUP)


def as_tensor(data: bytes) -> torch.Tensor:
    """Bytes as uint8 [length]."""
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def as_rows(rows: Sequence[bytes], width: int) -> torch.Tensor:
    """Texts of one length as uint8 [count, width]."""
    return as_tensor(b"".join(rows)).reshape(len(rows), width)


def as_bytes(tensor: torch.Tensor) -> bytes:
    """The inverse of :func:`as_tensor`."""
    return tensor.contiguous().numpy().tobytes()


def as_list(chosen: Sequence[str], names: Sequence[str]) -> torch.Tensor:
    """Who of ``names`` is chosen, as 0 and 1."""
    return torch.tensor([name in chosen for name in names], dtype=torch.uint8)


def part(tensors: Tensors, name: str, *shape: int) -> torch.Tensor:
    """One part of a phase's message. Raises SecureAggregationRefused when it is missing, or of another shape."""
    found = tensors.get(f"{GROUP}/{name}")
    if found is None or found.dtype != torch.uint8 or (shape and tuple(found.shape) != shape):
        raise SecureAggregationRefused(f"a phase's message without its {name}, or of another shape")
    return found


def listed(tensors: Tensors, name: str, names: Sequence[str]) -> tuple[str, ...]:
    """Whom a list of 0 and 1 names. Raises SecureAggregationRefused."""
    marks = part(tensors, name, len(names)).tolist()
    if any(mark not in (0, 1) for mark in marks):
        raise SecureAggregationRefused(f"a phase's {name}: expected 0 and 1, got others")
    return tuple(one for one, mark in zip(names, marks, strict=True) if mark)


def pack_names(names: Sequence[str]) -> bytes:
    """A round's clients, in their order."""
    return json.dumps(list(names)).encode()


def read_entries(tensors: Tensors) -> list[Entry]:
    """The list of a round. Raises SecureAggregationRefused when it can not be read."""
    rows = part(tensors, "keys")
    try:
        names = json.loads(as_bytes(part(tensors, "names")))
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SecureAggregationRefused("a round's list of clients that can not be read")
    if len(names) > MOST_CLIENTS or tuple(rows.shape) != (len(names), ENTRY_BYTES):
        raise SecureAggregationRefused("a round's list of clients without a key for each")
    return [unpacked(name, as_bytes(row)) for name, row in zip(names, rows, strict=True)]


def transcript(context: bytes, entries: Sequence[Entry]) -> Sequence[bytes]:
    """What all clients must agree on before they unmask: the round, and the list with its keys."""
    return context, *(part for entry in entries for part in (entry.name.encode(), entry.packed))


def asked_for(task: ClientTask) -> bytes:
    """What is the same in all phases of a round: its number, the recipe, the model."""
    return json.dumps([task.round, task.config_digest, task.model_digest]).encode()


# --- what a client keeps ---------------------------------------------------------------------------------

IDENTITY, PEERS, STATE = f"{GROUP}/identity", f"{GROUP}/peers", f"{GROUP}/state"
"""In its memory: its own private key, the identities it knows, the secrets of a round under way."""


def without_secrets(memory: Memory) -> Memory:
    """What may stay when a round is over, however it ended."""
    return {name: value for name, value in memory.items() if name != STATE}


def peers_of(memory: Memory) -> dict[str, bytes]:
    """The identities that were seen so far, by name."""
    if PEERS not in memory:
        return {}
    return {name: bytes.fromhex(key) for name, key in json.loads(as_bytes(memory[PEERS])).items()}


def peers_memory(peers: Mapping[str, bytes]) -> Memory:
    """The inverse of :func:`peers_of`."""
    return {PEERS: as_tensor(json.dumps({name: peers[name].hex() for name in sorted(peers)}).encode())}
