"""A coordinator's folder and its clients' keys: who may read what, what is verified, what is refused. Nothing runs."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import ssl
import stat
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from flocktune.enrolment import (
    Invitation,
    fingerprint,
    make_request,
    new_private_key,
    public_key_of,
    read_invitation,
    read_request,
    verify_request,
    write_invitation,
    write_private,
    write_request,
)
from flocktune.errors import UserError
from flocktune.federation import control, enrolled, processes, services
from flocktune.federation.certificates import create_authority, days_left, issue
from flocktune.federation.configuration import write_configuration
from flocktune.federation.enrolled import accept, client_named, clients, invite, remove
from flocktune.federation.layout import Federation, create_federation, open_federation, renew_certificates
from flocktune.federation.status import status_of
from flocktune.files import exclusive

HOST = "fed.example.org"


@pytest.fixture
def fed(tmp_path: Path) -> Federation:
    made = create_federation(tmp_path / "fed", HOST, 8443, None, None)
    write_configuration(made)
    return made


@pytest.fixture
def invited(fed: Federation) -> Invitation:
    return invite(fed, "hospital-a")


def refused(*parts: str) -> Any:
    """A UserError whose text has all of ``parts``."""
    return pytest.raises(UserError, match="(?s)" + ".*".join(re.escape(part) for part in parts))


# The folder


def test_everything_in_the_folder_is_its_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = create_federation(tmp_path / "fed", HOST, 8443, None, None)
        write_configuration(made)
        invite(made, "hospital-a", with_key=True)
    finally:
        os.umask(before)
    for path in (made.folder, *made.folder.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.name != ".lock":  # empty
            assert mode == (0o700 if path.is_dir() else 0o600), f"{path}: {mode:o}"


def test_a_private_file_is_private_from_its_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []

    def seen(descriptor: int) -> None:
        modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))

    monkeypatch.setattr(os, "fsync", seen)
    path = tmp_path / "secret"
    write_private(path, "old")
    assert modes[0] == 0o600

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_private(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_secrets_stand_in_their_own_files_only(fed: Federation) -> None:
    secret = fed.secret.read_text()
    assert len(secret) == 64
    holders = [path.name for path in fed.folder.rglob("*") if path.is_file() and secret in path.read_text()]
    assert holders == ["superexec.secret"]
    keys = {path.name for path in fed.folder.rglob("*") if path.is_file() and "PRIVATE KEY" in path.read_text()}
    assert keys == {"ca.key", "server.key", "loopback.key"}


def test_a_federation_is_found_again(fed: Federation, tmp_path: Path) -> None:
    assert open_federation(fed.folder) == fed
    assert fed.name == "fed"
    with refused(str(tmp_path / "other"), "nothing there", "federation init"):
        open_federation(tmp_path / "other")
    (fed.folder / "federation.json").write_text('{"format": "flocktune-federation/2"}')
    with refused("federation.json", "flocktune-federation/1"):
        open_federation(fed.folder)


def test_nothing_is_written_over_what_is_there(fed: Federation) -> None:
    before = {path: path.read_bytes() for path in fed.folder.rglob("*") if path.is_file()}
    with refused("a new or empty folder", "--renew"):
        create_federation(fed.folder, HOST, 8443, None, None)
    assert {path: path.read_bytes() for path in fed.folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("host", "port", "name", "part"),
    [
        ("https://x", 8443, None, "--host"),
        ("Fed.example.org", 8443, None, "lower case"),
        ("a b", 8443, None, "--host"),
        ("x;return 200", 8443, None, "--host"),
        ("", 8443, None, "--host"),
        (HOST, 0, None, "--port"),
        (HOST, 65536, None, "--port"),
        (HOST, 8443, "../up", "--name"),
    ],
)
def test_what_can_not_be_is_refused(tmp_path: Path, host: str, port: int, name: str | None, part: str) -> None:
    with refused(part):
        create_federation(tmp_path / "fed", host, port, name, None)
    assert not (tmp_path / "fed").exists()


def test_a_path_that_other_programs_would_misread_is_refused(tmp_path: Path) -> None:
    for name in ("a b", "a;b", "a$b", 'a"b', "a{b"):
        with refused("a path of letters"):
            create_federation(tmp_path / name, HOST, 8443, "fed", None)


# What other programs read


def test_nginx_opens_one_door(fed: Federation) -> None:
    text = fed.nginx_config.read_text()
    assert re.findall(r"proxy_pass (\S+);", text) == [f"https://127.0.0.1:{fed.superlink_port}"]
    assert re.findall(r"location (\S+) {\s+(\S+ \S+)", text) == [
        ("/", "return 403;"),
        ("/v1/fleet/", "limit_except POST"),
    ]
    for line in (
        "ssl_protocols       TLSv1.2 TLSv1.3;",
        "client_max_body_size      16m;",
        "proxy_buffering         off;",
        "proxy_request_buffering off;",
        "proxy_ssl_verify        on;",
        "server_tokens off;",
    ):
        assert line in text
    paths = re.findall(r"^\s*(?:pid|error_log|access_log|\w+_temp_path|ssl_certificate\w*)\s+(\S+?)[; ]", text, re.M)
    assert len(paths) == 10
    assert all(path.startswith(f"{fed.folder}/") for path in paths)


def test_programs_start_hardened(fed: Federation) -> None:
    known = services.services(fed)
    assert tuple(known) == services.NAMES
    superlink = known["superlink"].command
    options = dict(zip(superlink[1:-2:2], superlink[2:-2:2], strict=False))
    assert options["--host"] == "127.0.0.1"
    assert options["--isolation"] == "process"
    assert options["--database"] == str(fed.database)
    assert options["--superexec-auth-secret-file"] == str(fed.secret)
    assert superlink[-2:] == ("--enable-supernode-auth", "--disable-runtime-dependency-installation")
    assert "--insecure" not in superlink + known["superexec"].command
    assert str(fed.secret) in known["superexec"].command


def test_every_flower_process_is_told_to_stay_at_home(fed: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_INTERNAL_GRPC_CONTROL_API", "1")  # it would open another port
    monkeypatch.setenv("HF_HOME", "/models")
    whole = services.inherited_environment(fed)
    assert {key: value for key, value in whole.items() if key.startswith("FLWR_")} == {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_HOME": str(fed.folder / "flower"),
    }
    assert whole["HF_HOME"] == "/models"
    assert whole["PATH"].split(":")[0] == f"{sys.prefix}/bin"


def test_flowers_command_finds_the_superlink(fed: Federation) -> None:
    entries = tomllib.loads((fed.folder / "flower" / "config.toml").read_text())["superlink"]
    assert entries["default"] == "federation"
    address = f"127.0.0.1:{fed.superlink_port}"
    assert entries["federation"] == {"address": address, "root-certificates": str(fed.authority)}


@pytest.mark.parametrize("name", services.NAMES)
def test_units_start_the_same_programs(fed: Federation, name: str) -> None:
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[method-assign, assignment]
    parser.read(fed.folder / "systemd" / f"flocktune-fed-{name}.service")
    unit = dict(parser["Service"])
    assert tuple(shlex.split(unit["ExecStart"])) == services.services(fed)[name].command
    assert unit["NoNewPrivileges"] == "yes"
    assert unit["ProtectSystem"] == ("full" if name == "superexec" else "strict")
    assert unit["Restart"] == "always"
    assert ("IPAddressDeny" in unit) == (name == "superlink")
    text = (fed.folder / "systemd" / f"flocktune-fed-{name}.service").read_text()
    given = dict(line.split("=", 1) for line in re.findall(r'^Environment="(.*)"$', text, re.M))
    assert given == services.environment(fed)


def test_containers_start_the_same_programs(fed: Federation) -> None:
    compose = yaml.safe_load((fed.folder / "docker" / "compose.yaml").read_text())
    assert list(compose["services"]) == list(services.NAMES)
    for name, entry in compose["services"].items():
        assert entry["command"][1:] == list(services.services(fed)[name].command[1:])
        assert entry["volumes"] == [f"{fed.folder}:{fed.folder}"]
        assert entry["cap_drop"] == ["ALL"]
        # The SuperLink's loopback is theirs, and only the door is open to others.
        assert entry.get("network_mode") == (None if name == "superlink" else "service:superlink")
        assert entry.get("ports") == (["8443:8443"] if name == "superlink" else None)
    (build,) = {entry["build"] for entry in compose["services"].values()}
    assert (fed.folder / "docker" / build / "Dockerfile").exists()


# Certificates


def handshake(folder: Path, name: str, authority: Path, hostname: str) -> None:
    """A TLS handshake in memory. Raises ssl.SSLCertVerificationError as a client would."""
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")
    asking = ssl.create_default_context(cafile=str(authority))
    asking.verify_flags |= ssl.VERIFY_X509_STRICT  # as newer Pythons do by default
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = serving.wrap_bio(up, down, server_side=True)
    client = asking.wrap_bio(down, up, server_hostname=hostname)
    for _ in range(4):
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    client.getpeercert()


def test_the_chain_holds_for_the_right_names_only(fed: Federation, tmp_path: Path) -> None:
    tls = fed.folder / "tls"
    handshake(tls, "server", fed.authority, HOST)
    handshake(tls, "loopback", fed.authority, "127.0.0.1")
    handshake(tls, "loopback", fed.authority, "localhost")
    for name, hostname in (("server", "other.example.org"), ("server", "127.0.0.1"), ("loopback", HOST)):
        with pytest.raises(ssl.SSLCertVerificationError, match=r"mismatch|not valid for"):
            handshake(tls, name, fed.authority, hostname)
    create_authority(tmp_path, fed.name)  # of the same name
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tls, "server", tmp_path / "ca.pem", HOST)


def test_a_server_can_not_sign_others(fed: Federation, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(fed.server_certificate.read_bytes())
    (tmp_path / "ca.key").write_bytes(fed.tls("server.key").read_bytes())
    issue(tmp_path, tmp_path / "forged.pem", tmp_path / "forged.key", ["bank.example.org"], 10)
    chain = (tmp_path / "forged.pem").read_bytes() + fed.server_certificate.read_bytes()
    (tmp_path / "forged.pem").write_bytes(chain)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path, "forged", fed.authority, "bank.example.org")


def test_an_address_can_be_the_host(tmp_path: Path) -> None:
    made = create_federation(tmp_path / "fed", "192.0.2.7", 8443, None, None)
    handshake(made.folder / "tls", "server", made.authority, "192.0.2.7")


def test_renewed_certificates_are_of_the_same_authority(fed: Federation, cli: Callable[..., Any]) -> None:
    kept = [fed.authority, fed.folder / "ca" / "ca.key", fed.secret, fed.folder / "federation.json"]
    before = {path: path.read_bytes() for path in (*kept, fed.server_certificate, fed.tls("server.key"))}
    fed.nginx_config.write_text("spoiled")
    assert cli("federation", "init", fed.folder, "--renew").code == 0
    assert all(path.read_bytes() == before[path] for path in kept)
    assert fed.server_certificate.read_bytes() != before[fed.server_certificate]
    handshake(fed.folder / "tls", "server", fed.authority, HOST)
    assert "proxy_pass" in fed.nginx_config.read_text()
    assert 725 < days_left(fed.server_certificate) <= 730


def test_without_its_authority_a_federation_says_so(fed: Federation) -> None:
    (fed.folder / "ca" / "ca.key").unlink()
    with refused("a certificate authority", "backup"):
        renew_certificates(fed)


# Keys and the two files


def test_a_key_is_what_flower_and_ssh_read() -> None:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

    key = new_private_key()
    loaded = load_ssh_private_key(key, None)
    assert isinstance(loaded, ec.EllipticCurvePrivateKey)
    assert isinstance(loaded.curve, ec.SECP384R1)
    assert load_ssh_public_key(public_key_of(key).encode()) == loaded.public_key()
    assert new_private_key() != key
    with refused("private key", "P-384"):
        public_key_of(b"nothing of the kind")


SSH_KEY = (  # by ssh-keygen, as is its fingerprint below
    "ecdsa-sha2-nistp384 AAAAE2VjZHNhLXNoYTItbmlzdHAzODQAAAAIbmlzdHAzODQAAABhBFuSWnVVUGNzEgnXpBC//PwV1x7ACfdA3jdd"
    "+QxjzrQ19uMP+gRs+Ub7c7ee5BGZ/cNn7eLoS0lZGgNJ5ppIQKjzIcni05Wc8DwgCz5HQL4YSfAKRu5hBaQix6HrPAi47A=="
)


def test_a_fingerprint_is_that_of_ssh() -> None:
    assert fingerprint(SSH_KEY) == "SHA256:IMmFY1Zva5OE0WfMG5WCtXIZOHzyaaMS4aBIZps5sZM"
    ed25519 = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKNqLmGSzK0DxmR2mDPv0cr3HTGi/3Hx1uYlPoYIqCqm"
    other_point = SSH_KEY.replace("BFuSWnVV", "BFuSWnVW")  # not on the curve
    for other in ("", ed25519, "ecdsa-sha2-nistp384 !!", other_point, f"{SSH_KEY} a comment", f"{SSH_KEY}\n"):
        with refused("public key"):
            fingerprint(other)


def test_the_round_trip_of_an_enrolment(fed: Federation, tmp_path: Path, cli: Callable[..., Any]) -> None:
    bundle, answer = tmp_path / "a.bundle", tmp_path / "hospital-a.request"
    said = cli("federation", "enrol", fed.folder, "--name", "hospital-a", "--out", bundle)
    assert said.code == 0
    assert stat.S_IMODE(bundle.stat().st_mode) == 0o600
    invitation = read_invitation(bundle)
    assert (invitation.client, invitation.host, invitation.port) == ("hospital-a", HOST, 8443)
    assert invitation.ca == fed.authority.read_text()
    assert invitation.private_key is None
    assert client_named(fed, "hospital-a").status == "invited"

    public = public_key_of(new_private_key())
    write_request(answer, make_request(invitation, public))
    assert invitation.secret not in answer.read_text()
    said = cli("federation", "enrol", fed.folder, "--accept", answer)
    assert said.code == 0
    assert fingerprint(public) in said.out
    assert "federation up" in said.out  # it is down: nothing is registered yet
    client = client_named(fed, "hospital-a")
    assert (client.status, client.public_key, client.secret) == ("accepted", public, None)
    assert invitation.secret not in (fed.folder / "clients" / "hospital-a.json").read_text()

    again = cli("federation", "enrol", fed.folder, "--accept", answer)
    assert again.code == 2
    assert "answered already" in again.err
    assert client_named(fed, "hospital-a") == client


def test_with_key_it_is_one_step(fed: Federation, tmp_path: Path, cli: Callable[..., Any]) -> None:
    bundle = tmp_path / "trial.bundle"
    said = cli("federation", "enrol", fed.folder, "--name", "trial", "--with-key", "--out", bundle)
    assert "private key is in it" in said.out
    invitation = read_invitation(bundle)
    assert invitation.private_key is not None
    assert client_named(fed, "trial").public_key == public_key_of(invitation.private_key.encode())
    assert client_named(fed, "trial").status == "accepted"
    forged = replace(make_request(replace(invitation, secret="00" * 32), KEY), proof="")
    with refused("answered already"):
        accept(fed, forged)


KEY = public_key_of(new_private_key())
OTHER_KEY = public_key_of(new_private_key())


def test_only_the_invited_ones_own_words_are_accepted(fed: Federation, invited: Invitation) -> None:
    good = make_request(invited, KEY)
    stranger = make_request(replace(invited, secret="00" * 32), KEY)
    swapped = replace(good, public_key=OTHER_KEY)
    empty = replace(good, proof="")
    for forged in (stranger, swapped, empty, *(replace(good, proof=text) for text in ("ä", "\ud800", "a" * 64))):
        with refused("a proof under the newest invitation's secret"):
            accept(fed, forged)
    with refused(f"one for federation {fed.id}"):
        accept(fed, make_request(replace(invited, federation_id="other"), KEY))
    invite(fed, "hospital-b")
    with refused("a proof"):
        accept(fed, replace(good, client="hospital-b"))
    with refused("an invited client", "hospital-a, hospital-b"):
        accept(fed, replace(good, client="hospital-c"))
    assert client_named(fed, "hospital-a").status == "invited"
    assert accept(fed, good).fingerprint == fingerprint(KEY)


def test_a_proof_is_never_made_of_an_empty_secret(invited: Invitation) -> None:
    request = make_request(replace(invited, secret=""), KEY)
    with refused("a proof"):
        verify_request(request, invited.federation_id, invited.client, "")
    with refused("one of client hospital-b"):
        verify_request(make_request(invited, KEY), invited.federation_id, "hospital-b", invited.secret)


def test_a_new_invitation_voids_the_old_one(fed: Federation, invited: Invitation) -> None:
    newer = invite(fed, "hospital-a")
    with refused("older invitation"):
        accept(fed, make_request(invited, KEY))
    accept(fed, make_request(newer, KEY))
    with refused("is not enrolled", "--remove hospital-a"):
        invite(fed, "hospital-a")


def test_two_clients_have_two_keys(fed: Federation, invited: Invitation) -> None:
    accept(fed, make_request(invited, KEY))
    with refused("one that another client has"):
        accept(fed, make_request(invite(fed, "hospital-b"), KEY))


@pytest.mark.parametrize("name", ["", ".", "..", "-a", "a/b", "a b", "a\n", "ä", "x" * 65, ".lock"])
def test_names_that_would_be_trouble_are_refused(fed: Federation, name: str) -> None:
    with refused("--name"):
        invite(fed, name)
    assert clients(fed) == ()


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no JSON": (lambda entries: "{", "a JSON file"),
    "a list": (lambda entries: [], "another file"),
    "another file": (lambda entries: {"rounds": 3}, "another file"),
    "a newer version": (lambda entries: {**entries, "format": "flocktune-invitation/2"}, "version 2"),
    "the other file": (lambda entries: {**entries, "format": "flocktune-request/1"}, "flocktune-request/1"),
    "no host": (lambda entries: {key: value for key, value in entries.items() if key != "host"}, "host"),
    "a port as text": (lambda entries: {**entries, "port": "8443"}, "port"),
    "a port that is true": (lambda entries: {**entries, "port": True}, "port"),
    "a port that is none": (lambda entries: {**entries, "port": 70000}, "port"),
    "no certificate": (lambda entries: {**entries, "ca": "x"}, "ca"),
    "a certificate without its end": (lambda entries: {**entries, "ca": "-----BEGIN CERTIFICATE-----\nx"}, "ca"),
    "a certificate of half letters": (lambda entries: {**entries, "ca": entries["ca"] + "\ud800"}, "ca"),
    "a key that is none": (lambda entries: {**entries, "private_key": "anything\n"}, "private_key"),
    "a key of half letters": (lambda entries: {**entries, "private_key": "\ud800"}, "private_key"),
    "a secret of half a byte": (lambda entries: {**entries, "secret": "a" * 33}, "secret"),
    "a federation that climbs": (lambda entries: {**entries, "federation": "../x"}, "federation"),
    "a federation from the root": (lambda entries: {**entries, "federation": "/etc"}, "federation"),
    "an id of two": (lambda entries: {**entries, "federation_id": "a b"}, "federation_id"),
    "a host that paints": (lambda entries: {**entries, "host": "h\x1b]0;x\x07"}, "host"),
    "an address that paints": (lambda entries: {**entries, "host": "fe80::1%\x1b]0;x\x07"}, "host"),
    "a format that paints": (lambda entries: {**entries, "format": "flocktune-invitation/\x1b"}, "another file"),
    "a short secret": (lambda entries: {**entries, "secret": "00"}, "secret"),
    "a name that climbs": (lambda entries: {**entries, "client": "../../x"}, "client"),
    "a host of another kind": (lambda entries: {**entries, "host": ["x"]}, "host"),
    "too large": (lambda entries: {**entries, "more": "x" * 70_000}, "small JSON file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_invitation_is_named(tmp_path: Path, invited: Invitation, damage: str) -> None:
    path = tmp_path / "x.bundle"
    write_invitation(path, invited)
    assert read_invitation(path) == invited
    spoil, part = DAMAGES[damage]
    spoiled = spoil(json.loads(path.read_text()))
    path.write_text(spoiled if isinstance(spoiled, str) else json.dumps(spoiled))
    with refused(str(path), part) as caught:
        read_invitation(path)
    assert "\x1b" not in str(caught.value)


def test_a_damaged_request_is_named(tmp_path: Path, invited: Invitation) -> None:
    path = tmp_path / "x.request"
    with refused(str(path), "nothing there", "flocktune join"):
        read_request(path)
    write_request(path, make_request(invited, KEY))
    whole = json.loads(path.read_text())
    assert read_request(path) == make_request(invited, KEY)
    for key, value in (("public_key", "x"), ("proof", 3), ("client", "a/b"), ("federation_id", None),
                       ("federation_id", "\ud800")):  # fmt: skip
        path.write_text(json.dumps({**whole, key: value}))
        with refused(key.replace("_", " ") if key == "public_key" else key):
            read_request(path)


# Who takes part, told to a SuperLink that is not there


class SuperLink:
    """What the SuperLink keeps of its nodes, and no more: a key may be registered once, ever."""

    def __init__(self) -> None:
        self.keys: dict[str, str] = {}
        self.out: set[str] = set()

    def register(self, federation: Federation, public_key: Path, client: str) -> str:
        key = public_key.read_text().strip()
        if key in self.keys.values():
            raise control.ControlFailed("supernode register", "Public key already in use.")
        self.keys[str(len(self.keys))] = key
        return str(len(self.keys) - 1)

    def unregister(self, federation: Federation, node_id: str) -> None:
        if node_id in self.out or node_id not in self.keys:
            raise control.ControlFailed("supernode unregister", "Node ID not found for account.")
        self.out.add(node_id)

    def list_nodes(self, federation: Federation) -> tuple[control.Node, ...]:
        return tuple(control.Node(node, "unregistered" if node in self.out else "offline") for node in self.keys)

    @property
    def inside(self) -> set[str]:
        return {key for node, key in self.keys.items() if node not in self.out}


@pytest.fixture
def superlink(monkeypatch: pytest.MonkeyPatch) -> SuperLink:
    made = SuperLink()
    for name in ("register", "unregister", "list_nodes"):
        monkeypatch.setattr(enrolled, name, getattr(made, name))
    return made


def test_accepted_keys_are_registered_once(fed: Federation, invited: Invitation, superlink: SuperLink) -> None:
    assert enrolled.let_in_accepted(fed) == {}  # invited is not enough
    accept(fed, make_request(invited, KEY))
    assert enrolled.let_in_accepted(fed) == {"hospital-a": "0"}
    assert enrolled.let_in_accepted(fed) == {}
    assert client_named(fed, "hospital-a").node_id == "0"
    assert superlink.inside == {KEY}


def test_killed_between_registration_and_note(fed: Federation, invited: Invitation, superlink: SuperLink) -> None:
    accept(fed, make_request(invited, KEY))
    superlink.keys = {"7": KEY}
    assert enrolled.let_in_accepted(fed) == {"hospital-a": "7"}


def test_removed_is_shut_out_for_good(fed: Federation, invited: Invitation, superlink: SuperLink) -> None:
    accept(fed, make_request(invited, KEY))
    enrolled.let_in_accepted(fed)
    remove(fed, "hospital-a")
    assert superlink.inside == {KEY}  # it is told by the next up
    assert enrolled.let_in_accepted(fed) == {}
    assert enrolled.shut_out_removed(fed) == ["hospital-a"]
    assert superlink.inside == set()
    assert clients(fed) == ()

    accept(fed, make_request(invite(fed, "hospital-a"), KEY))
    accept(fed, make_request(invite(fed, "hospital-b"), OTHER_KEY))
    with refused("hospital-a: expected a key that was never registered", "a new key"):
        enrolled.let_in_accepted(fed)
    assert superlink.inside == {OTHER_KEY}  # the others come in all the same


def test_removed_before_its_node_was_noted(fed: Federation, invited: Invitation, superlink: SuperLink) -> None:
    accept(fed, make_request(invited, KEY))
    superlink.keys = {"7": KEY}
    remove(fed, "hospital-a")
    enrolled.shut_out_removed(fed)
    assert superlink.inside == set()


def test_shutting_out_may_be_repeated_but_not_fail_silently(
    fed: Federation, invited: Invitation, superlink: SuperLink
) -> None:
    accept(fed, make_request(invited, KEY))
    enrolled.let_in_accepted(fed)
    remove(fed, "hospital-a")
    superlink.keys = {}  # another SuperLink, which knows nothing of it
    with pytest.raises(control.ControlFailed):
        enrolled.shut_out_removed(fed)
    assert [client.name for client in clients(fed)] == ["hospital-a"]
    superlink.keys, superlink.out = {"0": KEY}, {"0"}  # killed after it was shut out
    assert enrolled.shut_out_removed(fed) == ["hospital-a"]


def test_an_unanswered_invitation_is_withdrawn_at_once(
    fed: Federation, invited: Invitation, cli: Callable[..., Any]
) -> None:
    assert "forgotten" in cli("federation", "enrol", fed.folder, "--remove", "hospital-a").out
    with refused("an invited client"):
        accept(fed, make_request(invited, KEY))


def test_enrol_wants_one_thing(fed: Federation, cli: Callable[..., Any]) -> None:
    for arguments in ((), ("--name", "a", "--remove", "a")):
        said = cli("federation", "enrol", fed.folder, *arguments)
        assert (said.code, "one of --name" in said.err) == (2, True)


# Processes


@pytest.fixture
def pretend(tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Start a program of any name with any arguments, which waits until it is killed."""
    running = []

    def start(name: str, *arguments: str) -> int:
        script = tmp_path / name
        script.write_text("print(flush=True)\ninput()\n")
        command = (sys.executable, str(script), *arguments)
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        running.append(process)
        assert process.stdout is not None
        process.stdout.readline()
        return process.pid

    yield start
    for process in running:
        process.kill()
        process.communicate()


