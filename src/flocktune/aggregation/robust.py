"""Robust aggregation: rules that a minority of attackers can not carry off.

Distances between clients are those of their weights, ``dW_k = s B_k A_k``, not of raw factors, so that they do not
change when all factors are written as (B G, G^-1 A). A client's change is a product itself,

    dW_k - dW = s (dB_k A_k + B dA_k) = s [dB_k, B] [A_k; dA_k]

and all that the rules need is the matrix of inner products of these: from products of 2R x 2R, never m x n. Where one
factor alone travels, the other is the message's, and the change is linear in what travels.

What all rules have in common:
- Every client counts once: its weight is its own claim, and one number may not buy a round.
- They need a cohort's updates at once: memory grows with the cohort.
- What is combined are factors, as FedIT does. A client can hide large factors in a small product (c B, A / c), or
  behind B = 0, where no distance of products sees them. So first no update may be longer than :data:`LONGEST` times the
  median length of the round's, as factors; a longer one is shrunk to that. The coordinate rules do not need it.

K clients, R rank, m x n weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias, assert_never

import torch
from torch import Tensor

from flocktune.config.robustness import (
    CoordinateMedian,
    GeometricMedian,
    Krum,
    MultiKrum,
    NormBound,
    Robust,
    TrimmedMean,
)
from flocktune.errors import TooFewUpdates
from flocktune.tensors import norm
from flocktune.types import A_SUFFIX, B_SUFFIX, Mean, Tensors, Update, merge_metrics

Rule: TypeAlias = Callable[[Iterable[Update], Tensors], Update]
"""Updates, what they are changes of (by the same names; other factors may be among it) -> one update."""

LONGEST = 2.0
"""How much longer than the median update of a round, as factors, one may be before it is shrunk."""


def least_updates(settings: Robust | None) -> int:
    """How many updates a round must have for the rule to mean anything."""
    return 2 * settings.byzantine + 3 if isinstance(settings, Krum | MultiKrum) else 1


def rule(settings: Robust, scale: float) -> Rule:
    """The rule as ``ServerHalf.combine``; ``scale`` is that of LoRA. Raises TooFewUpdates for a round too small."""

    def combine(updates: Iterable[Update], base: Tensors) -> Update:
        held = list(updates)
        if len(held) < least_updates(settings):
            raise TooFewUpdates(least_updates(settings), "aggregation.robust.byzantine")
        match settings:
            case CoordinateMedian():
                return _each_coordinate(held, lambda stacked: _middle(stacked, (len(held) - 1) // 2))
            case TrimmedMean():
                cut = math.floor(settings.fraction * len(held) + 1e-9)
                return _each_coordinate(held, lambda stacked: _middle(stacked, cut))
            case NormBound():
                held = shortened(held)
                return _mean(bounded(held, base, scale, settings.bound))
            case GeometricMedian():
                held = shortened(held)
                return _combined(held, weiszfeld(gram(held, base, scale), settings))
            case Krum() | MultiKrum():
                held = shortened(held)
                most = len(held) - settings.byzantine - 2
                keep = 1 if isinstance(settings, Krum) else min(settings.keep or most, most)
                shares = torch.zeros(len(held), dtype=torch.float64)
                shares[krum_order(gram(held, base, scale), settings.byzantine)[:keep]] = 1 / keep
                return _combined(held, shares)
            case _:
                assert_never(settings)

    return combine


# --- geometry ---------------------------------------------------------------------------------------


def gram(updates: Sequence[Update], base: Tensors, scale: float) -> Tensor:
    """Inner products of the clients' changes of all weights, float64 [K, K].

    A tensor that is no factor of a pair counts by its own coordinates, and so does a factor whose other half is
    nowhere to be found.
    """
    deltas = [update.delta for update in updates]
    total = torch.zeros(len(deltas), len(deltas), dtype=torch.float64)
    modules = {_module(name): None for name in deltas[0]}
    for module in modules:
        for left, right, factor in _stacks(deltas, base, module, scale):
            gram_left = torch.einsum("imr,jms->ijrs", left, left)
            gram_right = torch.einsum("irn,jsn->ijrs", right, right)
            total += factor * (gram_left * gram_right).sum((2, 3))
    return (total + total.T) / 2


def _module(name: str) -> str:
    """The module of a factor; any other tensor is its own."""
    return name.removesuffix(A_SUFFIX).removesuffix(B_SUFFIX)


def _stacks(
    deltas: Sequence[Tensors], base: Tensors, module: str, scale: float
) -> Iterable[tuple[Tensor, Tensor, float]]:
    """The change of one module of every client as products ``left @ right``, float64 [K, m, 2R] and [K, 2R, n], and
    what their inner products count by."""
    a_name, b_name = module + A_SUFFIX, module + B_SUFFIX
    both = a_name in base and b_name in base
    if both:
        a, b = base[a_name].double(), base[b_name].double()
        change_a = torch.stack([delta[a_name].double() if a_name in delta else torch.zeros_like(a) for delta in deltas])
        change_b = torch.stack([delta[b_name].double() if b_name in delta else torch.zeros_like(b) for delta in deltas])
        left = torch.cat([change_b, b.expand_as(change_b)], dim=2)
        right = torch.cat([a + change_a, change_a], dim=1)
        yield left, right, scale**2
        return
    for name in (a_name, b_name, module):
        if name in deltas[0]:
            flat = torch.stack([delta[name].double().reshape(1, -1) for delta in deltas])
            yield torch.ones(len(deltas), 1, 1, dtype=torch.float64), flat, 1.0


def shortened(updates: Sequence[Update]) -> list[Update]:
    """The updates, none longer (as factors) than :data:`LONGEST` times the lower median of their lengths."""
    lengths = [norm(update.delta) for update in updates]
    most = LONGEST * sorted(lengths)[(len(lengths) - 1) // 2]
    return [
        _scaled(update, most / length) if length > most else update
        for update, length in zip(updates, lengths, strict=True)
    ]


# --- rules ------------------------------------------------------------------------------------------


def bounded(updates: Sequence[Update], base: Tensors, scale: float, bound: float | None) -> list[Update]:
    """The updates, each shrunk so far that its change of the weights is at most ``bound`` (None: the lower median)."""
    norms = gram(updates, base, scale).diagonal().clamp(min=0).sqrt().tolist()
    most = sorted(norms)[(len(norms) - 1) // 2] if bound is None else bound
    return [
        _shrunk(update, base, scale, most) if length > most else update
        for update, length in zip(updates, norms, strict=True)
    ]


def _shrunk(update: Update, base: Tensors, scale: float, most: float) -> Update:
    """``update`` times the c in [0, 1] at which its change of the weights is ``most``.

    With c in both factors the change is ``c L + c^2 Q``; its squared norm is a polynomial in c, known from the norms at
    three places.
    """
    at = {c: float(gram([_scaled(update, c)], base, scale)) for c in (1.0, -1.0, 2.0)}
    cross = (at[1.0] - at[-1.0]) / 2  # 2 <L, Q> c^3
    even = (at[1.0] + at[-1.0]) / 2  # |L|^2 + |Q|^2
    square = max((at[2.0] - 8 * cross - 4 * even) / 12, 0.0)  # |Q|^2
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if middle**2 * ((even - square) + middle * cross + middle**2 * square) <= most**2:
            low = middle
        else:
            high = middle
    return _scaled(update, low)


def weiszfeld(inner: Tensor, settings: GeometricMedian) -> Tensor:
    """The shares, float64 [K], by which the points with these inner products [K, K] make their geometric median.

    Smoothed Weiszfeld (arXiv 1912.13445, algorithm 2), from the mean: a client's new share is in proportion to
    1 / max(smoothing, its distance).
    """
    count = len(inner)
    shares = torch.full((count,), 1 / count, dtype=torch.float64)
    least = None
    for _ in range(settings.iterations):
        squares = shares @ inner @ shares - 2 * inner @ shares + inner.diagonal()
        distances = squares.clamp(min=0).sqrt()
        if least is None:
            least = settings.smoothing * float(distances.median())
            if float(distances.max()) == 0:  # all are the same
                return shares
        # Where most are the same point, the median distance is 0; the smallest number keeps the division whole.
        weights = 1 / distances.clamp(min=max(least, 1e-150))
        shares = weights / weights.sum()
    return shares


def krum_order(inner: Tensor, byzantine: int) -> list[int]:
    """Places of the clients, best first: by the sum of squared distances to the K - byzantine - 2 nearest others.

    Of two with the same score the one with the smaller change comes first.
    """
    count = len(inner)
    squares = inner.diagonal()
    distances = (squares[:, None] + squares[None, :] - 2 * inner).clamp(min=0)
    distances.fill_diagonal_(math.inf)
    scores = distances.sort(dim=1).values[:, : count - byzantine - 2].sum(1)
    return sorted(range(count), key=lambda place: (float(scores[place]), float(squares[place])))


def _middle(stacked: Tensor, cut: int) -> Tensor:
    """Along the first dimension: the mean without the ``cut`` smallest and largest values."""
    return stacked.sort(dim=0).values[cut : len(stacked) - cut].double().mean(0).float()


# --- updates ----------------------------------------------------------------------------------------


def _scaled(update: Update, factor: float) -> Update:
    return replace(update, delta={name: factor * value for name, value in update.delta.items()})


def _made_of(updates: Sequence[Update], delta: Tensors) -> Update:
    """``delta`` as one update of all that went into the rule, chosen or not."""
    metrics: Mapping[str, Mean] = {}
    for update in updates:
        metrics = merge_metrics(metrics, update.metrics)
    weight = sum(update.weight for update in updates)
    return Update(delta, weight, sum(update.clients for update in updates), metrics)


def _each_coordinate(updates: Sequence[Update], middle: Callable[[Tensor], Tensor]) -> Update:
    names = updates[0].delta
    delta = {name: middle(torch.stack([update.delta[name] for update in updates])) for name in names}
    return _made_of(updates, delta)


def _combined(updates: Sequence[Update], shares: Tensor) -> Update:
    """The sum of the updates by ``shares``, in float64."""
    delta = {
        name: torch.tensordot(shares, torch.stack([update.delta[name].double() for update in updates]), 1).float()
        for name in updates[0].delta
    }
    return _made_of(updates, delta)


def _mean(updates: Sequence[Update]) -> Update:
    return _combined(updates, torch.full((len(updates),), 1 / len(updates), dtype=torch.float64))
