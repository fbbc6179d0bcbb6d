"""What a recipe puts around its method, whatever the method is: on the server, on clients, and on the wire between.

Both sides of a federation build theirs from the same recipe, so that what one does the other undoes.
"""

from __future__ import annotations

from dataclasses import replace

from flocktune.aggregation.robust import rule
from flocktune.compression.transform import compression
from flocktune.config.schema import FEDERATED, RunConfig
from flocktune.engine.client import transformed
from flocktune.interfaces import ClientHalf, ServerHalf, Transform
from flocktune.models.lora import scale


def transforms_of(config: RunConfig) -> tuple[Transform, ...]:
    """What updates go through on their way, in the order in which a client does it."""
    if config.compression is None or config.method not in FEDERATED:
        return ()
    return (compression(config.compression),)


def around_client(config: RunConfig, half: ClientHalf) -> ClientHalf:
    """The client half as tasks are given to it."""
    return transformed(half, transforms_of(config))


def around_server(config: RunConfig, server: ServerHalf) -> ServerHalf:
    """The server half as rounds are run with it; it is asked by an owner's side, too, what a message looks like."""
    if config.aggregation.robust and config.method in FEDERATED:
        server = _robust(config, server)
    return server


def _robust(config: RunConfig, server: ServerHalf) -> ServerHalf:
    """``server`` with the recipe's rule, which finds what updates are changes of by their own names."""
    assert config.aggregation.robust is not None
    combine = rule(config.aggregation.robust, scale(config.lora))
    return replace(server, combine=lambda updates, message: combine(updates, {**message, **server.returned(message)}))
