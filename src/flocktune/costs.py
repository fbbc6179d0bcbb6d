"""What one step costs a client: operations, and what is kept for the backward pass; counted, not timed.

A product of [m, k] and [k, n] is 2 m k n FLOPs, forward or backward. Only matrix products and attention are counted:
norms, activations and the loss are a few operations an element. Attention counts as if it were not causal, and its
backward pass computes the scores again, as torch's own formulas say (torch.utils.flop_counter). Frozen weights need no
gradient, so a layer's backward pass costs what its forward pass does: the gradient of its input (arXiv 2406.17706
counts the same).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from flocktune.algorithms.local import training_only
from flocktune.algorithms.preferences import Preferences
from flocktune.algorithms.prefix import PrefixCache
from flocktune.config.schema import Dpo, EmulatorConfig, RunConfig
from flocktune.data.batching import Batch, training_batches
from flocktune.data.encoding import Encoded
from flocktune.models.layers import layer_stack, layers_of
from flocktune.models.lora import Adapter
from flocktune.models.lora_module import features
from flocktune.models.split import SplitPlan
from flocktune.resident import Base
from flocktune.seeds import derive_seed
from flocktune.training import Loss, next_token_loss, training_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOG = logging.getLogger(__name__)

ATTENTION_KERNELS = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
"""aten::_scaled_dot_product_*. Torch has no formula for a CPU's, and not in every version one for grouped heads."""

IN_PLACE = (torch.ops.aten.addmm_, torch.ops.aten.baddbmm_)
"""Products for which torch has formulas only where they are not in place."""


@dataclass(frozen=True)
class StepCost:
    """FLOPs of one forward and backward pass of a batch, without the optimiser; ``tokens`` leaves padding out.

    What is in no decoder layer is the head, mostly, whose gradient is computed with its loss, in the forward pass.
    ``activation_bytes``: what the forward pass leaves for the backward
    pass, each piece of memory once, without the model's own weights.
    """

    tokens: int
    layer_forward_flops: int
    layer_backward_flops: int
    other_forward_flops: int
    other_backward_flops: int
    activation_bytes: int

    @property
    def forward_flops(self) -> int:
        """In decoder layers and elsewhere."""
        return self.layer_forward_flops + self.other_forward_flops

    @property
    def backward_flops(self) -> int:
        """In decoder layers and elsewhere; layers that are computed again (gradient checkpointing) count here."""
        return self.layer_backward_flops + self.other_backward_flops

    @property
    def flops(self) -> int:
        """All of them."""
        return self.forward_flops + self.backward_flops

    @property
    def flops_per_token(self) -> float:
        """All of them, by tokens without padding: what padding costs is in it."""
        return self.flops / self.tokens


def measure_step(model: PreTrainedModel, batch: Batch, loss: Loss = next_token_loss) -> StepCost:
    """The cost of ``loss`` on ``batch`` and of its gradients for all parameters that want one.

    Modules that own such a parameter are in training mode, as in :func:`flocktune.training.fit`. Gradients, modes and
    random state are afterwards what they were. Raises UserError for a model without a list of decoder layers.
    """
    layers = list(layers_of(model, layer_stack(model)))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = trained[0].device
    placed, kept = batch.to(device), Kept(model)
    counter = flop_counter()
    meter = _Meter(counter.get_total_flops)
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        training_mode(model, trained),
        meter.watching(layers),
        counter,
    ):
        with saved_tensors_hooks(kept.pack, kept.unpack):
            nats = loss(model, placed)
        forward, within = counter.get_total_flops(), meter.within
        torch.autograd.grad(nats, trained, allow_unused=True)
    total = counter.get_total_flops()
    # Without a gradient at any layer's output, all of the backward pass is above them.
    above = (total if meter.reached is None else meter.reached) - forward
    return StepCost(batch.tokens, within, total - forward - above, forward - within, above, kept.bytes)


def client_cost(
    config: RunConfig,
    base: Base,
    rows: Encoded,
    clients: Mapping[str, NDArray[np.int64]],
    cohort: Sequence[str],
    plan: SplitPlan | None = None,
) -> dict[str, dict[str, float]]:
    """``client_cost`` of a run's summary: the first step of the first of ``cohort``, who took part in the first round.

    ``clients``: which of ``rows`` are whose. ``plan``: of FedBiOT's emulator, which ``base`` is then.
    ``flops_per_token_cached`` is of a later local epoch, in which the emulator's output is known. Nothing for a run
    that trains nothing; nothing but a warning when the model's operations can not be counted.
    """
    if config.method == "base" or not config.rounds:
        return {}
    try:
        batch = _first_batch(config, base.pad_id, rows, clients[cohort[0]], cohort[0])
        steps = _steps(base.adapter, batch, plan, config)
    except Exception as error:  # whatever it is: a finished run must not fail for being measured
        _LOG.warning("the summary is without client_cost: %s", error)
        return {}
    first = steps[0]
    if first.layer_forward_flops < least_forward_flops(base.adapter) * batch.tokens:
        kind = type(base.model).__name__
        _LOG.warning("the summary is without client_cost: not all that %s computes can be counted", kind)
        return {}
    found = {
        "tokens_per_step": first.tokens,
        "flops_per_step": first.flops,
        "forward_flops_per_step": first.forward_flops,
        "backward_flops_per_step": first.backward_flops,
        "flops_per_token_first": first.flops_per_token,
        "layer_flops_per_token_first": (first.layer_forward_flops + first.layer_backward_flops) / first.tokens,
        "activation_bytes": first.activation_bytes,
    }
    if len(steps) > 1:
        found["flops_per_token_cached"] = steps[1].flops_per_token
    return {"client_cost": found}


