"""A real federation from init to down: nginx, SuperLink, SuperExec and owners who join, and the bits of one process."""

from __future__ import annotations

import re
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import Said, World
from flocktune import audit
from flocktune.engine.flower import fleet, signing
from flocktune.enrolment import read_invitation
from flocktune.federation.services import belonging, program
from flocktune.files import read_json
from flocktune.owner.home import make_home
from flocktune.owner.join import try_to_connect
from real_federation import (
    PATIENCE_S,
    Deployed,
    Owner,
    audit_of,
    coordinator,
    owner_of,
    processes_with,
    verb,
    wait_until,
    write_world,
)

NAMES = ("ada", "bela", "carl")
FEDBIOT = (
    "method=fedbiot",
    "name=biot",
    "emulator={adapter_layers: 1, drop: 0.0}",
    "alignment={first_steps: 3, steps: 1, batch_size: 2, fidelity_rows: 3}",
)


@pytest.fixture(scope="module")
def deployed(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """Three owners have joined: ada by the request that her own ``join`` wrote, the others by keys they were given."""
    folder = tmp_path_factory.mktemp("real")
    with coordinator(folder, "localhost", write_world(folder, world, NAMES)) as deployed:
        for name in NAMES:
            owner = owner_of(deployed, folder, name, world)
            given = ("--with-key",) if name != "ada" else ()
            verb("federation", "enrol", deployed.folder, "--name", name, "--out", owner.bundle, *given)
        ada = deployed.owners["ada"]
        ada.join()  # nobody answers yet, and it stays
        wait_until((ada.folder / "ada.request").exists, "the request that join writes")
        verb("federation", "enrol", deployed.folder, "--accept", ada.folder / "ada.request")
        assert verb("federation", "up", deployed.folder).count("registered as node") == len(NAMES)
        for name in NAMES[1:]:
            deployed.owners[name].join()
        for owner in deployed.owners.values():
            wait_until(lambda owner=owner: "connected; waiting for tasks" in owner.said(), f"{owner.name} to connect")
        yield deployed


def one_process(cli: Callable[..., Said], deployed: Deployed, out: Path, *overrides: str) -> str:
    """The adapter's digest after ``flocktune run`` of the same recipe, one client after another."""
    said = cli("run", deployed.recipe, *overrides, "engine.stack=1", "--out", out)
    assert said.code == 0, said.all
    return str(read_json(out / "summary.json")["adapter_sha256"])


def tasks_of(owner: Owner) -> list[dict[str, Any]]:
    return [record for record in audit_of(owner, "task_received") if record["kind"] == "task"]


def on_the_wire(deployed: Deployed) -> int:
    """Bytes through nginx for tasks and updates, in both directions, with headers; no idle polling. 0 without nginx."""
    calls = r'"POST /v1/fleet/(?:push|pull|confirm)-\S+ HTTP[^"]*" 200 (\d+) (\d+)'
    log = deployed.federation.log("nginx")
    return sum(int(one) + int(other) for one, other in re.findall(calls, log.read_text())) if log.exists() else 0


def test_fedit_gives_the_bits_of_one_process(deployed: Deployed, cli: Callable[..., Said], tmp_path: Path) -> None:
    before, started = on_the_wire(deployed), time.perf_counter()
    said = verb("federation", "run", deployed.folder, deployed.recipe)
    seconds = time.perf_counter() - started
    assert "Report: " in said
    summary = deployed.summary("tiny")
    assert summary["adapter_sha256"] == one_process(cli, deployed, tmp_path / "one")
    rounds = deployed.rounds("tiny")
    assert [sorted(event["answered"]) for event in rounds] == [list(NAMES), list(NAMES)]
    # The base model was loaded once, over all rounds.
    assert {name: owner.loads() for name, owner in deployed.owners.items()} == dict.fromkeys(NAMES, 1)
    payload = sum(event["bytes_up"] + event["bytes_down"] for event in rounds)
    wire = on_the_wire(deployed) - before
    assert wire > payload or deployed.federation.door == "own"
    print(f"\n{seconds:.1f} s for {len(rounds)} rounds; {wire:,} bytes on the wire, {payload:,} of them tensors")


def test_fedbiot_too_and_the_emulator_comes_once(deployed: Deployed, cli: Callable[..., Said], tmp_path: Path) -> None:
    """... and a client that is killed at its task, and started anew, does it then."""
    carl = deployed.owners["carl"]
    command = (program("flocktune"), "federation", "run", deployed.folder, deployed.recipe, *FEDBIOT)
    with (tmp_path / "said").open("w") as said:
        run = subprocess.Popen(command, stdout=said, stderr=said)
    before = len(tasks_of(carl))
    wait_until(lambda: len(tasks_of(carl)) == before + 2, "carl to have the emulator, and be at work")
    carl.kill()
    carl.kill_worker()
    carl.join()
    assert run.wait(2 * PATIENCE_S) == 0, (tmp_path / "said").read_text()
    assert [sorted(event["answered"]) for event in deployed.rounds("biot")] == [list(NAMES), list(NAMES)]
    assert deployed.summary("biot")["adapter_sha256"] == one_process(cli, deployed, tmp_path / "one", *FEDBIOT)
    for owner in (deployed.owners[name] for name in NAMES if name != "carl"):
        kinds = [record["kind"] for record in audit_of(owner, "task_received")]
        # Two rounds of FedIT; then a task without its emulator, the emulator, by which it is done, the second round.
        assert kinds == ["task", "task", "task", "emulator", "task"]
        assert owner.loads() == 2  # the base, and the emulator


def test_both_sides_books_agree(deployed: Deployed) -> None:
    came = deployed.audit("received")
    assert len(came) == 2 * 2 * len(NAMES)
    assert audit.verify(deployed.folder / "audit.jsonl") == []
    keys = ("run", "round", "nonce", "bytes")
    for owner in deployed.owners.values():
        left = [(record["digest"], *(record[key] for key in keys)) for record in audit_of(owner, "update_left")]
        mine = [(record["sha256"], *(record[key] for key in keys)) for record in came if record["client"] == owner.name]
        # What left as carl was killed may not have come.
        assert [record for record in left if owner.name != "carl" or record in mine] == mine
        assert audit.verify(owner.home / "audit.jsonl") == []


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("summed", ("secure_aggregation={min_clients: 3}", "aggregation.weights=equal")),
        ("smaller", ("compression={format: int8, block: 16}", "aggregation.rule=fedsa_lora")),
    ],
)
def test_what_clients_remember_and_hide(
    deployed: Deployed, cli: Callable[..., Said], tmp_path: Path, name: str, asked: tuple[str, ...]
) -> None:
    """Five phases of a secure sum; error feedback and a factor that stays: the bits of one process, over TLS."""
    verb("federation", "run", deployed.folder, deployed.recipe, f"name={name}", *asked)
    assert [sorted(event["answered"]) for event in deployed.rounds(name)] == [list(NAMES), list(NAMES)]
    assert deployed.summary(name)["adapter_sha256"] == one_process(cli, deployed, tmp_path / "one", *asked)


