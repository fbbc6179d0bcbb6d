"""Mistakes that people make: exit code 2, no traceback, where it is, what to do. What Tab offers, and the doctor."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from typer._completion_classes import completion_init
from typer._completion_shared import get_completion_script

from conftest import Said, World, write_rows
from flocktune import doctor
from flocktune.cli import completing
from flocktune.cli.common import needs_extra
from flocktune.errors import UserError, near, reason

Cli = Callable[..., Said]

MISTAKES = {
    "an unknown verb": (("rnu", "a.yaml"), "rnu: expected a command of flocktune,", "Did you mean run?"),
    "of a group": (("federation", "upp"), "upp: expected a command of flocktune federation,", "Did you mean up?"),
    "an unknown option": (("run", "x.yaml", "--sedes", "1"), "--sedes: expected an option of", "Did you mean --seeds?"),
    "no argument": (("resume",), "flocktune resume: expected FOLDER, got nothing", "See: flocktune resume --help"),
    "no option": (("export", "runs"), "flocktune export: expected --to, got nothing", "See: flocktune export --help"),
    "a number too small": (("eval", "r", "--max-rows", "0"), "--max-rows: expected at least 1, got 0", "See: "),
    "no number": (("eval", "r", "--max-rows", "a"), "--max-rows: expected a whole number, got 'a'", "See: "),
    "no recipe": (
        ("run", "recepe.yaml"),
        "recepe.yaml: expected a recipe (YAML text), got nothing",
        "mean recipe.yaml",
    ),
    "a folder": (("check", "folder"), "folder: expected a recipe (YAML text), got a folder", "flocktune init"),
    "no text": (("check", "bytes.yaml"), "bytes.yaml: expected a recipe (YAML text), got bytes", "flocktune init"),
    "bad YAML": (("check", "bad.yaml"), "bad.yaml:2: expected YAML, got a mistake in column 1", "brackets"),
    "a list": (("check", "list.yaml"), "list.yaml: expected a mapping of settings, got a list", ""),
    "an unknown key": (("check", "recipe.yaml", "local.stepz=3"), "local.stepz: expected a known", "mean local.steps?"),
    "another kind's key": (
        ("check", "recipe.yaml", "scheduling.selection={kind: poisson, probability: 0.1}"),
        "scheduling.selection.probability: expected a known setting",
        "Settings of kind poisson: fraction.",
    ),
    "a wrong value": (("check", "recipe.yaml", "method=fedot"), "method: expected 'fedit'", "Did you mean fedbiot?"),
    "too small a value": (
        ("check", "recipe.yaml", "evaluation.patience=-1"),
        "evaluation.patience: expected at least",
        "",
    ),
    "no whole number": (("check", "recipe.yaml", "rounds=2.5"), "rounds: expected a whole number, got 2.5", ""),
    "no truth value": (("check", "recipe.yaml", "evaluation.keep_best=yep"), "keep_best: expected true or false", ""),
    "no equals sign": (("check", "recipe.yaml", "rounds"), "rounds: expected an override key=value", "local.lr=1e-3"),
    "no data": (("check", "recipe.yaml", "data.train=data.jsonk"), "data.jsonk: expected a file", "mean data.jsonl"),
    "no model": (("check", "recipe.yaml", "model.path=nowhere/at/all"), "model.path: expected a model folder", "Check"),
    "no GPU": (("check", "recipe.yaml", "runtime.device=cuda:9"), "runtime.device: expected a device", "auto or cpu"),
    "no run": (("resume", "runs/tinny"), "runs/tinny: expected a run's folder, got nothing", "Did you mean runs/tiny?"),
    "no result": (("eval", "runs/none"), "runs/none: expected a run's folder, or an adapter's", "flocktune run RECIPE"),
    "not finished": (("eval", "runs/tiny"), "tiny: expected a finished run,", "flocktune resume"),
    "a damaged adapter": (("eval", "damaged"), "adapter_model.safetensors: expected a whole safetensors file", ""),
    "no seeds": (("run", "recipe.yaml", "--seeds", "a"), "--seeds: expected different whole numbers", "0,1,2"),
    "a taken folder": (("run", "recipe.yaml", "--out", "taken"), "taken: expected a new or empty", "flocktune resume"),
    "no method": (("init", "new.yaml", "--method", "fedfoo"), "--method: expected one of fedbiot, fedit", ""),
    "rows that choose": (
        ("check", "recipe.yaml", "evaluation.patience=1"),
        "evaluation.patience: expected validation rows to choose by, got none",
        "Set data.validation_rows_per_category=10",
    ),
}
"""What was done -> the command, how its message begins, and a part of what to do."""


@pytest.fixture
def desk(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A person's folder, with what the mistakes are about."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(world.recipe, "recipe.yaml")
    shutil.copy(world.data, "data.jsonl")
    Path("folder").mkdir()
    Path("bytes.yaml").write_bytes(b"name: \xff\n")
    Path("bad.yaml").write_text("data: [\n")
    Path("list.yaml").write_text("- a\n")
    for name in ("runs/tiny", "taken"):
        Path(name).mkdir(parents=True)
        shutil.copy(world.recipe, f"{name}/recipe.yaml")
    Path("damaged").mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    Path("damaged/adapter_config.json").write_text(
        json.dumps({**settings, "base_model_name_or_path": str(world.model)})
    )
    Path("damaged/adapter_model.safetensors").write_bytes(b"half a file")
    return tmp_path


def test_every_mistake_is_named_with_its_place_and_what_to_do(cli: Cli, desk: Path) -> None:
    wrong = []
    for mistake, (command, begins, advises) in MISTAKES.items():
        said = cli(*command)
        lines = said.err.splitlines()
        fits = len(lines) == 1 and lines[0].startswith("error: ") and begins in lines[0] and advises in lines[0]
        if said.code != 2 or not fits or "Traceback" in said.all or said.out:
            wrong.append(f"{mistake}: exit code {said.code}, {said.all}")
    assert not wrong, "\n".join(wrong)


def test_all_mistakes_of_a_recipe_come_at_once(cli: Cli, desk: Path) -> None:
    said = cli("check", "recipe.yaml", "rounds=-1", "local.stepz=3", "method=fedot")
    assert said.code == 2
    assert [line.split(":")[1].strip() for line in said.err.splitlines()] == ["method", "rounds", "local.stepz"]


def test_what_the_system_refuses_is_said_in_words(cli: Cli, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(number: int) -> Callable[..., None]:
        def refuse(*arguments: object, **more: object) -> None:
            raise OSError(number, os.strerror(number), "/somewhere/secret.tmp")

        return refuse

    for number, words in ((errno.EACCES, "no permission"), (errno.ENOSPC, "no room left on the disk")):
        monkeypatch.setattr("flocktune.run_folder.write_atomic", refusing(number))
        said = cli("run", "recipe.yaml", "--out", f"out-{number}")
        assert (said.code, said.err) == (
            2,
            f"error: out-{number}: expected a folder that can be written, got {words}. "
            "Choose another: --out, or make room there.\n",
        )
    assert reason(OSError("of a library")) == "of a library"
    assert reason(OSError(errno.ELOOP, "Too many links", "x")) == "Too many links"


def test_a_missing_extra_is_named_with_how_to_install_it() -> None:
    with pytest.raises(UserError) as caught:
        needs_extra("no_such_library", "judge")
    assert str(caught.value) == (
        "no_such_library: expected the library, which is of the extra judge, got nothing installed. "
        "Install it: pip install 'flocktune[judge]'. All extras: flocktune doctor"
    )


def test_near_names(tmp_path: Path) -> None:
    (tmp_path / "my-run").mkdir()
    assert near(tmp_path / "my-rum") == f"Did you mean {tmp_path / 'my-run'}?"
    assert near(tmp_path / "other") == ""
    assert near(tmp_path / "none" / "my-run") == ""


def test_version_is_told(cli: Cli) -> None:
    said = cli("--version")
    assert (said.code, said.out.split()[0]) == (0, "flocktune")


# --- what Tab offers -----------------------------------------------------------------------------------


def offered(shell: str, words: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the program tells a shell's script for what has been typed."""
    monkeypatch.setenv("_FLOCKTUNE_COMPLETE", f"complete_{shell}")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", words)
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    completion_init()
    return cli().out.splitlines()


