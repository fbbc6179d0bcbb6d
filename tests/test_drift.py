"""SCAFFOLD and FedDyn against their papers: textbook loops without our types, and where they come to rest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from conftest import World
from flocktune.algorithms import drift, fedavg
from flocktune.algorithms.local import ClientData
from flocktune.assemble import federation
from flocktune.config.drift import FedDyn, Scaffold
from flocktune.config.load import load_recipe
from flocktune.config.schema import AggregationConfig, LocalConfig, ServerSgd
from flocktune.engine.in_process import InProcess
from flocktune.engine.rounds import run_rounds
from flocktune.errors import UserError
from flocktune.models.lora import attach
from flocktune.scheduling import Cohort
from flocktune.seeds import derive_seed
from flocktune.types import ClientTask, Update
from test_fedavg import LORA, ROWS, assert_close, batches, encoded_rows
from tiny_models import tiny_model

SIZE, CLIENTS, STEPS, LR, ALPHA = 3, 5, 10, 0.1, 1.0
EVERYONE = tuple(f"client-{number}" for number in range(CLIENTS))


# --- quadratics: loss_k(w) = 1/2 (w - b_k)' H_k (w - b_k), curvatures and minima that differ ----------


@cache
def problems() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Client -> (H_k, b_k)."""
    draw = torch.Generator().manual_seed(1)
    found = {}
    for client in EVERYONE:
        root = torch.randn(SIZE, SIZE, generator=draw, dtype=torch.float64)
        curvature = 0.3 * torch.eye(SIZE, dtype=torch.float64) + 0.3 * root @ root.T
        found[client] = curvature, 3 * torch.randn(SIZE, generator=draw, dtype=torch.float64)
    return found


def optimum(weights: Mapping[str, float]) -> torch.Tensor:
    """Where the weighted mean loss is least."""
    whole = sum(weight * problems()[client][0] for client, weight in weights.items())
    pulled = sum(weight * problems()[client][0] @ problems()[client][1] for client, weight in weights.items())
    return torch.linalg.solve(whole, pulled)


def quadratic_half(weights: Mapping[str, float], optimizer: str = "sgd", steps: int = STEPS):
    """A method's client half on these problems, as fit() has it: gradient and penalty, adjusted, then a step."""

    def make(penalty, adjust):
        def train(task: ClientTask, memory):
            curvature, minimum = (part.float() for part in problems()[task.client])
            w = nn.Parameter(task.tensors["w"].clone())
            kinds = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
            rule = kinds[optimizer]([w], lr=LR, **({"weight_decay": 0.0} if optimizer == "adamw" else {}))
            for _ in range(steps):
                (0.5 * (w - minimum) @ curvature @ (w - minimum)).backward()
                if penalty is not None:
                    penalty({"w": w}).backward()
                if adjust is not None:
                    adjust({"w": w})
                rule.step()
                rule.zero_grad(set_to_none=True)
            return Update({"w": w.detach() - task.tensors["w"]}, weights[task.client]), memory

        return train

    return make


def federate(correction, weights: Mapping[str, float], rounds: int, per_round: int = CLIENTS, **half) -> dict:
    """State after ``rounds`` of ``per_round`` of the clients, and everyone's memory."""
    server = drift.corrected_server(correction, fedavg.server_half(AggregationConfig()), sum(weights.values()))
    engine = InProcess(drift.corrected_client(correction, quadratic_half(weights, **half)))
    state = run_rounds(
        server, engine, lambda number: Cohort(cohort(number, per_round), per_round, per_round),
        server.init({"w": torch.zeros(SIZE)}), rounds=rounds, kind="fedavg", seed=0,
    )  # fmt: skip
    return {"state": state, "memories": engine.memories, "w": server.result(state)["w"]}


def cohort(number: int, per_round: int) -> tuple[str, ...]:
    drawn = np.random.default_rng(number).permutation(CLIENTS)[:per_round]
    return tuple(EVERYONE[place] for place in sorted(drawn))


EQUAL = dict.fromkeys(EVERYONE, 1.0)
UNEQUAL = dict(zip(EVERYONE, (1.0, 7.0, 2.0, 20.0, 4.0), strict=True))


