"""Compression as a transform, with error feedback (1-bit SGD, Seide et al. 2014; EF-SGD, arXiv 1901.09847).

    sent_t = C(update_t + residual_t)          residual_{t+1} = update_t + residual_t - sent_t

so that all that was sent is all updates but the last residual. The residual is the client's memory: it never travels.
It stays with names that a round leaves out, and a client that sits rounds out sends it when it takes part again. An
answer that the server does not use is lost as it would be without compression; its residual is sent later all the same.

All tensors of an update travel as one tensor of each kind, so that a header is not larger than what it describes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flocktune.compression.codecs import Codec, Pieces, codec_of
from flocktune.compression.packing import BYTES, pack, packed_size, refuse_without_zstd, unpack
from flocktune.compression.top_k import decode_places, encode_places, kept, largest, places_size
from flocktune.config.compression import CompressionConfig
from flocktune.errors import UpdateRefused
from flocktune.interfaces import Memory, Transform
from flocktune.tensors import subtract
from flocktune.types import ClientTask, Expected, Tensors, Update

NAME, PLACES = "compression", "places"


def compression(settings: CompressionConfig) -> Transform:
    """The transform of a recipe's ``compression``. Raises UserError when zstd is asked for and is not installed.

    The first round of a client has no residual. A residual of another shape than the update's is dropped: there is no
    telling which of its values would belong where.
    """
    if settings.zstd is not None:
        refuse_without_zstd()
    coder = Coder(settings, codec_of(settings))

    def on_client(update: Update, task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
        if not all(bool(torch.isfinite(value).all()) for value in update.delta.values()):
            raise UpdateRefused("compression: expected finite values, got NaN or infinity")
        if not (settings.error_feedback and settings.lossy):
            return replace(update, delta=coder.packed(coder.encode(update.delta))), {}
        wanted = {
            name: value + memory[name] if name in memory and memory[name].shape == value.shape else value
            for name, value in update.delta.items()
        }
        sent = coder.encode(wanted)
        residual = subtract(wanted, coder.decode(sent, wanted))
        return replace(update, delta=coder.packed(sent)), {**memory, **residual}

    def on_server(update: Update, expected: Tensors) -> Update:
        return replace(update, delta=coder.decode(coder.unpacked(update.delta, expected), expected))

    return Transform(NAME, on_client, on_server, coder.on_wire)


@dataclass(frozen=True)
class Coder:
    """Whole updates, in the order of their names: a sender's and a receiver's may be another."""

    settings: CompressionConfig
    codec: Codec

    def encode(self, tensors: Tensors) -> dict[str, Tensor]:
        """One flat tensor of each kind."""
        pieces = [self._encode_one(tensors[name].reshape(-1).float()) for name in sorted(tensors)]
        return {
            kind: torch.cat([one[kind] for one in pieces]) if pieces else torch.zeros(0, dtype=dtype)
            for kind, (_, dtype) in self._sizes(0).items()
        }

    def decode(self, sent: Tensors, expected: Tensors) -> dict[str, Tensor]:
        """The tensors of ``expected`` shapes, in its order. Raises UpdateRefused."""
        start, found = dict.fromkeys(sent, 0), {}
        for name in sorted(expected):
            mine, like = {}, expected[name]
            for kind, (size, _) in self._sizes(like.numel()).items():
                mine[kind] = sent[kind][start[kind] : start[kind] + size]
                start[kind] += size
            found[name] = self._decode_one(mine, like.numel()).view(like.shape)
        return {name: found[name] for name in expected}

    def on_wire(self, expected: Tensors) -> Expected:
        """Names and shapes of what travels; with zstd, the most bytes."""
        flat = self._flat(expected)
        return flat if self.settings.zstd is None else {BYTES: packed_size(flat)}

    def packed(self, sent: Tensors) -> Tensors:
        """The last step: bytes, with zstd."""
        return sent if self.settings.zstd is None else {BYTES: pack(sent, self.settings.zstd)}

    def unpacked(self, came: Tensors, expected: Tensors) -> Tensors:
        """The inverse of :meth:`packed`. Raises UpdateRefused."""
        return came if self.settings.zstd is None else unpack(came[BYTES], self._flat(expected))

    def _flat(self, expected: Tensors) -> dict[str, Tensor]:
        totals = dict(self._sizes(0))
        for like in expected.values():
            for kind, (size, dtype) in self._sizes(like.numel()).items():
                totals[kind] = (totals[kind][0] + size, dtype)
        return {kind: torch.empty(size, dtype=dtype, device="meta") for kind, (size, dtype) in totals.items()}

    def _sizes(self, count: int) -> Mapping[str, tuple[int, torch.dtype]]:
        if self.settings.top_k is None:
            return self.codec.sizes(count)
        wanted = kept(count, self.settings.top_k)
        return {PLACES: (places_size(count, wanted), torch.uint8), **self.codec.sizes(wanted)}

    def _encode_one(self, values: Tensor) -> Pieces:
        if self.settings.top_k is None:
            return self.codec.encode(values)
        places = largest(values, kept(len(values), self.settings.top_k))
        return {PLACES: encode_places(places, len(values)), **self.codec.encode(values[places])}

    def _decode_one(self, pieces: Pieces, count: int) -> Tensor:
        if self.settings.top_k is None:
            return self.codec.decode(pieces, count)
        wanted = kept(count, self.settings.top_k)
        places = decode_places(pieces[PLACES], count, wanted)
        return torch.zeros(count).index_copy_(0, places, self.codec.decode(pieces, wanted))
