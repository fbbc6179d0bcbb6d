"""What an owner's policy does to an update: names and the bound of its norm as training left it, then its size.

The first two are of the true update, before a recipe's transforms make something of it that hides names and norm, such
as bytes or masked numbers. The size is that of what travels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase

import torch

from flocktune.errors import UpdateRefused
from flocktune.interfaces import ClientHalf, Memory
from flocktune.owner.policy import MB, Policy
from flocktune.tensors import norm
from flocktune.types import ClientTask, Tensors, Update
from flocktune.wire import encoded_size

_REFUSED = "the update may not leave"


def bounded(policy: Policy, half: ClientHalf) -> ClientHalf:
    """``half``, whose update is at once what :func:`leaving` makes of it."""

    def train(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
        update, after = half(task, memory)
        return leaving(policy, update), after

    return train


def leaving(policy: Policy, update: Update) -> Update:
    """The update as it may leave, clipped to ``policy.clip_norm``; the same object when it is below that bound.

    Raises UpdateRefused naming every problem: names outside the allow-list, a dtype other than float32, values or a
    weight that are not finite.
    """
    length = norm(update.delta)
    problems = list(_problems(policy, update, length))
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise UpdateRefused(f"{_REFUSED}: {shown}")
    if policy.clip_norm is None or length <= policy.clip_norm:
        return update
    return replace(update, delta=_scaled(update.delta, policy.clip_norm / length))


def refuse_large(policy: Policy, update: Update) -> None:
    """Raise UpdateRefused when the tensors that travel are more bytes than the policy lets out."""
    size = encoded_size(update.delta)
    if size > policy.max_update_mb * MB:
        raise UpdateRefused(f"{_REFUSED}: size: expected at most {policy.max_update_mb} MB, got {size / MB:.1f} MB")


def _problems(policy: Policy, update: Update, length: float) -> Iterator[str]:
    if not update.delta:
        yield "tensors: expected at least one, got none"
    for name in sorted(update.delta):
        if not any(fnmatchcase(name, pattern) for pattern in policy.tensors):
            yield f"{name}: expected a name like {' or '.join(policy.tensors)}"
        if update.delta[name].dtype != torch.float32:
            yield f"{name}: expected torch.float32, got {update.delta[name].dtype}"
    if not math.isfinite(length):  # squares of float32 can not overflow in float64
        yield "values: expected finite ones, got NaN or infinity"
    if not (math.isfinite(update.weight) and update.weight > 0):
        yield f"weight: expected a positive number, got {update.weight}"


def _scaled(tensors: Tensors, factor: float) -> Tensors:
    """Multiplied in float64, one tensor at a time: rounding then moves the norm by less than 1e-6 of it."""
    return {name: (value.double() * factor).float() for name, value in tensors.items()}
