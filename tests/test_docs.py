"""What README and docs/ tell their readers to type: all of it is known, and all but a few lines is done, in small."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from click import MissingParameter
from click.exceptions import Exit

from documented import PAGES, ROOT, SHELLS, Typed, fenced, typed, understood, within_sentences
from flocktune.assets import embedded_model
from flocktune.cli import main
from flocktune.config.load import load_recipe, parse_recipe
from flocktune.config.study import load_study
from flocktune.config.template import write_template
from flocktune.owner.policy import Policy
from judge_server import longer_is_better, serving

NOT_RUN = {
    r"docs/federation.md .*": "its trial is run by test_federation_guide.py, from the page; the rest of it is parsed",
    r"docs/results.md .*": "minutes to hours: how tables were made; the verbs are run elsewhere",
    r".* make \w+.*": "makes an environment of its own; that the target exists is tested",
    r".* pip install .*": "would install; that the extras exist is tested",
    r".* flocktune federation (up|run|status) .*": "needs nginx and processes that stay: test_federation_guide.py",
    r".* flocktune federation enrol fed --accept .*": "needs an owner's answer: test_federation_guide.py",
    r"docs/tutorials/coordinator.md flocktune federation logs .*": "before a run there are none",
    r".* flocktune join .*": "needs a coordinator: test_federation_guide.py",
    r"docs/tutorials/data-owner.md python -c .*": "the guide's line, which test_federation_guide.py runs",
    r".* flocktune study recipes/study_fed\w+.yaml.*": "a quarter of an hour and more; every cell is checked here",
    r"docs/evaluation.md flocktune eval .* --task code .*": "HumanEval's own rows: its tests run it",
    r"docs/evaluation.md flocktune eval .* --harness .*": "tasks' data come from a hub: its own tests have some",
    r".* flocktune playground .*": "stays until it is told to end: its own tests open it",
    r".* flocktune dashboard .*": "stays until it is told to end: its own tests open it",
    r".* (vllm|ollama|llama-server|docker) .*": "other makers' programs",
}
"""``PAGE COMMAND`` -> why that is not done here. All of these are parsed, and their recipes read."""

STANDS_FOR = {
    "PATH/TO/MODEL": "embedded",
    "MODEL": "embedded",
    "PATH/TO/SmolLM2-135M": "embedded",
    "PATH/TO/dolly-15k.jsonl": "notes.jsonl",
    "PATH/TO/databricks-dolly-15k.jsonl": "notes.jsonl",
    "gsm8k-test.jsonl": "notes.jsonl",
    "URL": "$JUDGE_URL",
    "http://127.0.0.1:8000/v1": "$JUDGE_URL",
    "https://judge.example/v1": "$JUDGE_URL",
}
"""What readers fill in, and what stands for it here."""

SMALL = (
    "rounds=1",
    "local.steps=1",
    "local.batch_size=2",
    "data.test_rows_per_category=1",
    "evaluation.max_new_tokens=1",
    "runtime.threads=1",
)
WITHOUT_BASELINES = ("compare={}",)
"""A page's first run keeps its baselines; one more look at them in the others shows nothing new."""

FEWER = {"fedbiot": ("alignment.first_steps=1", "alignment.fidelity_rows=2", "alignment.max_rows=16")}
"""Less of the same work: added to every run of a page, by its method too."""

SMALL_OPTIONS = {
    "generate": ("--max-new-tokens", "2"),
    "eval": ("--max-rows", "2"),
    "memorisation": ("--max-rows", "4"),
}

EARLIER = {"README.md": "test_recipes.py runs it"}
"""Pages whose Python is run elsewhere."""


def reason_not_to_run(command: Typed) -> str | None:
    return next((why for what, why in NOT_RUN.items() if re.fullmatch(what, f"{command.page} {command.text}")), None)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_known(page: str) -> None:
    for command in within_sentences(page):
        with suppress(MissingParameter, Exit):  # a sentence may leave out what it is not about; --help leaves at once
            _know(command, shlex.split(command.text))
    for command in typed(page):
        words = shlex.split(command.text)
        match words[0]:
            case "flocktune":
                _know(command, words)
            case "make":
                assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
            case "pip":
                _know_extras(command)
            case "python" if words[1] == "-m":
                assert (ROOT / words[2] / "__main__.py").exists(), command
            case "python" if words[1] != "-c":
                assert (ROOT / words[1]).exists(), command


def _know(command: Typed, words: list[str]) -> None:
    """Verb, options and arguments are flocktune's; a recipe that ships is there, and takes the settings beside it."""
    context = understood(command.text)
    overrides = [word for word in context.params.get("overrides") or () if "=" in word]
    for word in words:
        if word.startswith("recipes/"):
            read = load_study if Path(word).stem.startswith("study_") else load_recipe
            read(ROOT / word, overrides)


def _know_extras(command: Typed) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r"(?:\.|flocktune)\[([\w,]+)\]", command.text):
        assert set(extras.split(",")) <= set(project["optional-dependencies"]), command


