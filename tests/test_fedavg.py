"""FedIT's halves on a real (tiny, random) model, against a plain PyTorch loop written without our types."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flocktune.algorithms import fedavg
from flocktune.algorithms.local import ClientData, steps_per_round
from flocktune.config.schema import AggregationConfig, LocalConfig, LoraConfig
from flocktune.data.batching import training_batches
from flocktune.data.encoding import Encoded
from flocktune.engine.in_process import InProcess
from flocktune.engine.rounds import run_rounds
from flocktune.models.lora import Adapter, attach
from flocktune.scheduling import Cohort
from flocktune.seeds import derive_seed
from flocktune.types import ClientTask
from tiny_models import tiny_model

SEED, ROUNDS = 5, 2
ROWS = {"a": [0, 1, 2], "b": [3, 4, 5, 6, 7], "c": [8, 9]}
LORA = LoraConfig(rank=2, alpha=4.0)
LOCAL = LocalConfig(steps=2, batch_size=2, lr=1e-2, clip_norm=1.0)


def encoded_rows() -> Encoded:
    """Ten rows of 6 to 15 random tokens; the second half of each is trained on."""
    draw = np.random.default_rng(0)
    rows = [draw.integers(3, 250, size=6 + number) for number in range(10)]
    masks = [np.arange(len(row)) >= len(row) // 2 for row in rows]
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return Encoded(np.concatenate(rows).astype(np.int32), np.concatenate(masks), offsets)


def batches(client: str, seed: int, local: LocalConfig):
    return training_batches(
        encoded_rows(), ROWS[client], batch_size=local.batch_size, batching="padded", pad_id=2, seed=seed,
        steps=None if local.steps is None else local.steps * local.accumulate, epochs=local.epochs,
    )  # fmt: skip


def federate(
    local: LocalConfig, weights: str = "examples", clients: tuple[str, ...] = ("a", "b", "c")
) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    adapter = attach(tiny_model("llama"), LORA, seed=SEED)

    def data(client: str) -> ClientData:
        rows = ROWS[client]
        tokens = int(encoded_rows().targets[rows].sum())
        return ClientData(len(rows), tokens, lambda seed, steps, epochs: batches(client, seed, local))

    server = fedavg.server_half(AggregationConfig())
    half = fedavg.client_half(adapter, data, local, weights, rounds=ROUNDS)
    state = run_rounds(
        server, InProcess(half), lambda number: Cohort(clients, len(clients), 1), server.init(adapter.tensors()),
        rounds=ROUNDS, kind="fedavg", seed=SEED,
    )  # fmt: skip
    return dict(server.result(state))


def textbook(weights: dict[str, float], mu: float = 0.0) -> dict[str, torch.Tensor]:
    """Plain loops: logits at every position, cross-entropy with -100, a fresh AdamW, plain sums of parameters."""
    torch.manual_seed(0)
    adapter: Adapter = attach(tiny_model("llama"), LORA, seed=SEED)
    model, parameters = adapter.model, adapter.parameters
    everyone = {name: value.detach().clone() for name, value in parameters.items()}
    for number in range(ROUNDS):
        trained = {}
        for client in weights:
            for name, value in parameters.items():
                value.data.copy_(everyone[name])
            optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.0)
            order = derive_seed(derive_seed(SEED, number, client), "batches")
            for batch in batches(client, order, LOCAL):
                labels = torch.full((batch.input_ids.numel() + 1,), -100)
                labels[batch.label_index + 1] = batch.targets
                targets = labels[1:].view(batch.input_ids.shape)
                logits = model(input_ids=batch.input_ids).logits
                loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
                loss = loss + mu / 2 * sum(
                    (value - everyone[name]).square().sum() for name, value in parameters.items()
                )
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
                optimizer.step()
            trained[client] = {name: value.detach().clone() for name, value in parameters.items()}
        whole = sum(weights.values())
        everyone = {
            name: sum(weight / whole * trained[client][name] for client, weight in weights.items()) for name in everyone
        }
    return everyone


def assert_close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(
            left[name], right[name], atol=2e-5, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize(
    ("weights", "by_hand"),
    [
        ("examples", {"a": 3, "b": 5, "c": 2}),
        ("tokens", {"a": 11, "b": 29, "c": 15}),
        ("equal", {"a": 1, "b": 1, "c": 1}),
    ],
)
def test_fedit_equals_the_textbook_loop(weights: str, by_hand: dict[str, float]) -> None:
    assert_close(federate(LOCAL, weights), textbook(by_hand))


def test_weights_matter() -> None:
    by_examples, equal = federate(LOCAL, "examples"), federate(LOCAL, "equal")
    assert any(not torch.allclose(by_examples[name], equal[name], atol=1e-4) for name in equal)


def test_one_client_is_local_training() -> None:
    assert_close(federate(LOCAL, clients=("b",)), textbook({"b": 1}))


def test_fedprox_is_the_penalty_of_its_paper_and_nothing_at_zero() -> None:
    with_mu = LocalConfig(steps=2, batch_size=2, lr=1e-2, clip_norm=1.0, proximal_mu=3.0)
    assert_close(federate(with_mu), textbook({"a": 3, "b": 5, "c": 2}, mu=3.0))
    plain, zero = federate(LOCAL), federate(LocalConfig(steps=2, batch_size=2, lr=1e-2, clip_norm=1.0, proximal_mu=0.0))
    assert all(torch.equal(plain[name], zero[name]) for name in plain)


def test_a_task_alone_decides_its_update() -> None:
    """The half keeps nothing between calls, so a task may run again, or elsewhere, to the same bits."""
    adapter = attach(tiny_model("llama"), LORA, seed=SEED)
    half = fedavg.client_half(
        adapter,
        lambda client: ClientData(3, 9, lambda seed, steps, epochs: batches(client, seed, LOCAL)),
        LOCAL,
        "equal",
        rounds=2,
    )
    task = ClientTask(0, "a", "fedavg", adapter.tensors(), 1, "")
    first, _ = half(task, {})
    half(ClientTask(0, "b", "fedavg", first.delta, 2, ""), {})
    again, _ = half(task, {})
    assert all(torch.equal(first.delta[name], again.delta[name]) for name in first.delta)


@pytest.mark.parametrize(
    ("local", "examples", "steps"),
    [
        (LocalConfig(steps=7), 3, 7),
        (LocalConfig(epochs=1, batch_size=8), 17, 3),
        (LocalConfig(epochs=2, batch_size=8), 17, 6),
        (LocalConfig(epochs=1, batch_size=4, accumulate=2), 17, 3),
    ],
)
def test_steps_of_a_round(local: LocalConfig, examples: int, steps: int) -> None:
    assert steps_per_round(local, examples) == steps


def test_a_rate_over_the_whole_run_goes_on_where_the_round_before_ended() -> None:
    """Linear decay to zero over both rounds: the second round must move less than with a restart."""
    over_run = LocalConfig(steps=2, batch_size=2, lr=1e-2, schedule="linear", schedule_over="run")
    over_round = LocalConfig(steps=2, batch_size=2, lr=1e-2, schedule="linear", schedule_over="round")
    moved = {}
    for name, local in (("run", over_run), ("round", over_round)):
        adapter = attach(tiny_model("llama"), LORA, seed=SEED)
        data = ClientData(3, 9, lambda seed, steps, epochs, local=local: batches("a", seed, local))
        half = fedavg.client_half(adapter, lambda client, data=data: data, local, "equal", rounds=2)
        update, _ = half(ClientTask(1, "a", "fedavg", adapter.tensors(), 1, ""), {})
        moved[name] = sum(float(value.abs().sum()) for value in update.delta.values())
    assert moved["run"] < 0.7 * moved["round"]
