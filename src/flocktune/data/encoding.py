"""Tokens and loss mask of every row, once per run, in three flat arrays.

The mask is built from segments while encoding; token ids are never searched. :func:`encode_cached`
keeps the arrays in an Arrow file, memory-mapped and read without a copy.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from flocktune.data.examples import Example
from flocktune.data.rows import encode_prompt_row, encode_rows, fit_prompt, shorten
from flocktune.data.templates import Template, Tokenizer
from flocktune.errors import Problem, UserError
from flocktune.files import write_atomic

logger = logging.getLogger(__name__)

TrainOn = Literal["responses", "everything"]

CACHE_VERSION = 2
"""Part of every cache file's name; raise it when the same inputs would give other tokens."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """Rows of tokens, flat.

    tokens:    int32 [total]
    trainable: bool [total], whether this token is a target; never true for a sequence's first token
    offsets:   int64 [sequences + 1], sequence i is [offsets[i], offsets[i + 1])
    pairs:     of preference data: row i is sequence i, the prompt with the chosen answer, and sequence len(self) + i,
               the same prompt with the rejected one. Else a row is a sequence.
    """

    tokens: NDArray[np.int32]
    trainable: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    pairs: bool = False

    def __len__(self) -> int:
        return (len(self.offsets) - 1) // (2 if self.pairs else 1)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, of a pair those of both sequences, int64 [rows]."""
        return self._by_row(np.diff(self.offsets)).sum(axis=0)

    @cached_property
    def targets(self) -> NDArray[np.int64]:
        """Trainable tokens of each row, int64 [rows]; 0 for a pair of which either answer has none."""
        before = np.concatenate([[0], np.cumsum(self.trainable, dtype=np.int64)])
        counts = self._by_row(np.diff(before[self.offsets]))
        return np.where(counts.all(axis=0), counts.sum(axis=0), 0)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(np.diff(self.offsets).max(initial=0))

    def sequences(self, rows: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Which sequences ``rows`` consist of: of pairs all chosen ones, then all rejected ones in the same order."""
        first = np.asarray(rows, np.int64)
        return np.concatenate([first, len(self) + first]) if self.pairs else first

    def chosen(self) -> Encoded:
        """The rows with their chosen answers alone, views of these: instructions again."""
        end = self.offsets[len(self)]
        return Encoded(self.tokens[:end], self.trainable[:end], self.offsets[: len(self) + 1])

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> Encoded:
        """Only these rows, in this order, copied."""
        pieces = [self.rows(int(sequence)) for sequence in self.sequences(rows)]
        lengths = [0, *(len(tokens) for tokens, _ in pieces)]
        tokens = np.concatenate([np.zeros(0, np.int32), *(tokens for tokens, _ in pieces)])
        trainable = np.concatenate([np.zeros(0, np.bool_), *(mask for _, mask in pieces)])
        return Encoded(tokens, trainable, np.cumsum(lengths, dtype=np.int64), self.pairs)

    def _by_row(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """A number of each sequence as [1 or 2, rows]."""
        return numbers.reshape(2 if self.pairs else 1, len(self))

    def rows(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Tokens and mask of one sequence, views of [length]."""
        span = slice(self.offsets[index], self.offsets[index + 1])
        return self.tokens[span], self.trainable[span]


@dataclass(frozen=True)
class EncodingReport:
    """What encoding did: ``untrainable`` are the rows without any target, which no batch contains."""

    rows: int
    untrainable: tuple[int, ...]
    truncated: int
    tokens: int
    trainable_tokens: int


def encode(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    template: Template,
    max_tokens: int,
    train_on: TrainOn,
    pairs: bool = False,
) -> tuple[Encoded, EncodingReport]:
    """Encode every example into at most ``max_tokens`` tokens.

    A row is the tokenizer's begin-of-text token (if it has one and the template did not write it),
    then the segments; its end-of-text token follows every complete answer and is trained. A response
    that is cut has no end. ``pairs``: both answers of preference data, after the same prompt, which is no target.
    Raises UserError when the template does not fit the tokenizer, or an example of ``pairs`` has one answer only.
    """
    if tokenizer.eos_token_id is None and template != "chat":
        logger.warning("the tokenizer has no end-of-text token: answers can not be taught to end")
    answered = [examples, _with_rejected(examples)] if pairs else [examples]
    columns: list[list[tuple[NDArray[np.int32], NDArray[np.bool_]]]] = [[] for _ in answered]
    truncated = 0
    in_step = zip(*(encode_rows(part, tokenizer, template) for part in answered), strict=True)
    for example, rows in zip(examples, in_step, strict=True):
        if max(len(row.tokens) for row in rows) > max_tokens:
            rows = tuple(shorten(rows, example, tokenizer, template, max_tokens))
            truncated += 1
        for column, row in zip(columns, rows, strict=True):
            mask = np.array(row.trainable, np.bool_) if train_on == "responses" else np.ones(len(row.tokens), np.bool_)
            mask[: row.answer if pairs else 1] = False
            column.append((np.array(row.tokens, np.int32), mask))
    pieces = [piece for column in columns for piece in column]
    tokens = np.concatenate([np.zeros(0, np.int32), *(tokens for tokens, _ in pieces)])
    trainable = np.concatenate([np.zeros(0, np.bool_), *(mask for _, mask in pieces)])
    lengths = [0, *(len(tokens) for tokens, _ in pieces)]
    encoded = Encoded(tokens, trainable, np.cumsum(lengths, dtype=np.int64), pairs)
    return encoded, report(encoded, truncated)


def _with_rejected(examples: Sequence[Example]) -> list[Example]:
    """The examples with the rejected answer as their response. Raises UserError where there is none."""
    alone = sum(example.rejected is None for example in examples)
    if alone:
        got = f"{alone} of {len(examples)} rows with one answer only"
        fix = "Name their columns in data.columns.chosen and data.columns.rejected."
        raise UserError(Problem("data", "rows with a chosen and a rejected answer (local.loss dpo)", got, fix))
    return [replace(example, response=example.rejected or "") for example in examples]


def report(encoded: Encoded, truncated: int) -> EncodingReport:
    """Count what is in ``encoded``."""
    untrainable = tuple(int(row) for row in np.flatnonzero(encoded.targets == 0))
    return EncodingReport(
        len(encoded), untrainable, truncated, len(encoded.tokens), int(np.count_nonzero(encoded.trainable))
    )


def encode_prompt(example: Example, tokenizer: Tokenizer, *, template: Template, max_tokens: int) -> list[int]:
    """What generation starts from: exactly the tokens that precede the last response in training.

    The response itself is never looked at; so a prompt that is longer than ``max_tokens`` is cut to
    that, whatever the answer's length. Leave room for the answer: pass the limit less the new tokens.
    """
    prompt = encode_prompt_row(example, tokenizer, template)
    return fit_prompt(prompt, example, tokenizer, template, max_tokens).tokens


# --- cache -----------------------------------------------------------------------------------------


def default_cache_folder() -> Path:
    """``$FLOCKTUNE_CACHE``, else ``$XDG_CACHE_HOME/flocktune``, else ``~/.cache/flocktune``."""
    if own := os.environ.get("FLOCKTUNE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flocktune"


def encode_cached(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    template: Template,
    max_tokens: int,
    train_on: TrainOn,
    digest: str,
    folder: Path,
    pairs: bool = False,
) -> tuple[Encoded, EncodingReport]:
    """As :func:`encode`, but kept in ``folder`` for the next time.

    ``digest`` stands for the examples (:func:`~flocktune.data.examples.examples_digest`). A damaged
    file is written anew; a folder that can not be written only costs a warning.
    """
    choices = {
        "version": CACHE_VERSION,
        "data": digest,
        "tokenizer": tokenizer_digest(tokenizer),
        "template": asdict(template) if is_dataclass(template) else template,
        "max_tokens": max_tokens,
        "train_on": train_on,
        **({"pairs": True} if pairs else {}),
    }
    name = hashlib.sha256(json.dumps(choices, sort_keys=True).encode()).hexdigest()
    path = folder / f"{name}.arrow"
    kept = read_arrow(path)
    if kept is not None and len(kept[0]) == len(examples):
        return kept
    encoded, made = encode(
        examples, tokenizer, template=template, max_tokens=max_tokens, train_on=train_on, pairs=pairs
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_arrow(path, encoded, made.truncated)
    except OSError as error:
        logger.warning("tokens are not cached in %s: %s", folder, error)
    return encoded, made


def tokenizer_digest(tokenizer: Any) -> str:
    """Hex SHA-256 of all that decides how ``tokenizer`` encodes, its chat template included."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        # Padding and truncation are set by calls that merely use the tokenizer.
        rules.pop("padding", None)
        rules.pop("truncation", None)
    else:
        rules = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    own = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.chat_template]
    return hashlib.sha256(json.dumps([rules, own], sort_keys=True).encode()).hexdigest()


def write_arrow(path: Path, encoded: Encoded, truncated: int) -> None:
    """Write an Arrow IPC file of two list columns, ``tokens`` and ``trainable``, atomically. Raises OSError."""
    import pyarrow as pa

    def array(values: NDArray[Any]) -> pa.Array:  # pa.array would import pandas, to ask it what an array is
        kind = pa.from_numpy_dtype(values.dtype)
        return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])

    offsets = array(encoded.offsets)
    columns = {
        "tokens": pa.LargeListArray.from_arrays(offsets, array(encoded.tokens)),
        # Bytes, not Arrow's packed bits, so that numpy can read them in place.
        "trainable": pa.LargeListArray.from_arrays(offsets, array(encoded.trainable.view(np.uint8))),
    }
    batch = pa.RecordBatch.from_pydict(columns)
    facts = {"truncated": str(truncated), "pairs": str(encoded.pairs), "sha256": _content_digest(encoded)}
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema.with_metadata(facts)) as writer:
        writer.write_batch(batch.replace_schema_metadata(facts))
    write_atomic(path, sink.getvalue().to_pybytes())


def read_arrow(path: Path) -> tuple[Encoded, EncodingReport] | None:
    """Map a file of :func:`write_arrow` into memory; None when there is none or it is damaged."""
    import pyarrow as pa

    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        facts = {key.decode(): value.decode() for key, value in (reader.schema.metadata or {}).items()}
        batch = reader.get_batch(0)
        tokens, trainable = batch.column("tokens"), batch.column("trainable")
        encoded = Encoded(
            _values(tokens.values),
            _values(trainable.values).view(np.bool_),
            _values(tokens.offsets),
            facts.get("pairs") == "True",
        )
        if facts["sha256"] != _content_digest(encoded):
            raise ValueError("the contents do not match their digest")
        return encoded, report(encoded, int(facts["truncated"]))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, IndexError, pa.ArrowException) as error:
        logger.warning("%s can not be read and is made anew: %s", path, error)
        return None


def _values(array: Any) -> NDArray[Any]:
    """An Arrow array of numbers in place. Its own ``to_numpy`` imports pandas: a third of a second."""
    if array.null_count:
        raise ValueError("values are missing")
    kind, end = array.type.to_pandas_dtype(), array.offset + len(array)
    return np.frombuffer(array.buffers()[1] or b"", kind, end)[array.offset :]


def _content_digest(encoded: Encoded) -> str:
    sha = hashlib.sha256()
    for part in (encoded.tokens, encoded.trainable, encoded.offsets):
        sha.update(part.data)
    return sha.hexdigest()
