"""lm-evaluation-harness (EleutherAI) on a run's result: its tasks and its rules, our model, adapter and template."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import chdir
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from flocktune.data.examples import Example, Message
from flocktune.data.templates import Template, prompt_before_answer
from flocktune.errors import Problem, UserError
from flocktune.evaluation.generate import evaluating
from flocktune.results import Tuned

BOOTSTRAPS = 1000
"""Draws for the standard error of metrics that have no formula."""


@dataclass(frozen=True)
class Measured:
    """One task: how many rows, its metrics as the harness calls them, and their standard errors where it gives one.

    ``answers``: what was asked and answered, row by row, in the harness's own form.
    """

    task: str
    rows: int
    metrics: Mapping[str, float]
    standard_errors: Mapping[str, float]
    answers: Sequence[Mapping[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without the answers."""
        return {"rows": self.rows, "metrics": dict(self.metrics), "standard_errors": dict(self.standard_errors)}


def run_harness(
    tuned: Tuned,
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    max_rows: int | None = None,
    in_template: bool = False,
) -> list[Measured]:
    """Measure ``tuned`` on tasks of lm-evaluation-harness.

    ``folder``: task files (YAML) of one's own, which come before those of the library; paths in them are relative to
    it. ``max_rows``: the first rows of each task. ``in_template``: a task's prompt stands in the prompt template of the
    run, as an instruction; else it is given to the model as it is. Raises UserError for tasks that are not there, and
    for data that can not be had.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    for library in ("lm_eval", "huggingface_hub"):  # every try to reach a hub, twice each, hides what came of them
        logging.getLogger(library).setLevel(logging.ERROR)
    import lm_eval

    if folder is not None and not folder.is_dir():
        raise UserError(Problem("--harness-tasks", "a folder with task files", str(folder)))
    where = folder.absolute() if folder else Path.cwd()
    with chdir(where), evaluating(tuned.base.model):
        manager = _manager(tasks, folder and where)
        try:
            found = lm_eval.simple_evaluate(
                model=_language_model(tuned, in_template),
                tasks=list(tasks),
                task_manager=manager,
                limit=max_rows,
                bootstrap_iters=BOOTSTRAPS,
                apply_chat_template=in_template,
            )
        except (OSError, ValueError, TypeError) as error:
            fix = "A task's data comes from the hub unless its file names local data: docs/evaluation.md shows one."
            got = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
            raise UserError(Problem(f"--harness {','.join(tasks)}", "a task whose data can be had", got, fix)) from None
    return [_measured(name, found) for name in found["results"] if name in found["samples"]]


def _manager(tasks: Sequence[str], folder: Path | None) -> Any:
    """What knows the tasks by name. The library's own thousands of files are read only where they are needed."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False) if folder else TaskManager()
    if folder and not set(tasks) <= set(manager.task_index):
        manager = TaskManager(include_path=str(folder))
    known = sorted(manager.task_index)
    UserError.raise_all(
        Problem("--harness", "a task of lm-evaluation-harness, or of --harness-tasks", repr(name), _near(name, known))
        for name in tasks
        if name not in known
    )
    return manager


def _near(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, n=3)
    return f"Near it: {', '.join(near)}." if near else ""


def _language_model(tuned: Tuned, in_template: bool) -> Any:
    """Our resident model as the harness's kind of model, which knows nothing of it but how it encodes and answers."""
    from lm_eval.models.huggingface import HFLM

    base, settings = tuned.base, tuned.config
    tokenizer = _beginning(copy.deepcopy(base.tokenizer))  # the library sets its padding
    model = HFLM(pretrained=base.model, tokenizer=tokenizer, batch_size=settings.evaluation.batch_size)
    if in_template:
        template = settings.data.template
        model.apply_chat_template = lambda turns, add_generation_prompt=True: _in_template(turns, template, tokenizer)
    return model


def _beginning(tokenizer: Any) -> Any:
    """The tokenizer, writing a first begin-of-text token on its own, as our rows have it wherever there is one."""
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("a")["input_ids"][:1] != [bos]:
        from tokenizers.processors import TemplateProcessing

        begins = TemplateProcessing(single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, bos)])
        tokenizer.backend_tokenizer.post_processor = begins
    return tokenizer


def _in_template(turns: Sequence[Mapping[str, str]], template: Template, tokenizer: Any) -> str:
    """A conversation up to where the model speaks; of its answer, what the task already gives."""
    said = [Message(turn["role"], turn["content"]) for turn in turns]  # type: ignore[arg-type]  # the library's roles
    begun = said.pop().content if said[-1].role == "assistant" else ""
    return prompt_before_answer(Example(said[-1].content, history=tuple(said[:-1])), template, tokenizer) + begun


def _measured(name: str, found: Mapping[str, Any]) -> Measured:
    metrics, errors = dict[str, float](), dict[str, float]()
    for key, value in found["results"][name].items():
        metric, _, filtered = key.partition(",")
        if not filtered or not isinstance(value, int | float):
            continue
        said = metric.removesuffix("_stderr")
        called = said if filtered == "none" else f"{said} ({filtered})"
        (metrics if said == metric else errors)[called] = float(value)
    answers = [{"task": name, **row} for row in found["samples"][name]]
    return Measured(name, int(found["n-samples"][name]["effective"]), metrics, errors, answers)
