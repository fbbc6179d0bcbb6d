"""Factors by their names: whole modules, those of a lower rank, and a side adapter's.

Shapes: A is [R, in], B is [out, R]; of a side adapter [R', in] and [out, R'], its scale inside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flocktune.seeds import derive_seed
from flocktune.types import A_SUFFIX, B_SUFFIX, Tensors
from flocktune.wire import SIDE_A, SIDE_B


def pairs(tensors: Tensors) -> dict[str, tuple[Tensor, Tensor]]:
    """Module path -> (A, B). Raises ValueError naming every factor that is half of nothing."""
    names = [name.removesuffix(A_SUFFIX) for name in tensors if name.endswith(A_SUFFIX)]
    alone = {name + suffix for name in names for suffix in (A_SUFFIX, B_SUFFIX)} ^ set(tensors)
    if alone:
        raise ValueError(f"expected lora_A and lora_B of each module; missing or without its half: {sorted(alone)}")
    return {name: (tensors[name + A_SUFFIX], tensors[name + B_SUFFIX]) for name in names}


def fresh(like: Tensors, seed: int) -> dict[str, Tensor]:
    """Factors to start from, of the names and shapes of ``like``, as PEFT draws them: A uniform within 1/sqrt(in), B
    zero. Each depends on its shape, its name and the seed alone."""
    drawn: dict[str, Tensor] = {}
    for name, value in like.items():
        drawn[name] = torch.zeros(value.shape)
        if name.endswith(A_SUFFIX):
            generator = torch.Generator().manual_seed(derive_seed(seed, "lora", name))
            nn.init.kaiming_uniform_(drawn[name], a=math.sqrt(5), generator=generator)
    return drawn


def cut(tensors: Tensors, rank: int) -> dict[str, Tensor]:
    """The first ``rank`` rows of every A and columns of every B, as copies; other tensors as they are."""
    found = dict(tensors)
    for name, value in tensors.items():
        if name.endswith(A_SUFFIX):
            found[name] = value[:rank].clone()
        elif name.endswith(B_SUFFIX):
            found[name] = value[:, :rank].clone(memory_format=torch.contiguous_format)
    return found


def fitted(tensors: Tensors, rank: int) -> dict[str, Tensor]:
    """Factors of lower rank with zeros up to ``rank``; other tensors as they are."""
    found = dict(tensors)
    for name, value in tensors.items():
        if name.endswith(A_SUFFIX):
            found[name] = F.pad(value, (0, 0, 0, rank - len(value)))
        elif name.endswith(B_SUFFIX):
            found[name] = F.pad(value, (0, rank - value.shape[1]))
    return found


def side_like(factors: Tensors, sides: Tensors) -> dict[str, Tensor]:
    """The shapes that a side adapter must have beside ``factors``: side_A says its rank, and side_B comes with it."""
    modules = {name.removesuffix(end) for name in sides for end in (SIDE_A, SIDE_B) if name.endswith(end)}
    expected: dict[str, Tensor] = {}
    for name in sorted(modules & {name.removesuffix(A_SUFFIX) for name in factors}):
        rank = sides[name + SIDE_A].shape[0] if name + SIDE_A in sides else 0
        a, b = factors[name + A_SUFFIX], factors[name + B_SUFFIX]
        expected |= {name + SIDE_A: without_values(rank, a.shape[1]), name + SIDE_B: without_values(b.shape[0], rank)}
    return expected


def rank_in(factors: Tensors) -> int:
    """Of any one of them: a client's are all of one rank."""
    name, value = next(iter(factors.items()))
    return value.shape[0] if name.endswith(A_SUFFIX) else value.shape[1]


def trained_in(tensors: Tensors) -> dict[str, Tensor]:
    """Of a message, the factors that are trained and come back: those of no group."""
    return {name: value for name, value in tensors.items() if "/" not in name and name.endswith((A_SUFFIX, B_SUFFIX))}


def of_side(name: str) -> bool:
    """Whether it is a tensor of a side adapter."""
    return name.endswith((SIDE_A, SIDE_B))


def sides(tensors: Tensors) -> dict[str, tuple[Tensor, Tensor]]:
    """Module path -> (side_A, side_B)."""
    modules = [name.removesuffix(SIDE_A) for name in tensors if name.endswith(SIDE_A)]
    return {name: (tensors[name + SIDE_A], tensors[name + SIDE_B]) for name in modules}


def named(modules: Mapping[str, tuple[Tensor, Tensor]], *ends: str) -> dict[str, Tensor]:
    """The inverse of :func:`pairs` and :func:`sides`; ``ends``: of A and of B."""
    return {name + end: value for name, pair in modules.items() for end, value in zip(ends, pair, strict=True)}


def without_values(*shape: int) -> Tensor:
    """A float32 tensor of this shape that takes no memory: something to compare with."""
    return torch.empty(1).expand(shape) if 0 not in shape else torch.empty(shape)
