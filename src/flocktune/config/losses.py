"""What a client minimises: the parts of a recipe that :mod:`flocktune.config.schema` takes up as ``local.loss``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from flocktune.config.numbers import PositiveFloat


@dataclass(frozen=True)
class NextToken:
    """Instruction tuning: the mean negative log-likelihood of the label tokens."""

    kind: Literal["next_token"] = "next_token"


@dataclass(frozen=True)
class Dpo:
    """Preference tuning: direct preference optimisation (arXiv 2305.18290, equation 7), on rows with two answers.

    ``beta``: how much a log-probability ratio to the reference counts, per nat. ``label_smoothing``: the share of pairs
    whose order is taken to be wrong (conservative DPO). ``reference``: the base without an adapter, or the adapter that
    the run starts from, ``lora.start_from``; it then goes down with every message.
    """

    beta: PositiveFloat = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    reference: Literal["base", "start"] = "base"
    kind: Literal["dpo"] = "dpo"


LocalLoss: TypeAlias = Annotated[NextToken | Dpo, Field(discriminator="kind")]
