"""What an export is to others: PEFT, transformers, a server, vLLM's reader, a hub's page."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, pipeline

from conftest import World, dolly_rows, write_rows
from flocktune import api
from flocktune.config.load import load_recipe, parse_recipe
from flocktune.data.encoding import encode_prompt
from flocktune.data.examples import Example
from flocktune.errors import UserError
from flocktune.exporting import export_result
from flocktune.models.vllm_layout import max_lora_rank, vllm_problems
from flocktune.report.card import OWNER, Export, hub_id, model_card, shared_recipe
from flocktune.report.runs import load_experiment
from flocktune.results import Tuned, answer_stream, open_result
from tiny_models import tiny_model, tiny_tokenizer

QUICK = ["rounds=1", "local.steps=1", "evaluation.every=0", "evaluation.max_new_tokens=2", "name=card"]
BIO = [
    "method=fedbiot", "lora.targets=all-linear", "emulator={adapter_layers: 1, drop: 0.5}",
    "alignment={first_steps: 1, steps: 0, batch_size: 4, fidelity_rows: 0, public: PUBLIC}",
]  # fmt: skip
DP = [
    "scheduling={selection: {kind: poisson, fraction: 1.0}}", "aggregation.weights=equal",
    "privacy={kind: user, clip_norm: 0.5, delta: 1.0e-3, noise_multiplier: 2.0}",
]  # fmt: skip


@pytest.fixture(scope="module")
def deep(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """The world with a model of four layers, so that an emulator can lack some."""
    folder = tmp_path_factory.mktemp("deep")
    tiny_model("llama", layers=4).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    write_rows(folder / "public.jsonl", dolly_rows(12))
    recipe = folder / "recipe.yaml"
    recipe.write_text(world.recipe.read_text().replace(str(world.model), str(folder / "model")))
    return World(folder, folder / "model", world.data, recipe)


@pytest.fixture(scope="module")
def runs(deep: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run of each kind, finished."""
    folder = tmp_path_factory.mktemp("runs")
    public = [change.replace("PUBLIC", str(deep.folder / "public.jsonl")) for change in BIO]
    kinds = {"compared": ["compare.base=true", "compare.local=1"], "bio": public, "private": DP}
    for name, changes in kinds.items():
        api.run(load_recipe(deep.recipe, [*QUICK, *changes]), folder / name)
    return {name: folder / name for name in kinds}


