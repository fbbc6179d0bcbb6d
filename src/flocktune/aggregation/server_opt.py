"""Server optimisers: how the mean update moves the global tensors.

FedAvgM (Hsu et al., arXiv 1909.06335) and FedOpt (Reddi et al., arXiv 2003.00295, algorithm 2). The negative mean
update plays the gradient, so every rule adds. State is tensors of the parameters' shapes, float32.
"""

from __future__ import annotations

from typing import assert_never

import torch

from flocktune.config.schema import ServerAdaptive, ServerOptimizer, ServerSgd
from flocktune.tensors import add_scaled, group, prefixed
from flocktune.types import Tensors


def init(settings: ServerOptimizer, parameters: Tensors) -> Tensors:
    """The optimiser's state before the first round: momentum 0, second moment tau^2 (the paper asks v >= tau^2)."""
    match settings:
        case ServerSgd(momentum=0):
            return {}
        case ServerSgd():
            return prefixed("momentum", {name: torch.zeros_like(value) for name, value in parameters.items()})
        case ServerAdaptive():
            first = {name: torch.zeros_like(value) for name, value in parameters.items()}
            second = {name: torch.full_like(value, settings.tau**2) for name, value in parameters.items()}
            return {**prefixed("first", first), **prefixed("second", second)}
        case _:
            assert_never(settings)


def step(settings: ServerOptimizer, parameters: Tensors, change: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
    """One server step -> (parameters, state). ``change`` is the mean update; ``sgd`` with lr 1 is plain FedAvg."""
    match settings:
        case ServerSgd(momentum=0):
            return add_scaled(parameters, change, settings.lr), state
        case ServerSgd():
            velocity = {
                name: settings.momentum * value + change[name] for name, value in group(state, "momentum").items()
            }
            return add_scaled(parameters, velocity, settings.lr), prefixed("momentum", velocity)
        case ServerAdaptive():
            return _adaptive_step(settings, parameters, change, state)
        case _:
            assert_never(settings)


def _adaptive_step(
    settings: ServerAdaptive, parameters: Tensors, change: Tensors, state: Tensors
) -> tuple[Tensors, Tensors]:
    first, second = group(state, "first"), group(state, "second")
    new_first, new_second, moved = {}, {}, {}
    for name, delta in change.items():
        square = delta.square()
        new_first[name] = settings.beta1 * first[name] + (1 - settings.beta1) * delta
        match settings.kind:
            case "adagrad":
                new_second[name] = second[name] + square
            case "yogi":
                new_second[name] = second[name] - (1 - settings.beta2) * square * torch.sign(second[name] - square)
            case "adam":
                new_second[name] = settings.beta2 * second[name] + (1 - settings.beta2) * square
            case _:
                assert_never(settings.kind)
        moved[name] = new_first[name] / (new_second[name].sqrt() + settings.tau)
    return add_scaled(parameters, moved, settings.lr), {
        **prefixed("first", new_first),
        **prefixed("second", new_second),
    }