@pytest.mark.needs_nginx
def test_what_is_not_the_fleets_is_refused_while_owners_are_there(deployed: Deployed) -> None:
    context = ssl.create_default_context(cafile=str(deployed.federation.authority))
    for path in ("/v1/control/list-nodes", "/v1/runtime/pull-messages"):
        with (
            socket.create_connection(("localhost", deployed.federation.port)) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as connection,
        ):
            connection.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n".encode())
            assert b" 403 " in connection.makefile("rb").readline()


@pytest.mark.parametrize("ahead_s", [-1000, -200, 200, 1000])
def test_a_clock_that_is_wrong_is_made_up_for_or_named(
    deployed: Deployed, monkeypatch: pytest.MonkeyPatch, ahead_s: int
) -> None:
    ada = deployed.owners["ada"]
    ada.leave()
    invitation = read_invitation(ada.bundle)
    home = make_home(ada.home, invitation)
    elsewhere = SimpleNamespace(time=lambda: time.time() + ahead_s, monotonic=time.monotonic)
    monkeypatch.setattr(signing, "time", elsewhere)
    if abs(ahead_s) <= signing.CORRECTED_S:
        try_to_connect(invitation, home)
    else:
        way = "ahead of" if ahead_s > 0 else "behind"
        with pytest.raises(fleet.NotAdmitted, match=f"clock is 1,000 s {way} the coordinator's: set it"):
            try_to_connect(invitation, home)


def test_nothing_is_left(deployed: Deployed) -> None:
    for owner in deployed.owners.values():
        owner.leave()
        assert owner.workers() == []
        assert "stopping" in owner.said()
        assert audit_of(owner, "left")
    verb("federation", "down", deployed.folder)
    assert belonging(deployed.federation) == {}
    assert processes_with(str(deployed.folder)) == []
