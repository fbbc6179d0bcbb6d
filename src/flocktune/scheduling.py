"""Client scheduling: who takes part in a round. Pure, so a resumed run selects the same clients."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from flocktune.config.schema import Availability, BySize, Named, Poisson, RoundRobin, SchedulingConfig, Uniform
from flocktune.errors import Problem, UserError
from flocktune.seeds import derive_seed


@dataclass(frozen=True)
class Cohort:
    """One round's plan: whom to ask, how many updates are used, how many are needed."""

    asked: tuple[str, ...]
    wanted: int
    quorum: int


def cohort_size(fraction: float, clients: int) -> int:
    """``fraction`` of ``clients``, rounded half up, at least one: 0.29 of 100 is 29."""
    return max(1, math.floor(fraction * clients + 0.5 + 1e-9))


def select(
    scheduling: SchedulingConfig,
    sizes: Mapping[str, int],
    *,
    round: int,
    seed: int,
    trace: Mapping[str, Sequence[int]] | None = None,
    coins: NDArray[np.float64] | None = None,
) -> Cohort:
    """Choose the clients of one round from (seed, round) alone.

    ``sizes``: rows of every client, in the federation's order. ``trace``: see :func:`read_trace`, needed by
    availability only. ``coins``: a number in (0, 1) for each client, for poisson, in place of those of the seed.
    Raises UserError when ``named`` names an unknown client.
    """
    names = list(sizes)
    draw = np.random.default_rng(derive_seed(seed, round, "selection"))
    selection = scheduling.selection
    match selection:
        case Named(clients=wanted_names):
            UserError.raise_all(
                Problem("scheduling.selection.clients", f"names among {', '.join(names[:20])}", repr(name))
                for name in wanted_names
                if name not in sizes
            )
            return Cohort(wanted_names, len(wanted_names), math.ceil(scheduling.quorum * len(wanted_names)))
        case Poisson(fraction=fraction):
            drawn = draw.random(len(names)) if coins is None else coins
            present = tuple(name for name, coin in zip(names, drawn, strict=True) if coin < fraction)
            return Cohort(present, len(present), math.ceil(scheduling.quorum * len(present) - 1e-9))
        case Uniform() | BySize() | RoundRobin() | Availability():
            wanted = cohort_size(selection.fraction, len(names))
            asked = min(len(names), wanted + math.ceil(wanted * scheduling.over_select - 1e-9))
        case _:
            assert_never(selection)
    match selection:
        case Uniform():
            chosen = draw.permutation(len(names))[:asked]
        case BySize():
            weights = np.array([sizes[name] for name in names], dtype=np.float64)
            # Gumbel keys: sampling without replacement in proportion to size (Efraimidis and Spirakis 2006).
            with np.errstate(divide="ignore"):
                chosen = np.argsort(-(np.log(weights) + draw.gumbel(size=len(names))), kind="stable")[:asked]
        case RoundRobin():
            circle = np.random.default_rng(derive_seed(seed, "round_robin")).permutation(len(names))
            chosen = circle[(round * wanted + np.arange(asked)) % len(names)]
        case Availability():
            there = [i for i, name in enumerate(names) if _is_there((trace or {}).get(name), round)]
            chosen = draw.permutation(there)[:asked].astype(int)
        case _:
            assert_never(selection)
    return Cohort(tuple(names[i] for i in chosen), wanted, math.ceil(scheduling.quorum * wanted - 1e-9))


def read_trace(path: Path, clients: Sequence[str]) -> dict[str, list[int]]:
    """An availability trace: JSON, client -> list of 0/1 by round, repeated for ever. Raises UserError."""
    where = str(path)
    try:
        trace = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(Problem(where, "a JSON file: client -> list of 0/1 by round", str(error))) from None
    if not isinstance(trace, dict):
        raise UserError(Problem(where, "an object: client -> list of 0/1 by round", type(trace).__name__))
    problems = [Problem(where, f"an entry for client {name}", "none") for name in clients if name not in trace]
    for name, slots in trace.items():
        if not isinstance(slots, list) or not slots or any(slot not in (0, 1) for slot in slots):
            problems.append(Problem(f"{where}: {name}", "a list of 0 and 1, not empty", json.dumps(slots)[:80]))
    UserError.raise_all(problems)
    return trace


def _is_there(slots: Sequence[int] | None, round: int) -> bool:
    return slots is not None and bool(slots[round % len(slots)])
