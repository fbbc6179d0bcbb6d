"""The only place that turns a recipe into objects: base model, data, clients, server, engine.

The base model and the tokens are loaded once in a process and shared by every run that asks for the same ones; only
adapters are swapped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flocktune.algorithms import fedavg
from flocktune.algorithms.fedavg import ClientData
from flocktune.config.load import to_tree
from flocktune.config.schema import Availability, DataConfig, LoraConfig, ModelConfig, Named, RunConfig
from flocktune.data.batching import packing_leak, training_batches
from flocktune.data.encoding import Encoded, EncodingReport, default_cache_folder, encode_cached
from flocktune.data.examples import Example, examples_digest, rows_digest
from flocktune.data.heterogeneity import category_counts, heterogeneity
from flocktune.data.partition import Partition, allocate, hold_out
from flocktune.data.sources import read_examples
from flocktune.errors import Problem, UserError
from flocktune.evaluation.generate import prompt_room
from flocktune.interfaces import ClientHalf, ServerHalf
from flocktune.models.load import load_model, load_tokenizer, model_digest, pad_id, pick_device
from flocktune.models.lora import Adapter, attach, scale
from flocktune.models.peft_io import import_peft
from flocktune.scheduling import Cohort, cohort_size, read_trace, select
from flocktune.tensors import mismatches
from flocktune.types import Tensors

_LOG = logging.getLogger(__name__)

EVERYONE = "everyone"
"""The one client of a centralised run: it holds all rows."""


@dataclass(frozen=True, eq=False)
class Base:
    """A resident base model with one adapter attached; every client and every run swaps its tensors in."""

    model: Any
    tokenizer: Any
    adapter: Adapter
    device: torch.device
    pad_id: int


@dataclass(frozen=True, eq=False)
class Instructions:
    """One data set, read and encoded once. ``digest`` is of what was read."""

    examples: Sequence[Example]
    encoded: Encoded
    report: EncodingReport
    digest: str

    @property
    def categories(self) -> list[str]:
        """The category of every row."""
        return [example.category for example in self.examples]

    def take(self, rows: Sequence[int]) -> Instructions:
        """Only these rows, in this order."""
        return replace(self, examples=[self.examples[row] for row in rows], encoded=self.encoded.take(rows))


@dataclass(frozen=True, eq=False)
class ClientRows:
    """Client data allocation, done: who holds which rows of ``train``, and what is held out."""

    train: Instructions
    test: Instructions
    clients: Mapping[str, NDArray[np.int64]]
    unassigned: int

    def describe(self) -> dict[str, Any]:
        """What a run tells about its data: counts only, never a text."""
        categories = self.train.categories
        counts = category_counts(self.clients, categories)
        lengths = self.train.encoded.lengths
        return {
            "clients": {
                name: {
                    "rows": len(rows),
                    "tokens": int(lengths[rows].sum()),
                    "categories": {category: count for category, count in counts[name].items() if count},
                }
                for name, rows in self.clients.items()
            },
            "heterogeneity": asdict(heterogeneity(self.clients, categories)),
            "test": {name: self.test.categories.count(name) for name in sorted(set(self.test.categories))},
            "untrainable_rows": len(self.train.report.untrainable),
            "truncated_rows": self.train.report.truncated,
            "unassigned_rows": self.unassigned,
        }


@dataclass(frozen=True, eq=False)
class Federation:
    """Everything a run needs. ``identity``: recipe, data and base model, for a safe resume."""

    config: RunConfig
    base: Base
    data: ClientRows
    rounds: int
    start: Tensors
    server: ServerHalf
    client: ClientHalf
    schedule: Callable[[int], Cohort]
    identity: Mapping[str, Any]


@lru_cache(maxsize=1)
def load_base(model: ModelConfig, lora: LoraConfig, device: str) -> Base:
    """Load the base model, attach an adapter, remember both. Raises UserError."""
    tokenizer = load_tokenizer(model)
    where = pick_device(device)
    network = load_model(model, where)
    return Base(network, tokenizer, attach(network, lora, seed=0), where, pad_id(tokenizer))


@lru_cache(maxsize=4)
def load_instructions(source: str, data: DataConfig, model: ModelConfig) -> Instructions:
    """Read and encode one data set, from the token cache where it can. Raises UserError."""
    examples = read_examples(source, data.columns, max_rows=data.max_rows)
    encoded, report = encode_cached(
        examples,
        load_tokenizer(model),
        template=data.template,
        max_tokens=data.max_tokens,
        train_on=data.train_on,
        digest=examples_digest(examples),
        folder=default_cache_folder(),
    )
    if report.untrainable:
        _LOG.warning(
            "%s: %d of %d rows have nothing to learn from and are left out",
            source,
            len(report.untrainable),
            report.rows,
        )
    return Instructions(examples, encoded, report, rows_digest(examples))


def allocate_clients(config: RunConfig) -> ClientRows:
    """Hold out the test rows, then deal the others out to clients. Raises UserError."""
    data = config.data
    train = load_instructions(data.train, data, config.model)
    usable = [row for row in range(len(train.examples)) if train.encoded.targets[row] > 0]
    if data.test is None:
        kept, held = hold_out([train.categories[row] for row in usable], data.test_rows_per_category, config.seed)
        test = train.take([usable[row] for row in held])
        usable = [usable[row] for row in kept]
    else:
        test = load_instructions(data.test, replace(data, max_rows=None), config.model)
    rows = np.array(usable, dtype=np.int64)
    partition: Partition = allocate(
        config.allocation,
        categories=[train.examples[row].category for row in usable],
        clients=[train.examples[row].client for row in usable],
        texts=lambda: [f"{train.examples[row].instruction} {train.examples[row].context}" for row in usable],
        seed=config.seed,
    )
    clients = {name: rows[part] for name, part in partition.clients.items()}
    return ClientRows(train, test, clients, len(partition.unassigned))


def federation(config: RunConfig) -> Federation:
    """Build everything a run needs from its recipe. Raises UserError.

    The baselines are settings: ``base`` runs no round, ``local`` always selects one client, ``centralised`` has one
    client with all rows that takes as many steps a round as a whole cohort.
    """
    data = allocate_clients(config)
    base = load_base(config.model, config.lora, config.runtime.device)
    local = config.local
    if config.method == "centralised":
        local = replace(local, steps=centralised_steps(config, data.clients), epochs=None)
        data = replace(data, clients={EVERYONE: np.sort(np.concatenate(list(data.clients.values())))})
    if config.data.batching == "packed":
        refuse_leaks(base)
    rounds = 0 if config.method == "base" else config.rounds
    check_context(config, data, base.model)
    return Federation(
        config,
        base,
        data,
        rounds,
        starting_adapter(config, base.adapter),
        fedavg.server_half(config.aggregation),
        fedavg.client_half(
            base.adapter, _client_data(config, base, data), local, config.aggregation.weights, rounds=rounds
        ),
        scheduler(config, data.clients),
        {
            "recipe": to_tree(config),
            "data": data.train.digest,
            "test": data.test.digest,
            "model": _base_digest(config.model),
        },
    )


_base_digest = lru_cache(maxsize=1)(model_digest)  # once in a process, as the base itself: it may be gigabytes


def scheduler(config: RunConfig, clients: Mapping[str, Sequence[int] | NDArray[np.int64]]) -> Callable[[int], Cohort]:
    """Round -> cohort. Raises UserError for an unknown client or a bad trace now, not when its round has come."""
    sizes = {name: len(rows) for name, rows in clients.items()}
    selection = config.scheduling.selection
    trace = read_trace(Path(selection.trace), list(sizes)) if isinstance(selection, Availability) else None

    def schedule(number: int) -> Cohort:
        if config.method == "centralised":
            return Cohort((EVERYONE,), 1, 1)
        return select(config.scheduling, sizes, round=number, seed=config.seed, trace=trace)

    schedule(0)
    return schedule


def check_context(config: RunConfig, data: ClientRows, model: Any) -> None:
    """Raise UserError when a row, or an answer with its prompt, has more tokens than the model has positions."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(int(rows.encoded.lengths.max(initial=0)) for rows in (data.train, data.test))
    if positions is not None and longest > positions:
        raise UserError(
            Problem(
                "data.max_tokens",
                f"at most the {positions} tokens of the model's context",
                f"a row of {longest}",
                f"Set data.max_tokens to {positions} or less.",
            )
        )
    if config.evaluation.generate and data.test.examples:
        prompt_room(model, config.evaluation.max_new_tokens)


