"""How differently clients fare: every client's loss on its own held-out rows, and the spread of these losses."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from flocktune.types import Mean

WORST = 0.1
"""The share of clients, rounded half up and at least one, whose mean loss is ``loss_worst_tenth``."""


def spread(losses: Mapping[str, Mean]) -> dict[str, Any]:
    """Client -> nats over its label tokens, as a table ``overall`` and one a client, ready for JSON.

    ``loss``: the mean over clients, each counting once; ``loss_std``: the standard deviation over these clients (of
    the population: they are all there are); ``loss_worst_tenth``: the mean over the worst tenth. Clients of whom
    nothing was measured are left out.
    """
    values = {client: mean.value for client, mean in losses.items() if mean.count}
    overall: dict[str, float | int] = {"clients": len(values)}
    if values:
        worst = sorted(values.values(), reverse=True)[: max(1, int(WORST * len(values) + 0.5))]
        overall |= {
            "loss": statistics.fmean(values.values()),
            "loss_std": statistics.pstdev(values.values()),
            "loss_worst_tenth": statistics.fmean(worst),
        }
    return {"overall": overall, "clients": {client: {"loss": value} for client, value in values.items()}}
