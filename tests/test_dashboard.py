"""The dashboard without a browser: logs that grow, folders of all kinds, and who may ask for what over HTTP."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from conftest import Said
from fake_runs import SECRET, START_S, as_lines, evaluation_event, fake_run, log_of, round_event, start_event
from flocktune.dashboard import logs, serving
from flocktune.dashboard.folders import find_runs
from flocktune.dashboard.logs import Log
from flocktune.dashboard.watching import Watch
from flocktune.errors import UserError
from flocktune.files import exclusive, write_atomic, write_json


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


def watch(runs: Path) -> Watch:
    return Watch(runs, "runs")


def browse(runs: Path, host: str = "127.0.0.1:8780") -> TestClient:
    return TestClient(serving.application(watch(runs)), base_url=f"http://{host}", follow_redirects=False)


def state_of(runs: Path, path: str) -> tuple[str, str]:
    seen, _ = watch(runs).run(path) or pytest.fail(f"no run {path}")
    return seen.state, seen.advice


# --- a log that grows


def told_by(log: Log) -> dict[str, Any]:
    told = log.catch_up()
    return {
        "rounds": list(told.rounds),
        "evaluations": len(told.evaluations),
        "asked": {name: list(client.asked) for name, client in told.clients.items()},
        "failed": told.failed,
        "up": told.bytes_up,
        "seconds": dict(told.seconds),
        "paces": list(told.paces),
        "unread": told.unread,
    }


def test_a_log_read_in_pieces_of_any_size_says_what_it_says_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, path = as_lines(log_of(5)), tmp_path / "metrics.jsonl"
    path.write_bytes(data)
    whole = told_by(Log(path))
    assert whole["rounds"] == [0, 1, 2, 3, 4]
    assert whole["asked"]["carl"] == [0, 1, 2, 3, 4]
    assert (whole["failed"], whole["up"], whole["evaluations"]) == (5, 10_000, 1)
    read = []
    monkeypatch.setattr(logs, "parse_event", lambda line, real=logs.parse_event: read.append(line) or real(line))
    monkeypatch.setattr(logs, "_READ_BYTES", 700)
    path.write_bytes(b"")
    log = Log(path)
    draw = random.Random(0)
    written = 0
    while written < len(data):
        piece = data[written : written + draw.randrange(1, 900)]
        with path.open("ab") as file:
            file.write(piece)
        written += len(piece)
        told_by(log)
    assert told_by(log) == whole
    assert b"\n".join(read) + b"\n" == data, "every line is read once"


def test_a_torn_last_line_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = as_lines([start_event(3), round_event(0)])
    path.write_bytes(lines[:-1])  # it would parse
    log = Log(path)
    assert log.catch_up().done == 0
    path.write_bytes(lines)
    assert log.catch_up().done == 1


@pytest.mark.parametrize("how", ["renamed", "in place"])
def test_a_log_that_a_resume_cut_back_is_read_anew(tmp_path: Path, how: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(as_lines(log_of(5)))
    log = Log(path)
    assert log.catch_up().done == 5
    resumed = {"event": "resumed", "round": 3, "time": START_S + 1000}
    again = [*log_of(3)[:-1], resumed, round_event(3, train_loss=9.0, time=START_S + 1012)]
    while len(as_lines(again)) < len(as_lines(log_of(5))) + 10:  # as long as before: its length says nothing
        again.append(evaluation_event(4))
    if how == "renamed":
        write_atomic(path, as_lines(again))
    else:
        with path.open("r+b") as file:
            file.truncate(0)
            file.write(as_lines(again))
    told = log.catch_up()
    assert (told.done, told.resumed, told.rounds[3]["train_loss"]) == (4, 1, 9.0)
    assert list(told.clients["anna"].asked) == [0, 1, 2, 3], "nothing is counted twice"
    assert list(told.paces) == [10.0, 10.0, 10.0, 12.0], "the time that nobody ran it is not its pace"


def test_a_log_that_goes_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = Log(path)
    assert log.catch_up().done == 0
    path.write_bytes(as_lines(log_of(2)))
    assert log.catch_up().done == 2
    path.unlink()
    assert log.catch_up().done == 0
    path.write_bytes(as_lines(log_of(1)))
    assert log.catch_up().done == 1


def test_the_time_that_is_left_follows_the_median(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    ends_s = (10.0, 20.0, 500.0, 510.0, 520.0)  # one round had to wait
    rounds = [round_event(number, time=START_S + end_s) for number, end_s in enumerate(ends_s)]
    path.write_bytes(as_lines([start_event(8), *rounds]))
    told = Log(path).catch_up()
    assert told.until_s == START_S + 520.0 + 3 * 10.0
    path.write_bytes(as_lines([start_event(8)]))
    assert Log(path).catch_up().until_s is None


def test_a_long_log_keeps_little_of_a_round(tmp_path: Path) -> None:
    told = Log(fake_run(tmp_path, done=300, planned=300) / "metrics.jsonl").catch_up()
    assert len(told.failures) == logs.FAILURES_KEPT < told.failed == 300
    assert not set(told.rounds[7]) & {"clients", "selected", "answered", "failures"}


# --- folders


def test_runs_are_found_with_what_they_belong_to(runs: Path, tmp_path: Path) -> None:
    fake_run(runs / "alone")
    fake_run(runs / "deep" / "er" / "run")
    (runs / "comparison").mkdir()
    write_json(runs / "comparison" / "experiment.json", {"seeds": [0, 1]})
    (runs / "comparison" / "recipe.yaml").write_text("")
    (runs / "comparison" / ".lock").touch()
    fake_run(runs / "comparison" / "seed-0" / "fedit")
    fake_run(runs / "study" / "FedIT" / "all" / "seed-0")
    write_json(runs / "study" / "study.json", {})
    fake_run(runs / "fed" / "runs" / "first")
    write_json(runs / "fed" / "federation.json", {})
    fake_run(runs / ".hidden" / "run")
    fake_run(tmp_path / "outside")
    (runs / "link").symlink_to(tmp_path / "outside")
    (runs / "loop").symlink_to(runs)
    os.mkfifo(fake_run(runs / "pipe") / "summary.json")
    (fake_run(runs / "linked") / "ended.json").symlink_to(tmp_path / "outside" / "metrics.jsonl")
    fake_run(runs / "odd" / "run")
    os.mkfifo(runs / "odd" / "study.json")
    (runs / "recipe.yaml").write_text("name: mine\n")  # somebody keeps a recipe beside the runs
    found = find_runs(runs)
    assert {path: (place.group.kind, place.group.path) for path, place in found.runs.items()} == {
        "alone": ("folder", ""),
        "deep/er/run": ("folder", "deep/er"),
        "comparison/seed-0/fedit": ("comparison", "comparison"),
        "study/FedIT/all/seed-0": ("study", "study"),
        "fed/runs/first": ("federation", "fed"),
        "odd/run": ("folder", "odd"),
    }
    assert found.whole
    assert list(find_runs(runs / "alone").runs) == [""]


def test_a_whole_disk_is_not_searched(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(30):
        fake_run(runs / f"{number:02d}")
    monkeypatch.setattr("flocktune.dashboard.folders.MOST_FOLDERS", 12)
    found = find_runs(runs)
    assert len(found.runs) == 11
    assert not found.whole
    assert "not all were looked at" in browse(runs).get("/").text


def test_states_and_what_to_do(runs: Path) -> None:
    fake_run(runs / "killed one")
    fake_run(runs / "done", done=10, finished=True)
    failed = fake_run(runs / "failed")
    write_json(failed / "ended.json", {"how": "failed", "problems": ["round 4: nobody answered"]})
    waiting = fake_run(runs / "waiting")
    (waiting / "metrics.jsonl").unlink()
    held = fake_run(runs / "held")
    assert state_of(runs, "killed one") == ("stopped", "flocktune resume 'runs/killed one'")
    assert state_of(runs, "done") == ("finished", "")
    assert state_of(runs, "failed") == ("failed", "flocktune resume runs/failed")
    assert state_of(runs, "waiting") == ("waiting", "")
    with exclusive(held):
        assert state_of(runs, "held") == ("running", "")
        page = browse(runs).get("/").text
    assert "<title>1 running, 1 finished, 1 stopped, 1 failed, 1 waiting · runs · flocktune</title>" in page
    assert "round 4: nobody answered" in page
    assert "round 4: nobody answered" in browse(runs).get("/run/failed").text


def test_what_goes_on_with_a_run_of_many(runs: Path) -> None:
    recipe = "compare: {base: true, local: 2, fedit: false, centralised: true}\n"
    comparison = runs / "comparison"
    fake_run(comparison / "base", finished=True)
    fake_run(comparison / "fedit")
    write_json(comparison / "experiment.json", {"seeds": [0]})
    (comparison / "recipe.yaml").write_text(recipe)
    fake_run(runs / "study" / "A" / "all" / "seed-0")
    write_json(runs / "study" / "study.json", {"cells": [{"folder": "A/all/seed-0"}, {"folder": "B/all/seed-0"}]})
    fake_run(runs / "fed" / "runs" / "first")
    write_json(runs / "fed" / "federation.json", {})
    assert state_of(runs, "comparison/fedit")[1] == "flocktune resume runs/comparison"
    assert state_of(runs, "study/A/all/seed-0")[1] == "flocktune study STUDY_FILE --out runs/study"
    assert state_of(runs, "fed/runs/first")[1] == "flocktune federation run runs/fed --resume first"
    with exclusive(comparison):
        assert state_of(runs, "comparison/fedit") == ("waiting", ""), "it is its turn in a moment"
    groups = {seen.group.path: seen for seen in watch(runs).groups()}
    assert groups["comparison"].counts == {"finished": 1, "stopped": 1, "waiting": 3}
    assert groups["study"].planned == 2
    assert groups["comparison"].advice == "", "the run that was broken off says it"
    shutil.rmtree(comparison / "fedit")
    assert {seen.group.path: seen.advice for seen in watch(runs).groups()}["comparison"] == (
        "flocktune resume runs/comparison"
    )


def test_everything_is_read_and_nothing_is_written(runs: Path) -> None:
    fake_run(runs / "one", finished=True)
    fake_run(runs / "two")

    def snapshot() -> dict[str, tuple[int, int]]:
        return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in [runs, *runs.rglob("*")]}

    before = snapshot()
    client = browse(runs)
    for address in ("/", "/run/one", "/run/two", "/live", "/live/run/two", "/report/one", "/style.css", "/follow.js"):
        answer = client.get(address)
        assert answer.status_code == 200, address
        assert SECRET not in answer.text
    assert snapshot() == before


def test_numbers_on_a_runs_page(runs: Path) -> None:
    fake_run(runs / "one", done=4, planned=8)
    with exclusive(runs / "one"):
        page = browse(runs).get("/run/one").text
    for text in (
        "4/8 · one · flocktune",
        "4 of 8",
        "10.0 s each",
        "8 of 12 tasks answered",
        "<b>8 kB</b>",  # up
        "12 kB sent to them",
        "1.970",  # training loss
        "25.0 %",
        "<b>4.5</b>",  # epsilon
        "at delta 1e-05",
        "75.0 %",  # bert's share of the weight
        "its &lt;b&gt;disk&lt;/b&gt; is full",
        f'data-until="{START_S + 80:.3f}"',
        "forward and backward",
    ):
        assert text in page, text
    assert "<b>disk</b>" not in page


def test_rows_that_choose_are_called_so(runs: Path) -> None:
    folder = fake_run(runs / "one")
    said = {"event": "choice", "said": "the result is round 2 of 10, the best by loss on the validation rows (1.500)"}
    events = [*log_of(3)[:-1], evaluation_event(3, dataset="validation"), said]
    (folder / "metrics.jsonl").write_bytes(as_lines(events))
    page = browse(runs).get("/run/one").text
    assert "<h2>Validation rows, by category</h2>" in page
    assert "<h3>Validation rows</h3><b>25.0 %</b>" in page
    assert "Of its rounds, the result is round 2 of 10" in page
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(as_lines([evaluation_event(3)]))
    page = browse(runs).get("/run/one").text
    assert "<h2>Held-out rows, by category</h2>" in page


def test_a_single_run_has_no_list(runs: Path) -> None:
    client = browse(fake_run(runs / "one"))
    assert client.get("/").headers["location"] == "/run/"
    assert "<h1>one</h1>" in client.get("/run/").text
    assert client.get("/live/run/").json()["news"] == "one: stopped"


def test_no_runs_yet(runs: Path) -> None:
    client = browse(runs)
    assert "flocktune run recipe.yaml --out runs/first" in client.get("/").text
    tag = client.get("/live").json()["tag"]
    assert f'data-tag="{tag}"' in client.get("/").text
    assert client.get(f"/live?known={tag}").json() == {}


def test_only_what_changed_is_sent_as_changed(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flocktune.dashboard.watching._LOOK_AGAIN_S", 0.0)
    folder = fake_run(runs / "one")
    client = browse(runs)
    before = client.get("/live/run/one").json()
    known = f"/live/run/one?known={before['tag']}"
    assert client.get(known).json() == {}
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(as_lines([round_event(3, failures=[])]))
    old, new = before["parts"], client.get(known).json()["parts"]
    changed = {name for name in new if old[name][0] != new[name][0]}
    assert changed == {"state", "numbers", "learning", "clients", "cost"}
    shutil.rmtree(folder)
    assert client.get("/live/run/one").json() == {"gone": True}
    assert client.get("/run/one").status_code == 404


# --- who asks, and for what


@pytest.mark.parametrize(
    "address",
    [
        "/run/nothing",
        "/run/../../etc/passwd",
        "/run/%2e%2e/secret",
        "/run/..%2fsecret",
        "/report/..%2fsecret",
        "/report/%2e%2e/secret",
        "/report/one/answers.jsonl",
        "/report/one%00",
        "/one/answers.jsonl",
        "/style.css/../answers.jsonl",
        "/templates/layout.html",
        "/report/linked",
        "/report/inner",
    ],
)
def test_nothing_else_is_served(runs: Path, address: str) -> None:
    fake_run(runs / "one")
    fake_run(runs.parent / "secret", finished=True)
    linked = fake_run(runs / "linked")
    (linked / "report.html").symlink_to(runs.parent / "secret" / "answers.jsonl")
    inner = fake_run(runs / "inner")
    (inner / "report.html").symlink_to("answers.jsonl")
    answer = browse(runs).get(address)
    assert answer.status_code == 404
    assert SECRET not in answer.text


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8780", 200),
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("[::1]:8780", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost.evil.example:8780", 421),
        ("[::1", 421),
        ("", 421),
    ],
)
def test_only_this_machines_names_are_answered(runs: Path, host: str, status: int) -> None:
    """A page from elsewhere whose name is made to point here must not read what is here."""
    answer = browse(runs).get("/live", headers={"Host": host})
    assert answer.status_code == status
    assert ("no runs yet" in answer.text) == (status == 200)


def test_an_exposed_page_is_found_by_the_machines_name(runs: Path) -> None:
    client = TestClient(serving.application(watch(runs), "0.0.0.0"), base_url=f"http://{socket.gethostname()}:8780")
    assert client.get("/live").status_code == 200
    assert client.get("/live", headers={"Host": "evil.example"}).status_code == 421


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
@pytest.mark.parametrize("address", ["/", "/run/one", "/report/one"])
def test_nothing_but_reading(runs: Path, method: str, address: str) -> None:
    fake_run(runs / "one", finished=True)
    answer = browse(runs).request(method, address)
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")
    assert browse(runs).head(address).status_code == 200


def test_every_answer_keeps_the_browser_to_itself(runs: Path) -> None:
    fake_run(runs / "one", finished=True)
    client = browse(runs)
    answers = [client.get(address) for address in ("/", "/run/one", "/nowhere", "/style.css", "/live")]
    answers += [client.get("/", headers={"Host": "evil.example"}), client.post("/nowhere")]
    assert [answer.status_code for answer in answers] == [200, 200, 404, 200, 200, 421, 405]
    for answer in answers:
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "script-src 'self';" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in answer.headers
    report = client.get("/report/one")
    assert report.text == (runs / "one" / "report.html").read_text()
    assert report.headers["content-security-policy"].startswith("sandbox allow-scripts; default-src 'none'")


def test_a_damaged_run_has_a_page_all_the_same(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands in an event, or in the files beside the log."""
    monkeypatch.setattr("flocktune.dashboard.watching._LOOK_AGAIN_S", 0.0)
    folder, draw = fake_run(runs / "one"), random.Random(0)
    client = browse(runs)
    junk: list[Any] = [None, [], {}, "x", -1, 1e308, True, {"a": None}, [[]], "<script>alert(1)</script>"]
    for name, value in (("one", 5), ("one", [1]), ("one", {"held_out": 1})):
        (runs / name / "summary.json").write_text(json.dumps({"rounds": 3, "metrics": value}))
        assert client.get("/").status_code == client.get(f"/run/{name}").status_code == 200, value
    for _ in range(100):
        events = json.loads(json.dumps(log_of(3)))
        for _ in range(3):
            holder = draw.choice(events)
            key = draw.choice(list(holder))
            while isinstance(holder[key], dict) and holder[key] and draw.random() < 0.7:
                holder = holder[key]
                key = draw.choice(list(holder))
            holder[key] = draw.choice(junk)
        (folder / "metrics.jsonl").write_bytes(as_lines(events) + b"{half\n\xff\xfe\n[]\n")
        for name in ("summary.json", "ended.json"):
            (folder / name).unlink(missing_ok=True)
            if draw.random() < 0.3:
                (folder / name).write_text(
                    json.dumps(draw.choice([*junk, {"rounds": "many", "metrics": draw.choice(junk)}]))
                )
        for address in ("/", "/run/one", "/live/run/one"):
            answer = client.get(address)
            assert answer.status_code == 200, events
            assert "<script>alert" not in answer.text


