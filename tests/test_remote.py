"""The engine whose clients are elsewhere, rule by rule, over a link in memory and a clock that nobody waits for."""

from __future__ import annotations

import json
import math
import struct
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fake_link import FAULTS, RUN, START, Act, Down, FakeLink, Time, claiming, pull, remote
from flocktune import wire
from flocktune.algorithms import fedavg
from flocktune.config.engines import FlowerEngine
from flocktune.config.schema import AggregationConfig, Buffered
from flocktune.engine import remote as remote_module
from flocktune.engine.buffered import run_buffered
from flocktune.engine.in_process import InProcess
from flocktune.engine.parcels import FIELDS_LIMIT, REASON_LIMIT, Parcel, from_text, to_text
from flocktune.engine.remote import FIELDS_ROOM, MOST_SENT
from flocktune.engine.rounds import Hooks, RoundRecord, run_rounds
from flocktune.errors import RoundFailed, UpdateRefused
from flocktune.interfaces import Issued, State
from flocktune.scheduling import Cohort
from flocktune.tensors import digest
from flocktune.types import ClientTask, Failure, Update
from flocktune.wire import build_update, decode_tensors, encode_tensors, encoded_size

CLIENTS = ("a", "b", "c", "d")
SETTINGS = FlowerEngine(deadline_s=60.0, absent_s=10.0)
Script = dict[str, Act | list[Act]]


def tasks(clients=CLIENTS, round: int = 0, tensors=START) -> list[ClientTask]:
    return [ClientTask(round, client, "toy", tensors, seed, "recipe") for seed, client in enumerate(clients)]


def following(script: Script) -> Callable[[Parcel, int], Act]:
    """Each client does as it is told: always the same, or one after another and the last for ever."""

    def plan(parcel: Parcel, nth: int) -> Act:
        acts = script.get(str(parcel.fields["client"]), Act())
        return acts if isinstance(acts, Act) else acts[min(nth, len(acts) - 1)]

    return plan


def linked(script: Script | None = None, clients=CLIENTS, **more: Any) -> FakeLink:
    return FakeLink(clients, Time(), following(script or {}), **more)


def replies(link: FakeLink, wanted: int = 0, **more: Any) -> dict[str, Update | Failure]:
    """Of one round, by client, in the order in which they were handed on."""
    given_out = tasks(link.clients)
    found = list(remote(link, **more).run(given_out, wanted or len(given_out)))
    return {task.client: reply for task, reply in zip(given_out, found, strict=True)}


def reason(reply: Update | Failure) -> str:
    assert isinstance(reply, Failure)
    return reply.reason


def same(left: Update | Failure, right: Update | Failure) -> bool:
    if isinstance(left, Failure) or isinstance(right, Failure):
        return left == right
    return digest(left.delta) == digest(right.delta) and left.weight == right.weight


def here(clients=CLIENTS) -> dict[str, Update | Failure]:
    return dict(zip(clients, InProcess(pull).run(tasks(clients), len(clients)), strict=True))


def looped(link: FakeLink, rounds: int = 3, wanted: int = 0, quorum: int = 1, **more: Any) -> list[RoundRecord]:
    records: list[RoundRecord] = []
    server = fedavg.server_half(AggregationConfig())
    asked = tuple(link.clients)
    run_rounds(
        server,
        remote(link, **more),
        lambda number: Cohort(asked, wanted or len(asked), quorum),
        server.init(START),
        rounds=rounds,
        kind="toy",
        seed=7,
        hooks=Hooks(on_round=lambda record, state: records.append(record)),
    )
    return records


# --- order, disk and memory ----------------------------------------------------------------------------------------


def test_replies_come_in_task_order_whatever_came_first() -> None:
    link = linked({"a": Act(takes_s=9), "b": Act(takes_s=3), "c": Act(takes_s=6), "d": Act(takes_s=1)})
    found = replies(link)
    assert [one.client for _, one in link.handed] == ["d", "b", "c", "a"]
    assert list(found) == list(CLIENTS)
    assert all(same(found[client], reply) for client, reply in here().items())
    for client in CLIENTS:
        assert found[client].metrics["loss"] == here()[client].metrics["loss"]


def test_a_federation_far_away_computes_what_one_process_does() -> None:
    states: list[State] = []
    for engine in (InProcess(pull), remote(linked({"a": Act(takes_s=5)}))):
        server = fedavg.server_half(AggregationConfig())
        start = server.init(START)
        schedule = lambda number: Cohort(CLIENTS, 4, 4)  # noqa: E731
        states.append(run_rounds(server, engine, schedule, start, rounds=4, kind="toy", seed=7))
    assert digest(states[0]) == digest(states[1])


@pytest.fixture
def inbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def waiting(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))


