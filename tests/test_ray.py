"""The Ray engine on two workers: the bits of one process, whatever happens to the workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import flocktune
from conftest import World
from flocktune import api
from flocktune.algorithms import fedavg
from flocktune.assemble import client_half_of
from flocktune.config.engines import RayEngine
from flocktune.config.load import dump_recipe, load_recipe, parse_recipe
from flocktune.config.schema import AggregationConfig, SchedulingConfig, Uniform
from flocktune.engine.in_process import InProcess
from flocktune.engine.ray_cluster import HalfSource, OnRay, count_that_fit, on_ray
from flocktune.engine.ray_worker import pack, unpack
from flocktune.engine.rounds import Hooks, RoundRecord, run_rounds
from flocktune.errors import FlocktuneError, UserError
from flocktune.files import sha256_file
from flocktune.interfaces import Issued, State
from flocktune.scheduling import Cohort, select
from flocktune.tensors import digest
from flocktune.types import ClientTask, Failure, Update
from ray_halves import toy

ray = pytest.importorskip("ray", reason="the extra flocktune[ray] is not installed")

START = {"b": torch.zeros(3), "a": torch.ones(2, 2)}
FEDBIOT = (
    "method=fedbiot",
    "emulator={adapter_layers: 1, drop: 0.0}",
    "alignment={first_steps: 3, steps: 1, batch_size: 2, fidelity_rows: 3}",
    "rounds=2",
    "evaluation.max_rows=2",
)
OWN = ("evaluation.client_rows=2", "evaluation.generate=false", "rounds=2")
REMEMBERED = {
    "scaffold and ditto": ("local.correction={kind: scaffold}", "personal={kind: ditto, keep: true}", *OWN),
    "feddyn and fine_tune": ("local.correction={kind: feddyn}", "personal={kind: fine_tune, keep: true}", *OWN),
}
NOT_THE_RESULT = {"time", "seconds", "client_seconds_per_step", "peak_memory_bytes", "recipe", "summary", "config"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster that says it has four CPUs. Its workers find what is beside this file; engines leave it running."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        ray.init(
            address="local",
            num_cpus=4,
            num_gpus=0,
            object_store_memory=100_000_000,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def shared(cluster) -> Iterator[OnRay]:
    with on_ray(RayEngine(workers=2), toys()) as engine:
        yield engine


@pytest.fixture
def engine(shared: OnRay) -> OnRay:
    """Two workers with toys, which tests share; no client remembers anything."""
    shared.memories.clear()
    return shared


# --- helpers -----------------------------------------------------------------------------------------------


def toys(folder: object = "") -> HalfSource:
    return HalfSource("ray_halves:toy", (str(folder),))


def tasks_for(clients: Iterable[str], round: int = 0) -> Iterator[ClientTask]:
    for number, client in enumerate(clients):
        yield ClientTask(round, client, "toy", START, 1000 * round + number, "digest")


def names(count: int, prefix: str = "client") -> list[str]:
    return [f"{prefix}-{number:04d}" for number in range(count)]


def plain(reply: Update | Failure) -> Any:
    """A reply without the time it took, its tensors in their order as their bits."""
    if isinstance(reply, Failure):
        return reply
    metrics = {name: mean for name, mean in reply.metrics.items() if name != "seconds"}
    return [(name, value.tolist()) for name, value in reply.delta.items()], reply.weight, reply.clients, metrics


def rounds(engine: Any, schedule: Any, count: int = 3, **more: Any) -> State:
    server = fedavg.server_half(AggregationConfig())
    return run_rounds(server, engine, schedule, server.init(START), rounds=count, kind="toy", seed=7, **more)


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: timeless(inner) for key, inner in value.items() if key not in NOT_THE_RESULT}
    return [timeless(inner) for inner in value] if isinstance(value, list) else value


def result(folder: Path) -> dict[str, Any]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {
        "adapter": sha256_file(folder / "adapter" / "adapter_model.safetensors"),
        "log": [timeless(json.loads(line)) for line in lines],
        "answers": (folder / "answers.jsonl").read_text(),
    }


# --- the same bits as in one process -----------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fedit", "fedbiot"])
def test_a_run_on_ray_is_the_run_in_one_process(cluster, world: World, tmp_path: Path, method: str) -> None:
    overrides = FEDBIOT if method == "fedbiot" else ()
    here = load_recipe(world.recipe, [*overrides, "engine.stack=1"])
    api.run(here, tmp_path / "here")
    api.run(replace(here, engine=RayEngine(workers=2)), tmp_path / "ray")
    assert result(tmp_path / "ray") == result(tmp_path / "here")


@pytest.mark.parametrize("remembered", REMEMBERED)
def test_what_clients_remember_is_the_same_on_ray(cluster, world: World, tmp_path: Path, remembered: str) -> None:
    """Control variates and personal adapters travel with their client's tasks, whichever worker gets them."""
    here = load_recipe(world.recipe, [*REMEMBERED[remembered], "engine.stack=1"])
    found = {}
    for name, config in {"here": here, "ray": replace(here, engine=RayEngine(workers=2))}.items():
        api.run(config, tmp_path / name)
        own = sorted((tmp_path / name / "personal").rglob("*.safetensors"))
        found[name] = [sha256_file(path) for path in own], json.loads((tmp_path / name / "summary.json").read_text())
    assert found["ray"][0] == found["here"][0]
    assert found["here"][0]
    assert found["ray"][1]["metrics"] == found["here"][1]["metrics"]
    assert found["ray"][1]["adapter_sha256"] == found["here"][1]["adapter_sha256"]


