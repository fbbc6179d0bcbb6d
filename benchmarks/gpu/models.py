"""Random Llamas in the memory of a GPU, their rows, and what a step on them computes.

B rows, T tokens, N label positions, D width, I inner width, V vocabulary, R rank, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.both_clients import now
from flocktune.config.schema import LoraConfig
from flocktune.data.encoding import Encoded
from flocktune.models.lora import Adapter, attach
from flocktune.models.row_attention import attend_by_rows


@dataclass(frozen=True)
class Shape:
    """A Llama with as many heads of keys as of queries; ``lengths`` of the rows of one packed batch."""

    layers: int
    width: int
    inner: int
    heads: int
    vocabulary: int
    rank: int
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Of a packed batch."""
        return sum(self.lengths)

    @property
    def layer_weights(self) -> int:
        """Values of a layer's linear modules: q, k, v, o and gate, up, down."""
        return 4 * self.width**2 + 3 * self.width * self.inner

    @property
    def layer_factors(self) -> int:
        """Values of LoRA's factors on all of them: R (in + out) each."""
        return self.rank * (8 * self.width + 3 * (self.width + self.inner))

    def step_flops(self, lengths: Sequence[int], labels: int) -> int:
        """What a step of LoRA can not do without, the base being frozen; 2 m k n FLOPs a product of [m, k] and [k, n].

        The base: its products forward, and as many for the gradients of their inputs (none of the weights). Factors:
        forward, then their own gradients and their inputs'. Attention is causal within a row, backward twice its
        forward pass. The head is at the N labels alone. Nobody wants the gradient of what goes into the first layer.
        What is computed again does not count.
        """
        tokens = sum(lengths)
        base = 2 * 2 * tokens * self.layers * self.layer_weights
        factors = 2 * 3 * tokens * self.layers * self.layer_factors
        into_first = 2 * tokens * (3 * self.width**2 + 3 * self.rank * self.width)
        pairs = sum(length * (length + 1) // 2 for length in lengths)
        attention = 3 * 2 * 2 * pairs * self.width * self.layers
        head = 2 * 2 * labels * self.width * self.vocabulary
        return base + factors - into_first + attention + head


SEVEN_B = Shape(32, 4096, 11_008, 32, 32_000, 16, (512, 384, 320, 256, 192, 160, 128, 96))
TINY = Shape(4, 32, 48, 2, 260, 2, (24, 16, 8))


@dataclass(frozen=True)
class Place:
    """What to measure, where, in which numbers; and whether it is only to be shown that it runs."""

    shape: Shape
    device: torch.device
    dtype: torch.dtype
    quick: bool

    @property
    def told(self) -> str:
        """For the notes of a table."""
        shape = self.shape
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return (
            f"{name}, {str(self.dtype).removeprefix('torch.')}: a random Llama of {shape.layers} layers"
            f" {shape.width} and {shape.inner} wide, vocabulary {shape.vocabulary}, LoRA rank {shape.rank} on all"
            " linear layers."
        )

    def model(self) -> Any:
        """A random one, frozen."""
        shape = self.shape
        config = LlamaConfig(
            hidden_size=shape.width,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            vocab_size=shape.vocabulary,
        )
        torch.manual_seed(0)
        with self.device:
            model = AutoModelForCausalLM.from_config(config, dtype=self.dtype).eval().requires_grad_(False)
        attend_by_rows(model)  # as models that are loaded do
        return model

    def attached(self, model: Any) -> Adapter:
        """The product's LoRA on all linear layers."""
        return attach(model, LoraConfig(rank=self.shape.rank), seed=0)

    def rows(self, lengths: Sequence[int]) -> Encoded:
        """Random tokens; the second half of each row is its answer."""
        drawn = np.random.default_rng(0).integers(3, self.shape.vocabulary, sum(lengths)).astype(np.int32)
        trainable = np.concatenate([np.arange(length) >= length // 2 for length in lengths])
        return Encoded(drawn, trainable, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def weight_bytes(model: nn.Module) -> int:
    """Of all parameters, each once."""
    return sum(value.numel() * value.element_size() for value in model.parameters())


def peak_beside(device: torch.device, work: Callable[[], object]) -> int:
    """Bytes that ``work`` needs on a GPU beyond what was there before; 0 elsewhere."""
    if device.type != "cuda":
        work()
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def matmul_peak(place: Place) -> dict[str, float]:
    """FLOPs a second of products: of the shape's own, and of a large square one. The best of many is the peak."""
    shape, side = place.shape, 256 if place.quick else 8192
    products = {
        f"{rows} x {inner} x {columns}": (rows, inner, columns)
        for rows, inner, columns in (
            (shape.tokens, shape.width, shape.width),
            (shape.tokens, shape.width, shape.inner),
            (shape.tokens, shape.inner, shape.width),
            (side, side, side),
        )
    }
    return {name: 2 * float(np.prod(sizes)) / _seconds(place, *sizes) for name, sizes in products.items()}


def _seconds(place: Place, rows: int, inner: int, columns: int) -> float:
    """The least of several turns of 10 products each; random numbers, as zeros let a GPU run faster."""
    left = torch.randn(rows, inner, device=place.device, dtype=place.dtype)
    right = torch.randn(columns, inner, device=place.device, dtype=place.dtype)
    found = []
    for _ in range(2 if place.quick else 10):
        started = now()
        for _ in range(10):
            left @ right.t()
        found.append((now() - started) / 10)
    return min(found)


def best(rates: Mapping[str, float]) -> float:
    """The largest."""
    return max(rates.values())
