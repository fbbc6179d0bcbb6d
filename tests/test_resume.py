"""A run can be killed at any instant and goes on to the same bits; what is damaged or changed is named."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import Said, World, dolly_rows, make_world, write_rows
from flocktune.files import sha256_file
from forked_runs import ForkedRuns

VARIANTS = {
    "adam": ("aggregation.server_optimizer={kind: adam, lr: 0.05}", "checkpoint.keep_adapters_every=2"),
    "momentum": (
        "aggregation.server_optimizer={kind: sgd, momentum: 0.9}",
        "checkpoint.keep_adapters_every=2",
        "data.validation_rows_per_category=1",
        "evaluation={every: 1, keep_best: true, metric: exact_match}",  # nothing is right: the best round is the first
    ),
    "fedbiot": (
        "method=fedbiot",
        "emulator={adapter_layers: 1, drop: 0.0}",
        "alignment={first_steps: 3, steps: 1, batch_size: 2, fidelity_rows: 3}",
        "rounds=2",
        "evaluation.max_rows=2",
    ),
}
COMPARED = ("compare={base: true, local: 1, centralised: true}", "rounds=2", "evaluation.every=0")
NOT_THE_RESULT = {"time", "seconds", "client_seconds_per_step", "peak_memory_bytes"}

Cli = Callable[..., Said]


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedRuns]:
    with ForkedRuns(tmp_path_factory.mktemp("forked"), {"CUDA_VISIBLE_DEVICES": ""}) as runs:
        yield runs


@pytest.fixture(scope="module")
def unbroken(forked: ForkedRuns, world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each variant that nobody disturbed."""
    folder = tmp_path_factory.mktemp("unbroken")
    for name, overrides in VARIANTS.items():
        outcome = forked.run("run", world.recipe, *overrides, "--out", folder / name)
        assert outcome.code == 0, outcome.output
    return {name: folder / name for name in VARIANTS}


def events(folder: Path, kind: str = "") -> list[dict[str, Any]]:
    log = folder / "metrics.jsonl"
    lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []
    return [event for event in map(json.loads, lines) if kind in ("", event["event"])]


def timeless(value: Any) -> Any:
    """Without what a clock or a memory gauge said."""
    if isinstance(value, dict):
        return {key: timeless(inner) for key, inner in value.items() if key not in NOT_THE_RESULT}
    return [timeless(inner) for inner in value] if isinstance(value, list) else value


def result(folder: Path) -> dict[str, Any]:
    """All that a run is for, and all that it told on the way, but for the time it took and who interrupted it."""
    return {
        "adapter": sha256_file(folder / "adapter" / "adapter_model.safetensors"),
        "log": [timeless(event) for event in events(folder) if event["event"] != "resumed"],
        "answers": (folder / "answers.jsonl").read_text(),
        "summary": timeless(json.loads((folder / "summary.json").read_text())),
        # A kill in the last round may leave one old state more, and a warning in the log.
        "files": sorted(
            str(path.relative_to(folder))
            for path in folder.rglob("*")
            if path.parent.name != "state" and path.name != "run.log"
        ),
    }


def go_on(forked: ForkedRuns, world: World, folder: Path, overrides: tuple[str, ...], **crash: int) -> Any:
    """What a person does after a crash: resume, or run again when there is nothing to resume."""
    if (folder / "recipe.yaml").exists():
        return forked.start("resume", folder, **crash)
    return forked.start("run", world.recipe, *overrides, "--out", folder, **crash)


# --- killed ----------------------------------------------------------------------------------------


def test_killed_before_every_single_write_a_run_goes_on_to_the_same_bits(
    forked: ForkedRuns, world: World, unbroken: dict[str, Path], tmp_path: Path
) -> None:
    overrides = VARIANTS["adam"]
    counted = forked.run("run", world.recipe, *overrides, "--out", tmp_path / "counted", count=True)
    assert counted.disk_calls is not None
    assert counted.disk_calls > 40
    wanted = result(unbroken["adam"])
    assert result(tmp_path / "counted") == wanted
    for first in range(1, counted.disk_calls + 1, 4):
        numbers = range(first, min(first + 4, counted.disk_calls + 1))
        killed = [go_on(forked, world, tmp_path / str(number), overrides, crash_at=number) for number in numbers]
        assert [child.wait().code for child in killed] == [-signal.SIGKILL] * len(numbers)
        resumed = [go_on(forked, world, tmp_path / str(number), overrides) for number in numbers]
        for number, child in zip(numbers, resumed, strict=True):
            ended = child.wait()
            assert ended.code == 0, f"killed at disk call {number}:\n{ended.output}"
            assert result(tmp_path / str(number)) == wanted, f"killed at disk call {number}"


