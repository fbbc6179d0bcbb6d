"""A worker of the Ray engine: a process that keeps one client half, and what crosses to it and back, as bytes."""

from __future__ import annotations

import importlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flocktune.engine.client import answer
from flocktune.errors import FlocktuneError
from flocktune.interfaces import ClientHalf
from flocktune.types import Failure, Tensors
from flocktune.wire import build_task, decode_tensors, encode_tensors, update_fields

UPDATE, FAILURE, UNFIT = "update", "failure", "unfit"
"""What a worker replies; ``unfit``: it could not build the client half at all."""


class Worker:
    """The actor: a process that keeps one client half, and with it the base model, as long as the engine lives."""

    def __init__(self, function: str, arguments: Sequence[str | None], threads: int, folder: str) -> None:
        self.function, self.arguments, self.threads, self.folder = function, arguments, threads, folder
        self.half: ClientHalf | None = None
        self.problem = ""

    def load(self) -> None:
        """Build the client half, once. What is wrong is remembered: it is the same for every task."""
        try:
            if os.path.isdir(self.folder):  # the recipe's paths may be relative
                os.chdir(self.folder)
            torch.set_num_threads(self.threads)
            module, _, name = self.function.partition(":")
            self.half = getattr(importlib.import_module(module), name)(*self.arguments)
        except Exception as error:
            self.problem = str(error) if isinstance(error, FlocktuneError) else f"{type(error).__name__}: {error}"

    def work(self, message: bytes, task: bytes, memory: bytes) -> tuple[str, bytes, bytes]:
        """What came out, its bytes, and the client's new memory (empty when there is none)."""
        if self.half is None:
            return UNFIT, self.problem.encode(), b""
        asked = build_task(json.loads(task), unpack(message)[1])
        reply, kept = answer(asked, self.half, unpack(memory)[1] if memory else {})
        kept_bytes = pack({}, kept) if kept else b""
        if isinstance(reply, Failure):
            return FAILURE, reply.reason.encode(), kept_bytes
        return UPDATE, pack(update_fields(reply), reply.delta), kept_bytes


def pack(fields: Mapping[str, Any], tensors: Tensors) -> bytes:
    """Plain values and tensors as bytes that keep the tensors' order: sums over all of them round by it."""
    head = json.dumps({"fields": fields, "names": list(tensors)}).encode()
    head += b" " * (-len(head) % 8)  # tensors are read in place, and lie at multiples of their sizes
    return struct.pack("<Q", len(head)) + head + encode_tensors(tensors)


def unpack(blob: bytes) -> tuple[dict[str, Any], Tensors]:
    """What :func:`pack` was given. Raises UpdateRefused."""
    end = 8 + struct.unpack_from("<Q", blob)[0]
    head = json.loads(blob[8:end])
    tensors = decode_tensors(memoryview(blob)[end:])
    return head["fields"], {name: tensors[name] for name in head["names"]}
