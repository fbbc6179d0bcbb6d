"""A frozen linear module with LoRA beside it (arXiv 2106.09685), equal to PEFT's to the last logit.

    y = W x + b + scale * B A dropout(x),    scale = alpha / R, or alpha / sqrt(R) (rsLoRA, arXiv 2312.03732)

There may be a frozen change beside it, ``+ side_B side_A x``: what earlier rounds made, and factors of rank R can
not hold.

Only A and B are trained. They stay in float32 whatever the base's dtype; the low-rank path runs in
the dtype of x. What differs from PEFT is the cost: x is never cast, and scaling and adding are one
``addmm``. Modules that read the same input are computed together.

Shapes: A is [R, in], the factor B is [out, R]; R rank, in and out the width of a module's input and output.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flocktune.config.schema import LoraConfig
from flocktune.models.low_rank import Bases, LowRank, StackedPaths, keep_mask

READ_ALIKE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
"""Endings of modules' names that, with one parent, read the same input."""


def scale(lora: LoraConfig) -> float:
    """What B A is multiplied by."""
    return lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)


def features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear module, also when its weights are packed."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return module.in_features, module.out_features  # type: ignore[return-value]


class LoraLinear(nn.Module):
    """A frozen linear module with a trained low-rank path beside it: x [..., in] -> [..., out].

    ``base`` may be anything that maps x linearly (nn.Linear, Conv1D, a quantised linear). ``training`` of this module
    alone switches the dropout on. ``beside``: the modules that read the same input, this one among them; whichever is
    called first computes all of them.
    """

    def __init__(self, base: nn.Module, lora: LoraConfig) -> None:
        super().__init__()
        inputs, outputs = features(base)
        device = next(base.parameters()).device
        self.base = base
        self.scale = scale(lora)
        self.dropout = lora.dropout
        self.enabled = True
        self.side: tuple[Tensor, ...] = ()
        self.beside = SharedInput([self])
        self.lora_A = nn.Parameter(torch.empty(lora.rank, inputs, device=device, dtype=torch.float32))
        # Column-major, so that the skinny products of the backward pass (dY B and H^T dY) meet a
        # row-major B^T: on a CPU they are two to six times faster, and autograd needs no copy.
        self.lora_B = nn.Parameter(torch.zeros(lora.rank, outputs, device=device, dtype=torch.float32).t())
        self.training = False

    @property
    def weight(self) -> Tensor:
        """The base's weight: some models look at its dtype."""
        return self.base.weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self.base(x)
        out = self.beside(self, x)
        if self.side:
            *first, last = (factor.to(x.dtype) for factor in self.side)
            inner = F.linear(x, *first) if first else x
            out = torch.addmm(out.flatten(0, -2), inner.flatten(0, -2), last.t()).view_as(out)
        return out


class SharedInput:
    """Modules that read the same input: their outputs are computed together, and handed out one by one.

    An input is known by its identity. A module that gets another one than the others did is computed for it as well:
    a wrong guess costs time, never a wrong result. Dropout's mask is one for all of them.
    """

    def __init__(self, modules: Sequence[LoraLinear]) -> None:
        self.modules = modules
        self.stack: StackedPaths | None = None
        self._input: Tensor | None = None
        self._outputs: dict[LoraLinear, Tensor] = {}

    def __call__(self, module: LoraLinear, x: Tensor) -> Tensor:
        if len(self.modules) == 1:
            return self._compute(x)[0]
        if x is not self._input or module not in self._outputs:
            self._outputs = dict(zip(self.modules, self._compute(x), strict=True))
            self._input = x
        found = self._outputs.pop(module)
        if not self._outputs:
            self._input = None
        return found

    def forget(self) -> None:
        """Let go of outputs that nobody came for, and of the graph below them: a forward pass broke off."""
        self._input, self._outputs = None, {}

    def _compute(self, x: Tensor) -> Sequence[Tensor]:
        shape, first = x.shape[:-1], self.modules[0]
        x = x.flatten(0, -2)
        dropout = first.dropout if first.training else 0.0
        bases = _plain_bases(self.modules)
        if self.stack is not None:
            outputs = self.stack(x, dropout, first.scale, bases)
        else:
            mask = keep_mask(x.new_empty(x.shape), dropout) if dropout else None
            a, b = [each.lora_A for each in self.modules], [each.lora_B for each in self.modules]
            outputs = LowRank.apply(x, mask, first.scale, bases, *a, *b)
        if not bases:
            outputs = tuple(module.base(x) + out for module, out in zip(self.modules, outputs, strict=True))
        return [out.unflatten(0, shape) for out in outputs]


def _plain_bases(modules: Sequence[LoraLinear]) -> Bases:
    """Weight [out, in] and bias of every module, if all are plain and frozen; none if the product of one is its own
    affair."""
    found = []
    for module in modules:
        base: Any = module.base
        if base.weight.requires_grad:
            break
        if type(base) is nn.Linear:
            found.append((base.weight, base.bias))
        elif type(base) is Conv1D:
            found.append((base.weight.t(), base.bias))
    return tuple(found) if len(found) == len(modules) else ()


def reading_alike(layers: Mapping[str, LoraLinear]) -> Iterator[list[LoraLinear]]:
    """Modules of one parent that, by their names, read the same input; of two or more of them."""
    for endings in READ_ALIKE:
        for name, layer in layers.items():
            parent, _, ending = name.rpartition(".")
            if ending in endings:
                names = [f"{parent}.{other}" for other in endings]
                members = [layers[other] for other in names if other in layers]
                if len(members) > 1 and members[0] is layer:
                    yield members