# --- the command


def test_the_command_refuses_what_it_must(cli: Any, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: Said = cli("dashboard", runs / "nowhere")
    assert said.code == 2
    assert "expected a folder with runs, got nothing there" in said.err
    said = cli("dashboard", runs, "--host", "0.0.0.0", "--port", 0)
    assert said.code == 2
    assert "add --expose" in said.err
    said = cli("dashboard", runs, "--host", "no such host", "--port", 0)
    assert (said.code, "--host" in said.err) == (2, True)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        said = cli("dashboard", runs, "--port", taken.getsockname()[1])
    assert said.code == 2
    assert "Give another --port, or 0 for any that is free." in said.err


def test_a_taken_usual_port_gives_way_to_a_free_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        taken = stack.enter_context(socket.socket())
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr(serving, "DEFAULT_PORT", taken.getsockname()[1])
        other = stack.enter_context(serving.listen("127.0.0.1", None))
        assert other.getsockname()[1] != serving.DEFAULT_PORT
        assert serving.is_loopback(other)
        assert serving.url_of(other) == f"http://127.0.0.1:{other.getsockname()[1]}/"
        everywhere = stack.enter_context(serving.listen("0.0.0.0", 0))
        assert not serving.is_loopback(everywhere)
        assert serving.url_of(everywhere).startswith("http://127.0.0.1:")
    with pytest.raises(UserError):
        serving.listen("no such host", 0)
