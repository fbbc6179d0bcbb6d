"""Preference tuning: direct preference optimisation (DPO, arXiv 2305.18290) as a client's local loss.

For a prompt x with a chosen answer c and a rejected one r, equation 7:

    loss = -log sigmoid(m),    m = beta ((log p(c|x) - log q(c|x)) - (log p(r|x) - log q(r|x)))

p is the model with the adapter, q the reference: the base without one, or the adapter that the run starts from. With
label smoothing s (conservative DPO) the loss is -(1 - s) log sigmoid(m) - s log sigmoid(-m). A log-probability is a
sum over an answer's label tokens; beta (log p - log q) is an answer's reward.

What we do differently from the usual code: the reference is the resident model itself with other factors in its
adapter, so no second model is in memory; its log-probabilities are computed once a row and task; the head sees label
positions only.

P pairs, R = 2 P sequences, N label positions in a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flocktune.config.losses import Dpo
from flocktune.data.batching import Batch
from flocktune.interfaces import ClientHalf, Memory, ServerHalf, State
from flocktune.models.head import token_losses
from flocktune.models.lora import Adapter
from flocktune.tensors import group, prefixed, without
from flocktune.types import ClientTask, Mean, Tensors, Update

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REFERENCE = "reference"
"""The group of a state and a message that holds the reference's adapter, when it is not the base."""

PREFERENCE_METRICS = ("reward_accuracy", "prefers_chosen", "reward_margin", "chosen_log_prob", "rejected_log_prob")
"""Means over pairs: is the chosen answer's reward the higher one; is its log-probability; the difference of rewards;
nats of each answer. Both shares count a tie as no."""