def test_early_replies_wait_on_disk_and_leave_it_one_by_one(inbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    write = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda path, data: written.append(path) or write(path, data))
    link = linked({"a": Act(takes_s=9)})
    come = remote(link).run(tasks(), 4)
    next(come)
    assert waiting(inbox) == len(written) == 3, "the one that was next in order is not written"
    next(come)
    assert waiting(inbox) == 2
    next(come)
    come.close()
    assert not list(inbox.iterdir()), "a round that is cut short leaves nothing"
    assert len(list(remote(linked()).run(tasks(), 4))) == 4
    assert not list(inbox.iterdir())


def test_a_stream_keeps_nothing_on_disk_of_what_was_taken(inbox: Path) -> None:
    given_out = iter(tasks(("a", "b") * 20))
    at_work: set[str] = set()

    def issue() -> Issued | None:
        task = next(given_out, None) if len(at_work) < 2 else None
        if task is None:
            return None
        at_work.add(task.client)
        return Issued(task, 0.0)

    count = 0
    for task, reply in remote(linked(clients=("a", "b"))).stream(issue):
        at_work.remove(task.client)
        count += isinstance(reply, Update)
        assert waiting(inbox) <= 1, "as many as are still to be taken"
    assert count == 40
    assert not list(inbox.iterdir())


def test_memory_holds_one_update_however_many_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Update] = weakref.WeakSet()
    most = 0

    class Counted(Update):
        __hash__ = object.__hash__

    def build(fields, tensors) -> Update:
        nonlocal most
        made = build_update(fields, tensors)
        update = Counted(made.delta, made.weight, made.clients, made.metrics)
        alive.add(update)
        most = max(most, len(alive))
        return update

    monkeypatch.setattr(remote_module, "build_update", build)
    clients = tuple(f"c{number:02d}" for number in range(20))
    link = linked({client: Act(takes_s=20.0 - place) for place, client in enumerate(clients)}, clients)
    count = 0
    come = remote(link).run(tasks(clients), 20)
    while (update := next(come, None)) is not None:
        count += isinstance(update, Update)
        del update
    assert count == 20
    assert most == 1


def test_what_all_clients_receive_is_encoded_once_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[object] = []

    def counting(tensors) -> bytes:
        encoded.append(tensors)
        return encode_tensors(tensors)

    monkeypatch.setattr(remote_module, "encode_tensors", counting)
    link = linked({"b": [Act("dies"), Act()]})
    looped(link, rounds=3)
    assert len(encoded) == 3
    blobs = [one.parcel.blob for one in link.sent if one.parcel.fields["round"] == 0]
    assert len(blobs) == 5
    assert len(set(blobs)) == 1


# --- who is waited for, and how long -------------------------------------------------------------------------------


def test_when_the_round_has_what_it_wants_stragglers_are_left_out() -> None:
    link = linked({"b": Act(takes_s=50)})
    found = replies(link, wanted=3)
    assert reason(found["b"]) == "still at work when the round had all the updates it wanted"
    assert sum(isinstance(reply, Update) for reply in found.values()) == 3
    assert link.time() < 5, "nobody waited for it"


def test_with_prompt_clients_over_selection_takes_the_same_as_one_process() -> None:
    prompt = looped(linked(), wanted=3)
    assert [list(record.clients) for record in prompt] == [["a", "b", "c"]] * 3
    assert not any(record.failures for record in prompt)


@pytest.mark.parametrize("how", ["not finite", "weightless", "shapes", "other nonce"])
def test_an_update_that_cannot_be_used_is_none_of_those_that_a_round_wants(how: str) -> None:
    """Else a sound client that is slower would be given up for it, and the quorum missed."""
    link = linked({"a": Act(how), "d": Act(takes_s=30)})
    (record,) = looped(link, rounds=1, wanted=3, quorum=3)
    assert list(record.clients) == ["b", "c", "d"]


def test_the_deadline_is_that_of_the_round_and_late_replies_do_not_count() -> None:
    link = linked({"a": Act("late", takes_s=61), "c": Act(takes_s=59), "d": Act("silent")})
    found = replies(link)
    assert reason(found["a"]) == reason(found["d"]) == "no answer within 60 s"
    assert isinstance(found["c"], Update)
    assert 60 <= link.time() < 61
    again = list(remote(link).run(tasks(("a",), round=1), 1))
    assert reason(again[0]) == "no answer within 60 s"
    assert "a" not in [one.client for _, one in link.handed], "what comes late is never taken, in no later round"


def test_a_reply_that_is_there_at_the_last_look_counts() -> None:
    class Stopped(Time):
        def pause(self, seconds: float) -> None:
            self.now_s += 100.0

    link = FakeLink(("a",), Stopped(), following({"a": Act(takes_s=99.0)}))
    assert isinstance(replies(link)["a"], Update), "there is a look at the link before anyone is late"


