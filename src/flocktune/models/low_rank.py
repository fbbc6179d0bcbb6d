"""The low-rank paths of linear modules that read the same input, in as few and as large products as there can be.

    y_g = W_g x + b_g + scale * B_g A_g dropout(x)        g = 1 .. G: modules of one x (query, key and value, say)

All A's are one product, and so is what they add to the gradient of x. A frozen W has no gradient of its own, so x, the
low-rank states and dropout's mask are all that is kept for the backward pass, once for all G modules.

:class:`LowRank` trains one adapter. :class:`StackedLowRank` trains those of C clients at once, each on its own tokens:
the base's products see the tokens of all.

Shapes: T tokens, flat; R rank; in and out the width of a module's input and output. A is [R, in], B is [out, R].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Bases: TypeAlias = Sequence[tuple[Tensor, Tensor | None]]
"""W [out, in] and bias of each module; none where their product is made elsewhere, and added."""


class LowRank(torch.autograd.Function):
    """(x [T, in], mask of dropout or None, scale, bases, every A, then every B) -> the G outputs [T, out]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mask: Tensor | None, scale: float, bases: Bases, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        modules = len(factors) // 2
        leaves = factors
        if factors[0].dtype != x.dtype:
            factors = tuple(factor.to(x.dtype) for factor in factors)
        a = torch.cat(factors[:modules]) if modules > 1 else factors[0]
        low = F.linear(x if mask is None else x * mask, a)
        each = low.chunk(modules, 1) if modules > 1 else (low,)
        if bases:
            outputs = [F.linear(x, *base) for base in bases]
            for y, own, b in zip(outputs, each, factors[modules:], strict=True):
                y.addmm_(own, b.t(), alpha=scale)
        else:
            outputs = [F.linear(own, b).mul_(scale) for own, b in zip(each, factors[modules:], strict=True)]
        ctx.scale, ctx.bases, ctx.dtypes = scale, bases, [leaf.dtype for leaf in leaves]
        ctx.save_for_backward(x, mask, low, a, *factors[modules:])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *changes: Tensor) -> tuple[Any, ...]:
        x, mask, low, a, *b = ctx.saved_tensors
        scale, modules = ctx.scale, len(b)
        wanted = ctx.needs_input_grad
        parts = [torch.mm(dy, factor) for dy, factor in zip(changes, b, strict=True)]
        d_low = (torch.cat(parts, 1) if modules > 1 else parts[0]).mul_(scale)
        of_a: Sequence[Tensor | None] = (None,) * modules
        of_b: Sequence[Tensor | None] = (None,) * modules
        if any(wanted[4 : 4 + modules]):
            d_a = torch.mm(d_low.t(), x if mask is None else x * mask).to(ctx.dtypes[0])
            of_a = d_a.chunk(modules) if modules > 1 else (d_a,)
        if any(wanted[4 + modules :]):
            each = low.chunk(modules, 1) if modules > 1 else (low,)
            of_b = [
                torch.mm(own.t(), dy).to(ctx.dtypes[-1]).mul_(scale).t() for own, dy in zip(each, changes, strict=True)
            ]
        d_x = None
        if wanted[0]:
            d_x = input_gradient(ctx.bases, changes)
            if mask is not None or d_x is None:
                aside = torch.mm(d_low, a)
                aside = aside if mask is None else aside.mul_(mask)
                d_x = aside if d_x is None else d_x.add_(aside)
            else:
                d_x.addmm_(d_low, a)
        return (d_x, None, None, None, *of_a, *of_b)


def input_gradient(bases: Bases, changes: Sequence[Tensor]) -> Tensor | None:
    """The sum over modules of dy W, [T, in]; None without bases."""
    if not bases:
        return None
    total = torch.mm(changes[0], bases[0][0])
    for dy, (weight, _) in zip(changes[1:], bases[1:], strict=True):
        total.addmm_(dy, weight)
    return total


def keep_mask(like: Tensor, dropout: float, generator: torch.Generator | None = None) -> Tensor:
    """Fills ``like`` with dropout's mask: 0, or 1 / (1 - dropout) for what is kept."""
    return like.bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)


# --- many clients ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spans:
    """Whose tokens are whose in one forward pass: the next ``lengths[i]`` tokens are those of client ``clients[i]``.

    For dropout, which must drop the same whatever the other clients do: a client's ``generators[i]`` draws for
    ``drawn[i]`` tokens, those of its own batch with its padding, of which ``places[i]`` [lengths[i]] are here.
    """

    clients: tuple[int, ...]
    lengths: tuple[int, ...]
    generators: tuple[torch.Generator, ...] = ()
    drawn: tuple[int, ...] = ()
    places: tuple[Tensor, ...] = ()

    def of(self, x: Tensor) -> Sequence[Tensor]:
        """[T, n] cut into one piece a client."""
        return x.split_with_sizes(self.lengths)

    def own(self, factors: Tensor) -> Sequence[Tensor]:
        """[C, m, n] -> [m, n] of each of the clients whose tokens are here; there may be more after them."""
        every = factors.unbind()
        return every if self.first else [every[client] for client in self.clients]

    @cached_property
    def first(self) -> bool:
        """Whether these are clients 0, 1, ... in this order."""
        return self.clients == tuple(range(len(self.clients)))

    @cached_property
    def alike(self) -> bool:
        """Whether these are clients 0, 1, ... with as many tokens each: one product then does the work of a loop."""
        return self.first and len(set(self.lengths)) == 1

    def mask(self, x: Tensor, dropout: float) -> Tensor:
        """Dropout's mask [T, in] of ``x`` [T, in]."""
        pieces = zip(self.generators, self.drawn, self.places, strict=True)
        return torch.cat([keep_mask(x.new_empty(n, x.shape[1]), dropout, g)[place] for g, n, place in pieces])


