"""Compressing a model by leaving layers out: plans, all families, two-part forward passes, bundles, PEFT folders."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from flocktune.config.schema import EmulatorConfig, LoraConfig, ModelConfig
from flocktune.errors import UserError
from flocktune.files import sha256_bytes
from flocktune.models.bundle import (
    MANIFEST,
    Bundle,
    _digest,
    copy_bundle,
    read_bundle,
    receive_bundle,
    remove_dead,
    write_bundle,
)
from flocktune.models.layers import (
    block_influence,
    drop_layers,
    head_logits,
    hidden_states,
    layer_stack,
    layers_of,
    lora_within,
    starting_from,
)
from flocktune.models.load import load_model, load_skeleton
from flocktune.models.lora import attach
from flocktune.models.peft_io import CONFIG_FILE, export_peft, import_peft
from flocktune.models.recompute import checkpoint_layers
from flocktune.models.split import SplitPlan, evenly, plan_split, read_plan
from tiny_models import DECODERS, FAMILIES, fill, tiny_decoder, tiny_model, tiny_tokenizer

IDS = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(1))
PACKED = torch.tensor([[*range(5), *range(7)], [*range(8), *range(4)]])
STACKS = {
    "gpt2": "transformer.h",
    "gpt_neo": "transformer.h",
    "opt": "model.decoder.layers",
    "gpt_neox": "gpt_neox.layers",
}
FULL_DIGEST = "f" * 64
ADAPTER, KEPT, HELD, DROPPED = (4, 5), (0, 2), (0, 2, 4, 5), (1, 3)


def stack_of(family: str) -> str:
    return STACKS.get(family, "model.layers")


def plan_of(family: str, kept: tuple[int, ...] = KEPT) -> SplitPlan:
    """Of 6 layers. The kept ones are such that the types of the layers held are not the first of all types."""
    return SplitPlan(6, ADAPTER, kept, stack_of(family))


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS, positions: Tensor | None = None) -> Tensor:
    return model(input_ids=ids, position_ids=positions, use_cache=False).logits


def first(output: Any) -> Tensor:
    """The hidden states of what a layer returns."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def skipped(model: PreTrainedModel, stack: str, indices: tuple[int, ...]) -> Iterator[None]:
    """Inside, these layers hand on what they get."""

    def same(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        return (x, *output[1:]) if isinstance(output, tuple) else x

    layers = layers_of(model, stack)
    handles = [layers[index].register_forward_hook(same, with_kwargs=True) for index in indices]
    yield
    for handle in handles:
        handle.remove()


@pytest.fixture(scope="session")
def full() -> Callable[[str], PreTrainedModel]:
    """The full model of a family; tests leave it as it is."""
    made: dict[str, PreTrainedModel] = {}

    def of(family: str) -> PreTrainedModel:
        if family not in made:
            made[family] = tiny_decoder(family)
        return made[family]

    return of


@pytest.fixture(scope="session")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[PreTrainedModel, Bundle]]:
    """A family's emulator in memory, and its bundle; tests leave both as they are."""
    made: dict[str, tuple[PreTrainedModel, Bundle]] = {}
    folder = tmp_path_factory.mktemp("bundles")

    def of(family: str) -> tuple[PreTrainedModel, Bundle]:
        if family not in made:
            model = tiny_decoder(family)
            bundle = write_bundle(model, tiny_tokenizer(), plan_of(family), FULL_DIGEST, folder / family)
            made[family] = model, bundle
        return made[family]

    return of


@pytest.fixture
def bundle(bundled: Callable[[str], tuple[PreTrainedModel, Bundle]], tmp_path: Path) -> Bundle:
    """One to be damaged."""
    shutil.copytree(bundled("llama")[1].folder, tmp_path / "emulator")
    return read_bundle(tmp_path / "emulator")


