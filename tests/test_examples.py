"""Every example runs, from its own file and in an empty folder, in small."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from judge_server import longer_is_better, serving

EXAMPLES = Path(__file__).parent.parent / "examples"

NEEDS = {"evaluate_and_export.py": "fedit.py", "read_events.py": "fedit.py"}
"""Examples that look at what another one has made."""

LEAVES = {
    "fedit.py": "runs/fedit/adapter/adapter_model.safetensors",
    "fedbiot.py": "runs/fedbiot/emulator/emulator.json",
    "own_data.py": "runs/own-data/summary.json",
    "own_rule.py": "median-adapter/adapter_model.safetensors",
    "privacy.py": "runs/private/secret.key",
    "evaluate_and_export.py": "fedit-adapter/adapter_config.json",
    "compare_runs.py": "runs/compared/study.csv",
}
"""What there is afterwards."""

ELSEWHERE = {"four_parts.py"}
"""Run by test_recipes.py."""

SMALLER = ((r"\b(rounds|steps|first_steps): \d+", r"\1: 1"), (r"max_new_tokens([=:] ?)\d+", r"max_new_tokens\g<1>1"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which ``fedit.py`` was run."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run("fedit.py")
    return folder


def run(name: str) -> None:
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    for plain, smaller in SMALLER:
        text = re.sub(plain, smaller, text)
    exec(compile(text, name, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("name", sorted({path.name for path in EXAMPLES.glob("*.py")} - ELSEWHERE))
def test_an_example_does_what_it_says(
    name: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "judge_locally.py":
        with serving(longer_is_better) as judge:
            monkeypatch.setenv("JUDGE_URL", judge.url)
            run(name)
        assert '"wins": 1' in capsys.readouterr().out
        return
    if NEEDS.get(name) == "fedit.py" or name == "fedit.py":
        shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    if name != "fedit.py":
        run(name)
        assert capsys.readouterr().out.strip() or name == "own_rule.py"
    if name in LEAVES:
        assert (tmp_path / LEAVES[name]).exists()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_says_what_it_is_and_is_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith('"""')
    code = [line for line in text.partition('"""\n')[2].splitlines() if line.strip() and not line.startswith("#")]
    assert len(code) <= 45
