"""Our LoRA against PEFT's: all logits, starts, gradients, merging, targets."""

import contextlib
import copy
import math
import warnings

import peft
import pytest
import torch
from torch import nn

from flocktune.config.schema import LoraConfig
from flocktune.errors import UserError
from flocktune.models.lora import attach, bare_modules, pairs, shapes
from flocktune.models.lora_module import LoraLinear, scale
from tiny_models import FAMILIES, fill, peft_twin, tiny_model

IDS = torch.randint(3, 259, (2, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_logits_equal_pefts(family: str, rslora: bool) -> None:
    lora = LoraConfig(rank=4, alpha=6.0, rslora=rslora, dropout=0.5)  # in eval mode nothing is dropped
    model = tiny_model(family)
    base = logits(model)
    adapter = attach(model, lora, seed=3)
    tensors = fill(adapter.parameters)
    expected = logits(peft_twin(family, lora, tensors))
    assert (logits(model) - expected).abs().max() < 1e-5
    assert (expected - base).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_are_those_of_pefts_all_linear(family: str) -> None:
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = peft.get_peft_model(tiny_model(family), config)
    theirs = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): tuple(value.shape)
        for name, value in twin.named_parameters()
        if "lora_" in name
    }
    assert shapes(tiny_model(family), LoraConfig(rank=2)) == theirs


def test_start_is_pefts_distribution_with_b_zero() -> None:
    adapter = attach(tiny_model("llama", hidden_size=64, intermediate_size=512), LoraConfig(rank=16), seed=0)
    for factor_a, factor_b in pairs(adapter.tensors()).values():
        bound = 1 / math.sqrt(factor_a.shape[1])
        assert not factor_b.any()
        assert factor_a.abs().max() <= bound
        assert factor_a.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_start_depends_on_seed_and_name_alone() -> None:
    wide = attach(tiny_model("llama"), LoraConfig(), seed=7).tensors()
    torch.manual_seed(99)
    narrow = attach(tiny_model("llama"), LoraConfig(targets=("v_proj",)), seed=7).tensors()
    assert all(torch.equal(value, wide[name]) for name, value in narrow.items())
    other = attach(tiny_model("llama"), LoraConfig(), seed=8).tensors()
    names = [name for name in wide if name.endswith("lora_A")]
    assert not any(torch.equal(wide[name], other[name]) for name in names)
    assert len({tuple(wide[name].flatten().tolist()) for name in names}) == len(names)


def test_reset_is_a_fresh_start() -> None:
    adapter = attach(tiny_model("llama"), LoraConfig(), seed=7)
    fill(adapter.parameters)
    adapter.reset(8)
    fresh = attach(tiny_model("llama"), LoraConfig(), seed=8).tensors()
    assert all(torch.equal(value, fresh[name]) for name, value in adapter.tensors().items())


def test_global_random_state_is_left_alone() -> None:
    model = tiny_model("llama")
    before = torch.random.get_rng_state()
    attach(model, LoraConfig(), seed=7)
    assert torch.equal(before, torch.random.get_rng_state())


def test_names_are_canonical_and_in_module_order() -> None:
    adapter = attach(tiny_model("llama"), LoraConfig(targets=("v_proj", "q_proj")), seed=0)
    assert list(adapter.parameters) == [
        f"model.layers.{layer}.self_attn.{module}.lora_{factor}"
        for layer in (0, 1)
        for module in ("q_proj", "v_proj")
        for factor in "AB"
    ]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("gpt2", {"attn.c_attn", "attn.c_proj"}),
    ],
)
def test_attention_means_projections_of_attention_blocks(family: str, expected: set[str]) -> None:
    modules = pairs(attach(tiny_model(family), LoraConfig(targets="attention"), seed=0).tensors())
    assert all(any(name.endswith("." + end) for end in expected) for name in modules)
    assert len(modules) == 2 * len(expected)


def test_unknown_targets_are_all_named_with_what_exists() -> None:
    with pytest.raises(UserError) as caught:
        attach(tiny_model("llama"), LoraConfig(targets=("q_proj", "query", "lm_head", "proj")), seed=0)
    message = str(caught.value)
    assert all(repr(name) in message for name in ("query", "lm_head", "proj"))
    assert "'q_proj'" not in message
    assert "down_proj, gate_proj, k_proj" in message


def test_a_rank_above_a_modules_smaller_side_is_refused_once() -> None:
    model = tiny_model("llama")  # k_proj and v_proj map 32 to 16
    with pytest.raises(UserError) as caught:
        attach(model, LoraConfig(rank=17), seed=0)
    assert len(caught.value.problems) == 1, "one message, however many modules there are"
    assert "at most 16, the smaller side of model.layers.0.self_attn.k_proj" in str(caught.value)
    assert "17, too large for 4 of 14 targets" in str(caught.value)
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    attach(model, LoraConfig(rank=16), seed=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_equals_unmerged(family: str) -> None:
    model = tiny_model(family)
    adapter = attach(model, LoraConfig(rank=4), seed=0)
    fill(adapter.parameters)
    unmerged = logits(model)
    merged = adapter.merge()
    assert not any(isinstance(module, LoraLinear) for module in merged.modules())
    torch.testing.assert_close(logits(merged), unmerged, atol=1e-5, rtol=1e-5)


def test_detach_restores_the_model() -> None:
    model = tiny_model("gpt2")
    modules, weights, base = dict(model.named_modules()), copy.deepcopy(model.state_dict()), logits(model)
    adapter = attach(model, LoraConfig(), seed=0)
    fill(adapter.parameters)
    assert {name: id(module) for name, module in bare_modules(model).items()} == {
        name: id(module) for name, module in modules.items()
    }
    assert adapter.detach() is model
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), base)


