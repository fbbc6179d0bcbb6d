"""Tensors of known shapes as one run of bytes, compressed by zstd. What comes out has a size that is known before.

A stranger's bytes can not make memory: the size that a frame claims is compared with what its tensors have, before
anything is taken for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from flocktune.errors import Problem, UpdateRefused, UserError
from flocktune.tensors import size_bytes
from flocktune.types import AtMost, Tensors

BYTES = "zstd"
"""The name of the one tensor that travels."""


def refuse_without_zstd() -> None:
    """Raise UserError when the library is missing."""
    _zstandard()


def packed_size(expected: Tensors) -> AtMost:
    """What does not become smaller is left as it is: it never becomes larger."""
    return AtMost(size_bytes(expected))


def pack(tensors: Tensors, level: int) -> Tensor:
    """One tensor of bytes, at most as many as ``tensors`` have."""
    raw = b"".join(_planes(tensors[name]).tobytes() for name in sorted(tensors))
    made = _zstandard().ZstdCompressor(level=level).compress(raw)
    sent = made if len(made) < len(raw) else raw
    return torch.from_numpy(np.frombuffer(sent, np.uint8).copy())


def unpack(blob: Tensor, expected: Tensors) -> dict[str, Tensor]:
    """The inverse of :func:`pack`, of ``expected`` shapes and dtypes. Raises UpdateRefused."""
    wanted, raw = size_bytes(expected), blob.numpy().tobytes()
    if len(raw) < wanted:
        raw = _decompressed(raw, wanted)
    if len(raw) != wanted:
        raise UpdateRefused(f"compression: expected {wanted} bytes, got {len(raw)}")
    tensors, start = {}, 0
    for name in sorted(expected):
        like = expected[name]
        size = like.numel() * like.element_size()
        planes = np.frombuffer(raw, np.uint8)[start : start + size].reshape(like.element_size(), like.numel())
        values = torch.empty(like.numel(), dtype=like.dtype)
        values.view(torch.uint8).numpy()[:] = planes.T.reshape(-1)
        tensors[name] = values.view(like.shape)
        start += size
    return tensors


def _planes(value: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Bytes of the same significance together [bytes of a value, N]: exponents are alike, mantissas are not."""
    return value.contiguous().view(-1).view(torch.uint8).numpy().reshape(-1, value.element_size()).T


def _decompressed(frame: bytes, wanted: int) -> bytes:
    zstandard = _zstandard()
    try:
        claimed = zstandard.frame_content_size(frame)
        if claimed != wanted:
            raise UpdateRefused(f"compression: expected a zstd frame of {wanted} bytes, got one of {claimed}")
        return zstandard.ZstdDecompressor().decompress(frame, max_output_size=wanted, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise UpdateRefused(f"compression: expected a zstd frame, got bytes that do not decode ({error})") from None


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        fix = "pip install 'flocktune[compression]'"
        raise UserError(Problem("compression.zstd", "the library zstandard", "none", fix)) from None
    return zstandard
