"""The audit log: append-only, chained, whole after a power cut, and without data."""

import json
import multiprocessing
import os
import stat
from pathlib import Path

import pytest
import torch

from flocktune.audit import AuditLog, nonces, read_audit, rounds_taken, updates_taken, verify


@pytest.fixture
def log(tmp_path: Path) -> AuditLog:
    return AuditLog(tmp_path / "audit.jsonl")


def fill(log: AuditLog, count: int) -> None:
    for number in range(count):
        log.task_received(run="run-1", round=number, nonce=f"nonce-{number}", kind="fedavg", bytes=10)


def events(log: AuditLog) -> list[str]:
    return [record["event"] for record in read_audit(log.path)]


def send(log: AuditLog, run: str, round: int, nonce: str) -> None:
    log.update_left(run=run, round=round, nonce=nonce, digest="d" * 64, bytes=9, tensors=2, weight=3.0)


def test_records_are_read_back_in_order_with_their_fields(log: AuditLog) -> None:
    log.joined(federation="clinics", name="hospital-a", data_digest="a" * 64)
    log.task_received(run="run-1", round=0, nonce="n", kind="fedavg", bytes=12)
    log.task_refused(run="run-1", round=0, nonce="n", reasons=["policy: too late", "x" * 5000])
    send(log, "run-1", 1, "m")
    log.left(federation="clinics", name="hospital-a", reason="asked to")
    records = list(read_audit(log.path))
    assert [record["event"] for record in records] == ["joined", "task_received", "task_refused", "update_left", "left"]
    assert records[2]["reasons"][0] == "policy: too late"
    assert len(records[2]["reasons"][1]) == 2000, "a long reason is cut, the record is not lost"
    assert (records[3]["digest"], records[3]["weight"], records[3]["tensors"]) == ("d" * 64, 3.0, 2)
    assert all(record["time"].endswith("+00:00") for record in records)
    assert verify(log.path) == []


