"""A coordinator as it is deployed: nginx, SuperLink and SuperExec on this machine, seen by an outsider."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flocktune.enrolment import make_request, new_private_key, public_key_of, read_invitation, write_request
from flocktune.federation.certificates import create_authority
from flocktune.federation.enrolled import client_named
from flocktune.federation.layout import Federation, open_federation
from flocktune.federation.lifecycle import up
from flocktune.federation.processes import answers, stop
from flocktune.federation.services import (
    MARK,
    NAMES,
    belonging,
    inherited_environment,
    pid_of,
    program,
    services,
)
from flocktune.federation.status import status_of

pytestmark = pytest.mark.needs_nginx

HOST = "localhost"
PATIENCE_S = 120
"""Long enough for a busy machine; nothing waits for it to pass."""

PROTOBUF = "application/protobuf"
REFUSED_PATHS = (
    "/",
    "/docs",
    "/openapi.json",
    "/health",
    "/v1/control/list-nodes",
    "/v1/control/start-run",
    "/v1/control/register-node",
    "/v1/runtime/acquire-task",
    "/v1/runtime/pull-messages",
    "/v1/fleet",
    "/v1/fleet/",
    "/v1/fleet/../control/list-nodes",
    "/v1/fleet/%2e%2e/control/list-nodes",
    "/v1/fleet/%2E%2E%2Fcontrol%2Flist-nodes",
    "/v1/fleet/..%2fcontrol/list-nodes",
    "/v1/fleet/%252e%252e/control/list-nodes",
    "/v1/fleet/..;/control/list-nodes",
    "/v1/fleet/../../v1/control/list-nodes",
    "/v1/fleet/./activate-node",
    "/v1/fleet//activate-node",
    "/v1/fleet/activate-node/../../control/list-nodes",
    "/v1/fleet/activate-node?x=/v1/control/list-nodes",
    "/v1/fleet/activate-node%00",
    "/v1/fleet\\..\\control\\list-nodes",
    "//v1/control/list-nodes",
    "//v1/fleet/activate-node",
    "/V1/Control/list-nodes",
    "/V1/FLEET/activate-node",
    "/v1/%63ontrol/list-nodes",
    "/v1/fleet/Activate-Node",
    "http://localhost/v1/control/list-nodes",
)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def flocktune(*arguments: object) -> str:
    """A verb as a process of its own, which ends: what it started must outlive it."""
    command = (program("flocktune"), "federation", *map(str, arguments))
    said = subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE_S)
    assert said.returncode == 0, said.stdout + said.stderr
    return said.stdout


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A federation that is up, with one client, hospital-a, whose key is in the folder beside it."""
    folder = tmp_path_factory.mktemp("coordinator") / "fed"
    port, superlink_port = free_ports(2)
    flocktune("init", folder, "--host", HOST, "--port", port, "--superlink-port", superlink_port)
    federation = open_federation(folder)
    try:
        bundle = folder.parent / "hospital-a.bundle"
        flocktune("enrol", folder, "--name", "hospital-a", "--out", bundle)
        key = new_private_key()
        request = folder.parent / "hospital-a.request"
        write_request(request, make_request(read_invitation(bundle), public_key_of(key)))
        (folder.parent / "hospital-a.key").write_bytes(key)
        flocktune("enrol", folder, "--accept", request)
        said = flocktune("up", folder)
        assert "registered as node" in said
        yield federation
    finally:
        stop(federation)


def outsider(federation: Federation) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(federation.authority))


def ask(port: int, path: str, context: ssl.SSLContext, method: str = "POST", content: str = PROTOBUF) -> int:
    """The status of a request whose path goes out as it is."""
    request = (
        f"{method} {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: {content}\r\n"
        "Content-Length: 0\r\nConnection: close\r\n\r\n"
    )
    with (
        socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as plain,
        context.wrap_socket(plain, server_hostname=HOST) as connection,
    ):
        connection.sendall(request.encode())
        return int(connection.makefile("rb").readline().split()[1])


