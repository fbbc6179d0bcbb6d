"""Two Ray workers beside one process: the same rounds, with everything loaded on both sides, in turns.

A turn is a round of FedIT. The workers' start, and what they load, is told apart: it is paid once a run. A client
at work has as many CPU threads on either side. The final states must be the same, bit for bit.
"""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.paired import Options, Result, Spread, interleaved, ratio
from flocktune.assemble import Assembly, engine_of, federation
from flocktune.config.engines import RayEngine
from flocktune.config.schema import (
    DataConfig,
    EvaluationConfig,
    Iid,
    LocalConfig,
    ModelConfig,
    RunConfig,
    RuntimeConfig,
)
from flocktune.engine.in_process import InProcess
from flocktune.engine.rounds import run_rounds
from flocktune.interfaces import Engine, State
from flocktune.tensors import digest

GOAL = 1.5
WORKERS = 2
HERE, RAY = "one process", f"{WORKERS} Ray workers"


def recipe(options: Options) -> RunConfig:
    """What both sides do."""
    quick = options.quick
    return RunConfig(
        name="scale-out",
        rounds=1,
        model=ModelConfig(options.model),
        data=DataConfig(
            options.data, template="short", max_tokens=256, test_rows_per_category=1, max_rows=200 if quick else 2000
        ),
        allocation=Iid(clients=4 if quick else 8),
        local=LocalConfig(steps=2 if quick else 5, batch_size=4 if quick else 8, lr=1e-3),
        evaluation=EvaluationConfig(generate=False),
        engine=RayEngine(workers=WORKERS),
        runtime=RuntimeConfig(device="cpu", threads=options.threads),
    )


def run(options: Options) -> Result:
    """Turns of both. Raises RuntimeError when their states differ, UserError without Ray."""
    config = recipe(options)
    fed = federation(config)
    digests: dict[str, str] = {}
    started = time.perf_counter()
    with engine_of(config, fed, Path()) as workers:
        one_round(fed, workers)
        start_s = time.perf_counter() - started
        engines: dict[str, Engine] = {HERE: InProcess(fed.client), RAY: workers}

        def measured(name: str) -> float:
            began = time.perf_counter()
            digests[name] = digest(one_round(fed, engines[name]))
            return time.perf_counter() - began

        measures = {name: lambda turn, name=name: measured(name) for name in engines}
        seconds = interleaved(measures, 2 if options.quick else 5)
    if digests[HERE] != digests[RAY]:
        raise RuntimeError("the two sides did not do the same work: their states differ")
    times = ratio(seconds[HERE], seconds[RAY])
    return Result(
        title="Scale-out: Ray workers beside one process",
        goal=f"median ratio at least {GOAL} on a machine with a free core for each worker",
        met=None if options.quick else times.median >= GOAL,
        header=("", "seconds: median (min to max)", "times as fast, turn by turn"),
        rows=(
            (HERE, str(Spread.of(seconds[HERE])), "1"),
            (RAY, str(Spread.of(seconds[RAY])), str(times)),
        ),
        notes=(
            f"A round of {len(fed.data.clients)} clients with {config.local.steps} steps of"
            f" {config.local.batch_size} rows; {len(seconds[HERE])} turns. Ray's start, the workers' loading and a"
            f" first round took {start_s:.1f} s, once. The final states are the same bits.",
        ),
        values={"seconds": seconds, "ratio": times.median, "start_seconds": start_s, "digest": digests[RAY]},
        measured=str(times),
        floor=f"{WORKERS} workers are at most {WORKERS} times as fast: {100 * times.median / WORKERS:.0f} % of that",
    )


def one_round(fed: Assembly, engine: Engine) -> State:
    """The first round."""
    return run_rounds(
        fed.server,
        engine,
        fed.schedule,
        fed.server.init(fed.start),
        rounds=1,
        kind=fed.kind,
        seed=fed.config.seed,
        model_digest=fed.model_digest,
    )
