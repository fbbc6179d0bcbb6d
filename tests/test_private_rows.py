"""Sample-level differential privacy: row gradients against a loop over rows, noise, samples, clients' ledgers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from flocktune.algorithms.local import ClientData, train_locally
from flocktune.algorithms.private_rows import STEPS, PrivateRows, accounted, parts_of, row_gradients
from flocktune.config.load import parse_recipe
from flocktune.config.privacy import SamplePrivacy
from flocktune.config.schema import LocalConfig, LoraConfig
from flocktune.data.batching import collate
from flocktune.engine.client import answer
from flocktune.errors import FlocktuneError, UserError
from flocktune.models.lora import Adapter, attach
from flocktune.owner.home import PRIVACY_KEY
from flocktune.privacy.accounting import Budget
from flocktune.privacy.noise import derive_key
from flocktune.runs import execute
from flocktune.training import mean_gradient, next_token_loss
from flocktune.types import ClientTask, Failure, Update
from test_fedavg import encoded_rows
from tiny_federation import SIZES, Direct, make_federated_world, make_owner, new_run, run_apart
from tiny_models import fill, tiny_model

KEY = bytes(range(32))
LOCAL = LocalConfig(steps=3, batch_size=2, accumulate=2, lr=1e-2, clip_norm=0.0)


def adapter_of(family: str = "llama", **lora) -> Adapter:
    adapter = attach(tiny_model(family), LoraConfig(rank=2, alpha=4.0, **lora), seed=5)
    fill(adapter.parameters)
    return adapter


def rows(clip_norm: float = 0.5, z: float = 1.0, count: int = 10, local: LocalConfig = LOCAL, **more) -> PrivateRows:
    settings = SamplePrivacy(clip_norm, 1e-3, **{"noise_multiplier": z, **more})
    batch = local.batch_size * local.accumulate
    return PrivateRows(settings, encoded_rows(), range(count), 2, batch, local.steps or 1, rounds=5, key=KEY)


def by_a_loop(adapter: Adapter, indices: list[int]) -> list[dict[str, torch.Tensor]]:
    """Each row alone, through autograd: the gradient of its mean loss."""
    found = []
    for index in indices:
        batch = collate(encoded_rows(), [index], batching="padded", pad_id=2)
        adapter.model.zero_grad()
        (next_token_loss(adapter.model, batch) / batch.targets.numel()).backward()
        found.append({name: value.grad.clone() for name, value in adapter.parameters.items()})
    adapter.model.zero_grad()
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "opt", "gpt_neox"])
def test_row_gradients_are_those_of_a_loop_over_rows(family: str) -> None:
    """Padded rows of very different lengths; gpt2 has Conv1D modules, opt may flatten its rows."""
    adapter, chosen = adapter_of(family), [0, 9, 4, 1]
    nats, found = row_gradients(
        adapter.model, adapter.parameters, collate(encoded_rows(), chosen, batching="padded", pad_id=2), next_token_loss
    )
    expected = by_a_loop(adapter, chosen)
    for place, row in enumerate(expected):
        for name, value in row.items():
            torch.testing.assert_close(found[name][place], value, atol=2e-6, rtol=2e-4)
    assert all(value.grad is None for value in adapter.parameters.values())
    assert float(nats) > 0


def test_only_the_factors_that_are_trained_have_row_gradients() -> None:
    adapter = adapter_of()
    some = {name: value for name, value in adapter.parameters.items() if name.endswith("lora_B")}
    batch = collate(encoded_rows(), [0, 1], batching="padded", pad_id=2)
    _, found = row_gradients(adapter.model, some, batch, next_token_loss)
    assert found.keys() == some.keys()
    head = {"head": torch.nn.Parameter(torch.zeros(2))}
    with pytest.raises(UserError, match="LoRA factors alone"):
        row_gradients(adapter.model, head, batch, next_token_loss)


def test_a_module_that_mixes_rows_is_refused() -> None:
    adapter, batch = adapter_of(), collate(encoded_rows(), [0, 1], batching="padded", pad_id=2)
    packed = collate(encoded_rows(), [0, 1], batching="packed", pad_id=2)
    with pytest.raises(UserError, match="see rows apart"):
        row_gradients(adapter.model, adapter.parameters, batch, lambda model, _: next_token_loss(model, packed))


def test_parts_hold_every_row_and_every_target_once() -> None:
    lot = collate(encoded_rows(), [3, 0, 7, 5, 9], batching="padded", pad_id=2)
    parts = list(parts_of(lot, 2))
    assert [part.rows for part in parts] == [2, 2, 1]
    assert sorted(index for part in parts for index in part.index) == [0, 3, 5, 7, 9]
    for part in parts:
        alone = collate(encoded_rows(), part.index, batching="padded", pad_id=2)
        assert torch.equal(part.input_ids, alone.input_ids)
        assert torch.equal(part.label_index, alone.label_index)
        assert torch.equal(part.targets, alone.targets)


@pytest.mark.parametrize("at_once", [1, 3, 16])
def test_a_steps_gradient_is_the_clipped_sum_over_the_expected_batch(at_once: int) -> None:
    adapter, private = adapter_of(), rows(z=0.0)
    chosen = [0, 2, 5, 8, 9]
    lot = collate(encoded_rows(), chosen, batching="padded", pad_id=2)
    private.gradient(KEY, at_once)(adapter.model, adapter.parameters, [lot], next_token_loss)
    expected = {name: torch.zeros_like(value) for name, value in adapter.parameters.items()}
    for row in by_a_loop_keeping(adapter, chosen):
        norm = math.sqrt(sum(float(value.double().square().sum()) for value in row.values()))
        for name, value in row.items():
            expected[name] += value * min(1.0, 0.5 / norm) / 4
    for name, value in adapter.parameters.items():
        torch.testing.assert_close(value.grad, expected[name], atol=1e-6, rtol=2e-4)


def by_a_loop_keeping(adapter: Adapter, indices: list[int]) -> list[dict[str, torch.Tensor]]:
    """As :func:`by_a_loop`; gradients that are there stay."""
    kept = {name: value.grad for name, value in adapter.parameters.items()}
    found = by_a_loop(adapter, indices)
    for name, value in adapter.parameters.items():
        value.grad = kept[name]
    return found


def test_noise_is_there_without_a_row_and_has_its_standard_deviation() -> None:
    adapter, private = adapter_of(), rows(clip_norm=0.3, z=2.0)
    empty = rows(count=1, local=replace(LOCAL, steps=1)).lots(KEY)
    assert next(iter(empty)).rows in (0, 1)
    nothing = next(
        lot for seed in range(99) for lot in replace(private, batch=1).lots(derive_key(KEY, seed)) if not lot.rows
    )
    steps = private.gradient(KEY, 4)
    drawn = []
    for _ in range(40):
        assert float(steps(adapter.model, adapter.parameters, [nothing], next_token_loss)) == 0
        drawn.append(torch.cat([value.grad.flatten() for value in adapter.parameters.values()]).double())
    sample = torch.stack(drawn).numpy() * 4 / (2.0 * 0.3)
    n = sample.size
    assert abs(sample.mean()) < 4 / math.sqrt(n)
    assert abs(sample.var() - 1) < 4 * math.sqrt(2 / n)
    assert stats.kstest(sample.ravel(), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(sample[:-1].ravel(), sample[1:].ravel())[0, 1]) < 4.5 / math.sqrt(n), "each step has its own"


def test_samples_of_rows_are_poisson() -> None:
    private = replace(rows(), steps=3000)
    taken = np.zeros((3000, 10))
    for step, lot in enumerate(private.lots(KEY)):
        taken[step, lot.index] = 1
    assert np.abs(taken.mean(0) - 0.4).max() < 4.5 * math.sqrt(0.24 / 3000)
    found = np.corrcoef(taken.T)
    assert np.abs(found - np.eye(10)).max() < 4.5 / math.sqrt(3000)


def update_of(private: PrivateRows | None, task: ClientTask, local: LocalConfig = LOCAL) -> Update:
    adapter = adapter_of()
    adapter.load(task.tensors)
    data = ClientData(10, 99, lambda seed, steps, epochs: iter(()), private)
    return train_locally(adapter, task.tensors, task, data, local, "equal", rounds=5)


def task_of(round: int = 0, shift: float = 0.0) -> ClientTask:
    tensors = {name: value + shift for name, value in adapter_of().tensors().items()}
    return ClientTask(round, "a", "fedavg", tensors, 11 + round, "")


def same(left: Update, right: Update) -> bool:
    return all(torch.equal(left.delta[name], right.delta[name]) for name in left.delta)


def test_a_task_that_is_repeated_gives_the_same_bits_and_another_has_other_noise() -> None:
    sgd = replace(LOCAL, optimizer="sgd", lr=1.0)
    private = rows(clip_norm=1e-3, z=1000.0, local=sgd)
    first = update_of(private, task_of(), sgd)
    assert same(first, update_of(private, task_of(), sgd))
    others = [update_of(private, task, sgd) for task in (task_of(1), task_of(0, 1e-6))]
    others.append(update_of(replace(private, key=bytes(32)), task_of(), sgd))
    a = torch.cat([value.flatten() for value in first.delta.values()])
    for other in others:
        b = torch.cat([value.flatten() for value in other.delta.values()])
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 4.5 / math.sqrt(len(a))
    with pytest.raises(FlocktuneError, match="secret key"):
        update_of(replace(private, key=None), task_of(), sgd)


def first_lot(private: PrivateRows, task: ClientTask) -> list[int]:
    """The rows of every step, in their order."""
    return [int(row) for lot in private.lots(private.of_task(task, task.tensors)) for row in (*lot.index, -1)]


@pytest.mark.parametrize("what", ["recipe", "model", "a tensor that is not trained", "a row"])
def test_no_two_tasks_and_no_two_sets_of_rows_share_samples_and_noise(what: str) -> None:
    """Two sums under one noise show their difference in the clear; 2 noises of one draw show what they hide."""
    sgd, task = replace(LOCAL, optimizer="sgd", lr=1.0, steps=1), task_of()
    private = replace(rows(clip_norm=1e-3, z=1000.0, local=sgd), steps=9)
    other, asked = private, task
    match what:
        case "recipe":
            asked = replace(task, config_digest="another")
        case "model":
            asked = replace(task, model_digest="another")
        case "a row":
            changed = encoded_rows()
            changed.tokens[-1] ^= 1
            other = replace(private, encoded=changed)
        case _:
            asked = replace(task, tensors={**task.tensors, "fixed/w": torch.ones(1)})
    assert first_lot(private, task) == first_lot(replace(private), task)
    assert first_lot(private, task) != first_lot(other, asked)
    left, right = (
        one.gradient(one.of_task(ask, task_of().tensors), 4) for one, ask in ((private, task), (other, asked))
    )
    noises = []
    for step in (left, right):
        adapter = adapter_of()
        lot = collate(encoded_rows(), [0, 1], batching="padded", pad_id=2)
        step(adapter.model, adapter.parameters, [lot], next_token_loss)
        noises.append(torch.cat([value.grad.flatten() for value in adapter.parameters.values()]).double())
    assert abs(float(torch.corrcoef(torch.stack(noises))[0, 1])) < 4.5 / math.sqrt(len(noises[0]))


def test_a_method_with_a_gradient_of_its_own_is_refused() -> None:
    adapter, task = adapter_of(), task_of()
    data = ClientData(10, 99, lambda seed, steps, epochs: iter(()), rows())
    with pytest.raises(ValueError, match="makes a step's gradient"):
        train_locally(
            adapter, task.tensors, task, data, LOCAL, "equal", rounds=5,
            gradient=lambda *arguments: mean_gradient(*arguments),
        )  # fmt: skip


def test_a_ledger_counts_every_step_and_ends_a_clients_part() -> None:
    after_two, after_three = (Budget(0.4, 1.0, 1e-3).epsilon(steps) for steps in (6, 9))
    private = rows(max_epsilon=(after_two + after_three) / 2)
    half = accounted(
        lambda task, memory: (update_of(private, task), {**memory, "own": torch.ones(1)}), lambda name: private
    )
    memory = {}
    for number in range(2):
        reply, memory = answer(task_of(number), half, memory)
        assert isinstance(reply, Update)
        assert reply.metrics["epsilon"].value == pytest.approx(Budget(0.4, 1.0, 1e-3).epsilon(3 * (number + 1)))
        assert reply.metrics.keys() == {"steps", "epsilon", "seconds"}, "nothing else is made of rows without noise"
    assert int(memory[STEPS]) == 6
    assert "own" in memory
    reply, unchanged = answer(task_of(2), half, memory)
    assert isinstance(reply, Failure)
    assert "budget is spent" in reply.reason
    assert unchanged is memory


def test_epsilon_calibrates_the_noise_for_a_clients_own_rows_and_all_rounds() -> None:
    few, many = rows(count=5, noise_multiplier=None, epsilon=4.0), rows(count=10, noise_multiplier=None, epsilon=4.0)
    assert few.budget.noise_multiplier > many.budget.noise_multiplier
    for private in (few, many):
        assert 3.9 < private.budget.epsilon(15) <= 4.0


# --- recipes and whole runs ------------------------------------------------------------------------

SAMPLE = "privacy: {kind: sample, clip_norm: 1.0, delta: 1.0e-5, epsilon: 8.0}\nlocal: {steps: 2, clip_norm: 0.0}\n"


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("data.batching=packed", "data.batching: expected padded"),
        ("local.clip_norm=1.0", "local.clip_norm: expected 0"),
        ("lora.dropout=0.1", "lora.dropout: expected 0"),
        ("aggregation.weights=tokens", "aggregation.weights: expected equal or examples"),
    ],
)
def test_a_recipe_that_would_not_keep_the_promise_is_refused(override: str, reason: str) -> None:
    assert parse_recipe(SAMPLE).privacy == SamplePrivacy(1.0, 1e-5, epsilon=8.0)
    with pytest.raises(UserError, match=reason):
        parse_recipe(SAMPLE, [override])


PRIVATE = (
    "allocation={kind: natural}", "rounds=3", "local.clip_norm=0.0", "local.accumulate=2",
    "privacy={kind: sample, clip_norm: 0.5, delta: 1.0e-3, noise_multiplier: 1.0}",
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_federated_world(tmp_path_factory.mktemp("rows"))


def events(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [event for event in lines if event["event"] == "round"]


def test_owners_with_their_own_keys_compute_what_one_process_does(world: Path, tmp_path: Path) -> None:
    here, apart = (new_run(world, tmp_path / name, *PRIVATE) for name in ("here", "apart"))
    expected = execute(here)
    homes = tmp_path / "homes"
    owners = {client: make_owner(world, client, homes / client) for client in SIZES}
    for client in SIZES:
        (homes / client / PRIVACY_KEY).write_bytes((here / "secret.key").read_bytes())
    link = Direct({client: owner.answer for client, owner in owners.items()})
    summary = run_apart(apart, link)
    assert summary["adapter_sha256"] == expected["adapter_sha256"]
    assert summary["privacy"] == expected["privacy"]
    assert "add/remove one row" in summary["privacy"]["said"]
    most = max(Budget(min(1.0, 8 / size), 1.0, 1e-3).epsilon(6) for size in SIZES.values())
    assert summary["privacy"]["epsilon"] == pytest.approx(most)
    assert all(client["loss"] is None for event in events(apart) for client in event["clients"].values())


def test_a_client_whose_budget_is_spent_is_left_out_with_its_reason(world: Path, tmp_path: Path) -> None:
    """alice has 7 rows, all of which every step takes: her budget lasts one round, carol's two."""
    most = Budget(1.0, 1.0, 1e-3).epsilon(2) * 1.01
    folder = new_run(
        world, tmp_path / "run", *PRIVATE, f"privacy.max_epsilon={most}", "rounds=2", "scheduling.quorum=0.3"
    )
    execute(folder)
    first, second = events(folder)
    assert set(first["answered"]) == set(SIZES)
    [failure] = [failure for failure in second["failures"] if failure["client"] == "alice"]
    assert "privacy budget is spent" in failure["reason"]
    assert "carol" in second["answered"]


def test_fedbiots_rows_are_hidden_too(world: Path, tmp_path: Path) -> None:
    from tiny_federation import FEDBIOT

    settings = [each for each in FEDBIOT if "proximal" not in each]
    summary = execute(new_run(world, tmp_path / "run", *PRIVATE, *settings, "rounds=2"))
    assert summary["privacy"]["epsilon"] > 0
