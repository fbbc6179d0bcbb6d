"""Random draws that nobody can predict or repeat: ChaCha20 under a secret key.

A run's other draws follow from the seed of its recipe, which is public, by generators whose state can be recovered from
what they gave. Noise that hides a client must not: whoever knows it subtracts it. So it comes from a key of 32 bytes
that is made once, kept beside the run (mode 0600), and travels nowhere. Keys for single draws are derived by HKDF, so
that a round which was cut off is repeated to the same bits.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flocktune.errors import Problem, UserError
from flocktune.files import write_atomic

KEY_BYTES = 32

_BLOCK = 1 << 20
"""Values made at once, so that the intermediate float64 vectors stay small."""


def read_or_make_key(path: Path, *, may_make: bool = True) -> bytes:
    """The secret key in the file ``path``, which is made on first use, mode 0600.

    ``may_make``: false where a lost key may not be replaced, because draws under it were published. Raises UserError
    for a key that is damaged, or that is missing and may not be made.
    """
    if path.exists():
        key = path.read_bytes()
        if len(key) != KEY_BYTES:
            fix = "Bring it back from a copy. A new one would make other noise for what was published already."
            raise UserError(Problem(str(path), f"a secret key of {KEY_BYTES} bytes", f"{len(key)} bytes", fix))
        return key
    if not may_make:
        fix = "Bring it back from a copy, or start a new run. New noise for a round that was published would tell more."
        raise UserError(Problem(str(path), "the run's secret key", "nothing there", fix))
    key = secrets.token_bytes(KEY_BYTES)
    write_atomic(path, key, mode=0o600)
    return key


def derive_key(secret: bytes, *path: int | str) -> bytes:
    """A key of 32 bytes for one purpose (HKDF-SHA256, RFC 5869); keys of different paths tell nothing of each other."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    info = "\x1f".join(["flocktune", *(f"{type(part).__name__}:{part}" for part in path)])
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=info.encode()).derive(secret)


def keystream(key: bytes, length: int) -> bytes:
    """``length`` bytes of ChaCha20 (RFC 8439) under ``key``, which may be used for one stream only: its nonce is 0."""
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

    return Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(length))


def uniforms(key: bytes, count: int) -> NDArray[np.float64]:
    """``count`` numbers in (0, 1), float64, each of 53 random bits, none of them 0 or 1."""
    bits = np.frombuffer(keystream(key, 8 * count), dtype="<u8") >> np.uint64(11)
    return np.minimum((bits.astype(np.float64) + 0.5) * 2.0**-53, 1 - 2.0**-53)


def normals(key: bytes, shape: Sequence[int]) -> Tensor:
    """Independent standard normal numbers, float64, by Box and Muller's transform.

    No value is beyond 8.7 standard deviations, where a true normal is once in 10^17 draws.
    """
    count = math.prod(shape)
    drawn = np.empty(count)
    for number, start in enumerate(range(0, count, _BLOCK)):
        size = min(_BLOCK, count - start)
        half = (size + 1) // 2
        radius, angle = np.split(uniforms(derive_key(key, number), 2 * half), 2)
        radius, angle = np.sqrt(-2 * np.log(radius)), 2 * np.pi * angle
        drawn[start : start + size] = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size]
    return torch.from_numpy(drawn.reshape(tuple(shape)))
