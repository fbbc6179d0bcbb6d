"""How a run stands, from its folder, while its owner goes on undisturbed."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from pathlib import Path

import pytest

from flocktune.errors import FlocktuneError, Problem, UserError
from flocktune.files import exclusive, is_held, write_json
from flocktune.standing import ENDED, Standing, standing, told_ending


class Stopped(Exception):
    """On request."""


def end_with(folder: Path, error: BaseException | None) -> None:
    with told_ending(folder, Stopped):
        if error:
            raise error


@pytest.mark.parametrize(
    ("error", "stands"),
    [
        (UserError(Problem("lr", "a number", "a fish"), "and more"), ("lr: expected a number, got a fish", "and more")),
        (FlocktuneError("round 2: nobody answered"), ("round 2: nobody answered",)),
        (ValueError("a bug"), ("ValueError: a bug",)),
        (Stopped("saved"), "stopped"),
        (KeyboardInterrupt(), "stopped"),
    ],
)
def test_whatever_ends_a_run_is_told_later(tmp_path: Path, error: BaseException, stands: object) -> None:
    with pytest.raises(type(error)):
        end_with(tmp_path, error)
    expected = Standing("stopped") if stands == "stopped" else Standing("failed", stands)
    assert standing(tmp_path, begun=True) == expected
    with exclusive(tmp_path):
        assert standing(tmp_path, begun=True) == Standing("running"), "another attempt has begun"
    end_with(tmp_path, None)
    assert not (tmp_path / ENDED).exists(), "a new attempt forgets how the last one ended"


def test_a_run_without_any_word_was_killed_or_waits(tmp_path: Path) -> None:
    assert standing(tmp_path, begun=False) == Standing("waiting")
    assert standing(tmp_path, begun=True) == Standing("stopped")
    for nonsense in ("", "[]", '{"how": "failed", "problems": 3}'):
        (tmp_path / ENDED).write_text(nonsense)
        assert standing(tmp_path, begun=True).problems == ()
    write_json(tmp_path / "summary.json", {})
    assert standing(tmp_path, begun=True) == Standing("finished")


def test_a_full_disk_hides_no_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(FlocktuneError, match="nobody answered"):
        end_with(tmp_path, FlocktuneError("nobody answered"))


def test_who_looks_disturbs_nobody(tmp_path: Path) -> None:
    """Whoever begins a run at the instant in which somebody looks gets the folder all the same."""
    with exclusive(tmp_path):
        (tmp_path / ".lock").chmod(0o400)
        before = (tmp_path / ".lock").stat().st_mtime_ns
        assert is_held(tmp_path)
    assert not is_held(tmp_path)
    assert (tmp_path / ".lock").stat().st_mtime_ns == before
    (tmp_path / ".lock").chmod(0o600)

    looking = threading.Event()

    def look() -> None:
        with (tmp_path / ".lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            looking.set()
            time.sleep(0.05)

    thread = threading.Thread(target=look)
    thread.start()
    looking.wait()
    with exclusive(tmp_path):
        thread.join()


def test_looking_leaves_no_file(tmp_path: Path) -> None:
    assert not is_held(tmp_path)
    assert not is_held(tmp_path / "gone")
    assert list(tmp_path.iterdir()) == []
