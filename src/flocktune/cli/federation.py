"""Verbs of a coordinator: a federation of data owners on several machines."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flocktune.cli.common import app, console, needs_extra

if TYPE_CHECKING:
    from flocktune.federation.layout import Federation

federation = typer.Typer(help="A real federation: the coordinator's verbs.", no_args_is_help=True)
app.add_typer(federation, name="federation")


@federation.callback()
def _flower_is_there() -> None:
    if "--help" not in sys.argv:
        needs_extra("flwr", "flower")


Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The federation's folder.")]
DEFAULT_PORT = 8443


@federation.command("init")
def init_command(
    folder: Folder,
    host: Annotated[str | None, typer.Option(help="The name by which owners reach this machine.")] = None,
    port: Annotated[int, typer.Option(help="The one port that owners connect to.")] = DEFAULT_PORT,
    name: Annotated[str | None, typer.Option(help="What the federation is called; default: the folder's name.")] = None,
    superlink_port: Annotated[int | None, typer.Option(help="A port inside this machine; default: a free one.")] = None,
    door: Annotated[
        str, typer.Option(help="nginx, or own: a TLS proxy of yours lets only POST /v1/fleet/ through.")
    ] = "nginx",
    renew: Annotated[
        bool, typer.Option("--renew", help="New certificates and configuration files; all else stays.")
    ] = False,
) -> None:
    """Make a federation's folder: keys, certificates, nginx, systemd and docker files, a checklist."""
    from flocktune.errors import Problem, UserError
    from flocktune.federation.configuration import write_configuration
    from flocktune.federation.layout import create_federation, open_federation, renew_certificates

    if renew:
        if host or name or superlink_port or port != DEFAULT_PORT or door != "nginx":
            raise UserError(Problem("--renew", "no other option: all else stays as it is", "another option with it"))
        made = open_federation(folder)
        renew_certificates(made)
        write_configuration(made)
        _say(f"Renewed {made.folder}. To use it: flocktune federation down {folder}; flocktune federation up {folder}")
        return
    if host is None:
        raise UserError(Problem("--host", "the name by which owners reach this machine", "nothing"))
    made = create_federation(folder, host, port, name, superlink_port, door)
    write_configuration(made)
    _say(f"Made the federation {made.name} in {made.folder}, for owners at {made.host}:{made.port}.")
    _say(f"Read {folder}/CHECKLIST.md. Next: flocktune federation up {folder}")


@federation.command()
def enrol(
    folder: Folder,
    name: Annotated[str | None, typer.Option(help="Invite this client: writes NAME.bundle.")] = None,
    out: Annotated[Path | None, typer.Option(help="Another file for the invitation.")] = None,
    with_key: Annotated[bool, typer.Option("--with-key", help="Make the client's key here (for trials).")] = False,
    accept: Annotated[Path | None, typer.Option(help="The request that an owner sent back.")] = None,
    remove: Annotated[str | None, typer.Option(help="Shut this client out, and forget it.")] = None,
) -> None:
    """Invite a data owner, accept its key, or shut it out."""
    from flocktune.errors import Problem, UserError
    from flocktune.federation.layout import open_federation

    if sum(choice is not None for choice in (name, accept, remove)) != 1:
        raise UserError(Problem("enrol", "one of --name, --accept and --remove", "none or several"))
    opened = open_federation(folder)
    if name is not None:
        _invite(opened, name, out or Path(f"{name}.bundle"), with_key=with_key)
    elif accept is not None:
        _accept(opened, accept)
    elif remove is not None:
        _remove(opened, remove)


@federation.command()
def up(folder: Folder) -> None:
    """Start what is not running, and register who was enrolled meanwhile. May be repeated."""
    from flocktune.federation.enrolled import clients
    from flocktune.federation.layout import open_federation
    from flocktune.federation.lifecycle import up as bring_up

    opened = open_federation(folder)
    for who, what in bring_up(opened):
        _say(f"{who:<12} {what}")
    _say(f"Owners reach it at {opened.host}:{opened.port}.", style="green")
    if clients(opened):
        _say(f"Next: flocktune federation run {folder} RECIPE, or status {folder}")
    else:
        _say(f"Next: flocktune federation enrol {folder} --name NAME")


