"""Which evaluated round is the best, and whether more rounds are worth their cost.

Both follow from what the run has logged of its validation rows, and from nothing else: a run that is killed and goes on
comes to the same decisions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flocktune.config.evaluation import EvaluationConfig
from flocktune.report.summaries import METRIC_NAMES, SHARES

VALIDATION = "validation"
"""The name, in metrics, of the rows that choose."""


@dataclass(frozen=True)
class Progress:
    """What is known after some evaluations. ``best``: rounds done in the best one, None before there is a number.

    ``waited``: evaluations in a row, up to the last one, that gained no more than ``min_delta``.
    """

    best: int | None = None
    value: float | None = None
    waited: int = 0


def progress(settings: EvaluationConfig, evaluations: Iterable[Mapping[str, Any]]) -> Progress:
    """What a run's evaluations say of its rounds. Of equal rounds the first is the best; no number is never better."""
    values = [
        (int(event["round"]), event["overall"].get(settings.metric))
        for event in evaluations
        if event["dataset"] == VALIDATION
    ]
    return progress_by(values, more_is_better=settings.metric in SHARES, min_delta=settings.min_delta)


def progress_by(values: Sequence[tuple[int, float | None]], *, more_is_better: bool, min_delta: float) -> Progress:
    """The progress after ``values``, each of so many rounds done."""
    sign = 1.0 if more_is_better else -1.0
    best, value, waited = None, None, 0
    bar: float | None = None  # the last value that was a gain: many small steps add up to one
    for done, found in values:
        if found is not None and (value is None or sign * found > sign * value):
            best, value = done, found
        if found is not None and (bar is None or sign * found > sign * bar + min_delta):
            bar, waited = found, 0
        else:
            waited += 1
    return Progress(best, value, waited)


def ends_early(settings: EvaluationConfig, now: Progress) -> bool:
    """Whether the run has waited long enough for a gain."""
    return 0 < settings.patience <= now.waited


def choice(settings: EvaluationConfig, now: Progress, done: int, planned: int) -> dict[str, Any]:
    """What was decided after ``done`` of ``planned`` rounds, as an event and a summary tell it.

    ``round``: how many rounds are in the result. ``said``: the same for a person.
    """
    kept = now.best if settings.keep_best and now.best is not None else done
    early = done < planned
    return {
        "round": kept,
        "rounds_done": done,
        "planned": planned,
        "best": now.best,
        "metric": settings.metric,
        "value": now.value,
        "stopped_early": early,
        "said": _said(settings, now, kept, done, planned),
    }


def _said(settings: EvaluationConfig, now: Progress, kept: int, done: int, planned: int) -> str:
    if now.best is None:
        return f"the result is round {kept} of {planned}: no evaluation of the validation rows gave a number"
    percent = settings.metric in SHARES
    value = f"{100 * (now.value or 0):.1f} %" if percent else f"{now.value:.3f}"
    name = METRIC_NAMES[settings.metric]
    name = name if name.startswith("ROUGE") else name.lower()
    text = f"the result is round {kept} of {planned}"
    text += ", the best" if kept == now.best else f"; the best was {now.best}"
    text += f" by {name} on the validation rows ({value})"
    if done < planned:
        text += f"; stopped after round {done}, {_times(now.waited)} without a gain"
    return text


def _times(count: int) -> str:
    return "1 evaluation" if count == 1 else f"{count} evaluations"
