"""What an owner does with what a coordinator sends: the worst of it, each with its reason and its record."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flocktune import resident
from flocktune.audit import AuditLog, read_audit, verify
from flocktune.config.schema import Columns
from flocktune.engine.client import transformed
from flocktune.engine.parcels import EMULATOR, FAILURE, LACKING, READY, TASK, UPDATE, Parcel
from flocktune.errors import FlocktuneError, Problem, UserError
from flocktune.federated import bundle_tensors
from flocktune.files import read_json, sha256_file, write_json
from flocktune.interfaces import Transform
from flocktune.models import bundle as bundles
from flocktune.models.bundle import Bundle, copy_bundle, read_bundle
from flocktune.owner import tasks
from flocktune.owner.home import AUDIT, POLICY
from flocktune.owner.policy import GB, Policy
from flocktune.owner.tasks import Owner
from flocktune.tensors import norm
from flocktune.types import Update
from flocktune.wire import decode_tensors, encode_tensors
from tiny_federation import Scene, make_owner, make_scene, new_nonce, over_the_wire

OPENED: list[str] = []
"""Every file that Python opened or listed."""

sys.addaudithook(
    lambda event, given: OPENED.append(str(given[0])) if event in ("open", "os.listdir", "os.scandir") else None
)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture
def bob(scene: Scene, tmp_path: Path) -> Owner:
    return make_owner(scene.world, "bob", tmp_path / "home")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The owner's own, without any emulator."""
    monkeypatch.setattr(tasks, "default_cache_folder", lambda: tmp_path / "cache")
    tasks._sound_bundle.cache_clear()
    yield tmp_path / "cache"
    tasks._sound_bundle.cache_clear()


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every task that came as far as its training."""
    begun: list[str] = []

    def answer(task: Any, half: Any, memory: Any) -> Any:
        begun.append(task.client)
        return real(task, half, memory)

    real = tasks.answer
    monkeypatch.setattr(tasks, "answer", answer)
    return begun


def ask(owner: Owner, parcel: Parcel) -> Parcel:
    """There and back; the audit log is sound after it."""
    reply = over_the_wire(owner.answer(over_the_wire(parcel)))
    assert verify(owner.home / AUDIT) == []
    return reply


def refused(owner: Owner, parcel: Parcel) -> str:
    """The reason that the coordinator hears. Nothing leaves with it, and the owner's log knows."""
    before = [record["event"] for record in records(owner)].count("update_left")
    reply = ask(owner, parcel)
    assert reply.kind == FAILURE, reply
    assert reply.blob == b""
    last = records(owner)[-1]
    assert (last["event"], [record["event"] for record in records(owner)].count("update_left")) == (
        "task_refused",
        before,
    )
    reason = reply.fields["reason"]
    if "its own log" in reason or "own log" in reason:
        return reason
    assert last["reasons"][0][:200] == reason[:200]
    return reason


def records(owner: Owner) -> list[Mapping[str, Any]]:
    return list(read_audit(owner.home / AUDIT))


def policy(owner: Owner, text: str) -> None:
    (owner.home / POLICY).write_text(text + "\n")


# --- what is done ------------------------------------------------------------------------------------


def test_a_task_is_done_and_written_down(scene: Scene, bob: Owner) -> None:
    parcel = scene.task()
    reply = ask(bob, parcel)
    assert reply.kind == UPDATE
    named = {key: parcel.fields[key] for key in ("run", "nonce", "round", "client")}
    assert {key: reply.fields[key] for key in named} == named
    received, left = records(bob)
    assert (received["event"], received["kind"], received["bytes"]) == ("task_received", TASK, len(parcel.blob))
    assert (left["event"], left["digest"], left["bytes"]) == ("update_left", reply.sha256, len(reply.blob))
    assert (left["tensors"], left["weight"]) == (len(decode_tensors(reply.blob)), 11.0)
    assert left["nonce"] == received["nonce"] == named["nonce"]


def test_no_path_of_a_recipe_is_touched(scene: Scene, bob: Owner, tmp_path: Path) -> None:
    """Each is a pipe without a writer: whoever opened it would wait for ever."""
    trap = tmp_path / "trap"
    for name in ("model", "emulator", "start", "hub/model"):
        (trap / name).mkdir(parents=True)
        for file in ("config.json", "model.safetensors", "emulator.json", "adapter_config.json", "tokenizer.json"):
            os.mkfifo(trap / name / file)
    for file in ("rows.jsonl", "test.jsonl", "public.jsonl", "trace.json"):
        os.mkfifo(trap / file)
    paths = [
        f"model.path={trap / 'model'}",
        f"data.train={trap / 'rows.jsonl'}",
        f"data.test={trap / 'test.jsonl'}",
        f"alignment.public={trap / 'public.jsonl'}",
        f"emulator.path={trap / 'emulator'}",
        f"lora.start_from={trap / 'start'}",
        f"scheduling.selection={{kind: availability, trace: {trap / 'trace.json'}}}",
    ]
    OPENED.clear()
    assert ask(bob, scene.task(*paths)).kind == UPDATE
    biot = replace(bob, emulator=str(scene.emulator.folder), model=None)
    overrides = [paths[index] for index in (0, 1, 2, 5, 6)]
    hidden = f"emulator={{adapter_layers: 2, drop: 0.34, path: {trap / 'emulator'}}}"
    assert ask(biot, scene.biot_task(*overrides, hidden, f"alignment.public={trap / 'public.jsonl'}")).kind == UPDATE
    assert OPENED
    assert [path for path in OPENED if str(trap) in path] == []


