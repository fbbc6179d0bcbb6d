"""What needs a GPU: ``python -m benchmarks gpu``. The quick form runs the same on a tiny model, anywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from benchmarks.gpu import clients, stacked, utilisation
from benchmarks.gpu.models import SEVEN_B, TINY, Place
from benchmarks.paired import Options, Result, say

PARTS: Mapping[str, tuple[str, Callable[[Place], Result]]] = {
    "utilisation": (utilisation.GOAL_TOLD, utilisation.run),
    "stacked": (stacked.GOAL_TOLD, stacked.run),
    "FedBiOT": (clients.GOAL_TOLD, clients.run),
}


def run(options: Options) -> dict[str, Result]:
    """Every part, on the GPU; without one nothing but that is said, unless it is the quick form."""
    here = torch.cuda.is_available()
    if not here and not options.quick:
        return {name: _not_run(name, goal) for name, (goal, _) in PARTS.items()}
    place = Place(
        TINY if options.quick else SEVEN_B,
        torch.device("cuda" if here else "cpu"),
        torch.bfloat16 if here else torch.float32,
        options.quick,
    )
    results = {}
    for name, (_, measure) in PARTS.items():
        say(f" {name}")
        results[name] = measure(place)
        if here:
            torch.cuda.empty_cache()
    return results


def _not_run(name: str, goal: str) -> Result:
    return Result(f"On a GPU: {name}", goal, None, ("",), (), not_run="no GPU is here")
