"""Real numbers as integers that are added modulo 2^bits, with room for everyone's: the sum of a cohort never wraps.

With M = floor((2^(bits-1) - 1) / clients) and step = bound / M, a value x becomes round(clip(x, -bound, bound) / step),
which lies in [-M, M]. So the integer sum of all clients lies in [-clients M, clients M], within a signed integer, and
differs from the sum of the clipped values by at most clients * step / 2. Rounding is to the nearest, deterministic:
masks hide values, so no random rounding is needed for that, and a repeated task gives the same integers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from flocktune.types import Mean, Tensors

TOTALS_BITS, TOTALS_STEP = 64, 2.0**-20
"""Of the weight and the metrics: integers modulo 2^64 of this unit."""

MOST_METRICS = 64
"""As many as an update may have (:mod:`flocktune.wire`)."""

TOTALS = 1 + 2 * MOST_METRICS
"""The weight, and total and count of each metric: always as many, so that they tell nothing by their number."""

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Encoding:
    """Values within [-bound, bound] of at most ``clients``, as integers modulo 2^32."""

    bound: float
    clients: int

    @property
    def largest(self) -> int:
        """M: the largest integer that one client's value becomes."""
        return (2**31 - 1) // self.clients

    @property
    def step(self) -> float:
        """What 1 stands for."""
        return self.bound / self.largest

    def encode(self, values: NDArray[np.float32], factor: float = 1.0) -> tuple[NDArray[np.uint32], int]:
        """``factor * values`` as integers modulo 2^32, and how many had to be clipped. Values must be finite."""
        encoded, clipped = np.empty(values.size, np.uint32), 0
        for start in range(0, values.size, _BLOCK):
            part = values[start : start + _BLOCK].astype(np.float64) * factor
            clipped += int(np.count_nonzero(np.abs(part) > self.bound))
            whole = np.rint(np.clip(part, -self.bound, self.bound) / self.step)
            whole = np.clip(whole, -self.largest, self.largest)  # the division may round up to one more
            encoded[start : start + _BLOCK] = whole.astype(np.int32).view(np.uint32)
        return encoded, clipped

    def decode(self, total: NDArray[np.uint32]) -> NDArray[np.float64]:
        """The sum of encoded values, as real numbers."""
        return total.view(np.int32).astype(np.float64) * self.step


def flat(tensors: Tensors) -> NDArray[np.float32]:
    """All values as one vector, by name."""
    parts = [tensors[name].to(torch.float32).reshape(-1).numpy() for name in sorted(tensors)]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def shaped(values: NDArray[np.float64], expected: Tensors) -> dict[str, torch.Tensor]:
    """The inverse of :func:`flat`, with names and shapes of ``expected``, in its order, float32."""
    parts, start = {}, 0
    for name in sorted(expected):
        end = start + expected[name].numel()
        parts[name] = torch.from_numpy(values[start:end].astype(np.float32)).reshape(expected[name].shape)
        start = end
    return {name: parts[name] for name in expected}


def encode_totals(weight: float, metrics: Mapping[str, Mean], clients: int) -> NDArray[np.uint64]:
    """Weight and metrics, by name, as integers modulo 2^64; each within the cohort's share of what fits."""
    numbers = [weight, *(number for name in sorted(metrics) for number in (metrics[name].total, metrics[name].count))]
    largest = (2 ** (TOTALS_BITS - 1) - 1) // clients
    whole = [max(-largest, min(largest, round(number / TOTALS_STEP))) for number in numbers]
    whole += [0] * (TOTALS - len(whole))
    return np.array(whole, np.int64).view(np.uint64)


def decode_totals(total: NDArray[np.uint64], names: Sequence[str]) -> tuple[float, dict[str, Mean]]:
    """The summed weight, and the summed metrics of ``names``."""
    numbers = [int(value) * TOTALS_STEP for value in total.view(np.int64)]
    pairs = zip(sorted(names), numbers[1::2], numbers[2::2], strict=False)
    return numbers[0], {name: Mean(whole, count) for name, whole, count in pairs}


def least_to_unmask(threshold: float, least: int, clients: int) -> int:
    """How many of ``clients`` are needed to unmask: more than half, at least ``least``, whatever ``threshold`` is."""
    return max(clients // 2 + 1, least, math.ceil(threshold * clients - 1e-9))
