"""One client's local training, the same for every method; which tensors, loss and penalty is the method's choice."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from flocktune.algorithms.private_rows import PrivateRows
from flocktune.config.schema import LocalConfig
from flocktune.data.batching import Batch
from flocktune.gathering import gathered
from flocktune.models.lora import Adapter
from flocktune.seeds import derive_seed
from flocktune.stacked import Job, Prefix
from flocktune.tensors import subtract
from flocktune.training import (
    Adjust,
    Gradient,
    Loss,
    Penalty,
    fit,
    mean_gradient,
    next_token_loss,
    product_penalty,
    proximal_penalty,
)
from flocktune.types import ClientTask, Mean, Tensors, Update


@dataclass(frozen=True)
class ClientData:
    """One client's instructions, or pairs of answers, ready to train on.

    ``batches(seed, steps, epochs)`` yields micro-batches; ``examples`` and ``tokens`` (label tokens) are what it
    may weigh by. ``private``: rows that are hidden from everybody; batches are then theirs. ``loss`` is the one for
    these batches; ``told`` gives what it has to tell beside its mean.
    """

    examples: int
    tokens: int
    batches: Callable[[int, int | None, int | None], Iterable[Batch]]
    private: PrivateRows | None = None
    loss: Loss = next_token_loss
    told: Callable[[], Mapping[str, Mean]] = dict


def train_locally(
    adapter: Adapter,
    received: Tensors,
    task: ClientTask,
    data: ClientData,
    local: LocalConfig,
    weights: str,
    *,
    rounds: int,
    loss: Loss | None = None,
    prefix: Prefix | None = None,
    penalty: Penalty | None = None,
    gradient: Gradient = mean_gradient,
    adjust: Adjust | None = None,
) -> Update:
    """Train the tensors named in ``received`` (they, and all others, are loaded already) and return their change.

    ``loss``: default, that of ``data``; ``prefix``: what it starts from, where it is next-token loss. ``penalty`` is
    added to that of the recipe. ``weights``: ``examples``, ``tokens`` or ``equal``. ``rounds`` is needed for a learning
    rate that runs over the whole run. Where clients are gathered, this one is trained together with others. The same
    task gives the same update, to the rounding of sums when others are trained with it. Raises NotFinite.
    """
    # In the adapter's order, not that in which they came: sums over tensors (the gradient's norm) round by their order.
    received = {name: received[name] for name in adapter.parameters if name in received}
    settings, rows, gradient = _drawn(task, received, data, local, gradient)
    batches = TimedBatches(rows)
    whole_penalty = _sum_of(penalty, _proximal(adapter, received, local))
    total_steps, first_step = _schedule(local, data.examples, task.round, rounds)
    seed = derive_seed(task.seed, "dropout")
    turn = gathered()
    usual = gradient is mean_gradient and data.loss is next_token_loss and (loss is None or prefix is not None)
    if turn is not None and usual:
        start = adapter.snapshot()
        job = Job(
            adapter, tuple(received), start, batches, settings, total_steps, first_step, seed, whole_penalty, adjust,
            prefix,
        )  # fmt: skip
        done = turn.train(job)
        adapter.restore(replace(start, factors={**start.factors, **done.tensors}))  # as after training alone
        metrics, trained = dict(done.metrics), done.tensors
    else:
        with training_only(adapter, received) as parameters:
            metrics = fit(
                adapter.model,
                parameters,
                batches,
                settings,
                total_steps=total_steps,
                first_step=first_step,
                penalty=whole_penalty,
                seed=seed,
                loss=loss or data.loss,
                gradient=gradient,
                adjust=adjust,
            )
        trained = adapter.tensors(received)
    weight = {"examples": data.examples, "tokens": data.tokens, "equal": 1}[weights]
    metrics |= data.told()
    metrics["data_seconds"] = Mean(batches.seconds, 1)
    return Update(subtract(trained, received), float(weight), 1, metrics)


def _drawn(
    task: ClientTask, received: Tensors, data: ClientData, local: LocalConfig, gradient: Gradient
) -> tuple[LocalConfig, Iterable[Batch], Gradient]:
    """The settings, micro-batches and gradient of a task's steps: those that rows ask for that are hidden, if any are.

    Raises ValueError when the method makes a step's gradient as well.
    """
    if data.private is None:
        micro_batches = None if local.steps is None else local.steps * local.accumulate
        return local, data.batches(derive_seed(task.seed, "batches"), micro_batches, local.epochs), gradient
    if gradient is not mean_gradient:
        raise ValueError("differential privacy of rows makes a step's gradient, and so does this method")
    key = data.private.of_task(task, received)
    return data.private.settings_of(local), data.private.lots(key), data.private.gradient(key, local.batch_size)


def _proximal(adapter: Adapter, received: Tensors, local: LocalConfig) -> Penalty | None:
    """The recipe's proximal term around what was received."""
    if not local.proximal_mu:
        return None
    if local.proximal_on == "products":
        return product_penalty(received, local.proximal_mu, next(iter(adapter.layers.values())).scale)
    return proximal_penalty(received, local.proximal_mu)


def _schedule(local: LocalConfig, examples: int, round: int, rounds: int) -> tuple[int, int]:
    """Over how many steps the learning rate's schedule runs, and how many of them lie behind."""
    steps = steps_per_round(local, examples)
    return (steps * rounds, steps * round) if local.schedule_over == "run" else (steps, 0)


def _sum_of(*some: Penalty | None) -> Penalty | None:
    penalties = [penalty for penalty in some if penalty is not None]
    if len(penalties) < 2:
        return penalties[0] if penalties else None
    return lambda parameters: torch.stack([penalty(parameters) for penalty in penalties]).sum()


@contextmanager
def training_only(adapter: Adapter, names: Iterable[str]) -> Iterator[Mapping[str, nn.Parameter]]:
    """Inside, these factors alone want gradients: no graph is built below the lowest of them."""
    wanted = set(names)
    chosen = {name: value for name, value in adapter.parameters.items() if name in wanted}
    for name, parameter in adapter.parameters.items():
        parameter.requires_grad_(name in chosen)
    try:
        yield chosen
    finally:
        for parameter in adapter.parameters.values():
            parameter.requires_grad_(True)
        adapter.forget_inputs()


class TimedBatches:
    """Batches as they come, and the seconds that were spent on making them. A round that is broken off has no more."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = iter(batches)
        self._turn = gathered()
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._turn is not None:
            self._turn.stay()
        started = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.seconds += time.perf_counter() - started


def steps_per_round(local: LocalConfig, examples: int) -> int:
    """Optimiser steps of one client in one round."""
    if local.steps is not None:
        return local.steps
    batches = (local.epochs or 0) * math.ceil(examples / local.batch_size)
    return math.ceil(batches / local.accumulate)
