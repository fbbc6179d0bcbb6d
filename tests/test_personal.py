"""Ditto, fine-tuning after the run, and how each client fares on its own held-out rows."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import Said, World
from flocktune.algorithms import fedavg
from flocktune.algorithms.local import ClientData, train_locally
from flocktune.algorithms.personal import FINE_TUNE, with_ditto, with_fine_tuning
from flocktune.allocation import allocate_clients, hold_out_own
from flocktune.config.load import load_recipe
from flocktune.config.personal import Ditto, FineTune
from flocktune.config.schema import LocalConfig
from flocktune.data.batching import collate
from flocktune.errors import UserError
from flocktune.evaluation.spread import spread
from flocktune.models.lora import attach
from flocktune.models.peft_io import import_peft
from flocktune.per_client import folder_name
from flocktune.runs import Stopped, execute
from flocktune.tensors import group
from flocktune.training import proximal_penalty
from flocktune.types import ClientTask, Mean
from test_fedavg import LORA, ROWS, batches
from tiny_models import tiny_model

Cli = Callable[..., Said]

QUICK = ("evaluation.generate=false", "evaluation.every=0")
LOCAL = LocalConfig(steps=2, batch_size=2, lr=1e-2)


class StopAfter:
    """A listener that asks for a stop when ``rounds`` rounds are done."""

    def __init__(self, rounds: int, stop: threading.Event) -> None:
        self.rounds, self.stop = rounds, stop

    def on_event(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "round" and event["round"] + 1 == self.rounds:
            self.stop.set()

    def on_client(self, done: int, total: int, client: str) -> None:
        pass


def whole_run(cli: Cli, world: World, folder: Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    said = cli("run", world.recipe, *overrides, *QUICK, "--out", folder)
    assert said.code == 0, said.all
    return outcome(folder)


def interrupted(cli: Cli, world: World, folder: Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    """The same, ended after one round and gone on with from what lies on the disk."""
    from flocktune.run_folder import create_run

    create_run(load_recipe(world.recipe, [*overrides, *QUICK]), folder)
    stop = threading.Event()
    with pytest.raises(Stopped):
        execute(folder, [StopAfter(1, stop)], stop)
    said = cli("resume", folder)
    assert said.code == 0, said.all
    return outcome(folder)


def outcome(folder: Path) -> dict[str, Any]:
    """Bits of the last state with everyone's memory, and of the adapter; and what was measured."""
    newest = max((folder / "state").glob("*.safetensors"))
    return {
        "state": {name: value.numpy().tobytes() for name, value in load_file(newest).items()},
        "adapter": (folder / "adapter/adapter_model.safetensors").read_bytes(),
        "metrics": json.loads((folder / "summary.json").read_text())["metrics"],
    }


# --- the halves ----------------------------------------------------------------------------------------


def client(local: LocalConfig = LOCAL):
    adapter = attach(tiny_model("llama"), LORA, seed=5)

    def data(name: str) -> ClientData:
        return ClientData(
            len(ROWS[name]),
            1,
            lambda seed, steps, epochs: batches(name, seed, replace(local, steps=steps, epochs=epochs)),
        )

    return adapter, data, fedavg.client_half(adapter, data, local, "examples", rounds=2)


def same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_ditto_leaves_the_update_as_it_is_and_trains_its_own_towards_its_rows() -> None:
    adapter, data, plain = client()
    received = adapter.tensors()
    task = ClientTask(0, "a", "fedavg", received, 7, "")
    alone, _ = plain(task, {})
    half = with_ditto(plain, Ditto(lambda_=0.5, steps=3), adapter, data, LOCAL, rounds=2)
    update, memory = half(task, {"other": torch.ones(1)})
    assert same(update.delta, alone.delta)
    assert "other" in memory
    first = group(memory, "personal")
    assert first.keys() == received.keys()
    assert not same(first, received)
    # The second round goes on from v, around the new w_t, and still changes nothing of the update.
    moved = {name: value + 0.01 for name, value in received.items()}
    again = replace(task, round=1, tensors=moved)
    update, memory = half(again, memory)
    assert same(update.delta, plain(again, {})[0].delta)
    second = group(memory, "personal")
    assert not same(second, half(again, {})[1])
    assert not same(second, group(half(again, {})[1], "personal"))


