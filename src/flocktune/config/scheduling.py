"""Who takes part in a round: settings of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from flocktune.config.numbers import Count, Fraction, NonNegative, Positive


@dataclass(frozen=True)
class Uniform:
    """A random cohort of ``fraction`` of the clients, without replacement."""

    fraction: Fraction = 1.0
    kind: Literal["uniform"] = "uniform"


@dataclass(frozen=True)
class BySize:
    """As uniform, but a client is drawn with probability in proportion to its rows."""

    fraction: Fraction = 0.5
    kind: Literal["by_size"] = "by_size"


@dataclass(frozen=True)
class RoundRobin:
    """Cohorts go around a list of clients that is shuffled once."""

    fraction: Fraction = 0.5
    kind: Literal["round_robin"] = "round_robin"


@dataclass(frozen=True)
class Availability:
    """Uniform among the clients that are there: ``trace`` is a JSON file, client -> list of 0/1 by round, repeating."""

    trace: str
    fraction: Fraction = 0.5
    kind: Literal["availability"] = "availability"


@dataclass(frozen=True)
class Named:
    """Always these clients."""

    clients: Annotated[tuple[str, ...], Field(min_length=1)]
    kind: Literal["named"] = "named"


@dataclass(frozen=True)
class Poisson:
    """Every client takes part with probability ``fraction``, independently of the others: a cohort may be empty.

    With differential privacy of kind ``user`` the draw is secret, else it follows from the seed.
    """

    fraction: Fraction = 0.1
    kind: Literal["poisson"] = "poisson"


Selection: TypeAlias = Annotated[
    Uniform | BySize | RoundRobin | Availability | Named | Poisson, Field(discriminator="kind")
]


@dataclass(frozen=True)
class Buffered:
    """FedBuff (arXiv 2106.06639): clients work at their own pace, and a round is over when ``size`` have given updates.

    ``concurrency``: clients at work at once, each drawn among those that are not. An update that was begun ``s`` rounds
    ago counts ``(1 + s) ** -staleness_exponent`` times its weight; with ``s`` above ``max_staleness`` it is left out.
    """

    size: Positive
    concurrency: Positive
    staleness_exponent: NonNegative = 0.5
    max_staleness: Count | None = None


@dataclass(frozen=True)
class SchedulingConfig:
    """Who takes part in a round.

    The cohort is ``max(1, floor(fraction * clients + 0.5))`` clients. ``over_select`` more (a fraction
    of the cohort, rounded up) are asked, and the first ``cohort`` usable updates in task order count.
    ``quorum``: the fraction of the cohort (rounded up) that must answer, else the round fails. ``buffered``: rounds
    without cohort and quorum; methods with one client at a time ignore it.
    """

    selection: Selection = field(default_factory=Uniform)
    over_select: NonNegative = 0.0
    quorum: Fraction = 0.5
    buffered: Buffered | None = None
