"""Secure aggregation in a federation: owners behind a link, their policies, their keys, what stays on their disks."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flocktune.audit import read_audit, verify
from flocktune.config.secure_aggregation import CONSISTENCY, KEYS, MASKED, PHASES, SHARES, UNMASK
from flocktune.engine.parcels import FAILURE, UPDATE, Parcel
from flocktune.errors import RoundFailed, UserError
from flocktune.owner.home import AUDIT, IDENTITY, PEERS, POLICY, public_identity
from flocktune.owner.memory import load_memory
from flocktune.owner.readiness import _policy
from flocktune.runs import execute
from flocktune.wire import decode_tensors
from tiny_federation import FEDBIOT, RUN, SIZES, Direct, make_federated_world, make_owner, new_run, run_apart

SECURE = ("secure_aggregation={min_clients: 2}", "aggregation.weights=equal")


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_federated_world(tmp_path_factory.mktemp("secure"))


def link_to(world: Path, homes: Path) -> Direct:
    return Direct({client: make_owner(world, client, homes / client).answer for client in SIZES})


def events(home: Path, name: str) -> list[dict[str, Any]]:
    assert verify(home / AUDIT) == []
    return [dict(record) for record in read_audit(home / AUDIT) if record["event"] == name]


VARIANTS = {
    "FedIT": (),
    "by examples": ("aggregation.weights=examples", "secure_aggregation.max_weight=16"),
    "FedBiOT": FEDBIOT,
    "RoLoRA": ("aggregation.rule=rolora",),
    "FedSA-LoRA": ("aggregation.rule=fedsa_lora",),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_two_sides_compute_what_one_process_does(apart: Path, tmp_path: Path, name: str) -> None:
    together = execute(new_run(apart, tmp_path / "together", *SECURE, *VARIANTS[name]))
    link = link_to(apart, tmp_path / "homes")
    summary = run_apart(new_run(apart, tmp_path / "apart", *SECURE, *VARIANTS[name]), link)
    assert summary["adapter_sha256"] == together["adapter_sha256"]
    kinds = [parcel.fields["task"]["kind"] for _, parcel in link.sent if "task" in parcel.fields]
    assert list(dict.fromkeys(kinds)) == list(PHASES)
    for client in SIZES:
        kept = load_memory(tmp_path / "homes" / client, RUN)
        assert not any(name.startswith("secagg/") for name in (*kept.before, *kept.after)), "secrets go with the round"
        assert bool(kept.after) == (name == "FedSA-LoRA"), "and what the method keeps stays"


def test_a_policy_that_requires_it_is_satisfied_by_it_and_refuses_all_else(apart: Path, tmp_path: Path) -> None:
    link = link_to(apart, tmp_path / "homes")
    for client in SIZES:
        (tmp_path / "homes" / client / POLICY).write_text("require: secure_aggregation\nmax_rounds: 2\n")
    run_apart(new_run(apart, tmp_path / "secure", *SECURE), link)
    plain = Direct(link.answer)
    with pytest.raises(RoundFailed, match="protected by secure aggregation, got a recipe without it"):
        run_apart(new_run(apart, tmp_path / "plain", "aggregation.weights=equal"), plain)
    assert {reply.kind for _, reply in plain.came} == {FAILURE}
    again = Direct(link.answer)
    with pytest.raises(RoundFailed, match="at most 2 updates of one run, got one more after 2"):
        run_apart(new_run(apart, tmp_path / "again", *SECURE), again)
    found = _policy(tmp_path / "homes" / "bob" / POLICY)[1]
    assert (found.ok, "a recipe without secure aggregation will be refused" in found.said) == (True, True)


def test_what_left_is_written_down_phase_by_phase(apart: Path, tmp_path: Path) -> None:
    link = link_to(apart, tmp_path / "homes")
    run_apart(new_run(apart, tmp_path / "run", *SECURE, "rounds=1"), link)
    for client in SIZES:
        home = tmp_path / "homes" / client
        came = [reply.sha256 for sender, reply in link.came if sender == client]
        (left,) = events(home, "update_left")
        assert left["protected_by"] == "secure_aggregation"
        phases = events(home, "phase_left")
        assert [record["kind"] for record in phases] == [KEYS, SHARES, CONSISTENCY, UNMASK]
        written = [record["digest"] for record in read_audit(home / AUDIT) if "digest" in record]
        assert written == came


def downgraded(link: Direct, change: Callable[[Parcel], Parcel]) -> list[Parcel]:
    """What bob replies to a round's masked task after it was changed on its way."""
    replies = []
    answer = link.answer["bob"]

    def other(parcel: Parcel) -> Parcel:
        if parcel.fields["task"]["kind"] == MASKED:
            replies.append(answer(change(parcel)))
        return answer(parcel)

    link.answer = {**link.answer, "bob": other}
    return replies


def of_kind(kind: str, **fields: Any) -> Callable[[Parcel], Parcel]:
    return lambda parcel: replace(
        parcel, fields={**parcel.fields, "task": {**parcel.fields["task"], "kind": kind}, **fields}
    )