@dataclass
class StackedPaths:
    """One group's factors of C clients, and where their gradients are summed: in the same places of two buffers.

    a, a_sum: [C, G R, in]; b, b_sum: of every module [C, R, out], which is B^T. ``leaf`` wants a gradient, so that
    autograd comes by; it never gets one. ``spans``: of the current forward pass.
    """

    a: Tensor
    b: Sequence[Tensor]
    a_sum: Tensor
    b_sum: Sequence[Tensor]
    leaf: Tensor
    spans: Spans = field(default=Spans((), ()))

    def __call__(self, x: Tensor, dropout: float, scale: float, bases: Bases) -> tuple[Tensor, ...]:
        """[T, in] -> the G outputs [T, out]."""
        if len(x) != sum(self.spans.lengths):
            raise ValueError(f"expected the {sum(self.spans.lengths)} tokens of these clients, got {len(x)}")
        mask = self.spans.mask(x, dropout) if dropout else None
        return StackedLowRank.apply(x, mask, scale, bases, self, self.leaf)


class StackedLowRank(torch.autograd.Function):
    """(x [T, in], mask or None, scale, bases, the clients' paths, their leaf) -> the G outputs [T, out].

    Gradients of factors are added to the paths' sums.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mask: Tensor | None, scale: float, bases: Bases, paths: StackedPaths, leaf: Tensor
    ) -> tuple[Tensor, ...]:
        spans, modules = paths.spans, len(paths.b)
        a = paths.a.to(x.dtype)
        low = products(x if mask is None else x * mask, a.transpose(1, 2), spans)
        outputs = []
        for place, (own, b) in enumerate(zip(low.chunk(modules, 1), paths.b, strict=True)):
            y = F.linear(x, *bases[place]) if bases else x.new_zeros(len(x), b.shape[2])
            add_products_(y, own, b.to(x.dtype), spans, scale)
            outputs.append(y)
        ctx.scale, ctx.bases, ctx.paths, ctx.spans = scale, bases, paths, spans
        ctx.save_for_backward(x, mask, low)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *changes: Tensor) -> tuple[Any, ...]:
        x, mask, low = ctx.saved_tensors
        scale, paths, spans = ctx.scale, ctx.paths, ctx.spans
        parts = [products(dy, b.to(x.dtype).transpose(1, 2), spans) for dy, b in zip(changes, paths.b, strict=True)]
        d_low = (torch.cat(parts, 1) if len(parts) > 1 else parts[0]).mul_(scale)
        add_outer_(paths.a_sum, d_low, x if mask is None else x * mask, spans)
        for total, own, dy in zip(paths.b_sum, low.chunk(len(parts), 1), changes, strict=True):
            add_outer_(total, own, dy, spans, scale)
        if not ctx.needs_input_grad[0]:
            return (None,) * 6
        d_x = input_gradient(ctx.bases, changes)
        d_x = torch.zeros_like(x) if d_x is None else d_x
        a = paths.a.to(x.dtype)
        if mask is None:
            add_products_(d_x, d_low, a, spans)
        else:
            d_x.add_(products(d_low, a, spans).mul_(mask))
        return (d_x, None, None, None, None, None)


def products(x: Tensor, own: Tensor, spans: Spans) -> Tensor:
    """[T, k] times every client's ``own`` [C, k, n] -> [T, n]."""
    if spans.alike:
        clients = len(spans.clients)
        return torch.bmm(_by_client(x, clients), own[:clients]).flatten(0, 1)
    out = x.new_empty(len(x), own.shape[2])
    for piece, factors, into in zip(spans.of(x), spans.own(own), spans.of(out), strict=False):
        torch.mm(piece, factors, out=into)
    return out


def add_products_(out: Tensor, x: Tensor, own: Tensor, spans: Spans, alpha: float = 1.0) -> None:
    """``out`` [T, n] += alpha * :func:`products`."""
    if spans.alike:
        clients = len(spans.clients)
        _by_client(out, clients).baddbmm_(_by_client(x, clients), own[:clients], alpha=alpha)
        return
    for piece, factors, into in zip(spans.of(x), spans.own(own), spans.of(out), strict=False):
        into.addmm_(piece, factors, alpha=alpha)


def add_outer_(sums: Tensor, left: Tensor, right: Tensor, spans: Spans, alpha: float = 1.0) -> None:
    """``sums`` [C, m, n] += alpha * left^T right over every client's own tokens: [T, m], [T, n].

    Sums stay in their dtype; products are in that of what is multiplied.
    """
    same = sums.dtype == left.dtype
    if same and spans.alike:
        clients = len(spans.clients)
        sums[:clients].baddbmm_(_by_client(left, clients).transpose(1, 2), _by_client(right, clients), alpha=alpha)
        return
    for one, other, total in zip(spans.of(left), spans.of(right), spans.own(sums), strict=False):
        if same:
            total.addmm_(one.t(), other, alpha=alpha)
        else:
            total.add_(one.t() @ other, alpha=alpha)


def _by_client(x: Tensor, clients: int) -> Tensor:
    """[T, n] -> [C, T / C, n], a view; of some columns of a wider tensor too."""
    return x.unflatten(0, (clients, -1))