@pytest.fixture(scope="module")
def exports(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    for name, run in runs.items():
        export_result(run, None, folder / name)
    export_result(runs["compared"], None, folder / "merged", merged=True, base_name="owner/base")
    return {name: folder / name for name in (*runs, "merged")}


# --- the commands of the card and of the guide ------------------------------------------------------


@pytest.mark.parametrize("kind", ["compared", "bio", "merged"])
def test_the_cards_own_code_gives_our_answer(exports, runs, deep: World, kind: str, capsys) -> None:
    card = (exports[kind] / "README.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    code = code.replace("PATH/TO/THIS", str(exports[kind])).replace("PATH/TO/BASE", str(deep.model))
    exec(compile(code, "README.md", "exec"), {})
    tuned = open_result(runs["compared" if kind == "merged" else kind])
    mine = "".join(answer_stream(tuned, "Name three fruits.", max_new_tokens=64))
    assert capsys.readouterr().out.strip() == mine
    assert mine


def test_an_exported_tokenizer_carries_the_runs_template(exports, deep: World) -> None:
    for folder in exports.values():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for context in ("", "Number 3 is here."):
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": "Which?"}], add_generation_prompt=True, return_dict=False, context=context
            )
            mine = encode_prompt(Example("Which?", context), tiny_tokenizer(), template="short", max_tokens=99)
            assert list(ids) == mine
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        assert settings["tokenizer_class"] != "TokenizersBackend", "older transformers could not load it"


def test_a_pipeline_answers_from_a_merged_export(exports, runs) -> None:
    answers = pipeline("text-generation", model=str(exports["merged"]), device="cpu")
    [said] = answers([{"role": "user", "content": "Which colour?"}], max_new_tokens=6, do_sample=False)
    mine = "".join(answer_stream(open_result(runs["compared"]), "Which colour?", max_new_tokens=6))
    assert said["generated_text"][-1]["content"].strip() == mine


# --- vLLM -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["compared", "bio", "private"])
def test_vllm_would_read_our_adapters(exports, kind: str) -> None:
    assert vllm_problems(exports[kind]) == []
    assert "--max-lora-rank 8 " in (exports[kind] / "README.md").read_text()


def test_what_vllm_would_refuse_is_named(exports, tmp_path: Path) -> None:
    config = json.loads((exports["compared"] / "adapter_config.json").read_text())
    weights = load_file(exports["compared"] / "adapter_model.safetensors")

    def problems(tensors=weights, **changes) -> str:
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        return "\n".join(map(str, vllm_problems(tmp_path)))

    assert problems() == ""
    assert problems(layers_to_transform=[1], init_lora_weights="gaussian", use_rslora=True) == ""
    for key, value in {"use_dora": True, "modules_to_save": ["lm_head"], "bias": "all", "lora_bias": True,
                       "init_lora_weights": "pissa", "layer_replication": [[0, 1]]}.items():  # fmt: skip
        assert key in problems(**{key: value})
    assert "rank r" in problems(r=513)
    assert "rank 4 in" in problems(r=4)
    name, value = next(iter(weights.items()))
    assert "alone" in problems({key: tensor for key, tensor in weights.items() if key != name})
    assert "'head.weight'" in problems({**weights, "head.weight": value.clone()})
    (tmp_path / "adapter_model.safetensors").write_bytes(b"half")
    assert "safetensors" in "\n".join(map(str, vllm_problems(tmp_path)))


def test_the_rank_that_vllm_is_told() -> None:
    assert [max_lora_rank(rank) for rank in (1, 2, 8, 9, 64, 257, 512, 513)] == [1, 8, 8, 16, 64, 320, 512, None]


def test_factors_of_differing_rank_are_exported_as_one_that_vllm_reads(runs, exports, tmp_path: Path) -> None:
    from flocktune.exporting import write_adapter

    tuned = open_result(runs["compared"])
    sides = {}
    for name, value in tuned.adapter.items():
        end = ".side_A" if name.endswith(".lora_A") else ".side_B"
        module = name.rpartition(".")[0]
        sides[module + end] = torch.ones((3, value.shape[1]) if end == ".side_A" else (value.shape[0], 3))
    write_adapter(tmp_path, {**tuned.adapter, **sides}, tuned.config, tuned.base.model)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 5
    assert vllm_problems(tmp_path) == []


# --- the card ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["compared", "bio", "private", "merged"])
def test_a_card_can_be_published(exports, runs, deep: World, kind: str) -> None:
    card = ModelCard.load(exports[kind] / "README.md")
    assert card.data.library_name == ("transformers" if kind == "merged" else "peft")
    assert card.data.base_model == ("owner/base" if kind == "merged" else None)
    assert card.data.license is None
    assert "federated-learning" in card.data.tags
    assert ("differential-privacy" in card.data.tags) == (kind == "private")
    assert OWNER in card.content
    published = card.content + (exports[kind] / "training_recipe.yaml").read_text()
    rows = [json.loads(line) for line in deep.data.read_text().splitlines()]
    told = [str(deep.folder), str(runs["bio"].parent), str(deep.data), "client-0", "/tmp", "colour"]
    told += [row["instruction"] for row in rows] + [row["response"] for row in rows]
    assert [text for text in told if text in published] == []


def test_a_card_says_how_it_was_made_and_what_came_out(exports) -> None:
    compared, bio, private, merged = (
        (exports[kind] / "README.md").read_text() for kind in ("compared", "bio", "private", "merged")
    )
    assert re.search(r"42 rows of 4 clients", compared)
    assert "| Base model |" in compared
    assert "| Local 1 " in compared
    assert "| FedIT " in compared
    assert "On 6 held-out rows" in compared
    assert "Differential privacy: none." in compared
    assert "Secure aggregation: none." in compared
    assert "Clients were simulated" in compared
    assert "FedBiOT" in bio
    assert "3 of 4 layers" in bio
    assert "AdapEmu" in bio
    assert "Differential privacy of a client" in private
    assert re.search(r"epsilon [\d.]+ at delta 0\.001", private)
    assert "[owner/base](https://huggingface.co/owner/base)" in merged
    assert "| torch |" in merged


def test_a_card_of_owners_and_of_sums_says_so(runs) -> None:
    config = parse_recipe("aggregation: {weights: equal}\nsecure_aggregation: {}\nengine: {kind: flower}\n")
    export = Export("fedit", config, None, merged=False, chat_template=False, rank=8, max_lora_rank=None)
    card = model_card(export, load_experiment(runs["compared"]))
    assert "Secure aggregation: yes." in card
    assert "owners of data on machines of their own" in card
    assert "simulated" not in card
    assert "vllm serve" not in card, "vLLM would refuse it"
    assert f"{OWNER} how to prompt it" in card
    assert f"{OWNER} where the base model comes from" not in card, "it is the embedded one"


def test_a_shared_recipe_keeps_settings_and_hub_names_only(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "model").mkdir()
    config = parse_recipe(
        "name: secret-name\nmodel: {path: here/model}\n"
        "data: {train: owner/rows, test: rows/test.jsonl, template: {with_context: 'a/b', without_context: c}}\n"
        "lora: {targets: [q_proj], start_from: ~/adapters/old}\n"
        "scheduling: {selection: {kind: named, clients: [hospital-a]}}\n"
        "engine: {kind: ray, address: 'head:6379'}\n"
    )
    text = shared_recipe(config)
    tree = yaml.safe_load(text)
    assert tree["model"]["path"] == tree["data"]["test"] == tree["lora"]["start_from"] == "a-local-path"
    assert tree["data"]["train"] == "owner/rows"
    assert tree["data"]["template"] == {"with_context": "a/b", "without_context": "c"}
    for secret in ("hospital", "6379", "here", "adapters", "secret-name"):
        assert secret not in text


def test_what_is_a_hubs_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model").mkdir()
    assert hub_id("owner/name") == "owner/name"
    assert hub_id("owner/name:test") == "owner/name"
    for local in ("mine/model", "data/rows.jsonl", "/a/b", "~/b", "./b", "a/b/c", "embedded", "C:\\a/b"):
        assert hub_id(local) is None


@pytest.mark.parametrize("merged", [False, True])
def test_an_export_can_be_read_by_whom_the_umask_lets(runs, tmp_path: Path, merged: bool) -> None:
    """It is served under another account, often; safetensors are written for their owner alone."""
    before = os.umask(0o027)
    try:
        export_result(runs["compared"], None, tmp_path / "export", merged=merged)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "export").iterdir()} == {0o640}


