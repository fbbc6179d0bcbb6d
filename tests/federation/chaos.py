"""A real federation through seeded schedules of faults: ``make test-federation``. As root; no part of ``make test``.

Owners are machines of their own (network namespaces). Whatever happens to them or to the coordinator, the run ends with
all its rounds, or says why not and goes on when it is told to; and its adapter is, to the bit, that of a run in one
process in which those who were left out were merely absent.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from network import COORDINATOR, Disk, Network, disk, may_be_had, network, wrong_clock
from replay import replay

from conftest import World, make_world
from flocktune import audit
from flocktune.federation.services import NAMES as PROGRAMS
from flocktune.federation.services import belonging, pid_of, program, services
from real_federation import (
    Deployed,
    Owner,
    audit_of,
    coordinator,
    is_alive,
    owner_of,
    processes_with,
    verb,
    wait_until,
    write_world,
)

SEEDS = 5
NAMES = ("ada", "bela", "carl", "dora")
ROUNDS = 6
DEADLINE_S, ABSENT_S = 60.0, 10.0
MOST_ATTEMPTS = 15
SETTINGS = (
    f"rounds={ROUNDS}",
    "local.steps=40",
    f"engine={{kind: flower, deadline_s: {DEADLINE_S}, absent_s: {ABSENT_S}}}",
)


@dataclass
class Chaos:
    """What faults act on. ``mending``: held while the coordinator is broken on purpose."""

    deployed: Deployed
    network: Network
    disks: dict[str, Disk]
    runs_disk: Disk
    clock: Path
    run: str = ""
    watcher: subprocess.Popen[str] | None = None
    told: list[str] = field(default_factory=list)
    mending: threading.Lock = field(default_factory=threading.Lock)
    over: threading.Event = field(default_factory=threading.Event)

    def rounds_done(self) -> int:
        """-1 before the run has begun."""
        events = self.deployed.events(self.run)
        return len([event for event in events if event["event"] == "round"]) if events else -1

    def up(self) -> None:
        verb("federation", "up", self.deployed.folder)


# --- faults: each breaks something, and mends it ---------------------------------------------------

Fault: TypeAlias = Callable[[Chaos, Owner], None]


def killed(chaos: Chaos, owner: Owner, *, network: bool, worker: bool, away_s: float = 0) -> None:
    if network:
        owner.kill()
    if worker:
        owner.kill_worker()
    time.sleep(away_s)
    if network:
        owner.join()


def cut_off(chaos: Chaos, owner: Owner, *, seconds: float) -> None:
    chaos.network.plug(owner.name, up=False)
    time.sleep(seconds)
    chaos.network.plug(owner.name, up=True)


def slowed(chaos: Chaos, owner: Owner) -> None:
    chaos.network.slow(owner.name, kilobits=20)
    time.sleep(15)
    chaos.network.slow(owner.name, kilobits=0)


def wrong_time(chaos: Chaos, owner: Owner, *, seconds: int) -> None:
    """It comes back with another clock, and stays with it while that is made up for."""
    before = len(owner.said())
    owner.kill()
    owner.kill_worker()
    owner.join(LD_PRELOAD=str(chaos.clock), SKEW_S=str(seconds))
    if abs(seconds) < 300:
        wait_until(lambda: "connected; waiting" in owner.said()[before:], f"{owner.name} at {seconds} s to connect")
        time.sleep(30)
    else:
        said = f"clock is {abs(seconds):,} s {'ahead of' if seconds > 0 else 'behind'} the coordinator's: set it"
        about = said.partition(f"{abs(seconds):,}")[2]  # give or take a second
        wait_until(lambda: about in owner.said()[before:], f"{owner.name} to be told of its clock")
        time.sleep(10)
        assert "connected; waiting" not in owner.said()[before:]
    owner.kill()
    owner.kill_worker()
    owner.join()


def full_disk(chaos: Chaos, owner: Owner) -> None:
    chaos.disks[owner.name].fill()
    time.sleep(15)
    chaos.disks[owner.name].empty()
    if owner.process is not None and owner.process.poll() is not None:
        owner.join()


def doubled(chaos: Chaos, owner: Owner) -> None:
    """The same key on two machines at once."""
    twin = replace(owner, folder=owner.folder / "twin", process=None)
    shutil.rmtree(twin.folder, ignore_errors=True)
    twin.folder.mkdir()
    shutil.copytree(owner.home, twin.home, ignore=shutil.ignore_patterns("*.sock", ".lock", ".filler"))
    twin.join()
    time.sleep(20)
    twin.kill()
    twin.kill_worker()


def program_killed(chaos: Chaos, owner: Owner, *, names: tuple[str, ...], down_s: float = 4) -> None:
    with chaos.mending:
        for name in names:
            pid = pid_of(services(chaos.deployed.federation)[name])
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
        time.sleep(down_s)
        chaos.told.append(verb("federation", "status", chaos.deployed.folder))
        chaos.up()


def run_killed(chaos: Chaos, owner: Owner) -> None:
    pids = run_processes(chaos)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert pids, "the run has no process"


def all_killed(chaos: Chaos, owner: Owner) -> None:
    """As when the coordinator's machine loses its power."""
    with chaos.mending:
        for pid in belonging(chaos.deployed.federation):
            os.kill(pid, signal.SIGKILL)
        time.sleep(5)
        chaos.told.append(verb("federation", "status", chaos.deployed.folder))
        chaos.up()