def test_tab_offers_verbs_options_runs_recipes_and_settings(
    cli: Cli, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bash(words: str) -> list[str]:
        return offered("bash", words, cli, monkeypatch)

    assert bash("flocktune res") == ["resume"]
    assert "--seeds" in bash("flocktune run --se")
    assert bash("flocktune run rec") == ["recipe.yaml"]
    assert bash("flocktune resume r") == ["runs/tiny"]
    assert bash("flocktune eval runs/t") == ["runs/tiny"]
    assert bash("flocktune run recipe.yaml evaluation.pat") == ["evaluation.patience="]
    assert bash("flocktune init --method fedb") == ["fedbiot"]
    assert not "".join(bash("flocktune resume nothing")), "the shell goes on to files"
    assert any("resume" in line for line in offered("zsh", "flocktune res", cli, monkeypatch))
    assert any("resume" in line for line in offered("fish", "flocktune res", cli, monkeypatch))


def test_bash_loads_the_script_and_asks_the_program(tmp_path: Path) -> None:
    program = tmp_path / "flocktune"
    program.write_text('#!/bin/sh\n[ "$_FLOCKTUNE_COMPLETE" = complete_bash ] && echo "$COMP_WORDS at $COMP_CWORD"\n')
    program.chmod(0o755)
    script = get_completion_script(prog_name="flocktune", complete_var="_FLOCKTUNE_COMPLETE", shell="bash")
    asked = "COMP_WORDS=(flocktune res); COMP_CWORD=1; _flocktune_completion flocktune; echo ${COMPREPLY[@]}"
    done = subprocess.run(
        ["bash", "-c", f"{script}\n{asked}\ncomplete -p flocktune"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        "flocktune res at 1",
        "complete -o default -F _flocktune_completion flocktune",
    ]


def test_runs_are_offered_newest_first(desk: Path) -> None:
    shutil.copytree("runs/tiny", "runs/newer")
    os.utime("runs/tiny/recipe.yaml", (1, 1))
    assert completing.runs("ru") == ["runs/newer", "runs/tiny"]
    assert completing.runs("tak") == ["taken"]


# --- doctor --------------------------------------------------------------------------------------------


def test_doctor_finds_this_installation_whole(cli: Cli, desk: Path) -> None:
    said = cli("doctor")
    assert said.code == 0, said.all
    assert max(map(len, said.out.splitlines())) <= 80
    assert "\x1b" not in said.out
    assert "forward pass" in said.out
    told = json.loads(cli("doctor", "--json").out)
    assert not told["broken"]
    by_name = {finding["name"]: finding for finding in told["findings"]}
    assert by_name["torch"]["state"] == "ok"
    assert by_name["files"]["said"] == "7 files as they were made (sha256)"
    assert {"runs", "temporary", "python", "cpu", "gpu", "access"} <= by_name.keys() or "cuda:0" in by_name
    assert not (desk / "runs" / "new").exists()


def test_doctor_says_what_is_missing_and_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.metadata.version

    def version(name: str) -> str:
        if name == "zstandard":
            raise doctor.metadata.PackageNotFoundError(name)
        return {"torch": "1.0", "openai": "1.0"}.get(name) or real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    extras = {finding.name: finding for finding in doctor._extras()}
    assert (extras["compression"].state, extras["compression"].fix) == (
        "absent",
        "pip install 'flocktune[compression]'",
    )
    if "judge" in extras and extras["judge"].state != "absent":
        assert extras["openai"].state == "warning"
    versions = {finding.name: finding for finding in doctor._versions()}
    assert versions["torch"].state == "warning"
    assert versions["torch"].fix.startswith("pip install 'torch")
    assert "dev" not in extras


def test_doctor_goes_on_when_a_library_is_broken(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(doctor, "_devices", broken)
    monkeypatch.setattr(doctor, "_embedded", lambda: iter(()))
    said = cli("doctor")
    assert said.code == 1
    text = " ".join(said.out.split())
    assert "broke off: ImportError: libcudart.so.13" in text
    assert "Disk" in text
    assert "1 problem: what to do stands beside it." in text


def test_doctor_sees_a_damaged_model_and_a_place_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flocktune import assets

    world = tmp_path / "world"
    shutil.copytree(assets.embedded_manifest().parent, world)
    write_rows(world / "public.jsonl", [])
    (world / "model" / "config.json").unlink()
    monkeypatch.setattr(assets, "_WORLD", world)
    [found] = doctor._embedded()
    assert (found.state, found.said) == ("problem", "missing or damaged: model/config.json, public.jsonl")
    usage = shutil.disk_usage(tmp_path)
    for free, state in ((10**7, "problem"), (10**9, "warning"), (10**12, "ok")):
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place, free=free: usage._replace(free=free))
        assert doctor._place("runs", tmp_path / "not" / "yet", "").state == state
    (tmp_path / "file").touch()
    assert doctor._place("runs", tmp_path / "file" / "runs", "Choose").state == "problem"
    assert doctor._place("tokens", tmp_path / "file" / "tokens", "Choose").state == "warning"
