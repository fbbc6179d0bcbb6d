"""Federated averaging of adapters: FedIT (arXiv 2305.05644) and its relatives.

FedIT is FedAvg (arXiv 1602.05629) on LoRA factors: the server sends adapter w_t, client k trains it on its own
instructions to w_k, and w_{t+1} = w_t + step(sum_k p_k (w_k - w_t)). With the plain server step this is the paper's
``A <- sum p_k A_k, B <- sum p_k B_k``. FedProx is a penalty in the local loss (``local.proximal_mu``), FedOpt a
server step (``aggregation.server_optimizer``); base, local-only and centralised are settings too.

What we do differently from the published code: changes travel instead of values, at least two clients are averaged
when there are two, every draw has a seed, and a client whose update is not finite is left out with its reason.
"""

from __future__ import annotations

from collections.abc import Callable

from flocktune.aggregation import server_opt
from flocktune.algorithms.local import ClientData, train_locally
from flocktune.config.schema import AggregationConfig, LocalConfig
from flocktune.interfaces import ClientHalf, Memory, ServerHalf, State
from flocktune.models.lora import Adapter
from flocktune.tensors import group, prefixed, without
from flocktune.training import Adjust, Penalty
from flocktune.types import ClientTask, Tensors, Update

KIND = "fedavg"

FIXED = "fixed"
"""The group of factors in a message that a client uses and does not train."""


def server_half(aggregation: AggregationConfig) -> ServerHalf:
    """State: ``adapter/*`` (float32) and the server optimiser's ``optimizer/*``. Updates may be of some names only."""
    settings = aggregation.server_optimizer

    def init(adapter: Tensors) -> State:
        return {**prefixed("adapter", adapter), **prefixed("optimizer", server_opt.init(settings, adapter))}

    def message(state: State, round: int) -> Tensors:
        return group(state, "adapter")

    def step(state: State, update: Update) -> State:
        changed = {name: value for name, value in group(state, "optimizer").items() if _of(name) in update.delta}
        adapter, optimizer = server_opt.step(settings, group(state, "adapter"), update.delta, changed)
        return {**state, **prefixed("adapter", adapter), **prefixed("optimizer", optimizer)}

    def result(state: State) -> Tensors:
        return group(state, "adapter")

    return ServerHalf(init, message, step, result)


def _of(name: str) -> str:
    """The factor that a tensor of the optimiser (``first/<factor>``) belongs to."""
    return name.partition("/")[2]


def client_half(
    adapter: Adapter,
    data: Callable[[str], ClientData],
    local: LocalConfig,
    weights: str,
    *,
    rounds: int,
    penalty: Penalty | None = None,
    adjust: Adjust | None = None,
) -> ClientHalf:
    """Local training of ``adapter`` (attached to a resident base model) on the client's own data.

    See :func:`train_locally`. Factors of the group ``fixed`` are used and not trained. The half keeps nothing between
    calls.
    """

    def train(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
        received = without(task.tensors, FIXED)
        adapter.load({**group(task.tensors, FIXED), **received})
        mine = data(task.client)
        update = train_locally(
            adapter, received, task, mine, local, weights, rounds=rounds, penalty=penalty, adjust=adjust
        )
        return update, memory

    return train