def test_a_kill_between_alignment_and_broadcast_loses_no_alignment(
    forked: ForkedRuns, world: World, unbroken: dict[str, Path], tmp_path: Path
) -> None:
    for attempt in range(10):  # on a busy machine the kill may come too late to say anything
        folder = tmp_path / str(attempt)
        child = forked.start("run", world.recipe, *VARIANTS["fedbiot"], "--out", folder)
        child.until((folder / "state" / "round-00000.json").exists)
        child.kill()
        child.wait()
        if not events(folder, "round"):
            break
    [before] = events(folder, "alignment")
    assert not events(folder, "round")
    assert go_on(forked, world, folder, VARIANTS["fedbiot"]).wait().code == 0
    after = events(folder, "alignment")
    assert after[0] == before, "it was not made again: its time is the same"
    assert [event["round"] for event in after] == [0, 1]
    assert events(folder, "round")[0]["seconds"]["align"] == before["seconds"]
    assert result(folder) == result(unbroken["fedbiot"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_at_random_instants_a_run_goes_on_to_the_same_bits(
    forked: ForkedRuns, world: World, unbroken: dict[str, Path], tmp_path: Path, variant: str
) -> None:
    draw = random.Random(variant)
    started = time.monotonic()
    forked.run("run", world.recipe, *VARIANTS[variant], "--out", tmp_path / "timed")
    whole_s = time.monotonic() - started
    hits = 0
    for chain in range(100):
        folder = tmp_path / str(chain)
        for _ in range(3):
            child = go_on(forked, world, folder, VARIANTS[variant])
            time.sleep(draw.uniform(0.1, 1.0) * whole_s)
            child.kill()
            if child.wait().code != -signal.SIGKILL:  # the machine has become faster, and there is nothing left to kill
                whole_s *= 0.8
                break
            hits += 1
        ended = go_on(forked, world, folder, VARIANTS[variant]).wait()
        assert ended.code == 0, ended.output
        assert result(folder) == result(unbroken[variant])
        if hits >= 12:
            return
    pytest.fail(f"only {hits} of 300 kills met a run that was still going")


def test_the_real_command_survives_kill_9(world: World, unbroken: dict[str, Path], tmp_path: Path) -> None:
    folder, draw = tmp_path / "run", random.Random(7)
    command = [sys.executable, "-m", "flocktune"]
    start = ["run", str(world.recipe), *VARIANTS["adam"], "--out", str(folder)]
    for arguments, rounds_before in ((start, 0), (["resume", str(folder)], 1)):
        with subprocess.Popen([*command, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 120
            while len(events(folder, "round")) <= rounds_before and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.05))
            process.kill()
        assert process.returncode == -signal.SIGKILL
    ended = subprocess.run([*command, "resume", str(folder)], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert "resumed after round" in ended.stdout
    assert result(folder) == result(unbroken["adam"])


def test_half_a_start_can_be_started_again(cli: Cli, world: World, tmp_path: Path) -> None:
    (tmp_path / "experiment.json").write_text('{"seeds": [0]}')
    (tmp_path / ".recipe.yaml.abc.tmp").write_text("name: ti")
    said = cli("run", world.recipe, "rounds=1", "--out", tmp_path)
    assert said.code == 0, said.all
    assert json.loads((tmp_path / "summary.json").read_text())["method"] == "fedit", "one run, not a comparison"
    assert not list(tmp_path.rglob("*.tmp"))


# --- stopped ---------------------------------------------------------------------------------------

LONGER = ("rounds=5", "local.steps=24", "evaluation.generate=false", "evaluation.every=0")


@pytest.fixture(scope="module")
def longer(forked: ForkedRuns, world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("longer") / "run"
    assert forked.run("run", world.recipe, *LONGER, "--out", folder).code == 0
    return folder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_interrupt_finishes_the_round_and_saves_it(
    forked: ForkedRuns, world: World, longer: Path, tmp_path: Path, number: signal.Signals
) -> None:
    child = forked.start("run", world.recipe, *LONGER, "--out", tmp_path / "run")
    child.until(lambda: len(events(tmp_path / "run", "round")) >= 1)
    child.kill(number)
    stopped = child.wait()
    assert stopped.code == 130, stopped.output
    assert "Stopping after this round." in stopped.output
    assert f"Go on with: flocktune resume {tmp_path / 'run'}" in stopped.output
    done = len(events(tmp_path / "run", "round"))
    assert done < 5
    assert (tmp_path / "run" / "state" / f"round-{done:05d}.json").exists(), "the round at hand was saved"
    ended = forked.run("resume", tmp_path / "run")
    assert ended.code == 0, ended.output
    assert without_answers(tmp_path / "run") == without_answers(longer)


def test_a_second_interrupt_stops_at_once(forked: ForkedRuns, world: World, tmp_path: Path) -> None:
    arguments = ("run", world.recipe, *LONGER, "rounds=2", "local.steps=80", "--out")
    assert forked.run(*arguments, tmp_path / "whole").code == 0
    child = forked.start(*arguments, tmp_path / "run")
    child.until(lambda: (tmp_path / "run" / "state" / "round-00001.json").exists())
    time.sleep(0.2)  # into the second round: between two rounds one interrupt is enough
    child.kill(signal.SIGINT)
    child.kill(signal.SIGTERM)  # counts as another Ctrl-C; of two equal signals the system may deliver only one
    stopped = child.wait()
    assert stopped.code == 130, stopped.output
    assert "Stopping after this round." in stopped.output
    assert f"Go on with: flocktune resume {tmp_path / 'run'}" in stopped.output
    assert "Traceback" not in stopped.output
    assert len(events(tmp_path / "run", "round")) == 1, "the round at hand was given up"
    ended = forked.run("resume", tmp_path / "run")
    assert ended.code == 0, ended.output
    assert without_answers(tmp_path / "run") == without_answers(tmp_path / "whole")


def without_answers(folder: Path) -> Any:
    (folder / "answers.jsonl").touch()
    return result(folder)


# --- damaged ---------------------------------------------------------------------------------------


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit in the middle": lambda state: flip(state, state.stat().st_size // 2),
    "a bit in the header": lambda state: flip(state, 0),
    "cut off": lambda state: os.truncate(state, state.stat().st_size - 9),
    "empty": lambda state: state.write_bytes(b""),
    "missing": lambda state: state.unlink(),
    "manifest missing": lambda state: state.with_suffix(".json").unlink(),
    "manifest empty": lambda state: state.with_suffix(".json").write_text(""),
    "manifest cut off": lambda state: os.truncate(state.with_suffix(".json"), 40),
    "manifest of another state": lambda state: shutil.copy(
        state.with_name("round-00002.json"), state.with_suffix(".json")
    ),
}


def unfinished(run: Path, folder: Path) -> Path:
    """A copy of a finished run as it is when killed before its last evaluation."""
    shutil.copytree(run, folder)
    for name in ("summary.json", "answers.jsonl", "report.html"):
        (folder / name).unlink()
    shutil.rmtree(folder / "adapter")
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    cli: Cli, unbroken: dict[str, Path], tmp_path: Path, damage: str
) -> None:
    folder = unfinished(unbroken["adam"], tmp_path / "run")
    DAMAGES[damage](folder / "state" / "round-00003.safetensors")
    said = cli("resume", folder)
    assert said.code == 0, said.all
    assert re.search(r"damaged checkpoint: .*round-00003.*Using the one before: 2 rounds done", said.all), said.all
    assert "Traceback" not in said.all
    assert result(folder) == result(unbroken["adam"])


@pytest.mark.parametrize("damage", ["empty", "manifest missing", "manifest empty"])
def test_without_any_sound_checkpoint_nothing_is_thrown_away(
    cli: Cli, unbroken: dict[str, Path], tmp_path: Path, damage: str
) -> None:
    folder = unfinished(unbroken["adam"], tmp_path / "run")
    for state in (folder / "state").glob("*.safetensors"):
        DAMAGES[damage](state)
    log = (folder / "metrics.jsonl").read_bytes()
    said = cli("resume", folder)
    assert said.code == 1, said.all
    assert re.search(r"(?s)failed: no sound checkpoint:.*round-00003.*round-00002.*start a new run", said.err)
    assert "Traceback" not in said.all
    assert (folder / "metrics.jsonl").read_bytes() == log
    assert len(list((folder / "state").glob("*.safetensors"))) == 2


def test_a_torn_last_line_of_the_log_is_forgotten(cli: Cli, unbroken: dict[str, Path], tmp_path: Path) -> None:
    folder = unfinished(unbroken["adam"], tmp_path / "run")
    with (folder / "metrics.jsonl").open("ab") as log:
        log.write(b'{"event": "run_e')
    assert cli("resume", folder).code == 0
    assert result(folder) == result(unbroken["adam"])


# --- changed ---------------------------------------------------------------------------------------


@pytest.fixture
def own_world(tmp_path: Path) -> World:
    return make_world(tmp_path / "own")


def change_recipe(world: World, run: Path) -> None:
    text = (run / "recipe.yaml").read_text()
    assert "lr: 0.01" in text
    (run / "recipe.yaml").write_text(text.replace("lr: 0.01", "lr: 0.02"))


def change_data(world: World, run: Path) -> None:
    rows = dolly_rows(48)
    rows[7]["response"] += " or not"
    write_rows(world.data, rows)


def change_model(world: World, run: Path) -> None:
    from tiny_models import save_tiny

    save_tiny(world.model, seed=1)


CHANGES: dict[str, tuple[Callable[[World, Path], None], str]] = {
    "recipe": (change_recipe, "a change of recipe, local.lr: 0.01 -> 0.02"),
    "data": (change_data, "a change of training data: "),
    "model": (change_model, "a change of base model: "),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("several", [False, True], ids=["run", "comparison"])
def test_a_change_on_resume_is_refused_and_named(
    cli: Cli, own_world: World, tmp_path: Path, what: str, several: bool
) -> None:
    """In a comparison too, between two of its runs: its table must not mix two experiments."""
    folder = tmp_path / "run"
    said = cli(
        "run",
        own_world.recipe,
        "rounds=2",
        "evaluation.every=0",
        f"compare.base={str(several).lower()}",
        "--out",
        folder,
    )
    assert said.code == 0, said.all
    if several:
        shutil.rmtree(folder / "fedit")
    else:
        (folder / "summary.json").unlink()
    change, words = CHANGES[what]
    change(own_world, folder)
    refused = cli("resume", folder)
    assert refused.code == 2, refused.all
    assert words in refused.err
    assert "Undo the change, or start a new run." in refused.err
    assert "Traceback" not in refused.all


def test_what_does_not_bear_on_the_result_may_change(cli: Cli, unbroken: dict[str, Path], tmp_path: Path) -> None:
    folder = unfinished(unbroken["adam"], tmp_path / "run")
    text = (folder / "recipe.yaml").read_text()
    assert "name: tiny" in text
    assert "keep: 2" in text
    (folder / "recipe.yaml").write_text(text.replace("name: tiny", "name: other").replace("keep: 2", "keep: 3"))
    assert cli("resume", folder).code == 0
    assert result(folder)["adapter"] == result(unbroken["adam"])["adapter"]


# --- comparisons -----------------------------------------------------------------------------------


def compared(folder: Path) -> dict[str, Any]:
    names = ("base", "local_1", "fedit", "centralised")
    return {"summary": timeless(json.loads((folder / "summary.json").read_text()))} | {
        name: result(folder / name) for name in names
    }


def test_a_killed_comparison_goes_on_to_the_same_table(forked: ForkedRuns, world: World, tmp_path: Path) -> None:
    arguments = ("run", world.recipe, *COMPARED, "--out")
    whole = forked.run(*arguments, tmp_path / "whole", count=True)
    assert whole.code == 0, whole.output
    calls, draw = whole.disk_calls or 0, random.Random(3)
    for chain in range(3):
        folder, killed = tmp_path / str(chain), 0
        while True:
            ended = go_on(forked, world, folder, COMPARED, crash_at=draw.randrange(1, calls // 2)).wait()
            if ended.code == 0:
                break
            assert ended.code == -signal.SIGKILL, ended.output
            killed += 1
        assert killed >= 1
        assert compared(folder) == compared(tmp_path / "whole")


def test_an_interrupted_comparison_goes_on_to_the_same_table(forked: ForkedRuns, world: World, tmp_path: Path) -> None:
    arguments = ("run", world.recipe, *COMPARED, "local.steps=12", "--out")
    assert forked.run(*arguments, tmp_path / "whole").code == 0
    child = forked.start(*arguments, tmp_path / "run")
    child.until(lambda: len(events(tmp_path / "run" / "local_1", "round")) >= 1)
    child.kill(signal.SIGINT)
    assert child.wait().code == 130
    assert not (tmp_path / "run" / "summary.json").exists()
    assert forked.run("resume", tmp_path / "run").code == 0
    assert compared(tmp_path / "run") == compared(tmp_path / "whole")
