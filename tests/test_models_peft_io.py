"""Adapter folders: PEFT loads what we write, we load what PEFT writes, and what we can not honour is refused."""

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from flocktune.config.schema import LoraConfig
from flocktune.errors import UserError
from flocktune.models.lora import attach, ends_with
from flocktune.models.peft_io import export_peft, import_peft, shortest_endings
from tiny_models import FAMILIES, tiny_model

IDS = torch.randint(3, 259, (2, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.copy_(0.2 * torch.randn(value.shape, generator=generator))


def saved_by_peft(folder: Path, family: str = "llama", **settings: Any) -> peft.PeftModel:
    plain = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
    config = peft.LoraConfig(**plain | settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny_model(family), config).eval()
        randomise(model)
        model.save_pretrained(folder)
    return model


def written(folder: Path, **changes: Any) -> Path:
    """A folder PEFT saved, its configuration changed afterwards."""
    saved_by_peft(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


@pytest.mark.parametrize("targets", ["all-linear", "attention"])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_what_we_export(family: str, targets: str, tmp_path: Path) -> None:
    lora = LoraConfig(rank=4, alpha=6.0, rslora=True, dropout=0.1, targets=targets)
    model = tiny_model(family)
    adapter = attach(model, lora, seed=0)
    randomise(model)
    export_peft(adapter.tensors(), lora, model, tmp_path / "new" / "adapter", "some/base")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # it would mean: keys missing, or a setting corrected
        loaded = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path / "new" / "adapter").eval()
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=0)
    assert sum("lora_A" in name for name, _ in loaded.named_parameters()) == len(adapter.layers)


def test_export_with_names_alone_is_loaded_too(tmp_path: Path) -> None:
    lora = LoraConfig(rank=2, targets="attention")
    names = [name for name, _ in tiny_model("gpt2").named_modules()]
    model = tiny_model("gpt2")
    adapter = attach(model, lora, seed=0)
    randomise(model)
    export_peft(adapter.tensors(), lora, names, tmp_path, "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(tiny_model("gpt2"), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=0)


def test_exported_files_are_what_other_readers_expect(tmp_path: Path) -> None:
    """Explicit short target names, an integer alpha, float32 factors, a named base."""
    lora = LoraConfig(rank=2, alpha=4.0)
    model = tiny_model("llama")
    export_peft(attach(model, lora, seed=0).tensors(), lora, model, tmp_path, "owner/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert (config["lora_alpha"], type(config["lora_alpha"])) == (4, int)
    assert config["base_model_name_or_path"] == "owner/base"
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert stored["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"].shape == (48, 2)
    assert {value.dtype for value in stored.values()} == {torch.float32}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_export_of_another_rank_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    tensors = attach(model, LoraConfig(rank=2), seed=0).tensors()
    with pytest.raises(ValueError, match="expected rank 4"):
        export_peft(tensors, LoraConfig(rank=4), model, tmp_path / "out", "base")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    ("family", "targets"), [("llama", ["q_proj", "v_proj"]), ("gpt2", "all-linear"), ("gemma", r".*1\.mlp\.up_proj")]
)
def test_we_load_what_peft_saves(family: str, targets: list[str] | str, rslora: bool, tmp_path: Path) -> None:
    theirs = saved_by_peft(tmp_path, family, target_modules=targets, use_rslora=rslora, lora_dropout=0.25)
    tensors, lora = import_peft(tmp_path)
    assert (lora.rank, lora.alpha, lora.rslora, lora.dropout) == (4, 6.0, rslora, 0.25)
    model = tiny_model(family)
    attach(model, lora, seed=0).load(tensors)
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=0)


def test_export_then_import_is_the_identity(tmp_path: Path) -> None:
    lora = LoraConfig(rank=3, alpha=1.5, rslora=True, dropout=0.1)
    model = tiny_model("qwen2")
    adapter = attach(model, lora, seed=0)
    randomise(model)
    export_peft(adapter.tensors(), lora, model, tmp_path, "base")
    tensors, settings = import_peft(tmp_path)
    assert all(torch.equal(tensors[name], value) for name, value in adapter.tensors().items())
    assert tensors.keys() == adapter.parameters.keys()
    assert (settings.rank, settings.alpha, settings.rslora, settings.dropout) == (3, 1.5, True, 0.1)
    assert set(settings.targets) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("feature", "value"),
    [
        ("use_dora", True),
        ("bias", "lora_only"),
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q_proj": 2}),
        ("alpha_pattern", {"q_proj": 2}),
        ("init_lora_weights", "pissa"),
        ("lora_bias", True),
        ("trainable_token_indices", [1]),
        ("layer_replication", [[0, 1]]),
        ("use_something_of_next_year", True),
    ],
)
def test_features_we_can_not_honour_are_named(feature: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=feature):
        import_peft(written(tmp_path, **{feature: value}))


def test_all_unsupported_features_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        import_peft(written(tmp_path, use_dora=True, bias="all", r="four"))
    assert len(caught.value.problems) == 3


def test_other_methods_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="peft_type LORA, got LOHA"):
        import_peft(written(tmp_path, peft_type="LOHA"))


def test_pickled_adapters_are_refused(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="pickled and therefore"):
        import_peft(tmp_path)


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        import_peft(tmp_path)
    weights = written(tmp_path) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors.*whole"):
        import_peft(tmp_path)


def test_tensors_that_are_no_factors_are_named(tmp_path: Path) -> None:
    file = written(tmp_path) / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.lm_head.weight": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        import_peft(tmp_path)


def test_half_a_module_and_a_wrong_rank_are_refused(tmp_path: Path) -> None:
    file = written(tmp_path) / "adapter_model.safetensors"
    stored = load_file(file)
    save_file({name: value for name, value in stored.items() if "layers.1.self_attn.q_proj.lora_B" not in name}, file)
    with pytest.raises(UserError, match="both factors"):
        import_peft(tmp_path)
    with pytest.raises(UserError, match="rank 5"):
        import_peft(written(tmp_path, r=5))


PATHS = st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(".".join)


@given(names=st.sets(PATHS, min_size=1), data=st.data())
def test_endings_match_what_is_adapted_and_nothing_else(names: set[str], data: st.DataObject) -> None:
    adapted = data.draw(st.sets(st.sampled_from(sorted(names))))
    endings = shortest_endings(adapted, names)
    matched = {name for name in names if any(ends_with(name, end) for end in endings)}
    # A whole path is the longest ending there is; it may still end another module's path.
    unavoidable = {name for name in names if any(ends_with(name, whole) for whole in adapted)}
    assert adapted <= matched <= adapted | unavoidable


def test_endings_are_short() -> None:
    names = [f"h.{layer}.{module}" for layer in (0, 1) for module in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")]
    assert shortest_endings([name for name in names if "attn." in name], names) == ["attn.c_proj", "c_attn"]
    assert shortest_endings(["h.0.mlp.c_proj"], names) == ["0.mlp.c_proj"]