def runs_disk_full(chaos: Chaos, owner: Owner) -> None:
    with chaos.mending:
        chaos.runs_disk.fill()
        wait_until(lambda: chaos.watcher is None or chaos.watcher.poll() is not None, "the run to say its disk is full")
        chaos.runs_disk.empty()


def interrupted(chaos: Chaos, owner: Owner) -> None:
    with chaos.mending:
        watcher = chaos.watcher
        assert watcher is not None
        watcher.send_signal(signal.SIGINT)
        assert watcher.wait(DEADLINE_S * 3) in (0, 130)


def down_and_up(chaos: Chaos, owner: Owner) -> None:
    with chaos.mending:
        verb("federation", "down", chaos.deployed.folder)
        assert belonging(chaos.deployed.federation) == {}
        chaos.up()


def run_processes(chaos: Chaos) -> list[int]:
    """What the SuperExec has started."""
    found = belonging(chaos.deployed.federation).items()
    return [pid for pid, command in found if "flwr-serverapp" in command and is_alive(pid)]


ABSENT = "absent, comes later"
OWNERS: dict[str, Fault] = {
    "network side killed": partial(killed, network=True, worker=False, away_s=3),
    "network side killed for long": partial(killed, network=True, worker=False, away_s=25),
    "worker killed": partial(killed, network=False, worker=True),
    "both killed": partial(killed, network=True, worker=True, away_s=5),
    ABSENT: lambda chaos, owner: owner.join(),
    "link down 5 s": partial(cut_off, seconds=5),
    "link down 20 s": partial(cut_off, seconds=20),
    "link down beyond the deadline": partial(cut_off, seconds=DEADLINE_S + 15),
    "link slow": slowed,
    "clock 200 s ahead": partial(wrong_time, seconds=200),
    "clock 200 s behind": partial(wrong_time, seconds=-200),
    "clock 1000 s ahead": partial(wrong_time, seconds=1000),
    "clock 1000 s behind": partial(wrong_time, seconds=-1000),
    "owner's disk full": full_disk,
    "same key twice": doubled,
}
COORDINATORS: dict[str, Fault] = {
    "nginx killed": partial(program_killed, names=("nginx",)),
    "superlink killed": partial(program_killed, names=("superlink",)),
    "superexec killed": partial(program_killed, names=("superexec",)),
    "superlink and nginx killed for long": partial(program_killed, names=("nginx", "superlink"), down_s=20),
    "run's process killed": run_killed,
    "all of the coordinator killed": all_killed,
    "coordinator's disk full": runs_disk_full,
    "Ctrl-C": interrupted,
    "down and up": down_and_up,
}


@dataclass(frozen=True)
class Planned:
    """A fault that begins ``delay_s`` after ``after`` rounds are done."""

    name: str
    owner: str
    after: int
    delay_s: float


