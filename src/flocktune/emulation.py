"""What FedBiOT needs beside a base model: the emulator's bundle, both models with their adapters, the public rows."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from flocktune.algorithms.alignment import Pair
from flocktune.algorithms.fedbiot import PUBLIC, PublicData
from flocktune.config.schema import AlignmentConfig, EmulatorConfig, LoraConfig, ModelConfig, RunConfig
from flocktune.data.batching import Batch, evaluation_batches, training_batches
from flocktune.data.encoding import Encoded, default_cache_folder
from flocktune.errors import Problem, UserError
from flocktune.evaluation.evaluate import choose_rows
from flocktune.files import read_json, write_json
from flocktune.models.bundle import Bundle, bundle_folder, read_bundle, receive_bundle, remove_dead, write_bundle
from flocktune.models.layers import block_influence, layer_stack, lora_within
from flocktune.models.load import load_model, load_skeleton, load_tokenizer
from flocktune.models.split import SplitPlan, plan_split
from flocktune.resident import Base, Instructions, base_digest, load_base, load_instructions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOG = logging.getLogger(__name__)

MAKE_THE_EMULATOR = ("adapter_layers", "drop", "placement", "choice")
"""The settings that decide which layers an emulator has; the others are about its use."""

IMPORTANCE_ROWS = 64
"""Public rows on which the influence of layers is measured."""


@dataclass(frozen=True, eq=False)
class Emulated:
    """The emulator's bundle, and the emulator in memory with E and A attached."""

    bundle: Bundle
    base: Base


def split_of(config: RunConfig, public: Callable[[], Instructions]) -> SplitPlan:
    """The split that the recipe asks for; ``public`` is read when layers are chosen by importance. Raises UserError."""
    settings = emulator_settings(config)
    skeleton = load_skeleton(config.model)
    stack = layer_stack(skeleton)
    count = skeleton.config.get_text_config().num_hidden_layers
    # Before rows are read and weights loaded: with layers chosen evenly a wrong setting shows at no cost.
    even = plan_split(count, replace(settings, choice="uniform"), stack=stack)
    if settings.choice == "uniform":
        return even
    rows = public()
    chosen = choose_rows(rows.examples, IMPORTANCE_ROWS)
    model = _as_stored(config)
    batches = evaluation_batches(every_token(rows.encoded), chosen, batch_size=8, batching="padded", pad_id=0)
    influence = block_influence(model, stack, [(batch.input_ids, batch.label_index) for _, batch in batches])
    return plan_split(count, settings, stack=stack, importance=influence)


def compress(config: RunConfig, folder: Path) -> Bundle:
    """Write the emulator of ``config.model`` as the recipe's ``emulator`` says. Raises UserError, OSError."""
    plan = split_of(config, lambda: public_rows(config))
    return write_bundle(_as_stored(config), load_tokenizer(config.model), plan, base_digest(config.model), folder)


def _as_stored(config: RunConfig) -> PreTrainedModel:
    """The full model as its files are, to be taken apart: not quantised, on the CPU."""
    plain = replace(config.model, quantization="none", gradient_checkpointing=False)
    return load_model(plain, torch.device("cpu"), stored_dtype=True)


def bundle_of(config: RunConfig, own: Path | None = None) -> Bundle:
    """The run's bundle: ``own``, the one in its folder, when it is there and sound; else ``emulator.path``; else one
    made of the full model and kept in the cache by what it is made of.

    Raises UserError when it is damaged, or another model's.
    """
    settings = emulator_settings(config)
    full_digest = base_digest(config.model)
    if own is not None and own.exists():
        try:
            bundle = read_bundle(own)
        except UserError as error:
            _LOG.warning("the run's own emulator is damaged and is made again: %s", error)
        else:
            if bundle.full_digest == full_digest:
                return bundle
    if settings.path is not None:
        bundle = read_bundle(Path(settings.path).expanduser())
        if bundle.full_digest != full_digest:
            raise UserError(
                Problem(
                    "emulator.path",
                    f"the emulator of {config.model.path!r}, {full_digest[:12]}...",
                    f"that of another full model, {bundle.full_digest[:12]}...",
                    "Compress this model, or name the other one: model.path",
                )
            )
        return bundle
    cache = default_cache_folder()
    asked = {key: value for key, value in asdict(settings).items() if key in MAKE_THE_EMULATOR}
    if settings.choice == "importance":
        asked["public"] = public_rows(config).digest
    key = hashlib.sha256(json.dumps([full_digest, asked], sort_keys=True).encode()).hexdigest()
    note = cache / "emulators" / f"made-{key[:32]}.json"
    if (known := _noted(note, cache)) is not None:
        return known
    bundle = _made(config, cache)
    write_json(note, {"digest": bundle.digest})
    return bundle


