"""What a step costs a client of FedBiOT beside one of FedIT, and beside the least that it could cost.

Both clients are the product's own halves, on the same rows; a step is timed from when its batch is handed out to when
the next is asked for, so that loss, gradients, clipping and AdamW are in it. The least is a bare loop from hidden
states that are given; it ends with the same factors as the client, or the benchmark fails.

Layer passes: the paper's count (arXiv 2406.17706). One pass is a frozen layer's forward, or the gradient of its input:
FedIT 2 L, FedBiOT m + 2 s in the first local epoch and 2 s later, of L layers, m kept and s tuned ones.
Memory: a process for each client that loads what it needs and trains one task (Linux).
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks.both_clients import (
    EMULATOR,
    Pair,
    Shape,
    Watch,
    bare_loop,
    data_of,
    fedbiot_client,
    fedbiot_task,
    fedit_client,
    fedit_task,
    load_full,
    load_held,
    make,
)
from benchmarks.overhead import largest_difference
from benchmarks.paired import Options, Result, Spread, in_fresh_process, interleaved, ratio, say
from flocktune.algorithms import fedbiot
from flocktune.algorithms.local import training_only
from flocktune.algorithms.prefix import PrefixCache
from flocktune.costs import StepCost, least_forward_flops, measure_step
from flocktune.tensors import group
from flocktune.types import Tensors
from flocktune.wire import encoded_size

GOAL_FLOOR, GOAL_PASSES = 1.15, 0.10
TOLERANCE = 1e-3
"""Of the change in a task: the largest difference over the largest value. The client's loss sums in another order than
the bare loop's, and AdamW makes steps of rounding where gradients are nearly 0."""
MEGABYTE = 1e6
FEDIT, FIRST, CACHED, FLOOR = "FedIT", "FedBiOT, first epoch", "FedBiOT, later epochs", "bare loop"
TINY = Shape(6, width=32, inner=48, vocabulary=260, rows=2, tokens=16, steps=2, epochs=2)


@dataclass(frozen=True)
class Passes:
    """Passes of a token through frozen layers, counted (without LoRA's own products) and by the paper's rule."""

    cost: StepCost
    forward: float
    backward: float
    expected_forward: int
    expected_backward: int

    @property
    def told(self) -> tuple[str, str]:
        """MFLOP a token in layers, and passes: each forward + backward."""
        ahead, back = (
            flops / self.cost.tokens / 1e6 for flops in (self.cost.layer_forward_flops, self.cost.layer_backward_flops)
        )
        rule = f"{self.expected_forward} + {self.expected_backward}"
        return f"{ahead:.1f} + {back:.1f}", f"{self.forward:.1f} + {self.backward:.1f} ({rule})"

    @property
    def off(self) -> float:
        """How far the count is from the rule, relative to it."""
        return abs((self.forward + self.backward) / (self.expected_forward + self.expected_backward) - 1)


@dataclass(frozen=True)
class Measured:
    """All of one depth. Seconds are of a step, one for each turn; bytes are (down, up) a round, and peaks."""

    seconds: Mapping[str, Sequence[float]]
    passes: Mapping[str, Passes]
    sent: Mapping[str, tuple[int, int]]
    peaks: Mapping[str, int]
    bundle_bytes: int
    difference: float

    @property
    def beside_floor(self) -> Spread:
        """A cached step, in steps of the bare loop."""
        return ratio(self.seconds[CACHED], self.seconds[FLOOR])


