"""An owner's two processes: the worker that keeps the model, for real, and the stay of its network side."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flocktune.audit import read_audit
from flocktune.engine.flower.fleet import NotAdmitted, Received
from flocktune.engine.parcels import FAILURE, TASK, UPDATE, LinkDown, Parcel, to_text
from flocktune.enrolment import Invitation, public_key_of
from flocktune.errors import FlocktuneError, Problem, UpdateRefused, UserError
from flocktune.owner import join as stay
from flocktune.owner import worker as workers
from flocktune.owner.home import AUDIT, CACHE, POLICY, Home, make_home
from flocktune.owner.policy import MB, write_policy
from flocktune.owner.worker import LOG, Settings, Worker, WorkerDied
from tiny_federation import Scene, make_scene

PATIENCE_S = 600.0


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture
def settings_(scene: Scene) -> Iterator[Settings]:
    """Below /tmp: a socket's path is short. Whatever still runs there is ended."""
    with tempfile.TemporaryDirectory(prefix="flocktune-", dir="/tmp") as home:
        write_policy(Path(home) / POLICY)
        rows, model = scene.world / "owners" / "bob.jsonl", scene.world / "model"
        given = Settings("bob", home, str(rows), str(model), device="cpu")
        yield given
        Worker(given).stop()


def log_of(settings_: Settings) -> str:
    return (Path(settings_.home) / LOG).read_text()


def connection_of(worker: Worker) -> Any:
    assert worker._connection is not None
    return worker._connection


def ended(worker: Worker) -> bool:
    """Waits for the end of the worker at the other end of the connection: the system closes it then."""
    return connection_of(worker).poll(PATIENCE_S)


def endless(scene: Scene, client: str = "bob") -> Parcel:
    return scene.task("local.steps=900000", client=client)


@contextmanager
def at_work(worker: Worker, parcel: Parcel) -> Iterator[list[BaseException]]:
    """``parcel`` is being worked at inside; what ended that is in the list afterwards."""
    raised: list[BaseException] = []

    def work() -> None:
        try:
            worker.ask(parcel, PATIENCE_S, STOP)
        except FlocktuneError as error:
            raised.append(error)

    STOP.clear()
    thread = threading.Thread(target=work)
    thread.start()
    audit = Path(worker.settings.home) / AUDIT
    until = time.monotonic() + PATIENCE_S
    while parcel.fields["nonce"] not in {record.get("nonce") for record in read_audit(audit)}:
        assert time.monotonic() < until and thread.is_alive()  # noqa: PT018
        time.sleep(0.01)
    try:
        yield raised
    finally:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


STOP = threading.Event()


# --- the worker ------------------------------------------------------------------------------------------


