"""What a recipe must say so that ``evaluation.task`` can be measured."""

from __future__ import annotations

from collections.abc import Iterator

from flocktune.config.schema import Backdoor, RunConfig
from flocktune.errors import Problem


def task_problems(config: RunConfig) -> Iterator[Problem]:
    """Settings that leave nothing to measure."""
    task, generate = config.evaluation.task, config.evaluation.generate
    if task == "number" and not generate:
        fix = "Without answers there is nothing to look for a number in."
        yield Problem("evaluation.generate", f"true with evaluation.task {task}", "false", fix)
    if task != "text" and config.local.on_pairs:
        yield Problem("evaluation.task", "text with local.loss dpo, which is measured on pairs of answers", task)
    if task == "choice" and isinstance(config.attack, Backdoor):
        yield Problem("evaluation.task", "one with written answers, in which a backdoor is looked for", task)
