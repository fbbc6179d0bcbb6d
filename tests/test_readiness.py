"""``join --check`` against a real TLS server on this machine, and against files."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import StringIO
from ipaddress import ip_address
from pathlib import Path

import pytest
from rich.console import Console

import tiny_models
from conftest import World
from flocktune.config.schema import Columns, EmulatorConfig, ModelConfig
from flocktune.errors import UserError
from flocktune.models.bundle import write_bundle
from flocktune.models.layers import layer_stack
from flocktune.models.load import model_digest
from flocktune.models.split import plan_split
from flocktune.owner import readiness as ready
from flocktune.owner.policy import GB, Policy
from flocktune.owner.reach import CLOCK_APART_S, Finding, check_coordinator, check_network

x509 = pytest.importorskip("cryptography.x509", reason="cryptography comes with flocktune[flower]")
from cryptography.hazmat.primitives import hashes, serialization  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec  # noqa: E402

HOST = "localhost"


class Authority:
    """A certificate authority that signs what a test wants."""

    def __init__(self, name: str) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        builder = self._builder(self.name, self.key.public_key(), -1, 30)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        self.pem = _pem(builder.sign(self.key, hashes.SHA256()))

    def issue(self, folder: Path, host: str = HOST, first_day: int = -1, last_day: int = 10) -> Path:
        """A file with a key and a certificate for ``host``; days count from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
        names = [x509.DNSName(host), *([x509.IPAddress(ip_address("127.0.0.2"))] if host == HOST else [])]
        builder = self._builder(subject, key.public_key(), first_day, last_day)
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode()
        path = folder / "server.pem"
        path.write_text(private + _pem(builder.sign(self.key, hashes.SHA256())))
        return path

    def _builder(self, subject, public_key, first_day, last_day):  # type: ignore[no-untyped-def]
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + timedelta(days=first_day))
            .not_valid_after(now + timedelta(days=last_day, hours=1))
        )


def _pem(certificate) -> str:  # type: ignore[no-untyped-def]
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority("the coordinator's")


