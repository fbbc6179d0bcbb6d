"""Every recipe that ships can be read, and the commented one states every setting there is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flocktune.config.load import build_config, load_recipe, to_tree
from flocktune.config.study import load_study
from flocktune.config.template import write_template
from flocktune.errors import UserError

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
