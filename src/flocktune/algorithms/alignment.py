"""FedBiOT's lower level: the server distils the full model into the emulator's LoRA (arXiv 2406.17706, equation 7).

    min_E  || h_emu(x) - h_full(x) ||^2 / rms(h_full)^2  +  lambda KL( p_full(A_t) || p_emu(E, A_t) )

h is the hidden state where the adapter above the emulator begins, p the next-token distribution of a whole model. The
teacher is the full model WITH the current adapter A_t, which stays fixed. Both terms are means over the tokens that
have a next one; the first is the mean over D, too, so it is the squared error relative to the teacher's mean square.

N positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flocktune.algorithms.prefix import PrefixCache
from flocktune.config.schema import AlignmentConfig, EmulatorConfig
from flocktune.data.batching import Batch
from flocktune.models.layers import head_logits, hidden_states, layers_of
from flocktune.models.lora import Adapter
from flocktune.models.row_attention import rows_of
from flocktune.models.split import SplitPlan
from flocktune.training import Loss
from flocktune.types import Mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS_AT_ONCE = 2**24
"""How many logits of a model are held at once: 64 MB in float32, 524 positions of a vocabulary of 32,000."""


@dataclass(frozen=True, eq=False)
class Pair:
    """The full model and its emulator, each with its adapter attached: the full model's is on the adapter's layers.

    ``below``: what comes out of the full model's layers below the adapter, for rows of one data set; those layers are
    nobody's to train, so a row passes them once.
    """

    full: Adapter
    emulator: Adapter
    plan: SplitPlan
    below: PrefixCache | None = None

    def remembering(self, settings: EmulatorConfig) -> Pair:
        """The same pair, for rows of one data set that may come again; kept as ``settings`` say, but never rounded.

        With adapter layers at the bottom there is nothing to remember.
        """
        if not self.plan.frozen:
            return self
        settings = replace(settings, cache_dtype="model")
        return replace(self, below=PrefixCache(self.full.model, self.plan.stack, self.plan.top, settings))

    def states(self, batch: Batch, *, full: bool, layerwise: bool) -> list[Tensor]:
        """Hidden states [N, D] at the batch's label positions: at the seam, what the head gets, after kept layers."""
        if full and self.below is not None and not layerwise:
            with self.below.given(batch):
                return replace(self, below=None).states(batch, full=True, layerwise=False)
        model = (self.full if full else self.emulator).model
        layers = layers_of(model, self.plan.stack)
        inner = self.plan.kept[1:] if layerwise else ()  # what goes into one is what came out of the one before
        points = [layers[index if full else self.plan.held.index(index)] for index in (self.plan.top, *inner)]
        points.insert(1, model.get_output_embeddings())
        with rows_of(batch):
            found = hidden_states(model, batch.input_ids, batch.position_ids, points)
        return [state.flatten(0, 1).index_select(0, batch.label_index) for state in found]


def alignment_loss(pair: Pair, settings: AlignmentConfig) -> Loss:
    """The loss above, summed over the N positions of a batch, as a function of the emulator's parameters."""
    layerwise = settings.layerwise_weight > 0

    def loss(model: PreTrainedModel, batch: Batch) -> Tensor:
        with torch.no_grad():
            wanted, wanted_top, *wanted_inner = pair.states(batch, full=True, layerwise=layerwise)
        got, got_top, *got_inner = pair.states(batch, full=False, layerwise=layerwise)
        total = relative_error(got, wanted)
        for inner, wanted_one in zip(got_inner, wanted_inner, strict=True):
            total = total + settings.layerwise_weight * relative_error(inner, wanted_one) / len(got_inner)
        if settings.kl_weight:
            total = total + settings.kl_weight * divergence(pair, wanted_top, got_top)
        return total

    return loss


def relative_error(got: Tensor, wanted: Tensor) -> Tensor:
    """``N ||got - wanted||^2 / ||wanted||^2`` of states [N, D], in float32."""
    return len(wanted) * (got.float() - wanted.float()).square().sum() / wanted.float().square().sum()


def divergence(pair: Pair, full_top: Tensor, emulator_top: Tensor, at_once: int = LOGITS_AT_ONCE) -> Tensor:
    """``sum_n KL(p_full || p_emu)`` in nats, from what goes into the heads, [N, D] each.

    Never more than ``at_once`` logits of either model are held: the others are computed in turn, and once more in the
    backward pass.
    """
    stack, full, emulator = pair.plan.stack, pair.full.model, pair.emulator.model
    vocabulary = full.config.get_text_config().vocab_size
    positions = max(1, at_once // vocabulary)

    def part(mine: Tensor, theirs: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = head_logits(full, stack, theirs).float().log_softmax(-1)
        got = head_logits(emulator, stack, mine).float().log_softmax(-1)
        return F.kl_div(got, wanted, reduction="sum", log_target=True)

    if len(full_top) <= positions:
        return part(emulator_top, full_top)
    pieces = zip(emulator_top.split(positions), full_top.split(positions), strict=True)
    return torch.stack([checkpoint(part, *piece, use_reentrant=False) for piece in pieces]).sum()


@dataclass(frozen=True)
class Fidelity:
    """How far the emulator is from the full model: ``kl`` in nats a token, ``hidden`` as in the loss."""

    kl: Mean
    hidden: Mean


@torch.no_grad()
def fidelity(pair: Pair, batches: Iterable[Batch]) -> Fidelity:
    """Both terms of the loss on these rows, with the adapters as they are now."""
    kl, hidden = Mean(), Mean()
    device = next(pair.full.model.parameters()).device
    for batch in batches:
        placed = batch.to(device)
        wanted, wanted_top = pair.states(placed, full=True, layerwise=False)
        got, got_top = pair.states(placed, full=False, layerwise=False)
        kl += Mean(float(divergence(pair, wanted_top, got_top)), len(got))
        hidden += Mean(float(relative_error(got, wanted)), len(got))
    return Fidelity(kl, hidden)