def test_ditto_is_the_papers_objective() -> None:
    """v minimises loss_k(v) + lambda / 2 ||v - w_t||^2: the same steps by hand, from v, with w_t as the centre."""
    from flocktune.seeds import derive_seed

    adapter, data, plain = client()
    start = adapter.tensors()
    centre = {name: value + 0.02 for name, value in start.items()}
    half = with_ditto(plain, Ditto(lambda_=2.0), adapter, data, LOCAL, rounds=2)
    task = ClientTask(1, "b", "fedavg", centre, 3, "")
    _, memory = half(task, {f"personal/{name}": value for name, value in start.items()})

    adapter.load(start)
    seeded = replace(task, seed=derive_seed(3, "personal"))
    train_locally(adapter, start, seeded, data("b"), LOCAL, "equal", rounds=2, penalty=proximal_penalty(centre, 2.0))
    assert same(group(memory, "personal"), adapter.tensors())


def test_a_strong_pull_holds_the_own_adapter_at_the_common_one() -> None:
    adapter, data, plain = client(replace(LOCAL, optimizer="sgd", lr=1e-3, clip_norm=0.0))
    sgd = replace(LOCAL, optimizer="sgd", lr=1e-3, clip_norm=0.0)
    start = adapter.tensors()
    far = {f"personal/{name}": value + 0.5 for name, value in start.items()}
    distance = []
    for strength in (0.0, 900.0):
        half = with_ditto(plain, Ditto(lambda_=strength, steps=8), adapter, data, sgd, rounds=2)
        own = group(half(ClientTask(0, "a", "fedavg", start, 3, ""), far)[1], "personal")
        distance.append(sum(float((own[name] - start[name]).square().sum()) for name in own))
    assert distance[1] < 1e-3 * distance[0]


def test_what_the_own_adapter_meets_does_not_concern_the_update() -> None:
    """A pull that explodes: the client keeps the v it had."""
    adapter, data, plain = client()
    wild = replace(LOCAL, optimizer="sgd", lr=1e6, clip_norm=0.0, steps=20)
    task = ClientTask(0, "a", "fedavg", adapter.tensors(), 7, "")
    before = {f"personal/{name}": value + 0.1 for name, value in task.tensors.items()}
    update, memory = with_ditto(plain, Ditto(lambda_=1e6), adapter, data, wild, rounds=2)(task, before)
    assert same(memory, before)
    assert same(update.delta, plain(task, {})[0].delta)


def test_the_recipes_own_proximal_term_is_not_that_of_the_own_adapter() -> None:
    adapter, data, plain = client()
    task = ClientTask(0, "a", "fedavg", adapter.tensors(), 7, "")
    before = {f"personal/{name}": value + 0.1 for name, value in task.tensors.items()}
    own = [
        group(with_ditto(plain, Ditto(), adapter, data, local, rounds=2)(task, before)[1], "personal")
        for local in (LOCAL, replace(LOCAL, proximal_mu=5.0))
    ]
    assert same(*own)


def test_fine_tuning_stays_with_the_client() -> None:
    adapter, data, plain = client()
    half = with_fine_tuning(plain, FineTune(steps=3, lr=2e-2), adapter, data, LOCAL)
    task = ClientTask(2, "a", FINE_TUNE, adapter.tensors(), 7, "")
    update, memory = half(task, {"control/x": torch.ones(1)})
    assert update.delta == {}
    assert update.metrics["steps"].total == 3
    assert "control/x" in memory
    own = group(memory, "personal")
    assert not same(own, task.tensors)
    ordinary = replace(task, kind="fedavg")
    assert same(half(ordinary, {})[0].delta, plain(ordinary, {})[0].delta)


# --- rows held out of each client's own ----------------------------------------------------------------


