"""Which layers of a model are tuned, kept for the clients, and left out: pure index lists, no weights.

    full model   0 1 2 3 4 5 | 6 7      adapter: the last s of L layers (FedBiOT, arXiv 2406.17706, section 3.2)
    emulator     0   2     5 | 6 7      of the other n = L - s, m = round(n (1 - drop)) are kept; s = 2, drop = 0.5

With placement ``first_and_last`` (Offsite-Tuning, arXiv 2302.04870) the adapter is the first s and the last s layers.

L layers of the full model, s adapter layers (at one end), n layers between, m of them kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flocktune.config.schema import EmulatorConfig
from flocktune.errors import Problem, UserError
from flocktune.types import Tensors


@dataclass(frozen=True)
class SplitPlan:
    """Layers of the full model by their index there; what is in neither list is left out of the emulator.

    ``stack`` is the module path of the list of layers, such as ``model.layers``; the same in both models.
    """

    layers: int
    adapter: tuple[int, ...]
    kept: tuple[int, ...]
    stack: str

    @property
    def held(self) -> tuple[int, ...]:
        """The emulator's layers, in order, as indices of the full model."""
        return tuple(sorted(self.adapter + self.kept))

    @property
    def dropped(self) -> tuple[int, ...]:
        """What no client ever gets."""
        return tuple(index for index in range(self.layers) if index not in self.held)

    @property
    def top(self) -> int:
        """The first adapter layer above the emulator, in the full model: there the two models' hidden states meet."""
        return min(index for index in self.adapter if index > max(self.kept))

    @property
    def frozen(self) -> int:
        """How many layers of the emulator lie below its first adapter layer: a client never trains below them."""
        return self.held.index(min(self.adapter))

    def in_adapter(self, name: str) -> bool:
        """Whether a tensor or module of the EMULATOR belongs to the adapter."""
        match = self._indexed(name)
        return match is not None and self.held[int(match["index"])] in self.adapter

    def to_full(self, tensors: Tensors) -> Tensors:
        """The adapter's tensors out of the emulator's: emulator names -> names in the full model."""
        return {self._renamed(name, self.held): value for name, value in tensors.items() if self.in_adapter(name)}

    def to_emulator(self, tensors: Tensors) -> Tensors:
        """The inverse of :meth:`to_full`. Raises ValueError for a layer that the emulator does not have."""
        place = {full: own for own, full in enumerate(self.held)}
        return {self._renamed(name, place): value for name, value in tensors.items()}

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON; :func:`read_plan` reads it back."""
        return {"layers": self.layers, "adapter": list(self.adapter), "kept": list(self.kept), "stack": self.stack}

    def _renamed(self, name: str, index_of: Mapping[int, int] | Sequence[int]) -> str:
        match = self._indexed(name)
        try:
            return f"{self.stack}.{index_of[int(match['index'])]}.{match['rest']}"  # type: ignore[index]
        except (TypeError, LookupError):
            raise ValueError(f"expected a tensor of a layer below {self.stack} in both models, got {name}") from None

    def _indexed(self, name: str) -> re.Match[str] | None:
        return re.fullmatch(rf"{re.escape(self.stack)}\.(?P<index>\d+)\.(?P<rest>.+)", name)


def plan_split(
    layers: int, emulator: EmulatorConfig, *, stack: str, importance: Sequence[float] | None = None
) -> SplitPlan:
    """Split ``layers`` decoder layers as the recipe says. Raises UserError when nothing would be left between.

    ``importance``: of every layer, needed for ``choice: importance``; the m most important are kept.
    """
    ends = emulator.adapter_layers
    first = ends if emulator.placement == "first_and_last" else 0
    between = range(first, layers - ends)
    if len(between) < 1:
        wanted = f"{ends} at either end" if first else str(ends)
        raise UserError(
            Problem(
                "emulator.adapter_layers",
                f"fewer than the model's {layers} layers, with at least one left between",
                wanted,
                "Lower it.",
            )
        )
    count = round(len(between) * (1 - emulator.drop))
    if count < 1:
        raise UserError(
            Problem(
                "emulator.drop",
                f"a fraction that leaves one of {len(between)} layers",
                f"{emulator.drop:g}, which leaves none",
                "Lower it.",
            )
        )
    if emulator.choice == "importance":
        if importance is None or len(importance) != layers:
            raise ValueError(f"expected the importance of {layers} layers, got {importance}")
        kept = most_important([importance[index] for index in between], count)
    else:
        kept = evenly(len(between), count)
    adapter = (*range(first), *range(layers - ends, layers))
    return SplitPlan(layers, adapter, tuple(between[index] for index in kept), stack)


def evenly(layers: int, count: int) -> list[int]:
    """``int(i (n - 1) / (m - 1))`` for i = 0 .. m - 1: the first and the last are kept; of one, the first."""
    if count == 1:
        return [0]
    return [index * (layers - 1) // (count - 1) for index in range(count)]


def most_important(importance: Iterable[float], count: int) -> list[int]:
    """The indices of the ``count`` largest values, ascending; of equals the earlier are kept."""
    values = list(importance)
    return sorted(sorted(range(len(values)), key=lambda index: -values[index])[:count])


def read_plan(tree: Mapping[str, Any]) -> SplitPlan:
    """What :meth:`SplitPlan.as_dict` wrote. Raises KeyError, TypeError or ValueError for anything else."""
    adapter, kept = (tuple(int(index) for index in tree[key]) for key in ("adapter", "kept"))
    plan = SplitPlan(int(tree["layers"]), adapter, kept, str(tree["stack"]))
    held = adapter + kept
    within = len(set(held)) == len(held) and all(0 <= index < plan.layers for index in held)
    ascending = list(adapter) == sorted(adapter) and list(kept) == sorted(kept)
    if not (adapter and kept and within and ascending and max(adapter) > max(kept)):
        raise ValueError(f"expected different layers of {plan.layers}, got adapter {adapter} and kept {kept}")
    return plan