@federation.command()
def down(folder: Folder) -> None:
    """Stop every program of the federation. Nothing is forgotten."""
    from flocktune.federation.layout import open_federation
    from flocktune.federation.processes import stop

    stopped = stop(open_federation(folder))
    _say(f"Stopped {', '.join(stopped)}." if stopped else "Nothing was running.")


@federation.command()
def status(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for scripts.")] = False,
) -> None:
    """Programs, clients, runs, and how long the certificates last."""
    import json

    from flocktune.federation import status as module
    from flocktune.federation.layout import open_federation

    found = module.status_of(open_federation(folder))
    if as_json:
        typer.echo(json.dumps(module.as_json(found), indent=2))
    else:
        console.print(module.as_tables(found))


@federation.command()
def logs(
    folder: Folder,
    program: Annotated[str | None, typer.Argument(help="superlink, superexec, nginx or run; default: all.")] = None,
    lines: Annotated[int, typer.Option(min=0, help="How many of the last lines.")] = 20,
    follow: Annotated[bool, typer.Option("--follow", help="Go on as lines come, until Ctrl-C.")] = False,
) -> None:
    """What the programs say."""
    import contextlib
    import subprocess

    from flocktune.errors import Problem, UserError
    from flocktune.federation.layout import open_federation
    from flocktune.federation.processes import last_lines
    from flocktune.federation.services import NAMES, RUN

    known = (*NAMES, RUN)
    if program is not None and program not in known:
        raise UserError(Problem("program", f"one of {', '.join(known)}", repr(program)))
    opened = open_federation(folder)
    paths = [opened.log(name) for name in (known if program is None else (program,))]
    if follow:
        with contextlib.suppress(KeyboardInterrupt):
            subprocess.run(("tail", "-n", str(lines), "-F", *map(str, paths)), stderr=subprocess.DEVNULL)
        return
    for path in paths:
        if len(paths) > 1:
            _say(f"{path.name}", style="bold")
        for line in last_lines(path, lines):
            typer.echo(line)


def _invite(opened: Federation, name: str, path: Path, *, with_key: bool) -> None:
    from flocktune.enrolment import checked_name, write_invitation
    from flocktune.errors import Problem, UserError
    from flocktune.federation.enrolled import client_named, invite

    checked_name(name)
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(Problem(str(path), "a file in a folder that is there", "something else"))
    write_invitation(path, invite(opened, name, with_key=with_key))
    _say(f"Wrote {path} for {name}: send it so that nobody else reads it.")
    if with_key:
        _say(f"The client's private key is in it. Whoever has the file is {name}.", style="yellow")
        _say(f"Key: {client_named(opened, name).fingerprint}")
        _register(opened)
        _say(f"The owner: flocktune join {path.name} --data FILE")
    else:
        _say(f"The owner: flocktune join {path.name} --data FILE, and sends back {name}.request. Then:")
        _say(f"  flocktune federation enrol {opened.folder} --accept {name}.request")


def _accept(opened: Federation, path: Path) -> None:
    from flocktune.enrolment import read_request
    from flocktune.federation.enrolled import accept

    client = accept(opened, read_request(path))
    _say(f"Accepted {client.name}. Its key: {client.fingerprint}")
    _say("Compare that with what the owner sees, by telephone.")
    _register(opened)


def _remove(opened: Federation, name: str) -> None:
    from flocktune.federation.enrolled import clients, remove, shut_out_removed
    from flocktune.federation.processes import answers
    from flocktune.federation.services import SUPERLINK

    remove(opened, name)
    if answers(opened, SUPERLINK):
        shut_out_removed(opened)
    if any(client.name == name for client in clients(opened)):
        _say(f"{name} will be shut out by the next: flocktune federation up {opened.folder}")
    else:
        _say(f"{name} is shut out and forgotten.")


def _register(opened: Federation) -> None:
    """At once when the SuperLink answers; else ``up`` does it."""
    from flocktune.federation.enrolled import let_in_accepted
    from flocktune.federation.processes import answers
    from flocktune.federation.services import SUPERLINK

    if not answers(opened, SUPERLINK):
        _say(f"The federation is down. Registered by: flocktune federation up {opened.folder}")
        return
    for client, node_id in let_in_accepted(opened).items():
        _say(f"Registered {client} as node {node_id}.", style="green")


def _say(text: str, style: str | None = None) -> None:
    console.print(text, style=style, soft_wrap=True, highlight=False, markup=False)
