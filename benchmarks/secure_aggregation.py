"""What secure aggregation costs beside plain rounds: a client's seconds, the server's, and bytes, by cohort and size.

Real rounds in one process, over clients whose training is nothing: all that is measured is the round's own work. The
two take turns. Seconds are the processor's, of one thread: a client's are those of all its phases, masks with everyone
among them; the server's are the rest of the round. Where one client in ten is lost, it is so after it was asked for its
masked values: the server has to make its masks with all others, to take them away.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from benchmarks.paired import Options, Result, interleaved
from flocktune.config.secure_aggregation import MASKED, SecureAggregationConfig
from flocktune.engine.in_process import InProcess
from flocktune.engine.rounds import Hooks, RoundRecord, run_rounds
from flocktune.engine.secure import secure
from flocktune.interfaces import ClientHalf, Memory, ServerHalf
from flocktune.privacy.secagg.half import secure_half
from flocktune.scheduling import Cohort
from flocktune.tensors import add_scaled
from flocktune.types import ClientTask, Failure, Mean, Tensors, Update

GOAL = 1e-6
SETTINGS = SecureAggregationConfig()
SERVER = ServerHalf(
    init=lambda tensors: tensors,
    message=lambda state, round: state,
    step=lambda state, update: add_scaled(state, update.delta),
    result=lambda state: state,
)


@dataclass(frozen=True)
class Case:
    """A round of ``clients`` whose updates are of ``megabytes`` (10^6 bytes)."""

    clients: int
    megabytes: float


@dataclass
class Timed:
    """Clients in this process; the seconds they take. ``lost``: whose masked values do not arrive."""

    half: ClientHalf
    lost: frozenset[str] = frozenset()
    memories: dict[str, Memory] = field(default_factory=dict)
    seconds: float = 0.0

    def run(self, tasks: Iterable[ClientTask], wanted: int) -> Iterator[Update | Failure]:
        """One reply for each task, in task order."""
        inside = InProcess(self.half, self.memories)
        for task in tasks:
            started = time.process_time()
            (reply,) = inside.run([task], 1)
            self.seconds += time.process_time() - started
            yield Failure(task.client, "lost") if task.kind == MASKED and task.client in self.lost else reply

    def stream(self, issue: object) -> Iterator[tuple[ClientTask, Update | Failure]]:
        """Not for rounds."""
        raise NotImplementedError


@dataclass
class Measured:
    """One way to run a case: what its turns took."""

    case: Case
    half: ClientHalf
    secure: bool
    lost: int = 0
    client_s: list[float] = field(default_factory=list)
    server_s: list[float] = field(default_factory=list)
    record: RoundRecord | None = None
    state: Tensors = field(default_factory=dict)

    def turn(self, number: int) -> float:
        """One round; its seconds."""
        names = tuple(f"client-{place}" for place in range(self.case.clients))
        engine = Timed(secure_half(self.half, SETTINGS) if self.secure else self.half, frozenset(names[: self.lost]))
        records: list[RoundRecord] = []
        more: dict[str, Any] = {"collect": secure(SETTINGS, lambda task: task.tensors)} if self.secure else {}
        started = time.process_time()
        self.state = run_rounds(
            SERVER,
            engine,
            lambda round: Cohort(names, len(names), 1),
            {"w": torch.zeros(round(self.case.megabytes * 1e6 / 4))},
            rounds=1,
            kind="plain",
            seed=0,
            hooks=Hooks(on_round=lambda record, state: records.append(record)),
            **more,
        )
        spent = time.process_time() - started
        self.record = records[0]
        self.client_s.append(engine.seconds / len(names))
        self.server_s.append(spent - engine.seconds)
        return spent

    def row(self) -> dict[str, float]:
        """Medians without the first turn, a client's bytes."""
        assert self.record is not None
        return {
            "client_ms": 1000 * median(self.client_s[1:]),
            "server_ms": 1000 * median(self.server_s[1:]),
            "down_mb": self.record.bytes_down / self.case.clients / 1e6,
            "up_mb": self.record.bytes_up / self.case.clients / 1e6,
        }


def run(options: Options) -> Result:
    """Every case, plain and secure in turns."""
    shapes = [(4, 0.01)] if options.quick else [(10, 1), (50, 1), (100, 1), (10, 15)]
    rows, values, worst, rate = [], {}, 0.0, stream_rate()
    reached: list[float] = []
    for case in (Case(*shape) for shape in shapes):
        half = _half(case)
        ways = {
            "plain": Measured(case, half, False),
            "secure": Measured(case, half, True),
            "secure, 10 % lost": Measured(case, half, True, max(1, case.clients // 10)),
        }
        interleaved({name: way.turn for name, way in ways.items()}, 1 if options.quick else 3)
        worst = max(worst, float((ways["secure"].state["w"] - ways["plain"].state["w"]).abs().max()))
        for name, way in ways.items():
            told = way.row()
            values[f"{case.clients} x {case.megabytes:g} MB, {name}"] = told
            least = 1000 * case.clients * case.megabytes * 1e6 / rate if way.secure else 0.0
            reached += [least / told["client_ms"]] if way.secure else []
            numbers = (told["client_ms"], least, told["server_ms"], told["down_mb"], told["up_mb"])
            rows.append((f"{case.clients} x {case.megabytes:g} MB, {name}", *(f"{value:.3g}" for value in numbers)))
    return Result(
        title="Secure aggregation's cost",
        goal=f"the same mean within {GOAL:g}",
        met=None if options.quick else worst <= GOAL,
        header=(
            "clients x update",
            "CPU ms of a client",
            "of it the least, for masks",
            "CPU ms of the server",
            "MB down a client",
            "MB up a client",
        ),
        rows=rows,
        notes=(f"Largest difference of the two means: {worst:.2g}, of values about 0.01. Training is in no number.",),
        values={"cases": values, "difference": worst},
        measured=f"{worst:.2g}",
        floor="a client's masks, one with each other client and one of its own: ChaCha20's streams, here of"
        f" {rate / 1e9:.2f} GB a second, are {100 * min(reached):.0f} to {100 * max(reached):.0f} % of its time. Of"
        " bytes, the plain rounds'",
    )


def stream_rate() -> float:
    """Bytes of ChaCha20's stream that one thread makes in a second, at best."""
    piece, pieces, found = bytes(1 << 20), 16, []
    for _ in range(5):
        stream = Cipher(ChaCha20(bytes(32), bytes(16)), mode=None).encryptor()
        started = time.process_time()
        for _ in range(pieces):
            stream.update(piece)
        found.append(pieces * len(piece) / (time.process_time() - started))
    return max(found)


def _half(case: Case) -> ClientHalf:
    """Gives updates that are there already, about 0.01 large."""
    values = 0.01 * torch.randn(round(case.megabytes * 1e6 / 4), generator=torch.Generator().manual_seed(0))

    def train(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
        return Update({"w": values * (1 + task.seed % 7)}, 1.0, 1, {"loss": Mean(1.0, 1)}), memory

    return train
