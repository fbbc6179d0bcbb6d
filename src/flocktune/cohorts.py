"""Who takes part in the rounds of a recipe, and how much a round takes in. What no round could do is refused here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flocktune.aggregation.robust import least_updates
from flocktune.algorithms.local import steps_per_round
from flocktune.config.privacy_rules import privacy_in_force
from flocktune.config.schema import FEDERATED, Availability, Named, Poisson, RunConfig, UserPrivacy
from flocktune.errors import Problem, UserError
from flocktune.privacy.noise import derive_key, uniforms
from flocktune.protection import secured
from flocktune.scheduling import Cohort, cohort_size, read_trace, select

EVERYONE = "everyone"
"""The one client of a centralised run: it holds all rows."""

MOST_RISK = 1e-3
"""The greatest chance, over a whole run, that a cohort which is drawn client by client is too small for its sum."""


def scheduler(
    config: RunConfig, clients: Mapping[str, Sequence[int] | NDArray[np.int64]], secret: bytes | None = None
) -> Callable[[int], Cohort]:
    """Round -> cohort. Raises UserError for an unknown client or a bad trace now, not when its round has come.

    ``secret``: the run's key, of which cohorts are drawn where nobody may foresee them.
    """
    sizes = {name: len(rows) for name, rows in clients.items()}
    selection = config.scheduling.selection
    trace = read_trace(Path(selection.trace), list(sizes)) if isinstance(selection, Availability) else None
    hidden = secret if isinstance(privacy_in_force(config), UserPrivacy) else None

    def schedule(number: int) -> Cohort:
        if config.method == "centralised":
            return Cohort((EVERYONE,), 1, 1)
        coins = uniforms(derive_key(hidden, "selection", number), len(sizes)) if hidden else None
        return select(config.scheduling, sizes, round=number, seed=config.seed, trace=trace, coins=coins)

    first, secure = schedule(0), secured(config)
    if secure and 0 < first.wanted < secure.min_clients and first.quorum:
        fix = "Ask more clients in a round, or lower secure_aggregation.min_clients: a sum of few hides little."
        expected = f"at least secure_aggregation.min_clients, {secure.min_clients}, in a round"
        raise UserError(Problem("scheduling.selection", expected, str(first.wanted), fix))
    if secure and isinstance(selection, Poisson):
        _refuse_small_draws(selection.fraction, len(sizes), secure.min_clients, config.rounds)
    least = least_updates(config.aggregation.robust)
    drawn = isinstance(selection, Poisson)  # how many come is known in the round
    if config.method in FEDERATED and not drawn and first.wanted < least:
        fix = "Ask more clients, or set it lower."
        got = f"{first.wanted} clients a round"
        raise UserError(Problem("aggregation.robust.byzantine", f"at least {least} clients a round", got, fix))
    return schedule


def centralised_steps(config: RunConfig, clients: Mapping[str, Sequence[int] | NDArray[np.int64]]) -> int:
    """Steps a round of the centralised baseline: those of a whole cohort, so both see as many examples."""
    selection = config.scheduling.selection
    wanted = len(selection.clients) if isinstance(selection, Named) else cohort_size(selection.fraction, len(clients))
    cohort = updates_a_round(config, wanted, len(clients))
    mean = np.mean([steps_per_round(config.local, len(rows)) for rows in clients.values()])
    return max(1, round(float(mean) * cohort))


def updates_a_round(config: RunConfig, wanted: int, clients: int) -> int:
    """How many updates a round combines: ``wanted`` of a cohort, a buffer of them, or so many on average."""
    if isinstance(config.scheduling.selection, Poisson):
        return cohort_size(config.scheduling.selection.fraction, clients)
    return config.scheduling.buffered.size if config.scheduling.buffered else wanted


def _refuse_small_draws(fraction: float, clients: int, least: int, rounds: int) -> None:
    """Raise UserError when cohorts that are drawn client by client are likely to be too small to hide anybody.

    A round with fewer than ``least`` fails, and is drawn again as it was: the run can not go on.
    """
    from scipy.stats import binom  # late: a third of a second, and few recipes draw so

    chance = 1 - float(binom.sf(least - 1, clients, fraction)) ** rounds
    if chance > MOST_RISK:
        expected = f"a chance below {MOST_RISK:g} that a round has fewer than secure_aggregation.min_clients, {least}"
        got = f"{chance:.2g}, with {clients} clients of which each is drawn with {fraction:g}, {rounds} rounds"
        fix = "Raise scheduling.selection.fraction: such a round fails, and the run with it."
        raise UserError(Problem("scheduling.selection.fraction", expected, got, fix))