def sequence_log_probs(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The log-probability of each sequence's label tokens, summed: float32 [R], in nats."""
    each = -token_losses(model, batch)
    # Not a scatter: on a GPU its sums are in no fixed order, and a resumed run would not be the same to the bit.
    return torch.stack([part.sum() for part in each.split(batch.labels.tolist())])


def pair_losses(policy: Tensor, reference: Tensor, settings: Dpo) -> tuple[Tensor, Tensor]:
    """Log-probabilities [R], chosen before rejected, of policy and reference -> losses [P] and rewards [2, P]."""
    rewards = settings.beta * (policy - reference).view(2, -1)
    margins = rewards[0] - rewards[1]
    smoothing = settings.label_smoothing
    losses = -(1 - smoothing) * F.logsigmoid(margins) - smoothing * F.logsigmoid(-margins)
    return losses, rewards


class PreferenceLoss:
    """The loss of one client in one task, or of one evaluation.

    ``reference``: the factors that make ``adapter``'s model the reference; the others stay as they are. Its
    log-probabilities are kept by sequence, so that later epochs need no second forward pass: they do not change in a
    task.
    """

    def __init__(self, settings: Dpo, adapter: Adapter, reference: Tensors) -> None:
        self.settings, self.adapter, self.reference = settings, adapter, reference
        self.known: dict[int, Tensor] = {}
        self._told: list[Tensor] = []

    def __call__(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """The losses of all pairs of ``batch``, summed: a float32 scalar."""
        # Before the policy's forward pass: autograd wants the factors as that pass left them.
        reference = self._reference(model, batch)
        policy = sequence_log_probs(model, batch)
        losses, rewards = pair_losses(policy, reference, self.settings)
        self._tell(policy.detach().view(2, -1), rewards.detach())
        return losses.sum()

    def anew(self) -> PreferenceLoss:
        """The same loss, which has seen nothing yet."""
        return PreferenceLoss(self.settings, self.adapter, self.reference)

    def metrics(self) -> dict[str, Mean]:
        """:data:`PREFERENCE_METRICS` over all pairs so far."""
        if not self._told:
            return {}
        pairs = torch.cat(self._told, dim=1).double().cpu()
        return {name: Mean(float(row.sum()), len(row)) for name, row in zip(PREFERENCE_METRICS, pairs, strict=True)}

    def _tell(self, policy: Tensor, rewards: Tensor) -> None:
        margins = rewards[0] - rewards[1]
        self._told.append(torch.stack([margins > 0, policy[0] > policy[1], margins, policy[0], policy[1]]))

    @torch.no_grad()
    def _reference(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        index = [int(sequence) for sequence in batch.index]
        if any(sequence not in self.known for sequence in index):
            with self.adapter.holding(self.reference):
                found = sequence_log_probs(model, batch)
            self.known.update(zip(index, found.unbind(), strict=True))
        return torch.stack([self.known[sequence] for sequence in index])


def measure_preferences(loss: PreferenceLoss, model: PreTrainedModel, batches: Iterable[Batch]) -> dict[str, Mean]:
    """``loss`` (a pair) and :data:`PREFERENCE_METRICS` of ``model`` over ``batches``; nothing without a batch."""
    device = next(model.parameters()).device
    losses, pairs = [torch.zeros((), device=device)], 0
    with torch.no_grad():
        for batch in batches:
            losses.append(loss(model, batch.to(device)))
            pairs += batch.units
    return {"loss": Mean(float(torch.stack(losses).double().sum().cpu()), pairs), **loss.metrics()}


def no_adapter(adapter: Adapter, names: Iterable[str] | None = None) -> Tensors:
    """Factors with which ``adapter``, or its factors ``names``, adds nothing: the base is the reference."""
    return {name: torch.zeros_like(adapter.parameters[name]) for name in (names or adapter.parameters)}


class Preferences:
    """How clients of one process get their losses; ``names`` are the factors that they train."""

    def __init__(self, settings: Dpo, adapter: Adapter, names: Sequence[str]) -> None:
        self.settings, self.adapter = settings, adapter
        self.reference = no_adapter(adapter, names)

    def loss(self) -> PreferenceLoss:
        """A new one, for one task."""
        return PreferenceLoss(self.settings, self.adapter, self.reference)


def with_its_reference(half: ClientHalf, preferences: Preferences | None) -> ClientHalf:
    """``half`` with the reference that comes with its tasks, which it does not see itself."""
    if preferences is None:
        return half

    def train(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
        preferences.reference = group(task.tensors, REFERENCE) or preferences.reference
        return half(replace(task, tensors=_without_reference(task.tensors)), memory)

    return train


def with_reference(server: ServerHalf) -> ServerHalf:
    """``server``, and in state and message the adapter that it starts from: ``adapter/*`` of its first state.

    So clients need no file of it, and a resumed run has the same.
    """

    def init(tensors: Tensors) -> State:
        state = server.init(tensors)
        start = {name: value.clone() for name, value in group(state, "adapter").items()}  # files hold no tensor twice
        return {**state, **prefixed(REFERENCE, start)}

    def message(state: State, round: int) -> Tensors:
        return {**server.message(_without_reference(state), round), **_reference_of(state)}

    def addressed(message: Tensors, client: str) -> Tensors:
        own = _without_reference(message)
        part = server.addressed(own, client)
        return message if part is own else {**part, **_reference_of(message)}

    def prepare(state: State, round: int) -> tuple[State, Mapping[str, Any]]:
        prepared, told = server.prepare(_without_reference(state), round)
        return {**prepared, **_reference_of(state)}, told

    combine = server.combine
    return replace(
        server,
        init=init,
        message=message,
        step=lambda state, update: {**server.step(_without_reference(state), update), **_reference_of(state)},
        result=lambda state: server.result(_without_reference(state)),
        combine=None if combine is None else lambda updates, message: combine(updates, _without_reference(message)),
        addressed=addressed,
        returned=lambda message: server.returned(_without_reference(message)),
        prepare=prepare,
    )


def _without_reference(tensors: Tensors) -> Tensors:
    return without(tensors, REFERENCE)


def _reference_of(tensors: Tensors) -> Tensors:
    return {name: value for name, value in tensors.items() if name.startswith(f"{REFERENCE}/")}