def test_own_rows_are_held_out_by_the_seed_and_one_is_left_to_train_on() -> None:
    clients = {"many": np.arange(10), "few": np.array([20, 21, 22]), "one": np.array([30])}
    kept, held = hold_out_own(clients, 4, seed=1)
    assert {name: len(rows) for name, rows in kept.items()} == {"many": 6, "few": 1, "one": 1}
    assert {name: len(rows) for name, rows in held.items()} == {"many": 4, "few": 2}
    for name, rows in clients.items():
        assert sorted([*kept[name], *held.get(name, [])]) == rows.tolist()
        assert kept[name].tolist() == sorted(kept[name])
    again = hold_out_own({"few": clients["few"]}, 4, seed=1)[1]
    assert again["few"].tolist() == held["few"].tolist()  # whoever else there is
    others = [hold_out_own(clients, 4, seed=seed)[1]["many"].tolist() for seed in range(2, 8)]
    assert any(rows != held["many"].tolist() for rows in others)
    assert hold_out_own(clients, 0, seed=1) == (clients, {})


def test_nobody_trains_on_them(world: World) -> None:
    config = load_recipe(world.recipe, ["evaluation.client_rows=3"])
    rows = allocate_clients(config)
    plain = allocate_clients(load_recipe(world.recipe))
    for client_name, own in rows.clients.items():
        assert not set(own) & set(rows.own_test[client_name])
        assert set(own) | set(rows.own_test[client_name]) == set(plain.clients[client_name])
    from flocktune.assemble import federation
    from flocktune.cohorts import EVERYONE

    everyone = federation(load_recipe(world.recipe, ["evaluation.client_rows=3", "method=centralised"])).data
    held = set(np.concatenate(list(everyone.own_test.values())).tolist())
    assert len(held) == 12
    assert not held & set(everyone.clients[EVERYONE].tolist())


def test_the_spread_of_losses() -> None:
    losses = {f"c{number:02d}": Mean(2.0 * number, 2.0) for number in range(1, 21)} | {"empty": Mean()}
    found = spread(losses)
    overall = found["overall"]
    assert overall["clients"] == 20
    assert overall["loss"] == pytest.approx(10.5)
    assert overall["loss_std"] == pytest.approx(float(np.std(np.arange(1, 21))))
    assert overall["loss_worst_tenth"] == pytest.approx(19.5)
    assert found["clients"]["c03"] == {"loss": 3.0}
    assert spread({"only": Mean(3.0, 2.0)})["overall"]["loss_worst_tenth"] == 1.5
    assert spread({})["overall"] == {"clients": 0}


def test_folders_of_clients_with_any_name() -> None:
    names = ["client-01", "a/b", "a%2Fb", "..", ".", ".hidden", "Uni Köln"]
    folders = [folder_name(name) for name in names]
    assert len(set(folders)) == len(names)
    assert all(Path(folder).name == folder and not folder.startswith(".") for folder in folders)


def own_losses(folder: Path) -> dict[str, float]:
    """Client -> the loss of its own adapter, read from the run's folder, on its own held-out rows."""
    from flocktune.assemble import federation
    from flocktune.training import evaluate_loss

    fed = federation(load_recipe(folder / "recipe.yaml"))
    found = {}
    for name, rows in fed.data.own_test.items():
        fed.base.adapter.load(import_peft(folder / "personal" / name)[0])
        encoded = fed.data.train.encoded
        batch = collate(encoded, rows, batching="padded", pad_id=fed.base.pad_id)
        found[name] = evaluate_loss(fed.base.model, [batch]).value
    return found


