"""The engine whose clients are elsewhere: given out through a link, taken in order, left out with a reason.

A task is sent when its client is connected. Its reply counts when it comes before the deadline under the task's own
nonce; then it is handed on in task order, so that the sums are those of one process, bit for bit. Replies that are
early wait on disk: memory holds one update, however many clients there are.
"""

from __future__ import annotations

import logging
import secrets
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from flocktune.config.engines import FlowerEngine
from flocktune.engine.client import check_update
from flocktune.engine.parcels import EMULATOR, FAILURE, LACKING, READY, TASK, UPDATE, LinkDown, Lost, Parcel, shown
from flocktune.errors import UpdateRefused
from flocktune.files import map_file, sha256_bytes
from flocktune.interfaces import Issued, Memory
from flocktune.types import ClientTask, Expected, Failure, Tensors, Update
from flocktune.wire import build_update, decode_tensors, encode_tensors, encoded_size, task_fields

_LOG = logging.getLogger(__name__)

POLL_S = 0.2
"""Seconds between two looks at what has come."""

MOST_SENT = 4
"""How often a task is sent to a client in one round: it may be cut off, and come back."""

MOST_RECENT = 8
"""How many different messages of a round are kept encoded: clients of one rank receive the same."""

FIELDS_ROOM = 1 << 20
"""Bytes that a reply may have beside its tensors."""


class Link(Protocol):
    """What a transport must do. Each method may raise LinkDown."""

    def connected(self) -> set[str]:
        """The clients that are there now."""
        ...

    def send(self, parcels: Mapping[str, Parcel], lifetime_s: float) -> Mapping[str, str]:
        """Send each client its parcel. Client -> what its reply will be asked for by, for those that were reached."""
        ...

    def receive(self, asked: Mapping[str, str], limit_bytes: int) -> Iterator[tuple[str, Parcel | Lost]]:
        """Replies that have come, each once, with their clients; never waits for one.

        No more than ``limit_bytes`` are taken into memory for a reply.
        """
        ...


@dataclass(frozen=True)
class Federated:
    """What the tasks of one run have in common.

    ``run`` names it for all time. ``recipe``: the resolved recipe, as plain values. ``returned``: task -> tensors of
    the names and shapes that travel as its update. ``emulator``: reads FedBiOT's bundle as tensors of bytes by file.
    """

    run: str
    recipe: Mapping[str, Any]
    returned: Callable[[ClientTask], Expected]
    emulator: Callable[[], Tensors] | None = None
    emulator_bytes: int = 0


@dataclass
class Remote:
    """Clients behind ``link``. ``note(event, **facts)`` is told what left and what came, for the audit log.

    ``folder``: where replies wait for their turn; None is the system's folder for such files, which may be memory.
    """

    link: Link
    settings: FlowerEngine
    common: Federated
    note: Callable[..., object] = lambda event, **facts: None
    folder: Path | None = None
    memories: dict[str, Memory] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic
    pause: Callable[[float], None] = time.sleep

    def run(self, tasks: Iterable[ClientTask], wanted: int) -> Iterator[Update | Failure]:
        """One reply for each task, in task order."""
        with self._inbox() as inbox:
            exchange = _Exchange(self, Path(inbox))
            order = [exchange.give(task) for task in tasks]
            for client in order:
                while client not in exchange.settled:
                    exchange.advance(next_in_order=client)
                    if exchange.updates >= wanted:
                        exchange.give_up("still at work when the round had all the updates it wanted")
                yield exchange.take(client)

    def stream(self, issue: Callable[[], Issued | None]) -> Iterator[tuple[ClientTask, Update | Failure]]:
        """Replies as they come, each with its task."""
        with self._inbox() as inbox:
            exchange, tasks = _Exchange(self, Path(inbox)), dict[str, ClientTask]()
            while True:
                given = {exchange.give(issued.task): issued.task for issued in iter(issue, None)}
                tasks |= given
                if not tasks:
                    return
                if given:  # at once: with replies at hand it may be long until the next is wanted
                    exchange.look()
                while not exchange.settled:
                    exchange.advance()
                client = next(iter(exchange.settled))
                yield tasks.pop(client), exchange.take(client)

    def _inbox(self) -> tempfile.TemporaryDirectory[str]:
        """Named so that a run's folder is cleared of what a killed process left."""
        return tempfile.TemporaryDirectory(prefix=".inbox.", suffix=".tmp", dir=self.folder)


