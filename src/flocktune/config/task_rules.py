"""What a recipe must say so that ``evaluation.task`` can be measured."""

from __future__ import annotations

from collections.abc import Iterator

from flocktune.config.schema import Backdoor, RunConfig
from flocktune.errors import Problem


def task_problems(config: RunConfig, *, only_evaluated: bool = False) -> Iterator[Problem]:
    """Settings that leave nothing to measure; ``only_evaluated``: by a finished run's result, on any rows."""
    task, generate = config.evaluation.task, config.evaluation.generate
    if task in ("number", "code") and not generate:
        fix = "Without written answers there is nothing to measure."
        yield Problem("evaluation.generate", f"true with evaluation.task {task}", "false", fix)
    code = config.evaluation.code
    if task == "code" and not code.run_generated_code:
        fix = "What a model wrote is then run on this machine, shut in: docs/evaluation.md says how."
        where = "--run-generated-code" if only_evaluated else "evaluation.code.run_generated_code"
        yield Problem(where, "true with task code", "false", fix)
    if code.samples > 1 and code.temperature == 0:
        fix = "Greedy answers are all the same. The paper of pass@k has 0.2 for pass@1 and 0.8 for pass@100."
        where = "--temperature" if only_evaluated else "evaluation.code.temperature"
        yield Problem(where, "above 0 with several samples", "0", fix)
    if only_evaluated:
        return
    wanted = config.evaluation.metric.removeprefix("pass_at_")
    if task == "code" and wanted.isdigit() and int(wanted) > code.samples:
        fix = f"pass@{wanted} can not be told from fewer."
        yield Problem(
            "evaluation.code.samples", f"{wanted} or more with metric pass_at_{wanted}", f"{code.samples}", fix
        )
    if task != "text" and config.local.on_pairs:
        yield Problem("evaluation.task", "text with local.loss dpo, which is measured on pairs of answers", task)
    if task in ("choice", "code") and isinstance(config.attack, Backdoor):
        yield Problem("evaluation.task", "text or number with a backdoor, which is looked for in answers", task)
