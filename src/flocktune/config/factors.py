"""How LoRA factors are shared: by which rule updates become the next adapter, and which rank each client trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias, assert_never

from pydantic import Field

from flocktune.config.numbers import Fraction, Positive
from flocktune.errors import Problem
from flocktune.seeds import derive_seed

Rule: TypeAlias = Literal["fedit", "ffa_lora", "rolora", "flora", "fedex_lora", "flexlora", "hetlora", "fedsa_lora"]
"""What each computes stands in :mod:`flocktune.algorithms.factors`, with its source."""

NOT_A_MEAN: tuple[Rule, ...] = ("flora", "fedex_lora", "flexlora", "hetlora")
"""Rules that need every client's own update. The others are one weighted mean of changes."""

OTHER_RULES: tuple[Rule, ...] = ("ffa_lora", "rolora", "fedsa_lora", *NOT_A_MEAN)
"""All but the default."""

SIDED: tuple[Rule, ...] = ("flora", "fedex_lora")
"""Rules that keep what no factors of the rank can hold in a side adapter, which grows to full rank at most."""


@dataclass(frozen=True)
class ByName:
    """``ranks``: client -> rank; all others train ``lora.rank``."""

    ranks: Mapping[str, Positive]
    kind: Literal["by_name"] = "by_name"


@dataclass(frozen=True)
class RankClass:
    """Clients of one capacity: ``fraction`` of all train factors of ``rank``."""

    rank: Positive
    fraction: Fraction


@dataclass(frozen=True)
class ByClass:
    """Classes of capacity. Each client is drawn into one by the seed and its name alone, so the fractions are expected
    ones, and an owner's process, which knows no other client, draws the same."""

    classes: Annotated[tuple[RankClass, ...], Field(min_length=1)]
    kind: Literal["by_class"] = "by_class"


Ranks: TypeAlias = Annotated[ByName | ByClass, Field(discriminator="kind")]


def rank_of(ranks: Ranks | None, client: str, largest: int, seed: int) -> int:
    """The rank that ``client`` trains; ``largest`` is ``lora.rank``."""
    match ranks:
        case None:
            return largest
        case ByName():
            return ranks.ranks.get(client, largest)
        case ByClass():
            drawn, seen = derive_seed(seed, client, "rank") / 2**63, 0.0
            for one in ranks.classes:
                seen += one.fraction
                if drawn < seen:
                    return one.rank
            return ranks.classes[-1].rank
        case _:
            assert_never(ranks)


def rank_problems(ranks: Ranks | None, largest: int) -> Iterator[Problem]:
    """What is wrong with ``ranks``: they are at most ``largest``, and classes are all of the clients."""
    match ranks:
        case None:
            return
        case ByName():
            by_place = {f"ranks.ranks.{name}": rank for name, rank in ranks.ranks.items()}
        case ByClass():
            by_place = {f"ranks.classes.{place}.rank": one.rank for place, one in enumerate(ranks.classes)}
            whole = sum(one.fraction for one in ranks.classes)
            if abs(whole - 1) > 1e-6:
                yield Problem("ranks.classes", "fractions that sum to 1", f"{whole:g}")
        case _:
            assert_never(ranks)
    for where, rank in by_place.items():
        if rank > largest:
            yield Problem(
                where, f"at most lora.rank, {largest}", str(rank), "lora.rank is the server's and the largest."
            )
