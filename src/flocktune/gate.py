"""The gate: the server tries what a round made, on rows and prompts of its own, before it counts.

A rule that bears with outliers does nothing about attackers whose updates look like the others' (arXiv 2406.10630):
what a model says has to be asked of the model. A round that fails is rolled back: the state before it stands, all of
it, the server optimiser's part too. What clients keep of the round in their own memory is not: it never comes here.

All that the gate remembers is in the state, so that a run that was killed goes on to the same bits.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from flocktune.config.robustness import GateCanaries, GateConfig, Refusals
from flocktune.config.schema import FEDERATED, Columns, RunConfig
from flocktune.data.encoding import encode_prompt
from flocktune.data.examples import Example
from flocktune.errors import GateShut, Problem, UserError
from flocktune.evaluation.evaluate import category_loss, choose_rows
from flocktune.evaluation.generate import evaluating, generate_answers, prompt_room
from flocktune.files import sha256_bytes
from flocktune.interfaces import ServerHalf, State
from flocktune.resident import Base, Instructions, load_instructions
from flocktune.tensors import group, prefixed, without
from flocktune.types import Tensors, Update

GATE = "gate"
"""The group of the state that is the gate's own."""


@dataclass(frozen=True)
class Tried:
    """What an adapter did: ``loss`` in nats a label token, ``refused`` a share of the unsafe prompts, ``canaries`` how
    many answers matched what must not be said. NaN: not measured, or no number."""

    loss: float
    refused: float = math.nan
    canaries: float = math.nan

    def tensor(self) -> torch.Tensor:
        return torch.tensor([self.loss, self.refused, self.canaries], dtype=torch.float64)


NOTHING_TRIED = Tried(math.nan)


def gated(server: ServerHalf, gate: GateConfig, try_out: Callable[[Tensors], Tried]) -> ServerHalf:
    """``server``, whose step is taken only when its result passes. ``try_out`` may depend on the adapter alone.

    The state gains ``gate/*``: what was tried last (``candidate``), that of the state that stands (``standing``), the
    loss that the candidate was held against (``reference``), the least so far (``best``), rounds rolled back in a row
    (``rollbacks``). A step raises GateShut when there are too many, and UserError when the start does not pass.
    """

    def init(start: Tensors) -> State:
        unknown = torch.tensor(math.nan, dtype=torch.float64)
        fresh = {
            "candidate": NOTHING_TRIED.tensor(),
            "standing": NOTHING_TRIED.tensor(),
            "reference": unknown,
            "best": unknown.clone(),
            "rollbacks": torch.tensor(0),
        }
        return {**server.init(start), **prefixed(GATE, fresh)}

    def prepare(state: State, round: int) -> tuple[State, Mapping[str, Any]]:
        prepared, told = server.prepare(without(state, GATE), round)
        return {**prepared, **prefixed(GATE, group(state, GATE))}, told

    def step(state: State, update: Update) -> State:
        before, mine = without(state, GATE), group(state, GATE)
        standing, best = Tried(*mine["standing"].tolist()), float(mine["best"])
        if math.isnan(standing.loss):
            standing = try_out(server.result(before))
            best = standing.loss
            _refuse_start(gate, standing)
        after = server.step(before, update)
        candidate = try_out(server.result(after))
        reference = best if gate.against == "best" else standing.loss
        why = reasons(gate, candidate, reference)
        rollbacks = int(mine["rollbacks"]) + 1 if why else 0
        if rollbacks >= gate.max_rollbacks:
            raise GateShut(
                f"gate: {rollbacks} rounds in a row were rolled back, the last because of {'; '.join(why)}.\n"
                "The newest adapter that passed is in the run's state. Find out which clients send such updates, or set"
                " gate.max_loss_increase or gate.max_rollbacks higher in a new run."
            )
        stands = standing if why else candidate
        remembered = {
            "candidate": candidate.tensor(),
            "standing": stands.tensor(),
            "reference": torch.tensor(reference, dtype=torch.float64),
            "best": torch.tensor(min(best, stands.loss), dtype=torch.float64),
            "rollbacks": torch.tensor(rollbacks),
        }
        return {**(before if why else after), **prefixed(GATE, remembered)}

    return replace(
        server,
        init=init,
        message=lambda state, round: server.message(without(state, GATE), round),
        step=step,
        result=lambda state: server.result(without(state, GATE)),
        prepare=prepare,
    )


def reasons(gate: GateConfig, candidate: Tried, reference: float) -> list[str]:
    """Why a round does not pass; empty when it does. ``reference``: the loss that it is held against."""
    found = []
    if not candidate.loss <= reference + gate.max_loss_increase:  # NaN is worse than any number
        found.append(
            f"a loss of {candidate.loss:.3f} on the probe (at most {reference:.3f} + {gate.max_loss_increase:g})"
        )
    if gate.refusal and not candidate.refused >= gate.refusal.min_refused:
        found.append(f"{candidate.refused:.0%} of unsafe prompts refused (at least {gate.refusal.min_refused:.0%})")
    if gate.canaries and candidate.canaries:
        found.append(f"{candidate.canaries:.0f} answers that match gate.canaries.must_not")
    return found