@pytest.mark.parametrize("method", ["fedit", "fedbiot"])
def test_the_base_model_is_loaded_once_a_worker(cluster, world: World, tmp_path: Path, method: str) -> None:
    from flocktune.assemble import federation

    config = load_recipe(world.recipe, FEDBIOT if method == "fedbiot" else ())
    fed = federation(config)
    own = str(fed.emulated.bundle.folder) if fed.emulated else None
    loads = tmp_path / "loads"
    loads.mkdir()
    source = HalfSource("ray_halves:counted", (str(loads), dump_recipe(config), own))
    with on_ray(RayEngine(workers=2), source, 1) as engine:
        found = run_rounds(
            fed.server,
            engine,
            lambda number: Cohort(tuple(fed.data.clients), 4, 4),
            fed.server.init(fed.start),
            rounds=3,
            kind=fed.kind,
            seed=0,
            model_digest=fed.model_digest,
        )
    assert found
    assert len({path.name.split("-")[0] for path in loads.iterdir()}) == 2, "both workers took part"
    assert sorted(path.read_text() for path in loads.iterdir()) == [own or str(world.model)] * 2


def test_a_worker_with_the_emulator_needs_no_full_model(world: World, tmp_path: Path) -> None:
    from flocktune.assemble import federation

    config = load_recipe(world.recipe, FEDBIOT)
    fed = federation(config)
    assert fed.emulated is not None
    elsewhere = replace(config, model=replace(config.model, path=str(tmp_path / "no such model")))
    message = fed.server.message(fed.server.init(fed.start), 0)
    task = ClientTask(0, next(iter(fed.data.clients)), fed.kind, message, 5, "", fed.model_digest)
    mine, _ = fed.client(task, {})
    theirs, _ = client_half_of(dump_recipe(elsewhere), str(fed.emulated.bundle.folder))(task, {})
    assert digest(theirs.delta) == digest(mine.delta)
    assert theirs.weight == mine.weight


def test_replies_come_in_task_order_with_their_memories(engine: OnRay) -> None:
    clients = [*names(7), "wrong-one", "idle-one", *names(3, "late")]
    here = InProcess(toy())
    for number in range(2):
        expected = [plain(reply) for reply in here.run(tasks_for(clients, number), len(clients))]
        assert [plain(reply) for reply in engine.run(tasks_for(clients, number), len(clients))] == expected
    assert expected[7] == Failure("wrong-one", "ValueError: no rows")
    assert {client: digest(memory) for client, memory in engine.memories.items()} == {
        client: digest(memory) for client, memory in here.memories.items()
    }
    assert "idle-one" not in engine.memories


@pytest.mark.parametrize("wanted", [1, 2, 5])
def test_over_selection_asks_the_clients_that_one_process_asks(engine: OnRay, wanted: int) -> None:
    clients = ("wrong-one", "a", "wrong-two", "b", "c", "d", "e", "f")

    def told(each: Any) -> list[Any]:
        records: list[RoundRecord] = []
        hooks = Hooks(on_round=lambda record, _: records.append(record))
        state = rounds(each, lambda number: Cohort(clients, wanted, 1), hooks=hooks)
        return [digest(state), [(r.failures, list(r.clients), r.bytes_down, r.bytes_up) for r in records]]

    assert told(engine) == told(InProcess(toy()))


def test_a_thousand_clients_a_hundred_at_a_time(engine: OnRay) -> None:
    scheduling = SchedulingConfig(Uniform(0.1))
    sizes = dict.fromkeys(names(1000), 1)

    def schedule(number: int) -> Cohort:
        return select(scheduling, sizes, round=number, seed=3)

    assert len(schedule(0).asked) == 100
    assert digest(rounds(engine, schedule)) == digest(rounds(InProcess(toy()), schedule))