def test_a_plain_task_in_the_middle_of_a_secure_round_is_refused(apart: Path, tmp_path: Path) -> None:
    link = link_to(apart, tmp_path / "homes")
    replies = downgraded(link, of_kind("fedavg"))
    run_apart(new_run(apart, tmp_path / "run", *SECURE), link)
    assert {reply.kind for reply in replies} == {FAILURE}
    assert "expected a task of kind 'secagg/keys' for fedit, got 'fedavg'" in replies[0].fields["reason"]


def test_a_lost_answer_is_not_given_twice(apart: Path, tmp_path: Path) -> None:
    """Bob's masked values were lost, and asked for again: he is left out, and the others' sum is what it is."""
    link = link_to(apart, tmp_path / "homes")
    answer = link.answer["bob"]

    def twice(parcel: Parcel) -> Parcel:
        first = answer(parcel)
        if parcel.fields["task"]["kind"] != MASKED or parcel.fields["round"] != 1:
            return first
        return answer(replace(parcel, fields={**parcel.fields, "nonce": "n" * 32}))

    link.answer = {**link.answer, "bob": twice}
    run_apart(new_run(apart, tmp_path / "run", *SECURE), link)
    rounds = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (second,) = [event for event in rounds if event["event"] == "round" and event["round"] == 1]
    assert second["answered"] == [name for name in second["selected"] if name != "bob"]
    assert second["train_loss"] is not None


def test_a_peer_with_another_key_is_refused_and_keys_can_be_compared(apart: Path, tmp_path: Path) -> None:
    link = link_to(apart, tmp_path / "homes")
    run_apart(new_run(apart, tmp_path / "first", *SECURE), link)
    homes = {client: tmp_path / "homes" / client for client in SIZES}
    peers = {client: public_identity(home) for client, home in homes.items()}
    for home in homes.values():
        assert json.loads((home / PEERS).read_text()) == peers
        assert stat.S_IMODE((home / IDENTITY).stat().st_mode) == 0o600
    (homes["bob"] / IDENTITY).unlink()
    again = Direct(link.answer)
    with pytest.raises(RoundFailed, match="bob has another identity key than the one that was seen first"):
        run_apart(new_run(apart, tmp_path / "second", *SECURE, "name=second"), again)
    assert json.loads((homes["alice"] / PEERS).read_text()) == peers, "what was seen first stays"


@pytest.mark.parametrize(("name", "text"), [(IDENTITY, "short"), (PEERS, "{"), (PEERS, '{"bob": "x"}')])
def test_damaged_keys_are_refused_and_stay(apart: Path, tmp_path: Path, name: str, text: str) -> None:
    link = link_to(apart, tmp_path / "homes")
    path = tmp_path / "homes" / "bob" / name
    path.write_text(text)
    run_apart(new_run(apart, tmp_path / "run", *SECURE, "rounds=1"), link)
    failed = [reply for client, reply in link.came if client == "bob"]
    assert {reply.kind for reply in failed} == {FAILURE}
    assert "its own log says which" in failed[0].fields["reason"]
    assert path.read_text() == text
    if name == IDENTITY:
        with pytest.raises(UserError, match="a private key of 32 bytes, got 5 bytes"):
            public_identity(path.parent)


def test_a_clients_bounds_are_for_its_true_update(apart: Path, tmp_path: Path) -> None:
    """Names and norm: what is masked has neither."""
    link = link_to(apart, tmp_path / "homes")
    (tmp_path / "homes" / "bob" / POLICY).write_text("tensors: ['*.lora_B']\n")
    run_apart(new_run(apart, tmp_path / "run", *SECURE, "rounds=1"), link)
    (reason,) = [reply.fields["reason"] for client, reply in link.came if client == "bob" and reply.kind == FAILURE]
    assert "lora_A: expected a name like *.lora_B" in reason


def test_a_run_that_was_killed_within_a_round_goes_on_to_the_same_bits(apart: Path, tmp_path: Path) -> None:
    whole = run_apart(new_run(apart, tmp_path / "whole", *SECURE), link_to(apart, tmp_path / "homes"))
    link = link_to(apart, tmp_path / "others")
    answers = dict(link.answer)

    def dying(parcel: Parcel) -> Parcel:
        if parcel.fields["round"] == 1 and parcel.fields["task"]["kind"] == UNMASK:
            raise KeyboardInterrupt
        return answers["bob"](parcel)

    link.answer = {**answers, "bob": dying}
    folder = new_run(apart, tmp_path / "cut", *SECURE)
    with pytest.raises(KeyboardInterrupt):
        run_apart(folder, link)
    assert run_apart(folder, Direct(answers))["adapter_sha256"] == whole["adapter_sha256"]


def test_masked_values_are_no_values(apart: Path, tmp_path: Path) -> None:
    """What the coordinator got as bob's update has nothing of the size of a change of weights."""
    link = link_to(apart, tmp_path / "homes")
    run_apart(new_run(apart, tmp_path / "run", *SECURE, "rounds=1"), link)
    replies = [decode_tensors(reply.blob) for client, reply in link.came if reply.kind == UPDATE]
    (values, *_) = [each["secagg/values"] for each in replies if "secagg/values" in each]
    assert values.double().abs().mean() == pytest.approx(2**30, rel=0.05)  # of uniform 32-bit integers
