"""docs/federation.md: its trial is run, its other commands and its tables are held to the code."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from flocktune.audit import read_audit, verify
from flocktune.cli import app
from flocktune.config.engines import FlowerEngine
from flocktune.config.schema import SchedulingConfig
from flocktune.federation.layout import open_federation
from flocktune.federation.processes import stop
from flocktune.federation.services import MARK, belonging, program
from flocktune.files import read_json
from flocktune.owner.policy import Policy
from real_federation import free_ports

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "federation.md").read_text()
PAGES = {"docs/federation.md": GUIDE, "README.md": (ROOT / "README.md").read_text()}

SMALL = "rounds=1 local.steps=1 local.batch_size=2 evaluation.generate=false"
SHORTER = {
    "recipes/federation_fedit.yaml": f"recipes/federation_fedit.yaml {SMALL}",
    "recipes/federation_fedbiot.yaml": f"recipes/federation_fedbiot.yaml {SMALL} alignment.first_steps=2",
    "--host localhost": "--host localhost --port {} --superlink-port {}",
}
"""All that is changed in the trial's commands: less work, and ports that are free on a machine of many tests."""

CLIENTS = ("client-01", "client-02", "client-03")
PROMISED = (
    "federation_fedit.yaml is sound",
    "superlink    started",
    "Registered client-03 as node",
    "ok enrolled    the coordinator knows this key",
    "FedIT: done",
    "FedBiOT: done",
    "federation-fedbiot   finished   1 of 1",
    "round 1: trained; ",
    "Stopped nginx, superexec, superlink",
)
"""What is said on the way."""

PATIENCE_S = 600
"""Long enough for a busy machine; nothing waits for it to pass."""


def section(heading: str) -> str:
    """What stands under a heading of the guide, up to the next one."""
    start = GUIDE.index(f"\n## {heading}\n")
    end = GUIDE.find("\n## ", start + 1)
    return GUIDE[start : None if end < 0 else end]


def blocks(text: str) -> list[str]:
    """The commands of every ```bash block."""
    return re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def table(text: str, key: str) -> list[list[str]]:
    """The rows of the table whose first heading is ``key``, without it."""
    lines = itertools.dropwhile(lambda line: not line.startswith(f"| {key} |"), text.splitlines())
    rows = list(itertools.takewhile(lambda line: line.startswith("|"), lines))
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows[2:]]


