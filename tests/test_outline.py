"""A recipe whose model and data are still to be fetched: what is known of them stands in, and is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants

from conftest import Said, World
from flocktune.config.load import parse_recipe
from flocktune.config.schema import Columns, DataConfig, LoraConfig, ModelConfig, RunConfig, RuntimeConfig
from flocktune.data import known as known_data
from flocktune.data.known import KnownData
from flocktune.errors import UserError
from flocktune.estimate import estimate
from flocktune.models import known as known_models
from flocktune.models.known import KnownModel
from flocktune.models.load import describe, load_skeleton
from flocktune.models.lora import shapes
from flocktune.outline import assumptions, outlined_instructions, refuse_unreachable

LLAMA, MISTRAL, SMALL = "meta-llama/Llama-2-7b-hf", "mistralai/Mistral-7B-v0.3", "HuggingFaceTB/SmolLM2-135M"
DOLLY = "databricks/databricks-dolly-15k"
KNOWN = {LLAMA: 6_738_415_616, MISTRAL: 7_248_023_552, "Qwen/Qwen2.5-0.5B": 494_032_768, SMALL: 134_515_008}
"""Parameters, as the models' own pages count them."""

DATA = {known.names: known for known in known_data.known_data().values()}


@pytest.mark.parametrize("known", known_models.known_models().values(), ids=lambda known: known.ids[0])
def test_the_shapes_of_a_known_model_have_as_many_parameters_as_it_has(known: KnownModel) -> None:
    assert describe(ModelConfig(path=known.ids[0])).parameters == known.parameters
    assert KNOWN.get(known.ids[0], known.parameters) == known.parameters


@pytest.mark.parametrize(
    ("path", "lora", "parameters"),
    [
        (LLAMA, LoraConfig(rank=8, targets=("q_proj", "v_proj")), 4_194_304),  # PEFT's own count
        (LLAMA, LoraConfig(rank=8, targets="all-linear"), 19_988_480),
        (MISTRAL, LoraConfig(rank=32, targets=("q_proj", "v_proj")), 13_631_488),
    ],
)
def test_an_adapter_of_a_known_model_is_as_large_as_a_real_ones(path: str, lora: LoraConfig, parameters: int) -> None:
    made = shapes(load_skeleton(ModelConfig(path=path)), lora)
    assert sum(int(np.prod(shape)) for shape in made.values()) == parameters


def test_what_is_on_this_machine_is_never_stood_in_for(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert known_models.stand_in(MISTRAL) is not None
    assert known_models.stand_in(MISTRAL.upper()) is known_models.stand_in(MISTRAL)
    assert known_models.stand_in(str(world.model)) is None
    assert known_models.stand_in("somebody/unknown") is None
    snapshot = tmp_path / "models--mistralai--Mistral-7B-v0.3"
    (snapshot / "refs").mkdir(parents=True)
    (snapshot / "refs/main").write_text("abc")
    (snapshot / "snapshots/abc").mkdir(parents=True)
    (snapshot / "snapshots/abc/config.json").write_text((world.model / "config.json").read_text())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert known_models.stand_in(MISTRAL) is None
    assert describe(ModelConfig(path=MISTRAL)).parameters == describe(ModelConfig(path=str(world.model))).parameters


def test_rows_that_are_here_are_never_stood_in_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import config

    monkeypatch.chdir(tmp_path)
    assert known_data.stand_in("gsm8k-train.jsonl") is not None
    Path("gsm8k-train.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    assert known_data.stand_in("gsm8k-train.jsonl") is None
    assert known_data.stand_in("nowhere.jsonl") is None
    code = "lucasmccabe-lmi/CodeAlpaca-20k"
    assert known_data.stand_in(code + ":train") is not None
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path))
    (tmp_path / "lucasmccabe-lmi___code_alpaca-20k").mkdir()  # as datasets names it
    assert known_data.stand_in(code) is None


@pytest.mark.parametrize("known", DATA.values(), ids=lambda one: one.names[0])
def test_a_known_data_sets_categories_are_all_its_rows(known: KnownData) -> None:
    assert not known.categories or sum(known.categories.values()) == known.rows
    examples = known.examples(Columns(client="category"))
    assert len(examples) == known.rows
    assert {example.client for example in examples} <= {*known.categories, None}
    assert len({example.client for example in examples}) == max(1, len(known.categories))


def test_rows_without_a_tokenizer_are_as_long_as_they_may_be(world: World) -> None:
    settings = DataConfig(max_tokens=96, max_rows=40)
    rows = outlined_instructions(str(world.data), settings, ModelConfig(path=SMALL))
    assert len(rows.examples) == len(rows.encoded) == 40
    assert rows.encoded.longest == 96
    assert rows.encoded.lengths.tolist() == rows.encoded.targets.tolist() == [96] * 40
    assert rows.take([3, 5]).encoded.tokens.shape == (192,)
    pairs = outlined_instructions(str(world.data), settings, ModelConfig(path=SMALL), pairs=True).encoded
    assert (len(pairs), pairs.lengths[0], len(pairs.tokens)) == (40, 192, 40 * 192)


