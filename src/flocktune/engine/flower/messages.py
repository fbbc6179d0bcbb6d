"""A parcel as the content of a Flower message, and back: one Array of bytes and one line of JSON.

The tensors are a safetensors blob in an Array: it travels in pieces of 5 MiB, whatever its dtypes (Flower's own arrays
know no bfloat16), and pieces that the server holds already, as those of a round's other clients, are not sent twice.
"""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from flocktune.engine.parcels import Parcel, from_text, to_text
from flocktune.errors import UpdateRefused

MESSAGE_TYPE = "train"
"""Flower wants one of its own; what a parcel is says its kind."""

NODE_UNAVAILABLE = 5
"""Flower's code for a client whose heartbeats have stopped; clients that were started anew say it of themselves."""

_TOLD, _TENSORS, _BLOB, _JSON = "told", "tensors", "safetensors", "json"


def content_of(parcel: Parcel, carried: dict[int, ArrayRecord] | None = None) -> RecordDict:
    """What carries a parcel. ``carried``: records by the identity of their bytes, so that what many parcels share is
    cut into pieces and hashed once."""
    told = ConfigRecord({_JSON: to_text(parcel)})
    known = {} if carried is None else carried
    if id(parcel.blob) not in known:
        blob = Array("uint8", (len(parcel.blob),), "safetensors", parcel.blob)
        known[id(parcel.blob)] = ArrayRecord({_BLOB: blob} if parcel.blob else {})
    return RecordDict({_TOLD: told, _TENSORS: known[id(parcel.blob)]})


def parcel_of(message: Message) -> Parcel:
    """The parcel that a message carries. Raises UpdateRefused for anything else."""
    try:
        told, tensors = message.content[_TOLD], message.content[_TENSORS]
        if not isinstance(told, ConfigRecord) or not isinstance(tensors, ArrayRecord):
            raise TypeError("other records")
        text, blob = told[_JSON], tensors[_BLOB].data if _BLOB in tensors else b""
        if not isinstance(text, str):
            raise TypeError("no line of JSON")
        return from_text(text, blob)
    except UpdateRefused:
        raise
    except Exception as error:  # whatever a stranger's records raise
        raise UpdateRefused(f"message: expected a parcel of flocktune, got another message ({error!r})") from None