def test_a_worker_keeps_its_model_over_rounds_runs_and_network_sides(
    scene: Scene, settings_: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLOCKTUNE_CACHE")
    worker = Worker(settings_)
    first = worker.ask(scene.task(round=0), PATIENCE_S)
    assert first.kind == UPDATE, first
    process = worker.process_id
    assert process not in (0, os.getpid())
    for task in (scene.task(round=1), scene.task("local.lr=2e-2"), scene.task(run="another"), scene.task("seed=5")):
        assert worker.ask(task, PATIENCE_S).kind == UPDATE
    assert worker.process_id == process
    assert stat.S_IMODE(settings_.socket.stat().st_mode) == 0o600
    assert stat.S_IMODE((Path(settings_.home) / LOG).stat().st_mode) == 0o600
    kept = Path(settings_.home) / CACHE
    assert list(kept.glob("*.arrow")), "rows as tokens lie in the home"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    connection_of(worker).close()  # as the system does for a network side that was killed
    again = Worker(settings_)
    assert again.ask(scene.task(round=0), PATIENCE_S).sha256 == first.sha256
    assert again.process_id == process
    assert log_of(settings_).count("INFO flocktune.resident: loaded ") == 1, "the base model, once"

    connection_of(again).close()
    assert said_to_nobody(settings_) == b"", "another user gets nothing, should folder and socket ever let it through"
    assert again_greeted(settings_) == process

    killed = Worker(settings_)
    killed.ask(Parcel(TASK, {}), PATIENCE_S)  # connected
    os.kill(process, signal.SIGKILL)
    assert ended(killed)
    assert settings_.socket.exists(), "a dead worker's"
    assert killed.ask(scene.task(round=0), PATIENCE_S).sha256 == first.sha256, "started again, unasked"
    assert killed.process_id not in (0, process)
    assert log_of(settings_).count("INFO flocktune.resident: loaded ") == 2

    with at_work(killed, endless(scene)) as raised:
        os.kill(killed.process_id, signal.SIGKILL)
    (error,) = raised
    assert isinstance(error, WorkerDied)
    assert "ended in the middle of a task" in str(error)


def again_greeted(settings_: Settings) -> int:
    worker = Worker(settings_)
    connection = worker._greet(threading.Event())
    assert connection is not None
    connection.close()
    return worker.process_id


def said_to_nobody(settings_: Settings) -> bytes:
    """What a process of another user hears, with both modes wide open; only root can try it."""
    if os.getuid() != 0:
        return b""
    home = Path(settings_.home)
    home.chmod(0o755)
    settings_.socket.chmod(0o666)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        heard = b"never connected"
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(60)
                connection.connect(str(settings_.socket))
                heard = connection.recv(1000)
        finally:
            os.write(writing, heard)
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as told:
        heard = told.read()
    os.waitpid(child, 0)
    home.chmod(0o700)
    settings_.socket.chmod(0o600)
    return heard


def test_a_worker_ends_when_others_settings_come_when_it_takes_too_long_or_is_not_wanted_any_more(
    scene: Scene, settings_: Settings
) -> None:
    worker, other = Worker(settings_), Worker(replace(settings_, client="alice"))
    assert worker.ask(Parcel(TASK, {}), PATIENCE_S).kind == FAILURE
    process = worker.process_id
    connection_of(worker).close()
    assert "this is alice" in other.ask(scene.task(), PATIENCE_S).fields["reason"]
    assert other.process_id != process
    assert gone(process)

    process = other.process_id
    with pytest.raises(WorkerDied, match=r"took longer than 0.005 minutes, and was stopped"):
        other.ask(endless(scene, "alice"), 0.3)
    assert other.process_id == 0
    assert gone(process)

    worker = Worker(settings_)
    with at_work(worker, endless(scene)) as raised:
        process = worker.process_id
        STOP.set()
    assert str(raised[0]) == "was stopped in the middle of a task"
    assert gone(process)


def gone(process: int) -> bool:
    """Whether a process has ended, or ends; what is left of it is its parent's note."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.01)
    return False


def test_an_idle_worker_gives_its_memory_back(scene: Scene, settings_: Settings) -> None:
    worker = Worker(settings_, idle_s=0.5)
    assert worker.ask(scene.task(), PATIENCE_S).kind == UPDATE
    process = worker.process_id
    assert ended(worker)
    assert gone(process)
    assert not settings_.socket.exists()
    assert "idle for 0.5 s: ending" in log_of(settings_)


def test_a_worker_that_does_not_start_is_said_with_its_log(
    settings_: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers.sys, "executable", "/bin/false")
    with pytest.raises(UserError, match=r"worker\.log: expected a worker that starts"):
        Worker(settings_).ask(Parcel(TASK, {}), PATIENCE_S)


DEAF = """
import socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen(4)
print(flush=True)
input()
"""


def test_a_worker_that_never_gets_to_it_is_replaced(settings_: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is at a task of a network side that was killed: nobody waits for that any more."""
    monkeypatch.setattr(workers, "HELLO_S", 0.05)
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", DEAF, str(settings_.socket)], stdin=pipe, stdout=pipe) as deaf:
        assert deaf.stdout is not None
        deaf.stdout.readline()
        assert Worker(settings_)._greet(threading.Event()) is None
        assert deaf.wait(60) == -signal.SIGKILL


def test_a_stop_waits_for_no_worker(settings_: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for one that does not get to it, nor for one that does not listen yet."""
    monkeypatch.setattr(workers, "HELLO_S", PATIENCE_S)
    stop = threading.Event()
    stop.set()
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", DEAF, str(settings_.socket)], stdin=pipe, stdout=pipe) as deaf:
        assert deaf.stdout is not None
        deaf.stdout.readline()
        with pytest.raises(WorkerDied, match="was stopped"):
            Worker(settings_).ask(Parcel(TASK, {}), PATIENCE_S, stop)
        assert deaf.poll() is None
        ending = threading.Thread(target=Worker(settings_).stop, daemon=True)
        ending.start()
        ending.join(60)
        assert not ending.is_alive()
        assert deaf.wait(60) == -signal.SIGKILL

    started: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexec sleep 600\n")
    silent.chmod(0o700)
    monkeypatch.setattr(workers.sys, "executable", str(silent))
    monkeypatch.setattr(
        workers.subprocess, "Popen", lambda *given, **more: started.append(real(*given, **more)) or started[-1]
    )
    with pytest.raises(WorkerDied, match="was stopped"):
        Worker(settings_).ask(Parcel(TASK, {}), PATIENCE_S, stop)
    assert started[0].wait(60) == -signal.SIGKILL


def test_a_worker_bounds_its_own_time(settings_: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the network side, which does so first, was killed."""
    set_to: list[float] = []
    monkeypatch.setattr(workers.signal, "setitimer", lambda which, seconds: set_to.append(seconds))
    (Path(settings_.home) / POLICY).write_text("max_minutes: 2.5\n")
    with workers._limited(Path(settings_.home)):
        assert set_to == [150.0 + workers.GRACE_S]
    assert set_to[1:] == [0]


def test_too_long_a_path_is_refused_at_once() -> None:
    with pytest.raises(UserError, match=r"--home: expected a path of at most 88 bytes, got /h.*A unix socket needs"):
        Worker(Settings("bob", "/h" + "ä" * 60, "rows"))
    Worker(Settings("bob", "/" + "h" * 87, "rows"))


def test_fields_that_can_not_be_sent_on_are_refused(settings_: Settings) -> None:
    with pytest.raises(UpdateRefused, match="plain fields"):
        Worker(settings_).ask(Parcel(TASK, {"round": float("nan")}), PATIENCE_S)
    assert not settings_.socket.exists(), "no worker was started for it"


# --- the stay ----------------------------------------------------------------------------------------------


@dataclass
class FakeFleet:
    """A connection by script: each step of ``connects``, ``tasks`` and ``replies`` is raised, or what happens."""

    stop: threading.Event
    tasks: list[Any] = field(default_factory=list)
    connects: list[Exception] = field(default_factory=list)
    replies: list[Exception] = field(default_factory=list)
    said: list[tuple[object, Parcel]] = field(default_factory=list)
    limits: list[int] = field(default_factory=list)
    connected_times: int = 0

    @contextmanager
    def connected(self) -> Iterator[None]:
        if self.connects:
            raise self.connects.pop(0)
        self.connected_times += 1
        yield

    def receive(self, limit_bytes: int) -> Received | None:
        self.limits.append(limit_bytes)
        if not self.tasks:
            self.stop.set()
            return None
        task = self.tasks.pop(0)
        if isinstance(task, Exception):
            raise task
        return task

    def reply(self, received: Received, parcel: Parcel) -> None:
        if self.replies:
            raise self.replies.pop(0)
        to_text(parcel)
        self.said.append((received.message, parcel))


@dataclass
class FakeWorker:
    """Answers by ``does``; knows whether it was stopped."""

    does: Callable[[Parcel], Parcel]
    asked: list[tuple[Parcel, float]] = field(default_factory=list)
    stopped: int = 0

    def ask(self, parcel: Parcel, timeout_s: float, stop: threading.Event | None = None) -> Parcel:
        self.asked.append((parcel, timeout_s))
        return self.does(parcel)

    def stop(self) -> None:
        self.stopped += 1


FIELDS = {"run": "r", "nonce": "n", "round": 4, "client": "bob"}


def task_of(**changes: Any) -> Received:
    return Received(object(), Parcel(TASK, {**FIELDS, **changes}))  # type: ignore[arg-type]


def update(parcel: Parcel) -> Parcel:
    return Parcel(UPDATE, dict(parcel.fields), b"12345")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    from flocktune.enrolment import new_private_key

    made = make_home(tmp_path / "home", replace(INVITATION, private_key=new_private_key().decode()))
    assert stat.S_IMODE(made.folder.stat().st_mode) == 0o700
    return made


INVITATION = Invitation("id", "a-federation", "bob", "nowhere.example", 1, "-----CA-----")


@pytest.fixture
def stayed(home: Home, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SimpleNamespace]:
    """Join by a script, to its end: what was said, replied and asked."""
    for pause in ("BUSY_S", "QUIET_S", "AGAIN_S", "LONGEST_AGAIN_S"):
        monkeypatch.setattr(stay, pause, 0.001)

    def run(does: Callable[[Parcel], Parcel] = update, **script: Any) -> SimpleNamespace:
        stop, said = threading.Event(), []
        fleet, worker = FakeFleet(stop, **script), FakeWorker(does)
        monkeypatch.setattr(stay, "_fleet", lambda invitation, home, stop: fleet)
        monkeypatch.setattr(stay, "Worker", lambda settings: worker)
        stay.join(INVITATION, home, Settings("bob", str(home.folder), "rows"), said.append, stop)
        return SimpleNamespace(said=said, fleet=fleet, worker=worker, replies=[parcel for _, parcel in fleet.said])

    return run


def test_a_stay_does_tasks_and_says_each_thing_once(stayed: Any, home: Home) -> None:
    received = task_of()
    told = stayed(tasks=[None, None, received, None])
    assert told.said == ["connected; waiting for tasks", "round 5: trained; 5 bytes leave"]
    assert told.fleet.said == [(received.message, update(received.parcel))]
    assert told.worker.asked == [(received.parcel, 3600.0)]
    assert told.worker.stopped == 1
    assert [record["event"] for record in read_audit(home.folder / AUDIT)] == ["joined", "left"]


def test_a_reply_waits_through_an_outage(stayed: Any) -> None:
    down = [LinkDown("refused"), LinkDown("refused"), LinkDown("refused")]
    told = stayed(tasks=[task_of()], replies=down)
    assert [parcel.kind for parcel in told.replies] == [UPDATE]
    assert told.said[2:] == ["no connection (refused); the reply waits"]
    assert len(told.worker.asked) == 1, "trained once"


def test_a_reply_that_is_not_wanted_any_more_is_dropped(stayed: Any) -> None:
    told = stayed(tasks=[task_of(), task_of(nonce="next")], replies=[FlocktuneError("its round is over")])
    assert "the reply is not wanted any more: its round is over" in told.said
    assert [parcel.fields["nonce"] for parcel in told.replies] == ["next"]


def test_who_is_not_admitted_says_so_once_and_tries_again(stayed: Any) -> None:
    told = stayed(connects=[NotAdmitted(0.0, "HTTP 401")] * 5, tasks=[task_of()])
    (first, *rest) = told.said
    assert first.startswith("not let in yet: the key is not enrolled (HTTP 401)")
    assert rest == ["connected; waiting for tasks", "round 5: trained; 5 bytes leave"]


def test_an_outage_is_said_once_and_ends(stayed: Any) -> None:
    told = stayed(connects=[LinkDown("refused")] * 4, tasks=[LinkDown("cut"), LinkDown("cut"), task_of()])
    assert told.said == [
        "no connection (refused); trying again",
        "connected; waiting for tasks",
        "no connection (cut); trying again",
        "connected; waiting for tasks",
        "no connection (cut); trying again",
        "connected; waiting for tasks",
        "round 5: trained; 5 bytes leave",
    ]
    assert told.fleet.connected_times == 3


def test_no_answer_of_a_coordinator_ends_a_stay(stayed: Any) -> None:
    told = stayed(connects=[ValueError("no protobuf")] * 2, tasks=[RuntimeError("odd"), task_of()])
    assert told.said[0] == "not connected: ValueError: no protobuf; trying again"
    assert len(told.replies) == 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (WorkerDied("took longer than 60 minutes, and was stopped"), "took longer than 60 minutes, and was stopped"),
        (UpdateRefused("message: expected plain fields"), "message: expected plain fields"),
        (
            UserError(Problem("/home/bob/worker.log", "a worker that starts", "none")),
            "the owner's worker does not start",
        ),
    ],
)
def test_a_worker_that_fails_is_answered_for_and_written_down(
    stayed: Any, home: Home, error: FlocktuneError, reason: str
) -> None:
    """Under the task's own nonce, and without the owner's paths."""

    def fails(parcel: Parcel) -> Parcel:
        raise error

    told = stayed(fails, tasks=[task_of()])
    assert told.replies == [Parcel(FAILURE, {**FIELDS, "reason": reason})]
    assert str(error) in told.said
    _, refusal, _ = read_audit(home.folder / AUDIT)
    assert (refusal["event"], refusal["reasons"]) == ("task_refused", [str(error)])
    assert (refusal["run"], refusal["round"], refusal["nonce"]) == ("r", 4, "n")


