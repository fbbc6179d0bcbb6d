"""Aggregating many updates beside reading them once, in time; and 1,000 updates beside 10, in memory.

Updates are safetensors files in the system's page cache, as replies that wait for their turn are: a few different
ones, taken again and again. Aggregating is a round of the real loop: files are mapped and decoded, headers and values
checked, sizes counted, the weighted mean and the server's step taken. Reading is two things: adding up the mapped files
as float32, which keeps nothing, and reading them into one buffer that is there already.

Memory: each case is a process of its own. The peak of its resident set, mapped files among it, less what was there
before (Linux).
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.paired import Options, Result, Spread, in_fresh_process, interleaved, ratio, say, timed
from flocktune.aggregation.mean import weighted_mean
from flocktune.algorithms.fedavg import server_half
from flocktune.algorithms.rules import Sharing, diagnose
from flocktune.config.schema import AggregationConfig
from flocktune.engine.rounds import Hooks, run_rounds
from flocktune.files import map_file
from flocktune.interfaces import Issued, Memory
from flocktune.models.lora import A_SUFFIX, B_SUFFIX
from flocktune.scheduling import Cohort
from flocktune.tensors import size_bytes
from flocktune.types import ClientTask, Mean, Tensors, Update
from flocktune.wire import decode_tensors, encoded_pieces

TIME_GOAL, MEMORY_GOAL = 1.5, 1.1
AGGREGATE, SUM, BUFFER = "aggregating", "adding up", "reading into one buffer"
MEAN = "of aggregating: the mean alone"
RANK = 8
MEGABYTE = 1e6


@dataclass(frozen=True)
class Case:
    """``clients`` updates of LoRA factors on ``modules`` square weights ``width`` wide, from ``files`` different files.

    ``kept``: updates that the aggregation diagnostics hold on to; 0 is off.
    """

    clients: int
    modules: int = 152
    width: int = 4096
    files: int = 5
    kept: int = 0


@dataclass
class Mapped:
    """An engine whose updates lie in files."""

    message: Tensors
    files: Sequence[Path]
    memories: dict[str, Memory] = field(default_factory=dict)

    def run(self, tasks: Iterable[ClientTask], wanted: int) -> Iterator[Update]:
        """One update for each task."""
        for number, (path, _) in enumerate(zip(cycle(self.files), tasks, strict=False)):
            delta = decode_tensors(map_file(path), self.message)
            yield Update(delta, 1.0 + number % 7, 1, {"loss": Mean(1.0, 1)})

    def stream(self, issue: Callable[[], Issued | None]) -> Iterator[tuple[ClientTask, Update]]:
        """As they are asked for; nobody waits."""
        while issued := issue():
            yield from zip([issued.task], self.run([issued.task], 1), strict=True)


def run(options: Options) -> Result:
    """Paired times in this process, and peaks of fresh ones."""
    shape = Case(10, modules=4, files=2) if options.quick else Case(10)
    many, turns = (20, 1) if options.quick else (1000, 7)
    with tempfile.TemporaryDirectory() as folder:
        files = write_updates(Path(folder), shape)
        seconds = _times(replace(shape, clients=20 if options.quick else 200), files, turns)
        peaks = {
            (kept, clients): peak_of(replace(shape, clients=clients, kept=kept), Path(folder), options.threads)
            for kept in (0, AggregationConfig().diagnose_clients)
            for clients in (shape.clients, many)
        }
    return _result(shape, many, seconds, peaks, quick=options.quick)


def start(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """Random factors, A [R, width] and B [width, R]."""
    generator = torch.Generator().manual_seed(seed)
    factors: dict[str, Tensor] = {}
    for module in range(case.modules):
        factors[f"layers.{module}{A_SUFFIX}"] = torch.randn(RANK, case.width, generator=generator)
        factors[f"layers.{module}{B_SUFFIX}"] = torch.randn(case.width, RANK, generator=generator)
    return factors


def write_updates(folder: Path, case: Case) -> list[Path]:
    """The files, different from one another."""
    paths = [folder / f"{number}.safetensors" for number in range(case.files)]
    for number, path in enumerate(paths):
        with path.open("wb") as file:
            file.writelines(encoded_pieces(start(case, seed=1 + number)))
    return paths


def aggregate(case: Case, message: Tensors, files: Sequence[Path]) -> None:
    """One round."""
    names = tuple(str(number) for number in range(case.clients))
    server = server_half(AggregationConfig())
    run_rounds(
        server,
        Mapped(message, files),
        lambda round: Cohort(names, len(names), len(names)),
        server.init(message),
        rounds=1,
        kind="fedavg",
        seed=0,
        hooks=Hooks(diagnose=diagnose(Sharing("fedit", RANK, 1.0, 0), server), diagnose_clients=case.kept),
    )


def add_up(files: Iterable[Path]) -> None:
    """Every byte, as float32."""
    for path in files:
        torch.frombuffer(map_file(path), dtype=torch.float32).sum()


def read_into(buffer: bytearray, files: Iterable[Path]) -> None:
    """Every byte, copied."""
    for path in files:
        with path.open("rb", buffering=0) as file:
            file.readinto(buffer)


def _times(case: Case, files: Sequence[Path], turns: int) -> dict[str, list[float]]:
    message, buffer = start(case), bytearray(files[0].stat().st_size)
    updates = [Update(decode_tensors(map_file(path), message), 1.0) for path in files]

    def all_of_them() -> Iterator[Path]:
        return islice(cycle(files), case.clients)

    measures: dict[str, Callable[[int], float]] = {
        SUM: lambda turn: timed(lambda: add_up(all_of_them())),
        BUFFER: lambda turn: timed(lambda: read_into(buffer, all_of_them())),
        AGGREGATE: lambda turn: timed(lambda: aggregate(case, message, files)),
        MEAN: lambda turn: timed(lambda: weighted_mean(islice(cycle(updates), case.clients))),
    }
    spent = interleaved(measures, turns)
    return {name: [each / case.clients for each in all_] for name, all_ in spent.items()}


def peak_of(case: Case, folder: Path, threads: int) -> int:
    """Bytes that a fresh process needs for this round, above what it held before."""
    peak = in_fresh_process("aggregate", json.dumps(asdict(case)), str(folder), str(threads))
    say(f"  {case.clients} clients, diagnostics over {case.kept}: {peak / MEGABYTE:.0f} MB")
    return peak


def _measure(case: Case, folder: Path) -> int:
    """In the fresh process: one small round first, so that code and thread pools are there already."""
    message, files = start(case), sorted(folder.glob("*.safetensors"))
    small = Case(2, modules=1, width=RANK, files=2, kept=2)
    with tempfile.TemporaryDirectory() as other:
        aggregate(small, start(small), write_updates(Path(other), small))
    before = _status("VmRSS")
    # The mark of the most memory ever is set back to now; imports have been higher.
    Path("/proc/self/clear_refs").write_text("5")
    aggregate(case, message, files)
    return _status("VmHWM") - before


def _status(key: str) -> int:
    """A size from this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _result(
    shape: Case, many: int, seconds: dict[str, list[float]], peaks: dict[tuple[int, int], int], *, quick: bool
) -> Result:
    megabytes = size_bytes(start(shape)) / MEGABYTE
    times = {name: ratio(seconds[AGGREGATE], seconds[name]) for name in (SUM, BUFFER)}
    growth = {kept: peaks[kept, many] / peaks[kept, shape.clients] for kept, _ in peaks}
    rows = [
        (name, str(Spread.of([1000 * each for each in spent])), str(times[name]) if name in times else "")
        for name, spent in seconds.items()
    ]
    told = "; ".join(
        f"diagnostics over {kept}: {peaks[kept, shape.clients] / MEGABYTE:.0f} MB for {shape.clients} updates,"
        f" {peaks[kept, many] / MEGABYTE:.0f} MB for {many}"
        for kept in growth
    )
    return Result(
        title="Aggregation beside reading the updates once",
        goal=f"at most {TIME_GOAL:g} times reading; memory for {many} updates at most {MEMORY_GOAL:g} times that for"
        f" {shape.clients}",
        met=None if quick else times[SUM].median <= TIME_GOAL and max(growth.values()) <= MEMORY_GOAL,
        header=("", "ms an update: median (min to max)", "aggregating takes so many times as long"),
        rows=rows,
        notes=(
            f"An update is {megabytes:.1f} MB: rank {RANK} on {shape.modules} weights {shape.width} wide, in"
            f" {2 * shape.modules} tensors. {shape.files} files, each read many times; {len(seconds[SUM])} turns."
            f" Peaks above the start, {told}.",
        ),
        values={
            "seconds": seconds,
            "times_adding_up": times[SUM].median,
            "times_reading_into_a_buffer": times[BUFFER].median,
            "peak_bytes": {
                f"{clients} clients, diagnostics over {kept}": size for (kept, clients), size in peaks.items()
            },
            "growth": {str(kept): each for kept, each in growth.items()},
        },
        measured=f"{times[SUM].median:.2f} times adding them up, {times[BUFFER].median:.2f} times reading them into one"
        f" buffer; memory {', '.join(f'{each:.3f}' for each in growth.values())}",
        floor="of time, adding up, though a fold writes as well; of memory, the message, the mean, one update and the"
        " next adapter: 4 updates",
    )


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(_measure(Case(**json.loads(sys.argv[1])), Path(sys.argv[2])))
