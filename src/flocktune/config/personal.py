"""Personalisation, as settings of a recipe: what :mod:`flocktune.algorithms.personal` computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from flocktune.config.numbers import NonNegative, Positive, PositiveFloat


@dataclass(frozen=True)
class Ditto:
    """Ditto (arXiv 2012.04221): beside its update, a client trains an adapter v of its own with
    ``lambda_ / 2 ||v - w_t||^2``, which never leaves it.

    ``steps``: optimiser steps a round on v; None is as many as ``local`` takes. ``keep``: write every client's own
    adapter to RUN/personal/CLIENT, as a PEFT adapter.
    """

    lambda_: NonNegative = 1.0
    steps: Positive | None = None
    keep: bool = False
    kind: Literal["ditto"] = "ditto"


@dataclass(frozen=True)
class FineTune:
    """After the last round every client trains the result on its own rows, ``steps`` optimiser steps.

    ``lr``: None is that of ``local``. ``keep``: as with Ditto.
    """

    steps: Positive = 10
    lr: PositiveFloat | None = None
    keep: bool = False
    kind: Literal["fine_tune"] = "fine_tune"


Personal: TypeAlias = Annotated[Ditto | FineTune, Field(discriminator="kind")]