def supernode(federation: Federation, key: Path, home: Path, **options: str) -> subprocess.Popen[str]:
    """Flower's client, as an owner's machine would start it. What it says goes to HOME/node.log."""
    home.mkdir(exist_ok=True)
    given = {"superlink": f"{HOST}:{federation.port}", "root-certificates": str(federation.authority), **options}
    given |= {"auth-supernode-private-key": str(key), "port": str(free_ports(1)[0]), "max-retries": "0"}
    arguments = [text for name, value in given.items() for text in (f"--{name}", value)]
    environment = {**inherited_environment(federation), "FLWR_HOME": str(home)}
    del environment[MARK]
    with (home / "node.log").open("w") as log:
        return subprocess.Popen(
            (program("flower-supernode"), *arguments), env=environment, stdout=log, stderr=log, text=True
        )


def requests_seen(federation: Federation) -> list[str]:
    """Every request that the SuperLink has answered, routine ones excepted."""
    return re.findall(r'"([A-Z]+ \S+) HTTP', federation.log("superlink").read_text())


def wait_until(true: Callable[[], bool]) -> None:
    deadline_at = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline_at, "waited in vain"
        time.sleep(0.05)  # between two looks


def test_from_outside_nothing_but_the_fleet_api_is_there(deployed: Federation) -> None:
    before = requests_seen(deployed)
    for path in REFUSED_PATHS:
        for method in ("POST", "GET"):
            status = ask(deployed.port, path, outsider(deployed), method)
            assert 400 <= status < 500, f"{method} {path}: {status}"
            assert status != 401, f"{method} {path} was asked for a signature, so it reached the SuperLink"
    for method in ("GET", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT"):
        assert 400 <= ask(deployed.port, "/v1/fleet/activate-node", outsider(deployed), method) < 500
    # The one request that gets through comes after the others, and the SuperLink saw this one alone.
    assert ask(deployed.port, "/v1/fleet/activate-node", outsider(deployed)) == 401
    wait_until(lambda: requests_seen(deployed) != before)
    assert requests_seen(deployed)[len(before) :] == ["POST /v1/fleet/activate-node"]


@pytest.mark.parametrize(
    "call", ["register-node", "activate-node", "pull-messages", "push-object", "get-fab", "unregister-node"]
)
def test_a_fleet_request_without_a_signature_is_refused(deployed: Federation, call: str) -> None:
    assert ask(deployed.port, f"/v1/fleet/{call}", outsider(deployed)) == 401


def test_what_is_too_large_is_refused_by_its_announcement(deployed: Federation) -> None:
    text = f"POST /v1/fleet/push-object HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {17 * 2**20}\r\n\r\n"
    with (
        socket.create_connection(("127.0.0.1", deployed.port), timeout=PATIENCE_S) as plain,
        outsider(deployed).wrap_socket(plain, server_hostname=HOST) as connection,
    ):
        connection.sendall(text.encode())
        assert b" 413 " in connection.makefile("rb").readline()


def test_flowers_ports_are_this_machines_alone(deployed: Federation) -> None:
    for name in ("superlink", "superexec"):
        pid = pid_of(services(deployed)[name])
        assert pid is not None
        listening = _listening(pid)
        assert all(address in ("0100007F", "00000000000000000000000001000000") for address, _ in listening), listening
        ports = {port for _, port in listening}
        assert ports == ({deployed.superlink_port} if name == "superlink" else set())


def test_only_new_tls_and_only_the_federations_own_authority(deployed: Federation, tmp_path: Path) -> None:
    old = outsider(deployed)
    old.minimum_version = ssl.TLSVersion.TLSv1
    old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):  # an alert that the server sent
        ask(deployed.port, "/v1/fleet/activate-node", old)
    new = outsider(deployed)
    new.maximum_version = ssl.TLSVersion.TLSv1_2
    assert ask(deployed.port, "/v1/fleet/activate-node", new) == 401

    create_authority(tmp_path, deployed.name)
    with pytest.raises(ssl.SSLCertVerificationError):
        ask(deployed.port, "/", ssl.create_default_context(cafile=str(tmp_path / "ca.pem")))
    with pytest.raises(ssl.SSLCertVerificationError):
        ask(deployed.port, "/", ssl.create_default_context())


