"""What a whole flocktune run costs beside a bare PyTorch loop that takes exactly the same steps.

Ours: everything between the run's start and its last checkpoint (selection, messages, training, checks, aggregation,
diagnostics, events, checkpoints). The bare loop has its batches ready made and writes nothing. Both use the same
resident LoRA-attached model; loading and evaluation are in neither time. The final adapters are compared.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.paired import Options, Result, Spread, interleaved, ratio
from flocktune.api import run as run_flocktune
from flocktune.assemble import Assembly, federation
from flocktune.config.engines import InProcessEngine
from flocktune.config.schema import (
    DataConfig,
    EvaluationConfig,
    Iid,
    LocalConfig,
    ModelConfig,
    RunConfig,
    RuntimeConfig,
)
from flocktune.data.batching import Batch, training_batches
from flocktune.models.peft_io import import_peft
from flocktune.report.events import LOG_NAME, read_events
from flocktune.seeds import derive_seed
from flocktune.training import next_token_loss
from flocktune.types import Tensors

GOAL = 1.03
TOLERANCE = 1e-5
"""Of the final adapters: the largest difference over the largest value. It is 0 on the machines we know."""


def recipe(options: Options) -> RunConfig:
    """What both sides do: one held-out row a category, because an evaluation's end tells when training was over."""
    quick = options.quick
    return RunConfig(
        name="overhead",
        rounds=2,
        model=ModelConfig(options.model),
        data=DataConfig(
            options.data,
            template="short",
            max_tokens=256,
            test_rows_per_category=1,
            max_rows=200 if quick else 2000,
        ),
        allocation=Iid(clients=2 if quick else 3),
        local=LocalConfig(steps=2 if quick else 10, batch_size=4 if quick else 8, lr=1e-3),
        evaluation=EvaluationConfig(generate=False),
        engine=InProcessEngine(stack=1),  # one after another, as what it is compared with
        runtime=RuntimeConfig(device="cpu", threads=options.threads),
    )