# --- runs -----------------------------------------------------------------------------------------------


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "personal", ["{kind: ditto, lambda_: 0.1, steps: 4, keep: true}", "{kind: fine_tune, steps: 6, keep: true}"]
)
def test_a_run_tells_how_each_client_fares(cli: Cli, world: World, tmp_path: Path, personal: str) -> None:
    overrides = (f"personal={personal}", "evaluation.client_rows=2", "scheduling.selection.fraction=1.0")
    found = whole_run(cli, world, tmp_path / "run", overrides)
    common, own = found["metrics"]["clients"]["overall"], found["metrics"]["clients_own"]["overall"]
    assert common["clients"] == own["clients"] == 4
    assert own["loss"] != common["loss"]
    told = [event for event in events(tmp_path / "run") if event["event"] == "evaluation"]
    assert [event["dataset"] for event in told] == ["held_out", "clients", "clients_own"]
    mean = sum(one["loss"] for one in told[1]["clients"].values()) / 4
    assert common["loss"] == pytest.approx(mean)
    kept = sorted(path.name for path in (tmp_path / "run/personal").iterdir())
    assert kept == ["client-01", "client-02", "client-03", "client-04"]
    memory = load_file(max((tmp_path / "run/state").glob("*.safetensors")))
    tensors, _ = import_peft(tmp_path / "run/personal/client-02")
    if "ditto" in personal:  # fine-tuning is done after the last checkpoint
        assert same(tensors, group(memory, "memory/client-02/personal"))
    common_adapter, _ = import_peft(tmp_path / "run/adapter")
    assert not same(tensors, common_adapter)
    assert own_losses(tmp_path / "run") == pytest.approx(
        {name: one["loss"] for name, one in told[2]["clients"].items()}, rel=1e-5
    )
    page = cli("report", tmp_path / "run")
    assert page.code == 0, page.all
    assert "How the result serves each client" in (tmp_path / "run/report.html").read_text()


def test_what_is_lost_on_the_wire_does_not_touch_own_adapters(cli: Cli, world: World, tmp_path: Path) -> None:
    """Compression with error feedback goes with corrections and with both kinds of own adapters."""
    for name, personal in {"ditto": "{kind: ditto}", "fine_tune": "{kind: fine_tune, steps: 3}"}.items():
        overrides = ("compression={format: int8}", "local.correction={kind: scaffold}", f"personal={personal}")
        found = whole_run(cli, world, tmp_path / name, (*overrides, "evaluation.client_rows=2", "rounds=2"))
        assert found["metrics"]["clients_own"]["overall"]["loss"] != found["metrics"]["clients"]["overall"]["loss"]
        told = events(tmp_path / name)
        assert not any(event.get("failures") for event in told)
        log = tmp_path / name / "run.log"
        assert not log.exists() or "no adapter of its own" not in log.read_text()


def test_training_longer_on_its_own_rows_lowers_a_clients_loss_on_them(cli: Cli, world: World, tmp_path: Path) -> None:
    overrides = ("personal={kind: fine_tune, steps: 30}", "evaluation.client_rows=3")
    metrics = whole_run(cli, world, tmp_path / "run", overrides)["metrics"]
    assert metrics["clients_own"]["overall"]["loss"] < metrics["clients"]["overall"]["loss"] - 0.1
    assert not (tmp_path / "run/personal").exists()


def test_the_common_adapter_is_the_same_with_ditto_and_without(cli: Cli, world: World, tmp_path: Path) -> None:
    plain = whole_run(cli, world, tmp_path / "plain", ())
    ditto = whole_run(cli, world, tmp_path / "ditto", ("personal={kind: ditto}",))
    assert plain["adapter"] == ditto["adapter"]
    assert any("/personal/" in name for name in ditto["state"])
    assert "clients" not in ditto["metrics"]


