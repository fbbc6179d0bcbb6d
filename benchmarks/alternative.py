"""A round of flocktune beside a round of FedIT as its public code has it, and what each replaced part gives.

Every variant starts from the same adapter and trains the same clients on the same rows, one epoch a round, with the
same batch size, steps, learning rates, rank and targets, and the loss on answers alone. Rounds are the turns, so that
in the end every variant has trained a whole federation, whose held-out loss says that all did the same.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from benchmarks.ladder import (
    LADDER,
    TEMPLATE,
    Switches,
    Work,
    cached_row,
    frozen_round,
    plain_round,
    prompt_and_answer,
    usual_tokens,
)
from benchmarks.networks import Network, frozen_base, own_names, own_network, peft_names, peft_network
from benchmarks.paired import Options, Result, Spread, interleaved, ratio, say, timed
from flocktune.algorithms import fedavg
from flocktune.algorithms.local import ClientData
from flocktune.algorithms.rules import Sharing, diagnose
from flocktune.config.engines import InProcessEngine
from flocktune.config.schema import AggregationConfig, Columns, LocalConfig, LoraConfig, ModelConfig
from flocktune.data.batching import Batching, evaluation_batches, training_batches
from flocktune.data.encoding import encode
from flocktune.data.sources import read_examples
from flocktune.engine.checkpoint import Checkpoint, save_checkpoint
from flocktune.engine.in_process import InProcess
from flocktune.engine.rounds import Hooks, run_rounds
from flocktune.errors import UserError
from flocktune.interfaces import State
from flocktune.models.load import load_model, load_tokenizer, pad_id
from flocktune.models.lora import Adapter, attach
from flocktune.models.lora_module import scale
from flocktune.scheduling import Cohort
from flocktune.stacking import together
from flocktune.training import evaluate_loss
from flocktune.types import Tensors

GOAL = 5.0
PADDED, PACKED = "flocktune, the whole round", "+ packed rows"
OURS, OURS_BF16 = "+ clients stacked", "+ base in bfloat16"
FLOOR = "floor: the frozen base alone"
CPU = torch.device("cpu")


@dataclass
class Federation:
    """One variant on its way through the rounds: ``advance(state, round) -> state``; ``adapter`` reads a state."""

    state: Mapping[str, Tensor]
    advance: Callable[[Mapping[str, Tensor], int], Mapping[str, Tensor]]
    adapter: Callable[[Mapping[str, Tensor]], Tensors]

    def turn(self, number: int) -> float:
        """One round; its seconds."""
        started = time.perf_counter()
        self.state = self.advance(self.state, number)
        return time.perf_counter() - started


def run(options: Options) -> Result:
    """All variants, round by round in turns; then the held-out loss of each."""
    turns, orders = (1, 1) if options.quick else (3, 2)
    datasets.disable_progress_bars()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with tempfile.TemporaryDirectory() as folder:
            work = _work(options, folder)
            own = attach(load_model(ModelConfig(options.model), CPU), work.lora, seed=0)
            start = own.tensors()
            federations = _federations(options, work, own, start)
            plain = frozen_base(load_model(ModelConfig(options.model), CPU), list(own.layers))
            measures = {name: each.turn for name, each in federations.items()}
            measures[FLOOR] = lambda number: timed(lambda: frozen_round(work, plain, number))
            seconds = interleaved(measures, turns)
            adapters = {name: each.adapter(each.state) for name, each in federations.items()}
            adapters |= _other_orders(work, own_network(own), start, turns + 1, count=orders)
    finally:
        logging.set_verbosity(verbosity)
        datasets.enable_progress_bars()
    say("  held-out losses")
    losses = {name: held_out_loss(work, own, tensors) for name, tensors in {"start": start, **adapters}.items()}
    return _result(work, seconds, losses, quick=options.quick)


def _work(options: Options, folder: str) -> Work:
    quick = options.quick
    clients, steps, held = (2, 2, 8) if quick else (10, 3, 96)
    local = LocalConfig(epochs=1, batch_size=4 if quick else 8, lr=2e-3, schedule="linear")
    tokenizer = load_tokenizer(ModelConfig(options.model))
    examples = read_examples(options.data, Columns(), max_rows=100 if quick else 2000)
    # A length that no row reaches: nothing is cut, so both ways of tokenising can be compared row by row.
    encoded, _ = encode(examples, tokenizer, template=TEMPLATE, max_tokens=1 << 20, train_on="responses")
    fits = [row for row in range(len(examples)) if encoded.targets[row] > 0 and encoded.lengths[row] <= 256]
    # The few rows where tokens span prompt and answer, or are more than one exchange, are not the same work.
    same = [
        row for row in fits if usual_tokens(tokenizer, **prompt_and_answer(examples[row])) == cached_row(encoded, row)
    ]
    a_client = steps * local.batch_size
    if len(same) < clients * a_client + held:
        raise UserError(f"expected at least {clients * a_client + held} rows that both tokenise alike, got {len(same)}")
    drawn = np.random.default_rng(0).permutation(np.array(same, np.int64))
    parts = np.split(drawn[: clients * a_client], clients)
    return Work(
        examples,
        encoded,
        {f"client-{number + 1}": np.sort(part) for number, part in enumerate(parts)},
        drawn[clients * a_client :][:held],
        tokenizer,
        pad_id(tokenizer),
        local,
        LoraConfig(),
        0,
        folder,
    )


def _federations(options: Options, work: Work, own: Adapter, start: Tensors) -> dict[str, Federation]:
    usual = peft_network(load_model(ModelConfig(options.model), CPU), work.lora, start)
    in_bfloat16 = attach(load_model(ModelConfig(options.model, dtype="bfloat16"), CPU), work.lora, seed=0)
    found = {
        name: _plain(work, own_network(own) if switches.own_lora else usual, switches, start)
        for name, switches in LADDER.items()
    }
    found[PADDED] = _ours(work, own, start, "padded", stack=1)
    found[PACKED] = _ours(work, own, start, "packed", stack=1)
    found[OURS] = _ours(work, own, start, "packed", stack="auto")
    return {**found, OURS_BF16: _ours(work, in_bfloat16, start, "packed", stack="auto")}


def _plain(work: Work, network: Network, switches: Switches, start: Tensors) -> Federation:
    def advance(state: Mapping[str, Tensor], number: int) -> Mapping[str, Tensor]:
        return plain_round(work, network, switches, state, number)

    if switches.own_lora:
        return Federation(start, advance, dict)
    return Federation(peft_names(start), advance, own_names)


def _ours(
    work: Work, adapter: Adapter, start: Tensors, batching: Batching, *, stack: int | Literal["auto"]
) -> Federation:
    """The whole round as a run does it: engine, checks, aggregation, diagnostics, checkpoint."""
    server = fedavg.server_half(AggregationConfig())
    sharing = Sharing("fedit", work.lora.rank, scale(work.lora), 0)
    cohort = Cohort(tuple(work.clients), len(work.clients), 1)

    def data(client: str) -> ClientData:
        rows = work.clients[client]
        return ClientData(
            len(rows),
            int(work.encoded.targets[rows].sum()),
            lambda seed, steps, epochs: training_batches(
                work.encoded,
                rows,
                batch_size=work.local.batch_size,
                batching=batching,
                pad_id=work.pad_id,
                seed=seed,
                steps=steps,
                epochs=epochs,
            ),
        )

    half = fedavg.client_half(adapter, data, work.local, "examples", rounds=1)
    engine = InProcess(half, together=together(InProcessEngine(stack=stack), adapter, adapter.parameters))

    place = Path(tempfile.mkdtemp(dir=work.folder))

    def save(record: Any, state: State) -> None:
        save_checkpoint(place, Checkpoint(record.round + 1, state, {}, {}), keep=2)

    hooks = Hooks(
        on_round=save, diagnose=diagnose(sharing, server), diagnose_clients=AggregationConfig().diagnose_clients
    )

    def advance(state: State, number: int) -> State:
        return run_rounds(
            server,
            engine,
            lambda _: cohort,
            state,
            first_round=number,
            rounds=number + 1,
            kind=fedavg.KIND,
            seed=work.seed,
            hooks=hooks,
        )

    return Federation(server.init(start), advance, server.result)


def _other_orders(work: Work, network: Network, start: Tensors, rounds: int, *, count: int) -> dict[str, Tensors]:
    """Adapters of the same federation with its batches drawn in other orders: how much of a loss is chance."""
    found: dict[str, Tensors] = {}
    ways = {"shuffled": Switches(True, True, True, True), "length-grouped": list(LADDER.values())[-1]}
    for (way, switches), seed in product(ways.items(), range(1, count + 1)):
        state: Mapping[str, Tensor] = start
        for number in range(rounds):
            state = plain_round(replace(work, seed=seed), network, switches, state, number)
        found[f"{way}, order {seed}"] = state
    return found


def held_out_loss(work: Work, adapter: Adapter, tensors: Tensors) -> float:
    """Nats a label token of the held-out rows."""
    adapter.load(tensors)
    model: Any = adapter.model
    batches = evaluation_batches(work.encoded, work.held_out, batch_size=16, batching="padded", pad_id=work.pad_id)
    return evaluate_loss(model, (batch for _, batch in batches)).value


def _result(work: Work, seconds: Mapping[str, list[float]], losses: Mapping[str, float], *, quick: bool) -> Result:
    names = list(seconds)
    whole = ratio(seconds[names[0]], seconds[OURS])
    rows = []
    for name, before in zip(names, [None, *names], strict=False):
        step = "" if before is None or name == FLOOR else str(ratio(seconds[before], seconds[name]))
        rows.append(
            (
                name,
                str(Spread.of(seconds[name])),
                step,
                f"{ratio(seconds[names[0]], seconds[name]).median:.2f}",
                f"{losses[name]:.4f}" if name in losses else "",
            )
        )
    orders = {
        way: [losses[own], *(loss for name, loss in losses.items() if name.startswith(f"{way}, order"))]
        for way, own in (("shuffled", names[0]), ("length-grouped", OURS))
    }
    chance = "; ".join(f"{way}: {min(found):.4f} to {max(found):.4f}" for way, found in orders.items())
    tokens = sum(int(work.encoded.lengths[rows].sum()) for rows in work.clients.values())
    steps = sum(-(-len(rows) // work.local.batch_size) for rows in work.clients.values())
    return Result(
        title="A round of FedIT beside public code's, and what each part gives",
        goal=f"flocktune at least {GOAL:g} times as fast a round as public FedIT's way, at the same loss",
        met=None if quick else whole.median >= GOAL,
        header=(
            "",
            "seconds a round: median (min to max)",
            "times as fast as the row above",
            "as fast as the first row",
            "held-out loss, nats a token",
        ),
        rows=rows,
        notes=(
            f"A round: {len(work.clients)} clients, {steps} steps of {work.local.batch_size} rows in all ({tokens}"
            f" tokens), LoRA rank {work.lora.rank} on {work.lora.targets}; {len(seconds[OURS])} rounds timed after one"
            f" more. Alternative / flocktune: {whole}. The loss was {losses['start']:.4f} at the start; with"
            f" batches in {len(orders['shuffled'])} orders it ends at {chance}.",
        ),
        values={"seconds": seconds, "ratio": whole.median, "losses": losses},
        measured=str(whole),
        floor="clients one after another can not take less than the frozen base's forward pass and the gradients of its"
        f" activations on the same batches: {ratio(seconds[names[0]], seconds[FLOOR])} times as fast as the first row;"
        f" {100 / ratio(seconds[OURS], seconds[FLOOR]).median:.0f} % of ours is that",
    )
