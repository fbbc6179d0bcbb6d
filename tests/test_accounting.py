"""Epsilon, against formulas that need no accountant, and against published values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from flocktune.privacy.accounting import Budget, calibrate

SETTINGS = [(0.01, 1.1, 1000), (0.1, 1.0, 20), (0.2, 0.8, 50), (0.004, 0.7, 3000), (1.0, 3.0, 10)]


def epsilon(accountant: str, q: float, z: float, steps: int, delta: float = 1e-5) -> float:
    return Budget(q, z, delta, accountant).epsilon(steps)  # type: ignore[arg-type]


@pytest.mark.parametrize(("z", "steps"), [(1.0, 1), (1.0, 10), (4.0, 100)])
def test_without_sampling_it_is_the_analytic_gaussian_mechanism(z: float, steps: int) -> None:
    """Balle and Wang, arXiv 1805.06530, theorem 8; T Gaussians are one of z / sqrt(T)."""
    sigma = z / math.sqrt(steps)

    def delta_at(eps: float) -> float:
        return norm.cdf(0.5 / sigma - eps * sigma) - math.exp(eps) * norm.cdf(-0.5 / sigma - eps * sigma)

    exact = brentq(lambda eps: delta_at(eps) - 1e-5, 0, 100)
    assert exact <= epsilon("pld", 1.0, z, steps) * (1 + 1e-9) < exact * 1.01


@pytest.mark.parametrize(("q", "z"), [(0.1, 1.0), (0.5, 2.0), (0.01, 0.6)])
def test_one_sampled_step_is_the_integral_of_its_definition(q: float, z: float) -> None:
    """delta(eps) = integral of max(0, p - e^eps p') for the two densities, in both directions."""
    x = np.linspace(-12 * z, 12 * z + 1, 2_000_001)
    without = norm.pdf(x, 0, z)
    there = (1 - q) * without + q * norm.pdf(x, 1, z)

    def delta_at(eps: float) -> float:
        directions = [(there, without), (without, there)]
        return max(float(np.trapezoid(np.maximum(0, a - math.exp(eps) * b), x)) for a, b in directions)

    exact = brentq(lambda eps: delta_at(eps) - 1e-5, 1e-6, 50, xtol=1e-6)
    assert exact * (1 - 1e-4) < epsilon("pld", q, z, 1) < exact * 1.01


@pytest.mark.parametrize(
    ("q", "z", "steps", "published"),
    [
        # Abadi et al., arXiv 1607.00133, section 3.2: moments accountant.
        (0.01, 4.0, 10_000, 1.26),
        # Bu, Dong, Long and Su 2020 (doi 10.1162/99608f92.cfc5dd25), figure 4: MNIST, epochs of 60,000 / 256 steps.
        (256 / 60_000, 1.3, 20 * 234, 1.34),
        (256 / 60_000, 0.7, 70 * 234, 8.68),
    ],
)
def test_published_values_of_the_moments_accountant(q: float, z: float, steps: int, published: float) -> None:
    """Today's conversion from Renyi divergences is tighter than theirs, and privacy loss distributions than both."""
    by_renyi, by_distributions = epsilon("rdp", q, z, steps), epsilon("pld", q, z, steps)
    assert 0.8 * published < by_renyi <= published
    assert 0.7 * published < by_distributions <= by_renyi


@pytest.mark.parametrize(("q", "z", "steps"), SETTINGS)
def test_renyi_accounting_never_says_less(q: float, z: float, steps: int) -> None:
    tight, loose = epsilon("pld", q, z, steps), epsilon("rdp", q, z, steps)
    assert tight <= loose < 1.6 * tight


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize(("q", "steps", "target"), [(0.1, 20, 8.0), (0.2, 30, 2.0), (0.02, 500, 1.0)])
def test_calibration_is_tight(accountant: str, q: float, steps: int, target: float) -> None:
    z = calibrate(accountant, q, steps, 1e-5, target)  # type: ignore[arg-type]
    assert epsilon(accountant, q, z, steps) <= target
    assert epsilon(accountant, q, z * 0.998, steps) > target


def test_epsilon_grows_with_steps_and_without_noise_there_is_none() -> None:
    budget = Budget(0.1, 1.0, 1e-5)
    spent = [budget.epsilon(steps) for steps in range(4)]
    assert spent[0] == 0
    assert spent == sorted(set(spent))
    nothing = Budget(0.1, 0.0, 1e-5)
    assert nothing.epsilon(1) == math.inf
    assert nothing.told(3, "client", "round")["epsilon"] is None
    assert "no differential privacy" in nothing.told(3, "client", "round")["said"]


@pytest.mark.parametrize("most", [1.0, 2.5, 3.2, 100.0])
def test_what_a_budget_affords_is_its_last_step(most: float) -> None:
    budget = Budget(0.1, 1.0, 1e-5, "pld", most)
    steps = budget.affordable(40)
    assert steps == 40 or budget.epsilon(steps + 1) > most
    assert budget.epsilon(steps) <= most


def test_epsilon_is_said_with_all_that_it_means() -> None:
    said = Budget(0.1, 1.0, 1e-5).told(20, "client", "round")["said"]
    assert said == (
        "epsilon 3.59 at delta 1e-05 after 20 rounds, add/remove one client, Poisson q=0.1;"
        " runs on the same data add up"
    )
