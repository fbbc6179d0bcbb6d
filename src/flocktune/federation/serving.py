"""One run on the coordinator's machine, in the process that Flower's SuperExec starts for it."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flocktune.assemble import Assembly
from flocktune.audit import AuditLog
from flocktune.config.engines import FlowerEngine
from flocktune.config.load import to_tree
from flocktune.engine.flower.app import client_app, server_app
from flocktune.engine.remote import Federated, Link, Remote
from flocktune.errors import FlocktuneError, UserError
from flocktune.federated import bundle_tensors
from flocktune.federation.enrolled import clients
from flocktune.federation.layout import open_federation
from flocktune.federation.roster import STOP, Roster, read_roster
from flocktune.federation.services import RUN
from flocktune.files import Held, is_held
from flocktune.interfaces import Engine
from flocktune.runs import Elsewhere, Stopped, execute
from flocktune.standing import ENDED, write_ended

_LOG = logging.getLogger(__name__)


def serve(connect: Callable[[Mapping[str, int]], Link], settings: Mapping[str, Any]) -> None:
    """Run ``settings["run"]`` to its end, or from its last round on. RUN/ended.json says how it ended, if not well."""
    folder = Path(str(settings["run"]))
    federation = open_federation(folder.parent.parent)
    _log_to(federation.log(RUN))
    if is_held(folder):  # Flower starts what it was given before an outage, and the coordinator has gone on meanwhile
        _LOG.warning("%s is running already", folder)
        return
    (folder / ENDED).unlink(missing_ok=True)
    try:
        roster = read_roster(folder)
        os.chdir(roster.folder)
        nodes = {client.name: int(client.node_id) for client in clients(federation) if client.node_id}
        link = connect({name: node for name, node in nodes.items() if name in roster.clients})
        audit = AuditLog(federation.folder / "audit.jsonl")
        with _stop_file(folder / STOP) as stop:
            execute(folder, stop=stop, elsewhere=Elsewhere(roster.clients, _engine(link, roster, audit, folder)))
    except Stopped:
        write_ended(folder, "stopped")
    except Held:  # another process was faster; how that one ends is its own to say
        _LOG.warning("%s is running already", folder)
    except Exception as error:
        mistake = isinstance(error, UserError)
        problems = [str(problem) for problem in error.problems] if isinstance(error, UserError) else [str(error)]
        _LOG.error("%s: %s", folder.name, error, exc_info=not isinstance(error, FlocktuneError))
        write_ended(folder, "failed", problems, users_mistake=mistake)
        raise


def _log_to(path: Path) -> None:
    """What this process says: its output goes nowhere, for the SuperExec wants none."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.setLevel(logging.WARNING)
    logging.getLogger("flocktune").addHandler(handler)


def _engine(link: Link, roster: Roster, audit: AuditLog, folder: Path | None = None) -> Callable[[Assembly], Engine]:
    def make(fed: Assembly) -> Engine:
        bundle = fed.emulated.bundle if fed.emulated else None
        common = Federated(
            run=roster.run,
            recipe=to_tree(fed.config),
            returned=fed.travels,
            emulator=(lambda: bundle_tensors(bundle)) if bundle else None,
            emulator_bytes=bundle.bytes if bundle else 0,
        )
        settings = fed.config.engine if isinstance(fed.config.engine, FlowerEngine) else FlowerEngine()
        return Remote(link, settings, common, audit.append, folder)

    return make


@contextmanager
def _stop_file(path: Path) -> Iterator[threading.Event]:
    """An event that is set when ``path`` appears, or is there: a run may be asked to stop before it has begun."""
    stop, ended = threading.Event(), threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            if path.exists():
                stop.set()

    watcher = threading.Thread(target=watch, name="stop", daemon=True)
    watcher.start()
    try:
        yield stop
    finally:
        ended.set()
        watcher.join()
        path.unlink(missing_ok=True)


server, client = server_app(serve), client_app()
"""What the Flower app names."""
