"""Which features of a recipe go together. One table: ``check`` refuses by it, and docs/capabilities.md shows it.

A feature is something that a recipe asks for; a pair that is not in :data:`REFUSED` works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

from flocktune.config.schema import FEDERATED, RunConfig
from flocktune.errors import Problem


@dataclass(frozen=True)
class Feature:
    """``setting``: the key of a recipe that asks for it. ``used``: whether a recipe does."""

    title: str
    setting: str
    used: Callable[[RunConfig], bool]


FEATURES: Mapping[str, Feature] = {
    "baseline": Feature("base, local, centralised", "method", lambda config: config.method not in FEDERATED),
    "fedbiot": Feature("FedBiOT", "method", lambda config: config.method == "fedbiot"),
    "buffered": Feature(
        "buffered rounds",
        "scheduling.buffered",
        lambda config: config.scheduling.buffered is not None and config.method in FEDERATED,
    ),
}
"""Every feature that does not go with some other, by a short name."""

REFUSED: Mapping[tuple[str, str], str] = {}
"""Two features -> why they can not go together. Order as in :data:`FEATURES`."""


def refused(config: RunConfig) -> Iterator[Problem]:
    """A problem for each pair of features that this recipe asks for and that can not go together."""
    used = [name for name, feature in FEATURES.items() if feature.used(config)]
    for one, other in combinations(used, 2):
        if reason := REFUSED.get((one, other)):
            expected = f"nothing that does not go with {FEATURES[one].title} ({FEATURES[one].setting})"
            yield Problem(FEATURES[other].setting, expected, FEATURES[other].title, reason)
