"""What a run will cost, before anything is trained: parameters, bytes, steps, memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from flocktune.algorithms.factors import sharing_of
from flocktune.algorithms.local import steps_per_round
from flocktune.algorithms.private_rows import told_of_rows
from flocktune.allocation import ClientRows, allocate_clients, client_data
from flocktune.assemble import check_context, refuse_ranks
from flocktune.cohorts import scheduler, updates_a_round
from flocktune.config.capabilities import correction_of, personal_of
from flocktune.config.drift import Scaffold
from flocktune.config.engines import InProcessEngine
from flocktune.config.personal import Ditto, FineTune
from flocktune.config.schema import Dpo, RunConfig
from flocktune.counts import Counts, EmulatorCosts, count, round_bytes
from flocktune.data.encoding import Encoded
from flocktune.emulation import emulator_settings, of_the_emulator, public_rows
from flocktune.engine.client import on_wire
from flocktune.errors import FlocktuneError, Problem, UserError
from flocktune.footprint import largest_batch, recomputes, training_bytes
from flocktune.gate import gate_digest
from flocktune.interfaces import Transform
from flocktune.models.known import stand_in
from flocktune.models.load import load_skeleton, pick_device, quantization_settings
from flocktune.outline import assumptions, outlined_instructions, refuse_unreachable
from flocktune.protection import client_privacy, refuse_unsecured, transforms_of
from flocktune.report.trackers import refuse_missing
from flocktune.scheduling import Cohort
from flocktune.stacking import clients_at_once, one_after_another
from flocktune.starting import given_adapter
from flocktune.types import AtMost


@dataclass(frozen=True)
class Estimate:
    """Costs of a run. Bytes are of float32 factors, those of a round are the mean over all ``rounds``.

    With compression ``round_bytes_up`` is of encoded updates; ``up_at_most``: zstd may make less of it. Memory is a
    rough upper figure, said to be an estimate: ``memory_bytes`` is of one process that holds everything and trains
    ``at_once`` clients together, ``client_memory_bytes`` of a client alone, ``client_weight_bytes`` of its model alone.
    ``alternating``: a round trains only one of an adapter's two factors.
    ``recompute``: gradient checkpointing, as the recipe says or as this machine needs it. ``assumed``: a text for
    each thing that is not on this machine, for which what is known of it stands in, with the command that gets it on a
    line of its own; tokens and memory are upper bounds then.
    """

    rounds: int
    base_parameters: int
    trainable_parameters: int
    alternating: bool
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
    client_weight_bytes: int
    recompute: bool
    emulator: EmulatorCosts | None
    privacy: str | None = None
    assumed: tuple[str, ...] = ()

    @property
    def bytes_in_all(self) -> int:
        """Of all rounds, both ways, without the emulator."""
        return self.rounds * (self.round_bytes_down + self.round_bytes_up)


def estimate(config: RunConfig) -> Estimate:
    """Check recipe, files and model, and count. Raises UserError naming every problem that was found."""
    counts, data, schedule, transforms, device = _looked_at(config)
    sizes = [len(rows) for rows in data.clients.values()]
    cohort = updates_a_round(config, schedule(0).wanted, len(sizes))
    trainable, frozen = (sum(value.numel() for value in part.values()) for part in (counts.trained, counts.sent_too))
    if isinstance(config.local.loss, Dpo) and config.local.loss.reference == "start":
        frozen += trainable  # the reference
    steps = _steps(config, sizes, cohort)
    mean_tokens = len(data.train.encoded.tokens) / max(1, len(data.train.examples))
    travelling = 2 if isinstance(correction_of(config), Scaffold) else 1  # each factor, and its control variate
    rows_per_step = config.local.batch_size * config.local.accumulate
    down, up = round_bytes(config, counts.trained, list(data.clients), cohort, transforms)
    base, emulator = counts.base, counts.emulator
    client_bytes, recompute = _client_memory(config, counts, data.train.encoded, device)
    at_once = min(cohort, _at_once(config, trainable, recompute))
    assumed = assumptions(config)
    if not _is_here(device):
        assumed.append("There is no CUDA device here: memory is counted for one that is large enough.")
    return Estimate(
        rounds=config.rounds,
        base_parameters=base.parameters,
        trainable_parameters=_learnt(config, counts),
        alternating=sharing_of(config).rule == "rolora",
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
        client_weight_bytes=counts.held.base_bytes,
        recompute=recompute,
        emulator=emulator,
        privacy=_planned_privacy(config, data),
        assumed=tuple(assumed),
    )


def _learnt(config: RunConfig, counts: Counts) -> int:
    """Numbers that clients train: of an adapter's factors not all, with some rules."""
    ends = sharing_of(config).learnt
    return sum(value.numel() for name, value in counts.trained.items() if name.endswith(ends))


