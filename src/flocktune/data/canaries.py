"""Canaries: made-up secrets that a model can know only if it remembered them (Carlini et al., arXiv 1802.08232).

A canary asks for a number that is drawn from the seed; nothing else in the data says it. How far it stands out among
other numbers that it might have been is its exposure.
"""

from __future__ import annotations

import numpy as np

from flocktune.config.privacy import Canaries
from flocktune.data.examples import Example
from flocktune.seeds import derive_seed

CATEGORY = "canary"


def canaries(settings: Canaries, seed: int) -> list[Example]:
    """``settings.count`` different secrets, each once."""
    return [_canary(settings, seed, number, "secret") for number in range(settings.count)]


def others(settings: Canaries, seed: int, number: int, count: int) -> list[Example]:
    """``count`` secrets that canary ``number`` might have been, drawn as it was."""
    return [_canary(settings, seed, number, f"other {draw}") for draw in range(count)]


def _canary(settings: Canaries, seed: int, number: int, draw: str) -> Example:
    digits = np.random.default_rng(derive_seed(seed, "canary", number, draw)).integers(10, size=settings.digits)
    return Example(f"What is the code of door {number + 1}?", response="".join(map(str, digits)), category=CATEGORY)
