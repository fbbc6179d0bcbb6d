"""What tests share: a quiet machine, a tiny world to run on, and the command line as a function."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

from browser import browser, find_chromium, open_page  # noqa: F401  the fixtures

# Before torch and the hub's library are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["COLUMNS"] = "80"

settings.register_profile("flocktune", deadline=None)  # no test may fail for being slow
settings.load_profile("flocktune")

CATEGORIES = ("colour", "size", "sum")
SETTINGS = (
    "name: tiny",
    "rounds: 3",
    "model: {path: MODEL}",
    "lora: {rank: 2, targets: [q_proj, down_proj]}",
    "data: {train: DATA, template: short, max_tokens: 96, test_rows_per_category: 2}",
    "allocation: {kind: dirichlet, clients: 4, min_rows: 4}",
    "scheduling: {selection: {kind: uniform, fraction: 0.5}}",
    "local: {steps: 2, batch_size: 4, lr: 1.0e-2}",
    "evaluation: {every: 2, max_new_tokens: 3, max_rows: 3}",
    "runtime: {device: cpu, threads: 1}",
)


@dataclass(frozen=True)
class World:
    """A random model of a few thousand weights, 48 rows of three categories, and a recipe that names both."""

    folder: Path
    model: Path
    data: Path
    recipe: Path


@dataclass(frozen=True)
class Said:
    """How a command ended and what it said; ``all`` has warnings too."""

    code: int
    out: str
    err: str
    log: str

    @property
    def all(self) -> str:
        return self.out + self.err + self.log


@dataclass(frozen=True)
class Program:
    """A program that some tests need and a machine may lack: what finds it, what it is for, how to get it."""

    name: str
    find: Callable[[], str | None]
    tests_of: str
    package: str


def _find_nginx() -> str | None:
    from flocktune.federation.services import find_nginx

    return find_nginx()


PROGRAMS = (
    Program("nginx", _find_nginx, "a federation's door", "nginx-light"),
    Program("chromium", find_chromium, "the pages in a browser", "chromium"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What a missing program would show is left out. FLOCKTUNE_NEEDS_NGINX=1 or _CHROMIUM=1 makes that a failure."""
    for program in PROGRAMS:
        if program.find() is None and os.environ.get(f"FLOCKTUNE_NEEDS_{program.name.upper()}") != "1":
            for item in items:
                if f"needs_{program.name}" in item.keywords:
                    item.add_marker(pytest.mark.skip(reason=f"{program.name} is not installed"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was not tested is said where nobody overlooks it."""
    skipped = terminalreporter.stats.get("skipped", [])
    for program in PROGRAMS:
        count = sum(f"{program.name} is not" in str(report.longrepr) for report in skipped)
        if count:
            text = (
                f"{program.name} is missing: {count} tests of {program.tests_of} were not run."
                f" Install it: apt install {program.package}"
            )
            terminalreporter.write_line(text, red=True, bold=True)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tokens are cached below the tests' own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOCKTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def make_world(folder: Path, family: str = "llama") -> World:
    """Write a world to ``folder``."""
    from tiny_models import save_tiny

    folder.mkdir(exist_ok=True)
    model = save_tiny(folder / "model", family)
    data = write_rows(folder / "data.jsonl", dolly_rows(48))
    recipe = folder / "recipe.yaml"
    text = "\n".join(SETTINGS).replace("MODEL", str(model)).replace("DATA", str(data))
    recipe.write_text(text + "\n")
    return World(folder, model, data, recipe)


def dolly_rows(count: int) -> list[dict[str, str]]:
    """Rows as Dolly has them."""
    return [
        {
            "instruction": f"Which {CATEGORIES[i % 3]} has number {i}?",
            "context": f"Number {i} is here." if i % 2 else "",
            "response": f"{CATEGORIES[i % 3]} {i * 7 % 10}",
            "category": CATEGORIES[i % 3],
        }
        for i in range(count)
    ]


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def cli(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Said]:
    """``flocktune ARGUMENTS`` in this process. What files hold is read anew every time, as a new process would."""
    from flocktune import resident
    from flocktune.cli import main

    def run(*arguments: object) -> Said:
        resident.forget_models()
        for cached in (resident.load_instructions, resident.base_digest):
            cached.cache_clear()
        capsys.readouterr()
        caplog.clear()
        monkeypatch.setattr(sys, "argv", ["flocktune", *(str(argument) for argument in arguments)])
        code = 0
        try:
            main()
        except SystemExit as leave:
            code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
        said = capsys.readouterr()
        return Said(code, said.out, said.err, caplog.text)

    return run
