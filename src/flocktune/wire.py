"""Tasks and updates as what travels: plain values for JSON, and their tensors as a safetensors blob, apart from them.

Never pickle. Decoding checks what it reads; a message that is not ours raises UpdateRefused. Apart, the tensors of a
round's task are the same bytes for every client, and are stored and compared once. Values are never copied one by one:
encoding joins the tensors' own memory, decoding gives views of the message's. Fresh memory costs ten times reading.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from mmap import mmap
from typing import Any, TypeAlias

import torch
from torch import Tensor

from flocktune.errors import UpdateRefused
from flocktune.tensors import memory_of
from flocktune.types import AtMost, ClientTask, Expected, Mean, Tensors, Update

FORMAT = "flocktune/1"

MOST_METRICS, LONGEST_METRIC_NAME = 64, 100
"""Of an update: how many metrics, and the characters of a name."""

Blob: TypeAlias = bytes | memoryview | mmap
"""Encoded tensors in memory, or a file of them mapped into it."""

_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
"""How a header calls them, in safetensors' own order: a file has the last of them first."""

_NAMED = {name: dtype for dtype, name in _DTYPES.items()}

_NOT_OURS = (struct.error, ValueError, KeyError, TypeError, AttributeError, OverflowError, RuntimeError)
"""What reading a stranger's bytes raises."""

warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)  # nobody writes to what was received


def task_fields(task: ClientTask) -> dict[str, Any]:
    """All of a task but its tensors, as plain values."""
    return {key.name: getattr(task, key.name) for key in dataclasses.fields(task) if key.name != "tensors"}


def build_task(fields: Mapping[str, Any], tensors: Tensors) -> ClientTask:
    """The task of :func:`task_fields` and its tensors. Raises UpdateRefused."""
    return _build(ClientTask, fields, tensors=tensors)


def update_fields(update: Update) -> dict[str, Any]:
    """All of an update but its tensors, as plain values."""
    metrics = {name: [mean.total, mean.count] for name, mean in update.metrics.items()}
    return {"weight": update.weight, "clients": update.clients, "metrics": metrics}