def test_an_absent_client_is_waited_for_and_then_left_out() -> None:
    link = linked(away_until_s={"a": 9.0, "b": 1e9})
    found = replies(link)
    assert isinstance(found["a"], Update)
    assert reason(found["b"]) == "not connected for 10 s"
    assert 10 <= link.time() < 12
    assert [one.client for one in link.sent].count("b") == 0


def test_while_the_link_is_down_nobody_is_absent() -> None:
    """An outage longer than ``absent_s`` must not fail the round: it is tried again until the deadline."""
    link = linked(down=[Down(0, 30, "connected")], away_until_s={"b": 38.0, "c": 1e9})
    found = replies(link)
    assert all(isinstance(found[client], Update) for client in "abd"), "b came back 8 s after the link"
    assert reason(found["c"]) == "not connected for 10 s"
    assert 40 <= link.time() < 42


def test_an_outage_to_the_deadline_ends_the_round_with_a_reason_for_everyone() -> None:
    link = linked(down=[Down(0, 1e9, "connected")])
    with pytest.raises(RoundFailed) as failed:
        looped(link, quorum=2)
    assert [one.client for one in failed.value.failures] == list(CLIENTS)
    assert {one.reason for one in failed.value.failures} == {"no answer within 60 s"}


@pytest.mark.parametrize("method", ["connected", "send", "receive"])
@pytest.mark.parametrize("halfway", [False, True])
def test_an_outage_costs_time_alone(method: str, halfway: bool) -> None:
    link = linked({"a": Act(takes_s=4), "b": Act(takes_s=3)}, down=[Down(0, 6, method, halfway)])
    found = replies(link)
    assert all(same(found[client], reply) for client, reply in here().items())
    assert link.happened.total() >= 1 or (method, halfway) == ("connected", True)
    assert len({one.client for _, one in link.handed}) == len(link.handed) == 4, "each is handed on once"


def test_a_client_that_was_cut_off_is_asked_again_under_a_new_nonce() -> None:
    link = linked({"b": [Act("dies", away_s=5), Act("dies", away_s=5), Act()]})
    found = replies(link)
    assert same(found["b"], here()["b"])
    sent = [one.parcel for one in link.sent if one.client == "b"]
    assert len(sent) == len({parcel.fields["nonce"] for parcel in sent}) == 3
    assert len({one.parcel.fields["nonce"] for one in link.sent}) == len(link.sent)


def test_a_client_that_is_cut_off_for_ever_is_left_out() -> None:
    link = linked({"a": Act("dies", away_s=1e9), "b": Act("dies"), "c": Act("crashes")})
    found = replies(link)
    assert reason(found["a"]) == "not connected for 10 s"
    assert reason(found["b"]) == "the connection was lost"
    assert [one.client for one in link.sent].count("b") == MOST_SENT
    assert reason(found["c"]) == "Flower's error 2: the client's process ended"
    assert [one.client for one in link.sent].count("c") == 1, "what is wrong with the client is not tried again"


def test_who_can_not_be_reached_is_tried_again() -> None:
    link = linked()
    deliver, refused = link.send, []

    def not_b_at_first(parcels, lifetime_s):
        if "b" in parcels and len(refused) < 3:
            refused.append(parcels.pop("b"))
        return deliver(parcels, lifetime_s)

    link.send = not_b_at_first  # type: ignore[method-assign]
    assert all(isinstance(reply, Update) for reply in replies(link).values())
    assert len(refused) == 3
    assert set(link.lifetimes_s) == {SETTINGS.deadline_s}


def test_a_client_has_one_task_at_a_time() -> None:
    with pytest.raises(ValueError, match="one task at a time for a client, got two for a"):
        next(remote(linked()).run(tasks(("a", "b", "a")), 3))


# --- what a reply must be ------------------------------------------------------------------------------------------

WHY = {
    "other nonce": "(its nonce)",
    "other round": "(its round)",
    "other run": "(its run)",
    "other client": "(its client)",
    "other kind": "expected update, failure, lacking or ready, got 'rubbish'",
    "damaged": "a digest that is not that of its tensors",
    "truncated": "do not decode",
    "trailing": "do not decode",
    "oversized": "a reply of",
    "immense": 'expected ["F32", [3]], got ["F32", [1000000000000]]',
    "names": "evil: not expected",
    "shapes": 'expected ["F32", [3]], got ["F32", [7]]',
    "dtypes": 'expected ["F32", [3]], got ["F64", [3]]',
    "not finite": "w: NaN or infinite values",
    "weightless": "weight: expected a positive number, got 0.0",
    "overweight": "int too large to convert to float",
    "disk full": "files or settings",
    "refused": "policy: rounds: expected at most 3 rounds, got 4",
}


