"""A coordinator's run, watched from outside: what is said when it ends, fails, dies, or never begins."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("flwr", reason="the extra flocktune[flower] is not installed")

from flocktune.errors import FlocktuneError, UserError
from flocktune.federation import running, serving
from flocktune.federation.control import ControlFailed
from flocktune.federation.layout import Federation, create_federation
from flocktune.federation.roster import STOP, write_roster
from flocktune.files import exclusive, is_held, write_json
from flocktune.runs import Stopped
from flocktune.standing import ENDED, write_ended


@pytest.fixture
def fed(tmp_path: Path) -> Federation:
    return create_federation(tmp_path / "fed", "localhost", 8443, None, 9091)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "LOOK_S", 0.0)
    monkeypatch.setattr(running, "ASK_S", 0.0)
    monkeypatch.setattr(running, "answers", lambda federation, name: True)
    monkeypatch.setattr(running, "run_state", lambda federation, number: "pending")


@pytest.fixture
def run(fed: Federation) -> Path:
    folder = fed.runs / "mine"
    folder.mkdir()
    write_roster(folder, ["ada", "bela"])
    return folder


def watch(
    fed: Federation, run: Path, *, held_looks: int = 0, stopped: bool = False, then: Any = None
) -> dict[str, Any]:
    """Follow a run whose process is there for some looks, and then does ``then``."""
    with ExitStack() as process:
        if held_looks:
            process.enter_context(exclusive(run))
        looks = 0

        def look() -> bool:
            nonlocal looks
            looks += 1
            if looks == held_looks:
                process.close()
                if then:
                    then()
            return stopped

        return running.follow(fed, run, "12", [], look)


def test_its_summary_is_what_a_run_ends_with(fed: Federation, run: Path) -> None:
    assert watch(fed, run, held_looks=3, then=lambda: write_json(run / "summary.json", {"a": 1})) == {"a": 1}


def test_why_it_failed_is_told(fed: Federation, run: Path) -> None:
    why = ["round 1: expected updates"]
    with pytest.raises(FlocktuneError, match="round 1: expected updates"):
        watch(fed, run, held_looks=2, then=lambda: write_ended(run, "failed", why))
    (run / ENDED).unlink()
    with pytest.raises(UserError, match="round 1"):
        watch(fed, run, held_looks=2, then=lambda: write_ended(run, "failed", why, users_mistake=True))


def test_a_process_that_is_gone_is_said_with_what_to_do(fed: Federation, run: Path) -> None:
    with pytest.raises(FlocktuneError) as caught:
        watch(fed, run, held_looks=2)
    said = str(caught.value)
    assert said.startswith("the run's process has ended. Nothing that was saved is lost.")
    assert f"flocktune federation logs {fed.folder} run" in said
    assert f"flocktune federation run {fed.folder} --resume mine" in said


def test_a_full_disk_is_named(fed: Federation, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "_FULL_BYTES", 1 << 62)
    with pytest.raises(FlocktuneError, match=f"the disk of {run} is full"):
        watch(fed, run, held_looks=2)


def test_a_run_that_will_not_begin(fed: Federation, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "run_state", lambda federation, number: "finished:failed")
    with pytest.raises(FlocktuneError, match=r"has not begun \(finished:failed"):
        watch(fed, run)

    def refuses(federation: Federation, number: str) -> str:
        raise ControlFailed("ls", "no connection")

    monkeypatch.setattr(running, "run_state", refuses)
    with pytest.raises(FlocktuneError, match=r"has not begun \(flwr ls: no connection"):
        watch(fed, run)
    monkeypatch.setattr(running, "answers", lambda federation, name: name != "superexec")
    with pytest.raises(FlocktuneError, match="has not begun, and superexec can not be reached"):
        watch(fed, run)


def test_a_run_may_be_asked_to_stop_before_it_has_begun(fed: Federation, run: Path) -> None:
    running.ask_to_stop(run)
    with serving._stop_file(run / STOP) as stop:
        assert stop.wait(60)
    assert not (run / STOP).exists()


def test_ctrl_c_is_handed_on(fed: Federation, run: Path) -> None:
    def ends() -> None:
        assert (run / STOP).exists()
        write_ended(run, "stopped")

    with pytest.raises(Stopped):
        watch(fed, run, held_looks=3, stopped=True, then=ends)
    with pytest.raises(Stopped):
        watch(fed, run), "who only watches is told the same"


def test_a_run_that_is_running_is_not_begun_twice(fed: Federation, run: Path) -> None:
    """As Flower does, after an outage in which the coordinator has gone on with it."""
    with exclusive(run):
        serving.serve(lambda nodes: pytest.fail("connected"), {"run": str(run)})
        assert running.start(fed, run) == ""
        assert is_held(run)
    assert not (run / ENDED).exists()


def test_what_went_wrong_is_written_down(fed: Federation, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)  # serve goes to where the run's paths begin
    handlers = list(logging.getLogger("flocktune").handlers)
    monkeypatch.setattr(logging.getLogger("flocktune"), "handlers", handlers)
    with pytest.raises(UserError):
        serving.serve(lambda nodes: SimpleNamespace(), {"run": str(run)})  # there is no recipe
    assert "recipe.yaml" in (run / ENDED).read_text()
    assert "recipe.yaml" in fed.log("run").read_text()
