"""Tasks and updates as bytes: one safetensors blob whose metadata holds the rest as JSON.

Never pickle. Decoding checks what it reads; a message that is not ours raises UpdateRefused.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from flocktune.errors import UpdateRefused
from flocktune.types import ClientTask, Mean, Tensors, Update

FORMAT = "flocktune/1"


def encode_task(task: ClientTask) -> bytes:
    """A task as bytes."""
    fields = {key.name: getattr(task, key.name) for key in dataclasses.fields(task) if key.name != "tensors"}
    return _encode("task", fields, task.tensors)


def decode_task(blob: bytes) -> ClientTask:
    """The task that :func:`encode_task` was given. Raises UpdateRefused."""
    fields, tensors = _decode("task", blob)
    return _build(ClientTask, tensors=tensors, **fields)


def encode_update(update: Update) -> bytes:
    """An update as bytes."""
    metrics = {name: [mean.total, mean.count] for name, mean in update.metrics.items()}
    return _encode("update", {"weight": update.weight, "clients": update.clients, "metrics": metrics}, update.delta)


def decode_update(blob: bytes) -> Update:
    """The update that :func:`encode_update` was given. Raises UpdateRefused."""
    fields, tensors = _decode("update", blob)
    try:
        metrics = {name: Mean(float(total), float(count)) for name, (total, count) in fields.pop("metrics").items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UpdateRefused(f"message: expected metrics as name -> [total, count], got {error!r}") from None
    return _build(Update, delta=tensors, metrics=metrics, **fields)


def encoded_size(tensors: Tensors) -> int:
    """Bytes of a message's tensors on the wire: safetensors' header and body, without building the body.

    The JSON fields of a message (some hundred bytes) are not in it.
    """
    header, offset = {}, 0
    # safetensors' own order: larger items first, then by name; it decides how many digits the offsets have.
    for name, value in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        end = offset + value.numel() * value.element_size()
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [offset, end]}
        offset = end
    text = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + (text + 7) // 8 * 8 + offset


def _encode(kind: str, fields: dict[str, Any], tensors: Tensors) -> bytes:
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    return save(contiguous, metadata={"format": FORMAT, "kind": kind, "fields": json.dumps(fields)})


def _decode(kind: str, blob: bytes) -> tuple[dict[str, Any], Tensors]:
    try:
        (length,) = struct.unpack_from("<Q", blob)
        metadata = json.loads(blob[8 : 8 + length])["__metadata__"]
        fields = json.loads(metadata["fields"])
        tensors = load(blob)
    except (struct.error, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UpdateRefused(f"message: expected a flocktune {kind}, got bytes that do not decode ({error})") from None
    if metadata.get("format") != FORMAT or metadata.get("kind") != kind or not isinstance(fields, dict):
        raise UpdateRefused(f"message: expected {FORMAT} {kind}, got {metadata.get('format')} {metadata.get('kind')}")
    return fields, tensors


def _build(message: type, /, **fields: Any) -> Any:
    try:
        return message(**fields)
    except TypeError as error:
        raise UpdateRefused(f"message: expected the fields of {message.__name__}, got {error}") from None
