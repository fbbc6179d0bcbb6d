"""The verb that says how good a run's result is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flocktune.cli.common import Method, Result, app, as_emulator, console, needs_extra, problems

if TYPE_CHECKING:
    from flocktune.config.schema import Columns, EvaluationConfig, RunConfig
    from flocktune.evaluation.evaluate import Evaluation
    from flocktune.results import Tuned

_TASK, _CODE, _HARNESS = "What is measured", "Task code", "lm-evaluation-harness"

_WARNING = (
    "Running code that a model wrote: it gets no files, network or processes, and little time and memory."
    " Do it on a machine that you could lose."
)


@app.command("eval")
def evaluate_command(
    result: Result,
    data: Annotated[
        str | None, typer.Option(help="Instructions to evaluate on; default: the run's held-out rows.")
    ] = None,
    method: Method = None,
    max_rows: Annotated[int | None, typer.Option(min=1, help="The most rows to evaluate; default: all.")] = None,
    base: Annotated[str | None, typer.Option(help="The base model, if not the one the adapter names.")] = None,
    model: Annotated[
        str, typer.Option("--as", help="FedBiOT: the adapter in the full model (full), or on the emulator (emulator).")
    ] = "full",
    output: Annotated[Path | None, typer.Option("--json", help="Also write the numbers to this file.")] = None,
    answers: Annotated[
        Path | None, typer.Option(help="Also write every answer, with its scores, as JSON lines.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="text, number, choice or code; default: as the run has it.", rich_help_panel=_TASK),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(help="What a column of --data is: choices=options. Repeat it.", rich_help_panel=_TASK),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="The longest answer, in tokens; default: the run's.", rich_help_panel=_TASK),
    ] = None,
    run_generated_code: Annotated[
        bool,
        typer.Option(
            "--run-generated-code", help="Task code: run what the model wrote, shut in.", rich_help_panel=_CODE
        ),
    ] = False,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Answers to each prompt, for pass@k.", rich_help_panel=_CODE)
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="What answers are drawn at; 0 is greedy.", rich_help_panel=_CODE)
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="What draws follow from.", rich_help_panel=_CODE)] = None,
    harness: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-evaluation-harness instead: arc_easy,piqa.", rich_help_panel=_HARNESS),
    ] = None,
    harness_tasks: Annotated[
        Path | None, typer.Option(help="A folder with task files of your own.", rich_help_panel=_HARNESS)
    ] = None,
    in_template: Annotated[
        bool,
        typer.Option("--in-template", help="Its prompts in the run's prompt template.", rich_help_panel=_HARNESS),
    ] = False,
) -> None:
    """How good a run's result is: loss, and right answers by the task's own rule, by category."""
    from flocktune.evaluation.choices import by_chance
    from flocktune.files import write_json
    from flocktune.report.tables import evaluation_table, interval_line
    from flocktune.results import evaluate_on, open_result

    columns = _columns(column or [], data)
    if harness:
        needs_extra("lm_eval", "harness")
        said = {"--data": data, "--task": task, "--column": column, "--max-new-tokens": max_new_tokens}
        _refuse_beside("--harness", {**said, **_of_code(run_generated_code, samples, temperature, seed)})
    else:
        _refuse_without("--harness", {"--harness-tasks": harness_tasks, "--in-template": in_template})
    tuned = open_result(result, method, base, emulator=as_emulator(model))
    if harness:
        names = [name.strip() for name in harness.split(",") if name.strip()]
        _harness(tuned, names, harness_tasks, max_rows, in_template, output, answers)
        return
    if (task or tuned.config.evaluation.task) != "code":
        _refuse_without("--task code", _of_code(run_generated_code, samples, temperature, seed))
    code = {"run_generated_code": run_generated_code, "samples": samples, "temperature": temperature}
    settings = _settings(tuned.config, task, max_new_tokens, {**code, "seed": seed})
    if settings.task == "code":
        problems.print(_WARNING, style="yellow", soft_wrap=True)
    found = evaluate_on(tuned, data, max_rows, settings, columns)
    numbers = found.as_dict()
    console.print(evaluation_table(numbers))
    if line := interval_line(numbers):
        console.print(line, style="dim")
    if settings.task == "choice":
        numbers["by_chance"] = by_chance([answer.example for answer in found.answers])
        console.print(f"Guessing gives {numbers['by_chance'] * 100:.1f} %", style="dim")
    if answers:
        _write_answers(found, answers)
    if output:
        write_json(output, {"task": settings.task, **numbers})


def _refuse_beside(option: str, others: Mapping[str, Any]) -> None:
    """Raise UserError for options that would be ignored."""
    from flocktune.errors import Problem, UserError

    UserError.raise_all(
        Problem(other, f"none beside {option}, whose tasks have rows and rules of their own", str(value))
        for other, value in others.items()
        if _is_said(value)
    )


def _refuse_without(option: str, others: Mapping[str, Any]) -> None:
    """Raise UserError for options that mean nothing without another."""
    from flocktune.errors import Problem, UserError

    UserError.raise_all(
        Problem(other, f"{option} beside it, which alone it is for", "none")
        for other, value in others.items()
        if _is_said(value)
    )


def _is_said(value: Any) -> bool:
    return value is not None and value is not False and value != []


def _of_code(
    run_generated_code: bool, samples: int | None, temperature: float | None, seed: int | None
) -> Mapping[str, Any]:
    """Options of task code alone."""
    told = {"--samples": samples, "--temperature": temperature, "--seed": seed}
    return {"--run-generated-code": run_generated_code, **told}


def _harness(
    tuned: Tuned,
    tasks: Sequence[str],
    folder: Path | None,
    max_rows: int | None,
    in_template: bool,
    output: Path | None,
    answers: Path | None,
) -> None:
    from flocktune.files import write_atomic, write_json
    from flocktune.harness import run_harness
    from flocktune.report.tables import harness_table

    found = run_harness(tuned, tasks, folder=folder, max_rows=max_rows, in_template=in_template)
    tables = {each.task: each.as_dict() for each in found}
    console.print(harness_table(tables))
    if answers:
        lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for each in found for row in each.answers)
        write_atomic(answers, "".join(lines))
        console.print(f"Wrote {answers}", soft_wrap=True)
    if output:
        write_json(output, {"harness": tables, "in_template": in_template})


def _settings(
    config: RunConfig, task: str | None, max_new_tokens: int | None, code: Mapping[str, Any]
) -> EvaluationConfig:
    """The run's settings, with what the command line changes (None changes nothing). Raises UserError."""
    from flocktune.config.task_rules import task_problems
    from flocktune.config.tasks import TASKS
    from flocktune.errors import Problem, UserError

    if task not in (None, *TASKS):
        raise UserError(Problem("--task", f"one of {', '.join(TASKS)}", repr(task)))
    run = config.evaluation
    changes: dict[str, Any] = {"task": task, "generate": True if task else None, "max_new_tokens": max_new_tokens}
    changes["code"] = dataclasses.replace(run.code, **_said(code))
    settings = dataclasses.replace(run, **_said(changes))
    UserError.raise_all(task_problems(dataclasses.replace(config, evaluation=settings), only_evaluated=True))
    return settings


def _said(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _columns(told: Sequence[str], data: str | None) -> Columns | None:
    """``field=name`` pairs as columns; None where there are none. Raises UserError."""
    from flocktune.config.schema import Columns
    from flocktune.errors import Problem, UserError

    if not told:
        return None
    if data is None:
        raise UserError(Problem("--column", "--data besides: it says what its columns are", "no --data"))
    fields = [field.name for field in dataclasses.fields(Columns)]
    pairs = [text.partition("=") for text in told]
    UserError.raise_all(
        Problem("--column", f"FIELD=COLUMN, with one of {', '.join(fields)}", repr("".join(pair)))
        for pair in pairs
        if pair[0] not in fields or not pair[2]
    )
    return Columns(**{field: name for field, _, name in pairs})


def _write_answers(found: Evaluation, path: Path) -> None:
    from flocktune.files import write_atomic

    lines = (json.dumps(answer.as_dict(), ensure_ascii=False) + "\n" for answer in found.answers)
    write_atomic(path, "".join(lines))
    console.print(f"Wrote {path}", soft_wrap=True)
