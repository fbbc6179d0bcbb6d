"""The local loop: one function, with the loss and the penalty as arguments.

Loss is negative log-likelihood in nats, summed; a step's gradient is that sum divided by all the
step's label tokens (on pairs of answers: by its pairs), so that k micro-batches of b rows are one batch of k * b rows.

Shapes: B rows, T tokens, N label positions in a batch, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias, assert_never

import torch
from torch import Tensor, nn

from flocktune.config.schema import LocalConfig
from flocktune.data.batching import Batch
from flocktune.errors import FlocktuneError, Problem, UserError
from flocktune.models.head import token_losses as token_losses
from flocktune.models.lora import pairs
from flocktune.types import Mean, Tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Loss: TypeAlias = "Callable[[PreTrainedModel, Batch], Tensor]"
Penalty: TypeAlias = Callable[[Mapping[str, Tensor]], Tensor]
Gradient: TypeAlias = "Callable[[PreTrainedModel, Mapping[str, nn.Parameter], Sequence[Batch], Loss], Tensor]"
"""Model, parameters, the micro-batches of one step, loss -> their nats, summed; leaves the step's gradient in ``.grad``
of the parameters."""
Adjust: TypeAlias = Callable[[Mapping[str, nn.Parameter]], None]
"""Changes a step's gradient in place, before it is clipped."""


class NotFinite(FlocktuneError):
    """Training gave NaN or infinity. Names what and when; the trained values must not be used."""


