"""Multiple choice by log-likelihood: which of the given answers does a model hold for the most likely one?

Every choice stands where the answer stands in training: after the same prompt, in the same template, with the same
tokens. Its log-likelihood is the sum over its tokens, log p(token | prompt, tokens before), without the token that
ends an answer, as lm-evaluation-harness has it. What a chat template writes after an answer counts, for all alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flocktune.config.evaluation import OF_TASK
from flocktune.data.encoding import Encoded
from flocktune.data.examples import Example
from flocktune.data.rows import Row, encode_rows, shorten
from flocktune.data.templates import Template
from flocktune.errors import Problem, UserError
from flocktune.evaluation.memorisation import row_losses

CHOICE_SCORES = OF_TASK["choice"]


@dataclass(frozen=True)
class Likelihoods:
    """A question's choices, each with its log-likelihood in nats, its tokens, and the bytes of its text in UTF-8."""

    nats: tuple[float, ...]
    tokens: tuple[int, ...]
    bytes: tuple[int, ...]

    def chosen(self) -> Mapping[str, int]:
        """The place of the most likely choice, as it is and by token and by byte; the first of equal ones."""
        norms = (1,) * len(self.nats), self.tokens, self.bytes
        return {
            name: max(range(len(norm)), key=lambda place, norm=norm: self.nats[place] / norm[place])  # type: ignore[misc]
            for name, norm in zip(CHOICE_SCORES, norms, strict=True)
        }

    def scores(self, right: int) -> dict[str, float]:
        """For each way to choose, 1 or 0."""
        return {name: float(place == right) for name, place in self.chosen().items()}


def likelihoods(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    template: Template,
    max_tokens: int,
    batch_size: int,
    pad_id: int,
) -> list[Likelihoods]:
    """The log-likelihoods of every example's choices, in order.

    Rows of like length share a batch and are padded on the right, which causal attention does not see; so a number
    depends on its batch mates by rounding only. A prompt is cut to what the longest of its choices leaves of
    ``max_tokens``. Every example has choices. Raises UserError when one of them is too long.
    """
    rows = [_answers(example, tokenizer, template, max_tokens) for example in examples]
    encoded = _encoded([row for question in rows for row in question])
    nats = -encoded.targets * row_losses(model, encoded, range(len(encoded)), batch_size=batch_size, pad_id=pad_id)
    found, start = [], 0
    for example in examples:
        end = start + len(example.choices)
        lengths = tuple(len(choice.encode()) for choice in example.choices)
        found.append(Likelihoods(tuple(nats[start:end].tolist()), tuple(encoded.targets[start:end].tolist()), lengths))
        start = end
    return found


def by_chance(examples: Sequence[Example]) -> float:
    """The share of right choices that guessing gives; nan for no examples."""
    return sum(1 / len(example.choices) for example in examples) / len(examples) if examples else math.nan


def _answers(example: Example, tokenizer: Any, template: Template, max_tokens: int) -> list[Row]:
    """The prompt with each choice as its answer, which does not end."""
    asked = [replace(example, response=choice) for choice in example.choices]
    rows = list(encode_rows(asked, tokenizer, template))
    full = [len(row.tokens) - row.answer for row in rows]
    if max(len(row.tokens) for row in rows) > max_tokens:
        rows = shorten(rows, example, tokenizer, template, max_tokens)
    for row, length, choice in zip(rows, full, example.choices, strict=True):
        if len(row.tokens) - row.answer < length:
            got = f"{length} tokens after a prompt of {row.answer}: {choice[:40]!r}"
            raise UserError(Problem("data.max_tokens", f"room for every choice, not {max_tokens}", got, "Raise it."))
    return [_without_end(row, tokenizer.eos_token_id) for row in rows]


def _without_end(row: Row, eos: int | None) -> Row:
    """The row without the end-of-text token that our templates put after an answer."""
    longer = len(row.tokens) - row.answer > 1
    return Row(row.tokens[:-1], row.trainable[:-1], row.answer) if longer and row.tokens[-1] == eos else row


def _encoded(rows: Sequence[Row]) -> Encoded:
    """Rows of which the answers alone are trainable."""
    tokens = np.array([token for row in rows for token in row.tokens], np.int32)
    trainable = np.array([place >= row.answer for row in rows for place in range(len(row.tokens))], np.bool_)
    return Encoded(tokens, trainable, np.cumsum([0, *(len(row.tokens) for row in rows)], dtype=np.int64))