@pytest.mark.parametrize("weights", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
@pytest.mark.parametrize("per_round", [CLIENTS, 2], ids=["everyone", "two of five"])
@pytest.mark.parametrize("correction", [Scaffold(), FedDyn(ALPHA)], ids=["scaffold", "feddyn"])
def test_corrected_clients_reach_the_minimum_that_fedavg_misses(correction, per_round: int, weights) -> None:
    best = optimum(weights)
    plain = federate(None, weights, 30)["w"].double()
    assert (plain - best).norm() > 0.1  # all clients in every round, and yet it stays away
    corrected_w = federate(correction, weights, 60 if per_round == CLIENTS else 160, per_round)["w"].double()
    assert (corrected_w - best).norm() < 1e-3


def test_with_one_local_step_nothing_drifts() -> None:
    """FedAvg is then gradient descent: it reaches the minimum by itself, and SCAFFOLD is the same from its start."""
    best = optimum(EQUAL)
    assert (federate(None, EQUAL, 200, steps=1)["w"].double() - best).norm() < 1e-3
    first = [federate(correction, EQUAL, 1)["w"] for correction in (None, Scaffold())]
    assert torch.equal(*first)  # in the first round all control variates are zero


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_servers_variates_are_the_weighted_means_of_the_clients(optimizer: str) -> None:
    for correction, name in ((Scaffold(), "control"), (FedDyn(ALPHA), "linear")):
        found = federate(correction, UNEQUAL, 7, 2, optimizer=optimizer)
        mean = sum(
            UNEQUAL[client] / sum(UNEQUAL.values()) * memory[f"{name}/w"].double()
            for client, memory in found["memories"].items()
        )
        torch.testing.assert_close(found["state"][f"{name}/w"].double(), mean, atol=1e-5, rtol=1e-5)


def test_scaffold_equals_algorithm_1() -> None:
    """With option II, in float64: c_k+ = c_k - c + (w_t - w_k) / (K lr)."""
    w, c = torch.zeros(SIZE, dtype=torch.float64), torch.zeros(SIZE, dtype=torch.float64)
    mine = {client: torch.zeros(SIZE, dtype=torch.float64) for client in EVERYONE}
    for number in range(6):
        moved, changed = [], []
        for client in cohort(number, 3):
            curvature, minimum = problems()[client]
            y = w.clone()
            for _ in range(STEPS):
                y = y - LR * (curvature @ (y - minimum) - mine[client] + c)
            new = mine[client] - c + (w - y) / (STEPS * LR)
            moved.append(y - w)
            changed.append(new - mine[client])
            mine[client] = new
        w = w + sum(moved) / 3
        c = c + sum(changed) / CLIENTS
    found = federate(Scaffold(), EQUAL, 6, 3)
    torch.testing.assert_close(found["w"].double(), w, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(found["state"]["control/w"].double(), c, atol=2e-5, rtol=2e-5)
    for client, memory in found["memories"].items():
        torch.testing.assert_close(memory["control/w"].double(), mine[client], atol=2e-5, rtol=2e-5)


def test_feddyn_equals_algorithm_1() -> None:
    w, h = torch.zeros(SIZE, dtype=torch.float64), torch.zeros(SIZE, dtype=torch.float64)
    mine = {client: torch.zeros(SIZE, dtype=torch.float64) for client in EVERYONE}
    for number in range(6):
        ended = {}
        for client in cohort(number, 3):
            curvature, minimum = problems()[client]
            y = w.clone()
            for _ in range(STEPS):
                y = y - LR * (curvature @ (y - minimum) - mine[client] + ALPHA * (y - w))
            mine[client] = mine[client] - ALPHA * (y - w)
            ended[client] = y
        h = h - ALPHA / CLIENTS * sum(y - w for y in ended.values())
        w = sum(ended.values()) / 3 - h / ALPHA
    found = federate(FedDyn(ALPHA), EQUAL, 6, 3)
    torch.testing.assert_close(found["w"].double(), w, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(found["state"]["linear/w"].double(), h, atol=2e-5, rtol=2e-5)


def test_a_round_without_clients_changes_nothing() -> None:
    for correction in (Scaffold(), FedDyn(ALPHA)):
        server = drift.corrected_server(correction, fedavg.server_half(AggregationConfig()), 5.0)
        engine = InProcess(drift.corrected_client(correction, quadratic_half(EQUAL)))
        state = federate(correction, EQUAL, 3)["state"]
        after = run_rounds(
            server, engine, lambda number: Cohort((), 0, 0), state, rounds=2, kind="fedavg", seed=0
        )  # fmt: skip
        assert {name: value.tolist() for name, value in after.items()} == {
            name: value.tolist() for name, value in state.items()
        }


def test_a_method_that_does_not_average_can_not_be_corrected() -> None:
    half = replace(fedavg.server_half(AggregationConfig()), combine=lambda updates, message: next(iter(updates)))
    with pytest.raises(ValueError, match="averages"):
        drift.corrected_server(Scaffold(), half, 1.0)


# --- on a model, through fit() ------------------------------------------------------------------------

COHORTS = (("a", "b"), ("b", "c"), ("a", "b", "c"))
RATES = {"sgd": 0.1, "adamw": 3e-3}


def model_run(correction, local: LocalConfig) -> dict:
    adapter = attach(tiny_model("llama"), LORA, seed=5)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():  # B is not zero, so that A has gradients from the first step
        for value in adapter.parameters.values():
            value.add_(0.05 * torch.randn(value.shape, generator=draw))

    def data(client: str) -> ClientData:
        return ClientData(len(ROWS[client]), 1, lambda seed, steps, epochs: batches(client, seed, local))

    def make(penalty, adjust):
        return fedavg.client_half(adapter, data, local, "examples", rounds=3, penalty=penalty, adjust=adjust)

    start = adapter.tensors()
    server = drift.corrected_server(correction, fedavg.server_half(AggregationConfig()), 10.0)
    engine = InProcess(drift.corrected_client(correction, make))
    state = run_rounds(
        server, engine, lambda number: Cohort(COHORTS[number], len(COHORTS[number]), 1), server.init(start),
        rounds=3, kind="fedavg", seed=5,
    )  # fmt: skip
    return {"result": dict(server.result(state)), "memories": engine.memories, "start": start}


def textbook(correction, local: LocalConfig, start: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Plain loops over the same rows; corrections as their papers have them, before the gradient is clipped."""
    from torch.nn.functional import cross_entropy

    adapter = attach(tiny_model("llama"), LORA, seed=5)
    model, parameters = adapter.model, adapter.parameters
    w = {name: value.clone() for name, value in start.items()}
    server = {name: torch.zeros_like(value) for name, value in w.items()}
    mine = {client: {name: torch.zeros_like(value) for name, value in w.items()} for client in ROWS}
    for number, chosen in enumerate(COHORTS):
        share = {client: len(ROWS[client]) / sum(len(ROWS[other]) for other in chosen) for client in chosen}
        moved, control_moved = {}, {}
        for client in chosen:
            for name, value in parameters.items():
                value.data.copy_(w[name])
            kind = torch.optim.AdamW if local.optimizer == "adamw" else torch.optim.SGD
            optimizer = kind(parameters.values(), lr=local.lr, weight_decay=0.0)
            sums = {name: torch.zeros_like(value) for name, value in w.items()}
            steps = 0
            for batch in batches(client, derive_seed(derive_seed(5, number, client), "batches"), local):
                labels = torch.full((batch.input_ids.numel() + 1,), -100)
                labels[batch.label_index + 1] = batch.targets
                logits = model(input_ids=batch.input_ids).logits
                loss = cross_entropy(logits.flatten(0, 1), labels[1:], ignore_index=-100)
                optimizer.zero_grad()
                loss.backward()
                steps += 1
                for name, value in parameters.items():
                    if isinstance(correction, Scaffold):
                        sums[name] += value.grad
                        value.grad += server[name] - mine[client][name]
                    else:
                        value.grad += correction.alpha * (value.detach() - w[name]) - mine[client][name]
                if local.clip_norm:
                    nn.utils.clip_grad_norm_(list(parameters.values()), local.clip_norm)
                optimizer.step()
            moved[client] = {name: value.detach() - w[name] for name, value in parameters.items()}
            before = mine[client]
            if isinstance(correction, Scaffold):
                mine[client] = {name: value / steps for name, value in sums.items()}
                control_moved[client] = {name: mine[client][name] - before[name] for name in w}
            else:
                mine[client] = {name: before[name] - correction.alpha * moved[client][name] for name in w}
        mean = {name: sum(share[client] * moved[client][name] for client in chosen) for name in w}
        if isinstance(correction, Scaffold):
            for name in w:
                server[name] += sum(len(ROWS[client]) / 10 * control_moved[client][name] for client in chosen)
            w = {name: w[name] + mean[name] for name in w}
        else:
            for name in w:
                server[name] -= correction.alpha * sum(len(ROWS[c]) / 10 * moved[c][name] for c in chosen)
            w = {name: w[name] + mean[name] - server[name] / correction.alpha for name in w}
    return w


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("correction", [Scaffold(), FedDyn(0.1)], ids=["scaffold", "feddyn"])
def test_on_a_model_it_equals_the_textbook_loop(correction, optimizer) -> None:
    """With weights by examples, partial participation, and clipping that bites."""
    local = LocalConfig(
        steps=3, batch_size=2, optimizer=optimizer, lr=0.1 if optimizer == "sgd" else 3e-3, clip_norm=0.5
    )
    found = model_run(correction, local)
    assert_close(found["result"], textbook(correction, local, found["start"]))
    plain = model_run(None, local)["result"]
    assert any(not torch.allclose(plain[name], found["result"][name], atol=1e-3) for name in plain)


def test_the_mean_gradient_is_option_2_with_plain_sgd() -> None:
    """c_k - c + (w_t - w_k) / (K lr), from what travelled alone; with clipping it is not that, and need not be."""
    adapter = attach(tiny_model("llama"), LORA, seed=5)
    draw = torch.Generator().manual_seed(3)
    names = list(adapter.parameters)
    started = {name: 0.1 * torch.randn(adapter.parameters[name].shape, generator=draw) for name in names}
    everyones, mine = (
        {f"control/{name}": 0.01 * torch.randn(value.shape, generator=draw) for name, value in started.items()}
        for _ in range(2)
    )
    local = LocalConfig(steps=4, batch_size=2, optimizer="sgd", lr=0.02, clip_norm=0.0)
    data = ClientData(3, 1, lambda seed, steps, epochs: batches("a", seed, local))

    def make(penalty, adjust):
        return fedavg.client_half(
            adapter, lambda client: data, local, "equal", rounds=1, penalty=penalty, adjust=adjust
        )

    half = drift.corrected_client(Scaffold(), make)
    update, memory = half(
        ClientTask(0, "a", "fedavg", {**started, **everyones}, 1, ""), {**mine, "other": torch.ones(1)}
    )
    assert "other" in memory
    assert set(update.delta) == {*names, *everyones}
    for name in names:
        control = f"control/{name}"
        option_2 = mine[control] - everyones[control] - update.delta[name] / (4 * 0.02)
        torch.testing.assert_close(memory[control], option_2, atol=2e-5, rtol=1e-3)
        torch.testing.assert_close(update.delta[control], memory[control] - mine[control])
    assert encoded_rows().targets.sum() > 0


# --- recipes -------------------------------------------------------------------------------------------


def recipe(world: World, *overrides: str):
    return load_recipe(world.recipe, overrides)


def test_weights_of_all_are_counted_in_the_recipes_unit(world: World) -> None:
    """One round of all clients by SCAFFOLD: c is then the weighted mean of all c_k, in every unit."""
    for unit in ("examples", "tokens", "equal"):
        config = recipe(
            world,
            "local.correction={kind: scaffold}",
            f"aggregation.weights={unit}",
            "scheduling.selection.fraction=1.0",
        )
        fed = federation(config)
        engine = InProcess(fed.client)
        state = run_rounds(
            fed.server, engine, fed.schedule, fed.server.init(fed.start), rounds=1, kind=fed.kind, seed=0
        )
        encoded, rows = fed.data.train.encoded, fed.data.clients
        sizes = {
            client: {"examples": len(own), "tokens": int(encoded.targets[own].sum()), "equal": 1}[unit]
            for client, own in rows.items()
        }
        for name in [name for name in state if name.startswith("control/")]:
            mean = sum(sizes[client] * engine.memories[client][name].double() for client in rows) / sum(sizes.values())
            torch.testing.assert_close(state[name].double(), mean, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "overrides",
    [
        ("local.correction={kind: scaffold}",),
        ("local.correction={kind: feddyn, alpha: 0.1}",),
        ("local.correction={kind: scaffold}", "method=fedbiot", "emulator={adapter_layers: 1, drop: 0.0}",
         "alignment={first_steps: 2, steps: 1, batch_size: 2, fidelity_rows: 0}"),
    ],
    ids=["scaffold", "feddyn", "scaffold on fedbiot"],
)  # fmt: skip
def test_killed_after_a_round_it_goes_on_to_the_same_bits(cli, world: World, tmp_path: Path, overrides) -> None:
    from test_personal import interrupted, whole_run

    unbroken = whole_run(cli, world, tmp_path / "unbroken", overrides)
    resumed = interrupted(cli, world, tmp_path / "resumed", overrides)
    assert resumed["state"] == unbroken["state"]
    assert resumed["adapter"] == unbroken["adapter"]
    event = [json.loads(line) for line in (tmp_path / "unbroken/metrics.jsonl").read_text().splitlines()][1]
    assert event["event"] in ("round", "alignment")
    state = load_file(next((tmp_path / "unbroken/state").glob("*.safetensors")))
    group = "linear/" if "feddyn" in overrides[0] else "control/"
    corrections = [value for name, value in state.items() if name.startswith(f"state/{group}")]
    assert corrections
    assert any(value.abs().max() > 0 for value in corrections)
    assert any(name.startswith("memory/") and f"/{group}" in name for name in state)


def test_what_is_told_of_a_run_is_of_the_adapter(cli, world: World, tmp_path: Path) -> None:
    """Trained parameters and aggregation error are those of the method; the bytes are all that travel."""
    told = {}
    for name, overrides in {"plain": (), "scaffold": ("local.correction={kind: scaffold}",)}.items():
        said = cli("run", world.recipe, *overrides, "rounds=1", "evaluation.generate=false", "--out", tmp_path / name)
        assert said.code == 0, said.all
        told[name] = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    (start, first, *_), (corrected_start, corrected_first, *_) = told["plain"], told["scaffold"]
    assert corrected_start["trainable_parameters"] == start["trainable_parameters"]
    assert corrected_first["aggregation_error"] == first["aggregation_error"]
    assert corrected_first["update_norm"] == first["update_norm"]
    assert 1.9 < corrected_first["bytes_up"] / first["bytes_up"] < 2.1
    assert 1.9 < corrected_first["bytes_down"] / first["bytes_down"] < 2.1


@pytest.mark.parametrize("correction", ["{kind: scaffold}", "{kind: feddyn, alpha: 0.1}"])
def test_a_secure_sum_is_all_that_the_server_needs(cli, world: World, tmp_path: Path, correction: str) -> None:
    """The same run with secure aggregation, but for the rounding of its fixed point; own adapters stay private too."""
    from test_personal import whole_run

    common = (f"local.correction={correction}", "aggregation.weights=equal", "scheduling.selection.fraction=1.0")
    common += ("personal={kind: fine_tune, steps: 1, keep: true}", "rounds=2")
    whole_run(cli, world, tmp_path / "plain", common)
    whole_run(cli, world, tmp_path / "secure", (*common, "secure_aggregation={min_clients: 2}"))
    plain, secure = (load_file(max((tmp_path / name / "state").glob("*.safetensors"))) for name in ("plain", "secure"))
    group = "linear" if "feddyn" in correction else "control"
    servers = [name.removeprefix("state/") for name in plain if name.startswith(f"state/{group}/")]
    assert servers
    for name in servers:
        of_clients = torch.stack([secure[f"memory/client-0{number}/{name}"].double() for number in range(1, 5)])
        torch.testing.assert_close(secure[f"state/{name}"].double(), of_clients.mean(dim=0), atol=1e-5, rtol=1e-5)
        # Where a gradient is larger than the range, one round does not move the variate all the way.
        near = (secure[f"state/{name}"] - plain[f"state/{name}"]).abs() < 1e-3 + 1e-2 * plain[f"state/{name}"].abs()
        assert near.double().mean() > 0.9
    clients = sorted(path.name for path in (tmp_path / "secure/personal").iterdir())
    assert clients == ["client-01", "client-02", "client-03", "client-04"]


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (("local.correction={kind: scaffold}", "scheduling.buffered={size: 2, concurrency: 2}",
          "scheduling.selection={kind: uniform, fraction: 1.0}"), "SCAFFOLD"),
        (("local.correction={kind: feddyn}", "aggregation.server_optimizer={kind: adam}"), "FedDyn"),
        (("local.correction={kind: feddyn, alpha: 0}",), "local.correction.alpha"),
        (("local.correction={kind: scaffold, alpha: 1}",), "local.correction.alpha"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(world: World, overrides, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        recipe(world, *overrides)


def test_baselines_ignore_the_correction(world: World) -> None:
    config = recipe(world, "method=centralised", "local.correction={kind: scaffold}")
    fed = federation(config)
    assert not any(name.startswith("control/") for name in fed.server.message(fed.server.init(fed.start), 0))
    assert ServerSgd() == config.aggregation.server_optimizer