@pytest.mark.parametrize("how", FAULTS)
def test_what_must_not_touch_the_state_does_not(how: str) -> None:
    link = linked({"b": Act(how)})
    (record,) = looped(link, rounds=1)
    (failure,) = record.failures
    assert failure.client == "b"
    assert WHY[how] in failure.reason
    assert list(record.clients) == ["a", "c", "d"]
    assert link.happened[how] == 1


@pytest.mark.parametrize("how", [*FAULTS, "dies", "silent", "twice"])
def test_the_state_is_as_if_the_client_had_been_absent(how: str) -> None:
    states = []
    for engine, clients in ((remote(linked({"b": Act(how)})), CLIENTS), (InProcess(pull), ("a", "c", "d"))):
        asked = CLIENTS if how == "twice" else clients
        server = fedavg.server_half(AggregationConfig())
        schedule = lambda number, asked=asked: Cohort(asked, len(asked), 1)  # noqa: E731
        states.append(run_rounds(server, engine, schedule, server.init(START), rounds=1, kind="toy", seed=7))
    assert digest(states[0]) == digest(states[1])


def test_a_reply_of_an_earlier_round_is_refused() -> None:
    link = linked({"b": [Act(), Act("replayed")]})
    first, second = looped(link, rounds=2)
    assert "b" in first.clients
    (failure,) = second.failures
    assert failure.reason == "a reply to another task (its nonce, round): replayed, or of another round"


def test_a_reply_that_comes_twice_counts_once() -> None:
    link = linked({client: Act("twice") for client in CLIENTS})
    found = replies(link)
    assert all(same(found[client], reply) for client, reply in here().items())
    lacking = linked({"c": [Act("dies"), Act()]}, lacks={"a"})
    hand = lacking.receive
    lacking.receive = lambda asked, limit: (one for one in hand(asked, limit) for _ in "12")  # type: ignore[method-assign]
    found = replies(lacking, emulator=lambda: BUNDLE, emulator_bytes=107)
    assert all(same(found[client], reply) for client, reply in here().items())
    assert sorted(one.client for one in lacking.sent) == ["a", "a", "a", "b", "c", "c", "d"]


