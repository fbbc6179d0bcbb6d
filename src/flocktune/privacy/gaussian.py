"""The Gaussian mechanism as one object: how contributions are bounded, which noise hides one, what that costs.

Apart, the three are easily of different minds: noise for another clip norm than was used, an epsilon for a sampling
that was not done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flocktune.privacy import accounting
from flocktune.privacy.accounting import Budget
from flocktune.privacy.noise import derive_key, normals
from flocktune.tensors import norm
from flocktune.types import Tensors

if TYPE_CHECKING:
    from dp_accounting import DpEvent

_MARGIN = 1 - 2.0**-20
"""What is scaled down ends below the bound, in spite of float32's rounding; so that clipping twice is clipping once."""


@dataclass(frozen=True)
class GaussianMechanism:
    """Sum of contributions, each clipped to ``clip_norm``, plus noise, over ``expected`` contributions.

    ``expected`` is how many contribute on average. It is fixed: a mean over those who came would tell how many.
    ``sampling`` is the probability with which each does; ``noise_multiplier`` is in units of ``clip_norm``.

    Formal guarantees: with Poisson sampling, one mean with its noise is what :meth:`event` says, for neighbours that
    differ by one contributor, and whoever sees it and all that is made of it, but not the single contributions. Normals
    are of 53 random bits and values are float32: attacks on the last bits of floating-point noise (Mironov 2012) are
    not accounted for. The key must be secret and uniform, and ChaCha20 indistinguishable from random.
    """

    clip_norm: float
    noise_multiplier: float
    expected: float
    sampling: float

    def factors(self, norms: Tensor) -> Tensor:
        """What contributions of these Euclidean norms are multiplied by: at most 1, so that none is above the bound."""
        return torch.where(norms > self.clip_norm, self.clip_norm * _MARGIN / norms, torch.ones_like(norms))

    def clipped(self, tensors: Tensors) -> tuple[Tensors, bool]:
        """``tensors``, all taken as one vector, within the bound; and whether they were before: then the same object.

        Raises nothing: what is not finite must be refused before.
        """
        size = norm(tensors)
        if size <= self.clip_norm:
            return tensors, True
        factor = float(self.factors(torch.tensor(size, dtype=torch.float64)))
        return {name: value * factor for name, value in tensors.items()}, False

    def noised(self, total: Tensors, key: bytes) -> dict[str, Tensor]:
        """``(total + noise) / expected``, in float32: noise of its own for every name, the same for the same key."""
        return {
            name: ((value.double() + self.noise(name, value.shape, key)) / self.expected).float()
            for name, value in total.items()
        }

    def noise(self, name: str, shape: tuple[int, ...] | torch.Size, key: bytes) -> Tensor:
        """Noise for a sum, float64; zeros without noise."""
        if not self.noise_multiplier:
            return torch.zeros(tuple(shape), dtype=torch.float64)
        return self.noise_multiplier * self.clip_norm * normals(derive_key(key, "noise", name), tuple(shape))

    def event(self) -> DpEvent:
        """One use of the mechanism, for an accountant."""
        return accounting.event(self.sampling, self.noise_multiplier)

    def budget(self, delta: float, accountant: str, most: float) -> Budget:
        """What its uses cost; see :class:`Budget`."""
        return Budget(self.sampling, self.noise_multiplier, delta, accountant, most)  # type: ignore[arg-type]

    def with_clip_norm(self, clip_norm: float) -> GaussianMechanism:
        """The same with another bound; what it costs does not change."""
        return replace(self, clip_norm=clip_norm)


def sums_of(means: Mapping[str, Tensor], count: float) -> dict[str, Tensor]:
    """Means of ``count`` contributions as sums, float64."""
    return {name: value.double() * count for name, value in means.items()}