def test_a_program_is_known_by_what_it_was_started_with(fed: Federation, pretend: Callable[..., int]) -> None:
    superlink = services.services(fed)["superlink"]
    pretend("flower-superlink", "--database", f"{fed.database}.old")  # another federation's
    pretend("editor", str(fed.database))
    pretend("flower-superexec", "--database", str(fed.database))
    assert services.pid_of(superlink) is None
    pid = pretend("flower-superlink", "--port", "1", "--database", str(fed.database))
    assert services.pid_of(superlink) == pid
    os.kill(pid, 9)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # dead, but nobody has waited for it
    assert services.pid_of(superlink) is None


def test_what_bears_the_mark_is_ended(
    fed: Federation, pretend: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = pretend("flwr-serverapp")
    monkeypatch.setenv(services.MARK, fed.id)
    ours = pretend("flwr-serverapp")
    monkeypatch.delenv(services.MARK)
    assert set(services.belonging(fed)) == {ours}
    assert processes.stop(fed) == []
    assert services.belonging(fed) == {}
    os.kill(stranger, 0)


def test_what_ignores_sigterm_is_killed(fed: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "STOP_S", 0.2)
    stubborn = "import signal; signal.signal(15, signal.SIG_IGN); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", stubborn],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, services.MARK: fed.id},
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        processes.stop(fed)
        assert process.wait(30) == -9


