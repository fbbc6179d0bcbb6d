"""``flocktune join`` up to its connection: what is refused at once, and what ``--check`` leaves as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flocktune.enrolment import Invitation, write_invitation
from flocktune.federation.certificates import create_authority
from flocktune.files import exclusive
from flocktune.owner.home import make_home

ROWS = '{"instruction": "a", "response": "b"}\n'


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    create_authority(tmp_path, "a-federation")
    ca = (tmp_path / "ca.pem").read_text()
    write_invitation(
        tmp_path / "bob.bundle", invitation := Invitation("id", "fed", "bob", "127.0.0.1", 1, ca, "ab" * 32)
    )
    make_home(tmp_path / "home", invitation)
    (tmp_path / "rows.jsonl").write_text(ROWS)
    return tmp_path / "bob.bundle"


@pytest.fixture
def join(bundle: Path, cli: Callable[..., Any]) -> Callable[..., Any]:
    folder = bundle.parent
    return lambda *more: cli("join", bundle, "--data", folder / "rows.jsonl", "--home", folder / "home", *more)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--device", "gpu"], "--device: expected auto, cpu, cuda"),
        (["--device", "cuda:"], "--device: expected auto, cpu, cuda"),
        (["--max-gpu-memory", "0"], "--max-gpu-memory: expected more than 0"),
        (["--max-gpu-memory", "nan"], "--max-gpu-memory: expected more than 0"),
        (["--model", "someone/some-model"], "--model: expected a folder, or embedded"),
        (["--emulator", "nowhere"], "--emulator: expected a file or folder"),
    ],
)
def test_what_can_not_be_meant_is_refused_before_anything_begins(
    join: Callable[..., Any], bundle: Path, given: list[str], said: str
) -> None:
    before = sorted(path.name for path in (bundle.parent / "home").iterdir())
    told = join("--check", *given)
    assert told.code == 2
    assert said in " ".join(told.err.split())
    assert sorted(path.name for path in (bundle.parent / "home").iterdir()) == before


def test_every_mistake_is_in_one_message(join: Callable[..., Any]) -> None:
    told = join("--device", "gpu", "--model", "nowhere", "--max-gpu-memory", "-1")
    assert all(option in told.err for option in ("--device", "--model", "--max-gpu-memory"))


def test_a_check_looks_also_while_another_join_is_there(join: Callable[..., Any], bundle: Path) -> None:
    key = bundle.parent / "home" / "key"
    before = key.read_bytes()
    (bundle.parent / "home" / "node").write_text("17")
    text = bundle.read_text()
    bundle.write_text(text.replace("ab" * 32, "cd" * 32))
    with exclusive(bundle.parent / "home"):
        told = join("--check", "--device", "cuda:1", "--model", "embedded")
        assert (told.code, "refused the connection" in told.out) == (1, True)
        told = join()
        assert (told.code, "Another join is running" in " ".join(told.err.split())) == (2, True)
    assert key.read_bytes() == before