def _noted(note: Path, cache: Path) -> Bundle | None:
    """The bundle that a note of the cache names, when both are sound."""
    try:
        digest = str(read_json(note)["digest"])
        return read_bundle(bundle_folder(cache, digest), digest=digest)
    except (UserError, KeyError, TypeError):
        return None


def _made(config: RunConfig, cache: Path) -> Bundle:
    made = cache / "emulators" / f".made.{os.getpid()}.tmp"
    made.parent.mkdir(parents=True, exist_ok=True)
    remove_dead(made.parent)
    try:
        digest = compress(config, made).digest
        return receive_bundle(digest, made.rename, cache)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def load_emulator(config: RunConfig, bundle: Bundle) -> Emulated:
    """The emulator with LoRA on all its layers. This is all of a model that a client ever opens. Raises UserError."""
    settings = emulator_settings(config)
    model = replace(config.model, path=str(bundle.folder), quantization=settings.quantization)
    lora = emulator_lora(config.lora, bundle)
    try:
        return Emulated(bundle, load_base(model, lora, config.runtime.device, beside=1))
    except UserError as error:
        raise UserError(*(of_the_emulator(problem) for problem in error.problems)) from None


def of_the_emulator(problem: Problem | str) -> Problem | str:
    """What is wrong with a quantised emulator is said of the setting that asked for it."""
    if isinstance(problem, Problem) and problem.where == "model.quantization":
        return replace(problem, where="emulator.quantization")
    return problem


def emulator_lora(lora: LoraConfig, bundle: Bundle) -> LoraConfig:
    """LoRA on every layer of the emulator, and on nothing else."""
    skeleton = load_skeleton(ModelConfig(path=str(bundle.folder)))
    return lora_within(skeleton, lora, bundle.plan.stack, range(len(bundle.plan.held)))


def load_full(config: RunConfig, plan: SplitPlan) -> Base:
    """The full model with LoRA on the adapter's layers alone. Raises UserError."""
    lora = lora_within(load_skeleton(config.model), config.lora, plan.stack, plan.adapter)
    return load_base(config.model, lora, config.runtime.device, beside=1)


def public_rows(config: RunConfig, load: Callable[..., Instructions] = load_instructions) -> Instructions:
    """The server's own rows, read and encoded as the clients' are. Raises UserError naming ``alignment.public``."""
    settings = alignment_settings(config)
    data = replace(config.data, columns=settings.columns, max_rows=settings.max_rows)
    try:
        return load(settings.public, data, config.model)
    except UserError as error:
        raise UserError(*(f"alignment.public: {problem}" for problem in error.problems)) from None


def public_data(config: RunConfig, full: Base, test: Instructions) -> PublicData:
    """Batches to align on, and the rows on which fidelity is measured: public ones, and held-out ones of clients' kind.

    All tokens of a row count, its prompt too.
    """
    settings = alignment_settings(config)
    public = public_rows(config)
    encoded = every_token(public.encoded)

    def batches(seed: int, steps: int) -> Iterable[Batch]:
        return training_batches(
            encoded,
            range(len(encoded)),
            batch_size=settings.batch_size,
            batching=config.data.batching,
            pad_id=full.pad_id,
            seed=seed,
            steps=steps,
            epochs=None,
        )

    def measured(rows: Instructions) -> Callable[[], Iterable[Batch]]:
        chosen = choose_rows(rows.examples, settings.fidelity_rows)
        tokens = every_token(rows.encoded)

        def each() -> Iterable[Batch]:
            found = evaluation_batches(tokens, chosen, batch_size=16, batching="padded", pad_id=full.pad_id)
            return (batch for _, batch in found)

        return each

    sets = {PUBLIC: public, "held_out": test} if settings.fidelity_rows else {}
    return PublicData(batches, {name: measured(rows) for name, rows in sets.items() if rows.examples})


def pair_of(config: RunConfig, emulated: Emulated) -> tuple[Base, Pair]:
    """The full model, and both of them as the server sees them."""
    full = load_full(config, emulated.bundle.plan)
    return full, Pair(full.adapter, emulated.base.adapter, emulated.bundle.plan)


def every_token(encoded: Encoded) -> Encoded:
    """The same rows with every token a target but each row's first."""
    trainable = np.ones(len(encoded.tokens), np.bool_)
    trainable[encoded.offsets[:-1][np.diff(encoded.offsets) > 0]] = False
    return replace(encoded, trainable=trainable)


def emulator_settings(config: RunConfig) -> EmulatorConfig:
    """The recipe's, which method ``fedbiot`` always has."""
    return config.emulator or EmulatorConfig()


def alignment_settings(config: RunConfig) -> AlignmentConfig:
    """The recipe's, which method ``fedbiot`` always has."""
    return config.alignment or AlignmentConfig()
