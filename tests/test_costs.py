"""What a client's step costs, counted: FLOPs to the last one, and that nothing below the cut is kept or computed."""

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import World, dolly_rows, write_rows
from flocktune.algorithms.local import training_only
from flocktune.algorithms.prefix import PrefixCache
from flocktune.api import run
from flocktune.config.load import load_recipe
from flocktune.config.schema import EmulatorConfig, LoraConfig
from flocktune.costs import StepCost, least_forward_flops, measure_step
from flocktune.data.batching import Batch
from flocktune.errors import UserError
from flocktune.files import read_json
from flocktune.models.layers import drop_layers
from flocktune.models.lora import Adapter, attach
from flocktune.models.lora_module import features
from flocktune.models.split import SplitPlan, plan_split
from flocktune.training import next_token_loss
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer

ROWS, LENGTH, TOKENS = 3, 16, 48
WIDTH, RANK, VOCABULARY = 32, 2, 260
LORA = LoraConfig(rank=RANK)


def batch(labels: int = 7) -> Batch:
    """Three rows of 16 tokens, without padding; the last ``labels`` tokens of each are targets."""
    ids = torch.arange(TOKENS).view(ROWS, LENGTH) * 5 % VOCABULARY
    places = torch.arange(TOKENS).view(ROWS, LENGTH)[:, -labels - 1 : -1].flatten()
    return Batch(
        ids, None, places, ids[:, -labels:].flatten(), np.arange(ROWS), np.full(ROWS, LENGTH), np.full(ROWS, labels)
    )


def full(layers: int, lora: LoraConfig = LORA) -> Adapter:
    return attach(tiny_model("llama", layers=layers), lora, seed=0)


def emulator(layers: int, drop: float = 0.5) -> tuple[Adapter, SplitPlan]:
    """Of a full model of ``layers`` layers, of which the last two are the adapter's."""
    model = tiny_model("llama", layers=layers)
    plan = plan_split(layers, EmulatorConfig(drop=drop), stack="model.layers")
    return attach(drop_layers(model, plan), LORA, seed=0), plan


def fedbiot_steps(held: Adapter, plan: SplitPlan, cache: str = "memory") -> list[StepCost]:
    """A client's first step, and the same rows' in the next epoch."""
    prefix = PrefixCache(held.model, plan.stack, plan.frozen, EmulatorConfig(cache=cache))  # type: ignore[arg-type]
    with training_only(held, [name for name in held.parameters if plan.in_adapter(name)]):
        return [measure_step(held.model, batch(), prefix.loss) for _ in range(2)]


def one_layer(held: Adapter) -> tuple[int, int, int]:
    """FLOPs a token of a layer's forward pass: its frozen weights, its LoRA, its attention."""
    own = [features(layer.base) for name, layer in held.layers.items() if name.startswith("model.layers.0.")]
    weights = 2 * sum(inputs * outputs for inputs, outputs in own)
    return weights, 2 * RANK * sum(map(sum, own)), 4 * LENGTH * WIDTH


