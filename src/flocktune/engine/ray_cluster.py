"""Scale-out: clients on the workers of a Ray cluster, each of which keeps the base model for the whole run.

    tasks --window of 2 x workers--> workers --replies--> in task order

What a client computes is a function of its task and its memory alone, so it does not matter which worker gets it,
or how often: the result is that of one process, bit for bit on CPUs. Replies are yielded in task order, a task is taken
only when there is room for it, and nobody is given up for being slow: with over-selection, too, the clients that are
asked are those that one process asks. Memory holds a window of tasks and replies, however many clients there are.

Flocktune hands Ray bytes and text only. Ray itself moves its arguments, results and classes in its own serialisation,
pickle among it, and runs code for whoever may connect: a cluster is a place of trust, for machines of one researcher.
Data owners join a federation instead.
"""

from __future__ import annotations

import heapq
import json
import logging
import math
import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from flocktune.config.engines import RayEngine
from flocktune.engine import ray_worker
from flocktune.engine.in_process import duration
from flocktune.engine.ray_worker import UNFIT, pack, unpack
from flocktune.errors import FlocktuneError, Problem, UserError
from flocktune.interfaces import Issued, Memory, keep
from flocktune.types import ClientTask, Failure, Tensors, Update
from flocktune.wire import build_update, task_fields

_LOG = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 1 << 30
"""Of a cluster that is started here, for tensors on their way; what does not fit goes through the disk."""

CONNECT_TIMEOUT_S = 10.0
"""How long a cluster's address may take to answer."""

TASKS_A_WORKER = 2
"""One at work and one that waits for it, so that no worker stands still while replies are summed up."""


@dataclass(frozen=True)
class HalfSource:
    """Where a worker gets its client half from: ``function`` is ``module:name`` and is called with ``arguments``."""

    function: str
    arguments: tuple[str | None, ...] = ()


@contextmanager
def on_ray(settings: RayEngine, source: HalfSource, threads: int = 0) -> Iterator[OnRay]:
    """An engine on a cluster: one that runs, else one that is started on this machine and ended with the engine.

    A process that is connected already stays so. ``threads``: CPU threads of a worker's torch; 0 is one for each of its
    CPUs. Raises UserError when Ray or the cluster is missing, or the workers do not fit into it.
    """
    ray = _import_ray()
    connected_before = ray.is_initialized()
    if not connected_before:
        _connect(ray, settings.address)
    try:
        workers = settings.workers or count_that_fit(ray.nodes(), settings)
        refuse_too_many(ray.nodes(), settings, workers)
        if not settings.gpus_per_worker and ray.cluster_resources().get("GPU"):
            _LOG.warning("engine.gpus_per_worker is 0: the cluster has GPUs, and the workers compute on CPUs")
        options = {
            "num_cpus": settings.cpus_per_worker,
            "num_gpus": settings.gpus_per_worker,
            "max_restarts": 0,  # the engine does it, and counts
            # Without a share of a GPU Ray would leave all of them in sight.
            "runtime_env": {"env_vars": {} if settings.gpus_per_worker else {"CUDA_VISIBLE_DEVICES": ""}},
        }
        actor = ray.remote(ray_worker.Worker).options(**options)
        arguments = (source.function, source.arguments, threads or max(1, int(settings.cpus_per_worker)), os.getcwd())
        seats = [_Seat(ray, lambda: actor.remote(*arguments)) for _ in range(workers)]
        try:
            yield OnRay(ray, seats, settings.retries, lambda: count_that_fit(ray.nodes(), settings))
        finally:
            for seat in seats:
                seat.close()
    finally:
        if not connected_before:
            ray.shutdown()


