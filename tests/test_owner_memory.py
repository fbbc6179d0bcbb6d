"""A client's private state on its owner's disk: there for each task of its run, advanced once a task."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flocktune.engine.parcels import FAILURE, UPDATE, Parcel
from flocktune.errors import UpdateRefused, UserError
from flocktune.files import write_atomic
from flocktune.owner import memory as memories
from flocktune.owner import tasks
from flocktune.owner.home import AUDIT, MEMORY, POLICY
from flocktune.owner.memory import Kept, load_memory, save_memory
from flocktune.owner.reading import Refused
from flocktune.owner.tasks import Owner
from flocktune.types import ClientTask, Update
from flocktune.wire import decode_tensors, encode_tensors, side_factors
from tiny_federation import RUN, Scene, make_owner, make_scene

NEW = {"z": torch.arange(3.0), "a": torch.tensor([True]), "m": torch.zeros(0, 2, dtype=torch.uint8)}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture
def bob(scene: Scene, tmp_path: Path) -> Owner:
    return make_owner(scene.world, "bob", tmp_path / "home")


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every task's half counts in its memory; what each began with."""
    began: list[float] = []
    real = tasks.owners_side

    def side(*given: Any) -> tasks.OwnersSide:
        made = real(*given)

        def half(task: ClientTask, memory: Mapping[str, torch.Tensor]) -> tuple[Update, Mapping[str, torch.Tensor]]:
            began.append(float(memory.get("count", torch.tensor(0.0))))
            return made.half(task, {})[0], {"count": torch.tensor(began[-1] + 1)}

        return replace(made, half=half)

    monkeypatch.setattr(tasks, "owners_side", side)
    return began


def in_round(scene: Scene, round: int, **changes: Any) -> Parcel:
    return scene.task("rounds=9", round=round, seed=100 + round, **changes)


def file_of(owner: Owner) -> Path:
    (path,) = (owner.home / MEMORY).iterdir()
    return path


def task(round: int, seed: int = 0) -> ClientTask:
    return ClientTask(round, "bob", "fedavg", {}, seed, "")


def test_memory_goes_on_over_tasks_and_restarts(scene: Scene, bob: Owner, counting: list[float]) -> None:
    for round in range(3):
        assert replace(bob).answer(in_round(scene, round)).kind == UPDATE
    assert counting == [0, 1, 2]
    assert replace(bob).answer(in_round(scene, 0, run="another run")).kind == UPDATE
    assert counting[-1] == 0, "each run has its own"
    assert len(list((bob.home / MEMORY).iterdir())) == 2


def test_a_task_that_comes_again_finds_what_it_found(scene: Scene, bob: Owner, counting: list[float]) -> None:
    """Its answer was lost: it comes under a new nonce, once or often, and counts once."""
    for round in (0, 1, 1, 1, 2):
        bob.answer(in_round(scene, round))
    assert counting == [0, 1, 1, 1, 2]
    # Buffered rounds may ask one client twice in a round: those are two tasks, of different seeds.
    bob.answer(scene.task("rounds=9", round=2, seed=7))
    assert counting[-1] == 3


def test_a_round_that_is_over_is_refused(scene: Scene, bob: Owner, counting: list[float]) -> None:
    bob.answer(in_round(scene, 3))
    reply = bob.answer(in_round(scene, 2))
    assert reply.kind == FAILURE
    assert "round 3 is over: this owner's memory of the run is of round 4" in reply.fields["reason"]
    assert counting == [0]


def test_a_method_without_memory_leaves_no_file(scene: Scene, bob: Owner) -> None:
    for round in (3, 1):
        assert bob.answer(in_round(scene, round)).kind == UPDATE
    assert not (bob.home / MEMORY).exists()


def test_memory_is_the_owners_alone_and_on_disk_before_the_update_leaves(
    scene: Scene, bob: Owner, counting: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        tasks, "update_fields", lambda update: {"there": file_of(bob).exists(), "weight": 1.0}
    )  # called when the parcel is made
    assert bob.answer(in_round(scene, 0)).fields["update"]["there"]
    assert stat.S_IMODE(file_of(bob).stat().st_mode) == 0o600
    assert stat.S_IMODE(file_of(bob).parent.stat().st_mode) == 0o700