def next_token_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Negative log-likelihood in nats of ``batch.targets``, summed: a scalar in float32 at least."""
    return token_losses(model, batch).sum()


def mean_gradient(
    model: PreTrainedModel, parameters: Mapping[str, nn.Parameter], group: Sequence[Batch], loss: Loss
) -> Tensor:
    """The gradient of the mean loss over all label tokens of ``group``, or all its pairs."""
    device = next(iter(parameters.values())).device
    units = sum(batch.units for batch in group)
    total = torch.zeros((), device=device)
    for batch in group:
        nats = loss(model, batch.to(device))
        (nats / max(1, units)).backward()
        total += nats.detach()
    return total


def learning_rate(settings: LocalConfig, step: int, total_steps: int) -> float:
    """The rate of step ``step`` (from 0) of ``total_steps``.

    Rises linearly to ``lr`` over ``warmup_steps``, then stays, falls linearly, or falls as half a cosine,
    to reach 0 at ``total_steps``, one step after the last.
    """
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    progress = min(1.0, (step - settings.warmup_steps) / max(1, total_steps - settings.warmup_steps))
    match settings.schedule:
        case "constant":
            return settings.lr
        case "linear":
            return settings.lr * (1.0 - progress)
        case "cosine":
            return settings.lr * 0.5 * (1.0 + math.cos(math.pi * progress))
        case other:
            assert_never(other)


def proximal_penalty(reference: Tensors, mu: float) -> Penalty:
    """FedProx (arXiv 1812.06127, equation 2): mu / 2 * ||w - w_t||^2, with ``reference`` as w_t."""
    flat: dict[tuple[str, ...], Tensor] = {}

    def penalty(parameters: Mapping[str, Tensor]) -> Tensor:
        names = tuple(parameters)
        now = torch.cat([value.reshape(-1) for value in parameters.values()])
        if names not in flat:
            flat[names] = torch.cat([reference[name].reshape(-1) for name in names]).to(now)
        return 0.5 * mu * (now - flat[names]).square().sum()

    return penalty


def product_penalty(reference: Tensors, mu: float, scale: float) -> Penalty:
    """FedBiOT's proximal term (arXiv 2406.17706, equation 6): mu / 2 * || s B A - s B' A' ||_F^2 over all modules.

    ``reference`` holds A' [R, in] and B' [out, R]; ``scale`` is s. Nothing larger than R x R is formed but copies of
    the factors: with B A - B' A' = (B - B') A + B' (A - A'), the norm is a sum of traces of R x R products, and no
    large numbers cancel.
    """
    start: dict[str, tuple[Tensor, Tensor]] = {}

    def penalty(parameters: Mapping[str, Tensor]) -> Tensor:
        total = torch.zeros((), device=next(iter(parameters.values())).device)
        for name, (a, b) in pairs(parameters).items():
            if name not in start:
                start[name] = tuple(value.to(a) for value in pairs(reference)[name])  # type: ignore[assignment]
            a_then, b_then = start[name]
            change_b, change_a = b - b_then, a - a_then
            cross = ((change_b.T @ b_then) * (a @ change_a.T)).sum()
            total = total + ((change_b.T @ change_b) * (a @ a.T)).sum() + 2 * cross
            total = total + ((b_then.T @ b_then) * (change_a @ change_a.T)).sum()
        return 0.5 * mu * scale**2 * total

    return penalty


def fit(
    model: PreTrainedModel,
    parameters: Mapping[str, nn.Parameter],
    batches: Iterable[Batch],
    settings: LocalConfig,
    *,
    total_steps: int,
    seed: int,
    first_step: int = 0,
    penalty: Penalty | None = None,
    loss: Loss = next_token_loss,
    gradient: Gradient = mean_gradient,
    adjust: Adjust | None = None,
) -> dict[str, Mean]:
    """Train ``parameters`` in place with a fresh optimiser; nothing else of the model changes.

    A step's gradient is that of ``gradient`` and of the penalty, then ``adjust``-ed, then clipped.

    Takes ``settings.steps * accumulate`` micro-batches, or all of them when ``steps`` is None. The schedule runs over
    ``total_steps``, of which ``first_step`` lie behind. ``seed`` fixes dropout; no global random state
    moves. Metrics: ``loss`` (nats a label token, or a pair; without the penalty), ``tokens`` and ``steps`` (a client).

    Raises NotFinite when the loss or a parameter is not finite at the end, and UserError without batches.
    The loop never waits for the device: losses stay there until the last step.
    """
    trained = list(parameters.values())
    device = trained[0].device
    optimizer = optimizer_of(trained, settings)
    optimizer.zero_grad(set_to_none=True)  # a client before this one may have failed in the middle of a step
    step_losses: list[Tensor] = []
    units = tokens = 0
    with training_mode(model, trained), _seeded(device, seed):
        for step, group in enumerate(steps_of(batches, settings), start=first_step):
            total = gradient(model, parameters, group, loss)
            if penalty is not None:
                penalty(parameters).backward()
            if adjust is not None:
                adjust(parameters)
            if settings.clip_norm:
                nn.utils.clip_grad_norm_(trained, settings.clip_norm)
            optimizer.param_groups[0]["lr"] = learning_rate(settings, step, total_steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step_losses.append(total)
            units += sum(batch.units for batch in group)
            tokens += sum(batch.tokens for batch in group)
    return told(step_losses, units, tokens, parameters, first_step)


def told(
    step_losses: Sequence[Tensor], units: int, tokens: int, parameters: Mapping[str, Tensor], first_step: int
) -> dict[str, Mean]:
    """The metrics of :func:`fit`, of every step's nats. Raises NotFinite, and UserError when there was no step."""
    if not step_losses:
        raise UserError(Problem("data", "at least one batch to train on", "none", "Give this client more rows."))
    nats_by_step = torch.stack(tuple(step_losses)).double().cpu()
    _check_finite(nats_by_step, parameters, first_step)
    return {
        "loss": Mean(float(nats_by_step.sum()), units),
        "tokens": Mean(tokens, 1),
        "steps": Mean(len(step_losses), 1),
    }


@torch.no_grad()
def evaluate_loss(model: PreTrainedModel, batches: Iterable[Batch], loss: Loss = next_token_loss) -> Mean:
    """Mean negative log-likelihood (nats a label token) over ``batches``; its ``exp`` is the perplexity.

    Under no_grad, not inference_mode: what a model caches here may be used in training afterwards.
    """
    device = next(model.parameters()).device
    nats = [torch.zeros((), device=device)]
    labels = 0
    for batch in batches:
        nats.append(loss(model, batch.to(device)))
        labels += batch.targets.numel()
    return Mean(float(torch.stack(nats).cpu().double().sum()), labels)


def optimizer_of(
    trained: Sequence[nn.Parameter] | Sequence[dict[str, Any]], settings: LocalConfig
) -> torch.optim.Optimizer:
    """A fresh one, of parameters or groups of them, each one fused kernel: there are hundreds, and each is small."""
    match settings.optimizer:
        case "adamw":
            return torch.optim.AdamW(trained, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
        case "sgd":
            return torch.optim.SGD(
                trained, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay, fused=True
            )
        case other:
            assert_never(other)


@contextmanager
def training_mode(model: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """Training mode for the modules that own trained parameters, and for them alone: the base drops nothing out."""
    wanted = {id(parameter) for parameter in trained}
    before = {module: module.training for module in model.modules()}
    for module in before:
        module.training = any(id(own) in wanted for own in module.parameters(recurse=False))
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Random draws on ``device`` start from ``seed``; the generators are put back afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def steps_of(batches: Iterable[Batch], settings: LocalConfig) -> Iterator[list[Batch]]:
    """The micro-batches of each step, ``accumulate`` of them; the last step may have fewer."""
    rest = islice(batches, None if settings.steps is None else settings.steps * settings.accumulate)
    while group := list(islice(rest, settings.accumulate)):
        yield group


def _check_finite(nats_by_step: Tensor, parameters: Mapping[str, Tensor], first_step: int) -> None:
    """Raise NotFinite that says at which step the loss broke, or which parameters did. The loop's only wait."""
    broken = (~torch.isfinite(nats_by_step)).nonzero()
    if len(broken):
        step = int(broken[0])
        raise NotFinite(
            f"the loss became {float(nats_by_step[step])} at step {first_step + step} (step {step + 1} of"
            f" {len(nats_by_step)} here). Lower local.lr, set local.clip_norm or local.warmup_steps, or use"
            " model.dtype: float32."
        )
    with torch.no_grad():
        finite = torch.stack([torch.isfinite(value).all() for value in parameters.values()]).cpu()
    names = [name for name, good in zip(parameters, finite.tolist(), strict=True) if not good]
    if names:
        raise NotFinite(
            f"NaN or infinite values in {len(names)} trained tensors ({names[0]}, ...) after the last step."
            " Lower local.lr."
        )
