"""Settings of differential privacy, and of the canaries that an audit counts on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from flocktune.config.numbers import NonNegative, Positive, PositiveFloat

Share = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True)
class AdaptiveClipping:
    """The clip norm follows the ``quantile`` of clients' norms (arXiv 1905.03871): C <- C exp(-lr (within - quantile)).

    ``share``: of the budget that finding it costs, as a fraction of 1 / noise_multiplier ** 2.
    """

    quantile: Share = 0.5
    lr: PositiveFloat = 0.2
    share: Share = 0.1


@dataclass(frozen=True)
class UserPrivacy:
    """DP-FedAvg (arXiv 1710.06963): a client's whole update is clipped to ``clip_norm``, noise is added to the mean.

    Exactly one of ``noise_multiplier`` (the noise's standard deviation in units of the clip norm; 0 is no privacy) and
    ``epsilon`` (the noise is as large as all of the recipe's rounds need) is set. ``max_epsilon``: the run ends before
    the round that would exceed it. ``accountant``: privacy loss distributions, or Renyi, which says a larger epsilon.
    """

    clip_norm: PositiveFloat
    delta: Share
    noise_multiplier: NonNegative | None = None
    epsilon: PositiveFloat | None = None
    max_epsilon: PositiveFloat | None = None
    accountant: Literal["pld", "rdp"] = "pld"
    adaptive: AdaptiveClipping | None = None
    kind: Literal["user"] = "user"


@dataclass(frozen=True)
class SamplePrivacy:
    """DP-SGD (arXiv 1607.00133) by every client on its own rows: clipped row by row, noise in every step.

    A row's loss is the mean over its label tokens. ``clip_norm`` bounds a row's gradient. As for a user, exactly one of
    ``noise_multiplier`` and ``epsilon`` is set, and ``max_epsilon`` ends a client's part when its own rows' budget is
    spent. Batches are Poisson samples of ``local.batch_size * local.accumulate`` rows on average.
    """

    clip_norm: PositiveFloat
    delta: Share
    noise_multiplier: NonNegative | None = None
    epsilon: PositiveFloat | None = None
    max_epsilon: PositiveFloat | None = None
    accountant: Literal["pld", "rdp"] = "pld"
    kind: Literal["sample"] = "sample"


Privacy: TypeAlias = Annotated[UserPrivacy | SamplePrivacy, Field(discriminator="kind")]


@dataclass(frozen=True)
class Canaries:
    """Made-up secrets among one client's rows, for ``flocktune memorisation`` to look for (arXiv 1802.08232).

    ``count`` secrets of ``digits`` digits, ``repeats`` copies of each, with ``client`` (None: the first one).
    """

    client: str | None = None
    count: Positive = 8
    repeats: Positive = 1
    digits: Annotated[int, Field(ge=3, le=12)] = 6
