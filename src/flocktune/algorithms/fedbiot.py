"""FedBiOT (arXiv 2406.17706): the full model stays with the server; clients tune an adapter beside an emulator.

    E  the emulator's LoRA, trained by the server alone, on public data (lower level, :mod:`alignment`)
    A  the LoRA of the adapter layers, trained by the clients alone (upper level), averaged as FedAvg does

Each round: the server aligns E with A_t fixed; client k starts from A_t and minimises its loss through the emulator
plus ``eps/2 || dW(A) - dW(A_t) ||_F^2`` with E fixed (equation 6); A_{t+1} = sum p_k A_k. E and A go down, A comes up.

FedOT and Offsite-Tuning (arXiv 2302.04870) are settings: adapter layers at both ends, no alignment after the first, no
proximal term, and for the latter one client.

What we do differently from the published code: the adapter can be plugged into the full model at any time by its names;
the emulator's output is computed once a row and round; every draw has a seed, so a killed round is repeated to the bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from flocktune.aggregation import server_opt
from flocktune.algorithms.alignment import Fidelity, Pair, alignment_loss, fidelity
from flocktune.algorithms.local import ClientData, train_locally, training_only
from flocktune.algorithms.prefix import PrefixCache
from flocktune.config.schema import AggregationConfig, AlignmentConfig, EmulatorConfig, LocalConfig
from flocktune.data.batching import Batch
from flocktune.errors import UserError
from flocktune.interfaces import ClientHalf, Memory, ServerHalf, State
from flocktune.models.bundle import other_emulator
from flocktune.models.lora import Adapter
from flocktune.models.split import SplitPlan
from flocktune.seeds import derive_seed
from flocktune.tensors import add_scaled, group, prefixed
from flocktune.training import Adjust, NotFinite, Penalty, fit
from flocktune.types import ClientTask, Tensors, Update

KIND = "fedbiot"

EMULATOR, ADAPTER = "emulator", "adapter"
"""Groups of tensors in state and message. Both have the emulator's names; :attr:`SplitPlan.to_full` renames A's."""


PUBLIC = "public"
"""The measured set whose rows are those that are aligned on."""


@dataclass(frozen=True, eq=False)
class PublicData:
    """The server's rows: ``batches(seed, steps)`` to align on, and fixed sets, by name, to measure fidelity on.

    A set has its own numbers of rows, but that of the name ``public``, whose rows are those of ``batches``.
    """

    batches: Callable[[int, int], Iterable[Batch]]
    measured: Mapping[str, Callable[[], Iterable[Batch]]]


def server_half(
    pair: Pair,
    public: PublicData,
    alignment: AlignmentConfig,
    aggregation: AggregationConfig,
    *,
    seed: int,
    cache: EmulatorConfig | None = None,
) -> ServerHalf:
    """State: ``emulator/*``, ``adapter/*`` (float32), the server optimiser's ``optimizer/*``, and ``aligned``.

    ``aligned`` is the number of rounds for which E has been aligned: a state that was saved after an alignment is not
    aligned again. ``cache``: how what comes out of the full model's frozen layers is kept within an alignment. It is
    not kept for the next one: a run that was killed would begin without, and rows that are computed among others round
    otherwise.
    """
    settings, plan = aggregation.server_optimizer, pair.plan
    cache = cache or EmulatorConfig()

    def init(tensors: Tensors) -> State:
        parts = split_tensors(plan, tensors)
        optimizer = server_opt.init(settings, parts[ADAPTER])
        return {**joined(parts), **prefixed("optimizer", optimizer), "aligned": torch.tensor(0)}

    def prepare(state: State, round: int) -> tuple[State, Mapping[str, Any]]:
        if int(state["aligned"]) > round:
            return state, {}
        started = time.perf_counter()
        steps = alignment.first_steps if round == 0 else alignment.steps
        emulator, adapter = group(state, EMULATOR), group(state, ADAPTER)
        pair.emulator.load({**emulator, **adapter})
        pair.full.load(plan.to_full(adapter))
        known = {name: pair.remembering(cache) for name in (PUBLIC, *public.measured)}
        before = _measure(known, public)
        if steps:
            batches = public.batches(derive_seed(seed, round, "alignment"), steps)
            dropout = derive_seed(seed, round, "alignment dropout")
            try:
                _align(known[PUBLIC], emulator, batches, alignment, steps, dropout)
            except NotFinite as error:
                raise NotFinite(f"alignment before round {round + 1}: {_for_the_server(error)}") from None
            state = {**state, **prefixed(EMULATOR, pair.emulator.tensors(emulator))}
        after = _measure(known, public) if steps else before
        told = {"steps": steps, **_told(before, after, alignment.kl_weight), "seconds": time.perf_counter() - started}
        return {**state, "aligned": torch.tensor(round + 1)}, told

    def message(state: State, round: int) -> Tensors:
        return joined({part: group(state, part) for part in (EMULATOR, ADAPTER)})

    def step(state: State, update: Update) -> State:
        adapter, optimizer = server_opt.step(settings, group(state, ADAPTER), update.delta, group(state, "optimizer"))
        return {**state, **prefixed(ADAPTER, adapter), **prefixed("optimizer", optimizer)}

    def result(state: State) -> Tensors:
        return plan.to_full(group(state, ADAPTER))

    return ServerHalf(init, message, step, result, returned=_adapter_of, prepare=prepare)


def _align(
    pair: Pair, emulator: Iterable[str], batches: Iterable[Batch], alignment: AlignmentConfig, steps: int, seed: int
) -> None:
    """Train E, the factors named in ``emulator``, in place. Raises NotFinite."""
    local = LocalConfig(steps=steps, lr=alignment.lr, clip_norm=alignment.clip_norm, batch_size=alignment.batch_size)
    loss = alignment_loss(pair, alignment)
    with training_only(pair.emulator, emulator) as trained:
        fit(pair.emulator.model, trained, batches, local, total_steps=steps, seed=seed, loss=loss)


def message_half(plan: SplitPlan) -> ServerHalf:
    """As :func:`server_half` in names and shapes of what goes down and comes up, where there is no full model."""

    def init(tensors: Tensors) -> State:
        return joined(split_tensors(plan, tensors))

    def step(state: State, update: Update) -> State:
        return {**state, **prefixed(ADAPTER, add_scaled(group(state, ADAPTER), update.delta))}

    return ServerHalf(init, lambda state, round: state, step, lambda state: state, returned=_adapter_of)


def emulator_result(state: State) -> Tensors:
    """E and A together, by the emulator's names: what a client could use (AdapEmu)."""
    return {**group(state, EMULATOR), **group(state, ADAPTER)}


def client_half(
    emulator: Adapter,
    plan: SplitPlan,
    digest: str,
    data: Callable[[str], ClientData],
    local: LocalConfig,
    settings: EmulatorConfig,
    weights: str,
    *,
    rounds: int,
    penalty: Penalty | None = None,
    adjust: Adjust | None = None,
) -> ClientHalf:
    """Local training of the adapter on the emulator that ``emulator`` is attached to; ``digest`` is its bundle's.

    The full model is not needed and never opened. Raises UserError for a task that is for another emulator, NotFinite.
    """

    def train(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
        if task.model_digest != digest:
            raise UserError(other_emulator(task.model_digest, digest))
        adapter = group(task.tensors, ADAPTER)
        emulator.load({**group(task.tensors, EMULATOR), **adapter})
        mine = data(task.client)
        rows_seen = local.steps * local.accumulate * local.batch_size if local.steps else 0
        again = rows_seen > mine.examples if local.steps else (local.epochs or 0) > 1
        prefix = PrefixCache(emulator.model, plan.stack, plan.frozen, settings, keep=again, above=mine.loss)
        update = train_locally(
            emulator, adapter, task, mine, local, weights,
            rounds=rounds, loss=prefix.loss, prefix=prefix, penalty=penalty, adjust=adjust,
        )  # fmt: skip
        return update, memory

    return train


def _adapter_of(message: Tensors) -> Tensors:
    return group(message, ADAPTER)


def split_tensors(plan: SplitPlan, tensors: Tensors) -> Mapping[str, Tensors]:
    """The factors of a whole emulator as E and A."""
    return {
        EMULATOR: {name: value for name, value in tensors.items() if not plan.in_adapter(name)},
        ADAPTER: {name: value for name, value in tensors.items() if plan.in_adapter(name)},
    }


def _for_the_server(error: NotFinite) -> str:
    """What happened, without the advice for clients' settings."""
    return str(error).partition(" Lower local.lr")[0] + " Lower alignment.lr, or set alignment.clip_norm."


def joined(parts: Mapping[str, Tensors]) -> dict[str, torch.Tensor]:
    """The inverse of :func:`split_tensors`, with each part's name before its tensors': a message."""
    return {name: value for part, tensors in parts.items() for name, value in prefixed(part, tensors).items()}


def _measure(pairs: Mapping[str, Pair], public: PublicData) -> Mapping[str, Fidelity]:
    return {name: fidelity(pairs[name], batches()) for name, batches in public.measured.items()}


def _told(before: Mapping[str, Fidelity], after: Mapping[str, Fidelity], kl_weight: float) -> dict[str, Any]:
    """Fidelity in nats a token by data set, and the loss on the public rows, before and after; its layer-wise term is
    left out."""
    kl = {name: {"before": before[name].kl.value, "after": after[name].kl.value} for name in before}
    told: dict[str, Any] = {"fidelity": kl}
    if PUBLIC in before:
        first, last = (at[PUBLIC].hidden.value + kl_weight * at[PUBLIC].kl.value for at in (before, after))
        told |= {"loss_first": first, "loss_last": last}
    return told
