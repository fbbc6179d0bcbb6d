"""A run's adapter is looked at: on the rows that no client trains on, and client by client on rows of its own.

Every look is an event of the run's log.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from flocktune.algorithms import fedbiot
from flocktune.assemble import Assembly, evaluation_loss
from flocktune.choosing import VALIDATION
from flocktune.evaluation.evaluate import Evaluation, evaluate
from flocktune.interfaces import Memory, State
from flocktune.per_client import evaluations
from flocktune.report.summaries import emulator_dataset
from flocktune.resident import Base, Instructions
from flocktune.types import Tensors

HELD_OUT, TRIGGERED = "held_out", "triggered"
"""The names, in metrics, of the test rows: with the adapter in the whole model (FedBiOT: AdapFu), and with a backdoor's
trigger in them, the target as the answer. With FedBiOT's adapter on the emulator (AdapEmu) a name ends in _emulator.
Rows that choose have a name of their own: :data:`~flocktune.choosing.VALIDATION`."""

Emit = Callable[[dict[str, Any]], None]


def look_at_rows(
    fed: Assembly, emit: Emit, dataset: str, rows: Instructions, state: State, rounds_done: int, *, final: bool
) -> dict[str, Evaluation]:
    """The adapter of ``state`` in the whole model, and with FedBiOT on the emulator too. Without rows: nothing.

    ``final``: it is the result, and looked at on all test rows; else on the way, on as many as the recipe says.
    """
    results: dict[str, Evaluation] = {}
    if not rows.examples:
        return results
    plugged = {dataset: (fed.base, fed.server.result(state), rows)}
    if fed.emulated:
        plugged[emulator_dataset(dataset)] = (fed.emulated.base, fedbiot.emulator_result(state), rows)
    if dataset == HELD_OUT and fed.triggered and fed.triggered.examples:
        plugged[TRIGGERED] = (fed.base, fed.server.result(state), fed.triggered)
    for name, (base, adapter, asked) in plugged.items():
        started = time.perf_counter()
        results[name] = evaluate_adapter(fed, base, adapter, asked, on_the_way=not final or dataset == VALIDATION)
        numbers = {**results[name].as_dict(), "seconds": time.perf_counter() - started}
        emit(_event(name, rounds_done, numbers, final))
    return results


def look_at_clients(
    fed: Assembly, emit: Emit, result: Tensors, memories: Mapping[str, Memory], rounds_done: int, *, final: bool
) -> dict[str, Any]:
    """Client by client, on its own held-out rows."""
    found = {}
    for name, numbers in evaluations(fed, result, memories):
        emit(_event(name, rounds_done, numbers, final))
        found[name] = {"overall": numbers["overall"], "categories": {}}
    return found


def _event(dataset: str, rounds_done: int, numbers: Mapping[str, Any], final: bool) -> dict[str, Any]:
    of_the_result = {"final": True} if final else {}
    return {"event": "evaluation", "round": rounds_done, "dataset": dataset, **of_the_result, **numbers}


def evaluate_adapter(
    fed: Assembly, base: Base, adapter: Tensors, rows: Instructions, *, on_the_way: bool = False
) -> Evaluation:
    """Evaluate ``adapter`` in ``base`` on ``rows``, as ``fed`` evaluates its result or, ``on_the_way``, its rounds."""
    config, settings = fed.config, fed.config.evaluation
    if on_the_way and not settings.answers_on_the_way:
        settings = replace(settings, generate=False)
    base.adapter.load(adapter)
    return evaluate(
        base.model,
        base.tokenizer,
        rows.examples,
        rows.encoded,
        settings=settings,
        template=config.data.template,
        max_tokens=config.data.max_tokens,
        pad_id=base.pad_id,
        max_rows=settings.max_rows if on_the_way else None,
        preferences=evaluation_loss(fed, base),
    )
