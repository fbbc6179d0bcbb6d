"""Many clients with tiny batches: trained at once over one base, beside one after another.

Both are the product's own engine, with the same client half, tasks and rows; only its ``stack`` differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

from benchmarks.both_clients import now
from benchmarks.gpu.models import Place, best, matmul_peak, peak_beside
from benchmarks.overhead import largest_difference
from benchmarks.paired import Result, Spread, interleaved, ratio
from flocktune.algorithms import fedavg
from flocktune.algorithms.local import ClientData
from flocktune.config.engines import InProcessEngine
from flocktune.config.schema import LocalConfig
from flocktune.data.batching import training_batches
from flocktune.engine.in_process import InProcess
from flocktune.models.lora import Adapter
from flocktune.stacking import together
from flocktune.types import ClientTask, Tensors, Update

GOAL = 4.0
GOAL_TOLD = f"clients of batch 1 stacked at least {GOAL:g} times as fast as one after another"
ALONE, STACKED = "one after another", "stacked"
TOLERANCE = 0.05
"""Of a mean loss; in bfloat16 sums round by which rows are multiplied together."""


@dataclass(frozen=True)
class Work:
    """Of each client ``steps`` batches of one row."""

    clients: int
    tokens: int
    steps: int


def run(place: Place) -> Result:
    """Turns of both. Raises RuntimeError when their losses are not the same, or clients can not be stacked."""
    work = Work(3, 16, 2) if place.quick else Work(16, 256, 4)
    adapter = place.attached(place.model())
    local = LocalConfig(steps=work.steps, batch_size=1)
    half = fedavg.client_half(adapter, partial(_data, place, work), local, "examples", rounds=1)
    # As much memory as there is: what fits a recipe's own bound is not what is asked here.
    settings = InProcessEngine(stack=work.clients, stack_mb=100_000)
    gathering = together(settings, adapter, adapter.parameters)
    if gathering is None:
        raise RuntimeError("expected a model whose clients can be trained at once")
    engines = {ALONE: InProcess(half), STACKED: InProcess(half, together=gathering)}
    tasks = _tasks(adapter, work.clients)
    last: dict[str, list[Update]] = {}

    def measured(name: str, turn: int) -> float:
        started = now()
        last[name] = _updates(engines[name], tasks)
        return now() - started

    seconds = interleaved({name: partial(measured, name) for name in engines}, 1 if place.quick else 3)
    losses = {name: fmean(each.metrics["loss"].value for each in updates) for name, updates in last.items()}
    if not abs(losses[STACKED] / losses[ALONE] - 1) <= TOLERANCE:
        raise RuntimeError(f"the two sides did not do the same work: their losses are {losses}")
    difference = max(largest_difference(*(each.delta for each in pair)) for pair in zip(*last.values(), strict=True))
    memory = {name: peak_beside(place.device, partial(_updates, each, tasks)) for name, each in engines.items()}
    return _result(place, work, seconds, {"losses": losses, "difference": difference, "memory": memory})


def _result(place: Place, work: Work, seconds: Mapping[str, list[float]], found: Mapping[str, Any]) -> Result:
    times = ratio(seconds[ALONE], seconds[STACKED])
    flops = work.clients * work.steps * place.shape.step_flops([work.tokens], work.tokens // 2)
    peak = best(matmul_peak(place))
    share = {name: flops / Spread.of(spent).median / peak for name, spent in seconds.items()}
    return Result(
        title="On a GPU: clients stacked beside one after another",
        goal=GOAL_TOLD,
        met=None if place.quick else times.median >= GOAL,
        header=("", "seconds", "tokens a second", "times as fast", "of the peak of products", "memory beside, GB"),
        rows=[
            (
                name,
                str(Spread.of(spent)),
                f"{work.clients * work.steps * work.tokens / Spread.of(spent).median:.0f}",
                str(ratio(seconds[ALONE], spent)),
                f"{share[name]:.2f}",
                f"{found['memory'][name] / 1e9:.2f}",
            )
            for name, spent in seconds.items()
        ],
        notes=(
            f"{place.told} {work.clients} clients, {work.steps} steps of 1 row of {work.tokens} tokens each;"
            f" {len(seconds[ALONE])} turns. Mean losses {found['losses'][ALONE]:.4f} and"
            f" {found['losses'][STACKED]:.4f}; updates differ by at most {found['difference']:.0e} of their largest"
            " value.",
        ),
        values={"seconds": dict(seconds), "flops": flops, "peak": peak, **found},
        measured=str(times),
        floor=f"of time, the operations at the peak of products, {flops / peak:.3g} s:"
        f" {100 * share[STACKED]:.0f} % of it reached",
    )


def _updates(engine: InProcess, tasks: list[ClientTask]) -> list[Update]:
    """One of each client. Raises RuntimeError when one failed."""
    replies = list(engine.run(tasks, len(tasks)))
    updates = [reply for reply in replies if isinstance(reply, Update)]
    if len(updates) < len(replies):
        raise RuntimeError(f"a client failed: {next(reply for reply in replies if not isinstance(reply, Update))}")
    return updates


def _tasks(adapter: Adapter, clients: int) -> list[ClientTask]:
    start: Tensors = adapter.tensors()
    return [ClientTask(0, str(client), fedavg.KIND, start, client, "") for client in range(clients)]


def _data(place: Place, work: Work, client: str) -> ClientData:
    """Rows of one length, all clients the same ones, in orders of their own."""
    encoded = place.rows([work.tokens] * work.steps)
    return ClientData(
        work.steps,
        int(encoded.targets.sum()),
        lambda seed, count, epochs: training_batches(
            encoded,
            range(work.steps),
            batch_size=1,
            batching="padded",
            pad_id=0,
            seed=seed,
            steps=count,
            epochs=epochs,
        ),
    )
