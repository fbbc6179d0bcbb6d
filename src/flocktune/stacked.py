"""Several clients' local training at once, on one frozen base: what each would do alone, in fewer and larger products.

Every step takes the next batch of each client, all of them through the base in one forward pass; each client's adapter
acts on its own tokens. Losses are summed, each over its own labels, so that no gradient depends on another client; each
client's is penalised, adjusted and clipped, and its optimiser stepped, as :func:`flocktune.training.fit` does. Results
differ from it by the rounding of sums whose order depends on which rows are multiplied together.

N label positions of a pass, C clients, P values of an adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from flocktune.config.schema import LocalConfig
from flocktune.data.batching import Batch
from flocktune.data.merging import Merged, merged
from flocktune.errors import FlocktuneError
from flocktune.models.lora import Adapter, Snapshot
from flocktune.models.low_rank import Spans
from flocktune.models.stack import Stack, stacked_names
from flocktune.training import (
    Adjust,
    Penalty,
    learning_rate,
    optimizer_of,
    steps_of,
    token_losses,
    told,
    training_mode,
)
from flocktune.types import Mean, Tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Prefix(Protocol):
    """What comes out of a frozen part of the model, which a client's prefix keeps between epochs."""

    def token_losses(self, batch: Batch, parts: Sequence[tuple[Any, Batch]]) -> Tensor:
        """Nats at each label [N] of ``batch``, which has the rows of ``parts``: each with its own prefix."""
        ...


@dataclass(frozen=True, eq=False)
class Job:
    """One client's local training: the arguments of :func:`flocktune.training.fit`.

    ``trained``: names of the factors to train. ``start``: the whole adapter as it is at the start.
    """

    adapter: Adapter
    trained: tuple[str, ...]
    start: Snapshot
    batches: Iterable[Batch]
    settings: LocalConfig
    total_steps: int
    first_step: int
    seed: int
    penalty: Penalty | None
    adjust: Adjust | None
    prefix: Prefix | None = None

    def goes_with(self, other: Job) -> bool:
        """Whether both can be trained at once: modules of which nothing is trained must be the same for both."""
        same = self.adapter is other.adapter and self.trained == other.trained and self.settings == other.settings
        prefixed = (self.prefix is None) == (other.prefix is None)
        return same and prefixed and not self.start.differs(other.start, stacked_names(self.adapter, self.trained))


@dataclass(frozen=True)
class Trained:
    """What came of a job: the trained factors (float32, on the CPU), and metrics as those of ``fit``."""

    tensors: Tensors
    metrics: Mapping[str, Mean]


def fit_stacked(jobs: Sequence[Job], *, packed: bool, tokens_at_once: int) -> list[Trained | Exception]:
    """Do all of ``jobs``, which go with each other. One that fails gives its error, and the others go on.

    ``packed``: whether rows are laid end to end for a forward pass, or padded; ``tokens_at_once``: how many, with
    padding, of all clients, go through the model at a time, but for a batch that alone has more.
    """
    first = jobs[0]
    adapter, model = first.adapter, first.adapter.model
    adapter.restore(first.start)
    stack = Stack(adapter, first.trained, len(jobs))
    clients = [_Client(job, place, stack) for place, job in enumerate(jobs)]
    optimizer = optimizer_of([{"params": [client.row]} for client in clients], first.settings)
    with stack.attached(), training_mode(model, [adapter.parameters[name] for name in first.trained]):
        while active := [client for client in clients if client.next_step()]:
            nats = stack.values.new_zeros(len(jobs))
            for number in range(first.settings.accumulate):
                parts = [(client, client.step[number]) for client in active if number < len(client.step)]
                for some in _passes(parts, packed, tokens_at_once):
                    _backward(model, stack, some, nats, packed)
            for client in active:
                client.alone()
            _clip(stack, first.settings.clip_norm)
            for group, client in zip(optimizer.param_groups, clients, strict=True):
                group["lr"] = client.rate()
            optimizer.step()
            stack.sums.zero_()
            for client, value in zip(clients, nats.unbind(), strict=True):
                client.count(value)
    return [client.outcome() for client in clients]