def test_hub_names_of_a_recipe_are_not_asked_for(scene: Scene, bob: Owner) -> None:
    """The owner's model stands for the recipe's, whatever its name; without one there is nothing to train."""
    named = ("model.path=someone/some-model", "data.train=someone/some-rows")
    assert ask(bob, scene.task(*named)).kind == UPDATE
    assert "no base model was named here" in refused(replace(bob, model=None), scene.task(*named))


# --- tasks that are not for this owner, or not once more ------------------------------------------------


def test_the_task_of_another_client(scene: Scene, bob: Owner, trained: list[str]) -> None:
    assert "this is bob, and the task is for 'alice'" in refused(bob, scene.task(client="alice"))
    outside = scene.task()
    outside.fields["task"]["client"] = "alice"  # type: ignore[index]
    assert "disagree about the round or the client" in refused(bob, outside)
    assert trained == []


def test_a_replay_is_refused_also_after_a_restart(scene: Scene, bob: Owner, trained: list[str]) -> None:
    parcel = scene.task()
    assert ask(bob, parcel).kind == UPDATE
    assert "a replay" in refused(bob, parcel)
    assert "a replay" in refused(replace(bob), parcel)
    assert "a replay" in refused(replace(bob), scene.task(run="another", nonce=parcel.fields["nonce"]))
    assert len(trained) == 1


def test_a_task_that_was_refused_may_come_again(scene: Scene, bob: Owner) -> None:
    parcel = scene.task()
    policy(bob, "max_rank: 1")
    refused(bob, parcel)
    policy(bob, "max_rank: 8")
    assert ask(bob, parcel).kind == UPDATE


def other_digest(parcel: Parcel) -> Parcel:
    parcel.fields["task"]["config_digest"] = "0" * 64  # type: ignore[index]
    return parcel


def with_task(parcel: Parcel, **changes: Any) -> Parcel:
    parcel.fields["task"].update(changes)  # type: ignore[attr-defined]
    return parcel


def without(parcel: Parcel, *keys: str) -> Parcel:
    inner = parcel.fields
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]  # type: ignore[attr-defined]
    return parcel


def with_fields(parcel: Parcel, **changes: Any) -> Parcel:
    parcel.fields.update(changes)  # type: ignore[attr-defined]
    return parcel


def with_recipe(scene: Scene, change: Callable[[dict[str, Any]], object]) -> Parcel:
    parcel = scene.task()
    change(parcel.fields["recipe"])
    return parcel


