"""One client's side of one task, in whatever process it runs: train, transform, or fail as a value.

And what the server makes of it: transforms are undone, and the update is checked, before it may touch the state.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from flocktune.errors import FlocktuneError, UpdateRefused
from flocktune.gathering import gathered
from flocktune.interfaces import ClientHalf, Memory, Transform
from flocktune.tensors import group, mismatches, prefixed, without
from flocktune.types import ClientTask, Expected, Failure, Mean, Tensors, Update

_LOG = logging.getLogger(__name__)


def transformed(half: ClientHalf, transforms: Sequence[Transform]) -> ClientHalf:
    """``half``, and the client sides of ``transforms`` after it, in their order.

    Each transform has the part of memory, and of what was received, that bears its name; ``half`` has the rest.
    """
    if not transforms:
        return half
    names = [transform.name for transform in transforms]

    def train(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
        update, kept = half(replace(task, tensors=without(task.tensors, *names)), without(memory, *names))
        for transform in transforms:
            update, own = transform.on_client(update, task, group(memory, transform.name))
            kept = {**kept, **prefixed(transform.name, own)}
        return update, kept

    return train


def on_wire(transforms: Sequence[Transform], expected: Tensors) -> Expected:
    """Names and shapes of what travels for an update of ``expected``."""
    return _stages(transforms, expected)[-1]


def _stages(transforms: Sequence[Transform], expected: Tensors) -> list[Any]:
    """What is expected before the first transform, after it, and so on: Tensors, and of the last one Expected."""
    stages: list[Any] = [expected]
    for transform in transforms:
        stages.append(transform.on_wire(stages[-1]))
    return stages


def refuse_count(update: Update, clients: int) -> None:
    """Raise UpdateRefused unless the update is of ``clients`` clients: one who said more would count as so many."""
    if update.clients != clients:
        raise UpdateRefused(f"update refused: clients: expected {clients}, got {update.clients}")


def restored(update: Update, transforms: Sequence[Transform], expected: Tensors) -> Update:
    """The update of ``expected`` names and shapes that came through ``transforms``. Raises UpdateRefused."""
    stages = _stages(transforms, expected)
    check_update(stages.pop(), update)
    for transform in reversed(transforms):
        update = transform.on_server(update, stages.pop())
    if transforms:
        check_update(expected, update)
    return update


def check_update(expected: Expected, update: Update) -> None:
    """Refuse an update that must not touch the state: every problem in one UpdateRefused.

    ``expected`` says which names, shapes and dtypes a delta has; it must be finite, with a positive finite weight.
    """
    problems = mismatches(expected, update.delta)
    if not (math.isfinite(update.weight) and update.weight > 0):
        problems.append(f"weight: expected a positive number, got {update.weight}")
    if update.clients < 1:
        problems.append(f"clients: expected at least 1, got {update.clients}")
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise UpdateRefused(f"update refused: {shown}")


def answer(task: ClientTask, half: ClientHalf, memory: Memory) -> tuple[Update | Failure, Memory]:
    """Run ``half``. Never raises for what goes wrong inside it.

    On failure the memory stays as it was. The metric ``seconds`` is added to the update.
    """
    turn = gathered()
    clock = turn.clock if turn else time.perf_counter
    started = clock()
    try:
        update, new_memory = half(task, memory)
    except Exception as error:  # a client's fault, whatever it is, must not end the others' run
        expected = isinstance(error, FlocktuneError)
        _LOG.warning("round %d, %s failed: %s", task.round, task.client, error, exc_info=not expected)
        return Failure(task.client, str(error) if expected else f"{type(error).__name__}: {error}"), memory
    seconds = Mean(clock() - started, 1)
    return replace(update, metrics={**update.metrics, "seconds": seconds}), new_memory