def test_a_stream_has_the_order_of_one_process(engine: OnRay) -> None:
    def heard(engine: Any) -> list[Any]:
        at_work, given, log = set[str](), iter(range(40)), []

        def issue() -> Issued | None:
            if len(at_work) == 7 or (number := next(given, None)) is None:
                return None
            client = next(name for name in ["wrong-one", *names(9)] if name not in at_work)
            at_work.add(client)
            return Issued(ClientTask(len(log), client, "toy", START, number, ""), len(log) / 7)

        for task, reply in engine.stream(issue):
            at_work.remove(task.client)
            log.append((task.client, task.round, plain(reply)))
        return log

    on_workers = heard(engine)
    assert on_workers == heard(InProcess(toy()))
    assert len(on_workers) == 40


def test_a_message_keeps_the_order_of_its_tensors() -> None:
    tensors = {f"layer.{number}": torch.full((2,), float(number)) for number in (10, 2, 33, 1, 7, 4, 12, 5)}
    fields, again = unpack(pack({"weight": 2.5}, tensors))
    assert all(value.data_ptr() % value.element_size() == 0 for value in again.values()), "read where they lie"
    assert fields == {"weight": 2.5}
    assert list(again) == list(tensors)
    assert digest(again) == digest(tensors)


# --- bounded memory ----------------------------------------------------------------------------------------


def test_tasks_are_taken_through_a_window(engine: OnRay) -> None:
    taken = 0

    def counting() -> Iterator[ClientTask]:
        nonlocal taken
        for task in tasks_for(names(60)):
            taken += 1
            yield task

    ahead = [taken - done for done, _ in enumerate(engine.run(counting(), 60))]
    assert taken == 60
    assert max(ahead) == ahead[0] == 4, "two tasks a worker, however many clients there are"


def test_a_round_s_tensors_are_stored_once(engine: OnRay, monkeypatch: pytest.MonkeyPatch) -> None:
    stored: list[bytes] = []
    put = ray.put
    monkeypatch.setattr(ray, "put", lambda value: (stored.append(value), put(value))[1])
    rounds(engine, lambda number: Cohort(tuple(names(10)), 10, 10), 3)
    assert len(stored) == 3


# --- lost workers ------------------------------------------------------------------------------------------


def test_a_killed_worker_changes_no_bit(cluster, tmp_path: Path) -> None:
    clients = (*names(3), "once-a", *names(4, "more"), "once-b")
    with on_ray(RayEngine(workers=2, retries=1), toys(tmp_path)) as engine:
        state = rounds(engine, lambda number: Cohort(clients, len(clients), len(clients)), 2)
    assert len(list(tmp_path.iterdir())) == 4, "two workers were killed in either round"
    whole = rounds(InProcess(toy(str(tmp_path))), lambda number: Cohort(clients, len(clients), len(clients)), 2)
    assert digest(state) == digest(whole)


def test_a_task_that_kills_every_worker_is_given_up(cluster, caplog: pytest.LogCaptureFixture) -> None:
    clients = (*names(2), "deadly", *names(4, "more"))
    records: list[RoundRecord] = []
    with on_ray(RayEngine(workers=2, retries=1), toys()) as engine:
        state = rounds(engine, lambda n: Cohort(clients, 7, 2), 1, hooks=Hooks(on_round=lambda r, _: records.append(r)))
    (failure,) = records[0].failures
    assert failure.client == "deadly"
    assert failure.reason.startswith("its worker was lost 2 times: ")
    assert "\n" not in failure.reason
    others = tuple(client for client in clients if client != "deadly")
    assert digest(state) == digest(rounds(InProcess(toy()), lambda number: Cohort(others, 6, 2), 1))
    assert caplog.text.count("deadly: its worker was lost") == 2
    assert "more-0000: its worker" not in caplog.text, "who waited behind it is not to blame"


def test_a_lost_machine_leaves_the_work_to_the_others(cluster, tmp_path: Path) -> None:
    clients = [*names(3), "once-a", *names(4, "more")]
    with on_ray(RayEngine(workers=2), toys(tmp_path)) as engine:
        engine.room = lambda: 1
        replies = [plain(reply) for reply in engine.run(tasks_for(clients), len(clients))]
        assert len(engine.seats) == 1
        assert replies == [plain(reply) for reply in InProcess(toy(str(tmp_path))).run(tasks_for(clients), 8)]
        engine.room = lambda: 0
        with pytest.raises(FlocktuneError, match="no worker is left"):
            list(engine.run(tasks_for(["once-b"]), 1))


