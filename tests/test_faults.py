"""What can go wrong says what was expected, what was got, where and what to do; nothing that was saved is lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import Said, World, dolly_rows, write_rows
from flocktune.config.load import load_recipe
from flocktune.config.schema import Columns
from flocktune.data.sources import read_examples
from flocktune.engine.checkpoint import load_checkpoint
from flocktune.files import exclusive, sha256_file
from flocktune.report.events import read_events
from forked_runs import ForkedRuns

Cli = Callable[..., Said]


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedRuns]:
    with ForkedRuns(tmp_path_factory.mktemp("forked"), {"CUDA_VISIBLE_DEVICES": ""}) as runs:
        yield runs


@pytest.fixture(scope="module")
def finished(forked: ForkedRuns, world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert forked.run("run", world.recipe, "--out", folder).code == 0
    return folder


def refused(said: Said, *words: str, code: int = 2) -> None:
    """One clear message: all the words, the exit code, no traceback."""
    text = said.all
    assert said.code == code, text
    assert "Traceback" not in text
    assert re.search(r"^(error|failed): ", said.err, re.MULTILINE), text
    for word in words:
        assert word in said.err, f"{word!r} is not in:\n{text}"


# --- recipes ---------------------------------------------------------------------------------------

RECIPES = {
    "unknown key": ("lorra.rank=2", ["lorra: expected a known setting, got an unknown one", "Did you mean lora"]),
    "unknown inner key": ("local.learning_rate=1e-3", ["local.learning_rate: expected a known setting"]),
    "wrong type": ("rounds=many", ['rounds: expected a whole number, got "many"']),
    "out of range": ("local.lr=-1", ["local.lr: expected more than 0, got -1"]),
    "no number": ("local.lr=.nan", ["local.lr"]),
    "no value": ("local.lr", ["local.lr: expected an override key=value, got no '='"]),
    "a value for a group": ("local.lr.x=1", ["local.lr.x=1: expected a group of settings at lr, got a single value"]),
    "unknown method": ("method=fedmagic", ["method: expected ", '"fedmagic"']),
    "unknown kind": ("allocation.kind=fair", ["allocation.kind: expected one of", "'fair'"]),
    "no clients": ("allocation.clients=0", ["allocation.clients: expected at least 1, got 0"]),
    "more clients than rows": (
        "allocation.clients=500",
        ["allocation: expected at least 500 clients x 4 rows", "got 42"],
    ),
    "huge rank": ("lora.rank=4096", ["lora.rank: expected at most 32", "got 4096"]),
    "astronomic rank": ("lora.rank=100000000000000000000000", ["lora.rank: expected "]),
    "unknown module": (
        "lora.targets=[q_proj, wq]",
        ["lora.targets: expected endings of linear modules' names, got 'wq'", "This model has", "q_proj"],
    ),
    "no such adapter": ("lora.start_from=/nothing", ["/nothing", "nothing there"]),
    "no such device": ("runtime.device=cuda:7", ["runtime.device: expected a device that is here"]),
    "no such data": ("data.train=nothing.jsonl", ["nothing.jsonl: expected a file", "got nothing there"]),
    "no such test data": ("data.test=nothing.jsonl", ["nothing.jsonl: expected a file", "got nothing there"]),
    "wrong column": (
        "data.columns={instruction: prompt}",
        ["data.jsonl:1: expected a column 'prompt' (data.columns.instruction), got columns instruction, context"],
    ),
    "rows longer than the model's context": (
        "data={train: DATA, max_tokens: 4000, template: {with_context: LONG, without_context: LONG}}",
        ["data.max_tokens: expected at most the 256 tokens of the model's context, got a row of "],
    ),
    "unknown client": (
        "scheduling.selection={kind: named, clients: [client-01, mary]}",
        ["scheduling.selection.clients: expected names among client-01, client-02", "got 'mary'"],
    ),
    "no such trace": ("scheduling.selection={kind: availability, trace: t.json}", ["t.json: expected a JSON file"]),
    "natural without owners": ("allocation={kind: natural}", ["allocation.kind: expected rows that name their client"]),
    "no room for a prompt": ("evaluation.max_new_tokens=256", ["evaluation.max_new_tokens: expected less than"]),
}


@pytest.mark.parametrize("fault", RECIPES)
@pytest.mark.parametrize("verb", ["check", "run"])
def test_a_fault_in_a_recipe_is_named_before_anything_is_made(
    cli: Cli, world: World, tmp_path: Path, fault: str, verb: str
) -> None:
    override, words = RECIPES[fault]
    override = override.replace("DATA", str(world.data)).replace("LONG", f"'{'x' * 300} {{instruction}}'")
    out = ["--out", tmp_path / "run"] if verb == "run" else []
    refused(cli(verb, world.recipe, override, *out), *words)
    assert not (tmp_path / "run").exists(), "a mended recipe can take the same folder"


def test_too_many_clients_to_compare_are_named(cli: Cli, world: World, tmp_path: Path) -> None:
    said = cli("run", world.recipe, "compare.local=9", "--out", tmp_path / "run")
    refused(said, "compare.local: expected at most 4 clients, got 9")
    said = cli("run", world.recipe, "compare.local=[mary]", "--out", tmp_path / "run")
    refused(said, "compare.local: expected names among client-01", 'got "mary"')
    assert not (tmp_path / "run").exists()


def test_all_faults_are_named_at_once(cli: Cli, world: World) -> None:
    said = cli("check", world.recipe, "model.path=/no/model", "data.train=no.jsonl", "runtime.device=tpu9")
    refused(said, "model.path: expected ", "no.jsonl: expected ", "runtime.device: expected ")
    assert said.err.count("error: ") == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "got nothing there. Write one with: flocktune init"),
        (b"", "got an empty file. Write one with: flocktune init"),
        (b"  \n\n", "got an empty file"),
        (b"\xff\xfe\x00", "expected a recipe (YAML text)"),
        (b"rounds: [1", "expected YAML"),
        (b"- a\n- b\n", "expected a mapping of settings, got a list"),
        (b"just words", "expected a mapping of settings, got a str"),
    ],
)
def test_a_recipe_that_is_none_is_named(cli: Cli, tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_bytes(content)
    for verb in ("check", "run"):
        refused(cli(verb, path), str(path), words)


@pytest.mark.parametrize("text", ["", "1,", "a", "-1", "0,0", "1.5"])
def test_seeds_must_be_different_numbers(cli: Cli, world: World, text: str) -> None:
    refused(cli("run", world.recipe, f"--seeds={text}"), "--seeds: expected different whole numbers", repr(text))


# --- models ----------------------------------------------------------------------------------------


def without_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def pickled_weights(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def cut_weights(model: Path) -> None:
    os.truncate(model / "model.safetensors", 1000)


MODELS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no config": (lambda model: (model / "config.json").unlink(), ["config.json"]),
    "config damaged": (lambda model: (model / "config.json").write_text("{"), ["model.path"]),
    "no weights": (without_weights, ["weights (*.safetensors)", "got none", "Copy model.safetensors there"]),
    "pickled weights": (pickled_weights, ["pytorch_model.bin, pickled and therefore not read"]),
    "weights cut off": (cut_weights, ["a whole safetensors file", "Copy it again"]),
    "no tokenizer": (lambda model: (model / "tokenizer.json").unlink(), ["a tokenizer in "]),
}


@pytest.mark.parametrize("fault", MODELS)
def test_a_model_that_is_not_whole_is_named(cli: Cli, world: World, tmp_path: Path, fault: str) -> None:
    model = tmp_path / "model"
    subprocess.run(["cp", "-r", world.model, model], check=True)
    damage, words = MODELS[fault]
    damage(model)
    for verb in (["check"], ["run", "--out", tmp_path / "run"]):
        refused(cli(verb[0], world.recipe, f"model.path={model}", *verb[1:]), "model.path: expected ", *words)
    assert not (tmp_path / "run").exists()


def test_a_missing_model_is_named(cli: Cli, world: World) -> None:
    refused(cli("check", world.recipe, "model.path=/no/model"), "model.path: expected a model folder", "'/no/model'")
    refused(cli("check", world.recipe, "model.path=nobody/nothing"), "model.path: expected ", "nobody/nothing")


# --- data ------------------------------------------------------------------------------------------

GOOD = [json.dumps(row) for row in dolly_rows(30)]
FILES: dict[str, tuple[str, bytes, list[str]]] = {
    "no JSON": ("d.jsonl", "\n".join([*GOOD[:6], "{", *GOOD[6:]]).encode(), ["d.jsonl:7: expected one JSON object"]),
    "no object": ("d.jsonl", "\n".join([*GOOD, "[1, 2]"]).encode(), ["d.jsonl:31: expected a JSON object, got list"]),
    "no text": (
        "d.jsonl",
        "\n".join([*GOOD, '{"instruction": {"a": 1}, "response": "x"}']).encode(),
        ["d.jsonl:31, column 'instruction': expected text, got dict"],
    ),
    "binary": ("d.jsonl", os.urandom(64) + b"\xff\n", ["d.jsonl:1: expected UTF-8 text", "Is it a text file?"]),
    "empty": ("d.jsonl", b"", ["d.jsonl: expected at least one row, got none"]),
    "unknown suffix": ("d.txt", b"hello", ["expected a file that ends in .json, .jsonl, .csv, .parquet, got .txt"]),
    "no Parquet": ("d.parquet", b"hello, this is no Parquet file", ["d.parquet: expected a Parquet file"]),
    "short CSV row": (
        "d.csv",
        b"instruction,response\na,b\nc\n",
        ["d.csv:3: expected 2 fields, as in the header, got 1"],
    ),
    "no column": ("d.jsonl", b'{"a": 1}\n', ["d.jsonl:1: expected a column for the instruction", "got columns a"]),
}


@pytest.mark.parametrize("fault", FILES)
def test_a_fault_in_data_is_named_with_its_line(cli: Cli, world: World, tmp_path: Path, fault: str) -> None:
    name, content, words = FILES[fault]
    (tmp_path / name).write_bytes(content)
    refused(cli("check", world.recipe, f"data.train={tmp_path / name}"), *words)


def natural(folder: Path, sizes: dict[str, int]) -> list[str]:
    """A folder of one file a client, and the settings that go with it."""
    folder.mkdir()
    for place, (client, size) in enumerate(sizes.items()):
        write_rows(folder / f"{client}.jsonl", dolly_rows(10 * place + size)[10 * place :])
    return [f"data.train={folder}", "allocation={kind: natural}", "data.test_rows_per_category=0", "evaluation.every=0"]


def test_a_client_without_rows_is_named(cli: Cli, world: World, tmp_path: Path) -> None:
    settings = natural(tmp_path / "parts", {"anna": 6, "bert": 0, "carl": 6})
    selection = "scheduling.selection={kind: named, clients: [anna, bert]}"
    refused(cli("check", world.recipe, *settings, selection), "names among anna, carl, got 'bert'")


def test_one_client_is_enough(cli: Cli, world: World, tmp_path: Path) -> None:
    said = cli("run", world.recipe, "allocation.clients=1", "rounds=1", "--out", tmp_path / "run")
    assert said.code == 0, said.all
    [event] = [event for event in read_events(tmp_path / "run" / "metrics.jsonl") if event["event"] == "round"]
    assert event["answered"] == ["client-01"]


# --- clients ---------------------------------------------------------------------------------------

POISON = "Q"
"""A letter that a poisoned model can not read: its embedding is NaN, so only clients with the letter fail."""


@pytest.fixture(scope="module")
def poisoned(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tmp_path_factory.mktemp("poisoned") / "model"
    subprocess.run(["cp", "-r", world.model, model], check=True)
    from transformers import AutoTokenizer

    [token] = AutoTokenizer.from_pretrained(model)(POISON, add_special_tokens=False)["input_ids"]
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return model


def poisoned_settings(model: Path, folder: Path, sick: tuple[str, ...]) -> list[str]:
    settings = natural(folder, {"anna": 6, "bert": 6, "carl": 6})
    for client in sick:
        rows = [{**row, "instruction": f"{POISON} {row['instruction']}"} for row in dolly_rows(6)]
        write_rows(folder / f"{client}.jsonl", rows)
    return [f"model.path={model}", *settings, "scheduling.selection.fraction=1.0", "rounds=2"]


def test_a_client_whose_training_breaks_is_left_out_with_its_reason(
    cli: Cli, world: World, poisoned: Path, tmp_path: Path
) -> None:
    settings = poisoned_settings(poisoned, tmp_path / "parts", ("bert",))
    said = cli("run", world.recipe, *settings, "--out", tmp_path / "run")
    assert said.code == 0, said.all
    assert "bert failed: the loss became nan at step 0" in said.all
    assert "Traceback" not in said.all
    assert "bert failed: the loss became nan" in (tmp_path / "run" / "run.log").read_text()
    rounds = [event for event in read_events(tmp_path / "run" / "metrics.jsonl") if event["event"] == "round"]
    assert len(rounds) == 2
    for event in rounds:
        assert sorted(event["answered"]) == ["anna", "carl"]
        [failure] = event["failures"]
        assert failure["client"] == "bert"
        assert "the loss became nan" in failure["reason"]
        assert "Lower local.lr" in failure["reason"]
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(torch.isfinite(value).all() for value in adapter.values())


def test_when_too_many_clients_fail_every_reason_is_named_and_the_run_can_go_on(
    cli: Cli, world: World, poisoned: Path, tmp_path: Path
) -> None:
    settings = poisoned_settings(poisoned, tmp_path / "parts", ("anna", "bert", "carl"))
    said = cli("run", world.recipe, *settings, "--out", tmp_path / "run")
    refused(said, "expected updates of at least 2 clients, got 0", "Mend the clients and resume the run", code=1)
    for client in ("anna", "bert", "carl"):
        assert f"{client}: the loss became nan" in said.err
    again = cli("resume", tmp_path / "run")
    refused(again, "got 0", code=1)
    settings = poisoned_settings(poisoned, tmp_path / "other", ("anna", "bert"))
    refused(cli("run", world.recipe, *settings, "--out", tmp_path / "two"), "at least 2 clients, got 1", code=1)


def test_a_round_that_nobody_is_there_for_fails_and_saved_rounds_stand(cli: Cli, world: World, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    trace.write_text(json.dumps({f"client-0{number}": [1, 1, 0] for number in range(1, 5)}))
    selection = f"scheduling.selection={{kind: availability, trace: {trace}, fraction: 0.5}}"
    said = cli("run", world.recipe, selection, "--out", tmp_path / "run")
    refused(said, "expected updates of at least 1 client, got 0", "scheduling.quorum", code=1)
    saved = load_checkpoint(tmp_path / "run" / "state")
    assert saved is not None
    assert saved.rounds_done == 2
    trace.write_text(json.dumps({f"client-0{number}": [1] for number in range(1, 5)}))
    assert cli("resume", tmp_path / "run").code == 0, "the clients came back"


# --- folders ---------------------------------------------------------------------------------------


def test_two_runs_in_one_folder_do_not_mix(forked: ForkedRuns, world: World, tmp_path: Path) -> None:
    child = forked.start("run", world.recipe, "local.steps=1000", "--out", tmp_path / "run")
    child.until(lambda: (tmp_path / "run" / "metrics.jsonl").exists())
    both = forked.run("resume", tmp_path / "run"), forked.run("run", world.recipe, "--out", tmp_path / "run")
    child.kill()
    assert child.wait().code == -signal.SIGKILL, "the first one went on"
    for outcome in both:
        assert outcome.code == 2, outcome.output
        assert f"error: {tmp_path / 'run'}: expected a run folder that nobody is using" in outcome.output
        assert "choose another folder with --out" in outcome.output
        assert "Traceback" not in outcome.output


def test_a_run_never_writes_into_another_folder(cli: Cli, world: World, finished: Path, tmp_path: Path) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*") if path.is_file())
    said = cli("run", world.recipe, "--out", finished)
    refused(said, "expected a new or empty run folder, got one with files in it", f"flocktune resume {finished}")
    (tmp_path / "letter.txt").write_text("dear")
    refused(cli("run", world.recipe, "--out", tmp_path), "one with files in it")
    after = sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*") if path.is_file())
    assert [path for path, _ in after] == [path for path, _ in before]
    assert [entry for entry in after if entry[0].name != ".lock"] == [
        entry for entry in before if entry[0].name != ".lock"
    ]


@contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """A folder nothing can be written to: root heeds no permissions, but a read-only file system."""
    folder.mkdir()
    if os.geteuid():
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)
        return
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("root, and may not mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_folder_that_can_not_be_written_is_named(cli: Cli, world: World, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    below = tmp_path / "file" / "run"
    with read_only(tmp_path / "locked") as locked:
        for place in (below, locked, locked / "run"):
            refused(cli("run", world.recipe, "--out", place), f"{place}: expected a folder that can be written, got ")
            refused(cli("export", finished, "--to", place), f"{place}: expected a folder that can be written, got ")
            refused(cli("split", world.data, "--to", place, "--clients", 2), f"{place}: expected a folder that can be")
        refused(cli("init", locked / "mine.yaml"), "expected a path that can be written")
    refused(cli("export", finished, "--to", tmp_path / "file"), "expected a new or empty folder, got a file")


def test_nothing_that_is_there_is_overwritten(cli: Cli, world: World, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("rounds: 7\n")
    refused(cli("init", tmp_path / "mine.yaml"), "mine.yaml: expected a path that is free, got a file")
    refused(
        cli("init", tmp_path / "new.yaml", "--method", "magic"), "--method: expected one of fedbiot, fedit", "'magic'"
    )
    refused(
        cli("export", finished, "--to", tmp_path), "expected a new or empty folder, got one with files in it", "--to"
    )
    refused(cli("export", finished, "--to", tmp_path, "--merged"), "expected a new or empty folder")
    (tmp_path / "clients").mkdir()
    (tmp_path / "clients" / "old.jsonl").write_text("{}\n")
    refused(cli("split", world.data, "--to", tmp_path, "--clients", 2), "expected a new or empty folder", "--to")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clients", "mine.yaml"]
    assert (tmp_path / "mine.yaml").read_text() == "rounds: 7\n"


def test_clients_of_any_name_get_a_file_each_and_keep_their_name(cli: Cli, world: World, tmp_path: Path) -> None:
    """Names that lead out of the folder, or that a folder of splits would have."""
    names = ["../outside", "a/b", "a%2Fb", "train", "test-1", ".hidden", "Hôpital 1"]
    rows = [{**row, "client": names[place % len(names)]} for place, row in enumerate(dolly_rows(70))]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    said = cli("split", data, "--by", "natural", "--to", tmp_path / "parts", "--test-rows-per-category", 0)
    assert said.code == 0, said.all
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "rows.jsonl"]
    back = read_examples(str(tmp_path / "parts" / "clients"), Columns())
    assert sorted((row.client or "", row.instruction) for row in back) == sorted(
        (row["client"], row["instruction"]) for row in rows
    )


@pytest.mark.parametrize("name", ["2024", "1e3", "on", "my recipe", "-x", "räte"])
def test_a_recipe_for_a_file_of_any_name_is_sound(cli: Cli, tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.yaml"
    assert cli("init", path).code == 0
    assert load_recipe(path).rounds == 10


VERBS: dict[str, list[Any]] = {
    "resume": [],
    "eval": [],
    "generate": ["--prompt", "Hello"],
    "export": ["--to", "exported"],
    "report": [],
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_run_that_is_not_there_is_named(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    refused(cli(verb, "missing", *VERBS[verb]), "missing: expected a", "got nothing there")
    refused(cli(verb, "empty", *VERBS[verb]), "empty: expected a")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize("verb", ["eval", "generate", "export"])
def test_an_unfinished_run_is_named(cli: Cli, world: World, tmp_path: Path, monkeypatch: Any, verb: str) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(world.recipe.read_text())
    words = "expected a finished run, got one without an adapter yet. Finish it: flocktune resume"
    refused(cli(verb, run, *VERBS[verb]), words)
    said = cli("report", run)
    assert said.code == 0, "a report of an unfinished run says so itself"
    assert "Not finished" in (run / "report.html").read_text()


DAMAGED: dict[str, tuple[str, bytes, str, list[Any]]] = {
    "recipe": ("recipe.yaml", b"rounds: [", "expected YAML", ["resume"]),
    "empty recipe": ("recipe.yaml", b"", "got an empty file", ["resume"]),
    "summary": ("summary.json", b"{", "expected a JSON file", ["resume"]),
    "adapter": ("adapter/adapter_model.safetensors", b"short", "expected a whole safetensors file", ["eval"]),
    "adapter's settings": (
        "adapter/adapter_config.json",
        b"{}",
        "expected peft_type LORA",
        ["generate", "--prompt", "a"],
    ),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_file_of_a_run_is_named(cli: Cli, finished: Path, tmp_path: Path, what: str) -> None:
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", finished, run], check=True)
    name, content, words, (verb, *arguments) = DAMAGED[what]
    (run / name).write_bytes(content)
    refused(cli(verb, run, *arguments), str(run / name), words)


# --- full disks ------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, size_kib: int) -> Iterator[Path]:
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a small disk; a file size limit is tested instead")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def kill_after_the_first_round(forked: ForkedRuns, world: World, run: Path) -> None:
    """Leave an unfinished run with one checkpoint: killed before ever later writes, until there is one."""
    for number in range(12, 40):
        forked.run("run", world.recipe, "--out", run, crash_at=number)
        if (run / "state" / "round-00001.json").exists():
            break
        shutil.rmtree(run)
    assert [path.name for path in (run / "state").glob("*.json")] == ["round-00001.json"]


def free_bytes(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def test_a_full_disk_loses_no_saved_round(forked: ForkedRuns, world: World, finished: Path, tmp_path: Path) -> None:
    """The disk fills up when the second round is saved; room is made; the run ends as if nothing had been."""
    with small_disk(tmp_path / "disk", 2048) as disk:
        run = disk / "run"
        kill_after_the_first_round(forked, world, run)
        filler = disk / "filler"
        filler.write_bytes(bytes(free_bytes(disk) - 8 * 1024))  # two pages are left: too few for a state
        stopped = forked.run("resume", run)
        assert stopped.code == 1, stopped.output
        assert f"failed: {run}: expected a disk that takes what the run writes" in stopped.output
        assert "no room left on the disk" in stopped.output
        assert f"make room, then: flocktune resume {run}" in stopped.output
        assert "Traceback" not in stopped.output
        saved = load_checkpoint(run / "state")
        assert saved is not None
        assert saved.rounds_done < 3
        filler.unlink()
        assert forked.run("resume", run).code == 0
        assert sha256_file(run / "adapter" / "adapter_model.safetensors") == sha256_file(
            finished / "adapter" / "adapter_model.safetensors"
        )


def test_a_write_that_the_system_refuses_loses_no_saved_round(
    forked: ForkedRuns, world: World, finished: Path, tmp_path: Path
) -> None:
    """As with a full disk, where no disk can be made: files may not grow beyond half a state."""
    run = tmp_path / "run"
    kill_after_the_first_round(forked, world, run)
    half = (finished / "state" / "round-00003.safetensors").stat().st_size // 2
    stopped = forked.run("resume", run, file_limit_bytes=half)
    assert stopped.code == 1, stopped.output
    assert f"failed: {run}: expected a disk that takes what the run writes, got a file too large" in stopped.output
    assert "Traceback" not in stopped.output
    saved = load_checkpoint(run / "state")
    assert saved is not None
    assert saved.rounds_done < 3
    assert not list(run.rglob("*.tmp")), "half a file was taken away"
    assert forked.run("resume", run).code == 0
    assert sha256_file(run / "adapter" / "adapter_model.safetensors") == sha256_file(
        finished / "adapter" / "adapter_model.safetensors"
    )


@pytest.mark.parametrize("merged", [False, True])
def test_an_export_to_a_full_disk_leaves_no_half_a_model(
    cli: Cli, finished: Path, tmp_path: Path, merged: bool
) -> None:
    with small_disk(tmp_path / "disk", 64) as disk:
        (disk / "filler").write_bytes(bytes(free_bytes(disk) - 4096))
        said = cli("export", finished, "--to", disk / "out", *(["--merged"] if merged else []))
        refused(said, f"{disk / 'out'}: expected a folder that can be written")
        assert "no room left" in said.err or "No space left" in said.err  # the second is safetensors' own
        assert not (disk / "out").exists()


def test_the_lock_goes_with_its_process(forked: ForkedRuns, world: World, tmp_path: Path) -> None:
    child = forked.start("run", world.recipe, "local.steps=1000", "--out", tmp_path / "run")
    child.until(lambda: (tmp_path / "run" / "metrics.jsonl").exists())
    child.kill()
    child.wait()
    with exclusive(tmp_path / "run"):
        pass
