"""What a run will cost, before anything is trained: parameters, bytes, steps, memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from rich.table import Table

from flocktune.algorithms.fedavg import steps_per_round
from flocktune.assemble import allocate_clients, check_context, given_adapter, scheduler
from flocktune.config.schema import RunConfig
from flocktune.errors import FlocktuneError, Problem, UserError
from flocktune.models.load import describe, load_skeleton, pick_device
from flocktune.models.lora import shapes
from flocktune.report.tables import format_bytes
from flocktune.report.trackers import refuse_missing


@dataclass(frozen=True)
class Estimate:
    """Costs of a run. Bytes are of float32 factors; memory is a rough upper figure, said to be an estimate."""

    base_parameters: int
    trainable_parameters: int
    clients: int
    cohort: int
    train_rows: int
    test_rows: int
    untrainable_rows: int
    rows_per_client: tuple[int, float, int]
    adapter_bytes: int
    round_bytes_down: int
    round_bytes_up: int
    steps_total: int
    tokens_total: int
    memory_bytes: int


def estimate(config: RunConfig) -> Estimate:
    """Check recipe, files and model, and count. Raises UserError naming every problem that was found."""
    problems: list[Problem | str] = []

    def attempt(step):  # type: ignore[no-untyped-def]
        try:
            return step()
        except UserError as error:
            problems.extend(error.problems)
            return None

    skeleton = attempt(lambda: load_skeleton(config.model))
    factors = attempt(lambda: shapes(skeleton, config.lora)) if skeleton is not None else None
    attempt(lambda: pick_device(config.runtime.device))
    attempt(lambda: refuse_missing(config))
    data = attempt(lambda: allocate_clients(config))
    schedule = attempt(lambda: scheduler(config, data.clients)) if data is not None else None
    base = describe(config.model, skeleton) if skeleton is not None else None
    if skeleton is not None and data is not None:
        attempt(lambda: check_context(config, data, skeleton))
    if config.lora.start_from is not None and factors is not None:
        expected = {name: torch.empty(shape, device="meta") for name, shape in factors.items()}
        attempt(lambda: given_adapter(config.lora, expected))
    if problems:
        raise UserError(*dict.fromkeys(problems))
    if base is None or factors is None or data is None or schedule is None:
        raise FlocktuneError("nothing was found wrong, yet the recipe could not be read")
    sizes = [len(rows) for rows in data.clients.values()]
    cohort = schedule(0).wanted
    trainable = sum(math.prod(shape) for shape in factors.values())
    steps = config.rounds * round(cohort * float(np.mean([steps_per_round(config.local, size) for size in sizes])))
    mean_tokens = len(data.train.encoded.tokens) / max(1, len(data.train.examples))
    rows_per_step = config.local.batch_size * config.local.accumulate
    return Estimate(
        base_parameters=base.parameters,
        trainable_parameters=trainable,
        clients=len(sizes),
        cohort=cohort,
        train_rows=sum(sizes),
        test_rows=len(data.test.examples),
        untrainable_rows=len(data.train.report.untrainable),
        rows_per_client=(min(sizes), float(np.median(sizes)), max(sizes)),
        adapter_bytes=4 * trainable,
        round_bytes_down=4 * trainable * cohort,
        round_bytes_up=4 * trainable * cohort,
        steps_total=steps,
        tokens_total=int(steps * rows_per_step * mean_tokens),
        memory_bytes=base.base_bytes + _training_bytes(config, trainable, base.layers, base.width, base.vocabulary),
    )


def _training_bytes(config: RunConfig, trainable: int, layers: int, width: int, vocabulary: int) -> int:
    """Factors, gradients and two AdamW moments (float32); activations of one micro-batch at full length.

    A decoder layer of Llama's shape keeps 19 (float32) to 21 (bfloat16) values of its width for a token, counted as
    saved tensors; 24 leaves room. One is kept when recomputing. Logits and their gradient: for half the tokens.
    """
    tokens = config.local.batch_size * config.data.max_tokens
    value_bytes = 2 if config.model.dtype == "bfloat16" else 4
    kept = 1 if config.model.gradient_checkpointing else 24
    activations = tokens * layers * width * kept * value_bytes
    logits = tokens * vocabulary * 4
    return 4 * 4 * trainable + activations + logits


def estimate_table(costs: Estimate) -> Table:
    """The estimate for a terminal."""
    smallest, middle, largest = costs.rows_per_client
    rows = {
        "base model": f"{costs.base_parameters:,} parameters, frozen",
        "trained": f"{costs.trainable_parameters:,} parameters "
        f"({100 * costs.trainable_parameters / costs.base_parameters:.2f} %)",
        "clients": f"{costs.clients}, {costs.cohort} a round",
        "rows": f"{costs.train_rows:,} to train on, {costs.test_rows:,} held out"
        + (f", {costs.untrainable_rows:,} with nothing to learn from" if costs.untrainable_rows else ""),
        "rows a client": f"{smallest:,} to {largest:,}, median {middle:,.0f}",
        "a round, down": f"{format_bytes(costs.round_bytes_down)} ({format_bytes(costs.adapter_bytes)} a client)",
        "a round, up": format_bytes(costs.round_bytes_up),
        "in all": f"{costs.steps_total:,} optimiser steps, about {costs.tokens_total:,} tokens",
        "memory": f"about {format_bytes(costs.memory_bytes)} beside libraries (an estimate)",
    }
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, text in rows.items():
        table.add_row(name, text)
    return table