def build_update(fields: Mapping[str, Any], tensors: Tensors) -> Update:
    """The update of :func:`update_fields` and its tensors. Raises UpdateRefused."""
    plain = dict(fields)
    try:
        metrics = _metrics(plain.pop("metrics"))
        if not isinstance(plain.get("weight"), int | float) or not isinstance(plain.get("clients"), int):
            raise ValueError("a weight or a number of clients that is no number")
        plain["weight"] = float(plain["weight"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UpdateRefused(f"message: expected metrics as name -> [total, count], got {error!r}") from None
    return _build(Update, plain, delta=tensors, metrics=metrics)


def _metrics(said: Mapping[str, Any]) -> dict[str, Mean]:
    """Few and finite: one client's are added to those of all, and stand in the run's events."""
    if len(said) > MOST_METRICS:
        raise ValueError(f"{len(said)} metrics, at most {MOST_METRICS} are taken")
    metrics = {name: Mean(float(total), float(count)) for name, (total, count) in said.items()}
    for name, mean in metrics.items():
        if len(name) > LONGEST_METRIC_NAME:
            raise ValueError(f"a name of {len(name)} characters, at most {LONGEST_METRIC_NAME} are taken")
        if not (math.isfinite(mean.total) and 0 <= mean.count < math.inf):
            raise ValueError(f"{name}: {mean}")
    return metrics


def encode_tensors(tensors: Tensors) -> bytes:
    """Tensors alone."""
    return b"".join(encoded_pieces(tensors))


def encoded_pieces(tensors: Tensors) -> list[bytes | memoryview]:
    """What :func:`encode_tensors` joins: the header, then each tensor's own memory where it lies in one piece."""
    header, order, _ = _layout(tensors)
    return [header, *(memory_of(tensors[name]) for name in order)]


def decode_tensors(
    blob: Blob, expected: Expected | None = None, more: Mapping[str, Variable] | None = None
) -> dict[str, Tensor]:
    """The tensors that :func:`encode_tensors` was given, as views of ``blob``: they keep it alive, and are only read.

    With ``expected``, names, shapes, dtypes and size are checked in the header, before anything is made of the values,
    and they come in its order, not the file's: sums over tensors round by their order. ``more``: tensors that may
    be there or not, by name; they come last. Raises UpdateRefused.
    """
    try:
        (length,) = struct.unpack_from("<Q", blob)
        more = {name: variable for name, variable in (more or {}).items() if name not in (expected or {})}
        if expected is not None and length > _longest_header(expected) + 300 * len(more):
            raise ValueError(f"a header of {length} bytes")
        entries = _entries(bytes(blob[8 : 8 + length]))
        order = list(entries)
        if expected is not None:
            there = [name for name, variable in more.items() if name in entries and _fits(entries[name], variable)]
            _refuse_header({name: entry for name, entry in entries.items() if name not in there}, expected)
            order = [*expected, *there]
        values = _views(blob, 8 + length, entries)
        return {name: values[name] for name in order}
    except _NOT_OURS as error:
        raise UpdateRefused(f"message: expected tensors, got bytes that do not decode ({error})") from None


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A tensor in a header, as it says. ``place``: where its bytes begin and end in the body."""

    dtype: str
    shape: list[int]
    place: tuple[int, int]


@lru_cache(maxsize=8)
def _entries(header: bytes) -> Mapping[str, _Entry]:
    """A header's tensors by name; the honest clients of a round all send the same. Raises one of _NOT_OURS."""
    said = json.loads(header)
    metadata = said.pop("__metadata__")
    if metadata.get("format") != FORMAT:
        raise ValueError(f"format {metadata.get('format')}")
    return {name: _Entry(entry["dtype"], entry["shape"], entry.get("data_offsets")) for name, entry in said.items()}


def _views(blob: Blob, start: int, entries: Mapping[str, _Entry]) -> dict[str, Tensor]:
    """The tensors in ``blob`` from byte ``start`` on. Raises ValueError unless they fill it without a gap."""
    body = torch.frombuffer(blob, dtype=torch.uint8)[start:]
    found: dict[str, Tensor] = {}
    end = 0
    lying = sorted(entries.items(), key=lambda item: item[1].place)
    for name, entry in lying:
        first, last = entry.place
        if not all(type(size) is int and size >= 0 for size in entry.shape):
            raise ValueError(f"{name[:60]}: a shape {str(entry.shape)[:60]}")
        if first != end or last - first != math.prod(entry.shape) * _NAMED[entry.dtype].itemsize or last > len(body):
            raise ValueError(f"{name[:60]}: bytes {first} to {last} of {len(body)}")
        end = last
    if end != len(body):
        raise ValueError(f"{len(body) - end} bytes too many")
    for called, group in groupby(lying, key=lambda item: item[1].dtype):  # at once: a tensor alone takes microseconds
        run = list(group)
        together = body[run[0][1].place[0] : run[-1][1].place[1]].view(_NAMED[called])
        parts = together.split([math.prod(entry.shape) for _, entry in run])
        found |= {name: part.view(entry.shape) for (name, entry), part in zip(run, parts, strict=True)}
    return found


Variable: TypeAlias = tuple[str, Sequence[int | None]]
"""A tensor of a message that is there or not: its dtype as a header calls it, its shape, None where it may be any."""

SIDE_A, SIDE_B = ".side_A", ".side_B"
"""What the names of a side adapter's factors end in: what a product of means left out, in a message beside them."""


def side_factors(expected: Tensors) -> dict[str, Variable]:
    """What a message may have beside ``expected`` factors A [R, in] and B [out, R]: a side adapter of any rank."""
    sides: dict[str, Variable] = {}
    for name, value in expected.items():
        if name.endswith(".lora_A"):
            sides[name.removesuffix(".lora_A") + SIDE_A] = ("F32", (None, *value.shape[1:]))
        if name.endswith(".lora_B"):
            sides[name.removesuffix(".lora_B") + SIDE_B] = ("F32", (*value.shape[:1], None))
    return sides


def _fits(entry: _Entry, variable: Variable) -> bool:
    """Whether a header's entry is of this dtype and shape."""
    dtype, shape = variable
    have = entry.shape
    sizes = len(have) == len(shape) and all(
        want in (None, size) and type(size) is int for size, want in zip(have, shape, strict=True)
    )
    return entry.dtype == dtype and sizes


def _longest_header(expected: Expected) -> int:
    """Bytes that a header for ``expected`` may have. A longer one is not parsed: that takes many times its size."""
    return 65_536 + sum(2 * len(name.encode()) + 256 for name in expected)


def _refuse_header(header: Mapping[str, _Entry], expected: Expected) -> None:
    """Raise UpdateRefused unless the header's entries are those of ``expected``; where they lie is checked later."""
    problems = [f"{name}: missing" for name in expected.keys() - header.keys()]
    problems += [f"{name[:200]}: not expected" for name in header.keys() - expected.keys()]
    for name in expected.keys() & header.keys():
        want, have = expected[name], header[name]
        dtype, shape, _ = _described(want)
        if isinstance(want, AtMost) and have.dtype == dtype and _fits_in(have.shape, want.count):
            continue
        if isinstance(want, AtMost) or [have.dtype, have.shape] != [dtype, shape]:
            got = json.dumps([have.dtype, have.shape])[:200]
            atmost = "at most " if isinstance(want, AtMost) else ""
            problems.append(f"{name}: expected {atmost}{json.dumps([dtype, shape])}, got {got}")
    if problems:
        shown = "; ".join(sorted(problems)[:8])
        raise UpdateRefused(
            f"message refused: {shown}" + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        )


def _fits_in(shape: Any, most: int) -> bool:
    return isinstance(shape, list) and len(shape) == 1 and type(shape[0]) is int and 0 <= shape[0] <= most


def encoded_size(tensors: Expected) -> int:
    """Bytes of :func:`encode_tensors`, without building them; with AtMost, the most that there may be.

    The JSON fields of a message (some hundred bytes) are not in it.
    """
    header, _, body = _layout(tensors)
    return len(header) + body


def _layout(tensors: Expected) -> tuple[bytes, Sequence[str], int]:
    """As safetensors lays a file out: the header with what precedes it, names in the body's order, the body's bytes."""
    described = ((name, *_described(value)) for name, value in tensors.items())
    return _laid_out(tuple((name, dtype, *shape, size) for name, dtype, shape, size in described))


@lru_cache(maxsize=8)
def _laid_out(described: tuple[tuple[Any, ...], ...]) -> tuple[bytes, Sequence[str], int]:
    """:func:`_layout` of each name, dtype, shape and bytes; a round asks for the same at every update."""
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT}}
    offset = 0
    # safetensors' own order, then by name; it keeps every value at a multiple of its size.
    rank = {dtype: place for place, dtype in enumerate(_DTYPES.values())}
    for name, dtype, *shape, size in sorted(described, key=lambda entry: (-rank[entry[1]], entry[0])):
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, list(header)[1:], offset


def _described(value: Tensor | AtMost) -> tuple[str, list[int], int]:
    """As a header has it, at most: dtype, shape, bytes."""
    if isinstance(value, AtMost):
        return _DTYPES[torch.uint8], [value.count], value.count
    return _DTYPES[value.dtype], list(value.shape), value.nbytes


def _build(message: type, fields: Mapping[str, Any], **more: Any) -> Any:
    try:
        return message(**fields, **more)
    except TypeError as error:
        raise UpdateRefused(f"message: expected the fields of {message.__name__}, got {error}") from None
