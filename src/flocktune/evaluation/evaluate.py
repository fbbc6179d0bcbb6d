"""How good a model is on held-out rows: loss, and scores of the answers it writes, category by category.

N label positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from flocktune.algorithms.preferences import PREFERENCE_METRICS, PreferenceLoss, measure_preferences
from flocktune.config.schema import EvaluationConfig
from flocktune.data.batching import evaluation_batches
from flocktune.data.encoding import Encoded
from flocktune.data.examples import Example
from flocktune.data.templates import Template
from flocktune.evaluation.generate import evaluating
from flocktune.evaluation.scores import SCORES, interval
from flocktune.evaluation.tasks import Answer, Speaker, answer_all
from flocktune.training import next_token_loss
from flocktune.types import Mean, merge_metrics

RIGHT_OR_WRONG = tuple(name for name in SCORES if name != "rouge_l")
"""Scores that are a share of right answers."""


@dataclass(frozen=True)
class Evaluation:
    """Per category: how many rows, and a table of means; ``loss`` is in nats a token, scores are in [0, 1].

    Of preference data, a row is a pair of answers, ``loss`` is nats a pair, and the other means are
    :data:`~flocktune.algorithms.preferences.PREFERENCE_METRICS`.
    """

    categories: Mapping[str, Mapping[str, Mean]]
    rows: Mapping[str, int]
    answers: Sequence[Answer] = field(default=())

    @property
    def overall(self) -> dict[str, Mean]:
        """All categories merged: means over tokens (loss) and over rows (scores, and all of preference data)."""
        merged: dict[str, Mean] = {}
        for table in self.categories.values():
            merged = merge_metrics(merged, table)
        return merged

    def as_dict(self) -> dict[str, Any]:
        """``{"overall": {name: value, ..., "rows": n}, "categories": {name: the same}}``, ready for JSON.

        ``intervals``, where something is right or wrong: of these shares, overall,
        ``{name: {"low": ..., "high": ...}}`` of 95 % confidence. Perplexity is exp of the mean loss; pairs have none.
        What could not be measured is None, what was not asked for absent.
        """
        overall = self.overall
        shares = {name: overall[name] for name in RIGHT_OR_WRONG if name in overall and overall[name].count}
        intervals = {name: interval(mean.value, int(mean.count)) for name, mean in shares.items()}
        return {
            "overall": _values(overall, sum(self.rows.values())),
            "categories": {name: _values(table, self.rows[name]) for name, table in self.categories.items()},
            **(
                {"intervals": {n: {"low": low, "high": high} for n, (low, high) in intervals.items()}} if shares else {}
            ),
        }


def evaluate(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    encoded: Encoded,
    *,
    settings: EvaluationConfig,
    template: Template,
    max_tokens: int,
    pad_id: int,
    max_rows: int | None = None,
    preferences: PreferenceLoss | None = None,
) -> Evaluation:
    """Evaluate ``model`` on ``examples``; row i of ``encoded`` is example i, encoded for training.

    Loss: summed over batches that never mix categories, so it is exact. Answers, and their scores: as
    ``settings.task`` has it, to prompts as they stand in training (:mod:`flocktune.evaluation.tasks`). ``max_rows``
    evaluates that many rows, spread evenly over the categories' rows, and always the same ones. ``preferences``: the
    loss of preference data; no answers are written then. The model is in evaluation mode meanwhile. Raises UserError
    when ``settings.max_new_tokens`` leaves no room for a prompt, or the rows are not what the task needs.
    """
    chosen = choose_rows(examples, max_rows)
    by_category: dict[str, list[int]] = {}
    for index in chosen:
        by_category.setdefault(examples[index].category, []).append(index)
    counts = {name: len(rows) for name, rows in by_category.items()}
    if preferences is not None:
        with evaluating(model):
            pairs = {
                name: pair_means(model, encoded, rows, preferences, batch_size=settings.batch_size, pad_id=pad_id)
                for name, rows in by_category.items()
            }
        return Evaluation(pairs, counts)
    with evaluating(model):
        tables = {
            name: {"loss": category_loss(model, encoded, rows, batch_size=settings.batch_size, pad_id=pad_id)}
            for name, rows in by_category.items()
        }
    asked = [examples[index] for index in chosen]
    speaker = Speaker(model, tokenizer, template, max_tokens, pad_id)
    answers = answer_all(speaker, asked, settings)
    for answer in answers:
        means = {name: Mean(value, 1) for name, value in answer.scores.items()}
        tables[answer.example.category] = merge_metrics(tables[answer.example.category], means)
    return Evaluation(tables, counts, tuple(answers))


def choose_rows(examples: Sequence[Example], max_rows: int | None) -> list[int]:
    """Row indices, sorted by category: all, or ``max_rows`` in equal steps, so categories keep their shares."""
    ordered = sorted(range(len(examples)), key=lambda index: (examples[index].category, index))
    if max_rows is None or max_rows >= len(ordered):
        return ordered
    return [ordered[place * len(ordered) // max_rows] for place in range(max_rows)]


@torch.no_grad()
def category_loss(model: Any, encoded: Encoded, rows: Sequence[int], *, batch_size: int, pad_id: int) -> Mean:
    """Nats over the N label positions of ``rows``, and N; nothing when no row has one."""
    device = next(model.parameters()).device
    trainable = [index for index in rows if encoded.targets[index] > 0]
    if not trainable:
        return Mean()
    total, count = 0.0, 0
    batches = evaluation_batches(encoded, trainable, batch_size=batch_size, batching="padded", pad_id=pad_id)
    for _, batch in batches:
        total += float(next_token_loss(model, batch.to(device)))
        count += len(batch.targets)
    return Mean(total, count)


def pair_means(
    model: Any, encoded: Encoded, rows: Sequence[int], loss: PreferenceLoss, *, batch_size: int, pad_id: int
) -> dict[str, Mean]:
    """Means over the pairs ``rows`` of which both answers have a label; nothing when there is none."""
    trainable = [index for index in rows if encoded.targets[index] > 0]
    if not trainable:
        return {}
    batches = evaluation_batches(encoded, trainable, batch_size=batch_size, batching="padded", pad_id=pad_id)
    return measure_preferences(loss.anew(), model, (batch for _, batch in batches))


def _values(table: Mapping[str, Mean], rows: int) -> dict[str, float | int | None]:
    values = {name: _or_none(table[name].value) for name in ("loss", *SCORES, *PREFERENCE_METRICS) if name in table}
    if any(name in table for name in PREFERENCE_METRICS):
        return {**values, "rows": rows}
    loss = table.get("loss", Mean()).value
    # exp overflows above 709 nats a token, where only a broken model is
    values["perplexity"] = _or_none(math.exp(loss)) if loss < 700 else None
    return {**values, "rows": rows}


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
