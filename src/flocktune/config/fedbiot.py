"""What clients of FedBiOT get in place of the full model, and how it is aligned: settings of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from flocktune.config.data import Columns
from flocktune.config.names import EMBEDDED_PUBLIC
from flocktune.config.numbers import Count, NonNegative, Positive, PositiveFloat


@dataclass(frozen=True)
class EmulatorConfig:
    """What clients get instead of the full model (arXiv 2406.17706, section 3.2): some layers, and never the others.

    ``path``: a bundle made by ``flocktune compress``; None makes one of ``model`` when the run starts, by the next four
    settings. ``adapter_layers`` are tuned: the last ones, or (Offsite-Tuning) as many at either end. Of the others the
    fraction ``drop`` is left out: in even steps, or those that change hidden states of the public rows the least.
    ``cache``: where a client keeps the emulator's output for its rows within a round, and the server that of the full
    model's layers below the adapter within an alignment, at most ``cache_mb`` megabytes of rows of one data set.
    """

    path: str | None = None
    adapter_layers: Positive = 2
    drop: Annotated[float, Field(ge=0, lt=1)] = 0.5
    placement: Literal["last", "first_and_last"] = "last"
    choice: Literal["uniform", "importance"] = "uniform"
    quantization: Literal["none", "8bit", "4bit"] = "none"
    cache: Literal["memory", "host", "disk", "none"] = "memory"
    cache_mb: Positive = 1024
    cache_dtype: Literal["model", "bfloat16"] = "model"


@dataclass(frozen=True)
class AlignmentConfig:
    """How the server distils the full model into the emulator's LoRA, on public data (arXiv 2406.17706, equation 7).

    ``public``: as ``data.train``. ``first_steps`` before round 1, ``steps`` before every later round (0 is never).
    ``kl_weight``: lambda of the Kullback-Leibler term. ``layerwise_weight``: weight of the hidden states after every
    other kept layer, 0 is off. ``fidelity_rows``: rows on which the divergence is measured, 0 is off.
    """

    public: str = EMBEDDED_PUBLIC
    columns: Columns = field(default_factory=Columns)
    max_rows: Positive | None = None
    first_steps: Count = 200
    steps: Count = 10
    batch_size: Positive = 8
    lr: PositiveFloat = 1e-3
    clip_norm: NonNegative = 1.0
    kl_weight: NonNegative = 1.0
    layerwise_weight: NonNegative = 0.0
    fidelity_rows: Count = 64
