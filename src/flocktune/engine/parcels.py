"""What travels between a federation's server and its owners: a line of JSON and a blob of tensors.

    server   task       a round's task for one client, the recipe, and a nonce that only this reply may bear
             emulator   the files of FedBiOT's emulator, for a client that lacks it
    client   update     what came out, under the task's nonce
             failure    why nothing came out
             lacking    the emulator of this digest is not here
             ready      the emulator has arrived, and no task waited for it

No code travels, and nothing is unpickled. Fields are plain values; whoever reads them checks them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from flocktune.errors import FlocktuneError, UpdateRefused
from flocktune.files import sha256_bytes

TASK, EMULATOR = "task", "emulator"
UPDATE, FAILURE, LACKING, READY = "update", "failure", "lacking", "ready"

FORMAT = "flocktune-parcel/1"

FIELDS_LIMIT = 1_000_000
"""The most characters that a parcel's fields may have."""

REASON_LIMIT = 2000
"""The most characters of a reason that are kept."""


@dataclass(frozen=True)
class Parcel:
    """``kind`` says what it is, ``fields`` are plain values, ``blob`` holds tensors or is empty.

    ``digest``: of the blob, when it is known already, as of one that many clients are sent.
    """

    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    blob: bytes = b""
    digest: str = ""

    @cached_property
    def sha256(self) -> str:
        """Of the blob: what both sides' audit logs know a parcel by."""
        return self.digest or sha256_bytes(self.blob)


@dataclass(frozen=True)
class Lost:
    """There will be no reply. ``again``: the client was cut off, and may be asked anew when it is back."""

    reason: str
    again: bool = False


class LinkDown(FlocktuneError):
    """The transport does not answer just now. It is tried again until the round's deadline."""


def to_text(parcel: Parcel) -> str:
    """Everything but the blob, with the blob's digest."""
    return json.dumps(
        {"format": FORMAT, "kind": parcel.kind, "fields": parcel.fields, "sha256": parcel.sha256},
        separators=(",", ":"),
        allow_nan=False,
    )


def from_text(text: str, blob: bytes) -> Parcel:
    """The parcel that :func:`to_text` was given. Raises UpdateRefused for anything else."""
    try:
        if len(text) > FIELDS_LIMIT:
            raise ValueError(f"{len(text)} characters of fields")
        said = json.loads(text)
        if said["format"] != FORMAT:
            raise ValueError(f"format {str(said['format'])[:60]}")
        parcel = Parcel(said["kind"], said["fields"], blob)
        if not isinstance(parcel.kind, str) or not isinstance(parcel.fields, dict):
            raise ValueError("no kind, or no fields")
        text.encode()
        json.dumps([parcel.kind, parcel.fields], ensure_ascii=False).encode()  # no file takes half a character
        if said["sha256"] != parcel.sha256:
            raise ValueError("a digest that is not that of its tensors")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UpdateRefused(f"message: expected {FORMAT}, got bytes that do not decode ({error})") from None
    return parcel


def shown(reason: str) -> str:
    """A stranger's words, fit for a file and a terminal: printable characters, and not too many of them."""
    return "".join(letter if letter.isprintable() else " " for letter in reason[:REASON_LIMIT])