@pytest.mark.parametrize(
    "said",
    [
        {"weight": 1.0, "clients": 1, "metrics": {}, "delta": 1},
        {"weight": 1.0, "clients": 1, "metrics": {}, "more": 1},
        {"weight": 1.0, "clients": 1, "metrics": {"loss": [10**400, 1]}},
        {"weight": 1.0, "clients": 1, "metrics": {"loss": [1]}},
        {"weight": 1.0, "clients": 1, "metrics": {"loss": [math.nan, 1]}},
        {"weight": 1.0, "clients": 1, "metrics": {"loss": [1, math.inf]}},
        {"weight": 1.0, "clients": 1, "metrics": [1]},
        {"weight": 1.0, "clients": 1, "metrics": None},
        {"weight": "1", "clients": 1, "metrics": {}},
        {"weight": 1.0, "clients": 1.5, "metrics": {}},
        {"weight": 1.0, "clients": 0, "metrics": {}},
        {"weight": math.nan, "clients": 1, "metrics": {}},
        {},
        [],
        None,
    ],
)
def test_fields_of_a_stranger_never_end_the_run(said: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def stranger(honest: Parcel) -> tuple[str, bytes]:
        parcel = Parcel(honest.kind, {**honest.fields, "update": said}, honest.blob)
        text = json.dumps(
            {"format": "flocktune-parcel/1", **vars(parcel), "sha256": parcel.sha256}, default=lambda b: ""
        )
        return text, honest.blob

    monkeypatch.setitem(FAULTS, "stranger", stranger)
    (record,) = looped(linked({"b": Act("stranger")}), rounds=1)
    (failure,) = record.failures
    assert failure.client == "b"


def test_a_strangers_reason_is_fit_for_a_file_and_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    told = "wiped\x1b[2J\nround 9: all is well\r" + "x" * 10_000
    monkeypatch.setitem(FAULTS, "talks", lambda p: _as(Parcel("failure", {**p.fields, "reason": told})))
    monkeypatch.setitem(FAULTS, "shouts", lambda p: _as(Parcel("\x1b[2J", p.fields)))
    found = replies(linked({"a": Act("talks"), "b": Act("shouts")}))
    assert reason(found["a"]).startswith("wiped [2J round 9: all is well xxx")
    assert len(reason(found["a"])) == REASON_LIMIT
    assert reason(found["b"]).isprintable()


def _as(parcel: Parcel) -> tuple[str, bytes]:
    return to_text(parcel), parcel.blob


def test_a_refusal_of_any_length_goes_into_the_audit_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flocktune.audit import AuditLog

    many = {f"{number}{'n' * 300}": torch.zeros(1) for number in range(8)}
    monkeypatch.setitem(FAULTS, "long", lambda p: _as(replace(p, blob=encode_tensors(many))))
    audit = AuditLog(tmp_path / "audit.jsonl")
    found = replies(linked({"a": Act("long")}), note=audit.append)
    assert len(reason(found["a"])) > 1500
    refused = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [one["reason"] for one in refused if one["event"] == "refused"] == [reason(found["a"])]


def test_no_more_than_a_task_is_taken_into_memory_for_a_reply() -> None:
    link = linked()
    replies(link)
    assert set(link.limits) == {len(encode_tensors(START)) + FIELDS_ROOM}


# --- the emulator --------------------------------------------------------------------------------------------------

BUNDLE = {"model.safetensors": torch.arange(100, dtype=torch.uint8), "emulator.json": torch.ones(7, dtype=torch.uint8)}


def test_an_emulator_that_is_lacking_is_delivered_once_and_the_task_follows() -> None:
    read = []

    def emulator():
        read.append(1)
        return BUNDLE

    link = linked(lacks={"b", "d"})
    found = replies(link, emulator=emulator, emulator_bytes=107)
    assert all(same(found[client], reply) for client, reply in here().items())
    assert [one.parcel.kind for one in link.sent if one.client == "b"] == ["task", "emulator", "task"]
    assert [one.parcel.kind for one in link.sent if one.client == "a"] == ["task"]
    delivered = [one.parcel for one in link.sent if one.parcel.kind == "emulator"]
    assert [digest(decode_tensors(parcel.blob)) for parcel in delivered] == [digest(BUNDLE)] * 2
    assert delivered[0].blob is delivered[1].blob
    assert len(read) == 1, "for all that lack it at a time"
    assert all(parcel.fields["digest"] == "" for parcel in delivered)


@pytest.mark.parametrize("more", [{}, {"emulator": lambda: BUNDLE, "emulator_bytes": 512_000_001}])
def test_an_emulator_that_is_too_large_is_not_sent(more: dict[str, Any]) -> None:
    link = linked(lacks={"b"})
    found = replies(link, **more)
    assert "lacks the emulator" in reason(found["b"])
    assert "--emulator FOLDER" in reason(found["b"])
    assert [one.parcel.kind for one in link.sent if one.client == "b"] == ["task"]
    assert isinstance(found["a"], Update)


def test_an_emulator_at_the_limit_is_sent() -> None:
    settings = FlowerEngine(deadline_s=60, absent_s=10, emulator_mb=1)
    found = replies(linked(lacks={"b"}), settings=settings, emulator=lambda: BUNDLE, emulator_bytes=1_000_000)
    assert isinstance(found["b"], Update)
    found = replies(linked(lacks={"b"}), settings=settings, emulator=lambda: BUNDLE, emulator_bytes=1_000_001)
    assert "lacks the emulator" in reason(found["b"])


def test_who_lacks_the_emulator_after_it_came_is_left_out() -> None:
    class Forgetful(set[str]):
        def discard(self, element: str) -> None:
            pass

    link = linked(lacks=Forgetful({"b"}))
    found = replies(link, emulator=lambda: BUNDLE, emulator_bytes=107)
    assert "lacks the emulator" in reason(found["b"])
    assert [one.parcel.kind for one in link.sent if one.client == "b"] == ["task", "emulator", "task"]


def test_an_emulator_that_was_lost_on_the_way_is_sent_again() -> None:
    link = linked({"b": [Act(), Act("dies", away_s=3), Act()]}, lacks={"b"})
    deliver = link._honest

    def lost(client: str, parcel: Parcel) -> Parcel:
        first = parcel.kind == "emulator" and not link.happened["emulator delivered"]
        reply = deliver(client, parcel)
        if first:
            link.lacks.add(client)
        return reply

    link._honest = lost  # type: ignore[method-assign]
    found = replies(link, emulator=lambda: BUNDLE, emulator_bytes=107)
    assert same(found["b"], here()["b"])
    assert [one.parcel.kind for one in link.sent if one.client == "b"] == ["task", "emulator", "emulator", "task"]


def test_ready_is_no_answer_to_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAULTS, "ready", lambda honest: _as(replace(honest, kind="ready")))
    assert "got 'ready'" in reason(replies(linked({"a": Act("ready")}))["a"])


# --- what is written down ------------------------------------------------------------------------------------------


