"""Personal adapters: Ditto (Li et al., arXiv 2012.04221), and fine-tuning after the last round.

    Ditto        v_k <- v_k - lr (grad loss_k(v_k) + lambda (v_k - w_t))      in every round that client k takes part in
    fine-tuning  v_k  = the run's result, trained on client k's own rows

v_k lies in client k's memory (``personal/*``) and never leaves it. Ditto's v_k starts from the first w_t that the
client received. The client's ordinary update is made first and is, bit for bit, what it is without Ditto.

What we do differently from the paper: v is trained by the recipe's optimiser, clipped as the recipe says. When v is
lost to a learning rate that is too high, the client keeps the v before; its update is not concerned.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

from flocktune.algorithms.factors import OWN, with_own
from flocktune.algorithms.local import ClientData, train_locally
from flocktune.config.personal import Ditto, FineTune
from flocktune.config.schema import LocalConfig
from flocktune.interfaces import ClientHalf, Memory
from flocktune.models.lora import Adapter
from flocktune.seeds import derive_seed
from flocktune.tensors import group, prefixed
from flocktune.training import Loss, NotFinite, proximal_penalty
from flocktune.types import ClientTask, Tensors, Update

_LOG = logging.getLogger(__name__)

PERSONAL = "personal"
"""The group of a client's own adapter in its memory."""

FINE_TUNE = "fine_tune"
"""The kind of the task that asks a client to fine-tune what it receives. Its update is empty: nothing leaves it."""


def with_ditto(
    half: ClientHalf,
    settings: Ditto,
    adapter: Adapter,
    data: Callable[[str], ClientData],
    local: LocalConfig,
    *,
    rounds: int,
    trained: Callable[[Tensors], Tensors] = lambda received: received,
    loss: Loss | None = None,
) -> ClientHalf:
    """``half``, and after it the training of the client's own adapter.

    ``trained``: what a client receives -> w_t, the whole adapter.
    """
    own_local = replace(local, proximal_mu=0.0)
    if settings.steps is not None:
        own_local = replace(own_local, steps=settings.steps, epochs=None)

    def train(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
        own = group(memory, PERSONAL)
        update, kept = half(task, {name: value for name, value in memory.items() if not _is_personal(name)})
        received = trained(task.tensors)
        start = own or received
        seeded = replace(task, seed=derive_seed(task.seed, PERSONAL))
        penalty = proximal_penalty(received, settings.lambda_)
        try:
            adapter.load(start)
            train_locally(
                adapter, start, seeded, data(task.client), own_local, "equal", rounds=rounds, loss=loss, penalty=penalty
            )
            start = adapter.tensors()
        except NotFinite as error:
            _LOG.warning("round %d, %s keeps its personal adapter: %s", task.round + 1, task.client, error)
        return update, {**kept, **prefixed(PERSONAL, start)}

    return train


def with_fine_tuning(
    half: ClientHalf,
    settings: FineTune,
    adapter: Adapter,
    data: Callable[[str], ClientData],
    local: LocalConfig,
    *,
    loss: Loss | None = None,
) -> ClientHalf:
    """``half``, which also answers tasks of kind :data:`FINE_TUNE`. Their rate's schedule is one of their own."""
    lr = local.lr if settings.lr is None else settings.lr
    own_local = replace(local, steps=settings.steps, epochs=None, lr=lr, proximal_mu=0.0, schedule_over="round")

    def train(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
        if task.kind != FINE_TUNE:
            return half(task, memory)
        adapter.load(task.tensors)
        update = train_locally(adapter, task.tensors, task, data(task.client), own_local, "equal", rounds=1, loss=loss)
        return replace(update, delta={}), {**memory, **prefixed(PERSONAL, {**task.tensors, **adapter.tensors()})}

    return train


def own_adapters(result: Tensors, memories: Mapping[str, Memory]) -> dict[str, Tensors]:
    """Client -> its own adapter, of those that have one; FedSA-LoRA's is the common A of ``result`` with the own B."""
    found: dict[str, Tensors] = {}
    for client, memory in memories.items():
        if own := group(memory, PERSONAL):
            found[client] = own
        elif group(memory, OWN):
            found[client] = with_own(result, memory)
    return found


def _is_personal(name: str) -> bool:
    return name.startswith(PERSONAL + "/")
