"""Keys, and what is made of them: masks that cancel in a sum, shares that one client alone can open, signatures.

    agreement    X25519 (RFC 7748)                a secret of two clients, of one's private and the other's public key
    derivation   HKDF-SHA256 (RFC 5869)           a key for one purpose, which ``info`` names, with round and clients
    mask         ChaCha20 (RFC 8439)              a stream under such a key, added modulo 2^32 or 2^64
    sealing      ChaCha20-Poly1305 (RFC 8439)     shares on their way through the server
    identity     Ed25519 (RFC 8032)               signs a round's keys, and the list of survivors

Every key is of one round, one pair and one purpose, so that nonces are 0.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

KEY_BYTES, SIGNATURE_BYTES, TAG_BYTES = 32, 64, 16

_BLOCK_BYTES = 1 << 20
"""Of a stream that is made at once: it stays in the processor's cache."""


def public_key(private: bytes) -> bytes:
    """The X25519 public key of a private one."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def derive(secret: bytes, *info: bytes) -> bytes:
    """A key of 32 bytes for what ``info`` names; its parts are told apart by their lengths."""
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=framed(b"flocktune secure aggregation", *info)).derive(secret)


def agree(private: bytes, public: bytes, *info: bytes) -> bytes:
    """The key that two clients share, for what ``info`` names. Raises ValueError for a public key that is none."""
    shared = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    return derive(shared, *info)


def framed(*parts: bytes) -> bytes:
    """Parts as one text that no other parts give."""
    return b"".join(len(part).to_bytes(8, "big") + part for part in parts)


def add_mask(values: NDArray[np.uint32] | NDArray[np.uint64], key: bytes, sign: int) -> None:
    """Add (``sign`` 1) or take away (-1) the mask of ``key``, in place, modulo 2^32 or 2^64."""
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
    step = _BLOCK_BYTES // values.itemsize
    for start in range(0, values.size, step):
        part = values[start : start + step]
        mask = np.frombuffer(stream.update(_zeros(part.nbytes)), part.dtype.newbyteorder("<"))
        (np.add if sign > 0 else np.subtract)(part, mask, out=part)


@lru_cache(maxsize=4)
def _zeros(length: int) -> bytes:
    return bytes(length)


def seal(key: bytes, text: bytes, about: bytes) -> bytes:
    """Encrypt under a key that is used once. ``about`` is not in it, but must be the same to open it."""
    return ChaCha20Poly1305(key).encrypt(bytes(12), text, about)


def unseal(key: bytes, sealed: bytes, about: bytes) -> bytes | None:
    """The inverse of :func:`seal`; None for what was changed, or is for another."""
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), sealed, about)
    except InvalidTag:
        return None


def identity_of(private: bytes) -> bytes:
    """The Ed25519 public key of a private one: who a client is."""
    return Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def sign(private: bytes, text: bytes) -> bytes:
    """An Ed25519 signature, 64 bytes."""
    return Ed25519PrivateKey.from_private_bytes(private).sign(text)


def is_signed(identity: bytes, text: bytes, signature: bytes) -> bool:
    """Whether ``signature`` is that of ``identity`` under ``text``."""
    try:
        Ed25519PublicKey.from_public_bytes(identity).verify(signature, text)
    except (InvalidSignature, ValueError):
        return False
    return True