def test_what_is_missing_is_named_before_anything_starts(
    fed: Federation, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "find_nginx", lambda: None)
    monkeypatch.setattr(services, "program", lambda name: "/nowhere")
    said = cli("federation", "up", fed.folder)
    assert said.code == 2
    assert "pip install 'flocktune[flower]'" in said.err
    assert "apt install nginx" in said.err
    assert "No such" not in cli("federation", "logs", fed.folder).all


def test_a_port_that_is_taken_is_named(fed: Federation) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with refused(f"port {port}", "superlink can have"):
            processes.start(replace(fed, superlink_port=port), "superlink")
    assert services.belonging(fed) == {}


def test_a_program_that_ends_says_why(fed: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "flower-superexec"
    path.write_text("raise SystemExit('the reason')")
    known = services.services(fed)
    command = (sys.executable, str(path), *known["superexec"].command[1:])
    broken = {**known, "superexec": replace(known["superexec"], command=command)}
    monkeypatch.setattr(processes, "services", lambda _: broken)
    with pytest.raises(processes.NotAnswering, match=r"(?s)superexec ended.*the reason"):
        processes.start(fed, "superexec")


# What is shown


def test_status_of_a_federation_that_is_down(fed: Federation, cli: Callable[..., Any]) -> None:
    invite(fed, "hospital-with-a-long-name-of-its-own", with_key=True)
    invite(fed, "b")
    for name, finished, lines in (
        ("first", True, [{"event": "run_start", "rounds": 8}, *({"event": "round", "round": i} for i in range(8))]),
        ("second", False, [{"event": "run_start", "rounds": 8}, {"event": "round", "round": 0}]),
        ("third", False, []),
    ):
        folder = fed.runs / name
        folder.mkdir()
        (folder / "recipe.yaml").write_text("")
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"torn')
        if finished:
            (folder / "summary.json").write_text("{}")
    found = status_of(fed)
    assert [(run.name, run.status, run.rounds_done, run.rounds) for run in found.runs] == [
        ("first", "finished", 8, 8),
        ("second", "stopped", 1, 8),
        ("third", "stopped", 0, None),
    ]
    assert [(client.name, client.status) for client in found.clients] == [
        ("b", "invited"),
        ("hospital-with-a-long-name-of-its-own", "accepted"),
    ]
    assert {program.status for program in found.programs} == {"down"}
    said = cli("federation", "status", fed.folder)
    assert max(map(len, said.out.splitlines())) <= 80
    assert "8 of 8" in said.out
    assert "Certificates end in 7" in said.out
    as_json = json.loads(cli("federation", "status", fed.folder, "--json").out)
    assert as_json["runs"][1] == {"name": "second", "status": "stopped", "rounds_done": 1, "rounds": 8}
    assert "secret" not in json.dumps(as_json)
    with exclusive(fed.runs / "third"):
        assert [run.status for run in status_of(fed).runs] == ["finished", "stopped", "running"]


def test_certificates_that_end_soon_are_told_of(fed: Federation, cli: Callable[..., Any]) -> None:
    issue(fed.folder / "ca", fed.server_certificate, fed.tls("server.key"), [HOST], 10)
    assert "--renew" in cli("federation", "status", fed.folder).out


def test_logs_are_shown_from_their_end(fed: Federation, cli: Callable[..., Any]) -> None:
    fed.log("superlink").write_text("".join(f"line {number}\n" for number in range(1000)))
    said = cli("federation", "logs", fed.folder, "superlink", "--lines", 3)
    assert said.out.splitlines() == ["line 997", "line 998", "line 999"]
    assert cli("federation", "logs", fed.folder, "superlink", "--lines", 0).out == ""
    assert "nginx.log" in cli("federation", "logs", fed.folder).out
    assert cli("federation", "logs", fed.folder, "apache").code == 2


def test_the_checklist_names_what_to_do(fed: Federation) -> None:
    text = (fed.folder / "CHECKLIST.md").read_text()
    for word in (HOST, "8443", "systemctl enable --now flocktune-fed-superlink", "`ca/`", "--renew", "enrol", "NTP"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 200