@dataclass
class OnRay:
    """Runs tasks on the workers of ``seats``. Every client's memory is kept on this side and travels with its task.

    ``room``: how many workers the cluster has room for just now.
    """

    ray: Any
    seats: list[_Seat]
    retries: int
    room: Callable[[], int]
    memories: dict[str, Memory] = field(default_factory=dict)
    _message: tuple[Tensors | None, Any] = (None, None)

    def run(self, tasks: Iterable[ClientTask], wanted: int) -> Iterator[Update | Failure]:
        """One reply for each task, in task order. Raises UserError when workers can not build the client half.

        A task is taken when there is room and, as far as is known, fewer than ``wanted`` updates will come without it.
        """
        source, jobs, updates = iter(tasks), deque[_Job](), 0
        try:
            while True:
                while len(jobs) < self._room:
                    hoped = updates + sum(not isinstance(job.reply, Failure) for job in jobs)
                    task = next(source, None) if hoped < wanted or not jobs else None
                    if task is None:
                        break
                    jobs.append(self._packed(task))
                    self._give(jobs[-1])
                if not jobs:
                    return
                reply = self._reply(jobs.popleft())
                updates += isinstance(reply, Update)
                yield reply
        finally:
            self._forget()

    def stream(self, issue: Callable[[], Issued | None]) -> Iterator[tuple[ClientTask, Update | Failure]]:
        """Replies in the order of the logical time, as the in-process engine has it; work begins before it is due.

        Raises UserError when workers can not build the client half.
        """
        number = count()
        at_work: list[tuple[float, int, _Job]] = []
        try:
            while True:
                while issued := issue():
                    done = issued.at + duration(issued.task.seed)
                    heapq.heappush(at_work, (done, next(number), self._packed(issued.task)))
                if not at_work:
                    return
                for *_, job in heapq.nsmallest(self._room, at_work):
                    if job.reference is None:
                        self._give(job)
                *_, due = heapq.heappop(at_work)
                yield due.task, self._reply(due)
        finally:
            self._forget()

    @property
    def _room(self) -> int:
        return TASKS_A_WORKER * len(self.seats)

    def _packed(self, task: ClientTask) -> _Job:
        if self._message[0] is not task.tensors:  # the same for all tasks of a round: it is stored once
            self._message = (task.tensors, self.ray.put(pack({}, task.tensors)))
        memory = self.memories.get(task.client, {})
        fields = json.dumps(task_fields(task)).encode()
        return _Job(task, (self._message[1], fields, pack({}, memory) if memory else b""))

    def _give(self, job: _Job) -> None:
        min(self.seats, key=lambda seat: len(seat.jobs)).give(job)

    def _take_in(self) -> None:
        """Wait until some worker has replied, or died, and see to it."""
        asked = {job.reference: seat for seat in self.seats for job in seat.jobs}
        (first, *_), _ = self.ray.wait(list(asked), num_returns=1)
        seat = asked[first]
        job = seat.jobs[0]  # a worker replies in the order in which it was asked
        try:
            kind, body, memory = self.ray.get(job.reference)
        except self.ray.exceptions.RayTaskError as error:
            job.reply = Failure(job.task.client, f"{type(error.cause).__name__}: {error.cause}")
        except self.ray.exceptions.RayError as error:
            self._replace(seat, error)
            return
        else:
            job.reply, job.memory = _opened(job.task, kind, body), None if kind == UNFIT else memory
        seat.jobs.popleft()

    def _replace(self, seat: _Seat, error: Exception) -> None:
        """A new worker for one that is lost; its tasks are given out again. The one that it was at is counted.

        Its seat is lost with it when its machine is. Raises FlocktuneError when that was the last one.
        """
        lost, *waiting = seat.jobs
        lost.losses += 1
        why = str(error).strip().rpartition("\n")[2].partition(" Some common causes")[0]  # before it: names and numbers
        _LOG.warning("round %d, %s: its worker was lost (%s)", lost.task.round, lost.task.client, why)
        if lost.losses > self.retries:
            times = "once" if lost.losses == 1 else f"{lost.losses} times"
            lost.reply = Failure(lost.task.client, f"its worker was lost {times}: {why}")
        seat.close()
        seat.jobs.clear()
        if self.room() < len(self.seats):
            self.seats.remove(seat)
            _LOG.warning("the Ray cluster has become smaller: %d workers are left", len(self.seats))
        else:
            seat.open()
        if not self.seats:
            raise FlocktuneError(f"no worker is left, nor room for one in the cluster ({why}). Mend it and resume.")
        for job in waiting if lost.reply else [lost, *waiting]:
            self._give(job)

    def _reply(self, job: _Job) -> Update | Failure:
        """What came of ``job``, once it is there; the client's new memory is kept."""
        while job.reply is None:
            self._take_in()
        if job.memory is not None:
            keep(self.memories, job.task.client, unpack(job.memory)[1] if job.memory else {})
        return job.reply

    def _forget(self) -> None:
        """Whoever stops asking wants none of what is under way."""
        for seat in self.seats:
            seat.jobs.clear()