@pytest.mark.parametrize(
    "overrides",
    [
        ("personal={kind: ditto, steps: 1}", "evaluation.client_rows=2"),
        ("personal={kind: fine_tune, steps: 2}", "evaluation.client_rows=2"),
        ("personal={kind: ditto}", "local.correction={kind: scaffold}", "evaluation.client_rows=2"),
        ("personal={kind: ditto}", "scheduling.buffered={size: 2, concurrency: 3}",
         "scheduling.selection.fraction=1.0", "evaluation.client_rows=2"),
    ],
    ids=["ditto", "fine_tune", "ditto and scaffold", "ditto, buffered"],
)  # fmt: skip
def test_killed_after_a_round_it_goes_on_to_the_same_bits(
    cli: Cli, world: World, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    unbroken = whole_run(cli, world, tmp_path / "unbroken", overrides)
    assert interrupted(cli, world, tmp_path / "resumed", overrides) == unbroken
    assert "clients_own" in unbroken["metrics"]


def test_evaluations_on_the_way_are_of_clients_too(cli: Cli, world: World, tmp_path: Path) -> None:
    said = cli(
        "run",
        world.recipe,
        "evaluation={every: 1, generate: false, client_rows: 2}",
        "rounds=2",
        "--out",
        tmp_path / "run",
    )
    assert said.code == 0, said.all
    told = [event for event in events(tmp_path / "run") if event.get("dataset") == "clients"]
    assert [event["round"] for event in told] == [1, 2]


def test_a_study_shows_the_spread_and_tests_claims_of_it(cli: Cli, world: World, tmp_path: Path) -> None:
    import yaml

    tree = yaml.safe_load(world.recipe.read_text()) | {"rounds": 1, "evaluation": {"generate": False, "client_rows": 2}}
    del tree["name"]
    claim = {"better": "Ditto", "than": "Base", "metric": "loss_worst_tenth", "dataset": "clients"}
    methods = {"Base": {"method": "base"}, "Ditto": {"personal": {"kind": "ditto"}}}
    study = {"name": "spread", "recipe": tree, "seeds": [0], "methods": methods, "claims": [claim]}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    said = cli("study", tmp_path / "study.yaml", "--quiet", "--out", tmp_path / "study")
    assert said.code == 0, said.all
    text = (tmp_path / "study/study.md").read_text()
    assert "Loss, worst tenth on clients_own" in text
    assert "Ditto better than Base: Loss, worst tenth on clients" in text


def test_baselines_are_evaluated_client_by_client_and_have_no_own_adapters(
    cli: Cli, world: World, tmp_path: Path
) -> None:
    compared = ("compare={base: true, local: 1, centralised: true}", "rounds=1", "evaluation.client_rows=2")
    said = cli("run", world.recipe, *compared, *QUICK, "personal={kind: fine_tune}", "--out", tmp_path / "all")
    assert said.code == 0, said.all
    summaries = json.loads((tmp_path / "all/summary.json").read_text())
    assert {"clients_own" in summary["metrics"] for summary in summaries.values()} == {True, False}
    for name in ("base", "local_1", "centralised"):
        assert set(summaries[name]["metrics"]) == {"held_out", "clients"}
    assert cli("report", tmp_path / "all").code == 0


def test_fedbiot_is_evaluated_on_the_full_model_without_own_adapters(cli: Cli, world: World, tmp_path: Path) -> None:
    biot = ("method=fedbiot", "emulator={adapter_layers: 1, drop: 0.0}", "rounds=1", "evaluation.client_rows=2",
            "alignment={first_steps: 1, steps: 0, batch_size: 2, fidelity_rows: 0}")  # fmt: skip
    metrics = whole_run(cli, world, tmp_path / "run", biot)["metrics"]
    assert metrics["clients"]["overall"]["clients"] == 4
    for kind in ("ditto", "fine_tune"):
        with pytest.raises(UserError, match="full model"):
            load_recipe(world.recipe, [*biot, f"personal={{kind: {kind}}}"])


def test_a_federation_of_owners_refuses_what_it_can_not_do() -> None:
    from flocktune.config.load import build_config
    from flocktune.federated import refuse_unfederated

    config = build_config({
        "allocation": {"kind": "natural"}, "data": {"test_rows_per_category": 0},
        "local": {"steps": 1, "correction": {"kind": "scaffold"}}, "personal": {"kind": "ditto"},
        "evaluation": {"client_rows": 2},
    })  # fmt: skip
    with pytest.raises(UserError) as raised:
        refuse_unfederated(config, ["hospital"])
    said = str(raised.value)
    for setting in ("local.correction", "personal", "evaluation.client_rows"):
        assert setting in said
