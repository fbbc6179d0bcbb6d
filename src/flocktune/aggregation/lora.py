"""What averaging LoRA factors apart costs: the aggregation error, from small products alone.

K clients, R rank, m x n weight. Ideal change: ``sum p_k s B_k A_k``; FedIT's mean gives
``s (sum p_k B_k)(sum p_k A_k)``. Never forms an m x n matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""Module -> (A [R, n], B [m, R])."""


def product_norm_squared(pairs: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]) -> float:
    """``|| sum_i c_i B_i A_i ||_F^2`` in float64, for A_i [r_i, n], B_i [m, r_i]; the ranks r_i may differ.

    ``<B_i A_i, B_j A_j> = tr((B_j^T B_i)(A_i A_j^T))``: with the factors stacked, the sum over both Gram
    matrices multiplied element by element.
    """
    b = torch.cat([weight * b.double() for (_, b), weight in zip(pairs, weights, strict=True)], dim=1)
    a = torch.cat([a.double() for a, _ in pairs], dim=0)
    return float(((b.T @ b) * (a @ a.T)).sum())


def aggregation_error(clients: Sequence[Factors], weights: Sequence[float]) -> float:
    """``||E|| / ||dW*||`` over all modules, with E = ideal minus FedIT's mean of factors.

    ``clients``: each client's whole factors (not changes). ``weights``: any positive scale. 0 when every client
    is alike or alone; equal LoRA scales cancel. 0 also when the ideal change is zero.
    """
    total = sum(weights)
    shares = [weight / total for weight in weights]
    error = ideal = 0.0
    for module in clients[0]:
        pairs = [client[module] for client in clients]
        mean_a = sum(share * a.double() for share, (a, _) in zip(shares, pairs, strict=True))
        mean_b = sum(share * b.double() for share, (_, b) in zip(shares, pairs, strict=True))
        ideal += product_norm_squared(pairs, shares)
        error += product_norm_squared([*pairs, (mean_a, mean_b)], [*shares, -1.0])  # type: ignore[list-item]
    return (max(error, 0.0) / ideal) ** 0.5 if ideal > 0 else 0.0
