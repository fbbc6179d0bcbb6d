"""What a run starts from: adapters before round 1, drawn from the seed or given."""

from __future__ import annotations

from pathlib import Path

from flocktune.algorithms.alignment import Pair
from flocktune.config.schema import LoraConfig, RunConfig
from flocktune.errors import Problem, UserError
from flocktune.models.lora import Adapter
from flocktune.models.lora_module import scale
from flocktune.models.peft_io import import_peft
from flocktune.tensors import mismatches
from flocktune.types import Tensors


def starting_adapter(config: RunConfig, adapter: Adapter) -> Tensors:
    """The adapter before round 1: drawn from the seed, or ``lora.start_from``. Raises UserError."""
    adapter.reset(config.seed)
    fresh = adapter.tensors()
    if config.lora.start_from is None:
        return fresh
    return given_adapter(config.lora, fresh)


def starting_emulator(config: RunConfig, pair: Pair) -> Tensors:
    """E and A before round 1: drawn from the seed, or A from ``lora.start_from``. Raises UserError."""
    pair.emulator.reset(config.seed)
    fresh = pair.emulator.tensors()
    if config.lora.start_from is None:
        return fresh
    given = given_adapter(config.lora, pair.plan.to_full(fresh))
    return {**fresh, **pair.plan.to_emulator(given)}


def given_adapter(lora: LoraConfig, expected: Tensors) -> Tensors:
    """The adapter of ``lora.start_from``, of ``expected`` names and shapes. Raises UserError when it does not fit."""
    given, theirs = import_peft(Path(lora.start_from or ""))
    problems = mismatches(expected, given)
    if scale(theirs) != scale(lora):  # its shapes would fit, and yet it would act more, or less, than it was trained to
        problems.append(f"scale {scale(theirs):g} instead of {scale(lora):g} (lora.alpha, lora.rank, lora.rslora)")
    if problems:
        shown = "; ".join(problems[:5]) + ("; ..." if len(problems) > 5 else "")
        raise UserError(
            Problem(
                "lora.start_from",
                "an adapter of the recipe's rank, alpha and targets",
                shown,
                "Set lora to what the adapter was trained with.",
            )
        )
    return given
