"""One recipe as two sides: the same bits as in one process, and nothing of owners' rows on the server's."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flocktune import resident
from flocktune.audit import read_audit, verify
from flocktune.config.load import load_recipe
from flocktune.engine.parcels import EMULATOR, LACKING, TASK, UPDATE, Parcel
from flocktune.errors import UserError
from flocktune.federated import bundle_tensors, refuse_unfederated, write_bundle_tensors
from flocktune.models.bundle import read_bundle
from flocktune.owner import tasks
from flocktune.owner.tasks import Owner
from flocktune.report.html import write_report
from flocktune.runs import Stopped, execute
from tiny_federation import FEDBIOT, SIZES, Direct, make_federated_world, make_owner, new_run, run_apart


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_federated_world(tmp_path_factory.mktemp("apart"))


def link_to(world: Path, homes: Path, **changes: Any) -> Direct:
    return Direct({client: make_owner(world, client, homes / client, **changes).answer for client in SIZES})


def forget_all() -> None:
    """As a new process: nothing in memory."""
    resident.forget_models()
    for cached in (resident.load_instructions, resident.base_digest, tasks._sound_bundle):
        cached.cache_clear()


def losses(folder: Path) -> list[Any]:
    """All that a run's log says of rounds and evaluations but for times."""
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    told = []
    for event in events:
        if event["event"] == "round":
            clients = {
                name: {key: value for key, value in said.items() if key != "seconds"}
                for name, said in event["clients"].items()
            }
            size = pytest.approx(event["update_norm"], rel=1e-12)  # a sum over tensors, in the order in which they came
            told.append([event["train_loss"], clients, size, event["bytes_up"], event["bytes_down"]])
        elif event["event"] == "evaluation":
            told.append({key: value for key, value in event.items() if key not in ("seconds", "time")})
    return told


