"""Sample-level differential privacy: DP-SGD (arXiv 1607.00133) by one client on its own rows.

A step takes each row with probability q, clips the gradient of every row alone, adds noise and divides by the q n rows
that are taken on average. Row gradients come from what goes into the low-rank path of a :class:`LoraLinear` and from
the gradient of what comes out; they equal those of a loop over single rows.

B rows, T tokens, R rank; a row's loss is the mean over its label tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from flocktune.config.privacy import SamplePrivacy
from flocktune.config.schema import LocalConfig
from flocktune.data.batching import Batch, collate, trainable_rows
from flocktune.data.encoding import Encoded
from flocktune.errors import FlocktuneError, Problem, UserError
from flocktune.interfaces import ClientHalf, Memory
from flocktune.models.lora_module import LoraLinear
from flocktune.privacy.accounting import Budget, calibrate
from flocktune.privacy.gaussian import GaussianMechanism
from flocktune.privacy.noise import derive_key, uniforms
from flocktune.tensors import digest
from flocktune.training import Gradient, Loss
from flocktune.types import ClientTask, Mean, Update

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEPS = "privacy/steps"
"""In a client's memory: steps that were taken on its rows so far."""


class BudgetSpent(FlocktuneError):
    """A client whose rows have no budget left for one more round."""


@dataclass(frozen=True, eq=False)
class PrivateRows:
    """One client's rows, and how they are hidden.

    ``steps``: of one round. ``rounds``: that the recipe plans. ``key``: the client's own secret, of which samples and
    noise are a function, with the rows and all that the task says. A task that is repeated gives the same bits. With
    another recipe, factor that is not trained, or row there are other samples and other noise: the same noise on two
    sums would show their difference in the clear.

    Formal guarantees: the updates of all rounds together are (epsilon, delta)-differentially private, as
    :attr:`budget` says of the steps taken, for neighbours that differ by one row, against everybody but the client
    itself: no server is trusted. How many rows there are is not hidden (the sampling probability and an update's
    weight tell), nor how long training took, nor a run that broke off because a value was not finite. A server that
    asks for a round twice with other tensors gets two updates, and an owner's side counts the steps of both.
    """

    settings: SamplePrivacy
    encoded: Encoded
    rows: Sequence[int]
    pad_id: int
    batch: int
    steps: int
    rounds: int
    key: bytes | None

    @cached_property
    def indices(self) -> Any:
        """Rows that have a target, int64 [n]."""
        return trainable_rows(self.encoded, self.rows)

    @property
    def sampling(self) -> float:
        """With which probability a step takes a row."""
        return min(1.0, self.batch / len(self.indices))

    @cached_property
    def budget(self) -> Budget:
        """Of every step on these rows."""
        own, planned = self.settings, self.steps * self.rounds
        noise = own.noise_multiplier
        if noise is None:
            noise = calibrate(own.accountant, self.sampling, planned, own.delta, own.epsilon or 0.0)
        most = own.epsilon or own.max_epsilon or math.inf
        return Budget(self.sampling, noise, own.delta, own.accountant, most)

    @cached_property
    def mechanism(self) -> GaussianMechanism:
        """Clipping and noise of one step."""
        expected = self.sampling * len(self.indices)
        return GaussianMechanism(self.settings.clip_norm, self.budget.noise_multiplier, expected, self.sampling)

    def of_task(self, task: ClientTask, received: Mapping[str, Tensor]) -> bytes:
        """The key of all that is drawn in a task. Raises FlocktuneError without the client's own."""
        if self.key is None:
            raise FlocktuneError(
                "differential privacy of rows needs a secret key of the client, and there is none here"
            )
        asked = task.config_digest, task.model_digest, digest(task.tensors), digest(received)
        return derive_key(self.key, "task", task.round, task.seed, *asked, self._rows_digest)

    @cached_property
    def _rows_digest(self) -> str:
        """Hex SHA-256 of what can be learnt from: tokens, targets, and where rows end."""
        mine = self.encoded.take(self.indices)
        sha = hashlib.sha256()
        for part in (mine.offsets, mine.trainable, mine.tokens):
            sha.update(np.ascontiguousarray(part).tobytes())
        return sha.hexdigest()

    def lots(self, key: bytes) -> Iterator[Batch]:
        """One Poisson sample of rows for every step, each as a batch; it may have no row."""
        for step in range(self.steps):
            taken = self.indices[uniforms(derive_key(key, "rows", step), len(self.indices)) < self.sampling]
            if len(taken):
                yield collate(self.encoded, taken, batching="padded", pad_id=self.pad_id)
            else:
                nothing, none = torch.zeros(0, dtype=torch.int64), np.zeros(0, np.int64)
                yield Batch(nothing.view(0, 0), None, nothing, nothing, none, none, none)

    def settings_of(self, local: LocalConfig) -> LocalConfig:
        """The local loop's settings for :meth:`lots`: one batch a step."""
        return replace(local, steps=self.steps, epochs=None, accumulate=1)

    def gradient(self, key: bytes, rows_at_once: int) -> Gradient:
        """The private gradient of each step in turn, computed ``rows_at_once`` rows at a time."""
        numbers = count()

        def private(
            model: PreTrainedModel, parameters: Mapping[str, nn.Parameter], group: Sequence[Batch], loss: Loss
        ) -> Tensor:
            device = next(iter(parameters.values())).device
            total = torch.zeros((), device=device)
            sums = {name: torch.zeros_like(value) for name, value in parameters.items()}
            for part in (part for lot in group for part in parts_of(lot, rows_at_once)):
                nats, rows = row_gradients(model, parameters, part.to(device), loss)
                total += nats
                norms = torch.stack([value.flatten(1).square().sum(1) for value in rows.values()]).sum(0).sqrt()
                factors = self.mechanism.factors(norms)
                for name, value in rows.items():
                    sums[name] += torch.einsum("b,bij->ij", factors, value)
            step_key = derive_key(key, "gradient", next(numbers))
            noisy = self.mechanism.noised({name: value.cpu() for name, value in sums.items()}, step_key)
            for name, parameter in parameters.items():
                parameter.grad = torch.empty_like(parameter).copy_(noisy[name])
            return total

        return private