def run(options: Options) -> Result:
    """Whole runs in turns with bare loops. Raises RuntimeError when their adapters differ."""
    config = recipe(options)
    fed = federation(config)
    plan = batches_of(fed)
    last: dict[str, Tensors] = {}
    phases: list[dict[str, float]] = []

    def ours(turn: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            watch = Stopwatch()
            run_flocktune(config, Path(folder) / "run", listeners=[watch])
            last["flocktune"] = import_peft(Path(folder) / "run" / "adapter")[0]
            phases.append(spent_by_phase(Path(folder) / "run"))
        return watch.seconds

    def bare(turn: int) -> float:
        started = time.perf_counter()
        last["bare"] = bare_loop(fed, plan)
        return time.perf_counter() - started

    seconds = interleaved({"bare": bare, "flocktune": ours}, 2 if options.quick else 5)
    difference = largest_difference(last["bare"], last["flocktune"])
    if difference > TOLERANCE:
        raise RuntimeError(f"the two sides did not do the same work: adapters differ by {difference:.1e}")
    return _result(config, plan, seconds, phases[1:], difference, quick=options.quick)


@dataclass
class Stopwatch:
    """Listens to a run: seconds from its start to where the final evaluation begins."""

    started: float = 0.0
    seconds: float = field(default=0.0)

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Start at the run's first event; stop at the evaluation's, less what that took."""
        if event["event"] == "run_start":
            self.started = time.perf_counter()
        elif event["event"] == "evaluation":
            self.seconds = time.perf_counter() - event["seconds"] - self.started

    def on_client(self, done: int, total: int, client: str) -> None:
        """Nothing: clients are part of what is timed."""


Plan = Sequence[Sequence[tuple[int, Sequence[Batch]]]]
"""Round -> client of the cohort -> (its rows, its batches)."""


def batches_of(fed: Assembly) -> Plan:
    """The batches that flocktune will draw, made beforehand."""
    local, encoded = fed.config.local, fed.data.train.encoded

    def drawn(number: int, client: str) -> list[Batch]:
        seed = derive_seed(derive_seed(fed.config.seed, number, client), "batches")
        return list(
            training_batches(
                encoded,
                fed.data.clients[client],
                batch_size=local.batch_size,
                batching=fed.config.data.batching,
                pad_id=fed.base.pad_id,
                seed=seed,
                steps=local.steps,
                epochs=None,
            )
        )

    return [
        [(len(fed.data.clients[client]), drawn(number, client)) for client in fed.schedule(number).asked]
        for number in range(fed.rounds)
    ]


def bare_loop(fed: Assembly, plan: Plan) -> dict[str, Tensor]:
    """Federated averaging as one would write it down: no messages, no checks, no files. Returns the adapter.

    The loss is ours, and the average is a running mean of changes, as ours is: rounded otherwise, it could not be told
    from other work, as AdamW's first steps turn the sign of a gradient of 1e-12 into a whole learning rate.
    """
    model, parameters, local = fed.base.model, fed.base.adapter.parameters, fed.config.local
    trained = list(parameters.values())
    adapter = {name: value.clone() for name, value in fed.start.items()}
    for cohort in plan:
        total, change = 0, {name: torch.zeros_like(value) for name, value in adapter.items()}
        for rows, batches in cohort:
            with torch.no_grad():
                for name, value in parameters.items():
                    value.copy_(adapter[name])
            optimizer = torch.optim.AdamW(trained, lr=local.lr, weight_decay=local.weight_decay, fused=True)
            for batch in batches:
                (next_token_loss(model, batch) / len(batch.targets)).backward()
                torch.nn.utils.clip_grad_norm_(trained, local.clip_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            total += rows
            for name, value in parameters.items():
                change[name].lerp_(value.detach() - adapter[name], rows / total)
        adapter = {name: value + change[name] for name, value in adapter.items()}
    return adapter


def spent_by_phase(folder: Path) -> dict[str, float]:
    """What the run's own log says it spent in its rounds, by activity, in seconds. Saving the last is not in it."""
    rounds = [event["seconds"] for event in read_events(folder / LOG_NAME) if event["event"] == "round"]
    return {name: sum(each.get(name, 0.0) for each in rounds) for name in ("train", "aggregate", "save")}


def largest_difference(left: Tensors, right: Tensors) -> float:
    """Over all factors: the largest difference, relative to the largest value. Raises KeyError on other names."""
    largest = max(float(value.abs().max()) for value in left.values())
    return max(float((left[name] - right[name]).abs().max()) for name in {**left, **right}) / largest


def _result(
    config: RunConfig,
    plan: Plan,
    seconds: Mapping[str, Sequence[float]],
    phases: Sequence[Mapping[str, float]],
    difference: float,
    *,
    quick: bool,
) -> Result:
    times = ratio(seconds["flocktune"], seconds["bare"])
    extra = Spread.of(
        [1000 * (ours - bare) / config.rounds for ours, bare in zip(seconds["flocktune"], seconds["bare"], strict=True)]
    )
    by_phase = {name: Spread.of([each[name] for each in phases]) for name in phases[0]}
    batches = [batch for cohort in plan for _, drawn in cohort for batch in drawn]
    return Result(
        title="Overhead: a whole run beside a bare PyTorch loop",
        goal=f"median ratio at most {GOAL}",
        met=None if quick else times.median <= GOAL,
        header=("", "seconds a run: median (min to max)", "ratio, turn by turn", "extra milliseconds a round"),
        rows=(
            ("bare loop", str(Spread.of(seconds["bare"])), "1", "0"),
            ("flocktune", str(Spread.of(seconds["flocktune"])), str(times), str(extra)),
        ),
        notes=(
            f"{config.rounds} rounds of {len(plan[0])} clients with {config.local.steps} steps of"
            f" {config.local.batch_size} rows ({sum(batch.tokens for batch in batches)} tokens), LoRA rank"
            f" {config.lora.rank} on {config.lora.targets}; {len(seconds['bare'])} turns. By its own log, flocktune"
            f" aggregates for {by_phase['aggregate'].median:.3f} s and saves for {by_phase['save'].median:.3f} s a run."
            f" Final adapters differ by {difference:.0e} of the largest value.",
        ),
        values={"seconds": seconds, "ratio": times.median, "phases": phases, "difference": difference},
        measured=str(times),
        floor=f"the bare loop, which does nothing but the steps: {100 / times.median:.0f} % of a run is they",
    )
