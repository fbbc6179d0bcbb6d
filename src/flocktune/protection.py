"""What a recipe puts around its method, whatever the method is: on the server, on clients, and on the wire between.

Both sides of a federation build theirs from the same recipe, so that what one does the other undoes.
"""

from __future__ import annotations

from flocktune.algorithms.preferences import with_reference
from flocktune.compression.transform import compression
from flocktune.config.privacy_rules import privacy_in_force
from flocktune.config.schema import FEDERATED, Dpo, Poisson, RunConfig, UserPrivacy
from flocktune.engine.client import transformed
from flocktune.interfaces import ClientHalf, ServerHalf, Transform
from flocktune.privacy.clients import ClientPrivacy, clipping, noised


def transforms_of(config: RunConfig) -> tuple[Transform, ...]:
    """What updates go through on their way, in the order in which a client does it."""
    privacy = privacy_in_force(config)
    transforms = [clipping(privacy)] if isinstance(privacy, UserPrivacy) else []
    if config.compression is not None and config.method in FEDERATED:
        transforms.append(compression(config.compression))
    return tuple(transforms)


def around_client(config: RunConfig, half: ClientHalf) -> ClientHalf:
    """The client half as tasks are given to it."""
    return transformed(half, transforms_of(config))


def around_server(config: RunConfig, server: ServerHalf, clients: int = 1, secret: bytes | None = None) -> ServerHalf:
    """The server half as rounds are run with it; it is asked by an owner's side, too, what a message looks like.

    ``clients``: how many there are; ``secret``: the run's key. Only the server that steps needs them.
    """
    if isinstance(config.local.loss, Dpo) and config.local.loss.reference == "start":
        server = with_reference(server)
    privacy = client_privacy(config, clients)
    return noised(server, privacy, secret) if privacy else server


def client_privacy(config: RunConfig, clients: int) -> ClientPrivacy | None:
    """Differential privacy of ``clients`` clients, when the recipe asks for it."""
    settings, selection = privacy_in_force(config), config.scheduling.selection
    if not isinstance(settings, UserPrivacy) or not isinstance(selection, Poisson):
        return None
    return ClientPrivacy(settings, clients, selection.fraction, config.rounds)