def accounted(half: ClientHalf, rows_of: Callable[[str], PrivateRows | None]) -> ClientHalf:
    """``half``, which takes part only while the client's budget lasts; its memory counts steps, over all rounds.

    What a client says beside its update is made of its rows without noise: the loss and the count of tokens stay with
    it. It says its epsilon instead. Raises BudgetSpent.
    """

    def train(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
        rows = rows_of(task.client)
        if rows is None:
            return half(task, memory)
        steps = int(memory.get(STEPS, torch.tensor(0))) + rows.steps
        if not rows.budget.allows(steps):
            raise BudgetSpent(
                f"this client's privacy budget is spent: expected epsilon of at most {rows.budget.most:g} at delta"
                f" {rows.budget.delta:g}, got {rows.budget.epsilon(steps):.4g} with one more round"
            )
        update, kept = half(task, {name: value for name, value in memory.items() if name != STEPS})
        metrics = {"steps": Mean(rows.steps, 1)}
        epsilon = rows.budget.epsilon(steps)
        if math.isfinite(epsilon):
            metrics["epsilon"] = Mean(epsilon, 1)
        return replace(update, metrics=metrics), {**kept, STEPS: torch.tensor(steps)}

    return train


def told_of_rows(epsilon: float, settings: SamplePrivacy) -> dict[str, Any]:
    """What clients have spent of their own rows' budgets, by the one who spent most, for a log."""
    said = (
        f"epsilon {epsilon:.3g} at delta {settings.delta:.3g} for the client who spent most, add/remove one row,"
        " Poisson samples of its rows; runs on the same data add up"
    )
    return {
        "epsilon": epsilon,
        "delta": settings.delta,
        "neighbours": "add/remove one row",
        "sampling": "Poisson, of each client's own rows",
        "accountant": settings.accountant,
        "said": said,
    }


def row_gradients(
    model: PreTrainedModel, parameters: Mapping[str, nn.Parameter], batch: Batch, loss: Loss
) -> tuple[Tensor, dict[str, Tensor]]:
    """Nats of ``batch`` (padded), summed; and name -> the gradient of every row's own mean loss, float32 [B, ...].

    Raises UserError for a parameter that is no factor of a LoRA module, and for a model that mixes rows in one.
    """
    with _watching(model, parameters, tuple(batch.input_ids.shape)) as found:
        nats = loss(model, batch)
        nats.backward()
    for parameter in parameters.values():
        parameter.grad = None
    row_of_label = batch.label_index // max(1, batch.input_ids.shape[1])
    labels = torch.bincount(row_of_label, minlength=batch.rows).clamp(min=1).view(-1, 1, 1)
    return nats.detach(), {name: found[name] / labels for name in parameters}


@contextmanager
def _watching(
    model: PreTrainedModel, parameters: Mapping[str, nn.Parameter], shape: tuple[int, ...]
) -> Iterator[Mapping[str, Tensor]]:
    """Inside, the backward pass leaves row gradients of the summed loss in what is given; ``shape`` is (B, T)."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    found: dict[str, Tensor] = {}

    def add(name: str, value: Tensor) -> None:
        found[name] = found[name] + value if name in found else value

    def after_forward(layer: LoraLinear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:
            return
        x = _by_row(inputs[0], shape).detach().float()

        def after_backward(change: Tensor) -> None:
            dy = _by_row(change, shape).float() * layer.scale
            low = x @ layer.lora_A.detach().t()
            if name := names.get(id(layer.lora_B)):
                add(name, torch.einsum("bto,btr->bor", dy, low))
            if name := names.get(id(layer.lora_A)):
                add(name, torch.einsum("btr,bti->bri", dy @ layer.lora_B.detach(), x))

        output.register_hook(after_backward)

    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    factors = {id(factor) for layer in layers for factor in (layer.lora_A, layer.lora_B)}
    strange = [name for name, parameter in parameters.items() if id(parameter) not in factors]
    if strange:
        fix = "Differential privacy of rows knows LoRA's factors only."
        raise UserError(Problem("privacy", "LoRA factors alone to train", strange[0], fix))
    handles = [layer.register_forward_hook(after_forward) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in parameters if name not in found]
    for name in missing:  # a module that no row went through
        found[name] = torch.zeros((shape[0], *parameters[name].shape), device=parameters[name].device)


def _by_row(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[B, T, width] of what may be flat. Raises UserError when it is of other tokens, or other many."""
    if tuple(value.shape[:-1]) in (shape, (shape[0] * shape[1],)):
        return value.reshape(*shape, value.shape[-1])
    fix = "A mixture of experts, say. Leave such modules out of lora.targets."
    raise UserError(Problem("privacy", "modules that see rows apart", f"an input of shape {tuple(value.shape)}", fix))


def parts_of(batch: Batch, rows: int) -> Iterator[Batch]:
    """A padded batch in pieces of at most ``rows`` rows, no wider than their longest, shortest rows first."""
    order = np.argsort(batch.lengths, kind="stable")
    width = max(1, batch.input_ids.shape[1])
    label_row, label_column = batch.label_index // width, batch.label_index % width
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        lengths = batch.lengths[chosen]
        narrow = int(lengths.max())
        picked = [torch.nonzero(label_row == int(row)).flatten() for row in chosen]
        place = [label_column[labels] + number * narrow for number, labels in enumerate(picked)]
        yield Batch(
            input_ids=batch.input_ids[torch.from_numpy(chosen)][:, :narrow],
            position_ids=None,
            label_index=torch.cat(place),
            targets=batch.targets[torch.cat(picked)],
            index=batch.index[chosen],
            lengths=lengths,
            labels=batch.labels[chosen],
        )
