"""What a run will cost, before anything is trained: parameters, bytes, steps, memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from flocktune.algorithms.factors import around_server, sharing_of
from flocktune.algorithms.fedavg import server_half
from flocktune.algorithms.fedbiot import ADAPTER, EMULATOR, split_tensors
from flocktune.algorithms.local import steps_per_round
from flocktune.algorithms.private_rows import told_of_rows
from flocktune.allocation import ClientRows, allocate_clients, client_data
from flocktune.assemble import check_context, refuse_ranks
from flocktune.cohorts import scheduler, updates_a_round
from flocktune.config.capabilities import correction_of, personal_of
from flocktune.config.drift import Scaffold
from flocktune.config.engines import InProcessEngine
from flocktune.config.factors import SIDED
from flocktune.config.personal import Ditto, FineTune
from flocktune.config.schema import Dpo, LoraConfig, RunConfig
from flocktune.data.encoding import Encoded
from flocktune.emulation import bundle_of, emulator_settings, of_the_emulator, public_rows
from flocktune.engine.client import on_wire
from flocktune.errors import FlocktuneError, Problem, UserError
from flocktune.footprint import largest_batch, recomputes, training_bytes
from flocktune.gate import gate_digest
from flocktune.interfaces import Transform
from flocktune.models.factors import pairs
from flocktune.models.layers import drop_layers, layer_stack, lora_within
from flocktune.models.load import Description, describe, load_skeleton, pick_device, quantization_settings, stored_dtype
from flocktune.models.lora import shapes
from flocktune.models.split import plan_split
from flocktune.protection import client_privacy, refuse_unsecured, transforms_of
from flocktune.report.trackers import refuse_missing
from flocktune.scheduling import Cohort
from flocktune.stacking import clients_at_once, one_after_another
from flocktune.starting import given_adapter
from flocktune.tensors import size_bytes
from flocktune.types import AtMost, Tensors
from flocktune.wire import encoded_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Estimate:
    """Costs of a run. Bytes are of float32 factors, those of a round are the mean over all rounds.

    With compression ``round_bytes_up`` is of encoded updates; ``up_at_most``: zstd may make less of it. Memory is a
    rough upper figure, said to be an estimate: ``memory_bytes`` is of one process that holds everything and trains
    ``at_once`` clients together, ``client_memory_bytes`` of a client alone. ``recompute``: gradient checkpointing, as
    the recipe says or as this machine needs it.
    """

    base_parameters: int
    trainable_parameters: int
    clients: int
    cohort: int
    at_once: int
    train_rows: int
    test_rows: int
    untrainable_rows: int
    rows_per_client: tuple[int, float, int]
    adapter_bytes: int
    round_bytes_down: int
    round_bytes_up: int
    up_at_most: bool
    steps_total: int
    tokens_total: int
    memory_bytes: int
    client_memory_bytes: int
    recompute: bool
    emulator: EmulatorCosts | None
    privacy: str | None = None


@dataclass(frozen=True)
class EmulatorCosts:
    """What a client of FedBiOT holds, counted without making it. ``bytes`` is of its weights as they are stored."""

    held_layers: int
    full_layers: int
    parameters: int
    bytes: int


def estimate(config: RunConfig) -> Estimate:
    """Check recipe, files and model, and count. Raises UserError naming every problem that was found."""
    counts, data, schedule, transforms = _looked_at(config)
    sizes = [len(rows) for rows in data.clients.values()]
    cohort = updates_a_round(config, schedule(0).wanted, len(sizes))
    trainable, frozen = (sum(value.numel() for value in part.values()) for part in (counts.trained, counts.sent_too))
    if isinstance(config.local.loss, Dpo) and config.local.loss.reference == "start":
        frozen += trainable  # the reference
    steps = _steps(config, sizes, cohort)
    mean_tokens = len(data.train.encoded.tokens) / max(1, len(data.train.examples))
    travelling = 2 if isinstance(correction_of(config), Scaffold) else 1  # each factor, and its control variate
    rows_per_step = config.local.batch_size * config.local.accumulate
    down, up = _round_bytes(config, counts.trained, list(data.clients), cohort, transforms)
    base, emulator = counts.base, counts.emulator
    client_bytes, recompute = _client_memory(config, counts, data.train.encoded)
    at_once = min(cohort, _at_once(config, trainable, recompute))
    return Estimate(
        base_parameters=base.parameters,
        trainable_parameters=trainable,
        clients=len(sizes),
        cohort=cohort,
        at_once=at_once,
        train_rows=sum(sizes),
        test_rows=len(data.test.examples),
        untrainable_rows=len(data.train.report.untrainable),
        rows_per_client=(min(sizes), float(np.median(sizes)), max(sizes)),
        adapter_bytes=4 * trainable,
        round_bytes_down=travelling * down + 4 * frozen * cohort,
        round_bytes_up=travelling * up,
        up_at_most=any(isinstance(value, AtMost) for value in on_wire(transforms, counts.trained).values()),
        steps_total=steps,
        tokens_total=int(steps * rows_per_step * mean_tokens),
        memory_bytes=_memory(config, counts, client_bytes, at_once),
        client_memory_bytes=client_bytes,
        recompute=recompute,
        emulator=emulator,
        privacy=_planned_privacy(config, data),
    )


def _looked_at(config: RunConfig) -> tuple[_Counts, ClientRows, Callable[[int], Cohort], Sequence[Transform]]:
    """All that is counted in, with nothing wrong. Raises UserError naming every problem that was found."""
    problems: list[Problem | str] = []

    def attempt(step):  # type: ignore[no-untyped-def]
        try:
            return step()
        except UserError as error:
            problems.extend(error.problems)
            return None

    skeleton = attempt(lambda: load_skeleton(config.model))
    counts = attempt(lambda: _counts(config, skeleton)) if skeleton is not None else None
    device = attempt(lambda: pick_device(config.runtime.device))
    if device is not None:
        attempt(lambda: _refuse_quantization(config, device))
    attempt(lambda: refuse_missing(config))
    attempt(lambda: refuse_unsecured(config))
    data = attempt(lambda: allocate_clients(config))
    schedule = attempt(lambda: scheduler(config, data.clients)) if data is not None else None
    if data is not None:
        attempt(lambda: refuse_ranks(config, list(data.clients)))
    if config.method == "fedbiot":
        attempt(lambda: public_rows(config))
    attempt(lambda: gate_digest(config))
    if skeleton is not None and data is not None:
        attempt(lambda: check_context(config, data, skeleton))
    if config.lora.start_from is not None and counts is not None:
        attempt(lambda: given_adapter(config.lora, counts.trained))
    transforms = attempt(lambda: transforms_of(config))
    if problems:
        raise UserError(*dict.fromkeys(problems))
    if counts is None or data is None or schedule is None or transforms is None:
        raise FlocktuneError("nothing was found wrong, yet the recipe could not be read")
    return counts, data, schedule, transforms


def _steps(config: RunConfig, sizes: Sequence[int], cohort: int) -> int:
    """Optimiser steps of all rounds, those on clients' own adapters too."""
    steps = config.rounds * round(cohort * float(np.mean([steps_per_round(config.local, size) for size in sizes])))
    match personal_of(config):
        case Ditto(steps=own):
            return steps + (steps if own is None else config.rounds * cohort * own)
        case FineTune(steps=own):
            return steps + len(sizes) * own
    return steps