def test_the_audit_log_is_told_what_left_and_what_came() -> None:
    notes: list[dict[str, Any]] = []
    link = linked({"b": Act("not finite"), "c": Act("disk full"), "d": [Act("dies"), Act()]})
    looped(link, rounds=2, note=lambda event, **facts: notes.append({"event": event, **facts}))
    sent = [note for note in notes if note["event"] == "sent"]
    assert [(note["nonce"], note["sha256"], note["bytes"], note["kind"]) for note in sent] == [
        (one.parcel.fields["nonce"], one.parcel.sha256, len(one.parcel.blob), "task") for one in link.sent
    ]
    came = {note["nonce"]: note for note in notes if note["event"] == "received"}
    honest = {one.parcel.fields["nonce"]: one.honest for _, one in link.handed if one.act.how == "answers"}
    assert len(honest) == 4
    for nonce, parcel in honest.items():
        assert (came[nonce]["sha256"], came[nonce]["bytes"]) == (parcel.sha256, len(parcel.blob))
    assert [note["client"] for note in came.values()].count("b") == 2, "it came, and was refused"
    refused = [note for note in notes if note["event"] == "refused"]
    assert [(note["client"], note["round"]) for note in refused] == [("b", 0), ("b", 1)]
    assert all("NaN" in note["reason"] for note in refused)
    assert all(note["run"] == RUN for note in notes)
    assert "c" not in [note["client"] for note in came.values()]


# --- buffered rounds -----------------------------------------------------------------------------------------------

MANY = tuple(f"c{number}" for number in range(8))


class Replayed:
    """An engine that hands on replies in an order that was written down, computed in this process; failures as well."""

    def __init__(self, order: list[tuple[ClientTask, Failure | None]]) -> None:
        self.order, self.memories = order, {}

    def stream(self, issue: Callable[[], Issued | None]) -> Iterator[tuple[ClientTask, Update | Failure]]:
        at_work: dict[str, ClientTask] = {}
        for written, failure in self.order:
            while issued := issue():
                at_work[issued.task.client] = issued.task
            task = at_work.pop(written.client)
            assert (task.round, task.seed) == (written.round, written.seed)
            yield task, failure or next(InProcess(pull).run([task], 1))


def buffered(engine: Any, rounds: int = 6) -> tuple[State, list[RoundRecord]]:
    server, records = fedavg.server_half(AggregationConfig()), list[RoundRecord]()
    state = run_buffered(
        server,
        engine,
        MANY,
        Buffered(size=3, concurrency=5),
        server.init(START),
        rounds=rounds,
        kind="toy",
        seed=7,
        hooks=Hooks(on_round=lambda record, _: records.append(record)),
    )
    return state, records


@pytest.mark.parametrize("seed", range(8))
def test_buffered_rounds_far_away_are_those_of_one_process_in_the_order_of_the_replies(seed: int) -> None:
    pace = torch.Generator().manual_seed(seed)
    order: list[tuple[ClientTask, Failure | None]] = []

    def plan(parcel: Parcel, nth: int) -> Act:
        takes_s = float(torch.rand((), generator=pace) * 20)
        return Act("twice" if nth % 3 == 2 else "answers", takes_s, away_s=4.0 if nth % 4 == 3 else 0.0)

    class Written:
        def stream(self, issue):
            for task, reply in remote(link).stream(issue):
                order.append((task, reply if isinstance(reply, Failure) else None))
                yield task, reply

    link = FakeLink(MANY, Time(), plan, down=[Down(20, 25, "receive"), Down(31, 33, "send", halfway=True)])
    state, records = buffered(Written())
    assert any(record.diagnostics["staleness"] for record in records)
    assert digest(state) == digest(buffered(Replayed(order))[0])
    nonces = [one.parcel.fields["nonce"] for _, one in link.handed]
    assert len(nonces) == len(set(nonces)) >= 18
    assert sum(not failure for _, failure in order) == 18


def test_in_buffered_rounds_a_client_that_fails_is_left_out_with_its_reason() -> None:
    hows = {"c1": Act("not finite"), "c2": Act("silent"), "c3": Act("dies", away_s=1e9), "c4": Act("replayed")}
    link = FakeLink(MANY, Time(), lambda parcel, nth: hows.get(str(parcel.fields["client"]), Act(takes_s=9)))
    _, records = buffered(remote(link), rounds=20)
    reasons = {one.client: one.reason for record in records for one in record.failures}
    assert "NaN" in reasons["c1"]
    assert reasons["c2"] == "no answer within 60 s"
    assert reasons["c3"] == "not connected for 10 s"
    assert "(its nonce" in reasons["c4"]
    assert all(len(record.clients) == 3 for record in records)
    assert not {client for record in records for client in record.clients} & hows.keys()


def test_a_buffered_round_without_anyone_left_fails_and_names_everyone() -> None:
    link = FakeLink(MANY, Time(), lambda parcel, nth: Act("disk full"))
    with pytest.raises(RoundFailed) as failed:
        buffered(remote(link))
    assert {one.client for one in failed.value.failures} == set(MANY)


