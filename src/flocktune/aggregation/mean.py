"""The weighted mean of updates (FedAvg, McMahan et al., arXiv 1602.05629), one update at a time.

Memory is one accumulator, however many clients there are. Updates are taken in task order, so the
result is the same bit for bit, whichever client finished first.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from flocktune.types import Mean, Tensors, Update, merge_metrics


def weighted_mean(updates: Iterable[Update]) -> Update:
    """``sum_k p_k delta_k`` with ``p_k = weight_k / sum of weights``, in float32.

    A running mean: ``m <- m + (delta - m) * w / W``. It equals the sum of products up to rounding, never
    overflows, and returns one client's delta unchanged. The merged update weighs the sum of weights.
    Raises ValueError when there is no update.
    """
    mean: dict[str, torch.Tensor] = {}
    metrics: dict[str, Mean] = {}
    total, clients = 0.0, 0
    for update in updates:
        total += update.weight
        clients += update.clients
        metrics = merge_metrics(metrics, update.metrics)
        if not mean:
            mean = {name: value.to(torch.float32, copy=True) for name, value in update.delta.items()}
            continue
        for name, value in update.delta.items():
            mean[name].lerp_(value.float(), update.weight / total)
    if not clients:
        raise ValueError("a mean needs at least one update")
    return Update(mean, total, clients, metrics)


def unchanged(expected: Tensors) -> Update:
    """The update of a round in which nobody took part, and that is well so: no change, of weight 0."""
    return Update({name: torch.zeros_like(value) for name, value in expected.items()}, 0.0, 0)
