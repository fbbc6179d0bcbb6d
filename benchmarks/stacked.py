"""Ten clients' local training at once on one base, beside the same clients one after another.

Both do what a round of the in-process engine does for its clients: the same tasks, batches and steps; the updates are
compared. The floor: the base's own forward pass and the gradients of its activations, for all clients' tokens in one
batch, with nothing trained. One after another's share of that is the most that stacking can give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.networks import frozen_base, sharing
from benchmarks.paired import Options, Result, Spread, interleaved, ratio, say, timed
from flocktune.algorithms import fedavg
from flocktune.algorithms.local import ClientData
from flocktune.config.engines import InProcessEngine
from flocktune.config.schema import Columns, LocalConfig, LoraConfig, ModelConfig
from flocktune.data.batching import Batch, training_batches
from flocktune.data.encoding import encode
from flocktune.data.merging import merged
from flocktune.data.sources import read_examples
from flocktune.engine.in_process import InProcess
from flocktune.models.load import load_model, load_tokenizer, pad_id
from flocktune.models.lora import Adapter, attach
from flocktune.seeds import derive_seed
from flocktune.stacking import together
from flocktune.training import next_token_loss
from flocktune.types import ClientTask, Update

GOAL = 2.5
CLIENTS = 10
TOLERANCE = 1e-3
"""Of the clients' mean losses: steps of AdamW turn the rounding of a small gradient into a whole learning rate."""
ALONE, TOGETHER, FLOOR = "one after another", "stacked", "floor"


def run(options: Options) -> Result:
    """Batches of 1, 2, 4 and 8 rows. Raises RuntimeError when both do not learn the same."""
    sizes, steps, turns = ((1, 2), 2, 1) if options.quick else ((1, 2, 4, 8), 10, 7)
    tokenizer = load_tokenizer(ModelConfig(options.model))
    examples = read_examples(options.data, Columns(), max_rows=200 if options.quick else 2000)
    encoded, _ = encode(examples, tokenizer, template="short", max_tokens=256, train_on="responses")
    base: Any = load_model(ModelConfig(options.model), torch.device("cpu"))
    adapter = attach(sharing(base), LoraConfig(), seed=0)
    frozen = frozen_base(sharing(base), list(adapter.layers))
    found: dict[int, Mapping[str, Sequence[float]]] = {}
    tokens: dict[int, float] = {}
    for size in sizes:
        say(f" batches of {size}")
        drawn = partial(_batches, encoded, size, pad_id(tokenizer), steps)
        plan = [drawn(derive_seed(_seed(client), "batches"), client) for client in range(CLIENTS)]
        tokens[size] = sum(batch.tokens for batches in plan for batch in batches) / steps / CLIENTS
        engines = _engines(adapter, LocalConfig(steps=steps, batch_size=size), drawn)
        work = {name: partial(_round, engine, adapter) for name, engine in engines.items()}
        _compare(*(each() for each in work.values()))
        measures = {name: lambda turn, each=each: timed(each) for name, each in work.items()}
        measures[FLOOR] = lambda turn, plan=plan: timed(lambda: _floor(frozen, plan))
        found[size] = interleaved(measures, turns)
    return _result(options, found, tokens, steps)


def _batches(encoded: Any, size: int, pad: int, steps: int, seed: int, client: int) -> list[Batch]:
    rows = range(client, len(encoded.lengths), CLIENTS)
    drawn = training_batches(
        encoded, rows, batch_size=size, batching="padded", pad_id=pad, seed=seed, steps=steps, epochs=None
    )
    return list(drawn)


def _engines(adapter: Adapter, local: LocalConfig, drawn: Any) -> dict[str, InProcess]:
    def data(name: str) -> ClientData:
        client = int(name)
        return ClientData(1, 1, lambda seed, steps, epochs: drawn(seed, client))

    half = fedavg.client_half(adapter, data, local, "equal", rounds=1)
    stack = together(InProcessEngine(stack=CLIENTS), adapter, list(adapter.parameters))
    if stack is None:
        raise RuntimeError("expected a model whose clients can be trained at once")
    return {ALONE: InProcess(half), TOGETHER: InProcess(half, together=stack)}


def _seed(client: int) -> int:
    return derive_seed(0, client)


def _round(engine: InProcess, adapter: Adapter) -> list[float]:
    """Every client's mean loss."""
    adapter.reset(0)
    start = adapter.tensors()
    tasks = (ClientTask(0, str(client), fedavg.KIND, start, _seed(client), "") for client in range(CLIENTS))
    replies = list(engine.run(tasks, CLIENTS))
    failed = [reply for reply in replies if not isinstance(reply, Update)]
    if failed:
        raise RuntimeError(f"a client failed: {failed[0]}")
    return [reply.metrics["loss"].value for reply in replies if isinstance(reply, Update)]


def _compare(alone: Sequence[float], stacked: Sequence[float]) -> None:
    difference = max(abs(one / other - 1) for one, other in zip(alone, stacked, strict=True))
    if not difference <= TOLERANCE:
        raise RuntimeError(f"both did not learn the same: losses differ by {difference:.1e}")


def _floor(frozen: Any, plan: Sequence[Sequence[Batch]]) -> None:
    for step in zip(*plan, strict=True):
        next_token_loss(frozen, merged(step, packed=True).batch).backward()


def _result(
    options: Options, found: Mapping[int, Mapping[str, Sequence[float]]], tokens: Mapping[int, float], steps: int
) -> Result:
    times = {size: ratio(each[ALONE], each[TOGETHER]) for size, each in found.items()}
    judged = {size: each for size, each in times.items() if size <= 4}
    rows = [
        (
            f"{size} rows, {tokens[size]:.0f} tokens a client",
            *(f"{1000 * Spread.of(each[way]).median / steps:.0f}" for way in (ALONE, TOGETHER, FLOOR)),
            str(times[size]),
            f"{ratio(each[ALONE], each[FLOOR]).median:.2f}",
            f"{ratio(each[TOGETHER], each[FLOOR]).median:.2f}",
        )
        for size, each in found.items()
    ]
    return Result(
        title=f"{CLIENTS} clients at once on one base",
        goal=f"at least {GOAL} times as fast as one after another, batches of 1 to 4",
        met=None if options.quick else all(each.median >= GOAL for each in judged.values()),
        header=(
            "a client's batch",
            "one after another, ms a step of all",
            "stacked",
            "floor",
            "one after another / stacked",
            "one after another / floor, the most there is",
            "stacked / floor",
        ),
        rows=rows,
        notes=(f"LoRA rank 8 on all linear layers, {steps} steps, float32, {options.threads} thread(s); medians.",),
        values={str(size): {"seconds": dict(each), "ratio": times[size].median} for size, each in found.items()},
        measured="; ".join(f"batch {size}: {each.median:.2f}" for size, each in times.items()),
        floor="the base's forward pass and the gradients of its activations for all tokens at once, nothing trained",
    )
