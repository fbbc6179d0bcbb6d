"""What can be known of a coordinator from an owner's place: network, certificate, gate and clock. Nothing is sent."""

from __future__ import annotations

import http.client
import math
import socket
import ssl
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

CLOCK_APART_S = 300.0
"""How far an owner's clock may be from the coordinator's: so much is made up for when requests are signed."""

GATED = ("/", "/v1/control/list-runs", "/v1/runtime/")
"""Paths that must be refused from outside: whoever reaches Flower's Control API can run code on the coordinator."""

_CERTIFICATE_WARNING_DAYS = 14
_UNTRUSTED, _WRONG_HOST, _NOT_YET, _EXPIRED = (18, 19, 20, 21), (62, 64), 9, 10
"""OpenSSL's reasons (X509_V_ERR_*)."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. ``ok`` is None when it could not be known; ``fix`` says what to do."""

    name: str
    ok: bool | None
    said: str
    fix: str = ""


def check_network(host: str, port: int, timeout_s: float = 5.0) -> Finding:
    """Whether a TCP connection to ``host:port`` opens."""
    place = f"{host}:{port}"
    try:
        started = time.perf_counter()
        with socket.create_connection((host, port), timeout_s):
            took_s = time.perf_counter() - started
        return Finding("network", True, f"{place} answers in {1000 * took_s:.0f} ms")
    except socket.gaierror as error:
        said, fix = f"no address for {host} ({error.strerror})", "Is the name right, and does DNS work here?"
    except ConnectionRefusedError:
        said, fix = f"{place} refused the connection", "Is the coordinator up, and is the port right?"
    except TimeoutError:
        said = f"{place} did not answer within {timeout_s:g} s"
        fix = f"Does a firewall here let connections out to port {port}?"
    except OSError as error:
        said, fix = f"{place} can not be reached ({error.strerror or error})", "Is this machine connected?"
    return Finding("network", False, said, fix)


def check_coordinator(host: str, port: int, ca: str, timeout_s: float = 5.0) -> list[Finding]:
    """Certificate, gate and clock, over TLS connections that trust ``ca`` (PEM text) and nothing else."""
    certificate = _certificate(host, port, ca, timeout_s)
    if not certificate.ok:  # an answer from who knows whom says nothing
        rest = [Finding(name, None, "not known without a sound certificate") for name in ("gate", "clock")]
        return [certificate, *rest]
    answers = {}
    try:
        for path in GATED:
            answers[path] = _answer(host, port, ca, path, timeout_s)
    except (OSError, http.client.HTTPException) as error:
        said, fix = f"no HTTP answer ({type(error).__name__}: {error})", "Is it the coordinator's gate on this port?"
        return [certificate, Finding("gate", False, said, fix), Finding("clock", None, "not known without an answer")]
    return [certificate, _gate({path: answer.status for path, answer in answers.items()}), _clock(answers["/"])]


@dataclass(frozen=True)
class _Answer:
    """``received_s``: our own clock when the headers were here, in seconds since 1970."""

    status: int
    date: str | None
    received_s: float


def _context(ca: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=ca)  # with cadata, the system's authorities are not loaded
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _certificate(host: str, port: int, ca: str, timeout_s: float) -> Finding:
    try:
        context = _context(ca)
    except (ssl.SSLError, ValueError):
        return Finding("certificate", False, "the invitation holds no certificate authority", "Get it again.")
    try:
        with (
            socket.create_connection((host, port), timeout_s) as plain,
            context.wrap_socket(plain, server_hostname=host) as secure,
        ):
            peer, version = secure.getpeercert() or {}, secure.version()
    except ssl.SSLCertVerificationError as error:
        return Finding("certificate", False, *_refused(error, host))
    except OSError as error:  # ssl.SSLError is one
        return Finding("certificate", False, f"no TLS connection ({error})", "Is it the coordinator on this port?")
    days = math.floor((ssl.cert_time_to_seconds(str(peer["notAfter"])) - time.time()) / 86400)
    soon = days < _CERTIFICATE_WARNING_DAYS
    fix = "Ask the coordinator to renew it." if soon else ""
    return Finding("certificate", True, f"of {host}, by the invitation's authority; {days} days left ({version})", fix)


def _refused(error: ssl.SSLCertVerificationError, host: str) -> tuple[str, str]:
    """(what was said, fix) for a certificate that does not hold."""
    code = error.verify_code
    if code in _UNTRUSTED:
        return (
            "not signed by the invitation's authority",
            "Someone stands between, or the coordinator was set up anew: ask for a new invitation.",
        )
    if code in _WRONG_HOST:
        return f"not for {host}", "Use the name that the invitation has, or ask for a certificate of this one."
    if code == _EXPIRED:
        return "expired", "Ask the coordinator to renew it, or set this machine's clock."
    if code == _NOT_YET:
        return "not valid yet", "Is this machine's clock right?"
    return f"not valid ({error.verify_message})", "Ask the coordinator."


def _answer(host: str, port: int, ca: str, path: str, timeout_s: float) -> _Answer:
    connection = http.client.HTTPSConnection(host, port, timeout=timeout_s, context=_context(ca))
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return _Answer(response.status, response.headers["Date"], time.time())
    finally:
        connection.close()


def _gate(statuses: dict[str, int]) -> Finding:
    open_paths = {path: status for path, status in statuses.items() if status != 403}
    if not open_paths:
        return Finding("gate", True, "only what data owners need is reachable")
    shown = ", ".join(f"{path} answers {status}" for path, status in open_paths.items())
    fix = "The coordinator is misconfigured and can be taken over from outside: do not join, and tell them."
    return Finding("gate", False, f"{shown}; expected 403", fix)


def _clock(answer: _Answer) -> Finding:
    try:
        sent_s = parsedate_to_datetime(answer.date or "").timestamp()
    except ValueError:
        return Finding("clock", None, "the coordinator does not say its time")
    ahead_s = answer.received_s - sent_s - 0.5  # its time is cut to whole seconds
    said = _difference(ahead_s)
    if abs(ahead_s) < CLOCK_APART_S:
        return Finding("clock", True, said)
    limit = f"; at most {CLOCK_APART_S:.0f} s are made up for"
    return Finding("clock", False, said + limit, "Set the clock, best by NTP: timedatectl set-ntp true")


def _difference(ahead_s: float) -> str:
    if abs(ahead_s) <= 1:
        return "equal to the coordinator's"
    return f"{abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} the coordinator's"
