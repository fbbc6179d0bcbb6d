"""Gradient checkpointing: keep each layer's input only, and compute the layer again in the backward pass."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from flocktune.errors import Problem, UserError


def checkpoint_layers(model: nn.Module) -> None:
    """Wrap every layer of ``model``. Costs about one more forward pass; saves all activations within layers.

    Transformers' own switch acts in training mode only, which would also turn on the dropout of a
    frozen base, so the layers are wrapped here, whatever their mode. Non-reentrant: factors inside a
    layer get gradients though its input needs none. Raises UserError when there are no such layers.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(
            Problem(
                "model.gradient_checkpointing",
                "a model whose layers can be checkpointed",
                type(model).__name__,
                "Set it to false.",
            )
        )
    for layer in layers:
        layer.forward = functools.partial(_recomputed, layer.forward)


def is_checkpointed(model: nn.Module) -> bool:
    """Whether :func:`checkpoint_layers` has been here."""
    patched = (vars(module).get("forward") for module in model.modules())
    return any(isinstance(one, functools.partial) and one.func is _recomputed for one in patched)


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