def centralised_steps(config: RunConfig, clients: Mapping[str, Sequence[int] | NDArray[np.int64]]) -> int:
    """Steps a round of the centralised baseline: those of a whole cohort, so both see as many examples."""
    selection = config.scheduling.selection
    cohort = len(selection.clients) if isinstance(selection, Named) else cohort_size(selection.fraction, len(clients))
    mean = np.mean([fedavg.steps_per_round(config.local, len(rows)) for rows in clients.values()])
    return max(1, round(float(mean) * cohort))


def refuse_leaks(base: Base) -> None:
    """Raise UserError when packed rows of this model see each other: it would learn from the wrong text."""

    @torch.no_grad()
    def logits(input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        placed = {"input_ids": input_ids.to(base.device), "position_ids": position_ids.to(base.device)}
        return base.model(**placed, use_cache=False).logits

    if packing_leak(logits, base.model.config.get_text_config().vocab_size) > 1e-3:
        raise UserError(
            Problem(
                "data.batching",
                "padded, for this model",
                "packed, but packed rows see each other in it",
                "It does not tell rows apart by restarting position ids. Set data.batching: padded.",
            )
        )


def starting_adapter(config: RunConfig, adapter: Adapter) -> Tensors:
    """The adapter before round 1: drawn from the seed, or ``lora.start_from``. Raises UserError."""
    adapter.reset(config.seed)
    fresh = adapter.tensors()
    if config.lora.start_from is None:
        return fresh
    return given_adapter(config.lora, fresh)


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


def _client_data(config: RunConfig, base: Base, data: ClientRows) -> Callable[[str], ClientData]:
    encoded = data.train.encoded

    def of(client: str) -> ClientData:
        rows = data.clients[client]
        return ClientData(
            len(rows),
            int(encoded.targets[rows].sum()),
            lambda seed, steps, epochs: training_batches(
                encoded,
                rows,
                batch_size=config.local.batch_size,
                batching=config.data.batching,
                pad_id=base.pad_id,
                seed=seed,
                steps=steps,
                epochs=epochs,
            ),
        )

    return of
