"""What verdicts come to: sums, Relative Score, wins and losses with their intervals, and what order did.

Q questions, D draws of a question. A draw is two verdicts on the same two answers, in both orders.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flocktune.evaluation.judge.verdicts import Verdict
from flocktune.evaluation.scores import interval
from flocktune.seeds import derive_seed

RESAMPLES = 10_000
_DRAWN_AT_ONCE = 1_000_000


@dataclass(frozen=True)
class Draw:
    """Both orders of one question: the baseline's answer shown first, and ours shown first."""

    baseline_first: Verdict
    ours_first: Verdict

    @property
    def leads(self) -> tuple[float, float]:
        """By how many points ours is ahead, in each order."""
        return self.baseline_first.second - self.baseline_first.first, self.ours_first.first - self.ours_first.second


@dataclass(frozen=True)
class Scored:
    """A question with at least one whole draw."""

    question: str
    category: str
    draws: Sequence[Draw]

    @property
    def baseline(self) -> float:
        """Mean score of the baseline's answer, over draws and orders."""
        return math.fsum(d.baseline_first.first + d.ours_first.second for d in self.draws) / (2 * len(self.draws))

    @property
    def ours(self) -> float:
        """Mean score of our answer, over draws and orders."""
        return math.fsum(d.baseline_first.second + d.ours_first.first for d in self.draws) / (2 * len(self.draws))


def outcome(lead: float) -> int:
    """1 ahead, -1 behind, 0 level: less than a billionth of a point is rounding."""
    return 0 if abs(lead) < 1e-9 else 1 if lead > 0 else -1


def summarise(questions: Sequence[Scored]) -> dict[str, Any]:
    """All figures of one pairing, ready for JSON; None where there is nothing to say.

    ``relative_interval``: 95 %, percentiles of :data:`RESAMPLES` bootstrap resamples of the questions, both answers of
    one staying together; it needs two questions. ``*_interval`` of wins and losses: 95 %, Wilson's.
    ``order_changes_winner``: the share of draws whose two orders do not name the same winner (a tie being one more
    outcome). ``first_place_points``: how many points standing first was worth, on average.
    """
    ours, baseline = [one.ours for one in questions], [one.baseline for one in questions]
    outcomes = [outcome(a - b) for a, b in zip(ours, baseline, strict=True)]
    draws = [draw for one in questions for draw in one.draws]
    turned = sum(outcome(draw.leads[0]) != outcome(draw.leads[1]) for draw in draws)
    ahead_by_place = math.fsum(draw.leads[1] - draw.leads[0] for draw in draws)
    count, wins, losses = len(questions), outcomes.count(1), outcomes.count(-1)
    return {
        "questions": count,
        "sum_baseline": math.fsum(baseline),
        "sum_ours": math.fsum(ours),
        "relative_score": math.fsum(ours) / math.fsum(baseline) if count else None,
        "relative_interval": relative_interval(ours, baseline),
        "wins": wins,
        "ties": outcomes.count(0),
        "losses": losses,
        "wins_interval": wilson(wins, count),
        "losses_interval": wilson(losses, count),
        "draws": len(draws),
        "order_changes_winner": turned / len(draws) if draws else None,
        "first_place_points": ahead_by_place / (2 * len(draws)) if draws else None,
    }


def relative_interval(ours: Sequence[float], baseline: Sequence[float]) -> list[float] | None:
    """95 % interval of sum(ours) / sum(baseline), over the Q questions; the same every time."""
    if len(ours) < 2:
        return None
    generator = np.random.default_rng(derive_seed(0, "judge", "bootstrap"))
    pairs = np.array([ours, baseline])  # 2 x Q
    at_once = max(1, _DRAWN_AT_ONCE // len(ours))
    ratios = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, at_once):
        rows = min(at_once, RESAMPLES - start)
        sums = pairs[:, generator.integers(len(ours), size=(rows, len(ours)))].sum(axis=2)  # 2 x rows
        ratios[start : start + rows] = sums[0] / sums[1]
    low, high = np.percentile(ratios, [2.5, 97.5])
    return [float(low), float(high)]


def wilson(count: int, of: int) -> list[float] | None:
    """Wilson's 95 % interval of a share."""
    return list(interval(count / of, of)) if of else None
