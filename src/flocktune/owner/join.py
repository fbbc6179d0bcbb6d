"""An owner's stay in a federation: connected, asked, answered; through outages of either side, until it is stopped.

The process that talks to the network holds no model and no rows; its worker does (:mod:`worker`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flocktune.engine.flower.fleet import Fleet, NotAdmitted, Received
from flocktune.engine.parcels import FAILURE, LinkDown, Parcel, shown
from flocktune.enrolment import Invitation
from flocktune.errors import FlocktuneError, UserError
from flocktune.files import sha256_path
from flocktune.owner.home import Home, alone
from flocktune.owner.policy import MB, Policy, load_policy
from flocktune.owner.worker import Settings, Worker

_LOG = logging.getLogger(__name__)

BUSY_S, QUIET_S = 0.3, 3.0
"""Between two looks for a task: soon after one, and when there has been none for a while."""

AGAIN_S, LONGEST_AGAIN_S = 1.0, 15.0
"""Between two tries to connect: at first, and at most."""


def join(
    invitation: Invitation,
    home: Home,
    settings: Settings,
    say: Callable[[str], None],
    stop: threading.Event,
) -> None:
    """Take part until ``stop`` is set. Raises UserError when another process has this home, or it can not begin.

    ``say`` gets printable characters only, whatever a coordinator wrote.
    """
    worker = Worker(settings)
    with alone(home.folder):
        fleet = _fleet(invitation, home, stop)
        digest = sha256_path(Path(settings.data))
        home.audit.joined(federation=invitation.federation, name=invitation.client, data_digest=digest)
        try:
            _Stay(home, worker, fleet, lambda text: say(shown(text)), stop).until_stopped()
        finally:
            worker.stop()
            home.audit.left(federation=invitation.federation, name=invitation.client, reason="stopped here")


def try_to_connect(invitation: Invitation, home: Home) -> None:
    """Be connected for a moment. Raises FlocktuneError saying why not, UserError when this home takes part just now."""
    with alone(home.folder), _fleet(invitation, home, threading.Event()).connected():
        pass


def _fleet(invitation: Invitation, home: Home, stop: threading.Event) -> Fleet:
    return Fleet(invitation.host, invitation.port, home.authority, home.key, home.node, stop)


@dataclass
class _Stay:
    home: Home
    worker: Worker
    fleet: Fleet
    say: Callable[[str], None]
    stop: threading.Event
    _said: str = ""

    def until_stopped(self) -> None:
        wait_s = AGAIN_S
        while not self.stop.is_set():
            try:
                with self.fleet.connected():
                    self._say_once("connected; waiting for tasks")
                    wait_s = AGAIN_S
                    self._serve()
            except NotAdmitted as refusal:
                self._say_once(f"not let in yet: {refusal}")
            except LinkDown as down:
                self._say_once(f"no connection ({down}); trying again")
            except FlocktuneError as error:
                self._say_once(f"not connected: {error}; trying again")
            except Exception as error:  # whatever a coordinator, or what stands between, sends: this one stays
                _LOG.debug("not expected", exc_info=True)
                self._say_once(f"not connected: {type(error).__name__}: {error}; trying again")
            self.stop.wait(wait_s)
            wait_s = min(2 * wait_s, LONGEST_AGAIN_S)

    def _serve(self) -> None:
        quiet_s = 0.0
        while not self.stop.is_set():
            received = self.fleet.receive(self._policy().max_task_mb * MB)
            if received is None:
                pause_s = min(QUIET_S, BUSY_S + quiet_s / 10)
                self.stop.wait(pause_s)
                quiet_s += pause_s
                continue
            quiet_s = 0.0
            reply = self._answer(received)
            self._send(received, reply)

    def _answer(self, received: Received) -> Parcel:
        if received.parcel is None:
            self.say(f"a message that is no task: {received.refusal}")
            self._write_down({}, received.refusal)
            return Parcel(FAILURE, {"reason": received.refusal})
        fields = received.parcel.fields
        named = {
            key: fields[key] for key in ("run", "nonce", "round", "client") if isinstance(fields.get(key), str | int)
        }
        try:
            reply = self.worker.ask(received.parcel, self._policy().max_minutes * 60, self.stop)
        except FlocktuneError as error:
            self.say(f"{error}")
            self._write_down(named, str(error))
            reason = "the owner's worker does not start" if isinstance(error, UserError) else str(error)
            return Parcel(FAILURE, {**named, "reason": reason})
        self.say(f"{_what(fields.get('round'))}: {_outcome(reply)}")
        return reply

    def _write_down(self, named: Mapping[str, object], reason: str) -> None:
        """What the worker can not, which never had the task, or is gone. Of a stranger's names only what is one."""
        run, nonce, round = named.get("run"), named.get("nonce"), named.get("round")
        try:
            self.home.audit.task_refused(
                run=run[:200] if isinstance(run, str) else "",
                round=round if type(round) is int and abs(round) < 2**64 else -1,
                nonce=nonce[:200] if isinstance(nonce, str) else "",
                reasons=[reason],
            )
        except OSError as error:  # a full disk: nothing leaves but that it was not done
            self._say_once(f"not in the audit log: {error}")

    def _policy(self) -> Policy:
        """What bounds a message and a task's time. Without a sound one the worker refuses every task."""
        try:
            return load_policy(self.home.policy)
        except UserError as error:
            self._say_once(f"every task is refused: {error}")
            return Policy()

    def _send(self, received: Received, reply: Parcel) -> None:
        """Send a reply, through an outage if need be; one that is no longer wanted is dropped."""
        while not self.stop.is_set():
            try:
                self.fleet.reply(received, reply)
                return
            except LinkDown as down:
                self._say_once(f"no connection ({down}); the reply waits")
                self.stop.wait(AGAIN_S)
            except NotAdmitted:
                raise
            except FlocktuneError as error:
                self.say(f"the reply is not wanted any more: {error}")
                return

    def _say_once(self, text: str) -> None:
        if text != self._said:
            self.say(text)
        self._said = text


def _what(round: object) -> str:
    """As people count; what is no round is not repeated."""
    return f"round {round + 1}" if type(round) is int and 0 <= round < 10**9 else "a task"


def _outcome(reply: Parcel) -> str:
    match reply.kind:
        case "update":
            return f"trained; {len(reply.blob):,} bytes leave"
        case "failure":
            return f"not done: {reply.fields.get('reason')}"
        case other:
            return f"{other}: the emulator"