def test_the_file_is_for_its_owner_alone(log: AuditLog) -> None:
    before = os.umask(0)
    try:
        fill(log, 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600


def test_append_gives_the_digest_that_the_next_record_names(log: AuditLog) -> None:
    first = log.append("one")
    log.append("two")
    records = list(read_audit(log.path))
    assert [record["previous"] for record in records] == ["", first]


def test_no_log_is_an_empty_one(log: AuditLog) -> None:
    assert (list(read_audit(log.path)), verify(log.path)) == ([], [])
    assert (rounds_taken(log.path, "run-1"), nonces(log.path)) == (0, set())


@pytest.mark.parametrize("line", range(4))
def test_a_changed_line_is_named(log: AuditLog, line: int) -> None:
    fill(log, 5)
    lines = log.path.read_bytes().splitlines(keepends=True)
    lines[line] = lines[line].replace(b'"bytes": 10', b'"bytes": 11')
    log.path.write_bytes(b"".join(lines))
    (problem,) = verify(log.path)
    assert problem.where == f"{log.path}:{line + 1}"


def test_a_line_taken_out_is_noticed(log: AuditLog) -> None:
    fill(log, 5)
    lines = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(b"".join(lines[:2] + lines[3:]))
    (problem,) = verify(log.path)
    assert problem.where == f"{log.path}:2"
    assert "taken out" in problem.fix
    log.path.write_bytes(b"".join(lines[1:]))
    (problem,) = verify(log.path)
    assert "lines before were taken out" in problem.fix


def test_a_line_made_unreadable_is_no_torn_one(log: AuditLog) -> None:
    fill(log, 3)
    lines = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(lines[0] + b"{gone\n" + lines[2])
    assert verify(log.path)[0].where == f"{log.path}:2"


def test_every_cut_of_the_last_line_is_set_apart(tmp_path: Path) -> None:
    whole = AuditLog(tmp_path / "whole.jsonl")
    fill(whole, 3)
    data = whole.path.read_bytes()
    start = data[:-1].rindex(b"\n") + 1
    for cut in range(start + 1, len(data) + 1):
        log = AuditLog(tmp_path / "cut.jsonl")
        log.path.write_bytes(data[:cut])
        assert verify(log.path) == [], "a torn end is what a power cut leaves"
        send(log, "run-1", 9, "after")
        assert log.path.read_bytes().startswith(data[:cut]), "nothing is lost, not even the fragment"
        assert verify(log.path) == []
        torn = ["torn"] if cut < len(data) - 1 else []  # but for its end, the last line is whole
        kept = 2 if torn else 3
        assert events(log) == ["task_received"] * kept + torn + ["update_left"]


def test_a_repair_that_is_cut_itself_is_repaired(log: AuditLog) -> None:
    fill(log, 2)
    data = log.path.read_bytes()
    log.path.write_bytes(data + b'{"time": "20')
    log.append("again")
    repaired = log.path.read_bytes()
    for cut in range(len(data) + 13, len(repaired)):
        log.path.write_bytes(repaired[:cut])
        log.append("at last")
        assert verify(log.path) == [], cut
        assert events(log)[-1] == "at last"
        assert events(log).count("torn") >= 1


def test_a_fragment_that_is_changed_later_is_noticed(log: AuditLog) -> None:
    fill(log, 2)
    with log.path.open("ab") as file:
        file.write(b'{"time": "20')
    log.append("again")
    log.path.write_bytes(log.path.read_bytes().replace(b'{"time": "20\n', b'{"time": "21\n'))
    assert verify(log.path)[0].where == f"{log.path}:3"


def test_a_line_longer_than_what_is_read_at_once(log: AuditLog) -> None:
    fill(log, 1)
    log.append("many", names=["n" * 1999] * 100)
    log.append("next")
    with log.path.open("ab") as file:
        file.write(b"x" * 200_000)
    log.append("last")
    assert verify(log.path) == []
    assert events(log) == ["task_received", "many", "next", "torn", "last"]


def test_only_what_left_counts_as_a_round(log: AuditLog) -> None:
    fill(log, 3)
    send(log, "run-1", 0, "a")
    send(log, "run-1", 0, "b")
    send(log, "run-2", 0, "c")
    log.task_refused(run="run-1", round=1, nonce="d", reasons=['"event": "update_left"'])
    assert rounds_taken(log.path, "run-1") == 2, "a round that was answered twice counts twice"
    assert rounds_taken(log.path, "run-2") == 1
    assert updates_taken(log.path) == 3
    assert nonces(log.path) == {"a", "b", "c"}


@pytest.mark.parametrize("value", [torch.ones(2), [1.0, 2.0], {"a": 1}, b"row", ["a", 1]])
def test_data_has_no_place_in_it(log: AuditLog, value: object) -> None:
    with pytest.raises(TypeError, match="expected rows as a plain value or a list of names"):
        log.append("task_received", rows=value)  # type: ignore[arg-type]
    assert not log.path.exists()


@pytest.mark.parametrize(
    ("event", "fields"),
    [("x", {"text": "t" * 2001}), ("x", {"previous": ""}), ("torn", {}), ("x", {"n": float("nan")})],
)
def test_what_a_record_may_not_say(log: AuditLog, event: str, fields: dict[str, object]) -> None:
    fill(log, 1)
    with pytest.raises(ValueError, match=r"audit|JSON"):
        log.append(event, **fields)  # type: ignore[arg-type]
    assert events(log) == ["task_received"]


def test_a_full_disk_is_told_and_leaves_a_sound_log(log: AuditLog, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(log, 2)
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if len(data) <= 20:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[: len(data) - 20])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            log.append("one")
    log.append("two")
    assert events(log) == ["task_received", "task_received", "torn", "two"]
    assert verify(log.path) == []


def append_many(path: Path, name: str) -> None:
    for number in range(50):
        AuditLog(path).append("by", name=name, number=number)


def test_several_processes_share_one_chain(log: AuditLog) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=append_many, args=(log.path, name)) for name in "abc"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert verify(log.path) == []
    records = list(read_audit(log.path))
    for name in "abc":
        assert [record["number"] for record in records if record["name"] == name] == list(range(50))


def test_a_record_is_one_line_of_json(log: AuditLog) -> None:
    log.append("said", reason="two\nlines, ünd more")
    (line,) = log.path.read_text().splitlines()
    assert json.loads(line)["reason"] == "two\nlines, ünd more"