def run(options: Options) -> Result:
    """Every depth: operations, paired steps in turns, then a process for each client."""
    depths = [TINY] if options.quick else [Shape(layers) for layers in (12, 24, 32)]
    found = {shape.layers: _measured(shape, options) for shape in depths}
    met = all(
        each.beside_floor.median <= GOAL_FLOOR and all(one.off <= GOAL_PASSES for one in each.passes.values())
        for each in found.values()
    )
    shape = depths[0]
    bundles = ", ".join(f"{each.bundle_bytes / MEGABYTE:.1f}" for each in found.values())
    return Result(
        title="What a step costs a client of FedBiOT",
        goal=f"layer passes within {GOAL_PASSES:.0%}, a later epoch's step at most {GOAL_FLOOR} of the bare loop's",
        met=None if options.quick else met,
        header=(
            "",
            "layers, MFLOP a token: forward + backward",
            "in layer passes (the paper's)",
            "seconds a step",
            "times as fast as FedIT",
            "times as long as the bare loop",
            "activations, MB",
            "down, up a round, MB",
            "a process, MB",
        ),
        rows=[row for layers, each in found.items() for row in _rows(layers, each)],
        notes=(
            f"Width {shape.width} and {shape.inner}, vocabulary {shape.vocabulary}, float32, LoRA rank 8 on all linear"
            f" layers; {EMULATOR.adapter_layers} tuned layers, of the others {EMULATOR.drop:.0%} left out."
            f" {shape.steps} steps an epoch of {shape.rows} rows of {shape.tokens} tokens, {shape.epochs} local epochs;"
            f" {len(found[shape.layers].seconds[FEDIT])} turns, medians of each. The emulator itself is {bundles} MB,"
            " once. A process: its peak above what it held before it loaded the model. Changes of the client and the"
            f" bare loop differ by {max(each.difference for each in found.values()):.0e} of the largest value.",
        ),
        values={str(layers): {**asdict(each), "beside_floor": each.beside_floor} for layers, each in found.items()},
        measured="; ".join(f"{layers} layers: {each.beside_floor}" for layers, each in found.items()),
        floor="the bare loop, which is given the hidden states and runs the tuned layers, norm, head and AdamW alone",
    )


def _measured(shape: Shape, options: Options) -> Measured:
    say(f" {shape.layers} layers")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(shape, folder, options.model)
        pair = Pair(shape, load_full(folder), load_held(folder))
        passes = {name: _passes(pair, name, cost) for name, cost in costs_of(pair).items()}
        seconds, difference = _times(pair, 1 if options.quick else 5)
        peaks = {name: peak_of(shape, folder, name, options.threads) for name in (FEDIT, FIRST)}
        return Measured(seconds, passes, _sent(pair), peaks, pair.emulated.bundle.bytes, difference)


def costs_of(pair: Pair) -> dict[str, StepCost]:
    """Operations and activations of each client's step, counted."""
    batch = next(iter(data_of(pair.shape, Watch()).batches(0, 1, None)))
    whole, held, plan = pair.full.adapter, pair.held, pair.emulated.bundle.plan
    with training_only(whole, whole.parameters):
        found = {FEDIT: measure_step(whole.model, batch)}
    prefix = PrefixCache(held.model, plan.stack, plan.frozen, EMULATOR)
    with training_only(held, [name for name in held.parameters if plan.in_adapter(name)]):
        for name in (FIRST, CACHED):
            found[name] = measure_step(held.model, batch, prefix.loss)
    return found


def _passes(pair: Pair, name: str, cost: StepCost) -> Passes:
    """One pass is the frozen weights' products and attention's two; LoRA's are 2 R (in + out), and twice that back."""
    whole, plan, shape = pair.full.adapter, pair.emulated.bundle.plan, pair.shape
    one = least_forward_flops(whole) / shape.layers + 4 * shape.tokens * shape.width
    lora = 2 * sum(value.numel() for value in whole.parameters.values()) / shape.layers
    tuned = len(plan.adapter)
    forward, backward = {
        FEDIT: (shape.layers, shape.layers),
        FIRST: (len(plan.held), tuned),
        CACHED: (tuned, tuned),
    }[name]
    return Passes(
        cost,
        (cost.layer_forward_flops / cost.tokens - forward * lora) / one,
        (cost.layer_backward_flops / cost.tokens - 2 * backward * lora) / one,
        forward,
        backward,
    )