def test_who_has_not_the_secret_gets_no_task(deployed: Federation) -> None:
    """A SuperExec runs what the coordinator runs; even on this machine nobody becomes one without the secret."""
    inside = ssl.create_default_context(cafile=str(deployed.authority))
    assert ask(deployed.superlink_port, "/v1/runtime/acquire-task", inside) in (401, 403)
    assert answers(deployed, "superexec")  # while ours is served


def test_keys_are_let_in_and_shut_out_and_no_others(deployed: Federation, tmp_path: Path) -> None:
    bundle, home = tmp_path / "leaver.bundle", deployed.folder.parent
    assert "Registered leaver" in flocktune("enrol", deployed.folder, "--name", "leaver", "--with-key", "--out", bundle)
    assert [client.status for client in status_of(deployed).clients] == ["registered", "registered"]
    flocktune("enrol", deployed.folder, "--remove", "leaver")
    (tmp_path / "leaver.key").write_text(read_invitation(bundle).private_key or "")
    (tmp_path / "stranger.key").write_bytes(new_private_key())

    names = {"leaver": tmp_path, "stranger": tmp_path, "hospital-a": home}
    nodes = {name: supernode(deployed, where / f"{name}.key", tmp_path / name) for name, where in names.items()}
    try:
        for name in ("leaver", "stranger"):
            assert nodes[name].wait(PATIENCE_S) != 0
            assert "[code:" in _said(tmp_path / name)  # the SuperLink's own refusal, not a failed connection
        node_id, log = client_named(deployed, "hospital-a").node_id, deployed.log("superlink")
        wait_until(lambda: f"Activated node_id={node_id}" in log.read_text() or nodes["hospital-a"].poll() is not None)
        assert [(client.name, client.status) for client in status_of(deployed).clients] == [("hospital-a", "online")]
    finally:
        for process in nodes.values():
            process.terminate()
            process.wait(PATIENCE_S)
    assert _client_status(deployed, "hospital-a") == "offline"  # it said good-bye


def test_what_was_killed_comes_back_with_the_same_clients(deployed: Federation) -> None:
    node = client_named(deployed, "hospital-a").node_id
    assert dict(up(deployed))["nginx"].startswith("was running")
    for name in NAMES:
        pid = pid_of(services(deployed)[name])
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: all(pid_of(service) is None for service in services(deployed).values()))
    said = json.loads(flocktune("status", deployed.folder, "--json"))
    assert {program["status"] for program in said["programs"]} == {"down"}

    told = flocktune("up", deployed.folder)
    assert told.count("started, process") == 3
    assert "registered as node" not in told
    said = json.loads(flocktune("status", deployed.folder, "--json"))
    assert {program["status"] for program in said["programs"]} == {"answering"}
    (client,) = said["clients"]
    assert client["node_id"] == node
    assert client["status"] in ("registered", "offline")  # the SuperLink knows it still


def test_a_registration_that_was_not_written_down_is_found_again(deployed: Federation) -> None:
    path = deployed.folder / "clients" / "hospital-a.json"
    whole = path.read_text()
    path.write_text(json.dumps({**json.loads(whole), "node_id": None}))
    list(up(deployed))
    assert json.loads(path.read_text()) == json.loads(whole)


def test_down_leaves_nothing(deployed: Federation) -> None:
    assert set(services(deployed)) <= set(re.findall(r"\w+", flocktune("down", deployed.folder)))
    assert belonging(deployed) == {}
    assert all(pid_of(service) is None for service in services(deployed).values())
    for port in (deployed.port, deployed.superlink_port):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
    assert "Nothing was running" in flocktune("down", deployed.folder)


def _client_status(federation: Federation, name: str) -> str:
    return next(client.status for client in status_of(federation).clients if client.name == name)


def _said(home: Path) -> str:
    return (home / "node.log").read_text()


def _listening(pid: int) -> set[tuple[str, int]]:
    """(address as the kernel writes it, port) of every socket on which a process takes connections."""
    inodes = {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.is_symlink()}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                address, _, port = fields[1].partition(":")
                found.add((address, int(port, 16)))
    return found
