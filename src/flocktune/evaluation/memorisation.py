"""What a model gives away of the rows that it was trained on: whether a row was among them, and secrets in them.

Attacks by losses alone, as anybody can make them who has the model: lower bounds of what leaks. That an attack fails
proves nothing; that one succeeds proves a leak.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flocktune.data.batching import Indices, evaluation_batches
from flocktune.data.encoding import Encoded
from flocktune.evaluation.generate import evaluating
from flocktune.training import token_losses

Losses = NDArray[np.float64]


@dataclass(frozen=True)
class Auc:
    """The probability that a member's score is above an outsider's (ties count half): 0.5 is guessing.

    ``low``, ``high``: its 95 % confidence interval (DeLong et al. 1988).
    """

    value: float
    low: float
    high: float
    members: int
    outsiders: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        interval = [self.low, self.high]
        return {"auc": self.value, "interval": interval, "members": self.members, "outsiders": self.outsiders}


@torch.no_grad()
def row_losses(model: Any, rows: Encoded, indices: Sequence[int] | Indices, *, batch_size: int, pad_id: int) -> Losses:
    """Mean nats a label token of each of ``indices``, float64, in their order. Each has a target."""
    device = next(model.parameters()).device
    found: dict[int, float] = {}
    with evaluating(model):
        for group, batch in evaluation_batches(rows, indices, batch_size=batch_size, batching="padded", pad_id=pad_id):
            nats = token_losses(model, batch.to(device)).double().cpu()
            row = batch.label_index // batch.input_ids.shape[1]
            sums = torch.zeros(len(group), dtype=torch.float64).index_add_(0, row, nats)
            means = sums / torch.bincount(row, minlength=len(group))
            found |= dict(zip((int(index) for index in group), means.tolist(), strict=True))
    return np.array([found[int(index)] for index in indices])


def membership(members: Losses, outsiders: Losses) -> Auc:
    """How well scores tell members from others; larger scores say member. Neither may be empty."""
    above = _placements(members, outsiders)
    below = 1 - _placements(outsiders, members)
    value = float(above.mean())
    variance = sum(part.var(ddof=1) / len(part) if len(part) > 1 else 0.25 for part in (above, below))
    reach = NormalDist().inv_cdf(0.975) * math.sqrt(variance)
    return Auc(value, max(0.0, value - reach), min(1.0, value + reach), len(members), len(outsiders))


def exposure(secret: float, others: Losses) -> float:
    """Bits by which a secret's loss stands out among ``others``' losses: log2 of how many there are over its rank.

    From 0 (the last) to log2 (n + 1) (the first); 1.44 on average for a secret that nothing is known of. Ties count
    half.
    """
    rank = 1 + float((others < secret).sum()) + 0.5 * float((others == secret).sum())
    return math.log2((len(others) + 1) / rank)


def _placements(mine: Losses, theirs: Losses) -> Losses:
    """For each of ``mine``, the share of ``theirs`` that lies below it; ties count half."""
    ordered = np.sort(theirs)
    left, right = (np.searchsorted(ordered, mine, side=side) for side in ("left", "right"))
    return np.asarray((left + right) / (2 * len(theirs)), np.float64)
