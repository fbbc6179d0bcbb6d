"""How many clients a process trains at once: as many as the recipe's memory holds, and no other thing decides it.

What happens to be free on a machine is not looked at, so that the same recipe gives the same bits on every machine of
a kind.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from torch.autograd.graph import saved_tensors_hooks

from flocktune.algorithms.local import training_only
from flocktune.config.engines import InProcessEngine
from flocktune.config.privacy_rules import privacy_in_force
from flocktune.config.schema import FEDERATED, Dpo, RunConfig, SamplePrivacy
from flocktune.costs import Kept
from flocktune.data.batching import Batch
from flocktune.gathering import Together
from flocktune.models.lora import Adapter
from flocktune.models.recompute import is_checkpointed
from flocktune.models.row_attention import attend_by_rows
from flocktune.models.stack import mixes_clients, stacked_names
from flocktune.training import next_token_loss, training_mode

COPIES = 7
"""Of a client's factors while it trains: values, gradients, two moments of the optimiser; what it began with, what it
received and what it gives back."""

PASSING = 1.7
"""Bytes taken for each that is kept for the backward pass: values that pass, and what an allocator's gaps take."""

MOST = 64
"""Clients that ``auto`` trains at once: calls are few long before, and each has a thread."""

PROBED_TOKENS = 64


def together(settings: InProcessEngine, adapter: Adapter, trained: Collection[str]) -> Together | None:
    """How the clients of one process train ``trained`` factors of ``adapter``; None is one after another.

    Half of ``settings.stack_mb`` is for what clients have of their own, half for the tokens of one pass.
    """
    if settings.stack == 1 or not trained or _alone(adapter):
        return None
    values = sum(adapter.parameters[name].numel() for name in stacked_names(adapter, trained))
    width = clients_at_once(settings, values)
    tokens = int(settings.stack_mb * 2**19 / (PASSING * kept_bytes(adapter, trained)))
    return Together(width, max(1, tokens), attend_by_rows(adapter.model)) if width > 1 else None


def one_after_another(config: RunConfig) -> bool:
    """Whether clients are trained so whatever ``engine.stack`` says: on pairs of answers, on rows that are hidden,
    where no round waits for several, and in baselines, whose rounds are of one client."""
    private = isinstance(privacy_in_force(config), SamplePrivacy)
    apart = config.method not in FEDERATED or config.scheduling.buffered is not None
    return isinstance(config.local.loss, Dpo) or private or apart


def clients_at_once(settings: InProcessEngine, values: int) -> int:
    """How many clients of so many ``values`` each are trained at once, if there are as many."""
    if settings.stack != "auto":
        return settings.stack
    return min(MOST, max(1, settings.stack_mb * 2**19 // (4 * COPIES * values)))


def kept_bytes(adapter: Adapter, trained: Collection[str]) -> float:
    """Bytes that one token leaves for the backward pass: of a forward pass of some."""
    model = adapter.model
    device = next(iter(adapter.parameters.values())).device
    count = np.array([PROBED_TOKENS])
    ids = torch.zeros(1, PROBED_TOKENS, dtype=torch.long)
    batch = Batch(ids, None, torch.arange(PROBED_TOKENS), ids[0], np.arange(1), count, count).to(device)
    kept = Kept(model)
    with (
        training_only(adapter, trained) as parameters,
        training_mode(model, list(parameters.values())),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        saved_tensors_hooks(kept.pack, kept.unpack),
    ):
        nats = next_token_loss(model, batch)
    del nats
    return kept.bytes / PROBED_TOKENS


def _alone(adapter: Adapter) -> bool:
    """Whether clients of this model can not share a forward pass. Layers that are computed again would draw other
    dropout then: torch puts back its own generator, not those of clients."""
    drops = any(layer.dropout for layer in adapter.layers.values())
    return (drops and is_checkpointed(adapter.model)) or mixes_clients(adapter)
