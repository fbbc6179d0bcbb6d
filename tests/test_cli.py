"""Every verb, as a user types it, on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conftest import Said, World
from flocktune.config.load import load_recipe
from flocktune.files import sha256_file
from flocktune.models.load import load_model
from flocktune.models.lora import attach
from flocktune.models.peft_io import import_peft

VERBS = ("init", "check", "run", "resume", "study", "split", "eval", "generate", "export", "memorisation", "report",
         "chat", "playground")  # fmt: skip


@pytest.fixture(scope="module")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison: base, one local, FedIT, centralised."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    from flocktune import api

    compare = ["compare.base=true", "compare.local=1", "compare.centralised=true"]
    api.run(load_recipe(world.recipe, compare), folder)
    return folder


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    script = (
        "import sys\nfrom flocktune.cli import main\nsys.argv = ['flocktune', '--help']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'pydantic', 'numpy', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(cli, verb: str) -> None:
    said = cli(verb, "--help")
    assert said.code == 0
    assert "Usage: flocktune" in said.out
    assert max(map(len, said.out.splitlines())) <= 80


def test_init_check_run_and_what_a_run_leaves(cli, world: World, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("init", "mine.yaml").code == 0
    small = [
        f"model.path={world.model}", f"data.train={world.data}", "lora.rank=2",
        "allocation.clients=3", "allocation.min_rows=2",
        "data.test_rows_per_category=2", "rounds=2", "local.steps=1", "evaluation.max_new_tokens=2", "compare.local=1",
        "scheduling.selection.fraction=0.67",
    ]  # fmt: skip
    checked = cli("check", "mine.yaml", *small)
    assert checked.code == 0
    for words in ("frozen", "3, 2 a round", "42 to train on, 6 held out", "optimiser steps", "mine.yaml is sound"):
        assert words in checked.out
    assert not (tmp_path / "runs").exists(), "check trains nothing"
    ran = cli("run", "mine.yaml", *small, "--quiet")
    assert ran.code == 0, ran.all
    assert max(map(len, ran.out.splitlines())) <= 80, ran.out
    for words in ("Base model", "Local, client-0", "FedIT", "Centralised", "Report: runs/mine/report.html"):
        assert words in ran.out
    entries = json.loads((tmp_path / "runs/mine/summary.json").read_text())
    assert list(entries) == ["base", "local_1", "fedit", "centralised"]
    for name, entry in entries.items():
        assert entry["adapter_sha256"], name
        assert entry["rounds"] == (0 if name == "base" else 2)
        assert set(entry["metrics"]["held_out"]) == {"overall", "categories", "intervals"}
        assert entry["peak_memory_bytes"] > 0
    fedit = entries["fedit"]
    assert fedit["bytes_down"] == fedit["bytes_up"] > 0
    for file in ("recipe.yaml", "metrics.jsonl", "answers.jsonl", "summary.json", "adapter/adapter_config.json"):
        assert (tmp_path / "runs/mine/fedit" / file).exists()
    assert cli("resume", "runs/mine", "--quiet").code == 0, "a finished run only shows its result again"


def test_seeds_give_means_and_deviations(cli, world: World, tmp_path: Path) -> None:
    said = cli("run", world.recipe, "rounds=1", "--seeds", "0,3", "--out", tmp_path / "seeds", "--quiet")
    assert said.code == 0, said.all
    assert "±" in said.out
    entry = json.loads((tmp_path / "seeds/summary.json").read_text())["fedit"]
    assert entry["seeds"] == [0, 3]
    losses = [run["metrics"]["held_out"]["overall"]["loss"] for run in entry["runs"]]
    assert entry["metrics"]["held_out"]["overall"]["loss"] == pytest.approx(sum(losses) / 2)
    assert (tmp_path / "seeds/seed-3/fedit/adapter").is_dir()


def test_eval_on_held_out_rows_repeats_the_runs_own_numbers(cli, finished: Path, tmp_path: Path) -> None:
    said = cli("eval", finished, "--json", tmp_path / "numbers.json")
    assert said.code == 0, said.all
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    summary = json.loads((finished / "fedit/summary.json").read_text())
    assert numbers == {"task": "text", **summary["metrics"]["held_out"]}
    for category in ("colour", "size", "sum", "all"):
        assert category in said.out


def test_eval_of_other_data_methods_and_adapters(cli, finished: Path, world: World) -> None:
    assert cli("eval", finished, "--data", world.data, "--max-rows", "4", "--method", "centralised").code == 0
    assert cli("export", finished, "--to", finished.parent / "exported").code == 0
    exported = cli(
        "eval", finished.parent / "exported", "--data", world.data, "--json", finished.parent / "exported.json"
    )
    assert exported.code == 0, exported.all
    assert cli("eval", finished, "--data", world.data, "--json", finished.parent / "own.json").code == 0
    own, other = (json.loads((finished.parent / name).read_text()) for name in ("own.json", "exported.json"))
    assert own["overall"]["loss"] == other["overall"]["loss"], "an exported adapter knows its prompt template"
    adapter = cli(
        "eval", finished / "fedit" / "adapter", "--data", world.data, "--max-rows", "4", "--base", world.model
    )
    assert adapter.code == 0, adapter.all
    assert cli("eval", finished / "fedit", "--max-rows", "4").code == 0
    wrong = cli("eval", finished, "--method", "magic")
    assert wrong.code == 2
    assert "'magic'" in wrong.err


def test_generate_answers_a_prompt_and_points_to_chat_without_one(cli, finished: Path) -> None:
    said = cli("generate", finished, "--prompt", "Say red", "--max-new-tokens", "4")
    assert said.code == 0, said.all
    assert said.out.strip()
    without = cli("generate", finished)
    assert without.code == 2
    assert f"flocktune chat {finished}" in without.err.replace("\n", "")


def test_exported_adapters_and_merged_models_answer_as_ours(cli, finished: Path, world: World, tmp_path: Path) -> None:
    assert cli("export", finished, "--to", tmp_path / "adapter").code == 0
    assert cli("export", finished, "--to", tmp_path / "merged", "--merged").code == 0
    config = load_recipe(finished / "fedit/recipe.yaml")
    tensors, _ = import_peft(finished / "fedit/adapter")
    adapter = attach(load_model(config.model, torch.device("cpu")), config.lora, seed=0)
    adapter.load(tensors)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        ours = adapter.model(input_ids=ids).logits
        base = AutoModelForCausalLM.from_pretrained(world.model)
        theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=ids).logits
        untuned = AutoModelForCausalLM.from_pretrained(world.model)(input_ids=ids).logits
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(merged, ours, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(untuned, ours, atol=1e-3), "the adapter does something"
    assert "tokenizer.json" in {path.name for path in (tmp_path / "merged").iterdir()}


def test_the_report_is_one_file_that_needs_no_network(cli, finished: Path) -> None:
    assert cli("report", finished).code == 0
    page = (finished / "report.html").read_text()
    for words in ("FedIT", "Centralised", "colour", "held_out", "torch"):
        assert words in page
    for tag in ('src="http', 'href="http', "<script src", "@import", "url(http"):
        assert tag not in page


SPLITS = {
    "iid": [],
    "by_category": ["--categories-per-client", "1"],
    "dirichlet": ["--alpha", "0.3"],
    "cluster_dirichlet": [],
    "quantity_skew": [],
}


@pytest.mark.parametrize("kind", SPLITS)
def test_split_writes_every_row_once(cli, world: World, tmp_path: Path, kind: str) -> None:
    options = ["--by", kind, "--clients", "3", "--test-rows-per-category", "2", *SPLITS[kind]]
    said = cli("split", world.data, "--to", tmp_path / "parts", *options)
    assert said.code == 0, said.all
    files = [*(tmp_path / "parts/clients").glob("*.jsonl"), tmp_path / "parts/test.jsonl"]
    assert len(files) == 4
    rows = [json.loads(line)["instruction"] for file in files for line in file.read_text().splitlines()]
    assert sorted(rows) == sorted(json.loads(line)["instruction"] for line in world.data.read_text().splitlines())
    assert "<svg" in (tmp_path / "parts/who-holds-what.html").read_text()
    again = cli("split", world.data, "--to", tmp_path / "parts", *options)
    assert again.code == 2
    assert "a new or empty folder" in again.err


def test_a_split_folder_is_a_natural_allocation(cli, world: World, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    assert cli("split", world.data, "--to", parts, "--clients", "3", "--test-rows-per-category", "2").code == 0
    said = cli(
        "run", world.recipe, f"data.train={parts / 'clients'}", f"data.test={parts / 'test.jsonl'}",
        "allocation.kind=natural", "rounds=1", "--out", tmp_path / "run", "--quiet",
    )  # fmt: skip
    assert said.code == 0, said.all
    start = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    sizes = {path.stem: len(path.read_text().splitlines()) for path in (parts / "clients").iterdir()}
    assert {name: client["rows"] for name, client in start["clients"].items()} == sizes
    assert sum(start["test"].values()) == 6


def test_no_data_is_in_a_metric(finished: Path, world: World) -> None:
    answers = [json.loads(line)["response"] for line in world.data.read_text().splitlines()]
    for log in finished.rglob("metrics.jsonl"):
        text = log.read_text()
        assert "Which" not in text
        assert not any(answer in text for answer in answers)


def test_the_same_recipe_gives_the_same_bits(cli, world: World, tmp_path: Path) -> None:
    for name in ("one", "two"):
        said: Said = cli("run", world.recipe, "--out", tmp_path / name, "--quiet")
        assert said.code == 0
    one, two = (tmp_path / name / "adapter/adapter_model.safetensors" for name in ("one", "two"))
    assert sha256_file(one) == sha256_file(two)
    assert all(torch.isfinite(value).all() for value in load_file(one).values())


def test_trackers_get_the_numbers_and_a_missing_one_is_named_before_anything_is_made(
    cli, world: World, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said = cli("run", world.recipe, "trackers=[tensorboard]", "--out", tmp_path / "run", "--quiet")
    assert said.code == 0, said.all
    (events,) = (tmp_path / "run/trackers").rglob("events.out.*")
    shown = EventAccumulator(str(events)).Reload()
    assert len(shown.Scalars("train_loss")) == 3
    assert "held_out/loss" in shown.Tags()["scalars"]
    missing = cli("run", world.recipe, "trackers=[mlflow]", "--out", tmp_path / "none")
    assert missing.code == 2
    assert "trackers: expected installed trackers, got 'mlflow'" in missing.err
    assert not (tmp_path / "none").exists()
