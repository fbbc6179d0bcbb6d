"""An 8-bit base on CPUs: linear modules hold int8 weights [out, in] and a scale for each output, float32 [out].

    y = (x Q^T) s + b,    Q = round(W / s),    s = max |W| of a row / 127

Q is turned into the type of x for one product at a time, in the forward pass and again in the backward pass, and never
kept: integers up to 127 are exact in bfloat16 too. CUDA has bitsandbytes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flocktune.errors import Problem, UserError


class Int8Linear(nn.Linear):
    """Stands for a frozen linear module; like bitsandbytes' modules it is one for all that look for those."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        rounded = (weight / scale[:, None]).round_().to(torch.int8)
        self.weight = nn.Parameter(rounded, requires_grad=False)
        self.bias = linear.bias
        self.register_buffer("scale", scale, persistent=False)
        self.training = linear.training

    def forward(self, x: Tensor) -> Tensor:
        y = _Product.apply(x, self.weight, self.scale)
        return y if self.bias is None else y + self.bias


class _Product(torch.autograd.Function):
    """x [..., in], Q [out, in], s [out] -> (x Q^T) s; a gradient for x alone. Nothing of x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return (F.linear(x, weight.to(x.dtype)) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        [gradient] = gradients
        return (gradient * scale).to(gradient.dtype) @ weight.to(gradient.dtype), None, None


def quantize_linears(model: nn.Module, head: nn.Module | None) -> None:
    """Put int8 weights into the place of every linear module's of ``model`` but of ``head``, for good.

    Raises UserError when there are none.
    """
    found = [name for name, module in model.named_modules() if type(module) is nn.Linear and module is not head]
    if not found:
        raise UserError(
            Problem("model.quantization", "a model with linear modules", type(model).__name__, "Set it to none.")
        )
    for name in found:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Int8Linear(model.get_submodule(name)))  # type: ignore[arg-type]
