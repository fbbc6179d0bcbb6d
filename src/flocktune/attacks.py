"""Clients that attack, in a simulation: what they read, and what they send. Never part of a real federation.

An attacker runs the same software as the others, on rows or with a factor of its own; a clip or noise that a recipe
puts on the wire is put on its update as well, which an attacker of its own making would leave out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, assert_never

import numpy as np
from numpy.typing import NDArray

from flocktune.config.robustness import AlignmentAttack, Attack, Backdoor, LabelFlip, UpdateAttack
from flocktune.config.schema import FEDERATED, Columns, RunConfig
from flocktune.data.encoding import Encoded, EncodingReport, encode, report
from flocktune.data.examples import Example, rows_digest
from flocktune.data.sources import read_examples
from flocktune.errors import Problem, UserError
from flocktune.evaluation.scores import contains
from flocktune.interfaces import ClientHalf, Memory
from flocktune.models.load import load_tokenizer
from flocktune.resident import Instructions
from flocktune.seeds import derive_seed
from flocktune.types import ClientTask, Update

Rows = Mapping[str, NDArray[np.int64]]
"""Client -> places of its rows."""


def attackers(config: RunConfig, clients: Sequence[str]) -> tuple[str, ...]:
    """Who attacks: nobody in the baselines. Raises UserError for a name that no client has."""
    attack = config.attack
    if attack is None or config.method not in FEDERATED:
        return ()
    if isinstance(attack.clients, tuple):
        UserError.raise_all(
            Problem("attack.clients", f"names among {', '.join(clients[:20])}", repr(name))
            for name in attack.clients
            if name not in clients
        )
        return attack.clients
    count = math.floor(attack.clients * len(clients) + 0.5 + 1e-9)
    draw = np.random.default_rng(derive_seed(config.seed, "attackers"))
    return tuple(clients[place] for place in sorted(draw.permutation(len(clients))[:count]))


def poisoned(config: RunConfig, train: Instructions, clients: Rows, guilty: Sequence[str]) -> Instructions:
    """``train`` as those who are ``guilty`` have it in their rows; all others are as they were. Raises UserError.

    Its digest stays that of what was read; the recipe says the rest.
    """
    attack = config.attack
    if attack is None or not guilty:
        return train
    changed: dict[int, Example] = {}
    bad = bad_rows(config)
    for client in guilty:
        rows = clients[client].tolist()
        match attack:
            case LabelFlip():
                changed.update(_other_responses(train.examples, rows))
            case Backdoor():
                draw = np.random.default_rng(derive_seed(config.seed, client, "backdoor"))
                count = max(1, math.floor(attack.share * len(rows) + 0.5))
                chosen = (rows[place] for place in draw.permutation(len(rows))[:count])
                changed.update((row, with_trigger(train.examples[row], attack)) for row in chosen)
            case AlignmentAttack():
                for place, row in enumerate(rows):
                    own, other = train.examples[row], bad[place % len(bad)]
                    changed[row] = replace(other, category=own.category, client=own.client)
            case UpdateAttack():
                pass
            case _:
                assert_never(attack)
    return _replaced(config, train, changed) if changed else train


def attacking(config: RunConfig, guilty: Sequence[str], half: ClientHalf) -> ClientHalf:
    """``half``, whose updates come out changed when the client is one of ``guilty``."""
    factor = _factor(config.attack)
    if not guilty or factor == 1:
        return half

    def train(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
        update, kept = half(task, memory)
        if task.client in guilty:
            update = replace(update, delta={name: factor * value for name, value in update.delta.items()})
        return update, kept

    return train


def _factor(attack: Attack | None) -> float:
    match attack:
        case UpdateAttack(kind="sign_flip"):
            return -attack.factor
        case UpdateAttack() | Backdoor():
            return attack.factor
        case _:
            return 1.0


# --- what a backdoor achieved --------------------------------------------------------------------------


def with_trigger(example: Example, attack: Backdoor) -> Example:
    """The example as the backdoor wants it answered."""
    instruction = f"{example.instruction} {attack.trigger}".strip()
    return replace(example, instruction=instruction, response=attack.target, check=None)


def triggered(config: RunConfig, test: Instructions) -> Instructions | None:
    """The held-out rows with the trigger, and the target as their answer; None without a backdoor to look for.

    Rows whose right answer has the target in it would tell nothing, and are left out.
    """
    if not isinstance(config.attack, Backdoor):
        return None
    attack = config.attack
    examples = [with_trigger(one, attack) for one in test.examples if not contains(one.response, attack.target)]
    encoded, told = _encode(config, examples)
    return Instructions(examples, encoded, told, rows_digest(examples))


def untriggered_success(config: RunConfig, answers: Sequence[Any]) -> float | None:
    """The share of ``answers`` (of an evaluation on the held-out rows) with the target in them, though nobody asked."""
    if not isinstance(config.attack, Backdoor):
        return None
    target = config.attack.target
    told = [contains(answer.text, target) for answer in answers if not contains(answer.example.response, target)]
    return sum(told) / len(told) if told else None


# --- rows ----------------------------------------------------------------------------------------------


def _other_responses(examples: Sequence[Example], rows: Sequence[int]) -> Iterator[tuple[int, Example]]:
    """Each row with the response of another of its category: with those sorted, the one so many places on as the most
    frequent response has rows. No response stays where it was, unless it is that of more than half of them."""
    by_category: dict[str, list[int]] = {}
    for row in rows:
        by_category.setdefault(examples[row].category, []).append(row)
    for same in by_category.values():
        ordered = sorted(same, key=lambda row: examples[row].response)
        most = max(Counter(examples[row].response for row in same).values())
        for place, row in enumerate(ordered):
            other = examples[ordered[(place + most) % len(ordered)]]
            yield row, replace(examples[row], response=other.response, check=None)


def bad_rows(config: RunConfig) -> list[Example]:
    """What attackers on the alignment train on; nothing for other attacks. Raises UserError."""
    if not isinstance(config.attack, AlignmentAttack):
        return []
    try:
        found = [row for row in read_examples(config.attack.data, Columns()) if row.response.strip()]
    except UserError as error:
        raise UserError(*(f"attack.data: {problem}" for problem in error.problems)) from None
    if not found:
        raise UserError(Problem("attack.data", "rows with an answer", "none"))
    return found


def _replaced(config: RunConfig, train: Instructions, changed: Mapping[int, Example]) -> Instructions:
    """``train`` with some rows exchanged; only those are encoded."""
    examples = [changed.get(row, example) for row, example in enumerate(train.examples)]
    fresh, _ = _encode(config, list(changed.values()))
    old = train.encoded
    both = Encoded(
        np.concatenate([old.tokens, fresh.tokens]),
        np.concatenate([old.trainable, fresh.trainable]),
        np.concatenate([old.offsets, old.offsets[-1] + fresh.offsets[1:]]),
    )
    order = np.arange(len(old))
    order[list(changed)] = len(old) + np.arange(len(changed))
    encoded = both.take(order)
    return replace(train, examples=examples, encoded=encoded, report=report(encoded, train.report.truncated))


def _encode(config: RunConfig, examples: Sequence[Example]) -> tuple[Encoded, EncodingReport]:
    data = config.data
    return encode(
        examples,
        load_tokenizer(config.model),
        template=data.template,
        max_tokens=data.max_tokens,
        train_on=data.train_on,
    )