def plain_model(folder: Path) -> PreTrainedModel:
    """As any tool loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True).eval()


# --- plans -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter_layers", "drop", "kept"),
    [
        # n = 30, m = 24: int(29 i / 23)
        (2, 0.2, [0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13, 15, 16, 17, 18, 20, 21, 22, 23, 25, 26, 27, 29]),
        # n = 30, m = 15: int(29 i / 14)
        (2, 0.5, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 29]),
        # n = 28, m = round(22.4) = 22: int(27 i / 21)
        (4, 0.2, [0, 1, 2, 3, 5, 6, 7, 9, 10, 11, 12, 14, 15, 16, 18, 19, 20, 21, 23, 24, 25, 27]),
        # n = 28, m = round(19.6) = 20: int(27 i / 19)
        (4, 0.3, [0, 1, 2, 4, 5, 7, 8, 9, 11, 12, 14, 15, 17, 18, 19, 21, 22, 24, 25, 27]),
        # n = 28, m = 14: int(27 i / 13)
        (4, 0.5, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 27]),
    ],
)
def test_layers_of_a_model_of_32(adapter_layers: int, drop: float, kept: list[int]) -> None:
    plan = plan_split(32, EmulatorConfig(adapter_layers=adapter_layers, drop=drop), stack="model.layers")
    adapter = list(range(32 - adapter_layers, 32))
    assert list(plan.kept) == kept
    assert list(plan.adapter) == adapter
    assert list(plan.held) == kept + adapter
    assert sorted([*plan.held, *plan.dropped]) == list(range(32))
    assert plan.top == adapter[0]
    assert plan.frozen == len(kept)


@given(layers=st.integers(1, 200), share=st.floats(0, 1))
def test_kept_layers_are_evenly_spaced(layers: int, share: float) -> None:
    count = max(1, round(share * layers))
    kept = evenly(layers, count)
    assert len(kept) == count
    assert kept == sorted(set(kept))
    assert kept[0] == 0
    assert kept[-1] < layers
    if count > 1:
        assert kept[-1] == layers - 1
        gaps = [after - before for before, after in pairwise(kept)]
        assert max(gaps) - min(gaps) <= 1


@given(
    layers=st.integers(2, 100),
    ends=st.integers(1, 50),
    drop=st.floats(0, 0.999),
    placement=st.sampled_from(["last", "first_and_last"]),
)
def test_every_plan_holds_together(layers: int, ends: int, drop: float, placement: Any) -> None:
    settings = EmulatorConfig(adapter_layers=ends, drop=drop, placement=placement)
    between = layers - (ends if placement == "last" else 2 * ends)
    if between < 1 or round(between * (1 - drop)) < 1:
        with pytest.raises(UserError):
            plan_split(layers, settings, stack="h")
        return
    plan = plan_split(layers, settings, stack="h")
    assert len(plan.kept) == round(between * (1 - drop))
    assert len(plan.adapter) == layers - between
    assert not set(plan.kept) & set(plan.adapter)
    assert set(plan.held) | set(plan.dropped) == set(range(layers))
    assert plan.held[plan.frozen] == plan.adapter[0]
    assert plan.top == layers - ends
    assert read_plan(json.loads(json.dumps(plan.as_dict()))) == plan


def test_an_adapter_at_both_ends() -> None:
    plan = plan_split(10, EmulatorConfig(adapter_layers=2, drop=0.5, placement="first_and_last"), stack="h")
    assert plan == SplitPlan(10, (0, 1, 8, 9), (2, 4, 7), "h")  # n = 6, m = 3: int(5 i / 2)
    assert plan.held == (0, 1, 2, 4, 7, 8, 9)
    assert plan.dropped == (3, 5, 6)
    assert plan.top == 8
    assert plan.frozen == 0
    in_full = plan.to_full({f"h.{index}.mlp": torch.zeros(1) for index in range(7)})
    assert list(in_full) == ["h.0.mlp", "h.1.mlp", "h.8.mlp", "h.9.mlp"]
    assert list(plan.to_emulator(in_full)) == ["h.0.mlp", "h.1.mlp", "h.5.mlp", "h.6.mlp"]


def test_the_most_important_layers_are_kept() -> None:
    settings = EmulatorConfig(adapter_layers=1, drop=0.5, choice="importance", placement="first_and_last")
    # The ends are the most important of all, but in the adapter anyhow; of equals the first is kept.
    plan = plan_split(6, settings, stack="h", importance=[9.0, 0.3, 0.1, 0.3, 0.7, 9.0])
    assert plan.adapter == (0, 5)
    assert plan.kept == (1, 4)
    for missing in (None, [1.0] * 5):
        with pytest.raises(ValueError, match="importance of 6 layers"):
            plan_split(6, settings, stack="h", importance=missing)


@pytest.mark.parametrize(
    ("layers", "changes", "where", "got"),
    [
        (4, {"adapter_layers": 4}, "emulator.adapter_layers", "got 4"),
        (4, {"adapter_layers": 9}, "emulator.adapter_layers", "got 9"),
        (4, {"adapter_layers": 2, "placement": "first_and_last"}, "emulator.adapter_layers", "got 2 at either end"),
        (4, {"adapter_layers": 2, "drop": 0.8}, "emulator.drop", "got 0.8, which leaves none"),
    ],
)
def test_a_split_that_leaves_nothing(layers: int, changes: dict[str, Any], where: str, got: str) -> None:
    with pytest.raises(UserError) as error:
        plan_split(layers, EmulatorConfig(**changes), stack="h")
    assert len(error.value.problems) == 1
    assert str(error.value).startswith(f"{where}: expected ")
    assert got in str(error.value)
    assert "Lower it" in str(error.value)


def test_names_in_the_emulator_and_in_the_full_model() -> None:
    plan = plan_of("llama")  # holds 0, 2, 4, 5
    own = {f"model.layers.{index}.mlp.up_proj.lora_A": torch.tensor(float(index)) for index in range(4)}
    in_full = plan.to_full(own | {"lm_head.lora_A": torch.zeros(1)})
    assert {name: float(value) for name, value in in_full.items()} == {
        "model.layers.4.mlp.up_proj.lora_A": 2.0,
        "model.layers.5.mlp.up_proj.lora_A": 3.0,
    }
    back = plan.to_emulator(in_full)
    assert {name: float(value) for name, value in back.items()} == {
        "model.layers.2.mlp.up_proj.lora_A": 2.0,
        "model.layers.3.mlp.up_proj.lora_A": 3.0,
    }
    assert [name for name in own if plan.in_adapter(name)] == list(back)
    for other in ("model.layers.2", "model.layersX2.mlp", "lm_head.weight", "other.model.layers.2.mlp"):
        assert not plan.in_adapter(other)
    for absent in ("model.layers.3.mlp", "model.layers.6.mlp", "lm_head.weight"):
        with pytest.raises(ValueError, match=absent):
            plan.to_emulator({absent: torch.zeros(1)})


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": []},
        {"kept": []},
        {"kept": [0, 4]},
        {"kept": [0, 0]},
        {"kept": [2, 0]},
        {"kept": [-1, 2]},
        {"kept": ["first"]},
        {"kept": 3},
        {"adapter": [4, 6]},
        {"adapter": [0, 1], "kept": [2, 3]},
        {"layers": None},
    ],
)
def test_a_damaged_plan_is_refused(changes: dict[str, Any]) -> None:
    tree = plan_of("llama").as_dict()
    with pytest.raises((KeyError, TypeError, ValueError)):
        read_plan({**tree, **changes})
    for key in tree:
        with pytest.raises(KeyError):
            read_plan({name: value for name, value in tree.items() if name != key})


# --- families --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS)
def test_the_stack_of_layers_is_found(family: str, full: Callable[[str], PreTrainedModel]) -> None:
    assert layer_stack(full(family)) == stack_of(family)
    assert len(layers_of(full(family), stack_of(family))) == 6


def test_no_list_of_layers() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    model.config.num_hidden_layers = 3
    with pytest.raises(
        UserError, match=r"^model.path: expected a model with a list of its 3 decoder layers, got Llama"
    ):
        layer_stack(model)


def test_a_plan_of_another_model() -> None:
    with pytest.raises(UserError, match="expected a model of 6 layers, got one of 2"):
        drop_layers(tiny_model("llama"), plan_of("llama"))


@pytest.mark.parametrize("family", DECODERS)
def test_nothing_dropped_is_the_full_model(family: str, full: Callable[[str], PreTrainedModel], tmp_path: Path) -> None:
    plan = plan_split(6, EmulatorConfig(adapter_layers=2, drop=0.0), stack=stack_of(family))
    assert plan.dropped == ()
    model = copy.deepcopy(full(family))
    write_bundle(model, tiny_tokenizer(), plan, FULL_DIGEST, tmp_path / "whole")
    assert torch.equal(logits(model), logits(full(family)))
    assert torch.equal(logits(plain_model(tmp_path / "whole")), logits(full(family)))


@pytest.mark.parametrize("family", DECODERS)
def test_an_emulator_is_the_full_model_without_some_layers(
    family: str,
    full: Callable[[str], PreTrainedModel],
    bundled: Callable[[str], tuple[PreTrainedModel, Bundle]],
) -> None:
    model = full(family)
    for positions in (None, PACKED):
        with skipped(model, stack_of(family), DROPPED):
            expected = logits(model, positions=positions)
        assert (expected - logits(model, positions=positions)).abs().max() > 1e-2
        emulator, bundle = bundled(family)
        assert torch.equal(logits(emulator, positions=positions), expected)
        assert torch.equal(logits(plain_model(bundle.folder), positions=positions), expected)


@pytest.mark.parametrize("family", DECODERS)
def test_an_emulator_generates_with_its_cache_as_without(
    family: str, bundled: Callable[[str], tuple[PreTrainedModel, Bundle]]
) -> None:
    emulator, _ = bundled(family)
    assert emulator.config.num_hidden_layers == 4
    new = 8  # with the prompt longer than any window
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said = emulator.generate(
            IDS,
            attention_mask=torch.ones_like(IDS),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            use_cache=True,
            return_dict_in_generate=True,
            output_logits=True,
        )
    assert len(said.past_key_values.layers) == 4
    ids = IDS
    for cached in said.logits:
        last = logits(emulator, ids)[:, -1]
        assert torch.allclose(cached, last, atol=1e-4)
        last[:, 1] = -torch.inf  # the end token
        ids = torch.cat([ids, last.argmax(-1, keepdim=True)], 1)
    assert torch.equal(said.sequences, ids)


@pytest.mark.parametrize("family", [family for family in DECODERS if family in ("qwen2", "qwen3", "gemma2", "gemma3")])
def test_every_layer_keeps_its_type(
    family: str,
    full: Callable[[str], PreTrainedModel],
    bundled: Callable[[str], tuple[PreTrainedModel, Bundle]],
) -> None:
    types = full(family).config.layer_types
    expected = [types[index] for index in HELD]
    assert expected != types[:4], "or this test sees nothing"
    emulator, bundle = bundled(family)
    assert list(emulator.config.layer_types) == expected
    assert json.loads((bundle.folder / "config.json").read_text())["layer_types"] == expected
    short, long = logits(emulator, IDS[:, :5]), logits(emulator)[:, :5]
    assert torch.allclose(short, long, atol=1e-5)


def test_lists_that_have_not_an_entry_a_layer_stay() -> None:
    model = tiny_decoder("llama")
    model.config.eos_token_id = [1, 2]
    drop_layers(model, plan_of("llama"))
    assert model.config.eos_token_id == [1, 2]


# --- a forward pass in two parts -------------------------------------------------------------------


@pytest.mark.parametrize("positions", [None, PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize("family", DECODERS)
def test_two_parts_are_the_whole(family: str, positions: Tensor | None, full: Callable[[str], PreTrainedModel]) -> None:
    model, stack = full(family), stack_of(family)
    whole = logits(model, positions=positions)
    layers = list(layers_of(model, stack))
    for cut in (0, 3, 5):
        with torch.no_grad():
            (hidden,) = hidden_states(model, IDS, positions, [layers[cut]])
        assert hidden.shape == (2, 12, 32)
        with starting_from(model, stack, cut, hidden):
            assert torch.equal(logits(model, positions=positions), whole)
            # What comes from below does not matter any more, but for the shape.
            other = torch.zeros_like(IDS) + 7
            assert torch.equal(logits(model, other, positions), whole)
        with starting_from(model, stack, cut, torch.zeros_like(hidden)):
            assert not torch.equal(logits(model, positions=positions), whole)
    assert all(mine is theirs for mine, theirs in zip(layers_of(model, stack), layers, strict=True))
    assert torch.equal(logits(model, positions=positions), whole)


@pytest.mark.parametrize("family", DECODERS)
def test_nothing_above_the_last_wanted_module_is_computed(family: str, full: Callable[[str], PreTrainedModel]) -> None:
    model = full(family)
    layers = layers_of(model, stack_of(family))
    ran: list[int] = []
    handles = [
        layer.register_forward_hook(lambda *_, index=index: ran.append(index)) for index, layer in enumerate(layers)
    ]
    try:
        with torch.no_grad():
            first, third = hidden_states(model, IDS, None, [layers[1], layers[3]])
            ran_before = list(ran)
            whole = model(input_ids=IDS, use_cache=False, output_hidden_states=True).hidden_states
    finally:
        for handle in handles:
            handle.remove()
    assert ran_before == [0, 1, 2]
    assert torch.equal(first, whole[1])
    assert torch.equal(third, whole[3])


def _loss(model: PreTrainedModel) -> Tensor:
    return model(input_ids=IDS, position_ids=PACKED, use_cache=False).logits.square().mean()


@pytest.mark.parametrize("family", DECODERS)
def test_gradients_stop_at_the_cut(family: str) -> None:
    model, stack, cut = tiny_decoder(family), stack_of(family), 4
    adapter = attach(model, LoraConfig(rank=2, targets="all-linear"), seed=0)
    fill(adapter.parameters)
    checkpoint_layers(model)
    _loss(model).backward()
    expected = {name: value.grad for name, value in adapter.parameters.items()}
    model.zero_grad()
    with torch.no_grad():
        (hidden,) = hidden_states(model, IDS, PACKED, [layers_of(model, stack)[cut]])
    assert not hidden.requires_grad
    hidden.requires_grad_()
    ran: list[nn.Module] = []
    below = list(layers_of(model, stack))[:cut]
    handles = [layer.register_forward_hook(lambda module, *_: ran.append(module)) for layer in below]
    with starting_from(model, stack, cut, hidden):
        _loss(model).backward()
    for handle in handles:
        handle.remove()
    assert not ran
    assert hidden.grad is not None
    below_names = tuple(f"{stack}.{index}." for index in range(cut))
    above_names = tuple(f"{stack}.{index}." for index in range(cut, 6))
    assert any(name.startswith(above_names) for name in adapter.parameters)
    for name, value in adapter.parameters.items():  # and OPT has a projection above its layers
        if name.startswith(below_names):
            assert value.grad is None, name
        elif value.grad is not None:
            assert torch.equal(value.grad, expected[name]), name
        else:
            assert not name.startswith(above_names), name


def test_the_model_is_as_before_when_the_body_raises(full: Callable[[str], PreTrainedModel]) -> None:
    model, stack = full("llama"), "model.layers"
    before, whole = list(layers_of(model, stack)), logits(model)
    with pytest.raises(RuntimeError, match="in the body"), starting_from(model, stack, 3, torch.zeros(2, 12, 32)):
        raise RuntimeError("in the body")
    handle = before[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hidden_states(model, IDS, None, [before[3]])
    handle.remove()
    assert all(mine is theirs for mine, theirs in zip(layers_of(model, stack), before, strict=True))
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(logits(model), whole)


@pytest.mark.parametrize("family", DECODERS)
def test_logits_of_states_before_the_head(family: str, full: Callable[[str], PreTrainedModel]) -> None:
    model = full(family)
    with torch.no_grad():
        (normed,) = hidden_states(model, IDS, None, [model.get_output_embeddings()])
        found = head_logits(model, stack_of(family), normed.flatten(0, 1))
    assert torch.equal(found.view(2, 12, -1), logits(model))
    assert "forward" not in vars(model.get_submodule(stack_of(family).rpartition(".")[0]))
    if family == "gemma2":
        assert found.abs().max() <= 1.5, "the soft cap"


def test_someone_elses_forward_is_put_back(full: Callable[[str], PreTrainedModel]) -> None:
    model = copy.deepcopy(full("llama"))
    whole, own = logits(model), model.model.forward
    model.model.forward = patched = lambda *args, **kwargs: own(*args, **kwargs)
    with torch.no_grad():
        (normed,) = hidden_states(model, IDS, None, [model.lm_head])
        assert torch.equal(head_logits(model, "model.layers", normed.flatten(0, 1)).view_as(whole), whole)
    assert vars(model.model)["forward"] is patched


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3", "gpt_neo"])
def test_influence_of_layers(family: str, full: Callable[[str], PreTrainedModel]) -> None:
    model, stack = full(family), stack_of(family)
    batches = [(IDS, torch.tensor([0, 3, 4, 13, 23])), (IDS[:1, :7], torch.tensor([6, 1]))]
    cosines: list[list[float]] = [[] for _ in range(6)]
    for ids, positions in batches:
        last: list[Tensor] = []
        handle = layers_of(model, stack)[5].register_forward_hook(lambda *call, last=last: last.append(first(call[2])))
        with torch.no_grad():
            states = list(model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states)
        handle.remove()
        assert len(states) == 7
        assert states[6].shape != last[0].shape or not torch.allclose(states[6], last[0])  # it is normed
        states[6] = last[0]
        for index in range(6):
            x, y = (states[place].flatten(0, 1)[positions] for place in (index, index + 1))
            cosines[index] += F.cosine_similarity(x, y, dim=-1).tolist()
    expected = [1 - sum(values) / 7 for values in cosines]
    hooks = [list(module._forward_hooks) for module in layers_of(model, stack)]  # transformers leaves its own there
    found = block_influence(model, stack, batches)
    assert found == pytest.approx(expected, abs=1e-6)
    assert len({round(value, 4) for value in found}) == 6
    assert hooks == [list(module._forward_hooks) for module in layers_of(model, stack)]
    assert not any(module._forward_pre_hooks for module in model.modules())


# --- bundles ---------------------------------------------------------------------------------------


def test_what_a_bundle_holds(bundled: Callable[[str], tuple[PreTrainedModel, Bundle]]) -> None:
    emulator, bundle = bundled("llama")
    files = {file.name for file in bundle.folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", MANIFEST} <= files
    manifest = json.loads((bundle.folder / MANIFEST).read_text())
    assert set(manifest["files"]) == files - {MANIFEST}
    assert bundle.bytes == sum((bundle.folder / name).stat().st_size for name in manifest["files"])
    assert bundle.digest == manifest["digest"]
    assert bundle.full_digest == manifest["full_model_digest"] == FULL_DIGEST
    assert bundle.plan == plan_of("llama")
    model = tiny_decoder("llama")
    whole = sum(value.numel() for value in model.parameters())
    layer = sum(value.numel() for value in model.model.layers[0].parameters())
    assert bundle.full_parameters == whole
    assert bundle.parameters == whole - 2 * layer == sum(value.numel() for value in emulator.parameters())
    assert manifest["discloses"]["decoder_layers_unchanged"] == "4 of 6"
    assert manifest["discloses"]["share_of_parameters"] == round(1 - 2 * layer / whole, 4)
    assert {"token embeddings", "output head", "tokenizer"} <= set(manifest["discloses"]["also"])
    tokenizer = AutoTokenizer.from_pretrained(bundle.folder)
    assert tokenizer("Any tool.").input_ids == tiny_tokenizer()("Any tool.").input_ids
    assert read_bundle(bundle.folder, digest=bundle.digest) == bundle


def test_a_digest_is_of_files_and_split(bundle: Bundle, tmp_path: Path) -> None:
    """The same bytes have the same one wherever they lie; the same layers, divided in another way, another one."""
    model = tiny_decoder("llama")
    again = write_bundle(model, tiny_tokenizer(), plan_of("llama"), FULL_DIGEST, tmp_path / "again")
    assert again.digest == bundle.digest
    divided = SplitPlan(6, (5,), (0, 2, 4), "model.layers")
    other = write_bundle(tiny_decoder("llama"), tiny_tokenizer(), divided, FULL_DIGEST, tmp_path / "divided")
    assert (other.folder / "model.safetensors").read_bytes() == (again.folder / "model.safetensors").read_bytes()
    assert other.digest != bundle.digest
    change_manifest(bundle.folder, lambda manifest: {**manifest, "split": divided.as_dict()})
    assert "a damaged one" in one_problem(bundle.folder)


def test_a_bundle_does_not_say_where_the_full_model_lies(tmp_path: Path) -> None:
    source = tmp_path / "secret-place"
    tiny_decoder("llama").save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    model, tokenizer = plain_model(source), AutoTokenizer.from_pretrained(source)
    bundle = write_bundle(model, tokenizer, plan_of("llama"), FULL_DIGEST, tmp_path / "emulator")
    for file in bundle.folder.iterdir():
        assert b"secret-place" not in file.read_bytes(), file.name


def test_a_bundle_keeps_the_type_of_numbers(tmp_path: Path) -> None:
    tiny_decoder("qwen2").bfloat16().save_pretrained(tmp_path / "full")
    model = load_model(ModelConfig(path=str(tmp_path / "full")), torch.device("cpu"), stored_dtype=True)
    assert model.dtype == torch.bfloat16
    bundle = write_bundle(model, tiny_tokenizer(), plan_of("qwen2"), FULL_DIGEST, tmp_path / "emulator")
    assert AutoModelForCausalLM.from_pretrained(bundle.folder, dtype="auto").dtype == torch.bfloat16
    again = load_model(ModelConfig(path=str(bundle.folder)), torch.device("cpu"), stored_dtype=True)
    assert torch.equal(logits(again), logits(model))  # both with the attention that clients train with


def one_problem(folder: Path, **expected: Any) -> str:
    with pytest.raises(UserError) as error:
        read_bundle(folder, **expected)
    assert len(error.value.problems) == 1
    return str(error.value)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_or_missing_file_is_named(name: str, bundle: Bundle) -> None:
    path = bundle.folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    said = one_problem(bundle.folder)
    assert said.startswith(f"{path}: expected sha256 ")
    assert "damaged" in said
    path.unlink()
    said = one_problem(bundle.folder)
    assert said.startswith(f"{path}: expected a file of the emulator, got nothing there")
    assert "Copy the bundle again" in said


def test_every_damaged_file_is_named(bundle: Bundle) -> None:
    (bundle.folder / "config.json").unlink()
    (bundle.folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError) as error:
        read_bundle(bundle.folder)
    assert len(error.value.problems) == 2


def change_manifest(folder: Path, change: Callable[[Any], Any]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(change(manifest)))


def of_another_file(manifest: Any) -> Any:
    """Weights were swapped, and the manifest adjusted to them, but not the digest that the bundle is known by."""
    manifest["files"]["model.safetensors"]["sha256"] = "0" * 64
    return manifest


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: [],
        lambda manifest: {},
        lambda manifest: {**manifest, "format": "flocktune-emulator/9"},
        lambda manifest: {**manifest, "digest": "0" * 64},
        lambda manifest: {**manifest, "split": {**manifest["split"], "kept": [0, 9]}},
        lambda manifest: {**manifest, "split": None},
        lambda manifest: {**manifest, "files": list(manifest["files"])},
        lambda manifest: {**manifest, "files": {}},
        lambda manifest: {**manifest, "files": {name: {} for name in manifest["files"]}},
        lambda manifest: {**manifest, "parameters": {"emulator": "many"}},
        of_another_file,
    ],
)
def test_a_damaged_manifest_is_named(change: Callable[[Any], Any], bundle: Bundle) -> None:
    change_manifest(bundle.folder, change)
    said = one_problem(bundle.folder)
    assert said.startswith(f"{bundle.folder / MANIFEST}: expected a manifest of flocktune-emulator/1, got a damaged")


def test_a_manifest_that_is_cut_off_or_missing(bundle: Bundle, tmp_path: Path) -> None:
    path = bundle.folder / MANIFEST
    path.write_bytes(path.read_bytes()[:100])
    assert one_problem(bundle.folder).startswith(f"{path}: expected a JSON file")
    path.unlink()
    assert f"got one without {MANIFEST}" in one_problem(bundle.folder)
    said = one_problem(tmp_path / "nowhere")
    assert said.startswith(f"{tmp_path / 'nowhere'}: expected an emulator bundle")
    assert "flocktune compress" in said


def test_the_emulator_of_another_run(bundle: Bundle) -> None:
    said = one_problem(bundle.folder, digest="abc" * 20)
    assert "the one of this run, abcabcabcabc..." in said
    assert f"another one, {bundle.digest[:12]}..." in said


def test_a_name_in_a_manifest_leads_nowhere_else(bundle: Bundle) -> None:
    """Nothing outside the folder is looked at, whatever a manifest lists."""
    (bundle.folder.parent / "outside").write_text("x")
    entry = {"bytes": 1, "sha256": sha256_bytes(b"x")}

    def with_outside(manifest: Any) -> Any:
        files = {**manifest["files"], "../outside": entry}
        return {**manifest, "files": files, "digest": _digest(files, bundle.plan)}

    change_manifest(bundle.folder, with_outside)
    assert one_problem(bundle.folder).startswith(f"{bundle.folder / 'outside'}: ")


def test_a_bundle_is_fetched_once(bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fetched: list[Path] = []

    def fetch(to: Path) -> None:
        fetched.append(to)
        shutil.copytree(bundle.folder, to)

    cache = tmp_path / "cache"
    got = receive_bundle(bundle.digest, fetch, cache)
    assert got.folder == cache / "emulators" / bundle.digest
    assert receive_bundle(bundle.digest, fetch, cache) == got
    assert len(fetched) == 1
    (got.folder / "config.json").write_text("{}")
    assert receive_bundle(bundle.digest, fetch, cache) == got
    assert len(fetched) == 2
    assert "damaged" in caplog.text
    assert [entry.name for entry in (cache / "emulators").iterdir()] == [bundle.digest]


def test_a_bundle_that_is_not_the_wanted_one_is_not_kept(bundle: Bundle, tmp_path: Path) -> None:
    def damaged(to: Path) -> None:
        shutil.copytree(bundle.folder, to)
        (to / "config.json").unlink()

    def interrupted(to: Path) -> None:
        to.mkdir()
        raise ConnectionError("gone")

    cache = tmp_path / "cache"
    with pytest.raises(UserError, match="the one of this run"):
        receive_bundle("0" * 64, lambda to: shutil.copytree(bundle.folder, to), cache)
    with pytest.raises(UserError, match="nothing there"):
        receive_bundle(bundle.digest, damaged, cache)
    with pytest.raises(ConnectionError):
        receive_bundle(bundle.digest, interrupted, cache)
    assert list((cache / "emulators").iterdir()) == []


def test_another_process_fetches_the_same_bundle(bundle: Bundle, tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def slow(to: Path) -> None:
        receive_bundle(bundle.digest, lambda place: shutil.copytree(bundle.folder, place), tmp_path / "other")
        (tmp_path / "other/emulators" / bundle.digest).rename(cache / "emulators" / bundle.digest)
        shutil.copytree(bundle.folder, to)

    assert receive_bundle(bundle.digest, slow, cache).folder == cache / "emulators" / bundle.digest
    assert [entry.name for entry in (cache / "emulators").iterdir()] == [bundle.digest]


def test_a_copy_stands_alone(bundle: Bundle, tmp_path: Path) -> None:
    copy_bundle(bundle.folder, tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").write_bytes(b"damage")
    with pytest.raises(UserError, match="damaged"):
        read_bundle(tmp_path / "copy")
    assert read_bundle(bundle.folder) == bundle


def test_what_dead_processes_left_is_removed_and_the_living_ones_work_is_not(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    dead, mine, other = f".a.{done.stdout.strip()}.tmp", f".a.{os.getpid()}.tmp", ".notes.tmp"
    for name in (dead, mine, other):
        (tmp_path / name).mkdir()
    remove_dead(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {mine, other}


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError("no space left")

    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(tokenizer, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_bundle(tiny_decoder("llama"), tokenizer, plan_of("llama"), FULL_DIGEST, tmp_path / "emulator")
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_is_never_overwritten(bundle: Bundle) -> None:
    with pytest.raises(OSError, match="not empty"):
        write_bundle(tiny_decoder("llama"), tiny_tokenizer(), plan_of("llama", (0, 1)), FULL_DIGEST, bundle.folder)
    assert read_bundle(bundle.folder) == bundle
    assert list(bundle.folder.parent.iterdir()) == [bundle.folder]


@pytest.mark.parametrize(
    ("family", "changes", "got"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "answers otherwise once it is loaded again"),
        ("qwen3_moe", {"mlp_only_layers": [4]}, "can not be loaded again"),
    ],
)
def test_layers_that_depend_on_their_place_are_refused(
    family: str, changes: dict[str, Any], got: str, tmp_path: Path
) -> None:
    model = tiny_model(family, layers=6, **changes)
    plan = SplitPlan(6, ADAPTER, KEPT, layer_stack(model))
    with pytest.raises(UserError) as error:
        write_bundle(model, tiny_tokenizer(), plan, FULL_DIGEST, tmp_path / "emulator")
    assert len(error.value.problems) == 1
    assert str(error.value) == (
        "emulator: expected a model whose layers work the same in another place, "
        f"got {model.config.model_type}, whose emulator {got}. "
        "This model can not be compressed by leaving layers out."
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_mixture_of_experts(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, layers=6)
    stack = layer_stack(model)
    assert stack == "model.layers"
    with skipped(model, stack, DROPPED):
        expected = logits(model)
    with torch.no_grad():
        hidden, normed = hidden_states(model, IDS, None, [model.model.layers[3], model.get_output_embeddings()])
        whole = logits(model)
        assert torch.equal(head_logits(model, stack, normed.flatten(0, 1)).view_as(whole), whole)
        with starting_from(model, stack, 3, hidden):
            assert torch.equal(logits(model), whole)
    bundle = write_bundle(model, tiny_tokenizer(), plan_of(family), FULL_DIGEST, tmp_path / "emulator")
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(plain_model(bundle.folder)), expected)


# --- LoRA on some layers, and PEFT -----------------------------------------------------------------


ENDINGS = {
    "llama": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
}


@pytest.mark.parametrize("family", DECODERS)
def test_lora_within_some_layers(
    family: str, full: Callable[[str], PreTrainedModel], bundled: Callable[[str], tuple[PreTrainedModel, Bundle]]
) -> None:
    stack, lora = stack_of(family), LoraConfig(rank=2, alpha=3.0, targets="attention")
    within = lora_within(full(family), lora, stack, ADAPTER)
    everywhere = lora_within(full(family), lora, stack, range(6))
    assert (within.rank, within.alpha) == (2, 3.0)
    assert set(within.targets) == {
        name for name in everywhere.targets if name.startswith((f"{stack}.4.", f"{stack}.5."))
    }
    assert len(everywhere.targets) == 3 * len(within.targets)
    skeleton = load_skeleton(ModelConfig(path=str(bundled(family)[1].folder)))
    assert lora_within(skeleton, lora, stack, range(4)).targets == everywhere.targets[: 2 * len(within.targets)]


def test_lora_within_is_not_misled_by_numbers() -> None:
    model = tiny_model("llama", layers=12)
    within = lora_within(model, LoraConfig(rank=2, targets=("q_proj",)), "model.layers", [1])
    assert within.targets == ("model.layers.1.self_attn.q_proj",)
    with pytest.raises(UserError, match=r"lora.targets: expected modules of decoder layers 10, 11"):
        lora_within(model, LoraConfig(rank=2, targets=("layers.1.self_attn.q_proj",)), "model.layers", [10, 11])


@pytest.mark.parametrize("targets", ["all-linear", "attention", ("c_proj", "down_proj")])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_of_the_last_layers_in_pefts_format(family: str, targets: Any, tmp_path: Path) -> None:
    if targets == ("c_proj", "down_proj"):
        targets = ("c_proj",) if family == "gpt2" else ("down_proj",)
    model, stack = tiny_decoder(family), stack_of(family)
    base = logits(model)
    lora = lora_within(model, LoraConfig(rank=2, alpha=6.0, targets=targets), stack, ADAPTER)
    adapter = attach(model, lora, seed=0)
    tensors = fill(adapter.parameters)
    export_peft(tensors, lora, model, tmp_path, "base")
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config["layers_to_transform"] == list(ADAPTER)
    if targets == "all-linear":
        assert config["target_modules"] == ENDINGS[family]
    assert not any(stack in name for name in config["target_modules"])
    theirs = peft.PeftModel.from_pretrained(tiny_decoder(family), str(tmp_path)).eval()
    adapted = {name for name, _ in theirs.named_parameters() if "lora_" in name}
    assert len(adapted) == len(tensors)
    assert (logits(theirs) - logits(model)).abs().max() < 1e-5
    assert (logits(model) - base).abs().max() > 1e-2
    again, settings = import_peft(tmp_path)
    assert set(again) == set(tensors)
    assert all(torch.equal(value, tensors[name]) for name, value in again.items())
    assert set(settings.targets) == set(lora.targets)
    assert (settings.rank, settings.alpha) == (2, 6.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_on_all_layers_names_no_layers(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    adapter = attach(model, LoraConfig(rank=2), seed=0)
    export_peft(adapter.tensors(), LoraConfig(rank=2), model, tmp_path, "base")
    assert "layers_to_transform" not in json.loads((tmp_path / CONFIG_FILE).read_text())
