"""The nouns of a federation. Everything that crosses a boundary is one of these values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Tensors: TypeAlias = "Mapping[str, Tensor]"
"""Named tensors on the CPU. Names are canonical: module path + factor, no wrapper prefixes."""

A_SUFFIX, B_SUFFIX = ".lora_A", ".lora_B"
"""How the names of a module's two factors end."""


@dataclass(frozen=True)
class AtMost:
    """In what is expected of a message: bytes in one dimension, whose number is known only when they come."""

    count: int


Expected: TypeAlias = "Mapping[str, Tensor | AtMost]"
"""What must come: names with shapes and dtypes (values do not matter), or with the most bytes."""


@dataclass(frozen=True)
class Mean:
    """A mean that can be merged: ``total / count``. Every metric is one.

    Perplexity is ``exp`` of a merged mean loss, never a mean of perplexities.
    """

    total: float = 0.0
    count: float = 0.0

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        """The mean itself; NaN when nothing was counted."""
        return self.total / self.count if self.count else math.nan


@dataclass(frozen=True)
class ClientTask:
    """What the server asks of one client in one round.

    ``seed`` fixes every random draw of the client's half; ``config_digest`` names the recipe that
    both sides must hold, ``model_digest`` the model: the base, or the emulator.
    """

    round: int
    client: str
    kind: str
    tensors: Tensors
    seed: int
    config_digest: str
    model_digest: str = ""


@dataclass(frozen=True)
class Update:
    """What comes back: a change of tensors, and how much it counts. Closed under merging.

    ``delta`` is trained minus received, float32. ``weight`` > 0 is in the unit of the recipe
    (examples, tokens, or 1). ``clients`` is how many clients are inside.
    """

    delta: Tensors
    weight: float
    clients: int = 1
    metrics: Mapping[str, Mean] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """A client that gave no usable update, and why. A value, never an exception."""

    client: str
    reason: str


def merge_metrics(left: Mapping[str, Mean], right: Mapping[str, Mean]) -> dict[str, Mean]:
    """Merge two metric tables name by name; a name that only one side has is kept."""
    return {name: left.get(name, Mean()) + right.get(name, Mean()) for name in {**left, **right}}
