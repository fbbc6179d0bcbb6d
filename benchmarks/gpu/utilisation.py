"""How much of what the GPU's matrix products can do a step of LoRA does: packed rows, a frozen base.

The product's own local loop, beside PEFT's LoRA in the same loop and beside the frozen base alone, which is the floor.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import repeat
from typing import Any

from torch import nn

from benchmarks.both_clients import now
from benchmarks.gpu.models import Place, best, matmul_peak, peak_beside, weight_bytes
from benchmarks.lora_step import Variant
from benchmarks.networks import frozen_base, peft_network, sharing
from benchmarks.paired import Result, Spread, interleaved, ratio
from flocktune.config.schema import LocalConfig, LoraConfig, ModelConfig
from flocktune.data.batching import Batch, collate
from flocktune.models.load import load_model, quietly
from flocktune.models.lora import Adapter
from flocktune.training import fit, next_token_loss

GOAL = 0.60
GOAL_TOLD = f"model FLOP utilisation at least {GOAL:.2f} of the measured peak of matrix products"
OURS, PEFT, FLOOR, QUANTISED = "ours", "PEFT", "the frozen base alone", "ours, base in 4 bits"


def run(place: Place) -> Result:
    """Turns of all ways; the share of the peak that ours reaches."""
    shape, steps = place.shape, 2 if place.quick else 5
    peaks = matmul_peak(place)
    batch = collate(place.rows(shape.lengths), range(len(shape.lengths)), batching="packed", pad_id=0)
    batch = batch.to(place.device)
    ways, held = _ways(place, batch, steps)
    seconds = interleaved({name: partial(_turn, way, steps) for name, way in ways.items()}, 1 if place.quick else 5)
    memory = {name: held[name] + peak_beside(place.device, way) for name, way in ways.items()}
    flops = shape.step_flops(shape.lengths, batch.targets.numel())
    rates = {name: flops / Spread.of(spent).median for name, spent in seconds.items() if name != FLOOR}
    used = {name: rate / best(peaks) for name, rate in rates.items()}
    return Result(
        title="On a GPU: model FLOP utilisation",
        goal=GOAL_TOLD,
        met=None if place.quick else used[OURS] >= GOAL,
        header=(
            "",
            "ms a step",
            "tokens a second",
            "TFLOP/s",
            "of the peak",
            "times as long as the floor",
            "peak memory, GB",
        ),
        rows=[
            (
                name,
                f"{1000 * Spread.of(spent).median:.1f}",
                f"{shape.tokens / Spread.of(spent).median:.0f}",
                f"{rates[name] / 1e12:.3g}" if name in rates else "",
                f"{used[name]:.2f}" if name in used else "",
                str(ratio(spent, seconds[FLOOR])),
                f"{memory[name] / 1e9:.2f}",
            )
            for name, spent in seconds.items()
        ],
        notes=(
            f"{place.told} {len(shape.lengths)} packed rows of {', '.join(map(str, shape.lengths))} tokens, half of"
            f" them targets; AdamW. A step is {flops / 1e12:.4g} TFLOP: forward, the gradients of activations and of"
            " factors, causal attention within rows, the head at targets. Peak of products, TFLOP/s: "
            + ", ".join(f"{name}: {rate / 1e12:.4g}" for name, rate in peaks.items())
            + ".",
            *(() if QUANTISED in ways else ("The base in 4 bits was not run: bitsandbytes or CUDA is not here.",)),
        ),
        values={"seconds": seconds, "flops": flops, "peaks": peaks, "used": used, "memory": memory},
        measured=f"{used[OURS]:.2f}",
        floor="the frozen base's forward pass and the gradients of its activations;"
        f" {100 / ratio(seconds[OURS], seconds[FLOOR]).median:.0f} % of our step is that",
    )


def _ways(place: Place, batch: Batch, steps: int) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    """What takes ``steps`` steps each, and bytes of what it holds before it begins. The base's weights are shared."""
    base = place.model()
    ours = place.attached(sharing(base))
    usual = peft_network(sharing(base), LoraConfig(rank=place.shape.rank), ours.tensors())
    floor = Variant(partial(_mean_loss, frozen_base(sharing(base), list(ours.layers))), [])
    theirs = dict(enumerate(usual.trained))
    ways: dict[str, Callable[[], object]] = {
        PEFT: partial(_fit, usual.model, theirs, batch, steps),
        OURS: partial(_fit, ours.model, ours.parameters, batch, steps),
        FLOOR: partial(_steps, floor, batch, steps),
    }
    held = {PEFT: weight_bytes(usual.model), OURS: weight_bytes(ours.model), FLOOR: weight_bytes(base)}
    if place.device.type == "cuda" and importlib.util.find_spec("bitsandbytes"):
        packed = _quantised(place, base)
        ways[QUANTISED] = partial(_fit, packed.model, packed.parameters, batch, steps)
        held[QUANTISED] = weight_bytes(packed.model)
    return ways, held


def _quantised(place: Place, base: Any) -> Adapter:
    """The same weights, written and loaded as a recipe loads them."""
    with tempfile.TemporaryDirectory() as folder, quietly():
        base.save_pretrained(folder)
        settings = ModelConfig(folder, dtype="bfloat16", quantization="4bit")
        return place.attached(load_model(settings, place.device))


def _mean_loss(model: Any, batch: Batch) -> Any:
    return next_token_loss(model, batch) / len(batch.targets)


def _steps(variant: Variant, batch: Batch, steps: int) -> None:
    for _ in range(steps):
        variant.step(batch)


def _fit(model: Any, parameters: dict[Any, nn.Parameter], batch: Batch, steps: int) -> object:
    """The product's loop over one batch, again and again."""
    local = LocalConfig(steps=steps, batch_size=batch.rows)
    return fit(model, parameters, repeat(batch, steps), local, total_steps=steps, seed=0)


def _turn(way: Callable[[], object], steps: int, turn: int) -> float:
    """Seconds a step."""
    started = now()
    way()
    return (now() - started) / steps
