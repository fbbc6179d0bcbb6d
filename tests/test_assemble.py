"""From a recipe to objects: methods as settings, and the estimate of `check` against what a run really has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from conftest import World, write_rows
from flocktune import api
from flocktune.allocation import allocate_clients
from flocktune.assemble import federation
from flocktune.cohorts import EVERYONE, centralised_steps
from flocktune.config.load import load_recipe
from flocktune.config.personal import Ditto, FineTune, Personal
from flocktune.config.schema import LocalConfig, ModelConfig, Named, RunConfig
from flocktune.errors import UserError
from flocktune.estimate import estimate
from flocktune.experiment import plan
from flocktune.resident import forget_models
from flocktune.tensors import digest
from flocktune.wire import encoded_size
from tiny_models import tiny_tokenizer


@pytest.fixture
def config(world: World) -> RunConfig:
    return load_recipe(world.recipe)


def test_every_row_is_with_one_client_or_held_out(config: RunConfig) -> None:
    data = allocate_clients(config)
    held = len(data.test.examples)
    assert held == 6, "two rows of three categories"
    rows = [row for part in data.clients.values() for row in part]
    assert len(rows) == len(set(rows)) == 48 - held
    trained = {(data.train.examples[row].instruction) for row in rows}
    assert not trained & {example.instruction for example in data.test.examples}


def test_the_tokens_of_the_held_out_rows_are_theirs(config: RunConfig) -> None:
    data = allocate_clients(config)
    tokenizer = tiny_tokenizer()
    for row, example in enumerate(data.test.examples):
        assert example.response in tokenizer.decode(data.test.encoded.rows(row)[0])


def test_base_runs_no_round_and_local_one_client(config: RunConfig) -> None:
    assert federation(replace(config, method="base")).rounds == 0
    alone = replace(config.scheduling, selection=Named(("client-02",)))
    fed = federation(replace(config, method="local", scheduling=alone))
    assert {fed.schedule(number).asked for number in range(5)} == {("client-02",)}


def test_centralised_has_all_rows_and_as_many_steps_as_a_cohort(config: RunConfig) -> None:
    fed = federation(replace(config, method="centralised"))
    assert list(fed.data.clients) == [EVERYONE]
    assert len(fed.data.clients[EVERYONE]) == 42
    assert fed.schedule(1).asked == (EVERYONE,)
    clients = allocate_clients(config).clients
    assert centralised_steps(config, clients) == 2 * 2, "two of four clients, two steps each"
    by_epoch = replace(config, local=LocalConfig(epochs=1, batch_size=4))
    mean = sum(-(-len(rows) // 4) for rows in clients.values()) / 4
    assert centralised_steps(by_epoch, clients) == round(2 * mean)


def test_the_plan_of_a_comparison(config: RunConfig) -> None:
    wanted = replace(config, compare=replace(config.compare, base=True, local=2, centralised=True))
    runs = plan(wanted, ["a", "b", "c"])
    assert list(runs) == ["base", "local_1", "local_2", "fedit", "centralised"]
    alone = [runs[f"local_{number}"].scheduling.selection for number in (1, 2)]
    assert all(isinstance(choice, Named) and len(choice.clients) == 1 for choice in alone)
    assert alone[0] != alone[1]
    named = replace(wanted, compare=replace(config.compare, local=("c",)))
    assert plan(named, ["a", "b", "c"])["local_1"].scheduling.selection == Named(("c",))
    for wrong in (4, ("nobody",)):
        with pytest.raises(UserError, match=r"compare\.local"):
            plan(replace(wanted, compare=replace(config.compare, local=wrong)), ["a", "b", "c"])


def test_the_start_depends_on_the_seed_alone(config: RunConfig) -> None:
    first = digest(federation(config).start)
    forget_models()
    assert digest(federation(config).start) == first
    assert digest(federation(replace(config, seed=1)).start) != first


def test_a_run_may_start_from_its_own_exported_adapter(config: RunConfig, tmp_path: Path) -> None:
    summary = api.run(config, tmp_path / "first")
    onward = replace(config, lora=replace(config.lora, start_from=str(tmp_path / "first" / "adapter")))
    assert digest(federation(onward).start) == summary["adapter_sha256"]
    with pytest.raises(UserError, match=r"lora\.start_from: expected an adapter of the recipe's rank"):
        federation(replace(onward, lora=replace(onward.lora, rank=3)))
    with pytest.raises(UserError, match="scale 8 instead of 4"):
        federation(replace(onward, lora=replace(onward.lora, alpha=8.0)))


def test_the_estimate_is_what_a_run_has(config: RunConfig, tmp_path: Path) -> None:
    costs, summary = estimate(config), api.run(config, tmp_path / "run")
    assert costs.trainable_parameters == summary["trainable_parameters"]
    assert (costs.clients, costs.cohort, costs.steps_total) == (4, 2, 12)
    fed = federation(config)
    headers = encoded_size(fed.start) - costs.adapter_bytes
    assert 0 < headers < 4096
    assert summary["bytes_down"] == summary["bytes_up"] == 3 * 2 * encoded_size(fed.start)
    assert 3 * costs.round_bytes_down == summary["bytes_down"] - 6 * headers


@pytest.mark.parametrize(("personal", "more"), [(Ditto(), 12), (Ditto(steps=5), 30), (FineTune(steps=5), 20)])
def test_steps_on_clients_own_adapters_are_counted(config: RunConfig, personal: Personal, more: int) -> None:
    assert estimate(replace(config, personal=personal)).steps_total == estimate(config).steps_total + more
    alone = replace(config, method="centralised")
    assert estimate(replace(alone, personal=personal)).steps_total == estimate(alone).steps_total


def test_the_estimate_names_problems_of_model_and_data_at_once(config: RunConfig) -> None:
    wrong = replace(config, model=ModelConfig(path="nowhere"), data=replace(config.data, train="nothing.jsonl"))
    with pytest.raises(UserError) as caught:
        estimate(replace(wrong, runtime=replace(config.runtime, device="quantum")))
    for words in ("nowhere", "nothing.jsonl", "quantum"):
        assert words in str(caught.value)


def test_rows_without_an_answer_are_counted_and_left_out(config: RunConfig, tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {n}", "response": "" if n < 3 else f"{n}"} for n in range(30)]
    data = replace(config.data, train=str(write_rows(tmp_path / "gaps.jsonl", rows)))
    described = allocate_clients(replace(config, data=data)).describe()
    assert described["untrainable_rows"] == 3
    assert sum(client["rows"] for client in described["clients"].values()) + sum(described["test"].values()) == 27


def test_packing_is_refused_for_a_model_that_does_not_tell_rows_apart(config: RunConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=260, hidden_size=32, n_layer=1, n_head=4))
    for weight in bloom.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    bloom.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    alibi = replace(
        config, model=ModelConfig(path=str(tmp_path)), lora=replace(config.lora, targets="all-linear"),
        data=replace(config.data, batching="packed"),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"data\.batching: expected padded, for this model"):
        federation(alibi)
    federation(replace(config, data=replace(config.data, batching="packed")))