@dataclass
class _Open:
    """A task whose reply has not come. ``asked`` is empty while its client is not connected."""

    task: ClientTask
    since_s: float
    absent_since_s: float
    nonce: str = ""
    asked: str = ""
    sent: int = 0
    reply_bytes: int = 0
    emulator_sent: bool = False
    delivering: bool = False


class _Exchange:
    """Tasks that were given out, and what became of them."""

    def __init__(self, remote: Remote, inbox: Path) -> None:
        self.remote, self.inbox = remote, inbox
        self.open: dict[str, _Open] = {}
        self.settled: dict[str, Callable[[], Update | Failure]] = {}
        self.updates = 0
        self._recent: dict[int, tuple[Tensors, bytes, str]] = {}

    def give(self, task: ClientTask) -> str:
        """Take a task on; it is sent by :meth:`look`. Raises ValueError for a client that has one already."""
        if task.client in self.open or task.client in self.settled:
            raise ValueError(f"expected one task at a time for a client, got two for {task.client}")
        now = self.remote.clock()
        self.open[task.client] = _Open(task, now, now)
        return task.client

    def take(self, client: str) -> Update | Failure:
        """What became of the task, once; decoded now and not before."""
        return self.settled.pop(client)()

    def give_up(self, reason: str) -> None:
        """Leave out every client that has not answered."""
        for client in list(self.open):
            self._fail(client, reason)

    def advance(self, next_in_order: str = "") -> None:
        """:meth:`look`, and wait a moment when nothing has come."""
        before = len(self.settled)
        self.look(next_in_order)
        if len(self.settled) == before and self.open:
            self.remote.pause(POLL_S)

    def look(self, next_in_order: str = "") -> None:
        """One look at the link: send, receive, leave out who is late."""
        try:
            self._send()
            self._receive(next_in_order)
        except LinkDown as down:
            _LOG.debug("the link is down: %s", down)
            for item in self.open.values():  # who is absent is not known, and clients need a while to come back
                item.absent_since_s = self.remote.clock()
        self._leave_out_the_late()

    def _send(self) -> None:
        unsent = {client: item for client, item in self.open.items() if not item.asked}
        if not unsent:
            return
        here = self.remote.link.connected() & unsent.keys()
        emulator = cache(self._encoded_emulator)
        parcels = {client: self._parcel(unsent[client], emulator) for client in unsent if client in here}
        if not parcels:
            return
        for client, asked in self.remote.link.send(parcels, self.remote.settings.deadline_s).items():
            item, parcel = self.open[client], parcels[client]
            item.asked = asked
            item.sent += 1
            self._note("sent", item, kind=parcel.kind, sha256=parcel.sha256, bytes=len(parcel.blob))

    def _parcel(self, item: _Open, emulator: Callable[[], bytes]) -> Parcel:
        """The task, or the emulator when that is lacking. Every parcel has a nonce of its own."""
        common, task, item.nonce = self.remote.common, item.task, secrets.token_hex(16)
        named = {"run": common.run, "nonce": item.nonce, "round": task.round, "client": task.client}
        if item.delivering:
            return Parcel(EMULATOR, {**named, "digest": task.model_digest}, emulator())
        blob, digest = self._encoded(task.tensors)
        item.reply_bytes = max(len(blob), encoded_size(common.returned(task)))
        return Parcel(TASK, {**named, "task": task_fields(task), "recipe": common.recipe}, blob, digest)

    def _encoded_emulator(self) -> bytes:
        """All that lack it are sent the same bytes, which are not kept."""
        assert self.remote.common.emulator is not None
        return encode_tensors(self.remote.common.emulator())

    def _encoded(self, tensors: Tensors) -> tuple[bytes, str]:
        """Bytes and their digest. Clients that receive the same tensors are sent the same bytes, encoded once."""
        if id(tensors) not in self._recent:
            blob = encode_tensors(tensors)
            while len(self._recent) >= MOST_RECENT:
                del self._recent[next(iter(self._recent))]
            self._recent[id(tensors)] = (tensors, blob, sha256_bytes(blob))
        return self._recent[id(tensors)][1:]

    def _receive(self, next_in_order: str) -> None:
        asked = {client: item.asked for client, item in self.open.items() if item.asked}
        if not asked:
            return
        largest = max(self.open[client].reply_bytes for client in asked)
        for client, reply in self.remote.link.receive(asked, largest + FIELDS_ROOM):
            item = self.open.get(client)
            if item is None or not item.asked:
                continue  # it came twice
            try:
                self._settle(client, item, reply, spool=client != next_in_order)
            except UpdateRefused as refusal:
                self._note("refused", item, reason=shown(str(refusal)))
                self._fail(client, str(refusal))

    def _settle(self, client: str, item: _Open, reply: Parcel | Lost, spool: bool) -> None:
        if isinstance(reply, Lost):
            if reply.again and item.sent < MOST_SENT:
                item.asked, item.absent_since_s = "", self.remote.clock()
            else:
                self._fail(client, reply.reason)
            return
        mine = {"run": self.remote.common.run, "nonce": item.nonce, "round": item.task.round, "client": client}
        theirs = {key: reply.fields.get(key) for key in mine}
        if theirs != mine:
            wrong = ", ".join(key for key in mine if theirs[key] != mine[key])
            raise UpdateRefused(f"a reply to another task (its {wrong}): replayed, or of another round")
        match reply.kind:
            case "update":
                self._note("received", item, sha256=reply.sha256, bytes=len(reply.blob))
                expected = self.remote.common.returned(item.task)
                self._keep(client, reply, expected, spool)
            case "failure":
                self._fail(client, str(reply.fields.get("reason", "no reason given")))
            case "lacking":
                self._deliver_emulator(client, item)
            case "ready" if item.delivering:
                item.delivering, item.asked, item.absent_since_s = False, "", self.remote.clock()
            case other:
                raise UpdateRefused(f"expected {UPDATE}, {FAILURE}, {LACKING} or {READY}, got {other[:60]!r}")

    def _keep(self, client: str, reply: Parcel, expected: Expected, spool: bool) -> None:
        """Settle with an update, in memory when it is next in order, else on disk until its turn.

        It is checked here as well: one that the loop would leave out must not count among those that a round wants.
        """
        fields = reply.fields.get("update")
        if not isinstance(fields, dict):
            raise UpdateRefused("message: expected an update's fields, got none")
        update = build_update(fields, decode_tensors(reply.blob, expected))
        check_update(expected, update)
        self.updates += 1
        del self.open[client]
        if not spool:
            self.settled[client] = lambda: update
            return
        path = self.inbox / str(self.updates)
        path.write_bytes(reply.blob)

        def read() -> Update:
            mapped = map_file(path)
            path.unlink()  # what is mapped stays
            return build_update(fields, decode_tensors(mapped, expected))

        self.settled[client] = read

    def _deliver_emulator(self, client: str, item: _Open) -> None:
        common, limit = self.remote.common, self.remote.settings.emulator_mb * 1_000_000
        if common.emulator is None or item.emulator_sent or common.emulator_bytes > limit:
            hint = "Hand it out as a folder; the client joins with --emulator FOLDER."
            self._fail(client, f"lacks the emulator {item.task.model_digest[:12]}... of this run. {hint}")
            return
        item.emulator_sent = item.delivering = True
        item.asked, item.absent_since_s = "", self.remote.clock()

    def _leave_out_the_late(self) -> None:
        now, settings = self.remote.clock(), self.remote.settings
        for client, item in list(self.open.items()):
            if now - item.since_s >= settings.deadline_s:
                self._fail(client, f"no answer within {settings.deadline_s:g} s")
            elif not item.asked and now - item.absent_since_s >= settings.absent_s:
                self._fail(client, f"not connected for {settings.absent_s:g} s")

    def _fail(self, client: str, reason: str) -> None:
        failure = Failure(client, shown(reason))
        del self.open[client]
        self.settled[client] = lambda: failure

    def _note(self, event: str, item: _Open, **facts: Any) -> None:
        task = item.task
        self.remote.note(
            event, run=self.remote.common.run, client=task.client, round=task.round, nonce=item.nonce, **facts
        )
