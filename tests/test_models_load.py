"""Finding, checking and loading bases: what is missing is said, and nothing is loaded by halves."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from flocktune.config.schema import LoraConfig, ModelConfig
from flocktune.errors import UserError
from flocktune.models import load
from flocktune.models.int8 import Int8Linear
from flocktune.models.load import (
    describe,
    load_model,
    load_skeleton,
    load_tokenizer,
    model_digest,
    pad_id,
    pick_device,
    resolve_model,
)
from flocktune.models.lora import attach, shapes
from flocktune.models.recompute import checkpoint_layers
from tiny_models import FAMILIES, save_tiny, tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
IDS = torch.randint(3, 259, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", "llama")


def config(folder: Path | str, **changes: object) -> ModelConfig:
    return ModelConfig(path=str(folder), **changes)  # type: ignore[arg-type]


def test_folder_hub_id_and_neither(folder: Path) -> None:
    assert resolve_model(str(folder)) == folder
    assert resolve_model("owner/a-model.1") == "owner/a-model.1"
    for wrong in ("gpt2", "./models/none", "/none/model", "a/b/c", "no such folder"):
        with pytest.raises(UserError, match=r"model\.path"):
            resolve_model(wrong)


def test_embedded_is_the_packages_own_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "embedded_model", lambda: folder)
    assert resolve_model("embedded") == folder
    monkeypatch.setattr(load, "embedded_model", lambda: folder / "none")
    with pytest.raises(UserError):
        resolve_model("embedded")


def test_everything_missing_in_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        resolve_model(str(tmp_path))
    assert len(caught.value.problems) == 2
    assert "config.json" in str(caught.value)
    assert "safetensors" in str(caught.value)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled and therefore"):
        load_model(config(folder), CPU)


def test_missing_shards_are_named(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"no model-2\.safetensors\b"):
        resolve_model(str(folder))


@pytest.mark.parametrize("kept", [0, 5, 1000])
def test_damaged_weights_give_one_clear_error(folder: Path, kept: int) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"whole safetensors file .*model\.safetensors") as caught:
        load_model(config(folder), CPU)
    assert len(caught.value.problems) == 1


def test_a_parameter_without_weights_is_an_error_not_a_random_start(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        load_model(config(folder), CPU)


def test_weights_of_another_shape_are_an_error(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"intermediate_size": 47}))
    with pytest.raises(UserError, match=r"model\.path"):
        load_model(config(folder), CPU)


def test_config_that_is_not_json_or_not_a_language_model(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"model\.path"):
        load_model(config(folder), CPU)
    (folder / "config.json").write_text(json.dumps({"model_type": "no such family"}))
    with pytest.raises(UserError, match=r"model\.path"):
        load_skeleton(config(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_model_is_the_saved_one_frozen_in_eval_mode(family: str, tmp_path: Path) -> None:
    model = load_model(config(save_tiny(tmp_path, family)), CPU)
    assert not model.training
    assert not any(value.requires_grad for value in model.parameters())
    expected = dict(tiny_model(family).named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in model.named_parameters())


def test_dtype(folder: Path) -> None:
    model = load_model(config(folder, dtype="bfloat16"), CPU)
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}


def test_loading_is_quiet_and_leaves_the_settings_alone(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    level = logging.get_verbosity()
    logging.set_verbosity_warning()
    logging.enable_progress_bar()
    try:
        for call in (lambda: load_model(config(folder), CPU), lambda: load_tokenizer(config(folder))):
            call()
            assert capfd.readouterr() == ("", "")
            assert logging.get_verbosity() == logging.WARNING
            assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(level)


def test_quantisation_names_all_that_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        load_model(config(folder, quantization="4bit"), CPU)
    assert len(caught.value.problems) == 2
    assert "flocktune[quantization]" in str(caught.value)
    assert "NVIDIA" in str(caught.value)


@pytest.mark.parametrize(("name", "bits"), [("8bit", "load_in_8bit"), ("4bit", "load_in_4bit")])
def test_quantisation_settings_where_it_is_possible(name: str, bits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: object())
    settings = load.quantization_settings(config("x", quantization=name, dtype="bfloat16"), torch.device("cuda"))
    assert getattr(settings, bits)
    if name == "4bit":
        assert settings.bnb_4bit_compute_dtype == torch.bfloat16


def test_devices() -> None:
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for wrong in ("gpu", "cuda:99", "cpu:1", "meta"):
        with pytest.raises(UserError, match=r"runtime\.device"):
            pick_device(wrong)


def test_pad_falls_back_to_the_end_token() -> None:
    assert pad_id(tiny_tokenizer()) == 2
    assert pad_id(tiny_tokenizer(pad=False)) == 1
    bare = tiny_tokenizer(pad=False)
    bare.eos_token = None
    with pytest.raises(UserError, match="eos_token"):
        pad_id(bare)


def test_tokenizer_round_trips_and_its_absence_is_an_error(folder: Path) -> None:
    tokenizer = load_tokenizer(config(folder))
    assert tokenizer.decode(tokenizer.encode("naïve ß\n\t☃")) == "naïve ß\n\t☃"
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="a tokenizer"):
        load_tokenizer(config(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_description_and_skeleton_agree_with_the_model(family: str, tmp_path: Path) -> None:
    settings = config(save_tiny(tmp_path, family), dtype="bfloat16")
    skeleton, model = load_skeleton(settings), tiny_model(family)
    assert {value.device.type for value in skeleton.parameters()} == {"meta"}
    assert shapes(skeleton, LoraConfig()) == shapes(model, LoraConfig())
    found = describe(settings, skeleton)
    assert found.parameters == sum(value.numel() for value in model.parameters())
    assert (found.layers, found.width, found.vocabulary, found.positions) == (2, 32, 260, 256)


def test_bytes_of_a_base_by_dtype_and_quantisation(folder: Path) -> None:
    model = tiny_model("llama")
    total = sum(value.numel() for value in model.parameters())
    packed = sum(value.numel() for name, value in model.named_parameters() if name.endswith("_proj.weight"))
    size = {
        key: describe(config(folder, **key_changes)).base_bytes
        for key, key_changes in {
            "float32": {},
            "bfloat16": {"dtype": "bfloat16"},
            "4bit": {"dtype": "bfloat16", "quantization": "4bit"},
        }.items()
    }
    assert size == {"float32": 4 * total, "bfloat16": 2 * total, "4bit": 2 * (total - packed) + packed // 2}


def test_digest_follows_bytes_not_places(folder: Path, tmp_path: Path) -> None:
    first = model_digest(config(folder))
    twin = shutil.copytree(folder, tmp_path / "elsewhere")
    (twin / "README.md").write_text("not part of the model")
    assert model_digest(config(twin)) == first
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        other = shutil.copytree(folder, tmp_path / f"changed {name}")
        data = (other / name).read_bytes()
        (other / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if name.endswith("tensors") else data + b"\n")
        assert model_digest(config(other)) != first, name


def test_digest_of_a_hub_id_is_that_of_its_snapshot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def snapshot(hub_id: str, **options: object) -> str:
        asked.append((hub_id, options.get("local_files_only", False)))
        if options.get("local_files_only"):
            raise FileNotFoundError
        return str(folder)

    monkeypatch.setattr(load, "snapshot_download", snapshot)
    assert model_digest(config("owner/name")) == model_digest(config(folder))
    assert asked == [("owner/name", True), ("owner/name", False)]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_nothing_but_memory(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, family)
    gradients, saved_bytes = [], []
    for checkpointing in (False, True):
        model = load_model(config(tmp_path, gradient_checkpointing=checkpointing), CPU)
        adapter = attach(model, LoraConfig(), seed=0)
        with torch.no_grad():
            for value in adapter.parameters.values():
                value.add_(0.05)
        sizes: list[int] = []

        def keep(saved: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(saved.numel())
            return saved

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            loss = model(input_ids=IDS, use_cache=False).logits.square().mean()
        loss.backward()
        gradients.append({name: value.grad for name, value in adapter.parameters.items()})
        saved_bytes.append(sum(sizes))
    assert all(value is not None and torch.equal(value, gradients[1][name]) for name, value in gradients[0].items())
    assert saved_bytes[1] < saved_bytes[0] / 2


def test_gradient_checkpointing_needs_layers() -> None:
    with pytest.raises(UserError, match="gradient_checkpointing"):
        checkpoint_layers(torch.nn.Linear(2, 2))


# --- 8 bits on a CPU -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bit_products_are_those_of_the_rounded_weights(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(24, 10)
    packed = Int8Linear(plain.to(dtype))
    rounded = packed.scale[:, None] * packed.weight
    off = (rounded - plain.weight.float()).abs() / packed.scale[:, None]
    assert float(off.detach().max()) <= 0.5 + 1e-5, "to the nearest of 255 values"
    assert int(packed.weight.abs().max()) == 127
    x = torch.randn(3, 5, 24, dtype=dtype, requires_grad=True)
    same = x.detach().float().requires_grad_()
    packed(x).float().square().sum().backward()
    torch.nn.functional.linear(same, rounded.detach(), plain.bias.detach().float()).square().sum().backward()
    assert x.grad is not None
    assert same.grad is not None
    assert (x.grad.float() - same.grad).norm() < (1e-5 if dtype == torch.float32 else 2e-2) * same.grad.norm()


def test_a_row_of_zeros_stays_zero() -> None:
    plain = torch.nn.Linear(4, 2, bias=False)
    torch.nn.init.zeros_(plain.weight)
    assert torch.equal(Int8Linear(plain)(torch.ones(1, 4)), torch.zeros(1, 2))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_eight_bit_base_trains_on_a_cpu(folder: Path, dtype: str) -> None:
    whole, packed = (load_model(config(folder, dtype=dtype, quantization=bits), CPU) for bits in ("none", "8bit"))
    linear = [module for module in packed.modules() if isinstance(module, Int8Linear)]
    assert len(linear) == 2 * 7
    assert not isinstance(packed.get_output_embeddings(), Int8Linear)
    held = sum(value.numel() * value.element_size() for value in packed.parameters())
    assert held == describe(config(folder, dtype=dtype, quantization="8bit")).base_bytes
    with torch.no_grad():
        near, exact = (model(input_ids=IDS, use_cache=False).logits.float() for model in (packed, whole))
    assert 0 < (near - exact).norm() < 0.05 * exact.norm()
    adapter = attach(packed, LoraConfig(rank=3), seed=0)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        loss = packed(input_ids=IDS, use_cache=False).logits.square().mean()
    loss.backward()
    assert all(value.grad is not None for value in adapter.parameters.values())
    unpacked = {tuple(module.weight.shape) for module in linear}
    assert not any(saved.is_floating_point() and tuple(saved.shape) in unpacked for saved in kept)
    with pytest.raises(UserError, match=r"model\.quantization"):
        adapter.merge()


def test_eight_bits_need_linear_modules(tmp_path: Path) -> None:
    save_tiny(tmp_path, "gpt2")
    with pytest.raises(UserError, match="a model with linear modules"):
        load_model(config(tmp_path, quantization="8bit"), CPU)
