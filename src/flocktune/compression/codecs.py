"""Values of one tensor, flat [N] in float32, as fewer bytes, and back. Deterministic: nearest, ties to even.

Nearest instead of stochastic rounding: half the variance of error, and a bias that error feedback sends later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from flocktune.config.compression import CompressionConfig
from flocktune.errors import UpdateRefused

Pieces = Mapping[str, Tensor]
"""What travels for the values of one tensor, by kind; each flat."""

VALUES, CODES, SCALES = "values", "codes", "scales"


@dataclass(frozen=True)
class Codec:
    """``sizes``: N -> how many elements of which dtype each piece has. ``decode`` raises UpdateRefused."""

    sizes: Callable[[int], Mapping[str, tuple[int, torch.dtype]]]
    encode: Callable[[Tensor], Pieces]
    decode: Callable[[Pieces, int], Tensor]


def codec_of(settings: CompressionConfig) -> Codec:
    """The codec of ``settings.format``."""
    match settings.format:
        case "float32":
            return _cast(torch.float32)
        case "bf16":
            return _cast(torch.bfloat16)
        case "int8":
            return _blockwise(127, settings.block, packed=False)
        case "int4":
            return _blockwise(7, settings.block, packed=True)


def _cast(dtype: torch.dtype) -> Codec:
    """Values in another dtype. What would round to infinity becomes the largest finite value."""
    most = torch.finfo(dtype).max

    def sizes(count: int) -> dict[str, tuple[int, torch.dtype]]:
        return {VALUES: (count, dtype)}

    def encode(values: Tensor) -> Pieces:
        return {VALUES: values.clamp(-most, most).to(dtype)}

    def decode(pieces: Pieces, count: int) -> Tensor:
        return pieces[VALUES].float()

    return Codec(sizes, encode, decode)


def _blockwise(levels: int, block: int, packed: bool) -> Codec:
    """Codes from -levels to levels for the values of a block, relative to the largest magnitude in it, their scale.

    |x - x'| <= scale / (2 levels), and the largest comes through as it is, so that what was decoded is encoded to
    itself. A code c travels as c + levels + 1, two in a byte when ``packed`` (the first one low); 0 is no code.
    """
    zero = levels + 1

    def sizes(count: int) -> dict[str, tuple[int, torch.dtype]]:
        return {
            CODES: ((count + 1) // 2 if packed else count, torch.uint8),
            SCALES: (-(-count // block), torch.float32),
        }

    def encode(values: Tensor) -> Pieces:
        rows = pad(values, (0, -len(values) % block)).view(-1, block)
        scales = rows.abs().amax(1)
        ratios = rows / torch.where(scales > 0, scales, 1).unsqueeze(1)
        codes = (ratios * levels).round_().add_(zero).to(torch.uint8).view(-1)[: len(values)]
        return {CODES: _two_a_byte(codes, zero) if packed else codes, SCALES: scales}

    def decode(pieces: Pieces, count: int) -> Tensor:
        codes, scales = pieces[CODES], pieces[SCALES]
        if packed:
            codes = torch.stack((codes & 15, codes >> 4), 1).view(-1)[:count]
        if not bool((torch.isfinite(scales) & (scales >= 0)).all()):
            raise UpdateRefused("compression: expected finite scales of at least 0, got others")
        if bool((codes == 0).any()):
            raise UpdateRefused("compression: expected codes above 0, got 0")
        rows = pad(codes.float().sub_(zero).div_(levels), (0, -count % block)).view(-1, block)
        return (rows * scales.unsqueeze(1)).view(-1)[:count]

    return Codec(sizes, encode, decode)


def _two_a_byte(codes: Tensor, filler: int) -> Tensor:
    pairs = pad(codes, (0, len(codes) % 2), value=filler).view(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4)