FLOWERTUNE = f"""
rounds: 200
model: {{path: {MISTRAL}, dtype: bfloat16, quantization: 4bit, gradient_checkpointing: true}}
lora: {{rank: 32, alpha: 64, targets: [q_proj, v_proj]}}
data: {{train: flwrlabs/alpaca-gpt4, max_tokens: 64}}
allocation: {{kind: iid, clients: 20}}
scheduling: {{selection: {{kind: uniform, fraction: 0.1}}}}
local: {{steps: 10, batch_size: 2}}
"""


def test_bytes_are_counted_with_no_weights_and_no_rows() -> None:
    costs = estimate(parse_recipe(FLOWERTUNE))
    assert costs.bytes_in_all == 200 * 2 * 2 * 4 * 13_631_488  # rounds, clients, ways, float32
    assert round(costs.bytes_in_all / 2**30, 3) == 40.625  # FlowerTune's own count of the same, 40.7
    assert costs.steps_total == 200 * 2 * 10
    assert costs.train_rows + costs.test_rows == 52_002
    assert costs.client_weight_bytes < costs.client_memory_bytes < 2 * costs.client_weight_bytes
    assert len([text for text in costs.assumed if "\n  hf download " in text]) == 2


def test_a_recipe_for_a_machine_with_a_gpu_is_checked_on_one_without(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = parse_recipe(FLOWERTUNE, [f"model.path={SMALL}", f"data.train={world.data}", "allocation.clients=2"])
    assert "There is no CUDA device here" in estimate(config).assumed[-1]
    with pytest.raises(UserError, match=r"model\.quantization: expected none on cpu"):
        estimate(replace(config, runtime=replace(config.runtime, device="cpu")))
    whole = replace(config, model=replace(config.model, quantization="none"))
    assert not any("CUDA" in text for text in estimate(whole).assumed)
    assert "There is no CUDA device here" in estimate(replace(whole, runtime=RuntimeConfig("cuda"))).assumed[-1]


def test_owners_are_the_categories_that_are_known(world: World) -> None:
    text = f"data: {{train: {DOLLY}, columns: {{client: category}}}}\nallocation: {{kind: natural}}"
    config = parse_recipe(text, [f"model.path={world.model}", "data.max_tokens=32", "evaluation.generate=false"])
    costs = estimate(config)
    assert costs.clients == 8
    assert costs.rows_per_client[0] == 709 - 10
    assert costs.rows_per_client[2] == 3742 - 10


# --- a run -------------------------------------------------------------------------------------------------


def test_a_run_with_no_network_says_at_once_what_to_fetch_and_how(cli: Callable[..., Said], tmp_path: Path) -> None:
    recipe = tmp_path / "far.yaml"
    recipe.write_text(FLOWERTUNE)
    said = cli("run", recipe, "--out", tmp_path / "out")
    assert said.code == 2
    flat = " ".join(said.err.split())
    assert f"model.path: expected {MISTRAL} on this machine, or a network, got neither" in flat
    assert f"hf download {MISTRAL} --local-dir FOLDER; then model.path=FOLDER" in flat
    assert "data.train: expected flwrlabs/alpaca-gpt4 on this machine" in flat
    assert "hf download --repo-type dataset flwrlabs/alpaca-gpt4 --local-dir FOLDER; then data.train=FOLDER" in flat
    assert not (tmp_path / "out").exists()


def test_a_check_that_needs_the_hub_says_so_at_once(cli: Callable[..., Said], tmp_path: Path) -> None:
    recipe = tmp_path / "unknown.yaml"
    recipe.write_text("model: {path: somebody/unknown}\ndata: {train: flwrlabs/alpaca-gpt4}\n")
    said = cli("check", recipe)
    assert said.code == 2
    flat = " ".join(said.err.split())
    assert flat.count("error:") == 1  # of what is known nothing needs to be fetched
    assert "model.path: expected somebody/unknown on this machine, or a network, got neither" in flat


def test_with_a_network_only_files_that_are_not_on_the_hub_are_missed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("flocktune.outline.hub_answers", lambda: True)
    config = parse_recipe(FLOWERTUNE)
    refuse_unreachable(config)
    with pytest.raises(UserError, match=r"data.train: expected the file gsm8k-train.jsonl, got nothing.*curl -Lo"):
        refuse_unreachable(replace(config, data=replace(config.data, train="gsm8k-train.jsonl")))


def test_nothing_is_asked_or_assumed_of_a_recipe_whose_things_are_here(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flocktune.outline.hub_answers", lambda: pytest.fail("the hub was asked"))
    config: RunConfig = parse_recipe(world.recipe.read_text())
    refuse_unreachable(config)
    assert assumptions(config) == []
