"""How different the clients' data are, in a few numbers and one table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Heterogeneity:
    """Means are over clients with rows, each counted once.

    label_entropy: of a client's categories, in nats; ``label_entropy_share`` is it over ln(number of
        categories), from 0 (one category each) to 1 (an even mix; 0 when there is one category only).
    distance: Jensen-Shannon distance (square root of the divergence, base 2) between a client's
        distribution of categories and that of all clients together; 0 is the same, 1 is disjoint.
    size_gini: of the clients' row counts; 0 is equal, towards 1 one client holds all.
    """

    clients: int
    categories: int
    rows_min: int
    rows_median: float
    rows_max: int
    size_gini: float
    label_entropy: float
    label_entropy_share: float
    distance: float


def category_counts(
    parts: Mapping[str, Sequence[int] | NDArray[np.int64]], categories: Sequence[str]
) -> dict[str, dict[str, int]]:
    """client -> category -> rows, every category for every client, both in sorted order of categories."""
    names = sorted({categories[row] for rows in parts.values() for row in rows})
    counts = {client: Counter(categories[row] for row in rows) for client, rows in parts.items()}
    return {client: {name: count[name] for name in names} for client, count in counts.items()}


def heterogeneity(parts: Mapping[str, Sequence[int] | NDArray[np.int64]], categories: Sequence[str]) -> Heterogeneity:
    """Measure a partition. Raises ValueError when no client has a row."""
    table = np.array([list(row.values()) for row in category_counts(parts, categories).values()], np.float64)
    sizes = table.sum(axis=1)
    if not sizes.any():
        raise ValueError("no client has a row")
    mixes = table[sizes > 0] / sizes[sizes > 0, None]
    overall = table.sum(axis=0) / sizes.sum()
    entropy = float(_entropy(mixes).mean())
    # JS(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2
    divergence = _entropy((mixes + overall) / 2) - (_entropy(mixes) + _entropy(overall)) / 2
    distance = float(np.sqrt(np.clip(divergence / np.log(2), 0, 1)).mean())
    names = table.shape[1]
    return Heterogeneity(
        clients=len(sizes),
        categories=names,
        rows_min=int(sizes.min()),
        rows_median=float(np.median(sizes)),
        rows_max=int(sizes.max()),
        size_gini=_gini(sizes),
        label_entropy=entropy,
        label_entropy_share=entropy / float(np.log(names)) if names > 1 else 0.0,
        distance=distance,
    )


def _entropy(shares: np.ndarray) -> np.ndarray:
    """Entropy in nats along the last axis; 0 ln 0 is 0."""
    return -(shares * np.log(np.where(shares > 0, shares, 1.0))).sum(axis=-1)


def _gini(sizes: np.ndarray) -> float:
    """Mean absolute difference over twice the mean."""
    ordered = np.sort(sizes)
    ranks = np.arange(1, len(ordered) + 1)
    return float(((2 * ranks - len(ordered) - 1) * ordered).sum() / (len(ordered) * ordered.sum()))
