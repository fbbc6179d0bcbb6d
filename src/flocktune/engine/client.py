"""One client's side of one task, in whatever process it runs: train, transform, or fail as a value."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace

from flocktune.errors import FlocktuneError
from flocktune.interfaces import ClientHalf, Memory, Transform
from flocktune.types import ClientTask, Failure, Mean, Update

_LOG = logging.getLogger(__name__)


def answer(
    task: ClientTask, half: ClientHalf, memory: Memory, transforms: Sequence[Transform] = ()
) -> tuple[Update | Failure, Memory]:
    """Run ``half`` and the client sides of ``transforms``. Never raises for what goes wrong inside them.

    On failure the memory stays as it was. The metric ``seconds`` is added to the update.
    """
    started = time.perf_counter()
    try:
        update, new_memory = half(task, memory)
        for transform in transforms:
            update = transform.on_client(update, task)
    except Exception as error:  # a client's fault, whatever it is, must not end the others' run
        expected = isinstance(error, FlocktuneError)
        _LOG.warning("round %d, %s failed: %s", task.round, task.client, error, exc_info=not expected)
        return Failure(task.client, str(error) if expected else f"{type(error).__name__}: {error}"), memory
    seconds = Mean(time.perf_counter() - started, 1)
    return replace(update, metrics={**update.metrics, "seconds": seconds}), new_memory