class _Client:
    """One job on its way: what its steps need of its own."""

    def __init__(self, job: Job, place: int, stack: Stack) -> None:
        self.job, self.place, self.stack = job, place, stack
        stack.load(place, job.start.factors)
        self.row = nn.Parameter(stack.values[place, : stack.trained])
        self.steps = steps_of(job.batches, job.settings)
        self.step: list[Batch] = []
        self.drops = any(layer.dropout for layer in job.adapter.layers.values())
        self.generator = torch.Generator(stack.values.device).manual_seed(job.seed)
        corrected = job.penalty is not None or job.adjust is not None
        self.parameters = stack.parameters(place, job.trained) if corrected else {}
        self.losses: list[Tensor] = []
        self.units = self.tokens = 0
        self.error: Exception | None = None

    def next_step(self) -> bool:
        """Take the next step's batches; False when there are none, or the client has failed."""
        try:
            self.step = next(self.steps, []) if self.error is None else []
        except Exception as error:  # its own data's fault, and no other client's
            self.step, self.error = [], error
        # A row without a gradient is not stepped.
        self.row.grad = self.stack.sums[self.place, : self.stack.trained] if self.step else None
        return bool(self.step)

    @property
    def step_units(self) -> int:
        return sum(batch.units for batch in self.step)

    def alone(self) -> None:
        """What changes this client's gradient alone, and can go wrong for it alone."""
        try:
            if self.job.penalty is not None:
                self.job.penalty(self.parameters).backward()
            if self.job.adjust is not None:
                self.job.adjust(self.parameters)
        except Exception as error:
            self.error, self.row.grad = error, None

    def rate(self) -> float:
        job = self.job
        return learning_rate(job.settings, job.first_step + len(self.losses), job.total_steps)

    def count(self, nats: Tensor) -> None:
        if self.step:
            self.losses.append(nats)
            self.units += self.step_units
            self.tokens += sum(batch.tokens for batch in self.step)

    def outcome(self) -> Trained | Exception:
        """What came of it."""
        if self.error is not None:
            return self.error
        tensors = {
            name: value.cpu().clone(memory_format=torch.contiguous_format)
            for name, value in self.stack.tensors(self.place, self.job.trained).items()
        }
        try:
            return Trained(tensors, told(self.losses, self.units, self.tokens, tensors, self.job.first_step))
        except FlocktuneError as error:
            return error


Part: TypeAlias = tuple[_Client, Batch]


NARROWEST = 0.8
"""Of the widest batch's width: narrower ones are not padded to it, but go through the model by themselves."""


def _passes(parts: Sequence[Part], packed: bool, tokens_at_once: int) -> Iterator[list[Part]]:
    """Parts that go through the model together, of one batch a client.

    They are so few that memory holds them and, where rows are padded, so much alike that padding costs little.
    """
    if not packed:
        parts = sorted(parts, key=lambda part: -int(part[1].lengths.max()))  # stable
    some: list[Part] = []
    rows = tokens = width = 0
    for client, batch in parts:
        own = int(batch.lengths.max())
        rows, tokens, width = rows + batch.rows, tokens + batch.tokens, max(width, own)
        too_many = (tokens if packed else rows * width) > tokens_at_once
        if some and (too_many or not (packed or own >= NARROWEST * width)):
            yield some
            some, rows, tokens, width = [], batch.rows, batch.tokens, own
        some.append((client, batch))
    if some:
        yield some


def _backward(model: PreTrainedModel, stack: Stack, parts: Sequence[Part], nats: Tensor, packed: bool) -> None:
    """One forward and backward pass: gradients are added to the clients' sums, and losses to ``nats`` [C]."""
    device = nats.device
    together = merged([batch for _, batch in parts], packed=packed)
    stack.spanning(_spans(parts, together, device))
    batch = together.batch.to(device)
    prefix = parts[0][0].job.prefix
    if prefix is None:
        losses = token_losses(model, batch)
    else:
        losses = prefix.token_losses(batch, [(client.job.prefix, own.to(device)) for client, own in parts])
    units = np.repeat([1 / max(1, client.step_units) for client, _ in parts], together.labels)
    (losses * torch.from_numpy(units).to(losses, non_blocking=True)).sum().backward()
    sums = [piece.sum() for piece in losses.detach().split(together.labels)]
    for (client, _), own in zip(parts, sums, strict=True):
        nats[client.place] += own


def _spans(parts: Sequence[Part], together: Merged, device: torch.device) -> Spans:
    clients, tokens = tuple(client.place for client, _ in parts), together.tokens
    if not parts[0][0].drops:
        return Spans(clients, tokens)
    drawn = tuple(batch.input_ids.numel() for _, batch in parts)
    places = tuple(place.to(device, non_blocking=True) for place in together.places)
    return Spans(clients, tokens, tuple(client.generator for client, _ in parts), drawn, places)


def _clip(stack: Stack, most: float) -> None:
    """Every client's gradient to a norm of at most ``most``; 0 is off."""
    if most:
        own = stack.sums[:, : stack.trained]
        norms = torch.linalg.vector_norm(own, dim=1, keepdim=True)
        own.mul_((most / (norms + 1e-6)).clamp(max=1.0))
