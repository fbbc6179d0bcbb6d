"""A run of a federation as the coordinator starts, watches and resumes it. It goes on whoever watches."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from flocktune.config.engines import FlowerEngine
from flocktune.config.schema import RunConfig
from flocktune.errors import FlocktuneError, Problem, UserError
from flocktune.federated import server_side
from flocktune.federation.control import ControlFailed, run_state, submit
from flocktune.federation.enrolled import clients
from flocktune.federation.layout import Federation
from flocktune.federation.processes import answers
from flocktune.federation.roster import ROSTER, STOP, write_roster
from flocktune.federation.services import RUN, SUPEREXEC, SUPERLINK, services
from flocktune.files import is_held, read_json, write_atomic
from flocktune.report.events import LOG_NAME, read_events
from flocktune.run_folder import create_run
from flocktune.runs import Listener, Stopped
from flocktune.standing import ENDED, is_finished

LOOK_S, ASK_S = 0.5, 10.0
"""Between two looks at a run's folder, and between two questions to Flower while the run has not begun."""

_FULL_BYTES = 1_000_000

APP = {
    "pyproject.toml": """\
[project]
name = "flocktune-run"
version = "1.0.0"
description = "Starts a run of flocktune on the coordinator's machine. Owners do not get it."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "flocktune"

[tool.flwr.app.components]
serverapp = "flocktune_run:server"
clientapp = "flocktune_run:client"

[tool.flwr.app.config]
run = ""
""",
    "flocktune_run.py": '''\
"""Names the objects that Flower wants; they are in flocktune."""

from flocktune.federation.serving import client, server

__all__ = ["client", "server"]
''',
}
"""A Flower app, as files."""


def begin(federation: Federation, config: RunConfig) -> Path:
    """Make the folder of a new run, once recipe and models are there and fit. Raises UserError."""
    enrolled = [client.name for client in clients(federation) if client.status == "registered"]
    engine = config.engine if isinstance(config.engine, FlowerEngine) else FlowerEngine()
    config = replace(config, engine=engine)
    server_side(config, enrolled)
    folder = federation.runs / config.name
    if (folder / ROSTER).exists():
        fix = f"Go on with it: flocktune federation run {federation.folder} --resume {config.name}; or name=another"
        raise UserError(Problem(str(folder), "a new run", "one that was begun", fix))
    (folder / "recipe.yaml").unlink(missing_ok=True)  # of a start that was killed before there was a roster
    create_run(config, folder)
    write_roster(folder, enrolled)
    return folder


def resumable(federation: Federation, name: str | None) -> Path:
    """The folder of the run to go on with: the one of this name, or the newest. Raises UserError."""
    begun = [path.parent for path in federation.runs.glob(f"*/{ROSTER}")]
    if name is not None:
        begun = [folder for folder in begun if folder.name == name]
    if not begun:
        known = ", ".join(sorted(path.parent.name for path in federation.runs.glob(f"*/{ROSTER}"))) or "none"
        fix = f"Start one: flocktune federation run {federation.folder} RECIPE"
        raise UserError(Problem("--resume", f"a run of this federation ({known})", name or "none", fix))
    return max(begun, key=lambda folder: (folder / ROSTER).stat().st_mtime)


def start(federation: Federation, folder: Path) -> str:
    """Have the run in ``folder`` started, unless it is running; gives Flower's id for it, or "". Raises UserError."""
    if is_held(folder) or is_finished(folder):
        return ""
    silent = [name for name in services(federation) if not answers(federation, name)]
    if silent:
        fix = f"Start it: flocktune federation up {federation.folder}"
        raise UserError(Problem(str(federation.folder), "a federation that is up", f"no {', '.join(silent)}", fix))
    app = federation.folder / "app"
    app.mkdir(mode=0o700, exist_ok=True)
    for name, text in APP.items():
        write_atomic(app / name, text)
    for old in (ENDED, STOP):
        (folder / old).unlink(missing_ok=True)
    return submit(federation, app, folder)


def ask_to_stop(folder: Path) -> None:
    """The run ends after the round at hand. Raises OSError."""
    (folder / STOP).touch()


def follow(
    federation: Federation, folder: Path, flower_id: str, listeners: Sequence[Listener], stopped: Callable[[], bool]
) -> dict[str, Any]:
    """Tell ``listeners`` what happens in ``folder`` until the run is over; gives its summary.

    ``stopped`` is asked now and then, and asks the run to end. Raises UserError or FlocktuneError with what went wrong
    in it, and Stopped.
    """
    shown: list[dict[str, Any]] = []
    log, read_at = folder / LOG_NAME, 0
    asked_s, asked_to_stop = time.monotonic(), False
    begun, looks_without = not flower_id, 0
    while True:
        running, finished = is_held(folder), is_finished(folder)
        begun, looks_without = begun or running, 0 if running else looks_without + 1
        if log.exists() and (changed_at := log.stat().st_mtime_ns) != read_at:
            events, read_at = read_events(log), changed_at
            for event in _after(shown, events):
                for listener in listeners:
                    listener.on_event(event)
            shown = events
        if finished and not running:
            return dict(read_json(folder / "summary.json"))
        if (folder / ENDED).exists() and not running:
            raise _how_it_ended(folder)
        if stopped() and not asked_to_stop:
            ask_to_stop(folder)
            asked_to_stop = True
        # Its lock goes with its process; the reason is written a moment later.
        if begun and looks_without > 2:
            raise _ended(federation, folder, "the run's process has ended")
        if not begun and time.monotonic() - asked_s > ASK_S:
            asked_s = time.monotonic()
            if why := _will_not_begin(federation, flower_id):
                raise _ended(federation, folder, why)
        time.sleep(LOOK_S)


def _after(shown: Sequence[Mapping[str, Any]], events: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """What is new since ``shown``: a resumed run's log is cut back first."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(shown, events, strict=False)))
    return events[same:]


def _will_not_begin(federation: Federation, flower_id: str) -> str:
    """Why a run that was submitted has no process and will get none, or nothing."""
    silent = [name for name in (SUPERLINK, SUPEREXEC) if not answers(federation, name)]
    if silent:
        return f"the run has not begun, and {' and '.join(silent)} can not be reached"
    try:
        state = run_state(federation, flower_id)
    except ControlFailed as error:
        return f"the run has not begun ({error})"
    return f"the run has not begun ({state})" if state.startswith("finished") else ""


def _ended(federation: Federation, folder: Path, why: str) -> FlocktuneError:
    place = federation.folder
    if shutil.disk_usage(folder).free < _FULL_BYTES:
        why = f"{why}: the disk of {folder} is full"
    return FlocktuneError(
        f"{why}. Nothing that was saved is lost.\n"
        f"  What it said:  flocktune federation logs {place} {RUN}\n"
        f"  Go on with it: flocktune federation up {place}; flocktune federation run {place} --resume {folder.name}"
    )


def _how_it_ended(folder: Path) -> Exception:
    told = read_json(folder / ENDED)
    if told["how"] == "stopped":
        return Stopped(str(folder))
    return UserError(*told["problems"]) if told["users_mistake"] else FlocktuneError("\n".join(told["problems"]))
