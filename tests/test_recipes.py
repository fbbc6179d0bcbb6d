"""Every recipe that ships opens with its command, can be read and checked with no network; the commented one states
every setting there is."""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import typer
import yaml

from conftest import Said
from flocktune.cli import app
from flocktune.config.load import build_config, load_recipe, to_tree
from flocktune.config.study import load_study
from flocktune.config.template import write_template
from flocktune.errors import UserError
from flocktune.splitting import write_split

ROOT = Path(__file__).parent.parent
STUDIES = sorted(ROOT.glob("recipes/study_*.yaml"))
RECIPES = sorted(set(ROOT.glob("recipes/*.yaml")) - set(STUDIES))
TEMPLATES = sorted((ROOT / "src/flocktune/config/templates").glob("*.yaml"))


@pytest.mark.parametrize("path", [*RECIPES, *TEMPLATES], ids=lambda path: path.name)
def test_every_recipe_is_sound(path: Path) -> None:
    config = load_recipe(path)
    assert config.rounds > 0


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_every_study_is_sound_in_every_cell(path: Path) -> None:
    study = load_study(path)
    assert len(study.cells) >= len(study.config.methods) * len(study.config.seeds)


def test_there_are_recipes_and_templates() -> None:
    assert "study_fedit.yaml" in {path.name for path in STUDIES}
    assert {"demo.yaml", "fedit_dolly.yaml"} <= {path.name for path in RECIPES}
    assert {"fedit.yaml", "fedbiot.yaml"} <= {path.name for path in TEMPLATES}


# --- commands ------------------------------------------------------------------------------------------


def commands_of(path: Path) -> list[list[str]]:
    """The flocktune commands that a recipe opens with: lines of its first comment that are set in by three spaces."""
    comment = "".join(re.match(r"(#.*\n)*", path.read_text())[0])  # type: ignore[index]
    lines = re.sub(r"\\\n#\s+", "", comment).splitlines()
    shown = [line.removeprefix("#   ") for line in lines if line.startswith("#   flocktune ")]
    return [shlex.split(part) for line in shown for part in re.split(r"\s{3,}", line)[0].split(" && ")]


@pytest.mark.parametrize("path", [*RECIPES, *STUDIES], ids=lambda path: path.name)
def test_every_recipe_opens_with_commands_that_are_right(path: Path) -> None:
    commands = commands_of(path)
    own = f"recipes/{path.name}"
    assert any(own in command for command in commands)
    for program, *arguments in commands:
        assert program == "flocktune"
        group: Any = typer.main.get_command(app)
        while hasattr(group, "commands"):
            group, arguments = group.commands[arguments[0]], arguments[1:]
        told = group.make_context(group.name, list(arguments)).params
        if own in arguments:
            load = load_study if group.name == "study" else load_recipe
            load(path, told.get("overrides") or ())


# --- check, with no network ------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for a connection or a name fails the test."""

    def refuse(*arguments: object, **_: object) -> NoReturn:
        pytest.fail(f"the network was asked for: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def beside_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the rows of a federation's trial: what "flocktune split" in those recipes' first lines makes."""
    place = tmp_path_factory.mktemp("trial")
    split = {"data": {"train": "embedded"}, "allocation": {"kind": "by_category", "clients": 3}}
    write_split(build_config(split), place / "data")
    return place


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_passes_check_with_no_network(
    path: Path, cli: Callable[..., Said], no_network: None, beside_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(beside_data)
    said = cli("check", path)
    assert said.code == 0, said.all
    assert " is sound" in said.out
    both_ways = re.search(r"tokens, (?:at most )?(\S+ \S+) both ways", " ".join(said.out.split()))
    row = next(
        line for line in (ROOT / "docs/recipes.md").read_text().splitlines() if line.startswith(f"| `{path.name}`")
    )
    assert both_ways is not None
    assert row.endswith(f"| {both_ways[1]} |")  # what the documentation says it costs


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_the_commented_recipe_states_every_setting(path: Path) -> None:
    stated = yaml.safe_load(path.read_text())
    known = to_tree(build_config({"method": stated["method"], "allocation": {"kind": "dirichlet"}}))

    def missing(have: object, want: object, place: str) -> list[str]:
        if not isinstance(want, dict) or not isinstance(have, dict) or place.endswith(".columns"):
            return []
        absent = [f"{place}.{key}" for key in want if key not in have]
        return absent + [gap for key in want if key in have for gap in missing(have[key], want[key], f"{place}.{key}")]

    # Settings that exclude others which are stated: steps or epochs, adamw or momentum.
    allowed = {".local.epochs", ".local.momentum", ".allocation.kind", ".model.trust_remote_code"}
    if stated["method"] == "fedit":
        allowed |= {".emulator", ".alignment", ".compare.fedit"}  # FedBiOT's
    else:
        allowed |= {".aggregation.rule", ".ranks"}  # FedIT's
    assert set(missing(stated, known, "")) <= allowed


def test_init_writes_it_under_the_name_of_the_file_and_never_over_another(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    write_template(path, "fedit")
    assert load_recipe(path).name == "mine"
    with pytest.raises(UserError, match="a path that is free"):
        write_template(path, "fedit")
    with pytest.raises(UserError, match=r"--method: expected one of fedbiot, fedit"):
        write_template(tmp_path / "other.yaml", "magic")


def test_the_four_parts_example_runs() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples/four_parts.py"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    losses = [float(line.rpartition("loss ")[2]) for line in done.stdout.splitlines() if "loss" in line]
    assert len(losses) == 2
    assert losses[1] < losses[0]


def test_the_ten_lines_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text()
    script = text.partition("```python\n")[2].partition("```")[0]
    assert "flocktune.run" in script
    script = script.replace("rounds: 3", "rounds: 1").replace("steps: 5", "steps: 1")
    script = script.replace("max_tokens: 128}", "max_tokens: 128, test_rows_per_category: 1}")
    monkeypatch.chdir(tmp_path)
    exec(compile(script, "README.md", "exec"), {})
    assert (tmp_path / "runs/ten-lines/summary.json").exists()
