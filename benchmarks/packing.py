"""Packed batches beside padded ones of the same rows: is what padding cost saved, and is the loss the same?

Two ways to put rows together: shuffled, as most code does, and length-grouped, as ours are, with little padding left
to save. Three ways to compute them: padded; packed with transformers' mask of all tokens by all tokens; packed with
each row attending to itself (models/row_attention.py). Everything else is the product's own local loop on ready-made
batches from the same start. The floor: the padded time, less what is padding.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.paired import Options, Result, Spread, interleaved, ratio, timed
from flocktune.config.schema import Columns, LocalConfig, LoraConfig, ModelConfig
from flocktune.data.batching import Batch, Batching, collate, plan_batches, trainable_rows
from flocktune.data.encoding import Encoded, encode
from flocktune.data.sources import read_examples
from flocktune.models.load import load_model, load_tokenizer, pad_id
from flocktune.models.lora import Adapter, attach
from flocktune.models.row_attention import NAME
from flocktune.training import fit
from flocktune.types import Tensors

SAVED = 0.9
"""Of the share of padding, how much of it is to be saved."""
TOLERANCE, TOLERANCE_BF16 = 1e-4, 1e-2
"""Of the mean loss over all steps: rounding differs, and AdamW makes it visible."""
PADDED, MASKED, ROWS = "padded", "packed, one mask", "packed, row by row"
BATCHINGS: Mapping[str, Batching] = {PADDED: "padded", MASKED: "packed", ROWS: "packed"}


@dataclass(frozen=True)
class Measured:
    """One mix of rows: seconds by way and turn, the mean loss of each, and tokens with padding / without."""

    seconds: Mapping[str, Sequence[float]]
    losses: Mapping[str, float]
    share: float
    collating: float

    @property
    def times(self) -> Spread:
        """How many times as fast as padded rows."""
        return ratio(self.seconds[PADDED], self.seconds[ROWS])

    @property
    def met(self) -> bool:
        """Whether the padding is saved."""
        return self.times.median >= SAVED * self.share


def run(options: Options) -> Result:
    """All mixes. Raises RuntimeError when the ways do not come to the same loss."""
    steps, turns, rows = (2, 1, 4) if options.quick else (6, 3, 8)
    encoded, pad = _rows(options)
    found: dict[str, Measured] = {}
    for base in (ModelConfig(options.model), ModelConfig(options.model, dtype="bfloat16")):
        adapter = attach(load_model(base, torch.device("cpu")), LoraConfig(), seed=0)
        for name, plan in _plans(encoded, rows, steps).items():
            case = f"{Path(options.model).name}, {base.dtype}, {name}"
            found[case] = _measured(adapter, encoded, plan, pad, turns)
            _same_loss(found[case].losses, TOLERANCE if base.dtype == "float32" else TOLERANCE_BF16)
    return Result(
        title="Packed rows",
        goal=f"at least {SAVED:.0%} of (tokens with padding / without) times as fast as padded rows, in every case",
        met=None if options.quick else all(each.met for each in found.values()),
        header=(
            "",
            "padded, s",
            MASKED,
            ROWS,
            "tokens with padding / without, the most there is",
            "one mask: times as fast as padded",
            "row by row: times as fast as padded",
            "milliseconds to make a batch",
        ),
        rows=[_row(name, each) for name, each in found.items()],
        notes=(
            f"{steps} steps of {rows} rows, LoRA rank {LoraConfig().rank} on {LoraConfig().targets}; {turns} turns,"
            f" medians of processor seconds, which other processes do not lengthen as they do the clock's. Mean losses"
            f" differ by at most {max(_apart(each.losses) for each in found.values()):.0e} of their size.",
        ),
        values={name: asdict(each) for name, each in found.items()},
        measured="; ".join(f"{name}: {each.times.median:.2f} of {each.share:.2f}" for name, each in found.items()),
    )


def _rows(options: Options) -> tuple[Encoded, int]:
    tokenizer = load_tokenizer(ModelConfig(options.model))
    examples = read_examples(options.data, Columns(), max_rows=60 if options.quick else 2000)
    encoded, _ = encode(examples, tokenizer, template="short", max_tokens=256, train_on="responses")
    return encoded, pad_id(tokenizer)


def _plans(encoded: Encoded, rows: int, steps: int) -> dict[str, list[Any]]:
    """Which rows go together in each step."""
    chosen = trainable_rows(encoded, range(len(encoded.lengths)))
    order = np.random.default_rng(0).permutation(chosen)
    grouped = plan_batches(encoded.lengths[chosen], batch_size=rows, seed=0, steps=steps, epochs=None)
    return {
        "shuffled": [order[at : at + rows] for at in range(0, steps * rows, rows)],
        "length-grouped": [chosen[batch] for batch in grouped],
    }


def _measured(adapter: Adapter, encoded: Encoded, plan: Sequence[Any], pad: int, turns: int) -> Measured:
    start, losses = adapter.tensors(), dict[str, float]()
    batches = {
        batching: [collate(encoded, rows, batching=batching, pad_id=pad) for rows in plan]
        for batching in ("padded", "packed")
    }

    def way(name: str, _: int) -> float:
        with _attention(adapter.model, "sdpa" if name == MASKED else NAME):
            started = time.process_time()
            losses[name] = _train(adapter, start, batches[BATCHINGS[name]])
            return time.process_time() - started

    seconds = interleaved({name: partial(way, name) for name in BATCHINGS}, turns)
    adapter.load(start)
    padded, real = (sum(batch.input_ids.numel() for batch in each) for each in batches.values())
    collating = timed(lambda: [collate(encoded, rows, batching="packed", pad_id=pad) for rows in plan]) / len(plan)
    return Measured(seconds, losses, padded / real, collating)


def _train(adapter: Adapter, start: Tensors, batches: Sequence[Batch]) -> float:
    """The mean loss over all steps from ``start``."""
    adapter.load(start)
    settings = LocalConfig(steps=len(batches), lr=1e-3)
    return fit(adapter.model, adapter.parameters, batches, settings, total_steps=len(batches), seed=0)["loss"].value


@contextmanager
def _attention(model: Any, name: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _apart(losses: Mapping[str, float]) -> float:
    return (max(losses.values()) - min(losses.values())) / losses[PADDED]


def _same_loss(losses: Mapping[str, float], tolerance: float) -> None:
    if _apart(losses) > tolerance:
        raise RuntimeError(f"packed and padded rows did not train alike: {losses}")


def _row(name: str, found: Measured) -> tuple[str, ...]:
    masked = ratio(found.seconds[PADDED], found.seconds[MASKED])
    times = [str(Spread.of(found.seconds[way])) for way in BATCHINGS]
    share = f"{found.share:.2f}"
    return (name, *times, share, str(masked), str(found.times), f"{1000 * found.collating:.2g}")