def least_forward_flops(adapter: Adapter) -> int:
    """FLOPs a token in the linear modules that ``adapter`` is beside: a forward pass of fewer was not all counted."""
    sizes = (features(layer.base) for layer in adapter.layers.values())
    return 2 * sum(inputs * outputs for inputs, outputs in sizes)


def _first_batch(config: RunConfig, pad_id: int, rows: Encoded, mine: NDArray[np.int64], client: str) -> Batch:
    """What ``client`` began round 1 with."""
    batches = training_batches(
        rows,
        mine,
        batch_size=config.local.batch_size,
        batching=config.data.batching,
        pad_id=pad_id,
        seed=derive_seed(derive_seed(config.seed, 0, client), "batches"),
        steps=1,
        epochs=None,
    )
    return next(iter(batches))


def _steps(adapter: Adapter, batch: Batch, plan: SplitPlan | None, config: RunConfig) -> list[StepCost]:
    """A client's first step, and with a cached emulator the same rows' step in a later epoch.

    In preference tuning a row's first step has the reference's forward pass in it.
    """
    trained = [name for name in adapter.parameters if plan is None or plan.in_adapter(name)]
    dpo, loss = config.local.loss, next_token_loss
    if isinstance(dpo, Dpo):
        loss = Preferences(dpo, adapter, trained).loss()
    if plan is None:
        with training_only(adapter, trained):
            return [measure_step(adapter.model, batch, loss)]
    settings = config.emulator or EmulatorConfig()
    prefix = PrefixCache(adapter.model, plan.stack, plan.frozen, settings, above=loss)
    with training_only(adapter, trained):
        times = 1 if settings.cache == "none" else 2
        return [measure_step(adapter.model, batch, prefix.loss) for _ in range(times)]


class Kept:
    """What autograd saves: storages by address, each once, without those of the model."""

    def __init__(self, model: nn.Module) -> None:
        self.own = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
        self.sizes: dict[int, int] = {}

    def pack(self, saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.sizes[storage.data_ptr()] = storage.nbytes()  # held until the backward pass: no address comes twice
        return saved

    @staticmethod
    def unpack(saved: Tensor) -> Tensor:
        return saved

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())


class _Meter:
    """Reads a counter where decoder layers begin and end.

    ``within``: counted in layers so far, in a forward pass. ``reached``: the count when the backward pass came to the
    first output of a layer. From there on it is in layers: what lies below them, the embedding, has no products.
    """

    def __init__(self, count: Callable[[], int]) -> None:
        self.count = count
        self.within = self.entered = 0
        self.reached: int | None = None

    @contextmanager
    def watching(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        with ExitStack() as stack:
            for layer in layers:
                stack.callback(layer.register_forward_pre_hook(self._enter).remove)
                stack.callback(layer.register_forward_hook(self._leave).remove)
            yield

    def _enter(self, *_: Any) -> None:
        self.entered = self.count()  # a pass that is broken off before a layer never leaves it

    def _leave(self, _: nn.Module, __: Any, output: Any) -> None:
        self.within += self.count() - self.entered
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(self._backward)

    def _backward(self, _: Tensor) -> None:
        if self.reached is None:
            self.reached = self.count()


def flop_counter() -> FlopCounterMode:
    """Torch's counter, that knows attention's kernels and products in place, too."""

    def product(_: Sequence[int], left: Sequence[int], right: Sequence[int], *__: Any, **___: Any) -> int:
        return 2 * math.prod(left) * right[-1]

    return FlopCounterMode(display=False, custom_mapping={**_attention_formulas(), **dict.fromkeys(IN_PLACE, product)})


def _attention_formulas() -> dict[Any, Any]:
    """Kernel -> FLOPs of its tensors' shapes [B, heads, T, width of a head], for heads that share keys too."""

    def forward(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
        batch, heads, length, width = query
        return 2 * batch * heads * length * key[2] * (width + value[3])

    def backward(
        _: Any, query: Sequence[int], key: Sequence[int], value: Sequence[int], *__: Any, **___: Any
    ) -> int:  # the scores again, and gradients of scores, values, queries and keys
        batch, heads, length, width = query
        return 2 * batch * heads * length * key[2] * (3 * width + 2 * value[3])

    found: dict[Any, Any] = {}
    for kernel in ATTENTION_KERNELS:
        for suffix, formula in (("", forward), ("_backward", backward)):
            name = f"_scaled_dot_product_{kernel}{suffix}"
            if hasattr(torch.ops.aten, name):
                found[getattr(torch.ops.aten, name)] = formula
    return found