VARIANTS = {
    "FedIT": (),
    "packed, dropout": ("data.batching=packed", "lora.dropout=0.2"),
    "epochs, accumulated": ("local.steps=null", "local.epochs=2", "local.accumulate=3"),
    "FedProx on factors": ("local.proximal_mu=0.5",),
    "FedProx on products, by tokens": (
        "local.proximal_mu=0.5",
        "local.proximal_on=products",
        "aggregation.weights=tokens",
    ),
    "server's Adam, a schedule over all rounds": (
        "aggregation.server_optimizer={kind: adam}",
        "local.schedule=cosine",
        "local.schedule_over=run",
        "local.optimizer=sgd",
        "local.momentum=0.5",
    ),
    "a cohort of the clients": ("scheduling.selection={kind: uniform, fraction: 0.5}", "rounds=3"),
    "compressed, with what was held back": ("compression={format: int4, top_k: 0.3}", "rounds=3"),
    "FedBiOT, compressed to bytes": (*FEDBIOT, "compression={format: int8, zstd: 3}"),
    "FedBiOT": FEDBIOT,
    "FedBiOT, packed, dropout, epochs": (
        *FEDBIOT,
        "data.batching=packed",
        "lora.dropout=0.2",
        "local.steps=null",
        "local.epochs=2",
    ),
    "FedBiOT, both ends": (*FEDBIOT, "emulator={adapter_layers: 1, drop: 0.34, placement: first_and_last}"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_two_sides_compute_what_one_process_does(apart: Path, tmp_path: Path, name: str) -> None:
    together = execute(new_run(apart, tmp_path / "together", *VARIANTS[name]))
    nowhere = "data.train=/nowhere/at/all"  # the server has no rows of its clients
    link = link_to(apart, tmp_path / "homes")
    summary = run_apart(new_run(apart, tmp_path / "apart", *VARIANTS[name], nowhere), link)
    assert summary["adapter_sha256"] == together["adapter_sha256"]
    assert losses(tmp_path / "apart") == losses(tmp_path / "together")
    assert {parcel.kind for _, parcel in link.came} == {UPDATE}
    assert summary["metrics"] == together["metrics"]


def test_a_run_that_was_stopped_between_rounds_goes_on_to_the_same_bits(apart: Path, tmp_path: Path) -> None:
    whole = run_apart(new_run(apart, tmp_path / "whole", "rounds=3"), link_to(apart, tmp_path / "homes"))
    link, stop = link_to(apart, tmp_path / "others"), threading.Event()

    class Watcher:
        def on_event(self, event: Any) -> None:
            if event["event"] == "round" and event["round"] == 0:
                stop.set()

        def on_client(self, done: int, total: int, client: str) -> None: ...

    folder = new_run(apart, tmp_path / "cut", "rounds=3")
    with pytest.raises(Stopped):
        run_apart(folder, link, listeners=[Watcher()], stop=stop)
    first = len(link.sent)
    assert first == len(SIZES)
    forget_all()
    again = Direct({client: make_owner(apart, client, tmp_path / "others" / client).answer for client in SIZES})
    assert run_apart(folder, again)["adapter_sha256"] == whole["adapter_sha256"]
    assert sorted(parcel.fields["round"] for _, parcel in again.sent) == [1, 1, 1, 2, 2, 2], "no round is done twice"


def test_a_run_that_was_killed_within_a_round_does_that_round_again(apart: Path, tmp_path: Path) -> None:
    """The coordinator dies after two of three answers: those clients answer the same task again, under a new nonce."""
    whole = run_apart(new_run(apart, tmp_path / "whole"), link_to(apart, tmp_path / "homes"))
    link = link_to(apart, tmp_path / "others")
    answers = 0

    def dying(answer: Any) -> Any:
        def once(parcel: Parcel) -> Parcel:
            nonlocal answers
            answers += 1
            if answers == 6:
                raise KeyboardInterrupt
            return answer(parcel)

        return once

    folder = new_run(apart, tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        run_apart(folder, Direct({client: dying(answer) for client, answer in link.answer.items()}))
    assert run_apart(folder, link)["adapter_sha256"] == whole["adapter_sha256"]
    assert {parcel.fields["round"] for _, parcel in link.sent} == {1}


# --- FedBiOT's emulator --------------------------------------------------------------------------------


@pytest.fixture
def owners_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Owners' own cache: they are on other machines than the coordinator."""
    monkeypatch.setattr(tasks, "default_cache_folder", lambda: tmp_path / "owners-cache")
    tasks._sound_bundle.cache_clear()
    yield tmp_path / "owners-cache"
    tasks._sound_bundle.cache_clear()


def kinds(link: Direct, client: str) -> list[tuple[str, str]]:
    """What went to a client, and what came back."""
    down = [parcel.kind for name, parcel in link.sent if name == client]
    up = [parcel.kind for name, parcel in link.came if name == client]
    return list(zip(down, up, strict=True))


def test_an_emulator_is_sent_once(apart: Path, tmp_path: Path, owners_cache: Path) -> None:
    together = execute(new_run(apart, tmp_path / "together", *FEDBIOT))
    link = Direct({"bob": make_owner(apart, "bob", tmp_path / "bob", model=None).answer})
    link.answer |= {  # type: ignore[operator]  # they share bob's cache, and so they find it there
        client: make_owner(apart, client, tmp_path / client, model=None).answer for client in ("alice", "carol")
    }
    first = run_apart(new_run(apart, tmp_path / "first", *FEDBIOT), link)
    assert first["adapter_sha256"] == together["adapter_sha256"]
    sent = [client for client, parcel in link.sent if parcel.kind == EMULATOR]
    assert sent, "somebody had to get it"
    assert kinds(link, sent[0]) == [(TASK, LACKING), (EMULATOR, UPDATE), (TASK, UPDATE)]
    bundle = read_bundle(tmp_path / "first" / "emulator")
    kept = owners_cache / "emulators" / bundle.digest
    assert read_bundle(kept, digest=bundle.digest).plan == bundle.plan
    assert {path.name for path in kept.iterdir()} == {path.name for path in bundle.folder.iterdir()}
    forget_all()  # another process, another run
    link.sent.clear(), link.came.clear()
    second = run_apart(new_run(apart, tmp_path / "second", *FEDBIOT, "local.lr=2e-2"), link)
    assert second["adapter_sha256"] != first["adapter_sha256"]
    assert {parcel.kind for _, parcel in link.sent} == {TASK}


def test_a_damaged_emulator_in_the_cache_is_asked_for_again(apart: Path, tmp_path: Path, owners_cache: Path) -> None:
    link = Direct({"bob": make_owner(apart, "bob", tmp_path / "bob", model=None).answer})
    first = run_apart(new_run(apart, tmp_path / "first", *FEDBIOT), link, ("bob",))
    (kept,) = (owners_cache / "emulators").iterdir()
    weights = kept / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    forget_all()
    link.sent.clear(), link.came.clear()
    again = run_apart(new_run(apart, tmp_path / "again", *FEDBIOT), link, ("bob",))
    assert again["adapter_sha256"] == first["adapter_sha256"]
    assert kinds(link, "bob")[:2] == [(TASK, LACKING), (EMULATOR, UPDATE)]


def test_too_large_an_emulator_is_handed_out_as_a_folder(apart: Path, tmp_path: Path, owners_cache: Path) -> None:
    """Without the folder the client is left out and told what to do; with it nothing but tasks travels."""
    from flocktune.errors import RoundFailed

    none_sent = (*FEDBIOT, "engine={kind: flower, emulator_mb: 0}")
    folder = new_run(apart, tmp_path / "run", *none_sent)
    link = Direct({"bob": make_owner(apart, "bob", tmp_path / "bob", model=None).answer})
    with pytest.raises(RoundFailed, match=r"lacks the emulator .* the client joins with --emulator FOLDER"):
        run_apart(folder, link, ("bob",))
    together = execute(
        new_run(apart, tmp_path / "together", *FEDBIOT, "scheduling.selection={kind: named, clients: [bob]}")
    )
    given = str(folder / "emulator")
    link = Direct({"bob": make_owner(apart, "bob", tmp_path / "bob", model=None, emulator=given).answer})
    summary = run_apart(folder, link, ("bob",))
    assert summary["adapter_sha256"] == together["adapter_sha256"]
    assert {parcel.kind for _, parcel in link.sent} == {TASK}
    assert not owners_cache.exists()


def test_an_owner_never_opens_the_full_model(apart: Path, tmp_path: Path, owners_cache: Path) -> None:
    """The parcels of a run once more, to an owner who has just started, on a machine without the full model."""
    link = Direct({"bob": make_owner(apart, "bob", tmp_path / "bob", model=None).answer})
    run_apart(new_run(apart, tmp_path / "run", *FEDBIOT), link, ("bob",))
    updates = [parcel.sha256 for _, parcel in link.came if parcel.kind == UPDATE]
    assert len(updates) == 2
    forget_all()
    away = (apart / "model").rename(tmp_path / "hidden")
    test, public = ((apart / name).rename(tmp_path / name) for name in ("test.jsonl", "public.jsonl"))
    try:
        fresh = make_owner(apart, "bob", tmp_path / "fresh", model=None)
        replies = [fresh.answer(parcel) for _, parcel in link.sent if parcel.kind == TASK]
    finally:
        away.rename(apart / "model")
        test.rename(apart / "test.jsonl"), public.rename(apart / "public.jsonl")
    assert [reply.sha256 for reply in replies] == updates


def test_a_bundle_as_tensors_is_the_bundle(apart: Path, tmp_path: Path) -> None:
    run_apart(new_run(apart, tmp_path / "run", *FEDBIOT, "rounds=1"), link_to(apart, tmp_path))
    bundle = read_bundle(tmp_path / "run" / "emulator")
    write_bundle_tensors(bundle_tensors(bundle), tmp_path / "again")
    for path in bundle.folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


# --- what is refused, and what is told -----------------------------------------------------------------


def test_every_setting_that_owners_can_not_give_is_named_at_once(apart: Path) -> None:
    overrides = [
        "method=centralised",
        "data.test=null",
        "data.test_rows_per_category=3",
        "scheduling.selection={kind: by_size}",
        "compare.base=true",
        "model.trust_remote_code=true",
    ]
    with pytest.raises(UserError) as caught:
        refuse_unfederated(load_recipe(apart / "recipe.yaml", [*overrides, "allocation={kind: iid}"]), [])
    wheres = [problem.where for problem in caught.value.problems]  # type: ignore[union-attr]
    assert wheres == [
        "method",
        "allocation.kind",
        "model.trust_remote_code",
        "data.test_rows_per_category",
        "scheduling.selection",
        "compare",
        "federation",
    ]
    with pytest.raises(UserError, match=r"allocation.min_rows: expected 1 in a federation, got 5"):
        refuse_unfederated(load_recipe(apart / "recipe.yaml", ["allocation.min_rows=5"]), ["bob"])
    refuse_unfederated(load_recipe(apart / "recipe.yaml"), ["bob"])


def test_what_is_refused_makes_no_run(apart: Path, tmp_path: Path) -> None:
    folder = new_run(apart, tmp_path / "run", "allocation={kind: iid, clients: 2}")
    link = link_to(apart, tmp_path)
    with pytest.raises(UserError, match="natural in a federation"):
        run_apart(folder, link)
    assert not link.sent
    assert not (folder / "metrics.jsonl").exists()


@pytest.mark.parametrize("method", [(), FEDBIOT], ids=["FedIT", "FedBiOT"])
def test_the_report_says_nothing_of_rows_that_nobody_counted(
    apart: Path, tmp_path: Path, method: tuple[str, ...]
) -> None:
    folder = new_run(
        apart, tmp_path / "run", *method, "data.train=/nowhere", "evaluation={generate: true, max_new_tokens: 2}"
    )
    summary = run_apart(folder, link_to(apart, tmp_path / "homes"))
    assert summary["rounds"] == 2
    assert summary["metrics"]["held_out"]["overall"]["loss"] > 0
    assert "client_cost" not in json.dumps(summary)
    start = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert (start["clients"], start["owners"]) == ({}, sorted(SIZES))
    assert not {"heterogeneity", "untrainable_rows", "unassigned_rows", "truncated_rows"} & start.keys()
    page = write_report(folder).read_text()
    text = re.sub(r"<style.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL)
    assert "Who holds what" not in text
    assert not re.search(r"\b0 (rows|clients|categories)\b|Jensen-Shannon|Gini|None|nan\b", text)
    assert all(client in text for client in SIZES), "who took part is known"


def test_what_left_the_owners_and_what_the_coordinator_got_are_the_same_digests(apart: Path, tmp_path: Path) -> None:
    folder = new_run(apart, tmp_path / "run")
    link = link_to(apart, tmp_path / "homes")
    run_apart(folder, link)
    left = {
        (record["nonce"], record["digest"], record["bytes"])
        for client in SIZES
        for record in read_audit(tmp_path / "homes" / client / "audit.jsonl")
        if record["event"] == "update_left"
    }
    received = {
        (record["nonce"], record["sha256"], record["bytes"])
        for record in read_audit(folder / "audit.jsonl")
        if record["event"] == "received"
    }
    assert left == received
    assert len(left) == 2 * len(SIZES)
    assert verify(folder / "audit.jsonl") == [] == verify(tmp_path / "homes" / "bob" / "audit.jsonl")


def test_an_owner_without_rows_to_learn_from_is_left_out(apart: Path, tmp_path: Path) -> None:
    from conftest import write_rows

    empty = write_rows(tmp_path / "empty.jsonl", [{"instruction": "What?", "response": "", "category": "x"}] * 3)
    link = link_to(apart, tmp_path / "homes")
    link.answer |= {"alice": Owner("alice", tmp_path / "homes" / "alice", str(empty), str(apart / "model")).answer}  # type: ignore[operator]
    summary = run_apart(new_run(apart, tmp_path / "run", "rounds=1"), link)
    assert summary["rounds"] == 1
    (event,) = [
        json.loads(line)
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        if '"round", ' in line
    ][:1]
    assert [failure["client"] for failure in event["failures"]] == ["alice"]
    assert str(empty) not in json.dumps(event), "an owner's path is the owner's"