NOBODYS = "message: expected run, nonce, round, client"
SHAPED = "expected a task of round, client, kind, seed, config_digest, model_digest"
WRONG: dict[str, tuple[Callable[[Scene], Parcel], str]] = {
    "another recipe's digest": (lambda s: other_digest(s.task()), "not the one that the task is for"),
    "a recipe that was changed": (
        lambda s: with_recipe(s, lambda tree: tree["local"].update(lr=0.5)),
        "not the one that the task is for",
    ),
    "another base model": (lambda s: s.task(model_digest="a" * 64), "policy: models: expected a model that is named"),
    "no base model": (lambda s: s.task(model_digest=""), "got digest none"),
    "remote code": (lambda s: s.task("model.trust_remote_code=true"), "trust_remote_code: expected false: no code"),
    "remote code with FedBiOT": (
        lambda s: with_recipe(s, lambda tree: tree.update(method="fedbiot", model={"trust_remote_code": True})),
        "model.trust_remote_code: expected false with method fedbiot",
    ),
    "a baseline": (lambda s: s.task("method=base"), "policy: methods: expected one of fedit, fedbiot"),
    "the kind of another method": (lambda s: s.task(kind="fedbiot"), "a task of kind 'fedavg' for fedit"),
    "a kind that is none": (lambda s: s.task(kind="eval"), "a task of kind 'fedavg' for fedit"),
    "a round beyond the recipe": (lambda s: s.task(round=2), "a round below the recipe's 2, got 2"),
    "a round before the first": (lambda s: s.task(round=-1), "policy: max_rounds: expected a round from 0 on"),
    "rank": (lambda s: s.task("lora.rank=257"), "policy: max_rank: expected a rank from 1 to 256, got 257"),
    "steps without end": (lambda s: s.task(f"local.steps={10**12}"), "at most 1,000,000 micro-batches"),
    "accumulation without end": (lambda s: s.task(f"local.accumulate={10**12}"), "at most 1,000,000 micro-batches"),
    "epochs without end": (
        lambda s: s.task("local.steps=null", f"local.epochs={10**12}"),
        "at most 1,000,000 micro-batches",
    ),
    "a template of a megabyte": (
        lambda s: s.task(f"data.template={{with_context: x, without_context: {'x' * 20_000}}}"),
        "data.template: expected at most 10000 letters",
    ),
    "a learning rate beyond numbers": (lambda s: s.task("local.lr=1e30", "local.steps=3"), "Lower local.lr"),
    "round as a bool": (lambda s: with_fields(s.task(), round=True), NOBODYS),
    "round as a text": (lambda s: with_fields(s.task(), round="0"), NOBODYS),
    "round as a fraction": (lambda s: with_fields(s.task(), round=0.0), NOBODYS),
    "round without end": (lambda s: with_fields(s.task(), round=10**4000), NOBODYS),
    "client as a list": (lambda s: with_fields(s.task(), client=["bob"]), NOBODYS),
    "a nonce of a megabyte": (lambda s: with_fields(s.task(), nonce="n" * 900_000), NOBODYS),
    "a run whose name is cut in the log": (lambda s: with_fields(s.task(), run="r" * 201), NOBODYS),
    "no nonce": (lambda s: without(s.task(), "nonce"), NOBODYS),
    "nothing": (lambda s: Parcel(TASK, {}), NOBODYS),
    "seed as a text": (lambda s: with_task(s.task(), seed="1"), SHAPED),
    "seed without end": (lambda s: with_task(s.task(), seed=10**4000), SHAPED),
    "digest as a number": (lambda s: with_task(s.task(), model_digest=1), SHAPED),
    "a field too many": (lambda s: with_task(s.task(), tensors={}), SHAPED),
    "a field too few": (lambda s: without(s.task(), "task", "kind"), SHAPED),
    "task as a list": (lambda s: with_fields(s.task(), task=[]), "expected a recipe and a task"),
    "recipe as a text": (lambda s: with_fields(s.task(), recipe="rounds: 3"), "expected a recipe and a task"),
    "recipe missing": (lambda s: without(s.task(), "recipe"), "expected a recipe and a task"),
    "recipe of unknown settings": (
        lambda s: with_recipe(s, lambda tree: tree.update(after_training="rm -rf")),
        "after_training: expected a known setting",
    ),
    "recipe of wrong types": (
        lambda s: with_recipe(s, lambda tree: tree["local"].update(steps="2")),
        "local.steps: expected a whole number",
    ),
    "recipe with numbers that are none": (
        lambda s: with_recipe(s, lambda tree: tree["local"].update(lr=10**400)),
        "local.lr",
    ),
    "another kind of parcel": (lambda s: replace(s.task(), kind="run_this" * 9), "expected a parcel of kind task or"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused_with_its_reason(scene: Scene, bob: Owner, name: str) -> None:
    make, expected = WRONG[name]
    assert expected in refused(bob, make(scene))
    assert ask(bob, scene.task()).kind == UPDATE, "and the next task is done"


@pytest.mark.parametrize("name", ["rank", "remote code", "another base model", "a baseline", "round as a bool"])
def test_what_is_refused_loads_no_model(scene: Scene, bob: Owner, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    sides: list[object] = []
    monkeypatch.setattr(tasks, "owners_side", lambda *given: sides.append(given))
    refused(bob, WRONG[name][0](scene))
    assert sides == []


@pytest.mark.parametrize(
    "overrides",
    [
        [f"data.max_tokens={10**9}"],
        [f"local.batch_size={10**12}"],
        [f"rounds={10**15}", "local.schedule=cosine", "local.schedule_over=run"],
        [f"local.warmup_steps={10**12}"],
        ["data.template={with_context: '{instruction.__class__}{0}{context!r:>999999999}', without_context: '{}%s'}"],
        ["local.clip_norm=1e300", "local.weight_decay=1e-300"],
    ],
    ids=["tokens", "batch", "rounds", "warmup", "template", "floats"],
)
def test_numbers_and_texts_that_are_only_strange_do_no_harm(scene: Scene, bob: Owner, overrides: list[str]) -> None:
    assert ask(bob, scene.task(*overrides)).kind == UPDATE


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
PLACES = [("run",), ("nonce",), ("round",), ("client",), ("recipe",), ("task",), ("task", "seed"), ("task", "kind")]
PLACES += [("task", "round"), ("recipe", "local"), ("recipe", "data"), ("recipe", "lora"), ("recipe", "model")]
PLACES += [("recipe", "data", "template"), ("recipe", "data", "columns"), ("recipe", "emulator"), ("recipe", "rounds")]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(PLACES), value=JSON)
def test_no_value_in_any_place_is_too_strange_to_be_answered(
    scene: Scene, bob: Owner, place: tuple[str, ...], value: Any
) -> None:
    parcel = scene.task()
    inner: Any = parcel.fields
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    reply = bob.answer(parcel)
    assert reply.kind in (FAILURE, UPDATE)
    over_the_wire(reply)


def test_fields_too_deep_to_be_walked_are_answered(scene: Scene, bob: Owner) -> None:
    deep: Any = "bottom"
    for _ in range(900):
        deep = [deep]
    parcel = with_recipe(scene, lambda tree: tree.update(name=deep))
    assert bob.answer(parcel).kind == FAILURE
    assert ask(bob, scene.task()).kind == UPDATE


# --- tensors ------------------------------------------------------------------------------------------


def changed(scene: Scene, change: Callable[[dict[str, torch.Tensor]], object]) -> bytes:
    tensors = dict(decode_tensors(scene.first.blob))
    change(tensors)
    return encode_tensors(tensors)


def longest(tensors: Mapping[str, torch.Tensor]) -> str:
    return max(tensors, key=lambda name: tensors[name].numel())


def lying_header(scene: Scene) -> bytes:
    """Of the right names; one of them has a terabyte."""
    length = int.from_bytes(scene.first.blob[:8], "little")
    header = json.loads(scene.first.blob[8 : 8 + length])
    name = next(key for key in header if key != "__metadata__")
    header[name] = {"dtype": "F32", "shape": [2**19, 2**19], "data_offsets": [0, 2**40]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + scene.first.blob[8 + length :]


TENSORS: dict[str, tuple[Callable[[Scene], bytes], str]] = {
    "another name": (lambda s: changed(s, lambda t: t.update(evil=torch.zeros(2))), "evil: not expected"),
    "one missing": (lambda s: changed(s, lambda t: t.pop(longest(t))), "missing"),
    "another shape": (lambda s: changed(s, lambda t: t.update({longest(t): torch.zeros(3, 3)})), "[3, 3]"),
    "another dtype": (lambda s: changed(s, lambda t: t.update({longest(t): t[longest(t)].double()})), '"F64"'),
    "a size that lies": (lying_header, "524288"),
    "no safetensors": (lambda s: b"PK\x03\x04 and so on", "bytes that do not decode"),
    "a pickle": (lambda s: b"\x80\x04cos\nsystem\n(S'true'\ntR.", "bytes that do not decode"),
    "nothing": (lambda s: b"", "bytes that do not decode"),
    "a header longer than the message": (lambda s: (2**63).to_bytes(8, "little") + b"{}", "do not decode"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit_are_refused_by_their_header_alone(
    scene: Scene, bob: Owner, monkeypatch: pytest.MonkeyPatch, trained: list[str], name: str
) -> None:
    make, expected = TENSORS[name]
    blob = make(scene)
    read: list[int] = []
    real = torch.frombuffer
    monkeypatch.setattr("flocktune.wire._views", lambda blob, *rest: read.append(len(blob)))
    monkeypatch.setattr(torch, "frombuffer", lambda *given, **more: read.append(1) or real(*given, **more))
    assert expected in refused(bob, replace(scene.task(), blob=blob))
    assert read == [], "no memory is taken for values"
    assert trained == []


def test_tensors_that_are_no_numbers_give_no_update_and_leave_no_trace(scene: Scene, bob: Owner) -> None:
    before = ask(bob, scene.task())
    poisoned = changed(scene, lambda t: t.update({name: value * torch.nan for name, value in t.items()}))
    assert "while training" in refused(bob, replace(scene.task(), blob=poisoned))
    assert "NaN or infinite" in records(bob)[-1]["reasons"][0]
    assert ask(bob, scene.task()).sha256 == before.sha256, "what stays in memory is as it was"


def test_a_task_above_the_policys_size_is_refused(scene: Scene, bob: Owner, trained: list[str]) -> None:
    policy(bob, "max_task_mb: 1")
    large = replace(scene.task(), blob=bytes(2**20 + 1))
    assert "max_task_mb: expected a task of at most 1 MB" in refused(bob, large)
    assert trained == []


# --- the policy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "method: [fedit]", "max_rounds: many", "- a list", "hours: [", "\x00"])
def test_a_broken_policy_refuses_everything(scene: Scene, bob: Owner, trained: list[str], text: str) -> None:
    (bob.home / POLICY).write_text(text)
    for parcel in (scene.task(), scene.biot_task(), replace(scene.task(), kind=EMULATOR)):
        assert "a problem with its files or settings" in refused(bob, parcel)
    (bob.home / POLICY).unlink()
    assert "a problem with its files or settings" in refused(bob, scene.task())
    assert trained == []


def test_max_rounds_counts_this_run_alone_over_restarts(scene: Scene, bob: Owner) -> None:
    policy(bob, "max_rounds: 2")
    for number in range(2):
        assert ask(replace(bob), scene.task(round=number)).kind == UPDATE
    assert "at most 2 updates of one run, got one more after 2" in refused(replace(bob), scene.task())
    assert ask(bob, scene.task(run="another")).kind == UPDATE
    assert "one more after 2" in refused(bob, scene.task())


def test_max_updates_counts_all_runs(scene: Scene, bob: Owner) -> None:
    """The coordinator names the runs, and could call each round one."""
    policy(bob, "max_updates: 2")
    for run in ("one", "two"):
        assert ask(replace(bob), scene.task(run=run)).kind == UPDATE
    assert "policy: max_updates: expected at most 2 updates in all, got one more" in refused(bob, scene.task(run="3"))


def test_an_owners_columns_are_the_owners(
    scene: Scene, bob: Owner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "Summarise", "response": "ok", "patient_name": "Ada L."}\n')
    bob = replace(bob, data=str(rows))
    read: list[Columns] = []
    real = tasks.owners_side

    def side(config: Any, *given: Any) -> tasks.OwnersSide:
        read.append(config.data.columns)
        return real(config, *given)

    monkeypatch.setattr(tasks, "owners_side", side)
    names = "data.columns={response: patient_name}"
    reason = refused(bob, scene.task(names))
    assert "policy: columns: expected columns with the usual names, got a recipe that reads response" in reason
    assert read == []
    assert ask(bob, scene.task()).kind == UPDATE
    policy(bob, "columns: {response: patient_name}")
    for task in (scene.task(names), scene.task()):
        assert ask(bob, task).kind == UPDATE
    assert read == [Columns(), Columns(response="patient_name"), Columns(response="patient_name")]
    assert "policy: columns" in refused(bob, scene.task("data.columns={response: response}"))


@pytest.mark.parametrize(
    ("of_policy", "of_owner", "of_recipe", "used"),
    [(4, 3, 5, 3), (2, 3, 5, 2), (None, 3, 1, 1), (None, 0, 100_000, 6), (None, 9, 0, 6), (None, 0, 0, 5)],
)
def test_the_least_number_of_threads_is_used(
    scene: Scene,
    bob: Owner,
    monkeypatch: pytest.MonkeyPatch,
    of_policy: int | None,
    of_owner: int,
    of_recipe: int,
    used: int,
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(tasks.os, "cpu_count", lambda: 6)
    monkeypatch.setattr(tasks, "_USUAL_THREADS", 5)
    policy(bob, f"max_threads: {of_policy or 'null'}")
    assert ask(replace(bob, threads=of_owner), scene.task(f"runtime.threads={of_recipe}")).kind == UPDATE
    assert taken == [used]


def test_gpu_memory_is_bounded_on_the_owners_device_and_free_again(bob: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[tuple[float, int]] = []
    memory = {0: 8 * GB, 1: 16 * GB}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=memory[index]))
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, index: shares.append((share, index))
    )
    monkeypatch.setattr(tasks, "pick_device", torch.device)
    bob = replace(bob, device="cuda:1", max_gpu_memory_gb=8.0)
    bob._limit(Policy(max_gpu_memory_gb=4.0))
    bob._limit(Policy())
    replace(bob, max_gpu_memory_gb=None)._limit(Policy())
    replace(bob, device="cuda")._limit(Policy(max_gpu_memory_gb=4.0))
    replace(bob, device="cpu")._limit(Policy())
    assert shares == [(0.25, 1), (0.5, 1), (1.0, 1), (0.5, 0)]


def test_hours(scene: Scene, bob: Owner, trained: list[str]) -> None:
    later = [datetime.now() + timedelta(hours=hours) for hours in (3, 5)]
    policy(bob, "hours: " + "-".join(f"{moment:%H:%M}" for moment in later))
    assert "policy: hours" in refused(bob, scene.task())
    assert trained == []


@pytest.mark.parametrize("protection", ["secure_aggregation", "differential_privacy"])
def test_a_protection_that_a_recipe_lacks(scene: Scene, bob: Owner, protection: str) -> None:
    policy(bob, f"require: {protection}")
    assert f"protected by {protection.replace('_', ' ')}" in refused(bob, scene.task())


def test_methods_and_models_of_the_policy(scene: Scene, bob: Owner) -> None:
    policy(bob, "methods: [fedbiot]")
    assert "methods: expected one of fedbiot, got 'fedit'" in refused(bob, scene.task())
    policy(bob, f"models: ['{'b' * 64}']")
    assert "a model that is listed here" in refused(bob, scene.task())
    policy(bob, f"models: ['{scene.first.fields['task']['model_digest']}']")
    assert ask(bob, scene.task()).kind == UPDATE


def test_every_reason_is_in_one_answer(scene: Scene, bob: Owner) -> None:
    policy(bob, "methods: [fedbiot]\nrequire: secure_aggregation\nmax_rank: 1")
    reason = refused(bob, scene.task(model_digest="c" * 64))
    assert all(f"policy: {setting}" in reason for setting in ("methods", "require", "max_rank", "models"))


def test_few_rows_are_not_trained_on_however_they_are_picked(scene: Scene, bob: Owner, trained: list[str]) -> None:
    """Bob has 11 rows. A recipe may ask for fewer: by a limit, or by steps that see only some of them."""
    policy(bob, "min_rows: 11")
    assert ask(bob, scene.task("local.steps=3")).kind == UPDATE
    few = {
        "at least 11 rows to train on, got 4": ["local.steps=1"],
        "at least 11 rows to train on, got 8": ["local.steps=1", "local.accumulate=2"],
        "at least 11 rows to train on, got 5": ["data.max_rows=5", "local.steps=9"],
    }
    for reason, overrides in few.items():
        assert reason in refused(bob, scene.task(*overrides))
    assert len(trained) == 1


def test_what_leaves_is_bounded_and_listed(scene: Scene, bob: Owner) -> None:
    free = decode_tensors(ask(bob, scene.task()).blob)
    policy(bob, "clip_norm: 0.001")
    clipped = decode_tensors(ask(bob, scene.task()).blob)
    assert norm(free) > 0.01
    assert norm(clipped) == pytest.approx(0.001, rel=1e-5)
    policy(bob, "tensors: ['*.lora_B']")
    assert "the update may not leave" in refused(bob, scene.task())
    assert "lora_A: expected a name like *.lora_B" in records(bob)[-1]["reasons"][0]


def test_an_owner_bounds_the_true_update_and_the_size_of_what_travels(
    scene: Scene, bob: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a recipe puts around a method sees the update as it may leave, whatever it makes of it."""
    seen: list[float] = []

    def hidden(update: Update, task: object, memory: object) -> tuple[Update, dict[str, torch.Tensor]]:
        seen.append(norm(update.delta))
        return replace(update, delta={"hidden": torch.zeros(2_000_000, dtype=torch.uint8)}), {}

    transform = Transform("hide", hidden, lambda update, expected: update)
    monkeypatch.setattr(tasks, "around_client", lambda config, half: transformed(half, [transform]))
    policy(bob, "clip_norm: 0.001")
    assert ask(bob, scene.task()).kind == UPDATE
    assert seen == [pytest.approx(0.001, rel=1e-5)]
    policy(bob, "max_update_mb: 1")
    assert "size: expected at most 1 MB, got 1.9 MB" in refused(bob, scene.task())


# --- what the coordinator is told, and what the disk does -------------------------------------------------


class ArrowInvalid(Exception):
    """Named as a library's is: neither error nor exception."""


RAISED: list[Callable[[str], Exception]] = [
    ValueError,
    KeyError,
    OSError,
    RuntimeError,
    ArrowInvalid,
    FlocktuneError,
    lambda text: UserError(Problem(text, text, text, text)),
    lambda text: FlocktuneError(f"local: {text}"),
    lambda text: RuntimeError(f"policy: {text}"),
    lambda text: UserError(text),
]


@pytest.mark.parametrize("where", ["loading", "training"])
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(make=st.sampled_from(RAISED), text=st.text(max_size=40))
def test_neither_a_path_nor_a_piece_of_a_row_is_told(
    scene: Scene, bob: Owner, where: str, make: Callable[[str], Exception], text: str
) -> None:
    secret = f"§{text}§"

    def half(task: Any, memory: Any) -> Any:
        raise make(secret)

    def side(*given: object) -> tasks.OwnersSide:
        if where == "loading":
            raise make(secret)
        return tasks.OwnersSide(half, lambda task: decode_tensors(scene.first.blob), {}, 11)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "owners_side", side)
        reply = bob.answer(scene.task())
    assert reply.kind == FAILURE
    assert "§" not in json.dumps(dict(reply.fields), ensure_ascii=False)
    assert "own log" in reply.fields["reason"]
    assert "§" in records(bob)[-1]["reasons"][0], "the owner is told"


def test_rows_that_can_not_be_read_are_not_quoted(scene: Scene, bob: Owner, tmp_path: Path) -> None:
    rows = tmp_path / "private-rows.jsonl"
    rows.write_text('{"instruction": "Who has it?", "response": "Mrs. Secret" \n')
    reason = refused(replace(bob, data=str(rows)), scene.task())
    assert "Secret" not in reason
    assert "private" not in reason
    assert "private-rows.jsonl" in records(bob)[-1]["reasons"][0]


def test_no_update_leaves_that_is_not_on_the_disk(scene: Scene, bob: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    from flocktune import audit

    real = audit._write_whole

    def full(descriptor: int, data: bytes) -> None:
        if b"update_left" in data:
            real(descriptor, data[:20])
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(audit, "_write_whole", full)
        reason = refused(bob, scene.task())
    assert "a problem with its files" in reason
    assert ask(bob, scene.task()).kind == UPDATE, "and the log goes on when there is room again"


def test_on_a_full_disk_nothing_is_done_and_yet_it_is_said(
    scene: Scene, bob: Owner, monkeypatch: pytest.MonkeyPatch, trained: list[str]
) -> None:
    def full(descriptor: int, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("flocktune.audit._write_whole", full)
    reply = bob.answer(scene.task())
    assert (reply.kind, reply.blob) == (FAILURE, b"")
    assert trained == []


def test_a_log_that_can_not_be_read_lets_nothing_out(scene: Scene, bob: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who can not see what was answered before can not know a replay."""
    parcel = scene.task()

    def unreadable(path: Path) -> set[str]:
        raise UserError(Problem(str(path), "an audit log that can be read", "Permission denied"))

    monkeypatch.setattr(tasks, "nonces", unreadable)
    assert "a problem with its files" in refused(bob, parcel)


# --- emulators ------------------------------------------------------------------------------------------


def emulator_parcel(asked: Parcel, bundle: Bundle, **changes: Any) -> Parcel:
    named = {key: asked.fields[key] for key in ("run", "round", "client")}
    fields = {**named, "nonce": new_nonce(), "digest": bundle.digest, **changes}
    return Parcel(EMULATOR, fields, encode_tensors(bundle_tensors(bundle)))


def forged(bundle: Bundle, folder: Path, **files: Callable[[bytes], bytes]) -> Bundle:
    """The bundle with other files, and a manifest and a digest that fit them: a coordinator can always make one."""
    copy_bundle(bundle.folder, folder)
    manifest = read_json(folder / bundles.MANIFEST)
    for key, change in files.items():
        path = folder / key.replace("__", ".")
        path.write_bytes(change(path.read_bytes() if path.exists() else b""))
        manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    manifest["digest"] = bundles._digest(manifest["files"], bundle.plan)
    write_json(folder / bundles.MANIFEST, manifest)
    return read_bundle(folder)


def with_settings(**changes: Any) -> Callable[[bytes], bytes]:
    return lambda text: json.dumps({**json.loads(text or b"{}"), **changes}).encode()


@pytest.fixture
def lean(bob: Owner, cache: Path) -> Owner:
    """An owner without base model and emulator."""
    return replace(bob, model=None)


def test_an_emulator_for_another_round_only_makes_ready(scene: Scene, lean: Owner, cache: Path) -> None:
    ask(lean, asked := scene.biot_task())
    parcel = emulator_parcel(asked, scene.emulator)
    assert ask(lean, replace(parcel, fields={**parcel.fields, "round": asked.fields["round"] + 1})).kind == READY


def test_an_emulator_is_taken_when_it_was_asked_for(scene: Scene, lean: Owner, cache: Path) -> None:
    asked = scene.biot_task()
    unasked = emulator_parcel(asked, scene.emulator)
    assert "no emulator was asked for" in refused(lean, unasked)
    assert not cache.exists()
    lacking = ask(lean, asked)
    assert (lacking.kind, lacking.fields["digest"]) == (LACKING, scene.emulator.digest)
    done = ask(lean, unasked)
    assert done.kind == UPDATE, "the task that waited for it is done at once"
    assert done.fields["nonce"] == unasked.fields["nonce"]
    assert ask(lean, scene.biot_task()).kind == UPDATE
    assert "no emulator was asked for" in refused(lean, emulator_parcel(asked, scene.emulator))


@pytest.mark.parametrize(
    "digest", ["", "../../../../etc", "/etc", "a/b", "..", "a" * 63, "A" * 64, "a" * 64 + "\n", "\0" * 64, "é" * 64]
)
def test_a_digest_that_is_none_is_no_folder(
    scene: Scene, lean: Owner, monkeypatch: pytest.MonkeyPatch, digest: str
) -> None:
    looked: list[object] = []
    monkeypatch.setattr(tasks, "bundle_folder", lambda *given: looked.append(given))
    task = scene.biot_task(model_digest=digest)
    assert "64 hexadecimal digits" in refused(lean, task)
    assert "64 hexadecimal digits" in refused(lean, emulator_parcel(task, scene.emulator, digest=digest))
    assert looked == []


def tensors_of(scene: Scene, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**bundle_tensors(scene.emulator), **{key.replace("__", "."): value for key, value in changes.items()}}


BYTES = torch.zeros(4, dtype=torch.uint8)
FILES: dict[str, Callable[[Scene], Mapping[str, torch.Tensor]]] = {
    "above the folder": lambda s: {**tensors_of(s), "../evil.json": BYTES},
    "an absolute path": lambda s: {**tensors_of(s), "/tmp/evil.json": BYTES},
    "a hidden file": lambda s: {**tensors_of(s), ".evil": BYTES},
    "the folder itself": lambda s: {**tensors_of(s), ".": BYTES},
    "a name that is empty": lambda s: {**tensors_of(s), "": BYTES},
    "a file that the digest does not know": lambda s: tensors_of(s, adapter_config__json=BYTES),
    "numbers that are no bytes": lambda s: tensors_of(s, config__json=torch.zeros(3)),
    "no manifest": lambda s: {name: value for name, value in tensors_of(s).items() if name != bundles.MANIFEST},
    "a manifest that is none": lambda s: {**tensors_of(s), bundles.MANIFEST: BYTES},
    "a file that is missing": lambda s: {name: v for name, v in tensors_of(s).items() if name != "config.json"},
    "weights that were changed": lambda s: tensors_of(s, model__safetensors=torch.zeros(64, dtype=torch.uint8)),
    "nothing": lambda s: {},
}


@pytest.mark.parametrize("name", FILES)
def test_files_other_than_the_digests_are_not_kept(
    scene: Scene, lean: Owner, cache: Path, tmp_path: Path, name: str
) -> None:
    ask(lean, asked := scene.biot_task())
    parcel = replace(emulator_parcel(asked, scene.emulator), blob=encode_tensors(FILES[name](scene)))
    before = {path for path in tmp_path.rglob("*") if cache not in path.parents}
    refused(lean, parcel)
    assert list(cache.glob("emulators/*")) == []
    assert list(cache.glob("emulators/.*")) == [], "half of one neither"
    assert {path for path in tmp_path.rglob("*") if cache not in path.parents} - {cache} == before
    assert not Path("/tmp/evil.json").exists()
    assert ask(lean, emulator_parcel(asked, scene.emulator)).kind == UPDATE, "the right one is still welcome"


def test_a_manifest_that_lies_is_another_emulator(scene: Scene, lean: Owner, cache: Path, tmp_path: Path) -> None:
    """It says the digest that was asked for, and lists other files."""
    other = forged(scene.emulator, tmp_path / "other", config__json=with_settings(rms_norm_eps=0.5))
    manifest = read_json(other.folder / bundles.MANIFEST)
    write_json(other.folder / bundles.MANIFEST, {**manifest, "digest": scene.emulator.digest})
    ask(lean, asked := scene.biot_task())
    refused(lean, emulator_parcel(asked, replace(scene.emulator, folder=other.folder)))
    refused(lean, emulator_parcel(asked, other, digest=scene.emulator.digest))
    assert list(cache.glob("emulators/*")) == []


CODE: dict[str, dict[str, Callable[[bytes], bytes]]] = {
    "auto_map": {"config__json": with_settings(auto_map={"AutoModelForCausalLM": "evil.Model"})},
    "a kernel of the hub": {"config__json": with_settings(attn_implementation="someone/evil-kernel")},
    "the same, written otherwise": {"config__json": with_settings(_attn_implementation="someone/evil-kernel")},
    "the same, further down": {"config__json": with_settings(text_config={"_attn_implementation": "someone/evil"})},
    "a tokenizer's class": {"tokenizer_config__json": with_settings(auto_map={"AutoTokenizer": ["evil.T", None]})},
    "another model by an adapter": {"adapter_config__json": with_settings(base_model_name_or_path="/home")},
    "a module": {"evil__py": lambda text: b"raise SystemExit"},
}


@pytest.mark.parametrize("handed", ["by parcel", "as a folder"])
@pytest.mark.parametrize("name", CODE)
def test_an_emulator_that_wants_code_is_not_loaded(
    scene: Scene, lean: Owner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, handed: str
) -> None:
    evil = forged(scene.emulator, tmp_path / "evil", **CODE[name])
    asked = scene.biot_task(model_digest=evil.digest)
    if handed == "as a folder":
        lean = replace(lean, emulator=str(evil.folder))
    elif ask(lean, asked).kind == LACKING:
        ask(lean, emulator_parcel(asked, evil))
    loaded: list[object] = []
    monkeypatch.setattr(resident, "_load_base", lambda *given: loaded.append(given))
    monkeypatch.setattr(resident, "load_tokenizer", lambda *given: loaded.append(given))
    assert "files or settings" in refused(lean, scene.biot_task(model_digest=evil.digest))
    assert "Do not use this emulator" in records(lean)[-1]["reasons"][0]
    assert loaded == []


def test_who_named_an_emulator_trains_that_one_alone(scene: Scene, lean: Owner, tmp_path: Path) -> None:
    other = forged(scene.emulator, tmp_path / "other", config__json=with_settings(rms_norm_eps=0.5))
    own = replace(lean, emulator=str(scene.emulator.folder))
    assert "a model that is named on the command line" in refused(own, scene.biot_task(model_digest=other.digest))
    assert "no emulator was asked for" in refused(own, emulator_parcel(scene.biot_task(), other))
    assert ask(own, scene.biot_task()).kind == UPDATE


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("methods: [fedit]", "policy: methods"),
        (f"models: ['{'b' * 64}']", "policy: models"),
        ("require: secure_aggregation", "policy: require"),
    ],
)
def test_the_policy_is_for_emulators_too(scene: Scene, lean: Owner, cache: Path, text: str, reason: str) -> None:
    ask(lean, asked := scene.biot_task())
    policy(lean, text)
    assert reason in refused(lean, emulator_parcel(asked, scene.emulator))
    assert reason in refused(lean, scene.biot_task()), "it is not even asked for"
    assert not cache.exists()


def test_an_emulator_that_is_gone_from_the_cache_is_asked_for_again(scene: Scene, lean: Owner, cache: Path) -> None:
    ask(lean, asked := scene.biot_task())
    ask(lean, emulator_parcel(asked, scene.emulator))
    assert ask(lean, scene.biot_task()).kind == UPDATE
    shutil.rmtree(cache)
    assert ask(lean, scene.biot_task()).kind == LACKING


def test_the_audit_log_holds_no_row_and_no_value(scene: Scene, bob: Owner) -> None:
    ask(bob, scene.task())
    refused(bob, scene.task("lora.rank=300"))
    text = (bob.home / AUDIT).read_text()
    assert "Which" not in text
    assert "number" not in text.replace("rank", "")
    assert isinstance(bob.audit, AuditLog)