def test_every_exception_is_one() -> None:
    commands = [command for page in PAGES for command in typed(page)]
    for what in NOT_RUN:
        assert any(re.fullmatch(what, f"{command.page} {command.text}") for command in commands), what


RUN = [page for page in PAGES if any(reason_not_to_run(command) is None for command in typed(page))]


def test_pages_are_found() -> None:
    assert {"README.md", "docs/start.md", "docs/tutorials/researcher.md", "docs/tutorials/serving-results.md"} <= set(
        RUN
    )
    assert len([command for page in RUN for command in typed(page)]) > 50


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder as a reader's: recipes, rows of its own, a base model. A judge answers at ``JUDGE_URL``."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    rows = [{"instruction": f"Say {n}.", "response": f"{n}", "category": "ab"[n % 2]} for n in range(600)]
    (tmp_path / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "base").symlink_to(embedded_model())
    monkeypatch.chdir(tmp_path)
    with serving(longer_is_better) as judge:
        monkeypatch.setenv("JUDGE_URL", judge.url)
        yield tmp_path


ON_THEIR_OWN = ("README.md", "docs/start.md", "docs/tutorials/")
"""Pages that make every run they speak of. On others a reader has runs already: copies of one small comparison."""


@pytest.fixture(scope="module")
def lent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison: FedIT, one client alone, the base."""
    from flocktune.api import run

    settings = [*SMALL, "allocation={kind: iid, clients: 3}", "compare={base: true, local: 1}", "name=my-run"]
    folder = tmp_path_factory.mktemp("lent") / "run"
    run(parse_recipe("data: {template: short}", settings), folder)
    return folder


@pytest.mark.parametrize("page", RUN)
def test_what_a_page_says_can_be_done(
    page: str, desk: Path, lent: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the page's order: its files are saved, its commands typed, its Python run."""
    steps = sorted([*typed(page), *fenced(page)], key=lambda step: step.start)
    first_run = True
    for step in steps:
        if isinstance(step, Typed):
            if reason_not_to_run(step) is None:
                if not page.startswith(ON_THEIR_OWN):
                    _lend(step, lent)
                _type(step, first_run, monkeypatch, capsys)
                first_run &= not step.text.startswith("flocktune run")
        elif step.file:
            (desk / step.file).write_text(step.text)
        elif step.language == "python" and page not in EARLIER:
            exec(compile(step.text, page, "exec"), {"__name__": "__main__"})


def _lend(command: Typed, lent: Path) -> None:
    """Put a recipe and a finished run where ``command`` looks for one."""
    words = shlex.split(command.text)
    if words[1:2] == ["run"]:
        if words[2] == "my-run.yaml" and not Path(words[2]).exists():
            write_template(Path(words[2]), "fedit")
        shutil.rmtree(Path("runs") / Path(words[2]).stem, ignore_errors=True)  # its name is the new run's
        return
    for word in words[2:]:
        if re.fullmatch(r"runs/[\w.-]+/?", word) and not Path(word).exists():
            shutil.copytree(lent, word)


def _type(command: Typed, first_run: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = [_stands_for(word) for word in shlex.split(command.text)]
    if words[0] != "flocktune":
        done = subprocess.run(("bash", "-ec", command.text), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # who is asked something says nothing
    monkeypatch.setattr(sys, "argv", _in_small(words, first_run))
    code = 0
    try:
        main()
    except SystemExit as leave:
        code = int(leave.code or 0)
    said = capsys.readouterr()
    assert code == 0, f"{command}\n{said.out}{said.err}"


def _stands_for(word: str) -> str:
    key, sign, value = word.rpartition("=")
    return key + sign + (os.path.expandvars(STANDS_FOR[value]) if value in STANDS_FOR else value)


def _in_small(words: list[str], first_run: bool) -> list[str]:
    match words[1]:
        case "run":
            config = load_recipe(Path(words[2]))
            baselines = (("compare.local=1",) if config.compare.local else ()) if first_run else WITHOUT_BASELINES
            return [*words, *SMALL, *FEWER.get(config.method, ()), *baselines]
        case "study":
            return [*words, *SMALL, "--seeds", "0"]
        case verb:
            return [*words, *SMALL_OPTIONS.get(verb, ())]


@pytest.mark.parametrize("page", [page for page in PAGES if any(block.language == "yaml" for block in fenced(page))])
def test_settings_that_are_shown_exist(page: str, tmp_path: Path) -> None:
    """A block of YAML is part of a recipe, a study file, or an owner's policy."""
    for block in fenced(page):
        if block.language != "yaml":
            continue
        keys = set(yaml.safe_load(block.text))
        if "methods" in keys and "recipe" in keys:
            continue  # a study, which is run
        if keys <= {key.name for key in fields(Policy)}:
            continue
        parse_recipe(block.text)


def test_shells_are_commands() -> None:
    """No fenced block of commands hides under a name that is not looked into."""
    known = {*SHELLS, "python", "yaml", "json", "text", "xml", ""}
    for page in PAGES:
        assert {block.language for block in fenced(page)} <= known, page
