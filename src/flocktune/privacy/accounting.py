"""What noise is worth: epsilon of Poisson-sampled Gaussian mechanisms, by Google's dp-accounting, and the way back.

Neighbours differ by one contributor (a client, or a row) that is there or not: add or remove one. No other module knows
the library.

Privacy loss distributions are discretised upwards, so that epsilon is never said too small; Renyi accounting
(arXiv 1908.10530) says a larger one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from flocktune.errors import Problem, UserError

if TYPE_CHECKING:
    from dp_accounting import DpEvent, PrivacyAccountant

_INTERVAL = 1e-3
"""Of discretised privacy losses, in nats: ten times the library's own, ten times as fast, epsilon larger by < 1 %."""

_ORDERS = (*(2 + order / 10 for order in range(80)), *range(10, 65), 80, 96, 128, 256, 512)
"""Of Renyi divergences, from 2: below, the library's series do not converge for likely settings."""

_SLACK = 1e-9
"""Relative: a budget that is met exactly is not exceeded."""


@dataclass(frozen=True)
class Budget:
    """What each step of one mechanism costs, and what may be spent.

    ``sampling``: the probability with which a contributor takes part in a step. ``noise_multiplier``: the standard
    deviation of the noise in units of what one contributor can change. ``most``: the epsilon that is not exceeded.
    """

    sampling: float
    noise_multiplier: float
    delta: float
    accountant: Literal["pld", "rdp"] = "pld"
    most: float = math.inf

    def epsilon(self, steps: int) -> float:
        """What ``steps`` steps have spent; infinite without noise."""
        return _epsilon(self.accountant, self.sampling, self.noise_multiplier, steps, self.delta)

    def allows(self, steps: int) -> bool:
        """Whether so many steps stay within what may be spent."""
        return self.most == math.inf or self.epsilon(steps) <= self.most * (1 + _SLACK)

    def affordable(self, limit: int) -> int:
        """How many steps of at most ``limit`` may be taken."""
        if self.allows(limit):
            return limit
        enough, too_many = 0, limit
        while too_many - enough > 1:
            middle = (enough + too_many) // 2
            enough, too_many = (middle, too_many) if self.allows(middle) else (enough, middle)
        return enough

    def told(self, steps: int, unit: str, each: str) -> dict[str, Any]:
        """What was spent, with all that it means, for a log: epsilon is None when nothing is promised.

        ``unit``: whom the guarantee is for, ``client`` or ``row``; ``each``: what a step is called.
        """
        epsilon = self.epsilon(steps)
        said = {
            "epsilon": epsilon if math.isfinite(epsilon) else None,
            "delta": self.delta,
            "neighbours": f"add/remove one {unit}",
            "sampling": f"Poisson q={self.sampling:.4g}",
            "steps": steps,
            "noise_multiplier": self.noise_multiplier,
            "accountant": self.accountant,
        }
        return {**said, "said": _sentence(said, f"{steps:,} {each}{'' if steps == 1 else 's'}")}


def _sentence(told: dict[str, Any], steps: str) -> str:
    """Epsilon, delta, sampling and neighbours together, or not at all."""
    if told["epsilon"] is None:
        return f"no differential privacy: no noise ({steps})"
    return (
        f"epsilon {told['epsilon']:.3g} at delta {told['delta']:.3g} after {steps}, {told['neighbours']},"
        f" {told['sampling']}; runs on the same data add up"
    )


def event(sampling: float, noise_multiplier: float) -> DpEvent:
    """One step: a sum of clipped contributions, each there with probability ``sampling``, and Gaussian noise."""
    library = _library()
    if not noise_multiplier:
        return library.NonPrivateDpEvent()
    gaussian = library.GaussianDpEvent(noise_multiplier)
    return gaussian if sampling == 1 else library.PoissonSampledDpEvent(sampling, gaussian)


@lru_cache(maxsize=4096)
def calibrate(accountant: Literal["pld", "rdp"], sampling: float, steps: int, delta: float, epsilon: float) -> float:
    """The smallest noise multiplier with which ``steps`` steps cost at most ``epsilon``, to a ten-thousandth."""
    library = _library()
    if accountant == "rdp":
        between = library.LowerEndpointAndGuess(0.05, 1.0)
    else:  # never more than what Renyi accounting, which is fast, asks for
        most = calibrate("rdp", sampling, steps, delta, epsilon)
        between = library.ExplicitBracketInterval(most / 2, most)
    return float(
        library.calibrate_dp_mechanism(
            _accountant(accountant),
            lambda noise: library.SelfComposedDpEvent(event(sampling, noise), steps),
            epsilon,
            delta,
            between,
            tol=1e-4,
        )
    )


@lru_cache(maxsize=4096)
def _epsilon(accountant: str, sampling: float, noise_multiplier: float, steps: int, delta: float) -> float:
    if not steps:
        return 0.0
    if not noise_multiplier:
        return math.inf
    spent = _accountant(accountant)()
    spent.compose(event(sampling, noise_multiplier), steps)
    return float(spent.get_epsilon(delta))


def _accountant(kind: str) -> Callable[[], PrivacyAccountant]:
    neighbours = _library().NeighboringRelation.ADD_OR_REMOVE_ONE
    if kind == "pld":
        from dp_accounting.pld import PLDAccountant

        return lambda: PLDAccountant(neighbours, value_discretization_interval=_INTERVAL)
    from dp_accounting.rdp import RdpAccountant

    return lambda: RdpAccountant(_ORDERS, neighbours)


def _library() -> Any:
    try:
        import dp_accounting
    except ImportError:
        fix = "pip install 'flocktune[privacy]'"
        raise UserError(Problem("privacy", "dp-accounting, installed", "not found", fix)) from None
    return dp_accounting