def test_who_stops_asking_can_ask_again(engine: OnRay) -> None:
    replies = engine.run(tasks_for(names(9)), 9)
    next(replies)
    replies.close()
    assert not any(seat.jobs for seat in engine.seats)
    again = [plain(reply) for reply in engine.run(tasks_for(names(3, "new")), 3)]
    assert again == [plain(reply) for reply in InProcess(toy()).run(tasks_for(names(3, "new")), 3)]


def _call_until_dead(actor: Any) -> None:
    """An actor is told to end, and does so a little later."""
    for _ in range(10_000):
        ray.get(actor.load.remote())


def test_workers_end_with_the_engine(cluster) -> None:
    with on_ray(RayEngine(workers=2), toys()) as engine:
        actors = [seat.actor for seat in engine.seats]
        list(engine.run(tasks_for(names(2)), 2))
    with pytest.raises(ray.exceptions.RayActorError):
        _call_until_dead(actors[0])
    with pytest.raises(ray.exceptions.RayActorError):
        _call_until_dead(actors[1])
    assert ray.is_initialized(), "a cluster that was there before stays"


IN_A_PROCESS = """
import signal, sys
from flocktune.config.engines import RayEngine
from flocktune.engine.ray_cluster import HalfSource, on_ray
from flocktune.errors import UserError
from test_ray import names, ray, tasks_for

def handle(number, frame): pass

signal.signal(signal.SIGTERM, handle)
for address, workers in (sys.argv[1], 1), (None, 1):
    with on_ray(RayEngine(workers=workers, address=address), HalfSource("ray_halves:toy")) as engine:
        print(len(list(engine.run(tasks_for(names(3)), 3))), ray.get_runtime_context().gcs_address == sys.argv[1])
        assert signal.getsignal(signal.SIGTERM) is handle
    assert not ray.is_initialized()
try:
    with on_ray(RayEngine(address="127.0.0.1:1"), HalfSource("ray_halves:toy")):
        pass
except UserError as error:
    print(error)
"""


def test_a_process_joins_a_cluster_or_starts_its_own(cluster) -> None:
    address = ray.get_runtime_context().gcs_address
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(flocktune.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS, address],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    joined, started, refused = done.stdout.splitlines()
    assert [joined, started] == ["3 True", "3 False"]
    assert refused.startswith("engine.address: expected a Ray cluster that runs, got 127.0.0.1:1: ")
    assert [node["Alive"] for node in ray.nodes()] == [True], "the cluster that was joined runs on"


# --- what a person may do wrong ----------------------------------------------------------------------------


def test_workers_that_can_not_load_say_why(cluster) -> None:
    with (
        on_ray(RayEngine(workers=2), HalfSource("ray_halves:broken")) as engine,
        pytest.raises(UserError, match=r"FileNotFoundError: /data/rows\.jsonl"),
    ):
        list(engine.run(tasks_for(names(3)), 3))


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        (RayEngine(workers=5), "engine.workers: expected at most the 4 that fit into the cluster (4 CPUs, 0 GPUs)"),
        (RayEngine(workers=3, cpus_per_worker=1.5), "at most the 2 that fit"),
        (RayEngine(cpus_per_worker=64), "got 1 with 64 CPUs"),
        (RayEngine(workers=1, gpus_per_worker=0.25), "at most the 0 that fit"),
        (RayEngine(workers=1, gpus_per_worker=1.5), "engine.gpus_per_worker: expected a part of one GPU"),
    ],
)
def test_what_the_cluster_does_not_have_is_refused_at_once(cluster, settings: RayEngine, where: str) -> None:
    with pytest.raises(UserError) as refused, on_ray(settings, toys()):
        pass
    assert where in str(refused.value)


@pytest.mark.parametrize(
    ("cpus", "gpus", "fit"), [(1, 0, 12), (3, 0, 4), (0.5, 0, 24), (1, 0.25, 8), (1, 0.4, 4), (1, 1, 2), (8, 2, 1)]
)
def test_how_many_workers_fit(cpus: float, gpus: float, fit: int) -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0}},
        {"Alive": True, "Resources": {"CPU": 4.0}},
        {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
    ]
    expected = fit if gpus else int(8 // cpus + 4 // cpus)
    assert count_that_fit(nodes, RayEngine(cpus_per_worker=cpus, gpus_per_worker=gpus)) == expected


def test_without_ray_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'flocktune\[ray\]'"), on_ray(RayEngine(), toys()):
        pass


def test_a_recipe_says_it_in_a_word() -> None:
    assert parse_recipe("engine: ray").engine == RayEngine()
    long = "engine: {kind: ray, workers: 2, cpus_per_worker: 1, gpus_per_worker: 0.25, address: auto, retries: 2}"
    assert parse_recipe(long).engine == RayEngine(2, 1.0, 0.25, "auto", 2)
