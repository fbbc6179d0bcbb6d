"""Secure aggregation as settings of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from flocktune.config.numbers import PositiveFloat

KEYS, SHARES, MASKED, CONSISTENCY, UNMASK = (
    f"secagg/{phase}" for phase in ("keys", "shares", "masked", "consistency", "unmask")
)
PHASES = (KEYS, SHARES, MASKED, CONSISTENCY, UNMASK)
"""The kinds of tasks of a round, in their order; ``masked`` is the one that trains."""


@dataclass(frozen=True)
class SecureAggregationConfig:
    """The server learns the sum of a round's updates, and none of them (Bonawitz et al., CCS 2017).

    ``threshold``: the fraction of a round's clients without whom nothing is unmasked; so many must stay to the end. It
    is more than half; 2/3 is the least by which a server can not show two parts of the clients two lists, as long as no
    third of them is its own. ``min_clients``: the fewest clients in a sum. ``range``: values are clipped to it, either
    way, before they become integers of ``range * clients / 2**31`` each: larger is coarser. ``max_weight``: the largest
    weight that counts, in the unit of ``aggregation.weights``; not needed for equal weights.
    """

    threshold: Annotated[float, Field(gt=0.5, le=1)] = 2 / 3
    min_clients: Annotated[int, Field(ge=2)] = 3
    range: PositiveFloat = 1.0
    max_weight: PositiveFloat | None = None