def test_an_export_never_overwrites_and_leaves_nothing_half(runs, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "README.md").write_text("mine")
    with pytest.raises(UserError, match="a new or empty folder"):
        export_result(runs["compared"], None, tmp_path / "full")
    assert (tmp_path / "full" / "README.md").read_text() == "mine"

    def full(*arguments) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("flocktune.exporting.model_card", full)
    with pytest.raises(UserError, match="No space left"):
        export_result(runs["compared"], None, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --- the guide --------------------------------------------------------------------------------------

GUIDE = (Path(__file__).parent.parent / "docs" / "serving.md").read_text()


@pytest.fixture
def guided(exports, runs, deep: World, tmp_path: Path, monkeypatch) -> Tuned:
    """A folder as the guide has it, and the run whose result it serves."""
    for name, there in {"adapter": exports["compared"], "whole": exports["merged"], "base": deep.model}.items():
        (tmp_path / name).symlink_to(there)
    monkeypatch.chdir(tmp_path)
    return open_result(runs["compared"])


def test_the_guides_programs_give_our_answers(guided: Tuned, capsys) -> None:
    programs = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    assert len(programs) == 2
    mine = "".join(answer_stream(guided, "Name three fruits.", max_new_tokens=24))
    for program in programs:
        exec(compile(program, "serving.md", "exec"), {})
        assert mine in capsys.readouterr().out


def test_the_guides_server_gives_our_answer_about_a_context(guided: Tuned, tmp_path: Path) -> None:
    [command] = re.findall(r"^(transformers serve .*)$", GUIDE, re.MULTILINE)
    [request] = re.findall(r"-d '(\{.*?\})'$", GUIDE, re.DOTALL | re.MULTILINE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = [str(Path(sys.executable).with_name("transformers")), *command.replace("8000", str(port)).split()[1:]]
    with (tmp_path / "log").open("w") as log, subprocess.Popen(program, stdout=log, stderr=log) as server:
        try:
            asked = Request(f"http://127.0.0.1:{port}/v1/chat/completions", request.encode())
            asked.add_header("Content-Type", "application/json")
            said = answered(asked, server)
        finally:
            server.terminate()
    mine = "".join(answer_stream(guided, "Which number is here?", "Number 3 is here.", max_new_tokens=24))
    assert said["choices"][0]["message"]["content"].strip() == mine, (tmp_path / "log").read_text()
    assert mine != "".join(answer_stream(guided, "Which number is here?", max_new_tokens=24))


def answered(request: Request, server: subprocess.Popen) -> Any:
    """The JSON that a server says, once it is up."""
    while server.poll() is None:
        try:
            return json.loads(urlopen(request).read())
        except URLError as error:
            if not isinstance(error.reason, ConnectionRefusedError):
                raise
            time.sleep(0.2)
    raise AssertionError(f"the server ended with {server.returncode}")