def stated(text: str) -> dict[str, Any]:
    """Setting -> default, as a table of the guide says."""
    return {row[0].strip("`"): yaml.safe_load(row[1].strip("`")) for row in table(text, "setting")}


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The folder in which the trial was run, line after line as a newcomer types it, and what it said."""
    folder = tmp_path_factory.mktemp("guide")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    script = "\n".join(blocks(section("Try it on one machine")))
    for plain, shorter in SHORTER.items():
        assert plain in script
        script = script.replace(plain, shorter.format(*free_ports(shorter.count("{}"))))
    path = os.pathsep.join((str(Path(program("flocktune")).parent), os.environ["PATH"]))
    own = {key: value for key, value in os.environ.items() if key != MARK}
    with (folder / "said").open("w") as said:
        shell = subprocess.Popen(
            ("bash", "-e", "-c", script),
            cwd=folder,
            env={**own, "PATH": path, "CUDA_VISIBLE_DEVICES": ""},  # the same bits are promised on CPUs
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
    try:
        code = shell.wait(PATIENCE_S)
        text = (folder / "said").read_text()
        assert code == 0, text
        yield folder, text
    finally:
        with suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGTERM)
        shell.wait(PATIENCE_S)
        if (folder / "trial" / "federation.json").exists():
            stop(open_federation(folder / "trial"))


@pytest.mark.needs_nginx
def test_the_trial_does_what_it_says(trial: tuple[Path, str]) -> None:
    folder, said = trial
    for words in PROMISED:
        assert words in said, said
    runs = folder / "trial" / "runs"
    for name in ("federation-fedit", "federation-fedbiot"):
        assert (runs / name / "adapter" / "adapter_model.safetensors").exists()
        assert (runs / name / "report.html").exists()
    assert (runs / "federation-fedbiot" / "emulator").is_dir()


@pytest.mark.needs_nginx
def test_the_trial_in_one_process_gives_the_same_bits(trial: tuple[Path, str]) -> None:
    folder, _ = trial
    real, simulated = (
        read_json(folder / run / "summary.json") for run in ("trial/runs/federation-fedit", "one-process")
    )
    assert real["adapter_sha256"] == simulated["adapter_sha256"]


@pytest.mark.needs_nginx
def test_every_owner_of_the_trial_has_written_down_all_that_left(trial: tuple[Path, str]) -> None:
    folder, _ = trial
    received = {
        (record["client"], record["sha256"])
        for record in read_audit(folder / "trial" / "audit.jsonl")
        if record["event"] == "received"
    }
    left = set()
    for client in CLIENTS:
        log = folder / "owners" / "trial" / client / "audit.jsonl"
        assert verify(log) == []
        events = [record["event"] for record in read_audit(log)]
        assert events.count("update_left") == 2  # a round of FedIT, one of FedBiOT
        assert events[-1] == "left"
        left |= {(client, record["digest"]) for record in read_audit(log) if record["event"] == "update_left"}
    assert left == received


@pytest.mark.needs_nginx
def test_an_owner_verifies_the_audit_log_as_the_guide_says(trial: tuple[Path, str]) -> None:
    folder, _ = trial
    (command,) = [line for block in blocks(section("The owner")) for line in block.splitlines() if "verify" in line]
    home = folder / "copy"
    shutil.copytree(folder / "owners" / "trial" / "client-01", home, ignore=shutil.ignore_patterns("*.sock"))

    def said() -> str:
        path = os.pathsep.join((str(Path(program("python")).parent), os.environ["PATH"]))
        return subprocess.run(
            ("bash", "-e", "-c", command),
            cwd=home,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    assert said().strip() == "whole"
    lines = (home / "audit.jsonl").read_bytes().splitlines(keepends=True)
    (home / "audit.jsonl").write_bytes(b"".join([*lines[:1], *lines[2:]]))
    assert "taken out" in said()


@pytest.mark.needs_nginx
def test_the_trial_leaves_no_process(trial: tuple[Path, str]) -> None:
    folder, _ = trial
    assert belonging(open_federation(folder / "trial")) == {}
    ours = [
        path
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if str(folder) in _text(path) and "flocktune" in _text(path)
    ]
    assert not ours


def _text(path: Path) -> str:
    with suppress(OSError):
        return path.read_bytes().decode(errors="replace")
    return ""


def commands() -> list[tuple[str, str]]:
    """Every ``flocktune ...`` of the guide's blocks and sentences, and of the README's lines on federations."""
    found = [("docs/federation.md", line) for block in blocks(GUIDE) for line in block.splitlines()]
    for page, text in PAGES.items():
        said = re.findall(r"`(flocktune [^`]+)`", text)
        found += [
            (page, code) for code in said if not re.fullmatch(r"flocktune( federation)? \w+", code)
        ]  # a verb's name
        found += [(page, line.strip()) for line in text.splitlines() if line.startswith("    flocktune")]
    given = []
    for page, line in found:
        for part in re.split(r"[;&|]|\bdo\b|\bdone\b", line.partition(" #")[0]):
            words = part.partition(" > ")[0].strip()
            # Beside a command the README says what it does, after some blanks.
            words = re.split(r" {3,}", words)[0]
            if words.startswith("flocktune ") and " " in words:
                given.append((page, words))
    return sorted(set(given))


@pytest.mark.parametrize(("page", "command"), commands(), ids=lambda text: text)
def test_every_command_is_one_that_flocktune_knows(page: str, command: str) -> None:
    """Its verb, its options, and nothing that is required missing: all but the doing."""
    arguments = shlex.split(command)[1:]
    known: Any = typer.main.get_command(app)
    with known.make_context("flocktune", list(arguments)) as context:
        while hasattr(known, "commands"):
            name, known, arguments = known.resolve_command(context, arguments)
            context = known.make_context(name, list(arguments), parent=context)  # raises for what it does not know


def test_the_commands_are_found() -> None:
    lines = [command for _, command in commands()]
    assert "flocktune federation run fed --resume" in lines
    assert "flocktune federation run DIR --resume" in lines  # within a sentence
    assert len(lines) > 30


def test_policy_and_engine_are_the_codes_own() -> None:
    policy = {key.name: getattr(Policy(), key.name) for key in fields(Policy)}
    assert stated(section("The owner")) == {k: list(v) if isinstance(v, tuple) else v for k, v in policy.items()}

    engine = {f"engine.{key.name}": getattr(FlowerEngine(), key.name) for key in fields(FlowerEngine)}
    del engine["engine.kind"]
    scheduling = {f"scheduling.{key.name}": getattr(SchedulingConfig(), key.name) for key in fields(SchedulingConfig)}
    del scheduling["scheduling.selection"]
    assert stated(section("The coordinator")) == engine | scheduling


@pytest.mark.parametrize("row", table(section("When something goes wrong"), "what you see"), ids=lambda row: row[0])
def test_every_message_is_said_somewhere_in_the_code(row: list[str]) -> None:
    code = "".join(path.read_text() for path in sorted((ROOT / "src").rglob("*.py"))).replace("{name}", "nginx")
    messages = re.findall(r"`([^`]+)`", row[0])
    assert messages
    for message in messages:
        assert message.removeprefix("expected ") in code, message
