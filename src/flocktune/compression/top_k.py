"""Which values of a tensor are sent: the largest by magnitude, and their places as few bytes."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from flocktune.errors import UpdateRefused


def kept(count: int, fraction: float) -> int:
    """How many of ``count`` values are sent: ``fraction`` of them, rounded up; at least one of any."""
    return min(count, math.ceil(fraction * count - 1e-9)) if count else 0


def largest(values: Tensor, wanted: int) -> Tensor:
    """The places, ascending, of the ``wanted`` values [N] of largest magnitude; of equal ones the first."""
    if not wanted:
        return torch.zeros(0, dtype=torch.int64)
    magnitudes = values.abs()
    least = magnitudes.topk(wanted).values[-1]
    above, equal = magnitudes > least, torch.nonzero(magnitudes == least).view(-1)
    above[equal[: wanted - int(above.sum())]] = True
    return torch.nonzero(above).view(-1)


def places_size(count: int, wanted: int) -> int:
    """Bytes of ``wanted`` places among ``count``: a bit for each value, or an integer for each place."""
    return min(_bitmask_size(count), wanted * _integer(count).itemsize)


def encode_places(places: Tensor, count: int) -> Tensor:
    """Ascending places as bytes, in the smaller of the two forms."""
    if len(places) * _integer(count).itemsize < _bitmask_size(count):
        return torch.from_numpy(places.numpy().astype(_integer(count)).view(np.uint8))
    bits = np.zeros(count, np.bool_)
    bits[places.numpy()] = True
    return torch.from_numpy(np.packbits(bits, bitorder="little"))


def decode_places(blob: Tensor, count: int, wanted: int) -> Tensor:
    """The inverse of :func:`encode_places`. Raises UpdateRefused unless they are ``wanted``, different, in order."""
    if wanted * _integer(count).itemsize < _bitmask_size(count):
        places = blob.numpy().view(_integer(count)).astype(np.int64)
    else:
        places = np.flatnonzero(np.unpackbits(blob.numpy(), bitorder="little")).astype(np.int64)
    if len(places) != wanted or (np.diff(places) <= 0).any() or (places >= count).any():
        raise UpdateRefused(f"compression: expected {wanted} different places below {count}, in order, got others")
    return torch.from_numpy(places)


def _bitmask_size(count: int) -> int:
    return (count + 7) // 8


def _integer(count: int) -> np.dtype[np.unsignedinteger]:
    """Little-endian, as small as every place below ``count`` fits in."""
    return np.dtype("<u1" if count <= 1 << 8 else "<u2" if count <= 1 << 16 else "<u4")