def test_a_task_of_a_stream_leaves_at_once_though_replies_are_at_hand() -> None:
    link = linked(clients=("a", "b", "c"))
    given_out = iter([*tasks(("a", "b")), *tasks(("c",))])
    ready = [2, 1, 0, 0]

    def issue() -> Issued | None:
        if not ready[0]:
            ready.pop(0)
            return None
        ready[0] -= 1
        return Issued(next(given_out), 0.0)

    come = remote(link).stream(issue)
    next(come)
    next(come)
    assert [one.client for one in link.sent] == ["a", "b", "c"], "b's reply was at hand when c's task was given out"
    assert [task.client for task, _ in come] == ["c"]


# --- bytes of a stranger -------------------------------------------------------------------------------------------

BLOB = encode_tensors(START)


def header_of(blob: bytes) -> dict[str, Any]:
    (length,) = struct.unpack_from("<Q", blob)
    return json.loads(blob[8 : 8 + length])


def with_header(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def placed(a: list[Any], m: list[Any], w: list[Any], *, body: int = 32, blanks: int = 0) -> bytes:
    """START's names, where the header says that they lie in a body of so many bytes."""
    header = header_of(BLOB)
    for name, place in {"a": a, "m": m, "w": w}.items():
        header[name]["data_offsets"] = place
    text = json.dumps(header).encode()
    return with_header(text + b" " * (-len(text) % 8 + blanks), bytes(body))


def test_what_is_expected_is_let_through_in_its_own_order() -> None:
    assert digest(decode_tensors(BLOB, START)) == digest(START)
    assert list(decode_tensors(BLOB, START)) == list(START) != list(header_of(BLOB))[1:]
    wide = {f"layers.{number}.self_attn.q_proj.lora_A": torch.zeros(8, 4) for number in range(500)}
    assert digest(decode_tensors(encode_tensors(wide), wide)) == digest(wide)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8])
def test_every_dtype_that_travels_is_known_in_a_header(dtype: torch.dtype) -> None:
    tensors = {"w": torch.ones(3, dtype=dtype)}
    assert digest(decode_tensors(encode_tensors(tensors), tensors)) == digest(tensors)
    with pytest.raises(UpdateRefused, match="w: expected"):
        decode_tensors(BLOB, {**START, "w": tensors["w"]})


@pytest.mark.parametrize(
    ("blob", "why"),
    [
        (claiming(BLOB, 10**12), r"w: expected \[\"F32\", \[3\]\], got \[\"F32\", \[1000000000000\]\]"),
        (encode_tensors({**START, "evil": torch.zeros(1)}), "evil: not expected"),
        (encode_tensors({"w": START["w"]}), "a: missing; m: missing"),
        (encode_tensors({**START, "w": torch.zeros(3, dtype=torch.bfloat16)}), "BF16"),
        (BLOB[:-1], "do not decode"),
        (BLOB + b"\0", "do not decode"),
        (BLOB[:7], "do not decode"),
        (b"", "do not decode"),
        (struct.pack("<Q", 2**64 - 1) + BLOB[8:], "a header of 18446744073709551615 bytes"),
        (with_header(b"[" * 60_000), "do not decode"),
        (with_header(b"\xff\xfe"), "do not decode"),
        (with_header([]), "do not decode"),
        (with_header({}), "do not decode"),
        (with_header({"__metadata__": None}), "do not decode"),
        (with_header({"__metadata__": {"format": "pt"}}), "format pt"),
        (with_header({**header_of(BLOB), "w": []}), "do not decode"),
        (with_header({**header_of(BLOB), "w": None}), "do not decode"),
        (with_header({**header_of(BLOB), "w": {"dtype": "F32"}}), "do not decode"),
        (with_header({**header_of(BLOB), "w": {"dtype": [1], "shape": {}}}), "w: expected"),
        (placed([0, 16], [12, 16], [20, 32]), "bytes 12 to 16"),
        (placed([0, 16], [20, 24], [24, 36], body=36), "bytes 20 to 24"),
        (placed([0, 16], [16, 20], [20, 28]), "bytes 20 to 28"),
        (placed([0, 16], [16, 20], [20, 32], body=28), "bytes 20 to 32 of 28"),
        (placed([0, 16], [16, 20], [20, 32], body=36), "4 bytes too many"),
        (placed([0, 16], [16, 20], [20.0, 32.0]), "do not decode"),
        (placed([0, 16], [16, 20], [20, 32], blanks=1), "do not decode"),
    ],
)
def test_bytes_that_are_not_the_expected_tensors_are_refused(blob: bytes, why: str) -> None:
    with pytest.raises(UpdateRefused, match=why):
        decode_tensors(blob, START)


