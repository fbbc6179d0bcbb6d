"""What stays in memory: base models with an adapter in them, and data sets as tokens.

Each is loaded once in a process and shared by every run that asks for the same one; only adapters are swapped.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from flocktune.config.schema import DataConfig, LoraConfig, ModelConfig
from flocktune.data.encoding import Encoded, EncodingReport, default_cache_folder, encode, encode_cached
from flocktune.data.examples import Example, examples_digest, rows_digest
from flocktune.data.sources import read_examples
from flocktune.models.load import load_model, load_tokenizer, model_digest, pad_id, pick_device
from flocktune.models.lora import Adapter, attach

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Base:
    """A resident base model with one adapter attached; every client and every run swaps its tensors in."""

    model: Any
    tokenizer: Any
    adapter: Adapter
    device: torch.device
    pad_id: int


@dataclass(frozen=True, eq=False)
class Instructions:
    """One data set, read and encoded once. ``digest`` is of what was read."""

    examples: Sequence[Example]
    encoded: Encoded
    report: EncodingReport
    digest: str

    @property
    def categories(self) -> list[str]:
        """The category of every row; a new list each time."""
        return [example.category for example in self.examples]

    def take(self, rows: Sequence[int]) -> Instructions:
        """Only these rows, in this order."""
        return replace(self, examples=[self.examples[row] for row in rows], encoded=self.encoded.take(rows))


def with_more(rows: Instructions, more: Sequence[Example], data: DataConfig, model: ModelConfig) -> Instructions:
    """``rows``, and ``more`` after them, encoded in the same way."""
    extra, _ = encode(
        more, load_tokenizer(model), template=data.template, max_tokens=data.max_tokens, train_on=data.train_on
    )
    mine = rows.encoded
    encoded = Encoded(
        np.concatenate([mine.tokens, extra.tokens]),
        np.concatenate([mine.trainable, extra.trainable]),
        np.concatenate([mine.offsets, mine.offsets[-1] + extra.offsets[1:]]),
    )
    return replace(rows, examples=[*rows.examples, *more], encoded=encoded)


_HELD: dict[tuple[ModelConfig, LoraConfig, str], Base] = {}


def load_base(model: ModelConfig, lora: LoraConfig, device: str, *, beside: int = 0) -> Base:
    """Load the base model and attach an adapter, or take those that are in memory already.

    Others are let go before it is loaded, but for the ``beside`` used last: FedBiOT needs two, the full model and its
    emulator. Raises UserError.
    """
    if model.gradient_checkpointing == "auto":  # for who does not train; who does has decided
        model = replace(model, gradient_checkpointing=False)
    key = (model, lora, device)
    if key not in _HELD:
        for other in list(_HELD)[: max(0, len(_HELD) - beside)]:
            del _HELD[other]
        _HELD[key] = _load_base(model, lora, device)
    _HELD[key] = _HELD.pop(key)  # the newest
    return _HELD[key]


def forget_models() -> None:
    """Let all models go: what their files hold, or what is in memory, is no longer the same."""
    _HELD.clear()


def _load_base(model: ModelConfig, lora: LoraConfig, device: str) -> Base:
    tokenizer = load_tokenizer(model)
    where = pick_device(device)
    network = load_model(model, where)
    _LOG.info("loaded %s on %s", model.path, where)
    return Base(network, tokenizer, attach(network, lora, seed=0), where, pad_id(tokenizer))


@lru_cache(maxsize=4)
def load_instructions(source: str, data: DataConfig, model: ModelConfig, *, pairs: bool = False) -> Instructions:
    """Read and encode one data set, from the token cache where it can; ``pairs``: as preference data.

    Raises UserError.
    """
    examples = read_examples(source, data.columns, max_rows=data.max_rows)
    encoded, report = encode_cached(
        examples,
        load_tokenizer(model),
        template=data.template,
        max_tokens=data.max_tokens,
        train_on=data.train_on,
        digest=examples_digest(examples),
        folder=default_cache_folder(),
        pairs=pairs,
    )
    if report.untrainable:
        _LOG.warning(
            "%s: %d of %d rows have nothing to learn from and are left out",
            source,
            len(report.untrainable),
            report.rows,
        )
    return Instructions(examples, encoded, report, rows_digest(examples))


base_digest = lru_cache(maxsize=4)(model_digest)
"""Once in a process, as the base itself: it may be gigabytes."""
