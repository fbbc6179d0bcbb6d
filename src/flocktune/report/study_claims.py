"""What the paired seeds of a study say about its claims: the numbers, and the words for them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from flocktune.config.study import EVERY_SETTING, Claim
from flocktune.report.study_rows import Column, Row, StudyResult, in_setting, rows, settings_of
from flocktune.report.summaries import METRIC_NAMES, SHARES, Value, metric
from flocktune.report.tables import NOTHING, format_gap, format_metric


@dataclass(frozen=True)
class Paired:
    """Differences between two methods over the seeds that both have, positive where the claim says so.

    ``standard_error``: of the mean, None for a single seed. ``t`` and ``p`` (two-sided) are None for a single seed
    and where the differences do not vary, for then there is nothing to hold their mean against.
    """

    differences: Mapping[int, float]
    mean: float
    standard_error: float | None
    t: float | None
    p: float | None

    @property
    def above(self) -> bool | None:
        """Whether the difference is more than two standard errors above zero; None where that can not be said."""
        return None if self.standard_error is None or self.t is None else self.mean > 2 * self.standard_error


@dataclass(frozen=True)
class Tested:
    """A claim in one setting; ``paired`` is None when no seed has the metric of both methods."""

    claim: Claim
    setting: str
    paired: Paired | None


def checked_claims(result: StudyResult) -> Iterator[Tested]:
    """Every claim in every setting; one time where neither method knows settings."""
    found, once = rows(result), set(result.config.once)
    for claim in result.config.claims:
        without = not result.config.settings or {claim.better, claim.than} <= once
        for setting in [EVERY_SETTING] if without else settings_of(result.config):
            sides = {row.label: row for row in in_setting(found, setting)}
            values = [_values(sides.get(label), claim) for label in (claim.better, claim.than)]
            yield Tested(claim, setting, paired_difference(*values, rising=claim.metric in SHARES))


def paired_difference(better: Mapping[int, float], than: Mapping[int, float], *, rising: bool) -> Paired | None:
    """Compare two methods seed by seed (paired t-test, two-sided). None without a common seed.

    ``rising``: whether more is better; otherwise the differences change their sign.
    """
    sign = 1.0 if rising else -1.0
    common = [seed for seed in better if seed in than]
    differences = {seed: sign * (better[seed] - than[seed]) for seed in common}
    if not differences:
        return None
    values = list(differences.values())
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Paired(differences, mean, None, None, None)
    error = statistics.stdev(values) / len(values) ** 0.5
    # Rounding alone makes equal differences differ in the last bits, which is no deviation to test against.
    largest = max(map(abs, (*(better[seed] for seed in common), *(than[seed] for seed in common))))
    if error <= 1e-12 * largest:
        return Paired(differences, mean if abs(mean) > 1e-12 * largest else 0.0, 0.0, None, None)
    from scipy.stats import ttest_rel  # a second to import, for who makes claims

    test = ttest_rel([better[seed] for seed in common], [than[seed] for seed in common])
    return Paired(differences, mean, error, sign * float(test.statistic), float(test.pvalue))


def claim_words(item: Tested) -> str:
    """The claim as a sentence: who, in what, where."""
    claim = item.claim
    where = "" if item.setting == EVERY_SETTING else f", {item.setting}"
    return f"{claim.better} better than {claim.than}: {METRIC_NAMES[claim.metric]}{on_dataset(claim.dataset)}{where}"


def verdict(paired: Paired | None) -> str:
    """What may be said about a difference, and no more."""
    if paired is None:
        return "no seed has it of both: nothing can be said"
    if len(paired.differences) < 2:
        return "one seed: nothing can be said about chance"
    if paired.t is None:
        same = "no difference in any seed" if paired.mean == 0 else "the same difference in every seed"
        return f"{same}: no deviation to test against"
    if paired.above:
        weak = paired.p is not None and paired.p >= 0.05
        return "above two standard errors" + (", though p is not below 0.05: too few seeds to be sure" if weak else "")
    assert paired.standard_error is not None
    if paired.mean < -2 * paired.standard_error:
        return "the opposite, beyond two standard errors"
    return "within two standard errors: not shown"


def claims_grid(result: StudyResult) -> list[Column]:
    """Every claim with its paired difference; no columns when nothing is claimed."""
    items = list(checked_claims(result))
    if not items:
        return []

    def column(heading: str, cell: Callable[[Tested, Paired], str]) -> Column:
        texts = (NOTHING if item.paired is None else cell(item, item.paired) for item in items)
        return Column(heading, heading, tuple(texts))

    return [
        Column("Claim", "Claim", tuple(map(claim_words, items))),
        column("Difference", lambda item, paired: format_difference(item.claim.metric, paired.mean)),
        column("Standard error", lambda item, paired: _error(item.claim.metric, paired.standard_error)),
        column("t", lambda item, paired: NOTHING if paired.t is None else f"{paired.t:.2f}"),
        column("p", lambda item, paired: format_p(paired.p)),
        column("Seeds", lambda item, paired: str(len(paired.differences))),
        Column("What may be said", "What may be said", tuple(verdict(item.paired) for item in items)),
    ]


def claims_note(result: StudyResult) -> str:
    """How to read the claims, and how far to trust them."""
    seeds, several = len(result.config.seeds), len(list(checked_claims(result))) > 1
    note = "Differences are paired by seed and positive where the claim says so; of shares they are in points. "
    if seeds < 2:
        return note + "One seed says nothing about chance: no test was made."
    note += f"Two-sided paired t-test over {seeds} seeds"
    if seeds < 10:
        note += ": with so few, p-values are weak evidence either way"
    return note + (", and they are not corrected for the number of claims." if several else ".")


def claim_lines(result: StudyResult) -> list[str]:
    """Each claim in a line for the terminal."""
    lines = []
    for item in checked_claims(result):
        told = ""
        if item.paired is not None:
            told = f"{format_difference(item.claim.metric, item.paired.mean)}, "
            if item.paired.t is not None:
                told += f"standard error {_error(item.claim.metric, item.paired.standard_error)}, "
            if item.paired.p is not None:
                told += f"p {format_p(item.paired.p)}, "
        lines.append(f"{claim_words(item)}: {told}{verdict(item.paired)}")
    return lines


def format_difference(name: str, mean: float) -> str:
    """A difference with its sign: of shares in points."""
    return format_gap(name, Value(mean))


def format_p(p: float | None) -> str:
    """A p-value: three decimals, and no more zeros than can be believed."""
    return NOTHING if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def on_dataset(dataset: str) -> str:
    """What a metric's name is followed by: nothing for the held-out rows, which are meant unless something is said."""
    return {"held_out": "", "held_out_emulator": " AdapEmu"}.get(dataset, f" on {dataset}")


def _error(name: str, error: float | None) -> str:
    return NOTHING if error is None else format_metric(name, Value(error))


def _values(row: Row | None, claim: Claim) -> dict[int, float]:
    by_seed = {} if row is None else row.by_seed
    found = {seed: metric(summary, claim.dataset, claim.metric) for seed, summary in by_seed.items()}
    return {seed: value.mean for seed, value in found.items() if value is not None}
