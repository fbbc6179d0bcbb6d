"""What the head of a language model is asked for: logits, or losses, at the label positions alone.

The head and its loss are most of a step's memory where the vocabulary is large: N positions of V logits, and their
gradient. But the head is frozen: all that comes back from it is the gradient of its input, [N, D], and a token's
gradient is that of its own loss, times what its loss counts. So both are computed at once, a few positions at a time,
and no more than those positions' logits are ever held.

B rows, T tokens, N label positions in a batch, D width, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flocktune.errors import Problem, UserError
from flocktune.models.layers import head_logits, layer_stack
from flocktune.models.row_attention import rows_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from flocktune.data.batching import Batch

LOGITS_AT_ONCE = 2**22
"""How many logits are held at once on a CPU: 16 MB in float32. Fewer cost time, more save none."""

LOGITS_AT_ONCE_ON_GPU = 2**25
"""More, for a product of few positions reads the head's weights for little: 1,048 of a vocabulary of 32,000."""


def label_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Logits at the N label positions, [N, V], in float32 at least.

    The head sees hidden states there only ([1, N, D] instead of [B, T, D]), which is exact because all that follows
    it acts on each position alone.
    """
    head = _head_of(model)

    def gather(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (_states_at(batch.label_index, inputs[0]).unsqueeze(0), *inputs[1:])

    with head.register_forward_pre_hook(gather), rows_of(batch):
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    return _at_least_float32(logits.flatten(0, 1))


def token_losses(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Negative log-likelihood in nats of each of ``batch.targets``, [N], in float32 at least.

    [N, V] is not held where the head is linear and frozen and its output is what the model hands on.
    """
    head = _head_of(model)
    if not _is_linear_and_frozen(head):
        return F.cross_entropy(label_logits(model, batch), batch.targets, reduction="none")
    states, plain = _before_head(model, head, batch)
    if plain:
        return linear_cross_entropy(states, head.weight, head.bias, batch.targets)
    logits = head_logits(model, layer_stack(model), states)
    return F.cross_entropy(_at_least_float32(logits), batch.targets, reduction="none")


def linear_cross_entropy(states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Cross-entropy [N] in nats of ``states`` [N, D] through a frozen linear head: weight [V, D], bias [V].

    Only ``states`` get a gradient.
    """
    return _LinearCrossEntropy.apply(states, weight, bias, targets)


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradient in one pass. As no loss sees another's position, any weights of them come in afterwards."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        at_once = LOGITS_AT_ONCE if states.device.type == "cpu" else LOGITS_AT_ONCE_ON_GPU
        positions = max(1, at_once // len(weight))
        wanted = ctx.needs_input_grad[0]
        losses, changes = [], []
        for some, right in zip(states.split(positions), targets.unsqueeze(1).split(positions), strict=True):
            log_p = _at_least_float32(F.linear(some, weight, bias)).log_softmax(-1)
            losses.append(-log_p.gather(1, right).squeeze(1))
            if wanted:
                p = log_p.exp_()
                p.scatter_add_(1, right, p.new_full(right.shape, -1.0))
                changes.append(p.to(weight.dtype) @ weight)
        if wanted:
            ctx.save_for_backward(torch.cat(changes))
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *weights: Tensor) -> tuple[Tensor | None, ...]:
        (change,) = ctx.saved_tensors
        return (change * weights[0].unsqueeze(1)).to(change.dtype), None, None, None


def _before_head(model: PreTrainedModel, head: nn.Module, batch: Batch) -> tuple[Tensor, bool]:
    """What the head would get at the label positions, [N, D], and whether the model hands on what the head makes of it.

    The head itself is run on no position, and what the model does to its output is seen on that.
    """
    states: list[Tensor] = []
    made: list[tuple[Tensor, int]] = []

    def gather(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states.append(_states_at(batch.label_index, inputs[0]))
        return (inputs[0][:, :0], *inputs[1:])

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        made.append((output, _changes(output)))

    with head.register_forward_pre_hook(gather), head.register_forward_hook(keep), rows_of(batch):
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    [found], [(output, changes)] = states, made
    return found, logits is output and _changes(output) == changes >= 0


def _changes(tensor: Tensor) -> int:
    """How often ``tensor`` was changed in place; -1 where nobody counts."""
    return -1 if tensor.is_inference() else tensor._version


def _states_at(positions: Tensor, hidden: Tensor) -> Tensor:
    """Flat ``positions`` [N] of [B, T, D], as [N, D]."""
    return hidden.flatten(0, 1).index_select(0, positions)


def _head_of(model: PreTrainedModel) -> Any:
    head = model.get_output_embeddings()
    if head is None:
        raise UserError(Problem("model.path", "a language model with an output head", type(model).__name__))
    return head


def _is_linear_and_frozen(head: nn.Module) -> bool:
    """Whether it is torch's own linear module, run as it is."""
    return (
        type(head) is nn.Linear and "forward" not in vars(head) and not any(p.requires_grad for p in head.parameters())
    )


def _at_least_float32(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()
