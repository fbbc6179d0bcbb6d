"""Files that are never half written, and folders that one process holds at a time."""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flocktune.errors import Problem, UserError


def write_atomic(path: Path, data: bytes | str | Iterable[bytes | memoryview], mode: int = 0o666) -> None:
    """Write ``data``, whole or in pieces, so that ``path`` holds the old or the new content, whatever happens.

    Temporary file in the same folder, fsync, rename, fsync of the folder. On failure (full disk)
    the temporary file is removed and the old content stands. Raises OSError.
    """
    text = data.encode() if isinstance(data, str) else data
    pieces = [text] if isinstance(text, bytes) else text
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def open_to_readers(folder: Path) -> None:
    """Give a folder's files the rights of any new file here: libraries write weights for this account alone.

    Raises OSError.
    """
    new = folder / f".{secrets.token_hex(4)}.tmp"
    new.touch()  # asks the umask, which can not be read without changing it
    mode = new.stat().st_mode & 0o777
    new.unlink()
    for file in folder.iterdir():
        file.chmod(mode)


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. NaN is refused: write None instead."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises UserError naming the file when it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(Problem(str(path), "a file", "nothing there")) from None
    except (ValueError, OSError) as error:
        raise UserError(Problem(str(path), "a JSON file", str(error))) from None


def map_file(path: Path) -> mmap.mmap:
    """A file's bytes as memory that is the system's own copy of them. Writing to it never reaches the file."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def sha256_bytes(data: bytes) -> str:
    """Hex SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_path(path: Path) -> str:
    """Hex SHA-256 of a file, or of a folder's relative names and contents (hidden ones left out)."""
    if path.is_file():
        return sha256_file(path)
    digest = hashlib.sha256()
    for file in sorted(entry for entry in path.rglob("*") if entry.is_file()):
        relative = file.relative_to(path)
        if not any(part.startswith(".") for part in relative.parts):
            digest.update(f"{relative}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


class Held(UserError):
    """Another process holds the folder."""


@contextmanager
def exclusive(
    folder: Path,
    what: str = "a run folder that nobody is using",
    fix: str = "Wait for that run, or choose another folder with --out.",
) -> Iterator[None]:
    """Hold ``folder`` for this process. The lock goes with the process, also after kill -9.

    Raises Held, a UserError, when another process holds it: ``what`` was expected, and ``fix`` says what to do.
    """
    with (folder / ".lock").open("a") as file:
        for tries_left in reversed(range(10)):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not tries_left:
                    raise Held(Problem(str(folder), what, "one that another process holds", fix)) from None
                time.sleep(0.02)  # :func:`is_held` holds it for an instant
        yield


def is_held(folder: Path) -> bool:
    """Whether a process holds ``folder`` by :func:`exclusive`. Nothing is written. Raises OSError."""
    try:
        file = (folder / ".lock").open("rb")
    except FileNotFoundError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
