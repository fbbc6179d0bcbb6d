"""What held-out questions are answered with, and how the answers are scored: a setting of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from flocktune.config.numbers import Count, NonNegative, Positive, PositiveFloat

TaskName: TypeAlias = Literal["text", "number", "choice", "code"]
"""``text``: texts beside the reference's. ``number``: the last number of an answer. ``choice``: the most likely of
given choices. ``code``: programs that are run against tests."""

TASKS: tuple[TaskName, ...] = ("text", "number", "choice", "code")


@dataclass(frozen=True)
class CodeConfig:
    """How answers of task ``code`` are written and tried.

    ``run_generated_code``: what a model wrote is run on this machine, shut in
    (:mod:`flocktune.evaluation.shut_in`); nothing is run unless this is true. ``samples``: answers to a prompt, drawn
    at ``temperature`` (0: one greedy answer) by ``seed``; pass@k is estimated for k = 1, 10, 100 up to it.
    ``timeout_s``: processor seconds of one program (its time on the clock is bounded too); ``memory_mb``: its address
    space, in 2^20 bytes.
    """

    run_generated_code: bool = False
    samples: Positive = 1
    temperature: NonNegative = 0.0
    seed: Count = 0
    timeout_s: PositiveFloat = 5.0
    memory_mb: Annotated[int, Field(ge=128)] = 512