def schedule(seed: int) -> list[Planned]:
    """Every fault is in one of the schedules; a schedule's faults may overlap."""
    deck = random.Random("chaos")
    theirs, ours = list(OWNERS), list(COORDINATORS)
    deck.shuffle(theirs)
    deck.shuffle(ours)
    draw = random.Random(seed)
    owners = draw.sample(NAMES, len(NAMES))
    plan = []
    for place, name in enumerate((*theirs[seed::SEEDS], *ours[seed::SEEDS])):
        owner = owners[place % len(owners)] if name in OWNERS else ""
        plan.append(Planned(name, owner, draw.randrange(0, ROUNDS - 2), draw.uniform(0, 2)))
    return sorted(plan, key=lambda fault: fault.after)


# --- a run through them ----------------------------------------------------------------------------


@dataclass
class Acting:
    """A fault's thread, and what became of it."""

    planned: Planned
    fault: Fault
    began_after: int | None = None
    error: BaseException | None = None

    def act(self, chaos: Chaos) -> None:
        try:
            while chaos.rounds_done() < self.planned.after:
                if chaos.over.wait(0.05):
                    return
            if chaos.over.wait(self.planned.delay_s):
                return
            self.began_after = chaos.rounds_done()
            # The coordinator's faults are nobody's, and do not look at the owner.
            self.fault(chaos, chaos.deployed.owners[self.planned.owner or NAMES[0]])
        except BaseException as error:
            self.error = error


def prepare(chaos: Chaos, run: str, absent: Collection[str] = ()) -> None:
    """All owners are there, but for those who will come later."""
    chaos.run, chaos.over = run, threading.Event()
    for owner in chaos.deployed.owners.values():
        alive = owner.process is not None and owner.process.poll() is None
        if owner.name in absent:
            owner.leave()
        elif not alive:
            owner.join()


def run_through(chaos: Chaos, faults: list[Acting], notes: Path) -> list[tuple[int, str]]:
    """Start the run, and go on with it as its messages say, until it is finished. Gives (exit code, what it said)."""
    started = time.perf_counter()
    folder = chaos.deployed.federation.runs / chaos.run
    threads = [threading.Thread(target=fault.act, args=(chaos,), daemon=True) for fault in faults]
    for thread in threads:
        thread.start()
    attempts: list[tuple[int, str]] = []
    while not (folder / "summary.json").exists():
        assert len(attempts) < MOST_ATTEMPTS, attempts
        with chaos.mending:
            chaos.up()
            begun = (folder / "roster.json").exists()
            what = ["--resume", chaos.run] if begun else [chaos.deployed.recipe, f"name={chaos.run}", *SETTINGS]
            command = (program("flocktune"), "federation", "run", chaos.deployed.folder, *what)
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            chaos.watcher = subprocess.Popen([str(word) for word in command], stdin=subprocess.DEVNULL, **pipes)
        said, _ = chaos.watcher.communicate(timeout=1200)
        attempts.append((chaos.watcher.returncode, said))
    chaos.over.set()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive()
    report(chaos, faults, attempts, time.perf_counter() - started)
    (notes / "said.json").write_text(json.dumps({"attempts": attempts, "status": chaos.told}, indent=1))
    for fault in faults:
        assert fault.error is None, f"{fault.planned}: {fault.error!r}"
        assert fault.began_after is not None, f"{fault.planned}: the run was over before"
    assert not [said for _, said in attempts if "Traceback" in said]
    return attempts


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chaos]:
    if missing := may_be_had():
        pytest.fail(f"the chaos suite needs {missing}")
    folder = tmp_path_factory.mktemp("chaos")
    world: World = make_world(folder / "world")
    with ExitStack() as stack:
        net = stack.enter_context(network(NAMES))
        deployed = stack.enter_context(coordinator(folder, COORDINATOR, write_world(folder, world, NAMES)))
        disks = {}
        for name in NAMES:
            owner = owner_of(deployed, folder, name, world, net.inside(name))
            verb("federation", "enrol", deployed.folder, "--name", name, "--out", owner.bundle, "--with-key")
            disks[name] = stack.enter_context(disk(owner.home, 4))
        runs_disk = stack.enter_context(disk(deployed.federation.runs, 32))
        chaos = Chaos(deployed, net, disks, runs_disk, wrong_clock(folder))
        chaos.up()
        yield chaos


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_schedule_of_faults(chaos: Chaos, seed: int, tmp_path: Path) -> None:
    plan = schedule(seed)
    prepare(chaos, f"seed-{seed}", absent={fault.owner for fault in plan if fault.name == ABSENT})
    known = {**OWNERS, **COORDINATORS}
    attempts = run_through(chaos, [Acting(planned, known[planned.name]) for planned in plan], tmp_path)
    for code, _ in attempts[:-1]:
        assert code in (1, 130)
    assert_whole(chaos, tmp_path)


