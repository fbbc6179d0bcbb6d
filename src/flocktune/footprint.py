"""What a training step holds in memory, from shapes alone: it is run on the meta device, and what is alive is counted.

No weights are read and nothing is computed, so this needs no memory and works for any causal language model. It
follows the code: what autograd saves, logits, passing values of either pass, layers that are computed again. What a
kernel takes for itself while it runs is not seen.

The same recipe and data give the same numbers on every machine: the memory that happens to be free is not looked at.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flocktune.algorithms.local import training_only
from flocktune.config.schema import LocalConfig, LoraConfig, ModelConfig
from flocktune.data.batching import Batch, Batching, Indices
from flocktune.data.encoding import Encoded
from flocktune.environment import device_memory_bytes
from flocktune.models.lora import attach
from flocktune.models.recompute import checkpoint_layers
from flocktune.training import Loss, next_token_loss, training_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel


TAKEN = {True: 1.15, False: 1.7}
"""Bytes taken from a device for each that is alive at the peak, on CUDA or not. glibc's heap is torn by tensors of many
sizes: plain steps of models of 3.8, 7 and 110 million parameters took 1.3 to 1.8 times what was alive."""


@dataclass(frozen=True)
class BatchShape:
    """``rows`` of ``length`` tokens each, padding included, of which ``labels`` positions in all have a target."""

    rows: int
    length: int
    labels: int

    @property
    def tokens(self) -> int:
        """Padding included."""
        return self.rows * self.length


def largest_batch(rows: Encoded, mine: Indices, batch_size: int, batching: Batching) -> BatchShape:
    """What no micro-batch of a client's rows is larger than. Packed rows are one row of all their tokens."""
    size = min(batch_size, len(mine))
    targets = int(np.sort(rows.targets[mine])[::-1][:size].sum())
    if batching == "packed":
        return BatchShape(1, int(np.sort(rows.lengths[mine])[::-1][:size].sum()), targets)
    longest = int(np.diff(rows.offsets)[rows.sequences(mine)].max(initial=0))
    return BatchShape(size * (2 if rows.pairs else 1), longest, targets)


def training_bytes(
    skeleton: PreTrainedModel,
    lora: LoraConfig,
    trained: Callable[[str], bool],
    local: LocalConfig,
    shape: BatchShape,
    device: torch.device,
    *,
    recompute: bool = False,
) -> int:
    """What training takes from ``device`` beside the weights, with ``shape`` its largest batch.

    Of the factors that ``lora`` puts into ``skeleton``, on the meta device, those are trained whose names ``trained``
    holds to be. What a device's allocator takes beyond what is alive is in it. Raises UserError.
    """
    if recompute:
        checkpoint_layers(skeleton)
    held = attach(skeleton, lora, seed=0)
    with training_only(held, filter(trained, held.parameters)):
        return int(TAKEN[device.type == "cuda"] * step_bytes(held.model, shape)) + trained_bytes(held.model, local)


def recomputes(model: ModelConfig, needed: Callable[[], int], device: torch.device) -> bool:
    """Whether layers are computed again in the backward pass; ``auto``: whether there are not ``needed()`` bytes."""
    if model.gradient_checkpointing != "auto":
        return model.gradient_checkpointing
    return needed() > device_memory_bytes(device)


def trained_bytes(model: PreTrainedModel, local: LocalConfig) -> int:
    """Of trained parameters, their gradients and the optimiser's state, all float32: AdamW keeps two moments."""
    count = sum(value.numel() for value in model.parameters() if value.requires_grad)
    states = 2 if local.optimizer == "adamw" else int(local.momentum > 0)
    return 4 * (2 + states) * count


def step_bytes(model: PreTrainedModel, shape: BatchShape, loss: Loss = next_token_loss) -> int:
    """The most bytes alive at once in a forward and backward pass of ``model``, counted without its weights.

    Gradients of trained parameters count, the optimiser's state does not. A model that is on a real device is really
    run there. Every ``.grad`` is None afterwards.
    """
    trained = [value for value in model.parameters() if value.requires_grad]
    alive = _Alive([*model.parameters(), *model.buffers()])
    with training_mode(model, trained), _without_scores(), alive:
        torch.autograd.backward(loss(model, _zeros(shape, trained[0].device)))
    for value in trained:
        value.grad = None
    return alive.most


def _zeros(shape: BatchShape, device: torch.device) -> Batch:
    ids, places = (
        torch.zeros(size, dtype=torch.long, device=device) for size in ((shape.rows, shape.length), (shape.labels,))
    )
    lengths, labels = (np.full(shape.rows, count) for count in (shape.length, shape.labels // shape.rows))
    return Batch(ids, None, places, places, np.arange(shape.rows), lengths, labels)


class _Alive(TorchDispatchMode):
    """Bytes of all storages that operations make, each until nobody holds it, but for those of ``own``."""

    def __init__(self, own: Sequence[Tensor]) -> None:
        super().__init__()
        self.own = {value.untyped_storage()._cdata for value in own}
        self.held: dict[int, weakref.ref[Any]] = {}
        self.bytes = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1  # there are no values; what models ask of them is whether rows are not packed
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._see(value.untyped_storage())
        self.most = max(self.most, self.bytes)
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        at, size = storage._cdata, storage.nbytes()
        if at in self.own or at in self.held:
            return

        def gone(_: Any) -> None:
            self.bytes -= size
            del self.held[at]

        self.held[at] = weakref.ref(storage, gone)
        self.bytes += size


@contextmanager
def _without_scores() -> Iterator[None]:
    """Inside, attention keeps what it does on a device, where its scores are never whole: the meta device makes them.

    Put in the function's place, not by a mode: no mode is on in layers that the backward pass computes again.
    """
    own: Any = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        if attn_mask is not None or not query.is_meta:
            return own(query, key, value, attn_mask, **options)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(query, key, value, 0.0, options.get("is_causal", False), scale=options.get("scale"))[0]

    setattr(F, own.__name__, attention)
    try:
        yield
    finally:
        setattr(F, own.__name__, own)
