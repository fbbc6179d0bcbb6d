"""The files that other programs read: nginx, Flower's command line, systemd, docker, and the coordinator."""

from __future__ import annotations

import ipaddress
import os
import pwd
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flocktune.enrolment import write_private
from flocktune.federation.layout import LOOPBACK, Federation
from flocktune.federation.services import NGINX, SUPEREXEC, SUPERLINK, environment, services

CONNECTION = "federation"
"""How the SuperLink is called in Flower's own configuration."""

_TEMPLATES = Path(__file__).parent / "templates"
_LOWEST_FREE_PORT = 1024


def write_configuration(federation: Federation) -> None:
    """Write every file that follows from the federation's description, over those that are there. Raises OSError."""
    folder = federation.folder
    known: dict[str, Any] = {
        "folder": folder,
        "name": federation.name,
        "host": federation.host,
        "port": federation.port,
        "superlink_port": federation.superlink_port,
        "version": version("flocktune"),
    }
    write_private(folder / "flower" / "config.toml", _flower_config(federation))
    write_private(federation.nginx_config, _nginx_config(federation, known))
    for service in services(federation):
        # Or systemd makes it as root, and the program, which is not, can not open it.
        os.close(os.open(federation.log(service), os.O_CREAT | os.O_WRONLY, 0o600))
        write_private(
            folder / "systemd" / f"{unit_name(federation, service)}.service", _unit(federation, service, known)
        )
    if NGINX in services(federation):
        write_private(folder / "docker" / "compose.yaml", _compose(federation, known))
        write_private(folder / "docker" / "Dockerfile", _render("Dockerfile", known))
    units = " ".join(unit_name(federation, service) for service in services(federation))
    write_private(folder / "CHECKLIST.md", _render("CHECKLIST.md", {**known, "units": units}))


def unit_name(federation: Federation, service: str) -> str:
    """What systemd calls one of the federation's programs."""
    return f"flocktune-{federation.name}-{service}"


def _flower_config(federation: Federation) -> str:
    return (
        f'[superlink]\ndefault = "{CONNECTION}"\n\n'
        f'[superlink.{CONNECTION}]\naddress = "{LOOPBACK}:{federation.superlink_port}"\n'
        f'root-certificates = "{federation.authority}"\n'
    )


def _nginx_config(federation: Federation, known: dict[str, Any]) -> str:
    host = federation.host
    return _render(
        "nginx.conf",
        {**known, "ipv6": Path("/proc/net/if_inet6").exists(), "server_name": f"[{host}]" if _is_ipv6(host) else host},
    )


def _unit(federation: Federation, service: str, known: dict[str, Any]) -> str:
    folder = federation.folder
    writable = {SUPERLINK: "flower state logs", SUPEREXEC: ".", NGINX: "nginx logs"}[service]
    return _render(
        "unit.service",
        {
            **known,
            "service": service,
            "after": "" if service == SUPERLINK else f"{unit_name(federation, SUPERLINK)}.service",
            "user": pwd.getpwuid(os.getuid()).pw_name,
            "command": shlex.join(services(federation)[service].command),
            "environment": [f"{key}={value}" for key, value in environment(federation).items()],
            "writable": " ".join(str(folder / name) for name in writable.split()),
            "capabilities": _capabilities(federation) if service == NGINX else (),
        },
    )


def _compose(federation: Federation, known: dict[str, Any]) -> str:
    # In the image, programs are found by their names.
    commands = {
        name: [Path(service.command[0]).name, *service.command[1:]] for name, service in services(federation).items()
    }
    inner = {key: value for key, value in environment(federation).items() if key != "PATH"}
    inner["FLOCKTUNE_CACHE"] = str(federation.folder / "cache")  # nothing else can be written there
    return _render(
        "compose.yaml",
        {
            **known,
            "commands": commands,
            "environment": inner,
            "uid": os.getuid(),
            "gid": os.getgid(),
            "capabilities": _capabilities(federation),
        },
    )


def _capabilities(federation: Federation) -> tuple[str, ...]:
    """What nginx may do beyond an ordinary program: have a low port; started by root, give its workers another user."""
    low = ("NET_BIND_SERVICE",) if federation.port < _LOWEST_FREE_PORT else ()
    return (*low, "CHOWN", "DAC_OVERRIDE", "SETGID", "SETUID") if os.getuid() == 0 else low


def _render(template: str, known: dict[str, Any]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loaded = Environment(loader=FileSystemLoader(_TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True)
    return loaded.get_template(template).render(known)


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False