@dataclass(eq=False)
class _Job:
    """A task that was given out. ``losses``: how many workers were lost while they were at it.

    ``memory``: what the client has now, empty when that is nothing; None: what it had before.
    """

    task: ClientTask
    arguments: tuple[Any, ...]
    reference: Any = None
    losses: int = 0
    reply: Update | Failure | None = None
    memory: bytes | None = None


class _Seat:
    """The place of one worker, and the jobs it has, oldest first. ``start`` makes the worker's actor."""

    def __init__(self, ray: Any, start: Any) -> None:
        self.ray, self.start = ray, start
        self.jobs: deque[_Job] = deque()
        self.open()

    def open(self) -> None:
        """A new worker. It begins to load at once."""
        self.actor = self.start()
        self.actor.load.remote()

    def give(self, job: _Job) -> None:
        """Have the worker do ``job`` after those that it has."""
        job.reference = self.actor.work.remote(*job.arguments)
        self.jobs.append(job)

    def close(self) -> None:
        """End the worker, whatever it is doing."""
        self.ray.kill(self.actor)


def _opened(task: ClientTask, kind: str, body: bytes) -> Update | Failure:
    match kind:
        case ray_worker.UPDATE:
            return build_update(*unpack(body))
        case ray_worker.FAILURE:
            _LOG.warning("round %d, %s failed: %s", task.round, task.client, body.decode())
            return Failure(task.client, body.decode())
    fix = "Every machine needs this version of flocktune, and what the recipe names at the same place."
    raise UserError(Problem("engine", "Ray workers that can do what the recipe asks", body.decode(), fix))


def count_that_fit(nodes: Sequence[Mapping[str, Any]], settings: RayEngine) -> int:
    """How many workers the machines of a cluster (``ray.nodes()``) have room for when nobody else is there."""
    return sum(_fit_on(node["Resources"], settings) for node in nodes if node["Alive"])


def _fit_on(resources: Mapping[str, float], settings: RayEngine) -> int:
    cpus, gpus = settings.cpus_per_worker, settings.gpus_per_worker
    by_cpu = math.floor(resources.get("CPU", 0) / cpus + 1e-6)
    if not gpus:
        return by_cpu
    have = int(resources.get("GPU", 0))
    # A share lies on one GPU: three workers of 0.4 do not fit onto one, and four need two.
    return min(by_cpu, have // math.ceil(gpus) if gpus >= 1 else have * math.floor(1 / gpus + 1e-6))


def refuse_too_many(nodes: Sequence[Mapping[str, Any]], settings: RayEngine, workers: int) -> None:
    """Raise UserError when so many workers never fit: Ray would wait for more machines for ever."""
    if settings.gpus_per_worker > 1 and settings.gpus_per_worker % 1:
        got = f"{settings.gpus_per_worker:g}"
        raise UserError(Problem("engine.gpus_per_worker", "a part of one GPU, or a whole number of them", got))
    fit = count_that_fit(nodes, settings)
    if 0 < workers <= fit:
        return
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    have = {name: sum(each.get(name, 0) for each in alive) for name in ("CPU", "GPU")}
    raise UserError(
        Problem(
            "engine.workers",
            f"at most the {fit} that fit into the cluster ({have['CPU']:g} CPUs, {have['GPU']:g} GPUs)",
            f"{max(1, workers)} with {settings.cpus_per_worker:g} CPUs and {settings.gpus_per_worker:g} GPUs each",
            "Ask for fewer or smaller workers, or give the cluster more machines.",
        )
    )


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when it is imported
    try:
        import ray
    except ImportError:
        fix = "Install it with: pip install 'flocktune[ray]', or set engine: in_process."
        raise UserError(Problem("engine", "Ray, which is an extra", "no module named ray", fix)) from None
    return ray


def _connect(ray: Any, address: str | None) -> None:
    """Join the cluster at ``address``, or start one on this machine. Raises UserError when there is none."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    quiet = {"log_to_driver": False, "configure_logging": False}
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        if address is None:
            ray.init(address="local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet)
        else:
            host, _, port = address.rpartition(":")
            if port.isdigit():  # Ray itself tries for minutes
                socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
            ray.init(address=address, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        fix = "Start one with: ray start --head, or leave engine.address out to start one on this machine."
        got = f"{address or 'none'}: {' '.join(str(error).split())[:300]}"
        raise UserError(Problem("engine.address", "a Ray cluster that runs", got, fix)) from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_terminate)  # Ray takes it, and with it our stop between rounds
