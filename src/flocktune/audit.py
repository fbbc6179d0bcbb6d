"""An append-only account of what a side of a federation did: one JSON object a line, in a chain of digests.

    {"time": UTC, "event": name, ...fields, "previous": SHA-256 of the record before it, "" in the first}

It holds digests, sizes in bytes, names, counts and reasons, and never a value of data or of a tensor. The chain shows
that a line was changed or taken out. It can not show that the last lines are gone, nor that the whole file was written
anew by someone who may write it: for that, keep :meth:`AuditLog.append`'s answer in another place.

A line that a power cut or a full disk left torn stays where it is. The next append sets it apart: it writes a ``torn``
record with the fragment's digest, and the chain goes on from the last whole record.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

from flocktune.errors import Problem, UserError
from flocktune.files import sha256_bytes, sync_folder

Field: TypeAlias = str | int | float | bool | Sequence[str] | None
"""What a record may say: plain values and lists of names."""

TASK_RECEIVED, TASK_REFUSED, UPDATE_LEFT = "task_received", "task_refused", "update_left"
PHASE_LEFT = "phase_left"
JOINED, LEFT, TORN = "joined", "left", "torn"

_OWN_KEYS = ("time", "event", "previous")
_LONGEST = 2000
"""Letters of one text: enough for a reason, too few for data."""
_BLOCK_BYTES = 1 << 16


@dataclass(frozen=True)
class AuditLog:
    """The log at ``path``. Any number of processes and threads may append to it."""

    path: Path

    def append(self, event: str, **fields: Field) -> str:
        """Add one record, on disk when this returns; gives the record's SHA-256.

        The file is made with mode 0600. Raises OSError (a full disk): what was to be recorded must then not happen.
        Raises TypeError or ValueError for what an account may not hold.
        """
        refused = [*(key for key in fields if key in _OWN_KEYS), *(["event"] if event == TORN else [])]
        if refused:
            raise ValueError(f"audit: expected keys other than the log's own, got {', '.join(refused)}")
        said = {key: _plain(key, value) for key, value in fields.items()}
        new = not self.path.exists()
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # goes with the descriptor, also after kill -9
            previous, fragments, ended = _tail(descriptor)
            lines = b"" if ended else b"\n"
            if fragments:
                apart = {"set_apart": [sha256_bytes(one) for one in fragments], "bytes": sum(map(len, fragments))}
                record = _record(TORN, apart, previous)
                lines, previous = lines + record + b"\n", sha256_bytes(record)
            record = _record(event, said, previous)
            _write_whole(descriptor, lines + record + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if new:
            sync_folder(self.path.parent)
        return sha256_bytes(record)

    def task_received(self, *, run: str, round: int, nonce: str, kind: str, bytes: int) -> str:
        """A task arrived; nothing was decided yet."""
        return self.append(TASK_RECEIVED, run=run, round=round, nonce=nonce, kind=kind, bytes=bytes)

    def task_refused(self, *, run: str, round: int, nonce: str, reasons: Sequence[str]) -> str:
        """A task was not done, and why; a reason too long for a record is cut."""
        return self.append(TASK_REFUSED, run=run, round=round, nonce=nonce, reasons=[one[:_LONGEST] for one in reasons])

    def update_left(
        self,
        *,
        run: str,
        round: int,
        nonce: str,
        digest: str,
        bytes: int,
        tensors: int,
        weight: float,
        protected_by: str = "",
    ) -> str:
        """An update leaves. Written before it does, so that nothing can leave unrecorded.

        ``digest``: SHA-256 of the tensors; ``bytes``: of the encoded message; ``tensors``: how many; ``protected_by``:
        what the recipe hides its values by, if it does.
        """
        more: dict[str, Field] = {"protected_by": protected_by} if protected_by else {}
        said: dict[str, Field] = {"digest": digest, "bytes": bytes, "tensors": tensors, "weight": weight}
        return self.append(UPDATE_LEFT, run=run, round=round, nonce=nonce, **said, **more)

    def phase_left(self, *, run: str, round: int, nonce: str, kind: str, digest: str, bytes: int) -> str:
        """An answer leaves that is no update: keys, sealed shares, a signature, shares of a round's masks."""
        return self.append(PHASE_LEFT, run=run, round=round, nonce=nonce, kind=kind, digest=digest, bytes=bytes)

    def joined(self, *, federation: str, name: str, data_digest: str) -> str:
        """This side began to take part, with the data of this SHA-256."""
        return self.append(JOINED, federation=federation, name=name, data_digest=data_digest)

    def left(self, *, federation: str, name: str, reason: str) -> str:
        """This side stopped taking part."""
        return self.append(LEFT, federation=federation, name=name, reason=reason[:_LONGEST])