@pytest.mark.parametrize("round_", [True, -1, 10**4000, float("nan"), "4", [4], None])
def test_fields_of_a_stranger_are_repeated_only_as_far_as_they_can_be(stayed: Any, home: Home, round_: Any) -> None:
    def fails(parcel: Parcel) -> Parcel:
        raise WorkerDied("died")

    assert len(stayed(fails, tasks=[task_of(round=round_, run="r" * 5000, nonce=7)]).replies) == 1
    _, refusal, _ = read_audit(home.folder / AUDIT)
    assert (refusal["run"], refusal["nonce"]) == ("r" * 200, "")
    assert refusal["round"] == (round_ if type(round_) is int and round_ < 2**64 else -1)
    told = stayed(lambda parcel: Parcel(FAILURE, {"reason": "no"}), tasks=[task_of(round=round_)])
    assert told.said[-1] == "a task: not done: no"


def test_what_is_no_parcel_is_answered_and_written_down_without_the_worker(stayed: Any, home: Home) -> None:
    told = stayed(tasks=[Received(object(), None, "message: expected flocktune-parcel/1")])  # type: ignore[arg-type]
    assert told.worker.asked == []
    assert told.replies == [Parcel(FAILURE, {"reason": "message: expected flocktune-parcel/1"})]
    _, refusal, _ = read_audit(home.folder / AUDIT)
    assert (refusal["event"], refusal["round"]) == ("task_refused", -1)
    assert refusal["reasons"] == ["message: expected flocktune-parcel/1"]