def test_disabled_is_the_base_and_ends_with_the_block() -> None:
    model = tiny_model("llama")
    base = logits(model)
    adapter = attach(model, LoraConfig(), seed=0)
    fill(adapter.parameters)
    tuned = logits(model)
    with contextlib.suppress(RuntimeError), adapter.disabled():
        assert torch.equal(logits(model), base)
        raise RuntimeError
    assert torch.equal(logits(model), tuned)
    assert not torch.equal(tuned, base)


def test_tensors_and_load_round_trip_and_are_copies() -> None:
    model = tiny_model("qwen2")
    adapter = attach(model, LoraConfig(), seed=0)
    fill(adapter.parameters)
    before, kept = logits(model), adapter.tensors()
    assert all(value.is_contiguous() and value.dtype == torch.float32 for value in kept.values())
    adapter.reset(1)
    assert not torch.equal(logits(model), before)
    adapter.load(kept)
    assert torch.equal(logits(model), before)
    next(iter(kept.values())).zero_()
    assert torch.equal(logits(model), before)


def test_load_names_every_problem_and_changes_nothing() -> None:
    adapter = attach(tiny_model("llama"), LoraConfig(targets=("q_proj",)), seed=0)
    before = adapter.tensors()
    first, second, third, fourth = before
    bad = {
        first: before[first].half(),
        second: before[second][:, :1],
        third: torch.full_like(before[third], math.nan),
        "x": before[fourth],
    }
    with pytest.raises(UserError) as caught:
        adapter.load(bad)
    assert len(caught.value.problems) == 5
    assert all(name in str(caught.value) for name in (first, second, third, fourth, "x: not expected"))
    assert all(torch.equal(value, before[name]) for name, value in adapter.tensors().items())


def test_second_adapter_is_refused() -> None:
    model = tiny_model("llama")
    attach(model, LoraConfig(), seed=0)
    with pytest.raises(UserError, match="Detach"):
        attach(model, LoraConfig(), seed=0)


def test_only_factors_are_trained_and_the_base_stays_frozen() -> None:
    model = tiny_model("llama")
    adapter = attach(model, LoraConfig(), seed=0)
    assert {id(value) for value in model.parameters() if value.requires_grad} == {
        id(value) for value in adapter.parameters.values()
    }


@pytest.mark.parametrize("rank", [1, 4])
def test_gradients_have_the_factors_strides(rank: int) -> None:
    """And so has the optimiser's state: fused optimisers on a GPU refuse anything else."""
    model = tiny_model("llama")
    adapter = attach(model, LoraConfig(rank=rank), seed=0)
    fill(adapter.parameters)
    model(input_ids=IDS, use_cache=False).logits.square().sum().backward()
    for name, value in adapter.parameters.items():
        assert value.grad is not None, name
        assert value.grad.stride() == torch.zeros_like(value).stride() == value.stride(), name


def test_bfloat16_base_keeps_float32_factors_and_is_close() -> None:
    lora = LoraConfig(rank=4)
    exact, rounded = tiny_model("llama"), tiny_model("llama").to(torch.bfloat16)
    fill(attach(exact, lora, seed=0).parameters)
    adapter = attach(rounded, lora, seed=0)
    fill(adapter.parameters)
    assert {value.dtype for value in adapter.parameters.values()} == {torch.float32}
    got = logits(rounded)
    assert got.dtype == torch.bfloat16
    assert (got.float() - logits(exact)).norm() / logits(exact).norm() < 0.03


def test_merge_into_packed_weights_is_refused() -> None:
    adapter = attach(tiny_model("llama"), LoraConfig(targets=("q_proj",)), seed=0)
    base = next(iter(adapter.layers.values())).base
    base.weight = nn.Parameter(base.weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(UserError, match="quantisation"):
        adapter.merge()


def test_shapes_on_the_meta_device_are_those_of_attach() -> None:
    lora = LoraConfig(rank=3, targets="attention")
    attached = attach(tiny_model("gpt2"), lora, seed=0).parameters
    with torch.device("meta"):
        found = shapes(tiny_model("gpt2").to("meta"), lora)
    assert list(found.items()) == [(name, tuple(value.shape)) for name, value in attached.items()]


def test_scale() -> None:
    assert scale(LoraConfig(rank=4, alpha=8.0)) == 2.0
    assert scale(LoraConfig(rank=4, alpha=8.0, rslora=True)) == 4.0


def test_pairs_names_lonely_factors() -> None:
    one = torch.zeros(1)
    with pytest.raises(ValueError, match=r"b\.lora_B"):
        pairs({"a.lora_A": one, "a.lora_B": one, "b.lora_B": one})