@contextmanager
def serving(
    chain: Path | None, *, ahead_s: float = 0.0, dated: bool = True, status: Callable[[str], int] = lambda path: 403
) -> Iterator[int]:
    """A server on a free port of this machine, over TLS with ``chain``; its clock is ``ahead_s`` before ours."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(status(self.path))
            if dated:
                self.send_header("Date", formatdate(time.time() + ahead_s, usegmt=True))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    if chain is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(chain)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda request, address: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def look(port: int, ca: str, host: str = HOST) -> dict[str, Finding]:
    return {finding.name: finding for finding in check_coordinator(host, port, ca)}


@pytest.fixture
def free_port() -> int:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        return int(holder.getsockname()[1])


# --- network ---------------------------------------------------------------------------------------


def test_a_good_coordinator(authority: Authority, tmp_path: Path) -> None:
    with serving(authority.issue(tmp_path, last_day=90)) as port:
        assert check_network(HOST, port).ok
        found = look(port, authority.pem)
    assert [found[name].ok for name in ("certificate", "gate", "clock")] == [True, True, True]
    assert "90 days left" in found["certificate"].said
    assert found["certificate"].fix == ""
    assert found["clock"].said == "equal to the coordinator's"


def test_a_closed_port(free_port: int) -> None:
    finding = check_network("127.0.0.1", free_port)
    assert finding.ok is False
    assert "refused the connection" in finding.said


def test_a_name_without_address() -> None:
    finding = check_network("no-such-host.invalid", 443)
    assert finding.ok is False
    assert "no address for no-such-host.invalid" in finding.said


def test_nobody_answers() -> None:
    with socket.socket() as silent:  # a full queue: the kernel drops what comes after
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        port = silent.getsockname()[1]
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))
        finding = check_network("127.0.0.1", port, timeout_s=0.3)
        for one in waiting:
            one.close()
    assert finding.ok is False
    assert "did not answer within 0.3 s" in finding.said


# --- certificate -----------------------------------------------------------------------------------


def test_another_authority(authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Authority("someone else's")
    (tmp_path / "system.pem").write_text(other.pem)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "system.pem"))  # one that this machine trusts
    with serving(other.issue(tmp_path)) as port:
        found = look(port, authority.pem)
    assert found["certificate"].ok is False
    assert "not signed by the invitation's authority" in found["certificate"].said
    assert (found["gate"].ok, found["clock"].ok) == (None, None), "what an unknown server says is no finding"


@pytest.mark.parametrize(
    ("issued", "host", "said"),
    [
        ({"host": "other.example"}, HOST, "not for localhost"),
        ({}, "127.0.0.1", "not for 127.0.0.1"),
        ({"first_day": -5, "last_day": -2}, HOST, "expired"),
        ({"first_day": 2}, HOST, "not valid yet"),
    ],
)
def test_a_certificate_that_does_not_hold(
    authority: Authority, tmp_path: Path, issued: dict[str, object], host: str, said: str
) -> None:
    with serving(authority.issue(tmp_path, **issued)) as port:  # type: ignore[arg-type]
        certificate = look(port, authority.pem, host)["certificate"]
    assert (certificate.ok, certificate.said) == (False, said)
    assert certificate.fix


def test_a_certificate_that_ends_soon(authority: Authority, tmp_path: Path) -> None:
    with serving(authority.issue(tmp_path, last_day=3)) as port:
        certificate = look(port, authority.pem)["certificate"]
    assert certificate.ok
    assert "3 days left" in certificate.said
    assert "renew" in certificate.fix


def test_no_tls_and_no_authority(authority: Authority, tmp_path: Path) -> None:
    with serving(None) as port:
        plain = look(port, authority.pem)["certificate"]
        nonsense = look(port, "not a certificate")["certificate"]
    assert (plain.ok, nonsense.ok) == (False, False)
    assert "no TLS connection" in plain.said
    assert "the invitation holds no certificate authority" in nonsense.said


# --- gate and clock --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/v1/control/list-runs"])
def test_a_control_api_that_answers_from_outside(authority: Authority, tmp_path: Path, path: str) -> None:
    with serving(authority.issue(tmp_path), status=lambda asked: 404 if asked == path else 403) as port:
        gate = look(port, authority.pem)["gate"]
    assert gate.ok is False
    assert gate.said == f"{path} answers 404; expected 403"
    assert "do not join" in gate.fix


@pytest.mark.parametrize(
    ("ahead_s", "ok", "said"),
    [
        (200, True, "200 s behind the coordinator's"),
        (-200, True, "200 s ahead of the coordinator's"),
        (-400, False, "400 s ahead of the coordinator's; at most 300 s are made up for"),
        (400, False, "400 s behind the coordinator's; at most 300 s are made up for"),
    ],
)
def test_clocks_that_differ(authority: Authority, tmp_path: Path, ahead_s: float, ok: bool, said: str) -> None:
    with serving(authority.issue(tmp_path), ahead_s=ahead_s) as port:
        clock = look(port, authority.pem)["clock"]
    number, _, rest = clock.said.partition(" ")
    assert (clock.ok, rest.startswith(said.partition(" ")[2])) == (ok, True)
    assert abs(int(number) - abs(ahead_s)) <= 2, "as exact as a header of whole seconds"


def test_a_server_that_does_not_say_its_time(authority: Authority, tmp_path: Path) -> None:
    with serving(authority.issue(tmp_path), dated=False) as port:
        assert look(port, authority.pem)["clock"].ok is None


def test_the_window_is_that_of_the_signatures() -> None:
    signing = pytest.importorskip("flocktune.engine.flower.signing", reason="Flower is an extra")
    assert signing.CORRECTED_S == CLOCK_APART_S


# --- what lies here --------------------------------------------------------------------------------


def test_a_key_is_for_its_owner_alone(tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    assert "no key" in ready.check_key(key).said
    key.write_text("secret")
    key.chmod(0o640)
    assert (ready.check_key(key).ok, ready.check_key(key).fix) == (False, f"chmod 600 {key}")
    key.chmod(0o600)
    assert ready.check_key(key).ok
    assert ready.check_key(tmp_path).ok is False


def test_whether_the_key_is_enrolled() -> None:
    def refused() -> None:
        raise UserError("401: unknown key")

    assert ready.check_enrolled(None).ok is None
    assert ready.check_enrolled(lambda: None).ok is True
    assert (ready.check_enrolled(refused).ok, ready.check_enrolled(refused).said) == (False, "401: unknown key")


def test_rows_are_counted_and_mistakes_are_named(world: World, tmp_path: Path) -> None:
    alone = ready.check_data(str(world.data), Columns(), None, Policy())
    assert (alone.ok, alone.said) == (True, "48 rows")
    with_model = ready.check_data(str(world.data), Columns(), str(world.model), Policy())
    assert with_model.said.startswith("48 rows, 48 with something to learn from")
    few = ready.check_data(str(world.data), Columns(), None, Policy(min_rows=49))
    assert (few.ok, few.said) == (False, "48 rows; the policy wants 49")
    broken = tmp_path / "rows.jsonl"
    broken.write_text('{"instruction": "a", "response": "b"}\n{"instruction"\n')
    assert "rows.jsonl:2" in ready.check_data(str(broken), Columns(), None, Policy()).said
    absent = ready.check_data(str(tmp_path / "none.jsonl"), Columns(), None, Policy())
    assert (absent.ok, "nothing there" in absent.said) == (False, True)


def test_the_owners_columns_are_read(tmp_path: Path, world: World, free_port: int) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"findings": "a", "impression": "b"}\n')
    place = replace(place_of(world, tmp_path, free_port, ""), data=str(rows), model=None)

    def data() -> Finding:
        return next(finding for finding in ready.readiness(place) if finding.name == "data")

    assert data().ok is False
    place.policy.write_text("columns: {instruction: findings, response: impression}\n")
    assert (data().ok, data().said) == (True, "1 rows")


def test_what_a_stranger_says_does_not_paint() -> None:
    console = Console(width=80, record=True, file=StringIO(), force_terminal=False)
    console.print(ready.readiness_table([Finding("enrolled", False, "a\x1b]0;x\x07\nb", "fix")]))
    assert [line.split() for line in console.export_text().splitlines()] == [
        ["no", "enrolled", "a", "]0;x"],
        ["b"],
        ["fix"],
    ]


def test_a_models_digest_is_shown_and_compared(world: World, tmp_path: Path) -> None:
    digest = model_digest(ModelConfig(path=str(world.model)))
    (named,) = ready.check_models(str(world.model), None, Policy())
    assert (named.ok, named.said) == (True, digest)
    assert ready.check_models(str(world.model), None, Policy(models=(digest,)))[0].ok
    (other,) = ready.check_models(str(world.model), None, Policy(models=("b" * 64,)))
    assert other.ok is False
    assert digest in other.said
    (absent,) = ready.check_models(None, tmp_path / "bundle", Policy())
    assert (absent.name, absent.ok) == ("emulator", False)
    assert ready.check_models(None, None, Policy())[0].ok is None


def test_an_emulators_digest_is_that_of_its_bundle(tmp_path: Path) -> None:
    model = tiny_models.tiny_model("llama", layers=4)
    plan = plan_split(model.config.num_hidden_layers, EmulatorConfig(adapter_layers=1), stack=layer_stack(model))
    bundle = write_bundle(model, tiny_models.tiny_tokenizer(), plan, "f" * 64, tmp_path / "bundle")
    (found,) = ready.check_models(None, bundle.folder, Policy(models=(bundle.digest,)))
    assert (found.name, found.ok, found.said) == ("emulator", True, bundle.digest)
    assert ready.check_models(None, bundle.folder, Policy(models=("b" * 64,)))[0].ok is False


def test_room_is_held_against_the_weights(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = ready._parameters(str(world.model))
    rooms = {8 * parameters: True, 4 * parameters: None, 2 * parameters: False}
    for free, ok in rooms.items():
        monkeypatch.setattr(ready, "available_memory_bytes", lambda free=free: free)
        found = {finding.name: finding for finding in ready.check_room(tmp_path, str(world.model), Policy())}
        assert found["memory"].ok is ok
    assert found["disk"].name == "disk"
    unknown = {finding.name: finding for finding in ready.check_room(tmp_path, None, Policy())}
    assert unknown["memory"].ok is None


def test_a_full_disk_is_seen_also_before_the_home_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": GB - 1})
    monkeypatch.setattr(ready.shutil, "disk_usage", lambda folder: usage if folder == tmp_path else None)
    assert ready.check_room(tmp_path / "a" / "home", None, Policy())[0].ok is False


def test_memory_is_told_by_this_machine() -> None:
    assert 2**20 < ready.available_memory_bytes() < 2**50


# --- all of it -------------------------------------------------------------------------------------


def place_of(world: World, home: Path, port: int, ca: str) -> ready.Place:
    key = home / "key.pem"
    key.write_text("secret")
    key.chmod(0o600)
    return ready.Place(HOST, port, ca, home, key, str(world.data), home / "policy.yaml", model=str(world.model))


def test_all_findings_fit_a_terminal(world: World, authority: Authority, tmp_path: Path) -> None:
    with serving(authority.issue(tmp_path)) as port:
        findings = ready.readiness(place_of(world, tmp_path, port, authority.pem))
    names = [finding.name for finding in findings]
    expected = [
        "network",
        "certificate",
        "gate",
        "clock",
        "key",
        "enrolled",
        "policy",
        "data",
        "model",
        "disk",
        "memory",
    ]
    assert names[:11] == expected
    assert ready.is_ready(findings) is all(finding.ok is not False for finding in findings)
    console = Console(width=80, record=True, file=StringIO())
    console.print(ready.readiness_table(findings))
    text = console.export_text()
    assert model_digest(ModelConfig(path=str(world.model))) in text, "a digest is not broken over lines"
    assert all(len(line) <= 80 for line in text.splitlines())


def test_one_problem_does_not_hide_another(world: World, tmp_path: Path, free_port: int) -> None:
    tried: list[bool] = []
    place = replace(place_of(world, tmp_path, free_port, ""), enrolled=lambda: tried.append(True))
    place.policy.write_text("max_rounds: none\n")
    place.key.chmod(0o644)
    findings = {finding.name: finding for finding in ready.readiness(place)}
    assert [findings[name].ok for name in ("network", "key", "policy")] == [False, False, False]
    assert [findings[name].ok for name in ("certificate", "gate", "clock", "enrolled")] == [None] * 4
    assert not tried, "nobody is asked who can not be reached"
    assert "max_rounds: expected" in findings["policy"].said
    assert findings["data"].ok
    assert not ready.is_ready(list(findings.values()))


def test_a_policy_that_some_recipes_can_not_meet(world: World, tmp_path: Path, free_port: int) -> None:
    place = place_of(world, tmp_path, free_port, "")
    place.policy.write_text("require: secure_aggregation\n")
    policy = next(finding for finding in ready.readiness(place) if finding.name == "policy")
    assert (policy.ok, "a recipe without secure aggregation will be refused" in policy.said) == (True, True)
