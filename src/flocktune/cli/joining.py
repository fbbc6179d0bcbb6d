"""The verb of a data owner: to take part in a federation."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flocktune.cli.common import app, console, escaped, needs_extra

if TYPE_CHECKING:
    from flocktune.enrolment import Invitation
    from flocktune.owner.home import Home
    from flocktune.owner.worker import Settings


@app.command()
def join(
    bundle: Annotated[Path, typer.Argument(help="The coordinator's invitation: NAME.bundle.")],
    data: Annotated[Path, typer.Option(help="Your instructions: a file or a folder. They stay where they are.")],
    model: Annotated[
        str | None,
        typer.Option(help="Your copy of the base model: a folder, or: embedded (the default). FedBiOT needs none."),
    ] = None,
    emulator: Annotated[Path | None, typer.Option(help="The emulator, if you got it as a folder.")] = None,
    home: Annotated[
        Path | None, typer.Option(help="Where key, policy and audit log are; default below ~/.flocktune.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads at most; 0: as many as the recipe says.")] = 0,
    max_gpu_memory: Annotated[float | None, typer.Option(help="Gigabytes of GPU memory to use at most.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Try everything that can be known beforehand, and stop.")
    ] = False,
) -> None:
    """Take part in a federation with your own data. Ctrl-C ends it; what is being trained is given up."""
    needs_extra("flwr", "flower")
    from flocktune.config.schema import EMBEDDED
    from flocktune.enrolment import read_invitation
    from flocktune.interrupts import stop_on_signals
    from flocktune.owner.home import default_home, make_home, public_identity, write_enrolment
    from flocktune.owner.join import join as stay
    from flocktune.owner.worker import Settings

    invitation = read_invitation(bundle)
    _refuse_wrong({"--data": data, "--emulator": emulator}, model, device, max_gpu_memory)
    own = make_home(home.expanduser() if home else default_home(invitation), invitation, look=check)
    settings = Settings(
        client=invitation.client,
        home=str(own.folder.resolve()),
        data=str(data.expanduser().resolve()),
        model=str(Path(model).expanduser().resolve()) if model not in (None, EMBEDDED) else model,
        emulator=str(emulator.expanduser().resolve()) if emulator else None,
        device=device,
        threads=threads,
        max_gpu_memory_gb=max_gpu_memory,
    )
    if check:
        raise typer.Exit(_check(invitation, own, settings))
    if invitation.private_key is None and not own.node.exists():
        request = Path(f"{invitation.client}.request")
        print_ = write_enrolment(own, invitation, request)
        console.print(
            f"Wrote {request}. Send it to the coordinator, who lets you in by:\n"
            f"  flocktune federation enrol DIR --accept {request}\n"
            f"Your key's fingerprint, to compare by phone: {print_}",
            soft_wrap=True,
        )

    def say(text: str) -> None:
        console.print(f"{time.strftime('%H:%M:%S')}  {escaped(text)}", soft_wrap=True, highlight=False)

    say(f"{invitation.client} in {invitation.federation} at {invitation.host}:{invitation.port}; Ctrl-C ends it")
    say(f"policy and audit log: {own.folder}")
    say(f"to other owners, with secure aggregation: {public_identity(own.folder)}")
    with stop_on_signals(lambda text: say("stopping")) as stop:
        stay(invitation, own, settings, say, stop)


def _refuse_wrong(
    paths: Mapping[str, Path | None], model: str | None, device: str, max_gpu_memory: float | None
) -> None:
    """Now, and not when the first task has come. Whether a device is here, torch would have to say."""
    from flocktune.config.schema import EMBEDDED
    from flocktune.errors import Problem, UserError

    problems = [
        Problem(option, "a file or folder", f"nothing at {path}")
        for option, path in paths.items()
        if path is not None and not path.expanduser().exists()
    ]
    if model not in (None, EMBEDDED) and not Path(model).expanduser().is_dir():
        problems.append(Problem("--model", f"a folder, or {EMBEDDED}", repr(model), "Download the model first."))
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", device):
        problems.append(Problem("--device", "auto, cpu, cuda, cuda:0, ...", repr(device)))
    if max_gpu_memory is not None and not max_gpu_memory > 0:
        problems.append(Problem("--max-gpu-memory", "more than 0 gigabytes", f"{max_gpu_memory:g}"))
    UserError.raise_all(problems)


def _check(invitation: Invitation, own: Home, settings: Settings) -> int:
    """Show what can be known beforehand; 1 when something is wrong."""
    from flocktune.files import is_held
    from flocktune.owner.join import try_to_connect
    from flocktune.owner.readiness import Place, is_ready, readiness, readiness_table

    place = Place(
        host=invitation.host,
        port=invitation.port,
        ca=invitation.ca,
        home=own.folder,
        key=own.key,
        data=settings.data,
        policy=own.policy,
        model=settings.model,
        emulator=Path(settings.emulator) if settings.emulator else None,
        # Who takes part just now is not disturbed.
        enrolled=None if is_held(own.folder) else lambda: try_to_connect(invitation, own),
    )
    findings = readiness(place)
    console.print(readiness_table(findings))
    return 0 if is_ready(findings) else 1
