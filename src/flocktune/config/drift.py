"""Corrections of client drift, as settings of a recipe: what :mod:`flocktune.algorithms.drift` computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from flocktune.config.numbers import PositiveFloat


@dataclass(frozen=True)
class Scaffold:
    """SCAFFOLD (arXiv 1910.06378): every step's gradient g becomes g - c_k + c, with control variates c_k and c.

    They travel: twice the bytes of an adapter, down and up.
    """

    kind: Literal["scaffold"] = "scaffold"


@dataclass(frozen=True)
class FedDyn:
    """FedDyn (arXiv 2111.04263): a linear term and ``alpha / 2 ||w - w_t||^2`` in the local loss.

    ``alpha``: in nats a squared unit of the factors. Small moves the server far, large holds clients back.
    """

    alpha: PositiveFloat = 0.01
    kind: Literal["feddyn"] = "feddyn"


Correction: TypeAlias = Annotated[Scaffold | FedDyn, Field(discriminator="kind")]