def _planned_privacy(config: RunConfig, data: ClientRows) -> str | None:
    """What all rounds will have spent: of clients, or of the rows of the client who has fewest."""
    if privacy := client_privacy(config, len(data.clients)):
        return str(privacy.told(privacy.affordable_or_refused())["said"])
    fewest = min(data.clients, key=lambda client: len(data.clients[client]))
    rows = client_data(config, 0, data)(fewest).private
    if rows is None:
        return None
    return str(
        told_of_rows(rows.budget.epsilon(rows.budget.affordable(rows.steps * config.rounds)), rows.settings)["said"]
    )


@dataclass(frozen=True)
class _Counts:
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


def _counts(config: RunConfig, skeleton: PreTrainedModel) -> _Counts:
    base = describe(config.model, skeleton)
    if config.method != "fedbiot":
        trained = _empty(shapes(skeleton, config.lora))
        return _Counts(
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
    return _Counts(base, held, plan.to_full(parts[ADAPTER]), parts[EMULATOR], emulators, plan.in_adapter, emulator)


def _round_bytes(
    config: RunConfig, trained: Tensors, clients: Sequence[str], cohort: int, transforms: Sequence[Transform]
) -> tuple[int, int]:
    """Bytes of factors down and up in a round, the mean over rounds: a side adapter grows with each."""
    whole = {name: torch.zeros(value.shape) for name, value in trained.items()}
    sharing = sharing_of(config)
    server = around_server(sharing, whole, server_half(config.aggregation))
    rounds = range(max(1, config.rounds))
    down = up = 0.0
    for number in rounds[:2]:  # what is trained alternates, or is the same in every round
        message = server.message(server.init(whole), number)
        share = len(rounds[number::2]) / len(rounds)
        for client in clients:
            received = server.addressed(message, client)
            down += share * size_bytes(received) / len(clients)
            back = server.returned(received)
            up += share * (encoded_size(on_wire(transforms, back)) if transforms else size_bytes(back)) / len(clients)
    ranks = [sharing.rank_of(client) if sharing.rank_of else sharing.rank for client in clients]
    grows = 0.0  # by as many directions as clients have factors; of those, a residual has one of each row less
    if sharing.rule in SIDED:
        most = cohort - (sharing.rule == "fedex_lora")
        have = [sum(rank > row for rank in ranks) / len(ranks) for row in range(sharing.rank)]
        grows = sum(min(most, cohort * fraction) for fraction in have)
    for a, b in pairs(whole).values():
        held = [min(number * grows, a.shape[1], len(b)) for number in rounds]
        down += 4 * (a.shape[1] + len(b)) * sum(held) / len(held)
    return round(down * cohort), round(up * cohort)


def _refuse_quantization(config: RunConfig, device: torch.device) -> None:
    """Raise UserError when the model, or FedBiOT's emulator, can not be quantised here as the recipe asks."""
    if config.model.quantization != "none":
        quantization_settings(config.model, device)
    settings = emulator_settings(config)
    if config.method == "fedbiot" and settings.quantization != "none":
        try:
            quantization_settings(replace(config.model, quantization=settings.quantization), device)
        except UserError as error:
            raise UserError(*map(of_the_emulator, error.problems)) from None


def _empty(wanted: Mapping[str, tuple[int, ...]]) -> Tensors:
    return {name: torch.empty(shape, device="meta") for name, shape in wanted.items()}


def _client_memory(config: RunConfig, counts: _Counts, rows: Encoded) -> tuple[int, bool]:
    """What a client's model and training take here, and whether layers are computed again so that it fits."""
    device, weights = pick_device(config.runtime.device), counts.held.base_bytes
    shape = largest_batch(rows, np.arange(len(rows)), config.local.batch_size, config.data.batching)

    def needed(recompute: bool = False) -> int:
        skeleton, lora = counts.skeleton()
        return weights + training_bytes(skeleton, lora, counts.trains, config.local, shape, device, recompute=recompute)

    recompute = recomputes(config.model, needed, device)
    return needed(recompute), recompute


def _at_once(config: RunConfig, values: int, recompute: bool) -> int:
    """How many clients are trained at once, if so many take part. Of a model with experts it may be one."""
    engine = config.engine
    if not isinstance(engine, InProcessEngine) or one_after_another(config):
        return 1
    return 1 if recompute and config.lora.dropout else clients_at_once(engine, values)


def _memory(config: RunConfig, counts: _Counts, client_bytes: int, at_once: int) -> int:
    """Of one process with all weights, and with what the clients that are trained at once may take."""
    training = client_bytes - counts.held.base_bytes
    if isinstance(config.engine, InProcessEngine):
        training = max(training, min(at_once * training, config.engine.stack_mb * 2**20))
    return training + counts.held.base_bytes + (counts.base.base_bytes if counts.emulator else 0)
