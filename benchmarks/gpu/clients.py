"""A client of FedBiOT beside one of FedIT at the shape of a large model: tokens a second, and memory.

Both are the product's own halves on the same padded rows; half of the layers below the last two are left out of the
emulator, which shares the full model's weights here. A client's memory: the weights that it holds, and its peak beyond.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.both_clients import EMULATOR, Watch, watched_data
from benchmarks.gpu.models import Place, peak_beside, weight_bytes
from benchmarks.networks import sharing
from benchmarks.paired import Result, Spread, interleaved, ratio
from flocktune.algorithms import fedavg, fedbiot
from flocktune.config.schema import LocalConfig
from flocktune.interfaces import ClientHalf
from flocktune.models.layers import drop_layers, layer_stack
from flocktune.models.lora import Adapter
from flocktune.models.split import SplitPlan, plan_split
from flocktune.types import ClientTask

GOAL_TIMES, GOAL_MEMORY = 6.0, 0.6
GOAL_TOLD = f"cached at least {GOAL_TIMES:g} times FedIT's tokens a second; at most {GOAL_MEMORY:g} of its peak memory"
FEDIT, FIRST, CACHED = "FedIT", "FedBiOT, first epoch", "FedBiOT, later epochs"
DIGEST = "emulator"


@dataclass(frozen=True)
class Rows:
    """A client's: ``steps`` batches an epoch of ``size`` rows of ``tokens`` tokens."""

    size: int
    tokens: int
    steps: int
    epochs: int = 3


def run(place: Place) -> Result:
    """Steps of both, timed from when a batch is handed out to when the next is asked for; and what they hold."""
    rows = Rows(2, 16, 2) if place.quick else Rows(4, 512, 4)
    base = place.model()
    whole = place.attached(sharing(base))
    plan = plan_split(place.shape.layers, EMULATOR, stack=layer_stack(base))
    held = place.attached(drop_layers(sharing(base), plan))
    watch = Watch()
    data = watched_data(place.rows([rows.tokens] * rows.size * rows.steps), rows.size, watch)
    fedit = fedavg.client_half(whole, lambda _: data, LocalConfig(epochs=1, batch_size=rows.size), "examples", rounds=1)
    local = LocalConfig(epochs=rows.epochs, batch_size=rows.size)
    biot = fedbiot.client_half(held, plan, DIGEST, lambda _: data, local, EMULATOR, "examples", rounds=1)
    tasks = {FEDIT: _task(whole), FIRST: _emulator_task(held, plan)}
    cached: list[float] = []

    def fedit_turn(turn: int) -> float:
        return statistics.median(_steps(watch, fedit, tasks[FEDIT]))

    def biot_turn(turn: int) -> float:
        spent = _steps(watch, biot, tasks[FIRST])
        cached.append(statistics.median(spent[rows.steps :]))
        return statistics.median(spent[: rows.steps])

    seconds = interleaved({FEDIT: fedit_turn, FIRST: biot_turn}, 1 if place.quick else 3)
    seconds[CACHED] = cached[1:]
    memory = {
        FEDIT: weight_bytes(whole.model) + peak_beside(place.device, lambda: fedit(tasks[FEDIT], {})),
        FIRST: weight_bytes(held.model) + peak_beside(place.device, lambda: biot(tasks[FIRST], {})),
    }
    return _result(place, rows, plan, seconds, memory)


def _result(
    place: Place, rows: Rows, plan: SplitPlan, seconds: Mapping[str, list[float]], memory: Mapping[str, int]
) -> Result:
    times = ratio(seconds[FEDIT], seconds[CACHED])
    share = memory[FIRST] / memory[FEDIT]
    # The paper's count of layer passes: forward, and gradients of inputs.
    least = {FEDIT: 2 * plan.layers, FIRST: len(plan.held) + len(plan.adapter), CACHED: 2 * len(plan.adapter)}
    tokens = rows.size * rows.tokens
    return Result(
        title="On a GPU: a client of FedBiOT beside one of FedIT",
        goal=GOAL_TOLD,
        met=None if place.quick else times.median >= GOAL_TIMES and share <= GOAL_MEMORY,
        header=("", "ms a step", "tokens a second", "times FedIT's", "by layer passes", "memory, GB", "of FedIT's"),
        rows=[
            (
                name,
                f"{1000 * Spread.of(spent).median:.1f}",
                f"{tokens / Spread.of(spent).median:.0f}",
                str(ratio(seconds[FEDIT], spent)),
                f"{least[FEDIT] / least[name]:.1f}",
                f"{memory[name] / 1e9:.2f}" if name in memory else "",
                f"{memory[name] / memory[FEDIT]:.2f}" if name in memory else "",
            )
            for name, spent in seconds.items()
        ],
        notes=(
            f"{place.told} {len(plan.adapter)} tuned layers, {len(plan.dropped)} of the others left out."
            f" {rows.steps} steps an epoch of {rows.size} rows of {rows.tokens} tokens, {rows.epochs} local epochs;"
            f" {len(seconds[FEDIT])} turns.",
        ),
        values={"seconds": dict(seconds), "memory": dict(memory), "passes": least},
        measured=f"{times.median:.1f} times, {share:.2f} of the memory",
        floor="by layer passes alone a cached step is"
        f" {least[FEDIT] / least[CACHED]:.0f} times as fast; head, factors and AdamW are in every step. Of memory, the"
        f" weights: {len(plan.held)} of {plan.layers} layers",
    )


def _steps(watch: Watch, half: ClientHalf, task: ClientTask) -> list[float]:
    """Seconds of the steps of a task."""
    watch.seconds.clear()
    half(task, {})
    return list(watch.seconds)


def _task(adapter: Adapter) -> ClientTask:
    return ClientTask(0, "client", fedavg.KIND, adapter.tensors(), 0, "")


def _emulator_task(adapter: Adapter, plan: SplitPlan) -> ClientTask:
    """E and A."""
    parts = fedbiot.split_tensors(plan, adapter.tensors())
    tensors = fedbiot.joined(parts)
    return ClientTask(0, "client", fedbiot.KIND, tensors, 0, "", DIGEST)