def test_on_a_full_disk_no_update_leaves_and_memory_is_what_it_was(
    scene: Scene, bob: Owner, counting: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    bob.answer(in_round(scene, 0))
    before = file_of(bob).read_bytes()

    def full(path: Path, data: bytes, mode: int = 0) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(memories, "write_private", full)
        reply = bob.answer(in_round(scene, 1))
    assert reply.kind == FAILURE
    assert "update_left" not in (bob.home / AUDIT).read_text().splitlines()[-1]
    assert file_of(bob).read_bytes() == before
    assert bob.answer(in_round(scene, 1)).kind == UPDATE
    assert counting == [0, 1, 1]


@pytest.mark.parametrize(
    "damage", [lambda blob: blob[:-1], lambda blob: blob[:-4] + b"\x99" + blob[-3:], lambda b: b""]
)
def test_a_damaged_memory_is_refused_and_stays(scene: Scene, bob: Owner, counting: list[float], damage: Any) -> None:
    bob.answer(in_round(scene, 0))
    path = file_of(bob)
    write_atomic(path, damage(path.read_bytes()))
    found = path.read_bytes()
    reply = bob.answer(in_round(scene, 1))
    assert reply.kind == FAILURE
    assert str(bob.home) not in reply.fields["reason"]
    assert "expected this owner's memory of a run, got one that can not be read" in (bob.home / AUDIT).read_text()
    assert path.read_bytes() == found
    assert counting == [0]


def test_anothers_runs_memory_under_this_ones_name_is_damaged(tmp_path: Path) -> None:
    save_memory(tmp_path, "one", Kept(0, 0, {}, NEW), 1)
    save_memory(tmp_path, "two", Kept(0, 0, {}, NEW), 1)
    one, two = sorted((tmp_path / MEMORY).iterdir())
    one.replace(two)
    wrong = "two" if memories._path(tmp_path, "two") == two else "one"
    with pytest.raises(UserError, match="its digest is another one"):
        load_memory(tmp_path, wrong)


def test_what_is_read_is_what_was_written_in_its_order(tmp_path: Path) -> None:
    save_memory(tmp_path, RUN, Kept(4, 2**62, {"w": NEW["z"]}, NEW), 1)
    kept = load_memory(tmp_path, RUN)
    assert (kept.round, kept.seed) == (4, 2**62)
    assert list(kept.for_task(task(5))) == list(NEW)
    assert all(torch.equal(kept.for_task(task(5))[name], NEW[name]) for name in NEW)
    assert list(kept.for_task(task(4, 2**62))) == ["w"]
    with pytest.raises(Refused):
        kept.for_task(task(3))


def test_memory_that_a_method_gave_up_is_gone(tmp_path: Path) -> None:
    save_memory(tmp_path, RUN, Kept(0, 0, {}, NEW), 1)
    save_memory(tmp_path, RUN, load_memory(tmp_path, RUN).following(task(1), {}), 1)
    save_memory(tmp_path, RUN, load_memory(tmp_path, RUN).following(task(2), {}), 1)
    assert load_memory(tmp_path, RUN) == Kept(2, 0, {}, {})


PRIVATE = (
    "rounds=9", "local.clip_norm=0.0",
    "privacy={kind: sample, clip_norm: 0.5, delta: 1.0e-3, noise_multiplier: 1.0}",
)  # fmt: skip


def test_a_round_that_is_asked_for_again_otherwise_is_spent_again(scene: Scene, bob: Owner) -> None:
    """The very same task has the same answer; any other one tells more of the same rows."""

    def epsilon(parcel: Parcel) -> float:
        reply = replace(bob).answer(parcel)
        assert reply.kind == UPDATE, reply.fields
        return reply.fields["update"]["metrics"]["epsilon"][0]

    task = scene.task(*PRIVATE, round=0, seed=100)
    moved = {name: value + 1e-3 for name, value in decode_tensors(task.blob).items()}
    other = replace(scene.task(*PRIVATE, round=0, seed=100), blob=encode_tensors(moved))
    again = [
        replace(each, fields={**each.fields, "nonce": f"again {number}"}) for number, each in enumerate([task, other])
    ]
    once, same, twice, same_twice = (epsilon(each) for each in (task, again[0], other, again[1]))
    assert once == same < twice == same_twice
    back = replace(task, fields={**task.fields, "nonce": "back"})
    assert epsilon(back) > twice, "what was asked in between is spent"


def test_a_secure_round_that_is_begun_again_is_spent_by_what_it_asks(tmp_path: Path) -> None:
    from flocktune.algorithms.private_rows import STEPS
    from flocktune.config.secure_aggregation import KEYS, MASKED

    def phase(kind: str, **tensors: torch.Tensor) -> ClientTask:
        return ClientTask(4, "bob", kind, tensors, 7, "")

    def trained(kept: Kept, received: float, shares: float) -> Kept:
        kept = kept.following(phase(KEYS), {**kept.for_task(phase(KEYS)), "secagg/state": torch.ones(1)})
        asked = phase(MASKED, w=torch.tensor(received), **{"secagg/shares": torch.tensor(shares)})
        steps = kept.for_task(asked).get(STEPS, torch.tensor(0))
        return kept.following(asked, {**kept.after, STEPS: steps + 3})

    kept = trained(Kept(), 1.0, 0.0)
    kept = trained(kept, 1.0, 1.0)
    assert kept.spent == int(kept.after[STEPS]) == 3, "other keys, the same update"
    kept = trained(kept, 2.0, 2.0)
    assert kept.spent == int(kept.after[STEPS]) == 6
    save_memory(tmp_path, RUN, kept, 1)
    assert load_memory(tmp_path, RUN).spent == 6
    assert trained(load_memory(tmp_path, RUN), 2.0, 3.0).spent == 6
    assert trained(load_memory(tmp_path, RUN), 1.0, 4.0).spent == 9
    again = phase(MASKED, w=torch.tensor(2.0))
    assert int(kept.for_task(again, "other rows")[STEPS]) == 6, "their answer is another one"


def test_a_policy_bounds_what_is_kept(scene: Scene, bob: Owner, counting: list[float]) -> None:
    (bob.home / POLICY).write_text("max_memory_mb: 1\n")
    large = {"w": torch.zeros(2**17)}
    save_memory(bob.home, "fits", Kept(0, 0, large, large), 1)
    with pytest.raises(Refused, match=r"max_memory_mb: expected at most 1 MB, got 1\.5 MB"):
        save_memory(bob.home, "large", Kept(0, 0, large, {"w": torch.zeros(2**18)}), 1)


# --- side adapters of any rank in a message -------------------------------------------------------------

FACTORS = {"q.lora_A": torch.zeros(2, 5), "q.lora_B": torch.zeros(3, 2)}


@pytest.mark.parametrize("rank", [0, 1, 9])
def test_a_side_adapter_of_any_rank_may_come(rank: int) -> None:
    sides = {"q.side_A": torch.rand(rank, 5), "q.side_B": torch.rand(3, rank)}
    got = decode_tensors(encode_tensors({**sides, **FACTORS}), FACTORS, more=side_factors(FACTORS))
    assert list(got) == [*FACTORS, *sides]
    assert list(decode_tensors(encode_tensors(FACTORS), FACTORS, more=side_factors(FACTORS))) == list(FACTORS)


@pytest.mark.parametrize(
    "wrong",
    [
        {"q.side_A": torch.zeros(2, 4)},
        {"q.side_B": torch.zeros(4, 2)},
        {"q.side_A": torch.zeros(5)},
        {"q.side_A": torch.zeros(2, 5, dtype=torch.float16)},
        {"k.side_A": torch.zeros(2, 5)},
        {"q.side_C": torch.zeros(2, 5)},
    ],
)
def test_nothing_else_may(wrong: Mapping[str, torch.Tensor]) -> None:
    with pytest.raises(UpdateRefused, match="not expected"):
        decode_tensors(encode_tensors({**wrong, **FACTORS}), FACTORS, more=side_factors(FACTORS))
    with pytest.raises(UpdateRefused, match="not expected"):
        decode_tensors(encode_tensors({"q.side_A": torch.zeros(2, 5), **FACTORS}), FACTORS)