def test_on_a_full_disk_a_refusal_is_still_answered(stayed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from flocktune import audit

    real = audit._write_whole

    def full(descriptor: int, data: bytes) -> None:
        if b"task_refused" in data:
            raise OSError(28, "No space left on device")
        real(descriptor, data)

    monkeypatch.setattr(audit, "_write_whole", full)
    told = stayed(tasks=[Received(object(), None, "no parcel")])  # type: ignore[arg-type]
    assert len(told.replies) == 1
    assert "not in the audit log" in told.said[-1]


def test_what_a_stranger_wrote_does_not_paint(stayed: Any) -> None:
    paint = "\x1b]0;owned\x07\x1b[2J"
    told = stayed(
        lambda parcel: Parcel(FAILURE, {"reason": paint}),
        connects=[NotAdmitted(0.0, paint), LinkDown(paint), FlocktuneError(paint), ValueError(paint)],
        tasks=[task_of(), Received(object(), None, paint)],  # type: ignore[arg-type]
        replies=[FlocktuneError(paint)],
    )
    assert len(told.said) == 8
    assert all(text.isprintable() for text in told.said)


def test_the_policy_bounds_messages_and_minutes_from_one_task_to_the_next(stayed: Any, home: Home) -> None:
    def edits(parcel: Parcel) -> Parcel:
        home.policy.write_text("max_minutes: 3.0\nmax_task_mb: 7\n")
        return update(parcel)

    told = stayed(edits, tasks=[task_of(), task_of()])
    assert [seconds for _, seconds in told.worker.asked] == [3600.0, 180.0]
    assert told.fleet.limits == [2048 * MB, 7 * MB, 7 * MB]


def test_a_broken_policy_is_said_once_and_the_worker_refuses(stayed: Any, home: Home) -> None:
    home.policy.write_text("max_minutes: soon\n")
    told = stayed(lambda parcel: Parcel(FAILURE, {"reason": "no"}), tasks=[None, task_of(), None, task_of()])
    assert len([text for text in told.said if text.startswith("every task is refused: max_minutes")]) == 1
    assert len(told.replies) == 2
    assert told.fleet.connected_times == 1, "it stays, and answers"


def test_a_stop_ends_a_stay_whatever_it_waits_for(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stay, "AGAIN_S", PATIENCE_S)
    monkeypatch.setattr(stay, "LONGEST_AGAIN_S", PATIENCE_S)
    scripts: list[dict[str, Any]] = [
        {"connects": [LinkDown("refused")] * 9},
        {"tasks": [task_of()], "replies": [LinkDown("refused")] * 9},
    ]
    for script in scripts:
        stop, waiting = threading.Event(), threading.Event()
        worker = FakeWorker(update)
        monkeypatch.setattr(stay, "_fleet", lambda *given, stop=stop, script=script: FakeFleet(stop, **script))
        monkeypatch.setattr(stay, "Worker", lambda settings, worker=worker: worker)

        def said(text: str, waiting: threading.Event = waiting) -> None:
            if text.startswith("no connection"):
                waiting.set()

        settings_ = Settings("bob", str(home.folder), "rows")
        thread = threading.Thread(target=stay.join, args=(INVITATION, home, settings_, said, stop))
        thread.start()
        assert waiting.wait(60)
        stop.set()
        thread.join(60)
        assert not thread.is_alive()
        assert worker.stopped == 1


def test_two_processes_do_not_share_a_home(stayed: Any, home: Home) -> None:
    from flocktune.files import exclusive

    with exclusive(home.folder):
        with pytest.raises(UserError, match=r"a home that no join is using.*another process holds.*Another join"):
            stayed()
        with pytest.raises(UserError, match="Another join is running with this home"):
            make_home(home.folder, INVITATION)
    assert list(read_audit(home.folder / AUDIT)) == []


# --- the home ----------------------------------------------------------------------------------------------

OPEN = replace(INVITATION, secret="ab" * 32)


def invited_again(secret: str) -> Invitation:
    return replace(OPEN, secret=secret * 32)


def test_a_home_belongs_to_one_federation_and_a_new_invitation_means_a_new_key(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home", OPEN)
    assert make_home(tmp_path / "home", OPEN).public_key == home.public_key
    # Invited anew before it was ever let in: the key is as good as it was.
    assert make_home(tmp_path / "home", invited_again("cd")).public_key == home.public_key
    for number in (1, 2):
        before = make_home(tmp_path / "home", OPEN)
        home.node.write_text("17")  # it was let in; a further invitation means that it was removed since
        again = make_home(tmp_path / "home", invited_again(f"e{number}"))
        assert again.public_key != before.public_key
        assert not home.node.exists(), "so that join writes a request"
        assert public_key_of((home.folder / f"key.before-{number}").read_bytes()) == before.public_key
        assert stat.S_IMODE((home.folder / f"key.before-{number}").stat().st_mode) == 0o600


def test_an_older_invitation_locks_nobody_out(tmp_path: Path) -> None:
    from flocktune.enrolment import new_private_key

    make_home(tmp_path / "home", OPEN)
    (tmp_path / "home" / "node").write_text("17")
    brought = replace(INVITATION, private_key=new_private_key().decode())
    home = make_home(tmp_path / "home", brought)
    assert home.public_key == public_key_of(str(brought.private_key).encode())
    home.node.write_text("18")
    assert make_home(tmp_path / "home", OPEN).public_key == home.public_key
    make_home(tmp_path / "home", invited_again("ef"))
    home.node.write_text("19")
    last = make_home(tmp_path / "home", invited_again("ef"))
    assert make_home(tmp_path / "home", brought).public_key == last.public_key != home.public_key
    assert home.node.exists()


def test_who_only_looks_changes_no_key(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home", OPEN, look=True)
    home.node.write_text("17")
    before = {path.name: path.read_bytes() for path in home.folder.iterdir()}
    assert make_home(home.folder, invited_again("cd"), look=True) == home
    assert {path.name: path.read_bytes() for path in home.folder.iterdir()} == before
    assert make_home(home.folder, invited_again("cd")).public_key != home.public_key, "it is still new to join"


@pytest.mark.parametrize("look", [True, False])
def test_a_folder_of_others_is_left_alone(tmp_path: Path, look: bool) -> None:
    home = make_home(tmp_path / "home", OPEN)
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "letter").write_text("dear")
    for folder, invitation in (
        (home.folder, replace(OPEN, federation_id="another")),
        (tmp_path / "documents", OPEN),
    ):
        folder.chmod(0o755)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(UserError, match=r"Choose another.*--home"):
            make_home(folder, invitation, look=look)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        assert stat.S_IMODE(folder.stat().st_mode) == 0o755


def test_a_key_that_is_gone_is_named_and_a_new_invitation_makes_one(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home", OPEN)
    home.node.write_text("17")
    home.key.unlink()
    with pytest.raises(UserError, match=r"home/key: expected the key that the coordinator has let in, got nothing"):
        make_home(home.folder, OPEN)
    assert make_home(home.folder, invited_again("cd")).public_key != home.public_key
    assert not home.node.exists()
