"""What a recipe puts around its method, whatever the method is: on the server, on clients, and on the wire between.

Both sides of a federation build theirs from the same recipe, so that what one does the other undoes.
"""

from __future__ import annotations

import math
from dataclasses import replace
from importlib.util import find_spec
from typing import cast

from flocktune.aggregation.robust import rule
from flocktune.algorithms.preferences import with_reference
from flocktune.compression.transform import compression
from flocktune.config.privacy_rules import privacy_in_force
from flocktune.config.schema import FEDERATED, Dpo, Poisson, RunConfig, UserPrivacy
from flocktune.config.secure_aggregation import MASKED, PHASES, SecureAggregationConfig
from flocktune.engine.client import on_wire, transformed
from flocktune.engine.rounds import Collect, one_by_one
from flocktune.errors import Problem, UserError
from flocktune.interfaces import ClientHalf, ServerHalf, Transform
from flocktune.models.lora_module import scale
from flocktune.privacy.clients import ClientPrivacy, clipping, noised
from flocktune.privacy.secagg.messages import from_client, method_part
from flocktune.types import ClientTask, Expected, Tensors


def transforms_of(config: RunConfig) -> tuple[Transform, ...]:
    """What updates go through on their way, in the order in which a client does it."""
    privacy = privacy_in_force(config)
    transforms = [clipping(privacy)] if isinstance(privacy, UserPrivacy) else []
    if config.compression is not None and config.method in FEDERATED:
        transforms.append(compression(config.compression))
    return tuple(transforms)


def around_client(config: RunConfig, half: ClientHalf) -> ClientHalf:
    """The client half as tasks are given to it."""
    half = transformed(half, transforms_of(config))
    settings = secured(config)
    if settings is None:
        return half
    refuse_unsecured(config)
    from flocktune.privacy.secagg.half import secure_half

    return secure_half(half, settings)


def around_server(config: RunConfig, server: ServerHalf, clients: int = 1, secret: bytes | None = None) -> ServerHalf:
    """The server half as rounds are run with it; it is asked by an owner's side, too, what a message looks like.

    ``clients``: how many there are; ``secret``: the run's key. Only the server that steps needs them.
    """
    if isinstance(config.local.loss, Dpo) and config.local.loss.reference == "start":
        server = with_reference(server)
    if config.aggregation.robust and config.method in FEDERATED:
        server = _robust(config, server)
    privacy = client_privacy(config, clients)
    return noised(server, privacy, secret) if privacy else server


def client_privacy(config: RunConfig, clients: int) -> ClientPrivacy | None:
    """Differential privacy of ``clients`` clients, when the recipe asks for it."""
    settings, selection = privacy_in_force(config), config.scheduling.selection
    if not isinstance(settings, UserPrivacy) or not isinstance(selection, Poisson):
        return None
    return ClientPrivacy(settings, clients, selection.fraction, config.rounds)


def secured(config: RunConfig) -> SecureAggregationConfig | None:
    """The recipe's secure aggregation, where it has one and clients learn together."""
    return config.secure_aggregation if config.method in FEDERATED else None


def largest_value(config: RunConfig) -> float:
    """The largest value of an update that arrives as it is."""
    settings = secured(config)
    return settings.range if settings else math.inf


def collect_of(config: RunConfig, server: ServerHalf) -> Collect:
    """How a round's replies are had of an engine. Raises UserError."""
    settings = secured(config)
    if settings is None:
        return one_by_one
    if server.combine is not None:  # the table of capabilities says it sooner, and why; this holds whatever it lacks
        got = "a method that combines updates by a rule of its own"
        raise UserError(Problem("secure_aggregation", "a method whose updates are averaged", got))
    refuse_unsecured(config)
    from flocktune.engine.secure import secure

    return secure(settings, lambda task: _summed(config, server, task.tensors))


def returned_of(config: RunConfig, server: ServerHalf, task: ClientTask) -> Expected:
    """Names and shapes of what comes back over the wire for ``task``."""
    if task.kind in PHASES:
        return from_client(task, _summed(config, server, method_part(task.tensors)) if task.kind == MASKED else {})
    return on_wire(transforms_of(config), server.returned(task.tensors))


def _summed(config: RunConfig, server: ServerHalf, received: Tensors) -> Tensors:
    """Names and shapes of what is added under masks: no transform is among them that changes sizes."""
    return cast(Tensors, on_wire(transforms_of(config), server.returned(received)))


def refuse_unsecured(config: RunConfig) -> None:
    """Raise UserError for secure aggregation without the library that its masks need."""
    if secured(config) and find_spec("cryptography") is None:
        fix = "pip install 'flocktune[privacy]'"
        raise UserError(Problem("secure_aggregation", "the package cryptography", "not found", fix))


def _robust(config: RunConfig, server: ServerHalf) -> ServerHalf:
    """``server`` with the recipe's rule, which finds what updates are changes of by their own names."""
    assert config.aggregation.robust is not None
    combine = rule(config.aggregation.robust, scale(config.lora))
    return replace(server, combine=lambda updates, message: combine(updates, {**message, **server.returned(message)}))
