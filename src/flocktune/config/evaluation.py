"""When and how the adapter is evaluated, and whether a run is steered by what comes out: settings of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from flocktune.config.data import DataConfig
from flocktune.config.numbers import Count, NonNegative, Positive
from flocktune.config.tasks import CodeConfig, TaskName
from flocktune.errors import Problem

OF_TASK: Mapping[TaskName, tuple[str, ...]] = {
    "text": ("checked", "exact_match", "contains", "rouge_l"),
    "number": ("number_match",),
    "choice": ("choice", "choice_per_token", "choice_per_byte"),
    "code": ("pass_at_1", "pass_at_10", "pass_at_100"),
}
"""The metrics of answers, by task."""

OF_PAIRS = ("reward_accuracy", "prefers_chosen")
"""Metrics of preference data."""

Metric: TypeAlias = Literal[
    "loss", "checked", "exact_match", "contains", "rouge_l", "number_match", "choice", "choice_per_token",
    "choice_per_byte", "pass_at_1", "pass_at_10", "pass_at_100", "reward_accuracy", "prefers_chosen",
]  # fmt: skip


@dataclass(frozen=True)
class EvaluationConfig:
    """When and how the global adapter is evaluated on rows that no client trains on.

    ``every``: rounds between evaluations, 0 is at the end only. On the way they are of the validation rows where there
    are any (``data.validation``, ``data.validation_rows_per_category``), else of the test rows; the last one is of all
    test rows. ``task``: what decides whether an answer is right; ``code``: how task
    ``code`` is done. ``generate``: also write answers (greedily) and score
    them: in the last evaluation, in every one (true), or never (false); ``max_new_tokens`` bounds one. ``max_rows``:
    rows evaluated while training. ``client_rows``: rows of each client that it does not train on (it keeps at least one
    that it does), on which the adapter and the client's own are evaluated, client by client; 0 is off.

    ``metric``, on the validation rows, says which of two rounds is better. ``keep_best``: the result is the best round
    that was evaluated, not the last one. ``patience``: end the run after so many evaluations in a row that were not
    better by more than ``min_delta`` than the best before them; 0 is never.
    """

    every: Count = 0
    task: TaskName = "text"
    code: CodeConfig = field(default_factory=CodeConfig)
    generate: bool | Literal["at_end"] = "at_end"
    max_new_tokens: Positive = 64
    batch_size: Positive = 32
    max_rows: Positive | None = None
    client_rows: Count = 0
    metric: Metric = "loss"
    keep_best: bool = False
    patience: Count = 0
    min_delta: NonNegative = 0.0

    @property
    def chooses(self) -> bool:
        """Whether validation rows decide which round is the result, or which one is the last."""
        return self.keep_best or self.patience > 0

    @property
    def answers_on_the_way(self) -> bool:
        """Whether answers are written while training: when it is asked for, or what decides is a score of them."""
        return self.generate is True or (self.chooses and self._of_written_answers)

    @property
    def _of_written_answers(self) -> bool:
        """Whether the metric is one of answers that have to be written: choices are only compared."""
        return self.task != "choice" and self.metric in OF_TASK[self.task]


def evaluation_problems(settings: EvaluationConfig, data: DataConfig, *, on_pairs: bool) -> Iterator[Problem]:
    """What of these settings does not go together."""
    validates = data.validation is not None or data.validation_rows_per_category > 0
    if data.validation is not None and data.validation_rows_per_category:
        got = f"{data.validation_rows_per_category} with data.validation"
        fix = "Validation rows are those of the file, or are held out of data.train."
        yield Problem("data.validation_rows_per_category", "0 with data.validation", got, fix)
    if settings.every and data.test is None and data.test_rows_per_category == 0 and not validates:
        fix = "Set data.test, data.test_rows_per_category or data.validation_rows_per_category."
        yield Problem("evaluation.every", "0 when nothing is held out", str(settings.every), fix)
    if not settings.chooses:
        return
    asks = "evaluation.keep_best" if settings.keep_best else "evaluation.patience"
    if not validates:
        fix = (
            "Set data.validation_rows_per_category=10, or data.validation to rows of your own. Test rows do not choose:"
            " a result chosen by them looks better on them than it is."
        )
        yield Problem(asks, "validation rows to choose by", "none", fix)
    if not settings.every:
        yield Problem(asks, "rounds that are evaluated on the way", "evaluation.every: 0", "Set evaluation.every=1.")
    scores = ("loss", *(OF_PAIRS if on_pairs else OF_TASK[settings.task]))
    if settings.metric not in scores:
        kind = "preference data" if on_pairs else f"evaluation.task {settings.task}"
        yield Problem("evaluation.metric", f"one of {', '.join(scores)} for {kind}", repr(settings.metric))
    elif settings._of_written_answers and settings.generate is False:
        fix = "Set evaluation.generate=at_end: answers are then written wherever this metric decides."
        yield Problem("evaluation.generate", f"at_end or true with metric {settings.metric}", "false", fix)
