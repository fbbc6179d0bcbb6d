"""Corrections of client drift: SCAFFOLD (arXiv 1910.06378) and FedDyn (arXiv 2111.04263), around any averaged method.

Clients whose data differ pull apart: with many local steps, FedAvg stops away from the minimum of the mean loss. Both
corrections have that minimum as their only resting point. They are put around a method's two halves.

SCAFFOLD (algorithm 1). Client k keeps c_k, the server c; every step's gradient g becomes ``g - c_k + c``. After K steps

    c_k+ = mean of the K gradients g                       client     (option II: c_k - c + (w_t - w_k) / (K lr))
    c+   = c + sum of p_k (c_k+ - c_k) over the round       server

What we do differently: option II is the mean of g for plain SGD only; the mean itself is right for any optimiser. The
correction is made before the gradient is clipped, so a clipped step is shorter, not turned. g holds what the recipe's
proximal term adds.

FedDyn (algorithm 1, equations 1 to 3). Client k keeps g_k, the server h, and with change_k = w_k - w_t

    w_k = argmin  loss_k(w) - <g_k, w> + alpha / 2 ||w - w_t||^2        g_k+ = g_k - alpha change_k
    h+  = h - alpha sum of p_k change_k over the round                  w_t+1 = mean of w_k - h+ / alpha

What we do differently: the argmin is as many steps of the recipe's optimiser as ``local`` says, clipped as it says.

Weights: p_k is client k's weight over that of ALL clients, in the unit of the recipe; the paper's 1 / N is
``aggregation.weights: equal``. Then c is sum p_k c_k, and h is sum p_k g_k, in every round, whoever took part, and the
resting point is the minimum of sum p_k loss_k. Only sums weighted as the update itself leave a client, so both go
with secure aggregation, whose clipping clients foresee. They need every update whose client went on to be in the sum:
not with stale or lost ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias, assert_never

import torch
from torch import Tensor, nn

from flocktune.config.drift import Correction, FedDyn, Scaffold
from flocktune.interfaces import ClientHalf, Memory, ServerHalf, State
from flocktune.tensors import add_scaled, group, prefixed, subtract, without
from flocktune.training import Adjust, Penalty, proximal_penalty
from flocktune.types import ClientTask, Tensors, Update

CONTROL = "control"
"""SCAFFOLD's group in state, message, update and memory."""

LINEAR = "linear"
"""FedDyn's group in state (h) and memory (g_k)."""

Make: TypeAlias = Callable[[Penalty | None, Adjust | None], ClientHalf]
"""A method's client half with a penalty in its local loss and an adjustment of its gradients."""

Trained: TypeAlias = Callable[[Tensors], Tensors]
"""What a client receives of the method -> the tensors of it that it trains, by the names of its update."""


def corrected_server(correction: Correction | None, half: ServerHalf, weight_of_all: float) -> ServerHalf:
    """``half`` with the server's part of ``correction``.

    ``weight_of_all``: the summed weight of all clients that may ever take part, in the unit of the recipe. The method
    must average (no ``combine``). State: ``control/*`` (c) or ``linear/*`` (h), of the names of an update, float32.
    """
    match correction:
        case None:
            return half
        case Scaffold():
            return _scaffold_server(half, weight_of_all)
        case FedDyn():
            return _feddyn_server(half, correction.alpha, weight_of_all)
        case _:
            assert_never(correction)


def corrected_client(
    correction: Correction | None,
    make: Make,
    trained: Trained = lambda received: received,
    *,
    bound: float = math.inf,
) -> ClientHalf:
    """The half that ``make`` gives, with the client's part of ``correction``.

    ``bound``: the largest value of an update that arrives as it is; what a client keeps moves by no more than that.
    Memory: ``control/*`` (c_k) or ``linear/*`` (g_k); zero in a client's first round.
    """
    match correction:
        case None:
            return make(None, None)
        case Scaffold():
            return _scaffold_client(make, trained, bound)
        case FedDyn():
            return _feddyn_client(make, correction.alpha, trained, bound)
        case _:
            assert_never(correction)


def methods_own(tensors: Tensors) -> dict[str, Tensor]:
    """A message, an update or a state without what a correction has put into it."""
    return without(tensors, CONTROL, LINEAR)


def diagnosed(
    diagnose: Callable[[Tensors, Sequence[Update]], Mapping[str, float]],
) -> Callable[[Tensors, Sequence[Update]], Mapping[str, float]]:
    """``diagnose`` on the method's own part of messages and updates."""
    return lambda message, updates: diagnose(
        methods_own(message), [replace(update, delta=methods_own(update.delta)) for update in updates]
    )