def _looked_at(
    config: RunConfig,
) -> tuple[Counts, ClientRows, Callable[[int], Cohort], Sequence[Transform], torch.device]:
    """All that is counted in, with nothing wrong. Raises UserError naming every problem that was found."""
    refuse_unreachable(config, but_known=True)
    problems: list[Problem | str] = []

    def attempt(step):  # type: ignore[no-untyped-def]
        try:
            return step()
        except UserError as error:
            problems.extend(error.problems)
            return None

    skeleton = attempt(lambda: load_skeleton(config.model))
    counts = attempt(lambda: count(config, skeleton)) if skeleton is not None else None
    device = attempt(lambda: _device(config))
    attempt(lambda: refuse_missing(config))
    attempt(lambda: refuse_unsecured(config))
    data = attempt(lambda: allocate_clients(config, outlined_instructions))
    schedule = attempt(lambda: scheduler(config, data.clients)) if data is not None else None
    if data is not None:
        attempt(lambda: refuse_ranks(config, list(data.clients)))
    if config.method == "fedbiot":
        attempt(lambda: public_rows(config, outlined_instructions))
    attempt(lambda: gate_digest(config))
    if skeleton is not None and data is not None:
        attempt(lambda: check_context(config, data, skeleton, outlined_instructions))
    if config.lora.start_from is not None and counts is not None:
        attempt(lambda: given_adapter(config.lora, counts.trained))
    transforms = attempt(lambda: transforms_of(config))
    if problems:
        raise UserError(*dict.fromkeys(problems))
    if counts is None or data is None or schedule is None or transforms is None or device is None:
        raise FlocktuneError("nothing was found wrong, yet the recipe could not be read")
    return counts, data, schedule, transforms, device


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


def _device(config: RunConfig) -> torch.device:
    """Where it runs. A recipe whose model is not here may ask for CUDA that is not here either: for another machine.

    Raises UserError when it is not here, or can not quantise the model, or FedBiOT's emulator, as the recipe asks.
    """
    name, emulator = config.runtime.device, emulator_settings(config)
    asked = {"model": config.model.quantization}
    if config.method == "fedbiot":
        asked["emulator"] = emulator.quantization
    wants_cuda = name.startswith("cuda") or (name == "auto" and "4bit" in asked.values())
    if wants_cuda and not torch.cuda.is_available() and stand_in(config.model.path):
        return torch.device("cuda")
    device = pick_device(name)
    for part, quantization in asked.items():
        if quantization != "none":
            try:
                quantization_settings(replace(config.model, quantization=quantization), device)
            except UserError as error:
                raise UserError(
                    *map(of_the_emulator, error.problems) if part == "emulator" else error.problems
                ) from None
    return device


def _is_here(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.is_available()


def _client_memory(config: RunConfig, counts: Counts, rows: Encoded, device: torch.device) -> tuple[int, bool]:
    """What a client's model and training take on ``device``, and whether layers are computed again so that it fits."""
    weights = counts.held.base_bytes
    shape = largest_batch(rows, np.arange(len(rows)), config.local.batch_size, config.data.batching)

    def needed(recompute: bool = False) -> int:
        skeleton, lora = counts.skeleton()
        return weights + training_bytes(skeleton, lora, counts.trains, config.local, shape, device, recompute=recompute)

    if _is_here(device):
        recompute = recomputes(config.model, needed, device)
    else:
        recompute = config.model.gradient_checkpointing is True
    return needed(recompute), recompute


def _at_once(config: RunConfig, values: int, recompute: bool) -> int:
    """How many clients are trained at once, if so many take part. Of a model with experts it may be one."""
    engine = config.engine
    if not isinstance(engine, InProcessEngine) or one_after_another(config):
        return 1
    return 1 if recompute and config.lora.dropout else clients_at_once(engine, values)


def _memory(config: RunConfig, counts: Counts, client_bytes: int, at_once: int) -> int:
    """Of one process with all weights, and with what the clients that are trained at once may take."""
    training = client_bytes - counts.held.base_bytes
    if isinstance(config.engine, InProcessEngine):
        training = max(training, min(at_once * training, config.engine.stack_mb * 2**20))
    return training + counts.held.base_bytes + (counts.base.base_bytes if counts.emulator else 0)
