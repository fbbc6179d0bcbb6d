"""What the server holds while it aggregates: as much for 1,000 clients as for 10; and what aggregating costs.

Memory: every case is a process of its own that runs one round of the real loop, with intake checks and the aggregation
diagnostics, on updates made one by one as they are asked for. Peak resident set, less what was there before (Linux).
Time: the loop's own work, turn by turn against reading the same bytes once; making them is in neither.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.paired import Options, Result, Spread, in_fresh_process, interleaved, ratio, say
from flocktune.algorithms.fedavg import server_half
from flocktune.algorithms.rules import Sharing, diagnose
from flocktune.config.schema import AggregationConfig
from flocktune.engine.rounds import Hooks, run_rounds
from flocktune.interfaces import Issued, Memory
from flocktune.models.lora import A_SUFFIX, B_SUFFIX
from flocktune.scheduling import Cohort
from flocktune.tensors import size_bytes
from flocktune.types import ClientTask, Mean, Tensors, Update

GOAL = 0.10
RANK = 8
MEGABYTE = 1e6


@dataclass(frozen=True)
class Case:
    """One round of ``clients`` updates of LoRA factors on ``modules`` square weights ``width`` wide.

    ``kept``: updates that the aggregation diagnostics hold on to; 0 is off.
    """

    clients: int
    modules: int = 64
    width: int = 4096
    kept: int = AggregationConfig().diagnose_clients


@dataclass
class Made:
    """An engine whose updates are made when they are asked for. ``seconds`` is how long the making took."""

    message: Tensors
    seconds: float = field(default=0.0)
    memories: dict[str, Memory] = field(default_factory=dict)

    def run(self, tasks: Iterable[ClientTask], wanted: int) -> Iterator[Update]:
        """One update for each task, its bytes new every time."""
        for task in tasks:
            started = time.perf_counter()
            number = 1 + int(task.client) % 7
            delta = {name: value * (0.001 * number) for name, value in self.message.items()}
            self.seconds += time.perf_counter() - started
            yield Update(delta, float(number), 1, {"loss": Mean(float(number), 1)})

    def stream(self, issue: Callable[[], Issued | None]) -> Iterator[tuple[ClientTask, Update]]:
        """As they are asked for; nobody waits."""
        while issued := issue():
            yield from zip([issued.task], self.run([issued.task], 1), strict=True)


def run(options: Options) -> Result:
    """Peaks of fresh processes, and paired times in this one."""
    shape = Case(2, modules=4, width=256, kept=2) if options.quick else Case(10)
    many = 20 if options.quick else 1000
    megabytes = size_bytes(start(shape)) / MEGABYTE
    rows: list[tuple[str, ...]] = []
    peaks: dict[str, int] = {}
    growth: dict[str, float] = {}
    for kept in (shape.kept,) if options.quick else (0, shape.kept):
        for clients in (shape.clients, many):
            name = f"{clients} clients, diagnostics over {kept}"
            peaks[name] = size = peak_of(replace(shape, clients=clients, kept=kept), options.threads)
            if clients == shape.clients:
                first = size
            growth[name] = size / first
            rows.append((name, f"{size / MEGABYTE:.1f}", f"{size / MEGABYTE / megabytes:.1f}", f"{growth[name]:.3f}"))
    seconds = _times(replace(shape, kept=0), 1 if options.quick else 7)
    slower = ratio(seconds["aggregate"], seconds["read"])
    a_megabyte = {
        name: Spread.of([1000 * each / megabytes / shape.clients for each in spent]) for name, spent in seconds.items()
    }
    return Result(
        title=f"Server memory: {shape.clients} clients beside {many}",
        goal=f"peaks equal within {GOAL:.0%}",
        met=None if options.quick else all(abs(times - 1) <= GOAL for times in growth.values()),
        header=("", "peak, MB above the start", "in updates", "times that of fewer clients"),
        rows=rows,
        notes=(
            f"An update is {megabytes:.1f} MB (rank {RANK} on {shape.modules} weights {shape.width} wide)."
            f" Aggregating (checks, sizes, weighted mean, server step; diagnostics over 0) takes"
            f" {a_megabyte['aggregate']} ms a MB, reading the same bytes once {a_megabyte['read']}: {slower} times as"
            " long.",
        ),
        values={"peak_bytes": peaks, "growth": growth, "seconds": seconds, "times_reading": slower.median},
        measured=", ".join(f"{times:.3f}" for times in growth.values() if times != 1),
        floor=f"of time, reading the bytes once: {100 / slower.median:.0f} % of it reached; of memory, the message, the"
        " mean and one update: 3 updates",
    )


def aggregate(case: Case, message: Tensors) -> float:
    """One round; seconds of it that were not spent making updates."""
    engine = Made(message)
    names = tuple(str(number) for number in range(case.clients))
    server = server_half(AggregationConfig())
    started = time.perf_counter()
    run_rounds(
        server,
        engine,
        lambda round: Cohort(names, len(names), len(names)),
        server.init(message),
        rounds=1,
        kind="fedavg",
        seed=0,
        hooks=Hooks(diagnose=diagnose(Sharing("fedit", RANK, 1.0, 0), server), diagnose_clients=case.kept),
    )
    return time.perf_counter() - started - engine.seconds


def read(case: Case, message: Tensors) -> float:
    """Seconds to read every byte of the same updates once: a sum, which keeps nothing."""
    engine = Made(message)
    started = time.perf_counter()
    tasks = (ClientTask(0, str(number), "", {}, 0, "") for number in range(case.clients))
    for update in engine.run(tasks, case.clients):
        for value in update.delta.values():
            value.sum()
    return time.perf_counter() - started - engine.seconds


def start(case: Case) -> dict[str, Tensor]:
    """An adapter with random factors, A [R, width] and B [width, R]."""
    generator = torch.Generator().manual_seed(0)
    factors: dict[str, Tensor] = {}
    for module in range(case.modules):
        factors[f"layers.{module}{A_SUFFIX}"] = torch.randn(RANK, case.width, generator=generator)
        factors[f"layers.{module}{B_SUFFIX}"] = torch.randn(case.width, RANK, generator=generator)
    return factors


def peak_of(case: Case, threads: int) -> int:
    """Bytes that a fresh process needs for this round, above what it held before."""
    peak = in_fresh_process("server_memory", json.dumps(asdict(case)), str(threads))
    say(f"  {case.clients} clients, diagnostics over {case.kept}: {peak / MEGABYTE:.0f} MB")
    return peak


def _times(case: Case, turns: int) -> dict[str, list[float]]:
    message = start(case)
    return interleaved(
        {"read": lambda turn: read(case, message), "aggregate": lambda turn: aggregate(case, message)}, turns
    )


def _measure(case: Case) -> int:
    """In the fresh process: one small round first, so that code and thread pools are there already."""
    message = start(case)
    aggregate(Case(2, kept=2), start(Case(2, modules=1, width=RANK)))
    before = _status("VmRSS")
    # The mark of the most memory ever is set back to now; imports have been higher.
    Path("/proc/self/clear_refs").write_text("5")
    aggregate(case, message)
    return _status("VmHWM") - before


def _status(key: str) -> int:
    """A size from this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    print(_measure(Case(**json.loads(sys.argv[1]))))