def _times(pair: Pair, turns: int) -> tuple[dict[str, list[float]], float]:
    """Median seconds of a step in every turn, and how far client and bare loop are apart.

    Raises RuntimeError when they did not do the same work.
    """
    shape = pair.shape
    whole, emulated = fedit_task(pair.full), fedbiot_task(pair.emulated)
    cached: list[float] = []
    last: dict[str, Tensors] = {}

    def fedit(turn: int) -> float:
        watch = Watch()
        fedit_client(pair.full, shape, watch)(whole, {})
        return statistics.median(watch.seconds)

    def biot(turn: int) -> float:
        watch = Watch()
        update, _ = fedbiot_client(pair.emulated, shape, watch)(emulated, {})
        last["client"] = update.delta
        cached.append(statistics.median(watch.seconds[shape.steps :]))
        return statistics.median(watch.seconds[: shape.steps])

    def bare(turn: int) -> float:
        watch = Watch()
        last["bare"] = bare_loop(pair, watch)
        return statistics.median(watch.seconds)

    seconds = interleaved({FEDIT: fedit, FIRST: biot, FLOOR: bare}, turns, warm_up=1)
    difference = largest_difference(last["bare"], last["client"])
    if difference > TOLERANCE:
        raise RuntimeError(f"client and bare loop did not do the same work: changes differ by {difference:.1e}")
    return {**seconds, CACHED: cached[1:]}, difference


def _sent(pair: Pair) -> dict[str, tuple[int, int]]:
    """(down, up): bytes of a message each, of which a client gets and sends one a round."""
    whole, emulated = fedit_task(pair.full).tensors, fedbiot_task(pair.emulated).tensors
    up = group(emulated, fedbiot.ADAPTER)
    return {FEDIT: (encoded_size(whole), encoded_size(whole)), FIRST: (encoded_size(emulated), encoded_size(up))}


def _rows(layers: int, found: Measured) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name in (FEDIT, FIRST, CACHED, FLOOR):
        seconds, passes = found.seconds[name], found.passes.get(name)
        rows.append(
            (
                f"{layers} layers: {name}",
                *(passes.told if passes else ("", "")),
                str(Spread.of(seconds)),
                str(ratio(found.seconds[FEDIT], seconds)) if name != FEDIT else "1",
                str(found.beside_floor) if name == CACHED else "1" if name == FLOOR else "",
                f"{passes.cost.activation_bytes / MEGABYTE:.1f}" if passes else "",
                ", ".join(f"{size / MEGABYTE:.2f}" for size in found.sent.get(name, ())),
                f"{found.peaks[name] / MEGABYTE:.0f}" if name in found.peaks else "",
            )
        )
    return rows


# --- a process for each client ---------------------------------------------------------------------


def peak_of(shape: Shape, folder: Path, name: str, threads: int) -> int:
    """Bytes that a fresh process of this client needs, above what it held before: on the GPU when there is one.

    Two batches are enough: more of them would add hidden states to FedBiOT's cache, and nothing else.
    """
    short = asdict(replace(shape, steps=2, epochs=2))
    peak = in_fresh_process("client_cost", json.dumps(short), str(folder), name, str(threads))
    say(f"  {name}: {peak / MEGABYTE:.0f} MB")
    return peak


def _measure(shape: Shape, folder: Path, name: str) -> int:
    """In the fresh process: a tiny task first, so that code and thread pools are there already."""
    with tempfile.TemporaryDirectory() as small:
        make(TINY, Path(small), str(folder / "full"))
        _train(TINY, Path(small), name)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        _train(shape, folder, name)
        return torch.cuda.max_memory_allocated()
    before = _status("VmRSS")
    # Not getrusage: its mark can not be set back, and imports have been higher.
    Path("/proc/self/clear_refs").write_text("5")
    _train(shape, folder, name)
    return _status("VmHWM") - before


def _train(shape: Shape, folder: Path, name: str) -> None:
    watch = Watch()
    if name == FEDIT:
        base = load_full(folder)
        fedit_client(base, shape, watch)(fedit_task(base), {})
    else:
        held = load_held(folder)
        fedbiot_client(held, shape, watch)(fedbiot_task(held), {})


def _status(key: str) -> int:
    """A size from this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[4]))
    print(_measure(Shape(**json.loads(sys.argv[1])), Path(sys.argv[2]), sys.argv[3]))