def trained_backward(held: Adapter, layers: int) -> int:
    """FLOPs a token of the backward pass through the top ``layers`` layers, of whose input nobody wants a gradient.

    A layer: the gradient of its input through the frozen weights (one pass), both gradients of both low-rank products,
    and attention's five products instead of two. In the lowest of them queries, keys and values pass nothing on.
    """
    weights, lora, attention = one_layer(held)
    unasked = [features(held.layers[f"model.layers.0.self_attn.{name}_proj"].base) for name in "qkv"]
    saved = sum(2 * inputs * outputs + 2 * RANK * inputs for inputs, outputs in unasked)
    return layers * (weights + 2 * lora + 5 * attention // 2) - saved


def test_a_full_models_step_is_two_passes_through_every_layer() -> None:
    held = full(6)
    cost = measure_step(held.model, batch())
    weights, lora, attention = one_layer(held)
    assert cost.layer_forward_flops == TOKENS * 6 * (weights + lora + attention)
    assert cost.layer_backward_flops == TOKENS * trained_backward(held, 6)
    without_lora = cost.layer_forward_flops + cost.layer_backward_flops - TOKENS * 6 * 3 * lora
    assert without_lora / TOKENS / (weights + attention) == pytest.approx(2 * 6, rel=0.1)


def test_elsewhere_is_the_head_at_label_positions() -> None:
    cost = measure_step(full(2).model, batch(labels=5))
    head = 2 * WIDTH * VOCABULARY * ROWS * 5
    rotary = 2 * LENGTH * (WIDTH // 4 // 2)  # angles: positions times frequencies, one product for all rows
    assert cost.other_forward_flops - 2 * head in (0, rotary), "its loss and its gradient are computed at once"
    assert cost.other_backward_flops == 0
    assert cost.flops == cost.forward_flops + cost.backward_flops
    assert cost.flops_per_token == cost.flops / TOKENS


@pytest.mark.parametrize("layers", [6, 12])
def test_a_fedbiot_clients_layer_passes(layers: int) -> None:
    held, plan = emulator(layers)
    first, cached = fedbiot_steps(held, plan)
    weights, lora, attention = one_layer(held)
    kept, own = len(plan.kept), len(plan.adapter)
    assert (kept, own, plan.frozen) == ((layers - 2) // 2, 2, kept)
    assert first.layer_forward_flops == TOKENS * (kept + own) * (weights + lora + attention)
    assert cached.layer_forward_flops == TOKENS * own * (weights + lora + attention)  # not one of the emulator
    assert first.layer_backward_flops == cached.layer_backward_flops == TOKENS * trained_backward(held, own)
    for cost, forward in ((first, kept + own), (cached, own)):
        low_rank = TOKENS * lora * (forward + 2 * own)
        flops = cost.layer_forward_flops + cost.layer_backward_flops - low_rank
        assert flops / TOKENS / (weights + attention) == pytest.approx(forward + own, rel=0.1)


def test_without_a_cache_every_step_is_the_first() -> None:
    first, again = fedbiot_steps(*emulator(6), cache="none")
    assert first == again


def test_frozen_weights_need_no_gradient_of_their_own() -> None:
    held = full(3)
    frozen = measure_step(held.model, batch())
    for layer in held.layers.values():
        layer.weight.requires_grad_(True)
    thawed = measure_step(held.model, batch())
    assert thawed.forward_flops == frozen.forward_flops
    assert thawed.backward_flops - frozen.backward_flops == TOKENS * 3 * one_layer(held)[0]


def test_nothing_is_kept_of_the_emulator() -> None:
    small, large = ([cost.activation_bytes for cost in fedbiot_steps(*emulator(layers))] for layers in (6, 14))
    assert small == large
    assert small[0] == small[1] > 0
    of_all = [measure_step(full(layers).model, batch()).activation_bytes for layers in (2, 4, 6)]
    assert of_all[1] - of_all[0] == of_all[2] - of_all[1] > 0
    assert small[0] == pytest.approx(of_all[0], rel=0.02)  # the adapter's two layers, and the head


def test_no_graph_reaches_through_the_emulator() -> None:
    held, plan = emulator(6)
    prefix = PrefixCache(held.model, plan.stack, plan.frozen, EmulatorConfig())
    layers: Any = held.model.get_submodule(plan.stack)
    seen: list[tuple[bool, bool]] = []
    for layer in layers:
        layer.register_forward_hook(lambda _, args, out: seen.append((args[0].requires_grad, out.requires_grad)))
    with training_only(held, [name for name in held.parameters if plan.in_adapter(name)]):
        assert not prefix.states(batch()).requires_grad
        prefix.loss(held.model, batch())
    assert seen == [(False, False)] * plan.frozen + [(False, True), (True, True)]


def test_what_is_kept_is_counted_once_and_without_the_weights() -> None:
    held = full(2)
    kept: dict[int, torch.Tensor] = {}
    mine = {value.data_ptr() for value in held.model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x):
        next_token_loss(held.model, batch())
    at_most = sum(value.untyped_storage().nbytes() for at, value in kept.items() if at not in mine)
    assert 0 < measure_step(held.model, batch()).activation_bytes <= at_most


def test_recomputed_layers_keep_their_inputs_only_and_run_twice() -> None:
    from flocktune.models.recompute import checkpoint_layers

    plain = measure_step(full(3).model, batch())
    held = full(3)
    checkpoint_layers(held.model)
    again = measure_step(held.model, batch())
    assert again.forward_flops == plain.forward_flops
    extra = again.layer_backward_flops - plain.layer_backward_flops
    assert 0.8 * plain.layer_forward_flops < extra <= plain.layer_forward_flops  # it stops at the last that is needed
    assert again.activation_bytes < plain.activation_bytes


def test_all_is_left_as_it_was() -> None:
    held = full(2, replace(LORA, dropout=0.5))
    held.model.train()
    held.model.model.layers[0].eval()
    for value in held.parameters.values():
        value.grad = torch.full_like(value, 3.0)
    before = held.tensors()
    modes = [module.training for module in held.model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in held.model.modules()]
    state = torch.get_rng_state()
    first, again = measure_step(held.model, batch()), measure_step(held.model, batch())
    assert first == again
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in held.model.modules()] == modes
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in held.model.modules()] == hooks
    assert all(torch.equal(value.grad, torch.full_like(value, 3.0)) for value in held.parameters.values())
    assert all(torch.equal(value, before[name]) for name, value in held.tensors().items())


def test_a_failing_loss_leaves_all_as_it_was() -> None:
    held = full(2)
    held.model.train()

    def broken(*_: Any) -> torch.Tensor:
        torch.rand(1)
        raise UserError("no")

    state = torch.get_rng_state()
    with pytest.raises(UserError):
        measure_step(held.model, batch(), broken)
    assert all(module.training for module in held.model.modules())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_attention_and_linear_layers_are_counted(family: str) -> None:
    held = attach(tiny_model(family), LORA, seed=0)
    cost = measure_step(held.model, batch())
    attention = 2 * 4 * LENGTH * WIDTH
    least = (least_forward_flops(held) + attention) * TOKENS
    assert least < cost.layer_forward_flops < 1.5 * least
    assert 0.7 < cost.layer_backward_flops / cost.layer_forward_flops < 1.5


def numbers(folder: Path, recipe: Path, *changes: str) -> dict[str, float]:
    summary = run(load_recipe(recipe, ["rounds=1", "evaluation.generate=false", *changes]), folder)
    assert summary == read_json(folder / "summary.json")
    return summary.get("client_cost", {})


FIRST = {
    "tokens_per_step",
    "flops_per_step",
    "forward_flops_per_step",
    "backward_flops_per_step",
    "flops_per_token_first",
    "layer_flops_per_token_first",
    "activation_bytes",
}
ONE = "scheduling={selection: {kind: named, clients: [client-02]}}"


@pytest.mark.parametrize("changes", [("method=fedit",), ("method=local", ONE), ("method=centralised",)])
def test_a_run_tells_what_a_step_of_its_clients_costs(world: World, tmp_path: Path, changes: tuple[str, ...]) -> None:
    found = numbers(tmp_path / "a", world.recipe, *changes)
    assert set(found) == FIRST
    assert found["forward_flops_per_step"] + found["backward_flops_per_step"] == found["flops_per_step"]
    assert found["flops_per_step"] == pytest.approx(found["flops_per_token_first"] * found["tokens_per_step"])
    assert 0 < found["layer_flops_per_token_first"] < found["flops_per_token_first"]
    assert found == numbers(tmp_path / "b", world.recipe, *changes)


@pytest.mark.parametrize("changes", [("method=base",), ("rounds=0",)])
def test_a_run_that_trains_nothing_tells_nothing(world: World, tmp_path: Path, changes: tuple[str, ...]) -> None:
    assert numbers(tmp_path / "a", world.recipe, *changes) == {}


def test_a_run_of_fedbiot_tells_of_a_cached_step_too(tmp_path: Path) -> None:
    tiny_model("llama", layers=6).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", dolly_rows(30))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""
model: {{path: {tmp_path / "model"}}}
lora: {{rank: 2}}
data: {{train: {rows}, template: short, max_tokens: 96, test_rows_per_category: 1}}
allocation: {{kind: iid, clients: 2}}
local: {{steps: 1, batch_size: 4}}
alignment: {{public: {rows}, first_steps: 0, steps: 0, fidelity_rows: 0}}
runtime: {{device: cpu, threads: 1}}
""")
    found = numbers(tmp_path / "biot", recipe, "method=fedbiot")
    assert set(found) == {*FIRST, "flops_per_token_cached"}
    assert found["flops_per_token_first"] > 1.3 * found["flops_per_token_cached"]  # six passes and four, and the head
    assert set(numbers(tmp_path / "off", recipe, "method=fedbiot", "emulator={cache: none}")) == FIRST
    whole = numbers(tmp_path / "fedit", recipe, "method=fedit")
    assert whole["tokens_per_step"] == found["tokens_per_step"]
    assert whole["flops_per_step"] > found["flops_per_step"]
    assert whole["activation_bytes"] > 2 * found["activation_bytes"]


def test_what_can_not_be_counted_is_left_out_and_said(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("flocktune.costs.least_forward_flops", lambda adapter: 10**12)
    with caplog.at_level(logging.WARNING):
        assert numbers(tmp_path / "a", world.recipe) == {}
    assert "without client_cost" in caplog.text


@pytest.mark.parametrize("error", [UserError("no list of layers"), torch.OutOfMemoryError("too long a row")])
def test_a_step_that_can_not_be_made_breaks_no_run(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def broken(*_: Any) -> Iterable[StepCost]:
        raise error

    monkeypatch.setattr("flocktune.costs.measure_step", broken)
    with caplog.at_level(logging.WARNING):
        assert numbers(tmp_path / "a", world.recipe) == {}
    assert str(error) in caplog.text