def _scaffold_server(half: ServerHalf, weight_of_all: float) -> ServerHalf:
    def init(start: Tensors) -> State:
        state = half.init(start)
        return {**state, **prefixed(CONTROL, _zeros(half.returned(half.message(state, 0))))}

    def message(state: State, round: int) -> Tensors:
        return {**half.message(methods_own(state), round), **prefixed(CONTROL, group(state, CONTROL))}

    def returned(received: Tensors) -> Tensors:
        return {**half.returned(without(received, CONTROL)), **prefixed(CONTROL, group(received, CONTROL))}

    def step(state: State, update: Update) -> State:
        share = update.weight / weight_of_all
        control = add_scaled(group(state, CONTROL), group(update.delta, CONTROL), share)
        own = half.step(methods_own(state), replace(update, delta=without(update.delta, CONTROL)))
        return {**own, **prefixed(CONTROL, control)}

    return _around(half, CONTROL, init=init, message=message, returned=returned, step=step)


def _scaffold_client(make: Make, trained: Trained, bound: float) -> ClientHalf:
    def train(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
        received = without(task.tensors, CONTROL)
        everyones = group(task.tensors, CONTROL)
        mine = group(memory, CONTROL) or _zeros(trained(received))
        gradients = _Gradients(subtract(everyones, mine))
        half = make(None, gradients.adjust)
        update, kept = half(replace(task, tensors=received), without(memory, CONTROL))
        change = _within(bound, subtract(gradients.mean(), mine))
        delta = {**update.delta, **prefixed(CONTROL, change)}
        return replace(update, delta=delta), {**kept, **prefixed(CONTROL, add_scaled(mine, change))}

    return train


class _Gradients:
    """Sums up a round's gradients as they were, and adds ``shift`` (c - c_k) to each of them."""

    def __init__(self, shift: Tensors) -> None:
        self.shift, self.steps = dict(shift), 0
        self.total: dict[str, Tensor] = {}

    @torch.no_grad()
    def adjust(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for parameter in parameters.values():
            if parameter.grad is None:  # nothing of this step went through it
                parameter.grad = torch.zeros_like(parameter)
        gradients = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
        if not self.total:
            self.total = _zeros(gradients)
            self.shift = {name: self.shift[name].to(value) for name, value in gradients.items()}
        torch._foreach_add_(list(self.total.values()), list(gradients.values()))
        torch._foreach_add_(list(gradients.values()), [self.shift[name] for name in gradients])
        self.steps += 1

    def mean(self) -> dict[str, Tensor]:
        """On the CPU, contiguous."""
        contiguous = torch.contiguous_format
        return {name: (value / self.steps).cpu().clone(memory_format=contiguous) for name, value in self.total.items()}


def _feddyn_server(half: ServerHalf, alpha: float, weight_of_all: float) -> ServerHalf:
    def init(start: Tensors) -> State:
        state = half.init(start)
        return {**state, **prefixed(LINEAR, _zeros(half.returned(half.message(state, 0))))}

    def message(state: State, round: int) -> Tensors:
        return half.message(methods_own(state), round)

    def step(state: State, update: Update) -> State:
        if not update.clients:
            return {**half.step(methods_own(state), update), **prefixed(LINEAR, group(state, LINEAR))}
        h = add_scaled(group(state, LINEAR), update.delta, -alpha * update.weight / weight_of_all)
        moved = add_scaled(update.delta, h, -1 / alpha)
        return {**half.step(methods_own(state), replace(update, delta=moved)), **prefixed(LINEAR, h)}

    return _around(half, LINEAR, init=init, message=message, returned=half.returned, step=step)


def _feddyn_client(make: Make, alpha: float, trained: Trained, bound: float) -> ClientHalf:
    def train(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
        start = trained(task.tensors)
        mine = group(memory, LINEAR) or _zeros(start)
        # - <g_k, w> + alpha / 2 ||w - w_t||^2 is, up to a constant, a proximal term around w_t + g_k / alpha.
        half = make(proximal_penalty(add_scaled(start, mine, 1 / alpha), alpha), None)
        update, kept = half(task, without(memory, LINEAR))
        return update, {**kept, **prefixed(LINEAR, add_scaled(mine, _within(bound, update.delta), -alpha))}

    return train


def _around(
    half: ServerHalf,
    name: str,
    *,
    init: Callable[[Tensors], State],
    message: Callable[[State, int], Tensors],
    returned: Callable[[Tensors], Tensors],
    step: Callable[[State, Update], State],
) -> ServerHalf:
    """``half`` with these in place of its own; what else it does, it does on its own part of the state."""
    if half.combine is not None:
        raise ValueError("a correction of drift needs a method that averages")

    def prepare(state: State, round: int) -> tuple[State, Mapping[str, object]]:
        own, told = half.prepare(methods_own(state), round)
        return {**own, **prefixed(name, group(state, name))}, told

    return replace(
        half,
        init=init,
        message=message,
        returned=returned,
        step=step,
        prepare=prepare,
        result=lambda state: half.result(methods_own(state)),
    )


def _within(bound: float, tensors: Tensors) -> dict[str, Tensor]:
    return {name: value.clamp(-bound, bound) for name, value in tensors.items()}


def _zeros(tensors: Tensors) -> dict[str, Tensor]:
    return {name: torch.zeros_like(value) for name, value in tensors.items()}
