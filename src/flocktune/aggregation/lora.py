"""Sums of products of LoRA factors, and what averaging the factors apart costs, from small products alone.

K clients, R rank, m x n weight. Ideal change: ``sum p_k s B_k A_k``; FedIT's mean gives
``s (sum p_k B_k)(sum p_k A_k)``. Never forms an m x n matrix. All sums are in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Pair: TypeAlias = tuple[Tensor, Tensor]
"""A [R, n], B [m, R]: the product B A."""

Factors: TypeAlias = Mapping[str, Pair]
"""Module -> (A [R, n], B [m, R])."""


def product_norm_squared(pairs: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]) -> float:
    """``|| sum_i c_i B_i A_i ||_F^2`` in float64, for A_i [r_i, n], B_i [m, r_i]; the ranks r_i may differ.

    ``<B_i A_i, B_j A_j> = tr((B_j^T B_i)(A_i A_j^T))``: with the factors stacked, the sum over both Gram
    matrices multiplied element by element.
    """
    b = torch.cat([weight * b.double() for (_, b), weight in zip(pairs, weights, strict=True)], dim=1)
    a = torch.cat([a.double() for a, _ in pairs], dim=0)
    return float(((b.T @ b) * (a @ a.T)).sum())


def factorised(pairs: Sequence[Pair], weights: Sequence[float], most: int | None = None) -> Pair:
    """``sum_i c_i B_i A_i`` as one pair (A [R, n], B [m, R]), float32, for B_i [m, r_i] and A_i [r_i, n].

    By QR of the stacked B_i, QR of the stacked A_i^T, and an SVD of what is between, no larger than the sum of the r_i:
    R is the rank of the sum, at most ``most``, and what is left is the best of that rank (Eckart and Young). Only
    directions below float32's rounding of the largest are taken for none. Both factors have the square roots of the
    singular values; the largest comes first.
    """
    b = torch.cat([weight * b.double() for (_, b), weight in zip(pairs, weights, strict=True)], dim=1)
    a = torch.cat([a.double() for a, _ in pairs], dim=0)
    basis_b, rest_b = torch.linalg.qr(b)
    basis_a, rest_a = torch.linalg.qr(a.T)
    left, values, right = torch.linalg.svd(rest_b @ rest_a.T, full_matrices=False)
    noise = 1e-12 * float(b.norm() * a.norm())  # what is left of terms that cancel
    rank = int((values > torch.finfo(torch.float32).eps * values[:1] + noise).sum())
    rank = rank if most is None else min(rank, most)
    root = values[:rank].sqrt()
    return (root[:, None] * (right[:rank] @ basis_a.T)).float(), ((basis_b @ left[:, :rank]) * root).float()


def residual(changes: Sequence[Pair], shares: Sequence[float]) -> tuple[list[Pair], list[float]]:
    """What the mean of products has and the product of means has not, as pairs and their weights.

    ``changes``: each client's (a_k, b_k), of factors (A + a_k, B + b_k); ``shares`` sum to 1. It is
    ``sum p_k (b_k - mean b)(a_k - mean a)``, whatever A and B are: of rank at most (K - 1) R, and no large numbers
    cancel.
    """
    mean_a, mean_b = (value.double() for value in changes[0])
    total = shares[0]
    for share, (a, b) in zip(shares[1:], changes[1:], strict=True):
        total += share
        mean_a = mean_a.lerp(a.double(), share / total)  # a running mean: of clients that agree it is what they say
        mean_b = mean_b.lerp(b.double(), share / total)
    return [(a.double() - mean_a, b.double() - mean_b) for a, b in changes], list(shares)


def aggregation_error(
    clients: Sequence[Factors],
    weights: Sequence[float],
    reached: Factors,
    merged: Factors | None = None,
    added: Factors | None = None,
) -> float:
    """``|| ideal - achieved || / || ideal ||`` over all modules. 0 when the ideal is zero.

    Ideal: ``merged`` (the side adapter before the round) and ``sum w_k B_k A_k`` of ``clients``' whole factors, with
    the LoRA scale in the weights, or in none. Achieved: ``merged``, ``reached`` and what was ``added`` to the side.
    """
    error = ideal = 0.0
    for module, after in reached.items():
        wanted = [client[module] for client in clients]
        more = [added[module]] if added and module in added else []
        before = [merged[module]] if merged and module in merged else []
        error += product_norm_squared([*wanted, after, *more], [*weights, -1.0, *(-1.0 for _ in more)])
        ideal += product_norm_squared([*wanted, *before], [*weights, *(1.0 for _ in before)])
    return (max(error, 0.0) / ideal) ** 0.5 if ideal > 0 else 0.0
