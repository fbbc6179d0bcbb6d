"""What the coordinator asks of its SuperLink, by Flower's own command ``flwr``: who is registered, who is connected."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flocktune.errors import FlocktuneError
from flocktune.federation.configuration import CONNECTION
from flocktune.federation.layout import Federation
from flocktune.federation.services import inherited_environment, program

_PATIENCE_S = 120.0


class ControlFailed(FlocktuneError):
    """The SuperLink, or the command that asks it, said no. ``answer`` is what it said."""

    def __init__(self, asked: str, answer: str) -> None:
        self.answer = answer
        super().__init__(f"flwr {asked}: {answer or 'no answer'}")


@dataclass(frozen=True)
class Node:
    """A SuperNode as the SuperLink knows it. ``status``: registered (never seen yet), online, offline or unregistered.

    ``since``: the time (UTC) of the last change between online and offline, as text; empty when there was none.
    """

    id: str
    status: str
    since: str = ""


def register(federation: Federation, public_key: Path, client: str) -> str:
    """Let a key in; gives its node id. Raises ControlFailed, also when the key was ever registered before."""
    return str(_flwr(federation, "supernode", "register", str(public_key), CONNECTION, "--name", client)["node-id"])


def unregister(federation: Federation, node_id: str) -> None:
    """Shut a node out, at once and for good. Raises ControlFailed, also when it is out already."""
    _flwr(federation, "supernode", "unregister", node_id, CONNECTION)


def list_nodes(federation: Federation) -> tuple[Node, ...]:
    """Every node that was ever registered, oldest first. Raises ControlFailed."""
    answer = _flwr(federation, "supernode", "list", CONNECTION)
    return tuple(
        Node(
            str(node["node-id"]),
            node["status"],
            _time(node["online-at" if node["status"] == "online" else "offline-at"]),
        )
        for node in answer["nodes"]
    )


def submit(federation: Federation, app: Path, run: Path) -> str:
    """Have the SuperExec start the run in folder ``run``; gives Flower's id of it. Raises ControlFailed."""
    settings = f"run={json.dumps(str(run))}"
    return str(_flwr(federation, "run", str(app), CONNECTION, "--run-config", settings)["run-id"])


def run_state(federation: Federation, flower_id: str) -> str:
    """What Flower says of a run: pending, starting, running, or finished with how. Raises ControlFailed."""
    return str(_flwr(federation, "ls", CONNECTION, "--run-id", flower_id)["runs"][0]["status"])


def _flwr(federation: Federation, *arguments: str) -> dict[str, Any]:
    command: Sequence[str] = (program("flwr"), *arguments, "--format", "json")
    try:
        said = subprocess.run(
            command,
            env=inherited_environment(federation),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PATIENCE_S,
        )
    except subprocess.TimeoutExpired:
        raise ControlFailed(" ".join(arguments), f"nothing within {_PATIENCE_S:.0f} seconds") from None
    answer = _last_object(said.stdout)
    if said.returncode or not answer.get("success"):
        told = str(answer.get("error-message", "")) or said.stderr or said.stdout
        raise ControlFailed(" ".join(arguments), " ".join(told.split()))
    return answer


def _last_object(text: str) -> dict[str, Any]:
    """The JSON object at the end of ``text``; an empty one when there is none."""
    start = text.find("{")
    try:
        found = json.loads(text[start:]) if start >= 0 else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _time(text: object) -> str:
    return "" if text in (None, "", "N/A") else str(text)
