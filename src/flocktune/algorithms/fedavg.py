"""Federated averaging of adapters: FedIT (arXiv 2305.05644) and its relatives.

FedIT is FedAvg (arXiv 1602.05629) on LoRA factors: the server sends adapter w_t, client k trains it on its own
instructions to w_k, and w_{t+1} = w_t + step(sum_k p_k (w_k - w_t)). With the plain server step this is the paper's
``A <- sum p_k A_k, B <- sum p_k B_k``. FedProx is a penalty in the local loss (``local.proximal_mu``), FedOpt a
server step (``aggregation.server_optimizer``); base, local-only and centralised are settings too.

What we do differently from the published code: changes travel instead of values, at least two clients are averaged
when there are two, every draw has a seed, and a client whose update is not finite is left out with its reason.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from flocktune.aggregation import server_opt
from flocktune.aggregation.lora import aggregation_error
from flocktune.config.schema import AggregationConfig, LocalConfig
from flocktune.data.batching import Batch
from flocktune.interfaces import ClientHalf, Memory, ServerHalf, State
from flocktune.models.lora import Adapter, pairs
from flocktune.seeds import derive_seed
from flocktune.tensors import add_scaled, group, prefixed, subtract
from flocktune.training import fit, proximal_penalty
from flocktune.types import ClientTask, Mean, Tensors, Update

KIND = "fedavg"


def server_half(aggregation: AggregationConfig) -> ServerHalf:
    """State: ``adapter/*`` (float32) and the server optimiser's ``optimizer/*``."""
    settings = aggregation.server_optimizer

    def init(adapter: Tensors) -> State:
        return {**prefixed("adapter", adapter), **prefixed("optimizer", server_opt.init(settings, adapter))}

    def message(state: State, round: int) -> Tensors:
        return group(state, "adapter")

    def step(state: State, update: Update) -> State:
        adapter, optimizer = server_opt.step(settings, group(state, "adapter"), update.delta, group(state, "optimizer"))
        return {**prefixed("adapter", adapter), **prefixed("optimizer", optimizer)}

    def result(state: State) -> Tensors:
        return group(state, "adapter")

    return ServerHalf(init, message, step, result)


@dataclass(frozen=True)
class ClientData:
    """One client's instructions, ready to train on.

    ``batches(seed, steps, epochs)`` yields micro-batches; ``examples`` and ``tokens`` (label tokens) are what it
    may weigh by.
    """

    examples: int
    tokens: int
    batches: Callable[[int, int | None, int | None], Iterable[Batch]]


def client_half(
    adapter: Adapter,
    data: Callable[[str], ClientData],
    local: LocalConfig,
    weights: str,
    *,
    rounds: int,
) -> ClientHalf:
    """Local training of ``adapter`` (attached to a resident base model) on the client's own data.

    ``weights``: ``examples``, ``tokens`` or ``equal``. ``rounds`` is needed for a learning rate that runs over the
    whole run. The half keeps nothing between calls: the same task gives the same update. Raises NotFinite.
    """

    def train(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
        mine = data(task.client)
        steps = steps_per_round(local, mine.examples)
        whole_run = local.schedule_over == "run"
        micro_batches = None if local.steps is None else local.steps * local.accumulate
        batches = TimedBatches(mine.batches(derive_seed(task.seed, "batches"), micro_batches, local.epochs))
        adapter.load(task.tensors)
        metrics = fit(
            adapter.model,
            adapter.parameters,
            batches,
            local,
            total_steps=steps * rounds if whole_run else steps,
            first_step=steps * task.round if whole_run else 0,
            penalty=proximal_penalty(task.tensors, local.proximal_mu) if local.proximal_mu else None,
            seed=derive_seed(task.seed, "dropout"),
        )
        weight = {"examples": mine.examples, "tokens": mine.tokens, "equal": 1}[weights]
        metrics["data_seconds"] = Mean(batches.seconds, 1)
        return Update(subtract(adapter.tensors(), task.tensors), float(weight), 1, metrics), memory

    return train


class TimedBatches:
    """Batches as they come, and the seconds that were spent on making them."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = iter(batches)
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.seconds += time.perf_counter() - started


def diagnose(message: Tensors, updates: Sequence[Update]) -> dict[str, float]:
    """``aggregation_error``: what averaging A and B apart costs in this round, relative to the ideal change."""
    factors = [pairs(add_scaled(message, update.delta)) for update in updates]
    return {"aggregation_error": aggregation_error(factors, [update.weight for update in updates])}


def steps_per_round(local: LocalConfig, examples: int) -> int:
    """Optimiser steps of one client in one round."""
    if local.steps is not None:
        return local.steps
    batches = (local.epochs or 0) * math.ceil(examples / local.batch_size)
    return math.ceil(batches / local.accumulate)