def test_a_header_is_judged_before_its_tensors_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_views", lambda *call: pytest.fail("something was made of the values"))
    large = {"w": torch.zeros(1 << 22)}
    for blob in (encode_tensors({"v": large["w"]}), claiming(BLOB, 10**12), encode_tensors(large)):
        with pytest.raises(UpdateRefused):
            decode_tensors(blob, START)


def test_a_long_header_is_not_even_parsed() -> None:
    blob = with_header(b"[" + b"[]," * 5_000_000 + b"[]]")
    tracemalloc.start()
    with pytest.raises(UpdateRefused, match="a header of"):
        decode_tensors(blob, START)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_refusal_shows_eight_problems_and_counts_the_rest() -> None:
    with pytest.raises(UpdateRefused, match="and 12 more"):
        decode_tensors(encode_tensors({**START, **{f"x{n}": torch.zeros(1) for n in range(20)}}), START)


def test_the_size_on_the_wire_is_known_without_building_it() -> None:
    assert encoded_size(START) == len(encode_tensors(START))


@given(st.binary(max_size=300))
def test_no_bytes_whatever_do_more_than_be_refused(noise: bytes) -> None:
    for blob in (noise, struct.pack("<Q", len(noise)) + noise, with_header(header_of(BLOB), noise[:31])):
        with pytest.raises(UpdateRefused):
            decode_tensors(blob, START)


@given(st.data())
def test_a_blob_with_some_bytes_changed_is_refused_or_of_the_right_names_and_shapes(data: st.DataObject) -> None:
    changed = bytearray(BLOB)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(BLOB) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = decode_tensors(bytes(changed), START)
    except UpdateRefused:
        return
    assert {name: (value.shape, value.dtype) for name, value in found.items()} == {
        name: (value.shape, value.dtype) for name, value in START.items()
    }


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
PARCEL = Parcel("update", {"run": RUN, "update": {"weight": 1.0}, "naïve": "Ünïcode"}, BLOB)


def test_a_parcel_comes_through_as_it_was() -> None:
    assert from_text(to_text(PARCEL), BLOB) == PARCEL


@given(ANYTHING)
def test_no_json_whatever_does_more_than_be_refused(value: object) -> None:
    with pytest.raises(UpdateRefused):
        from_text(json.dumps(value), BLOB)


@given(st.text() | st.binary().map(lambda noise: noise.decode(errors="surrogateescape")))
def test_no_text_whatever_does_more_than_be_refused(text: str) -> None:
    with pytest.raises(UpdateRefused):
        from_text(text, b"")


@given(st.sampled_from(["format", "kind", "fields", "sha256"]), ANYTHING)
def test_with_any_part_replaced_a_parcel_is_refused_or_sound(part: str, value: object) -> None:
    said = {**json.loads(to_text(PARCEL)), part: value}
    try:
        parcel = from_text(json.dumps(said), BLOB)
    except UpdateRefused:
        return
    assert part in ("kind", "fields")
    assert isinstance(parcel.kind, str)
    assert isinstance(parcel.fields, dict)
    json.dumps(parcel.fields, ensure_ascii=False).encode()


@given(st.integers(0, len(to_text(PARCEL)) - 1), st.characters())
def test_with_any_letter_replaced_a_parcel_is_refused_or_sound(place: int, letter: str) -> None:
    text = to_text(PARCEL)
    try:
        parcel = from_text(text[:place] + letter + text[place + 1 :], BLOB)
    except UpdateRefused:
        return
    assert parcel.blob == BLOB


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"format": "flocktune-parcel/1", "fields": ' + "[" * 50_000,
        to_text(PARCEL).replace('"Ünïcode"', '"\\ud800"').replace("\\u00dcn\\u00efcode", "\\ud800"),
        to_text(PARCEL).replace("flocktune-parcel/1", "flocktune-parcel/2"),
        to_text(PARCEL)[:-1],
        to_text(PARCEL) + " " * FIELDS_LIMIT,
        to_text(replace(PARCEL, blob=BLOB + b"!")),
        "1" * 100_000,
    ],
)
def test_damaged_text_is_refused(text: str) -> None:
    with pytest.raises(UpdateRefused, match="flocktune-parcel/1"):
        from_text(text, BLOB)


def test_half_a_character_is_refused_wherever_it_is() -> None:
    for kind, fields in (("update", {"reason": "\ud800"}), ("update", {"\ud800": 1}), ("\ud800", {})):
        text = json.dumps({"format": "flocktune-parcel/1", "kind": kind, "fields": fields, "sha256": PARCEL.sha256})
        with pytest.raises(UpdateRefused):
            from_text(text, BLOB)