def test_too_few_owners_are_named_and_the_run_goes_on_with_them(chaos: Chaos, tmp_path: Path) -> None:
    gone = NAMES[1:]

    def three_leave(chaos: Chaos, owner: Owner) -> None:
        with chaos.mending:
            for name in gone:
                chaos.deployed.owners[name].leave()
            assert chaos.watcher is not None
            chaos.watcher.wait(DEADLINE_S * 3)
            for name in gone:
                chaos.deployed.owners[name].join()

    prepare(chaos, "too-few")
    fault = Acting(Planned("three leave", "", 1, 0.0), three_leave)
    (failed, said), (resumed, _) = run_through(chaos, [fault], tmp_path)
    assert (failed, resumed) == (1, 0)
    assert "expected updates of at least 2 clients, got 1" in said
    assert all(f"{name}: not connected for {ABSENT_S:g} s" in said for name in gone)
    assert_whole(chaos, tmp_path)


def assert_whole(chaos: Chaos, tmp_path: Path) -> None:
    """Nothing lost, nothing counted twice, nothing that nobody accounts for."""
    deployed, run = chaos.deployed, chaos.deployed.federation.runs / chaos.run
    rounds = deployed.rounds(run.name)
    assert [event["round"] for event in rounds] == list(range(ROUNDS))
    for event in rounds:
        left_out = {failure["client"]: failure["reason"] for failure in event["failures"]}
        assert sorted([*event["answered"], *left_out]) == sorted(NAMES)
        assert all(left_out.values())
        assert len(event["answered"]) >= len(NAMES) / 2

    once_more = replay(run, NAMES, tmp_path / "replay")
    assert deployed.summary(run.name)["adapter_sha256"] == once_more["adapter_sha256"]

    came = deployed.audit("received")
    assert len({record["nonce"] for record in came}) == len(came), "a task was answered twice"
    left = {
        (owner.name, record["nonce"]): record["digest"]
        for owner in deployed.owners.values()
        for record in audit_of(owner, "update_left")
    }
    for record in came:
        assert left[record["client"], record["nonce"]] == record["sha256"]
    for folder in (deployed.folder, *(owner.home for owner in deployed.owners.values())):
        assert audit.verify(folder / "audit.jsonl") == []
    wait_until(lambda: not run_processes(chaos), "the run's process to end")


def report(chaos: Chaos, faults: list[Acting], attempts: list[tuple[int, str]], seconds: float) -> None:
    """What happened, for a person."""
    print(f"\n{chaos.run}: {ROUNDS} rounds in {seconds:.0f} s; exit codes {[code for code, _ in attempts]}")
    for fault in faults:
        print(f"  after round {fault.began_after}: {fault.planned.name} {fault.planned.owner}")
    for event in chaos.deployed.rounds(chaos.run):
        took_s = sum(event["seconds"].values())
        out = "; ".join(f"{failure['client']}: {failure['reason'][:70]}" for failure in event["failures"])
        print(f"  round {event['round'] + 1}: {took_s:5.1f} s, {len(event['answered'])} answered. {out}")


def test_nothing_is_left(chaos: Chaos) -> None:
    for owner in chaos.deployed.owners.values():
        owner.leave()
        wait_until(lambda owner=owner: owner.workers() == [], f"{owner.name}'s worker to end")
    verb("federation", "down", chaos.deployed.folder)
    assert belonging(chaos.deployed.federation) == {}
    assert all(pid_of(service) is None for service in services(chaos.deployed.federation).values())
    assert set(services(chaos.deployed.federation)) == set(PROGRAMS)
    assert processes_with(str(chaos.deployed.folder)) == []