def told(gate: GateConfig | None, state: State) -> dict[str, Any]:
    """What a round's event says of the gate: empty without one."""
    mine = group(state, GATE)
    if gate is None or not mine:
        return {}
    candidate, reference = Tried(*mine["candidate"].tolist()), float(mine["reference"])
    rolled_back = bool(int(mine["rollbacks"]))
    return {
        "rolled_back": rolled_back,
        "gate": {
            "loss": candidate.loss,
            "reference": reference,
            **({"refused": candidate.refused} if gate.refusal else {}),
            **({"canaries": int(candidate.canaries)} if gate.canaries else {}),
            "reasons": reasons(gate, candidate, reference) if rolled_back else [],
        },
    }


def _refuse_start(gate: GateConfig, start: Tried) -> None:
    """Raise UserError when the state before the first round fails what does not depend on others."""
    UserError.raise_all(
        Problem("gate", "a base model and adapter that pass before the first round", reason, "No round could.")
        for reason in reasons(gate, start, start.loss)
    )


def behind_gate(config: RunConfig, base: Base, server: ServerHalf) -> ServerHalf:
    """``server`` behind the recipe's gate, if it has one; baselines have none. ``base``: the whole model."""
    if config.gate is None or config.method not in FEDERATED:
        return server
    return gated(server, config.gate, prober(config, config.gate, base))


def gate_digest(config: RunConfig) -> str:
    """Hex SHA-256 of the files that the gate reads; empty without one. Raises UserError."""
    gate = config.gate
    if gate is None or config.method not in FEDERATED:
        return ""
    asked = {"gate.refusal.prompts": gate.refusal, "gate.canaries.prompts": gate.canaries}
    lines = [_lines(part.prompts, where) for where, part in asked.items() if part]
    return sha256_bytes(json.dumps([_probe_rows(config, gate).digest, lines]).encode())


# --- trying out ----------------------------------------------------------------------------------------


def prober(config: RunConfig, gate: GateConfig, base: Base) -> Callable[[Tensors], Tried]:
    """Tries an adapter in ``base``, the whole model. Files are read now. Raises UserError."""
    rows = _probe_rows(config, gate)
    chosen = choose_rows(rows.examples, gate.rows)
    unsafe = _prompts(config, base, gate.refusal, "gate.refusal.prompts")
    canaries = _prompts(config, base, gate.canaries, "gate.canaries.prompts")
    settings = config.evaluation

    def answers(prompts: list[list[int]]) -> list[str]:
        size, new = settings.batch_size, settings.max_new_tokens
        return generate_answers(base.model, base.tokenizer, prompts, max_new_tokens=new, batch_size=size)

    def try_out(adapter: Tensors) -> Tried:
        base.adapter.load(adapter)
        with evaluating(base.model):
            size = settings.batch_size
            loss = category_loss(base.model, rows.encoded, chosen, batch_size=size, pad_id=base.pad_id).value
        refused = refused_share(answers(unsafe), gate.refusal) if gate.refusal else math.nan
        found = matching(answers(canaries), gate.canaries) if gate.canaries else math.nan
        return Tried(loss, refused, found)

    return try_out


def refused_share(answers: list[str], refusal: Refusals) -> float:
    """The share of ``answers`` that have a refusing phrase in them."""
    phrases = [_plain(phrase) for phrase in refusal.phrases]
    return sum(any(phrase in _plain(answer) for phrase in phrases) for answer in answers) / len(answers)


def matching(answers: list[str], canaries: GateCanaries) -> int:
    """How many of ``answers`` match an expression that must not."""
    patterns = [re.compile(pattern, re.IGNORECASE) for pattern in canaries.must_not]
    return sum(any(pattern.search(answer) for pattern in patterns) for answer in answers)


def _plain(text: str) -> str:
    """Without case, curly apostrophes and runs of white space."""
    return " ".join(text.casefold().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").split())


def _probe_rows(config: RunConfig, gate: GateConfig) -> Instructions:
    data = replace(config.data, columns=Columns(), max_rows=None)
    try:
        rows = load_instructions(gate.probe, data, config.model)
    except UserError as error:
        raise UserError(*(f"gate.probe: {problem}" for problem in error.problems)) from None
    if not rows.encoded.targets.sum():
        raise UserError(Problem("gate.probe", "rows with an answer", "none"))
    return rows


def _prompts(config: RunConfig, base: Base, asked: Refusals | GateCanaries | None, where: str) -> list[list[int]]:
    """The tokens of each line of a file of prompts, as they would stand in training."""
    if asked is None:
        return []
    texts = _lines(asked.prompts, where)
    data = config.data
    room = min(data.max_tokens, prompt_room(base.model, config.evaluation.max_new_tokens))
    return [encode_prompt(Example(text), base.tokenizer, template=data.template, max_tokens=room) for text in texts]


def _lines(path: str, where: str) -> list[str]:
    """The lines of a text file that are not empty. Raises UserError."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        got = f"nothing at {path}" if isinstance(error, FileNotFoundError) else str(error)
        raise UserError(Problem(where, "a text file, one prompt a line", got)) from None
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise UserError(Problem(where, "at least one prompt, one a line", "none"))
    return texts
