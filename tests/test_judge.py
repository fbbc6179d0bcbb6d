"""``flocktune judge`` against real HTTP servers: a scripted one with every fault, and ``transformers serve``."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from email.utils import formatdate
from html import unescape
from pathlib import Path
from typing import Any

import pytest

import judge_server as server
from conftest import Said, World, make_world, write_rows
from flocktune.assets import embedded_model
from flocktune.report.html import render_report
from flocktune.report.runs import load_experiment
from forked_runs import ForkedRuns
from judge_server import Says, Script, in_turn, longer_is_better, scores, serving

Cli = Callable[..., Said]
KEY = "sk-do-not-tell"
QUESTIONS = 3
VERDICTS = 2 * QUESTIONS
"""One draw of each, in both orders."""


@pytest.fixture
def answers(tmp_path: Path) -> tuple[Path, Path]:
    """Two files of answers: theirs (4, 2, 3 letters) and ours (2, 2, 6)."""
    texts = {"theirs": ["four", "ab", "abc"], "ours": ["ab", "cd", "abcdef"]}
    paths = []
    for name, given in texts.items():
        rows = [{"instruction": f"Question {n}?", "category": "xxy"[n], "answer": text} for n, text in enumerate(given)]
        paths.append(write_rows(tmp_path / f"{name}.jsonl", rows))
    return paths[0], paths[1]


@pytest.fixture
def judge(answers: tuple[Path, Path], tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """``flocktune judge`` of the two files, with short waits."""
    theirs, ours = answers
    monkeypatch.setenv("FLOCKTUNE_JUDGE_KEY", KEY)
    monkeypatch.setattr("flocktune.evaluation.judge.client.FIRST_WAIT_S", 0.01)

    def run(script: Script | str, *more: object) -> Said:
        url = script if isinstance(script, str) else script.url
        arguments = ["--against", theirs, "--to", tmp_path / "out", "--cache", tmp_path / "cache"]
        return cli("judge", ours, "--url", url, "--model", "scripted", *arguments, *more)

    return run


def table(tmp_path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((tmp_path / "out" / "judge.json").read_text())
    return data


def pair(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = table(tmp_path)["pairs"][0]
    return found


def kept(tmp_path: Path) -> int:
    return len(list((tmp_path / "cache" / "replies").glob("*/*.json")))


def test_a_table_and_nothing_paid_twice(judge: Cli, tmp_path: Path) -> None:
    with serving(longer_is_better) as script:
        said = judge(script)
        assert said.code == 0, said.all
        assert len(script.requests) == VERDICTS
        first = pair(tmp_path)
        # theirs 5, 3, 4 and ours 3, 3, 7, in either order
        assert (first["sum_baseline"], first["sum_ours"]) == (12, 13)
        assert (first["wins"], first["ties"], first["losses"]) == (1, 1, 1)
        assert first["order_changes_winner"] == 0
        assert first["categories"]["y"]["relative_score"] == 7 / 4
        assert "(12.0, 13.0)" in said.out
        assert "1.083" in said.out
        assert "| theirs | (12.0, 13.0) | 1.083 |" in (tmp_path / "out" / "judge.md").read_text()
        again = judge(script)
        assert again.code == 0
        assert len(script.requests) == VERDICTS, "all of it was in the cache"
    assert pair(tmp_path) == first
    assert table(tmp_path)["usage"]["requests_now"] == 0
    assert "All 6 verdicts are in the cache" in again.out
    replies = [json.loads(line) for line in (tmp_path / "out" / "judge.jsonl").read_text().splitlines()]
    assert [one["first"] for one in replies] == ["baseline", "ours"] * QUESTIONS
    assert replies[0]["scores"] == [5, 3]
    assert replies[1]["scores"] == [3, 5]


def test_what_a_request_holds(judge: Cli, tmp_path: Path) -> None:
    with serving(longer_is_better) as script:
        assert judge(script, "--parameter", "seed=7", "--parameter", "temperature=null").code == 0
    assert all(set(one) == {"model", "messages", "max_tokens", "seed"} for one in script.requests)
    assert {one["model"] for one in script.requests} == {"scripted"}
    assert set(script.keys) == {f"Bearer {KEY}"}
    seen = [server.answers_in(one) for one in script.requests]
    assert all(tuple(reversed(one)) in seen for one in seen), "each pair in both orders"
    assert "ours" not in json.dumps(script.requests).replace("yours", "")
    assert "theirs" not in json.dumps(script.requests)


def test_a_server_on_this_machine_is_asked_past_any_proxy(judge: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving(longer_is_better) as script:
        assert judge(script).code == 0


def test_the_key_is_in_no_file_and_no_message(
    judge: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    wrong = json.dumps({"error": {"message": f"Incorrect key: {KEY}"}}).encode()
    with serving(in_turn([Says(status=500, body=wrong), Says(body=wrong)])) as script:
        said = judge(script)
    assert said.code == 0, said.all
    with serving(lambda body, number: Says(status=401, body=wrong)) as script:
        refused = judge(script)
    assert refused.code == 2
    assert "Incorrect key: (key)" in refused.err
    assert "FLOCKTUNE_JUDGE_KEY" in refused.err or "--key-variable" in refused.err
    assert KEY not in said.all + refused.all
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_a_judge_that_always_prefers_the_first_ends_in_ties(judge: Cli, tmp_path: Path) -> None:
    with serving(server.first_is_better) as script:
        said = judge(script)
    found = pair(tmp_path)
    assert found["relative_score"] == 1.0
    assert (found["wins"], found["ties"], found["losses"]) == (0, 3, 0)
    assert found["order_changes_winner"] == 1.0
    assert found["first_place_points"] == 4.0
    assert "changed the winner in 100 %" in " ".join(said.out.split())


def test_draws_are_asked_apart_and_averaged(judge: Cli, tmp_path: Path) -> None:
    def moody(body: Mapping[str, Any], number: int) -> Says:
        return scores(4, 4) if number < VERDICTS else scores(6, 6)

    with serving(moody) as script:
        refused = judge(script, "--draws", 2)
        assert refused.code == 2
        assert not script.requests
        assert judge(script, "--draws", 2, "--temperature", 0.7).code == 0
        assert len(script.requests) == 2 * VERDICTS
    found = pair(tmp_path)
    assert found["draws"] == 2 * QUESTIONS
    assert found["sum_ours"] + found["sum_baseline"] == pytest.approx(2 * QUESTIONS * 5)
    assert not table(tmp_path)["judge"]["same_draws"]


def test_draws_that_are_all_alike_are_told(judge: Cli) -> None:
    with serving(longer_is_better) as script:
        alike = judge(script, "--draws", 2, "--temperature", 0.7)
    assert "does not draw" in alike.out


def test_equal_answers_are_asked_once_and_tie(tmp_path: Path, judge: Cli, answers: tuple[Path, Path]) -> None:
    theirs, ours = answers
    theirs.write_text(ours.read_text())
    with serving(server.first_is_better) as script:
        assert judge(script).code == 0
        assert len(script.requests) == QUESTIONS
    assert pair(tmp_path)["ties"] == QUESTIONS


# --- faults ----------------------------------------------------------------------------------------

GOOD = Says('{"first": 5, "second": 5}')
FAULTS = {
    "429, in seconds": Says(status=429, headers={"Retry-After": "0.2"}, body=b'{"error": {"message": "slow down"}}'),
    "500": Says(status=500, body=b"<html>oh</html>"),
    "503 in JSON": Says(status=503, body=b'{"error": "loading"}'),
    "cut in the middle": Says("x" * 1000, cut=True),
    "no JSON": Says(body=b"<html>hello</html>"),
    "no choices": Says(body=b'{"error": {"message": "overloaded"}}'),
    "no text": Says(body=b'{"choices": [{"message": {"content": 7}}]}'),
    "a list": Says(body=b"[]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_tried_again_and_costs_one_request(fault: str, judge: Cli, tmp_path: Path) -> None:
    with serving(in_turn([FAULTS[fault], GOOD, FAULTS[fault]])) as script:
        said = judge(script, "--concurrency", 1)
    assert said.code == 0, said.all
    assert len(script.requests) == VERDICTS + 2
    assert pair(tmp_path)["faults"] == {}
    assert kept(tmp_path) == VERDICTS


def test_retry_after_is_kept_by_all(judge: Cli, tmp_path: Path) -> None:
    """As seconds by one answer, as a date by the next: nothing is sent before."""
    times: list[float] = []

    def busy(body: Mapping[str, Any], number: int) -> Says:
        times.append(time.time())
        if number == 0:
            return Says(status=429, headers={"Retry-After": "0.3"})
        if number == 1:
            return Says(status=503, headers={"Retry-After": formatdate(times[-1] + 2, usegmt=True)})
        return GOOD

    with serving(busy) as script:
        assert judge(script).code == 0
    assert times[1] - times[0] >= 0.3
    assert int(times[2]) >= int(times[1]) + 1
    assert len(script.requests) == VERDICTS + 2


def test_a_pause_that_is_too_long_ends_with_advice(judge: Cli, tmp_path: Path) -> None:
    with serving(lambda body, number: Says(status=429, headers={"Retry-After": "7200"})) as script:
        said = judge(script)
    assert said.code == 1
    assert "it asks for a pause of 7200 s" in said.err
    assert "goes on" in said.err
    assert len(script.requests) == 1


def test_a_time_out_is_tried_again(judge: Cli, tmp_path: Path) -> None:
    with serving(in_turn([GOOD, Says(delay_s=60)])) as script:
        said = judge(script, "--timeout-s", 0.3, "--concurrency", 1)
        assert said.code == 0, said.all
        assert len(script.requests) == VERDICTS + 1


@pytest.mark.parametrize(
    ("status", "body", "wanted"),
    [
        (401, {"error": {"message": "bad key"}}, "a key that the server takes"),
        (403, {"error": {"message": "not for you"}}, "a key that the server takes"),
        (404, {"error": {"message": "no model scripted"}}, "a server that knows this model"),
        (402, {"error": {"message": "pay"}}, "an account with credit"),
        (429, {"error": {"message": "quota", "code": "insufficient_quota"}}, "an account with credit"),
        (400, {"error": {"message": "temperature must be 1"}}, "a server that takes the request"),
    ],
)
def test_what_no_try_mends_is_one_request_and_one_message(
    status: int, body: object, wanted: str, judge: Cli, tmp_path: Path
) -> None:
    with serving(lambda _, number: Says(status=status, body=json.dumps(body).encode())) as script:
        said = judge(script)
    assert said.code == 2
    assert len(script.requests) == 1
    assert wanted in said.err
    assert str(status) in said.err
    assert said.err.count("error:") == 1
    assert not (tmp_path / "out").exists()


def test_a_path_that_is_none_and_a_server_that_is_none(judge: Cli) -> None:
    with serving(longer_is_better) as script:
        said = judge(script.url.removesuffix("/v1"))
        assert said.code == 2
        assert "mostly in /v1" in said.err
        address = script.url
    gone = judge(address)
    assert gone.code == 2
    assert "expected a server that listens" in gone.err


def test_no_redirect_is_followed(judge: Cli) -> None:
    with serving(longer_is_better) as other:
        moved = Says(status=307, headers={"Location": f"{other.url}/chat/completions"})
        with serving(lambda body, number: moved) as script:
            said = judge(script)
        assert said.code == 2
        assert "expected a server that answers itself, got 307" in said.err
        assert len(script.requests) == 1
        assert not other.requests


def test_what_is_no_verdict_is_asked_again_then_counted(judge: Cli, tmp_path: Path) -> None:
    """By the question: none, one that is mended, and one that stays out of range in one order only."""

    def odd(body: Mapping[str, Any], number: int) -> Says:
        text = body["messages"][0]["content"]
        reminded = "An earlier reply" in text
        if "Question 0?" in text:
            return Says("Both are nice.") if not reminded else Says('{"first": 5, "second"', finish_reason="length")
        if "Question 1?" in text:
            return scores(5, 5) if reminded else Says('{"first": 5, "second": 5} {"first": 6, "second": 5}')
        return scores(11, 5) if server.answers_in(body)[0] == "abc" else scores(8, 4)

    with serving(odd) as script:
        said = judge(script)
        assert said.code == 0
        assert len(script.requests) == 2 * 2 + 2 * 2 + 2 + 1
        assert judge(script).code == 0
        assert len(script.requests) == 11, "what was paid for is kept, verdict or none"
    found = pair(tmp_path)
    assert found["faults"] == {"cut off": 2, "out of range": 1}
    assert found["asked_again"] == 5
    assert found["questions"] == 1, "question 2 has one order only, and its bias would come in"
    assert (found["asked"], found["verdicts"]) == (3, 6)
    told = " ".join(said.out.split())
    assert "3 of 6 replies are no verdicts: 2 cut off at the token limit, 1 with scores that are not from 1" in told
    assert "2 questions of 3 left out" in told


def test_a_request_that_is_refused_later_counts_and_is_asked_anew(judge: Cli, tmp_path: Path) -> None:
    long = Says(status=400, body=b'{"error": {"message": "context too long"}}')
    with serving(lambda body, number: long if number in (1, VERDICTS) else GOOD) as script:
        for run in range(2):
            assert judge(script, "--concurrency", 1).code == 0, "alone in the second run, it is no reason to end"
            assert pair(tmp_path)["faults"] == {"rejected": 1}
            assert kept(tmp_path) == VERDICTS - 1
            assert len(script.requests) == VERDICTS + run
        assert judge(script, "--concurrency", 1).code == 0
        assert len(script.requests) == VERDICTS + 2
    assert pair(tmp_path)["faults"] == {}


def test_a_server_that_stops_answering_ends_the_work_and_keeps_what_came(judge: Cli, tmp_path: Path) -> None:
    with serving(in_turn([GOOD, GOOD], lambda body, number: Says(status=500))) as script:
        said = judge(script, "--concurrency", 1, "--tries", 2)
        assert said.code == 1
        assert len(script.requests) == 2 + 3 * 2
        assert "the same command goes on" in said.err
        assert not (tmp_path / "out").exists()
        script.reply = longer_is_better
        assert judge(script).code == 0
        assert len(script.requests) == 8 + VERDICTS - 2


def test_one_question_that_gets_no_answer_does_not_stop_the_others(judge: Cli, tmp_path: Path) -> None:
    def stuck(body: Mapping[str, Any], number: int) -> Says:
        return Says(status=500) if "Question 1?" in str(body) and server.answers_in(body)[0] == "ab" else GOOD

    with serving(stuck) as script:
        assert judge(script, "--tries", 2).code == 0
        assert len(script.requests) == VERDICTS + 1
    assert pair(tmp_path)["faults"] == {"no reply": 1}


def test_failures_that_are_not_in_a_row_do_not_end_the_work(judge: Cli, tmp_path: Path) -> None:
    ours_first = [("ab", "four"), ("cd", "ab"), ("abcdef", "abc")]

    def every_other(body: Mapping[str, Any], number: int) -> Says:
        return Says(status=500) if server.answers_in(body) in ours_first else GOOD

    with serving(every_other) as script:
        assert judge(script, "--tries", 1, "--concurrency", 1).code == 0
    assert pair(tmp_path)["faults"] == {"no reply": 3}
    assert pair(tmp_path)["questions"] == 0


# --- cost, pace ------------------------------------------------------------------------------------


def test_the_estimate_and_what_was_spent(judge: Cli, tmp_path: Path) -> None:
    prices = ("--price-in", 2, "--price-out", 8)
    with serving(longer_is_better) as script:
        dry = judge(script, *prices, "--dry-run")
        assert dry.code == 0
        assert not script.requests
        assert "6 verdicts to ask for" in dry.out
        said = judge(script, *prices)
        told = [len(str(one["messages"][0]["content"]).encode()) for one in script.requests]
    guessed = sum(-(-size // 4) + 8 for size in told)
    assert f"about {guessed:,} tokens read" in dry.out
    assert f"at most {6 * 512:,} written, {(guessed * 2 + 6 * 512 * 8) / 1e6:.2f}" in dry.out
    usage = table(tmp_path)["usage"]
    assert usage["tokens"] == usage["tokens_now"] == [600, 60]
    assert usage["cost"] == pytest.approx((600 * 2 + 60 * 8) / 1e6)
    assert not usage["tokens_guessed"]
    assert "600 tokens read and 60 written, 0.00 at the prices given" in " ".join(said.out.split())


@pytest.mark.parametrize("usage", [None, {"prompt_tokens": -100, "completion_tokens": True}])
def test_tokens_that_are_not_reported_are_counted_by_the_rule(judge: Cli, tmp_path: Path, usage: Any) -> None:
    with serving(lambda body, number: Says('{"first": 5, "second": 5}', usage=usage)) as script:
        said = judge(script)
        told = [len(str(one["messages"][0]["content"]).encode()) for one in script.requests]
    counted = table(tmp_path)["usage"]
    assert counted["tokens"] == counted["tokens_now"] == [sum(-(-size // 4) + 8 for size in told), 6 * (7 + 8)]
    assert counted["tokens_guessed"]
    assert "by the rule" in said.out


def test_no_request_is_sent_that_might_cost_more_than_is_allowed(judge: Cli, tmp_path: Path) -> None:
    """A request may write 512 tokens of 1 each in price; it writes 10."""
    with serving(longer_is_better) as script:
        prices = ("--price-out", 1e6, "--max-cost", 530)
        said = judge(script, *prices)
        assert said.code == 1
        assert len(script.requests) == 2, "10 and 512, 20 and 512, but not 30 and 512"
        assert kept(tmp_path) == 2
        assert "4 of 6 verdicts are still to come" in " ".join(said.err.split())
        assert not (tmp_path / "out").exists()
        assert judge(script, "--price-out", 1e6, "--max-cost", 600).code == 0
        assert len(script.requests) == VERDICTS
    assert judge(script.url, "--max-cost", 1).code == 2


def test_a_request_may_read_a_token_for_every_byte(judge: Cli) -> None:
    with serving(longer_is_better) as script:
        said = judge(script, "--price-in", 1e6, "--max-cost", 700)
    assert (said.code, script.requests) == (1, []), "by the rule it would be some 400"


def test_requests_keep_their_distance(judge: Cli) -> None:
    times: list[float] = []

    def noting(body: Mapping[str, Any], number: int) -> Says:
        times.append(time.monotonic())
        return GOOD

    with serving(noting) as script:
        assert judge(script, "--requests-per-minute", 600).code == 0
    assert times[-1] - times[0] >= 0.9 * (VERDICTS - 1) * 0.1


def test_no_more_requests_at_a_time_than_allowed(judge: Cli) -> None:
    out: list[int] = []
    most: list[int] = []

    def slow(body: Mapping[str, Any], number: int) -> Says:
        out.append(number)
        most.append(len(out))
        time.sleep(0.05)
        out.remove(number)
        return GOOD

    with serving(slow) as script:
        assert judge(script, "--concurrency", 2).code == 0
    assert max(most) == 2


def test_another_machine_is_asked_with_leave_only(judge: Cli) -> None:
    said = judge("https://judge.example/v1")
    assert said.code == 2
    assert "3 questions with all answers would be sent to judge.example" in said.err
    secret = judge("http://me:secret@judge.example/v1")
    assert secret.code == 2
    assert "secret" not in secret.all
    assert "one with a name or password in it" in secret.err
    assert judge("judge.example").code == 2
    assert "--questions beside it" in judge("https://judge.example/v1", "--max-new-tokens", 5).err


# --- killed ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedRuns]:
    with ForkedRuns(tmp_path_factory.mktemp("forked"), {}) as runs:
        yield runs


def command(script: Script, answers: tuple[Path, Path], tmp_path: Path, *more: object) -> list[object]:
    theirs, ours = answers
    places = ["--to", tmp_path / "out", "--cache", tmp_path / "cache"]
    return ["judge", ours, "--against", theirs, "--url", script.url, "--model", "m", *places, *more]


def test_killed_anywhere_it_goes_on_and_pays_for_nothing_twice(
    forked: ForkedRuns, answers: tuple[Path, Path], tmp_path: Path
) -> None:
    with serving(longer_is_better) as script:
        whole = forked.run(*command(script, answers, tmp_path, "--concurrency", 1), count=True)
        assert whole.code == 0, whole.output
        assert whole.disk_calls
        wanted = pair(tmp_path)
        for crash_at in range(1, whole.disk_calls + 1, 10):  # three calls a reply: each in its turn
            shutil.rmtree(tmp_path / "out")
            shutil.rmtree(tmp_path / "cache")
            script.requests.clear()
            killed = forked.run(*command(script, answers, tmp_path, "--concurrency", 1), crash_at=crash_at)
            assert killed.code == -signal.SIGKILL
            before, paid = len(script.requests), kept(tmp_path)
            assert paid >= before - 1, "only the reply that was being written may be lost"
            assert forked.run(*command(script, answers, tmp_path)).code == 0
            assert len(script.requests) - before == VERDICTS - paid
            assert pair(tmp_path) == wanted


def test_ctrl_c_lets_what_is_out_come_back(forked: ForkedRuns, answers: tuple[Path, Path], tmp_path: Path) -> None:
    go = server.threading.Event()

    def gated(body: Mapping[str, Any], number: int) -> Says:
        if number:
            go.wait(30)
        return GOOD

    with serving(gated) as script:
        child = forked.start(*command(script, answers, tmp_path, "--concurrency", 2))
        child.until(lambda: len(script.requests) == 3)
        child.kill(signal.SIGINT)
        child.until(lambda: "Stopping after the requests that are out" in child.output.read_text())
        go.set()
        ended = child.wait()
        assert ended.code == 130, ended.output
        assert "Go on with: flocktune judge" in ended.output
        assert len(script.requests) == kept(tmp_path) == 3
        assert forked.run(*command(script, answers, tmp_path)).code == 0
        assert len(script.requests) == VERDICTS
        go.clear()
        shutil.rmtree(tmp_path / "cache")
        child = forked.start(*command(script, answers, tmp_path))
        child.until(lambda: len(script.requests) > VERDICTS)
        child.kill(signal.SIGINT)
        child.until(lambda: "Stopping after" in child.output.read_text())
        child.kill(signal.SIGINT)
        ended = child.wait()
        go.set()
        assert ended.code == 130, ended.output
        assert "Traceback" not in ended.output


# --- runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, Path]:
    from flocktune.config.load import load_recipe
    from flocktune.experiment import execute_experiment, start

    world = make_world(tmp_path_factory.mktemp("judged"))
    folder = world.folder / "run"
    changes = ["rounds=1", "compare.base=true", "compare.local=1", "evaluation.every=0"]
    start(load_recipe(world.recipe, changes), folder, [0])
    execute_experiment(folder)
    return world, folder


def test_a_comparison_is_judged_against_all_beside_it(comparison: tuple[World, Path], cli: Cli, tmp_path: Path) -> None:
    _, folder = comparison
    with serving(longer_is_better) as script:
        said = cli("judge", folder, "--url", script.url, "--model", "m", "--cache", tmp_path)
        assert said.code == 0, said.all
        data = json.loads((folder / "judge.json").read_text())
        assert data["ours"]["label"] == "FedIT"
        assert data["pairs"][0]["baseline"] == "Base model"
        assert data["pairs"][1]["baseline"].startswith("Local, ")
        assert all(one["asked"] == 6 for one in data["pairs"])
        page = render_report(load_experiment(folder))
        assert "What a judge made of the answers" in page
        assert f"<td>{data['pairs'][0]['relative_score']:.3f}</td>" in page
        few = cli("judge", folder / "fedit", "--against", "base", "--max-questions", 3, "--url", script.url,
                  "--model", "m", "--cache", tmp_path)  # fmt: skip
        assert few.code == 0, few.all
    assert json.loads((folder / "fedit" / "judge.json").read_text())["pairs"][0]["asked"] == 3
    for damage in ("{", "[]", '{"pairs": 3}'):
        (folder / "judge.json").write_text(damage)
        assert "verdicts could not be shown" in unescape(render_report(load_experiment(folder)))


def test_new_questions_are_answered_by_run_and_base_once(
    comparison: tuple[World, Path], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = comparison
    alone = shutil.copytree(folder / "fedit", tmp_path / "alone")
    questions = write_rows(tmp_path / "q.jsonl", [{"question_id": n, "turns": [f"Say {n}."]} for n in (1, 2)])  # type: ignore[list-item]
    elsewhere = write_rows(tmp_path / "vendor.jsonl", [{"question_id": "2", "text": "A vendor's words."}])
    arguments = ["judge", alone, "--against", "base", "--against", elsewhere, "--questions", questions,
                 "--max-new-tokens", 5, "--model", "m", "--cache", tmp_path / "cache"]  # fmt: skip
    with serving(server.first_is_better) as script:
        said = cli(*arguments, "--url", script.url)
        assert said.code == 0, said.all
        assert "FedIT: answering 2 questions" in said.out
        assert "Base model: answering 2 questions" in said.out
        shown = {answer for one in script.requests for answer in server.answers_in(one)}
        again = cli(*arguments, "--url", script.url)
        assert "answering" not in again.out, "a run's answers are kept too"
    data = json.loads((alone / "judge.json").read_text())
    assert [one["asked"] for one in data["pairs"]] == [2, 1]
    assert data["pairs"][1]["unanswered"] == 1
    written = [json.loads(path.read_text()) for path in (tmp_path / "cache" / "answers").glob("*.json")]
    assert len(written) == 2
    assert written[0] != written[1], "the base answers without the adapter"
    assert {text.strip() or "(nothing)" for texts in written for text in texts} | {"A vendor's words."} == shown


@pytest.mark.parametrize(
    ("against", "said"),
    [
        ("nobody", "base, a run's folder or a file of answers, got 'nobody'"),
        ("SELF", "expected contestants that differ"),
    ],
)
def test_who_is_not_there_is_named(
    against: str, said: str, comparison: tuple[World, Path], cli: Cli, tmp_path: Path
) -> None:
    _, folder = comparison
    name = against if against != "SELF" else folder / "fedit"
    found = cli(
        "judge", folder, "--against", name, "--url", "http://127.0.0.1:9/v1", "--model", "m", "--cache", tmp_path
    )
    assert found.code == 2
    assert said in " ".join(found.err.split())


def test_files_without_a_common_question_are_refused(judge: Cli, answers: tuple[Path, Path]) -> None:
    write_rows(answers[0], [{"instruction": "Else?", "answer": "x"}])
    said = judge("http://127.0.0.1:9/v1")
    assert said.code == 2
    assert "no question in common" in said.err


# --- a real server ---------------------------------------------------------------------------------


def test_transformers_serve_with_a_judge_that_can_not_judge(judge: Cli, tmp_path: Path) -> None:
    """A model of 3.8 million weights says nothing that is a verdict: all is counted, nothing is made up."""
    model = tmp_path / "model"
    shutil.copytree(embedded_model(), model)
    told = json.loads((model / "tokenizer_config.json").read_text())
    chat = "{% for message in messages %}{{ message['content'][-200:] }}\n{% endfor %}"
    (model / "tokenizer_config.json").write_text(json.dumps({**told, "chat_template": chat}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [Path(sys.executable).parent / "transformers", "serve", "--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "serve.log").open("w") as log:
        process = subprocess.Popen([*program, "--device", "cpu"], stdout=log, stderr=log, env=dict(os.environ))
    try:
        deadline = time.monotonic() + 120
        while not _healthy(port):
            assert process.poll() is None, (tmp_path / "serve.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        said = judge(f"http://127.0.0.1:{port}/v1", "--model", model, "--max-tokens", 16, "--attempts", 1)
    finally:
        process.terminate()
        process.wait()
    assert said.code == 0, said.all
    found = pair(tmp_path)
    assert found["questions"] == 0
    assert sum(found["faults"].values()) == VERDICTS
    assert set(found["faults"]) <= {"no verdict", "cut off"}
    assert table(tmp_path)["usage"]["tokens"][0] > 0
    assert not table(tmp_path)["usage"]["tokens_guessed"]
    assert "6 of 6 replies are no verdicts" in said.out


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