def read_audit(path: Path) -> Iterator[Mapping[str, Any]]:
    """The whole records, oldest first; torn lines are left out. Nothing when there is no file. Raises UserError."""
    for line in _lines(path):
        record = _parsed(line)
        if record is not None:
            yield record


def verify(path: Path) -> list[Problem]:
    """The first place where the chain is broken, or nothing.

    A torn line is sound when a ``torn`` record accounts for it, or when it is the last one and no append came since.
    """
    before, before_number = "", 0
    fragments: list[tuple[int, str]] = []
    for number, line in enumerate(_lines(path), start=1):
        record = _parsed(line)
        if record is None:
            fragments.append((number, sha256_bytes(line)))
            continue
        accounted = record.get("set_apart", []) if record["event"] == TORN else []
        if [digest for _, digest in fragments] != accounted:
            first = fragments[0][0] if fragments else number
            expected = "one record, or a torn line that the record after it accounts for"
            return [Problem(f"{path}:{first}", expected, "neither", "This line, or the one after it, was changed.")]
        if record["previous"] != before:
            where = (
                f"line {before_number} was changed, or lines after it were" if before_number else "lines before were"
            )
            return [
                Problem(
                    f"{path}:{before_number or number}",
                    f"a record with the digest that line {number} names",
                    "another",
                    f"Either {where} taken out, or line {number} itself was changed.",
                )
            ]
        before, before_number, fragments = sha256_bytes(line), number, []
    return []


def rounds_taken(path: Path, run: str) -> int:
    """How many updates left in ``run``: a round that was asked for twice, and answered twice, counts twice."""
    return sum(record.get("run") == run for record in _updates(path))


def updates_taken(path: Path) -> int:
    """How many updates left, in all runs."""
    return sum(1 for _ in _updates(path))


def nonces(path: Path) -> set[str]:
    """The nonces of all tasks that an update left for: such a task that comes again is a replay."""
    return {str(record["nonce"]) for record in _updates(path) if "nonce" in record}


def _updates(path: Path) -> Iterator[Mapping[str, Any]]:
    """Only such records are parsed: a long log is read for every task. Within a text, the mark's quotes are escaped."""
    mark = f'"event": "{UPDATE_LEFT}"'.encode()
    for line in _lines(path):
        record = _parsed(line) if mark in line else None
        if record is not None:
            yield record


def _lines(path: Path) -> Iterator[bytes]:
    """Lines without their ends; an empty one is only the end of a file."""
    try:
        with path.open("rb") as file:
            for line in file:
                yield line.removesuffix(b"\n")
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(Problem(str(path), "an audit log that can be read", str(error))) from None


def _parsed(line: bytes) -> Mapping[str, Any] | None:
    """The record on a line; None when it is not a whole one. A record that was cut is never valid JSON."""
    try:
        record = json.loads(line)
    except ValueError:  # UnicodeDecodeError is one
        return None
    return record if isinstance(record, dict) and all(key in record for key in _OWN_KEYS) else None


def _tail(descriptor: int) -> tuple[str, list[bytes], bool]:
    """(digest of the last whole record, torn lines after it, whether the file ends with a line's end).

    Read backwards, so that an append costs the same however long the log is.
    """
    size = os.fstat(descriptor).st_size
    reach = _BLOCK_BYTES
    while True:
        start = max(0, size - reach)
        data = os.pread(descriptor, size - start, start)
        ended = not data or data.endswith(b"\n")
        # The first line may lack its beginning: then it is no record, and more is read.
        lines = data.removesuffix(b"\n").split(b"\n") if data else []
        for place in range(len(lines) - 1, -1, -1):
            if _parsed(lines[place]) is not None:
                return sha256_bytes(lines[place]), lines[place + 1 :], ended
        if start == 0:
            return "", lines, ended
        reach *= 2


def _record(event: str, fields: Mapping[str, Any], previous: str) -> bytes:
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": time, "event": event, **fields, "previous": previous}, allow_nan=False).encode()


def _write_whole(descriptor: int, data: bytes) -> None:
    """What a full disk cut off is a torn line, and the next append sets it apart."""
    written = 0
    while written < len(data):
        written += os.write(descriptor, data[written:])


def _plain(key: str, value: object) -> object:
    """``value`` when an account may hold it: no tensor, no row, no list of numbers."""
    texts = [value] if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else []
    allowed = value is None or isinstance(value, bool | int | float | str | list | tuple)
    if not allowed or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"audit: expected {key} as a plain value or a list of names, got {type(value).__name__}")
    if any(len(text) > _LONGEST for text in texts):
        raise ValueError(f"audit: expected {key} of at most {_LONGEST} letters, got more")
    return value
