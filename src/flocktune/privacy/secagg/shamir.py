"""Shamir's secret sharing (1979): any ``threshold`` shares give a secret back, fewer tell nothing of it.

A secret s is the value at 0 of a random polynomial of degree threshold - 1 over the integers modulo P; share i is its
value at i. P = 2^521 - 1 is prime (Mersenne) and larger than any secret of 32 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

P = 2**521 - 1

SECRET_BYTES, SHARE_BYTES = 32, 66


def split(secret: bytes, shares: int, threshold: int, random: Callable[[int], bytes]) -> list[bytes]:
    """Shares 1 to ``shares`` of a secret of 32 bytes, 66 bytes each. ``random(n)`` gives n secret bytes."""
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= shares:
        raise ValueError(f"expected 32 bytes and 1 <= {threshold} <= {shares}, got {len(secret)} bytes")
    # 16 bytes more than P has: what the remainder prefers is below 2^-128.
    coefficients = [
        int.from_bytes(secret, "big"),
        *(int.from_bytes(random(SHARE_BYTES + 16), "big") % P for _ in range(threshold - 1)),
    ]
    return [_at(coefficients, place).to_bytes(SHARE_BYTES, "big") for place in range(1, shares + 1)]


def join(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret of at least ``threshold`` shares, by number (from 1).

    Raises ValueError when there are too few, or when they are not shares of a secret of 32 bytes.
    """
    if len(shares) < threshold:
        raise ValueError(f"expected {threshold} shares, got {len(shares)}")
    used = sorted(shares)[:threshold]
    values = (int.from_bytes(shares[place], "big") for place in used)
    secret = sum(weight * value for weight, value in zip(_weights(used), values, strict=True)) % P
    if secret >= 2 ** (8 * SECRET_BYTES):
        raise ValueError("shares that do not belong together")
    return secret.to_bytes(SECRET_BYTES, "big")


def _at(coefficients: Sequence[int], place: int) -> int:
    """The polynomial's value, by Horner's rule."""
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * place + coefficient) % P
    return value


def _weights(places: Sequence[int]) -> list[int]:
    """Lagrange's, at 0: the product over the others of j / (j - i)."""
    weights = []
    for i in places:
        over, under = 1, 1
        for j in places:
            if j != i:
                over, under = over * j % P, under * (j - i) % P
        weights.append(over * pow(under, -1, P) % P)
    return weights
