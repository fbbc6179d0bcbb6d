"""What a recipe's model, factors and messages come to, from shapes alone: nothing is read but a model's config."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from flocktune.algorithms.factors import around_server, sharing_of
from flocktune.algorithms.fedavg import server_half
from flocktune.algorithms.fedbiot import ADAPTER, EMULATOR, split_tensors
from flocktune.config.factors import SIDED
from flocktune.config.schema import LoraConfig, RunConfig
from flocktune.emulation import bundle_of, emulator_settings
from flocktune.engine.client import on_wire
from flocktune.interfaces import Transform
from flocktune.models.factors import pairs
from flocktune.models.layers import drop_layers, layer_stack, lora_within
from flocktune.models.load import Description, describe, load_skeleton, stored_dtype
from flocktune.models.lora import shapes
from flocktune.models.split import plan_split
from flocktune.tensors import size_bytes
from flocktune.types import Tensors
from flocktune.wire import encoded_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class EmulatorCosts:
    """What a client of FedBiOT holds, counted without making it. ``bytes`` is of its weights as they are stored."""

    held_layers: int
    full_layers: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Counts:
    """Shapes alone. ``held`` is the model that a client has; ``sent_too`` are factors it gets and does not train.

    ``skeleton`` makes that model on the meta device, with settings of its LoRA; ``trains``: which factors, by name.
    """

    base: Description
    held: Description
    trained: Tensors
    sent_too: Tensors
    skeleton: Callable[[], tuple[PreTrainedModel, LoraConfig]]
    trains: Callable[[str], bool]
    emulator: EmulatorCosts | None


def count(config: RunConfig, skeleton: PreTrainedModel) -> Counts:
    """Parameters and factors of ``config``, whose base is ``skeleton``. Raises UserError."""
    base = describe(config.model, skeleton)
    if config.method != "fedbiot":
        trained = _empty(shapes(skeleton, config.lora))
        return Counts(
            base, base, trained, {}, lambda: (load_skeleton(config.model), config.lora), lambda name: True, None
        )
    settings = emulator_settings(config)
    if settings.path is not None:
        plan = bundle_of(config).plan
    else:
        plan = plan_split(base.layers, replace(settings, choice="uniform"), stack=layer_stack(skeleton))

    def emulators() -> tuple[PreTrainedModel, LoraConfig]:
        small = drop_layers(load_skeleton(config.model), plan)
        return small, lora_within(small, config.lora, plan.stack, range(len(plan.held)))

    small, lora = emulators()
    held = describe(replace(config.model, quantization=settings.quantization), small)
    factors = _empty(shapes(small, lora))
    parts = split_tensors(plan, factors)
    stored = held.parameters * stored_dtype(config.model).itemsize
    emulator = EmulatorCosts(len(plan.held), plan.layers, held.parameters, stored)
    return Counts(base, held, plan.to_full(parts[ADAPTER]), parts[EMULATOR], emulators, plan.in_adapter, emulator)


def round_bytes(
    config: RunConfig, trained: Tensors, clients: Sequence[str], cohort: int, transforms: Sequence[Transform]
) -> tuple[int, int]:
    """Bytes of factors down and up in a round, the mean over rounds: a side adapter grows with each."""
    whole = {name: torch.zeros(value.shape) for name, value in trained.items()}
    sharing = sharing_of(config)
    server = around_server(sharing, whole, server_half(config.aggregation))
    rounds = range(max(1, config.rounds))
    down = up = 0.0
    ranks = {client: sharing.rank_of(client) if sharing.rank_of else sharing.rank for client in clients}
    one_of = {rank: client for client, rank in ranks.items()}
    alike = [(one_of[rank], count) for rank, count in Counter(ranks.values()).items()]
    for number in rounds[:2]:  # what is trained alternates, or is the same in every round
        message = server.message(server.init(whole), number)
        for client, many in alike:  # clients of one rank get and give as many bytes
            received = server.addressed(message, client)
            share = len(rounds[number::2]) / len(rounds) * many / len(clients)
            down += share * size_bytes(received)
            back = server.returned(received)
            up += share * (encoded_size(on_wire(transforms, back)) if transforms else size_bytes(back))
    grows = 0.0  # by as many directions as clients have factors; of those, a residual has one of each row less
    if sharing.rule in SIDED:
        most = cohort - (sharing.rule == "fedex_lora")
        have = [sum(rank > row for rank in ranks.values()) / len(ranks) for row in range(sharing.rank)]
        grows = sum(min(most, cohort * fraction) for fraction in have)
    for a, b in pairs(whole).values():
        held = [min(number * grows, a.shape[1], len(b)) for number in rounds]
        down += 4 * (a.shape[1] + len(b)) * sum(held) / len(held)
    return round(down * cohort), round(up * cohort)


def _empty(wanted: Mapping[str, tuple[int, ...]]) -> Tensors:
    return {name: torch.empty(shape, device="meta") for name, shape in wanted.items()}
