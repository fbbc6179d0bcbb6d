"""Held-out questions answered as ``evaluation.task`` says, and each answer scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, assert_never

from flocktune.config.schema import EvaluationConfig
from flocktune.data.encoding import encode_prompt
from flocktune.data.examples import Example
from flocktune.data.templates import Template
from flocktune.errors import Problem, UserError
from flocktune.evaluation import shut_in
from flocktune.evaluation.choices import likelihoods
from flocktune.evaluation.generate import generate_answers, prompt_room
from flocktune.evaluation.numbers import number_in, same_number
from flocktune.evaluation.programs import PASS_AT, pass_at, program
from flocktune.evaluation.scores import score
from flocktune.seeds import derive_seed


@dataclass(frozen=True)
class Answer:
    """What the model answered to one example, and how that scored. ``more``: what else there is to tell of it."""

    example: Example
    text: str
    scores: Mapping[str, float]
    more: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """A row of ``answers.jsonl``."""
        return {
            "category": self.example.category,
            "instruction": self.example.instruction,
            "context": self.example.context,
            "reference": self.example.response,
            "answer": self.text,
            "scores": dict(self.scores),
            **self.more,
        }


@dataclass(frozen=True, eq=False)
class Speaker:
    """A model, and how to speak to it: the template and the room of its training."""

    model: Any
    tokenizer: Any
    template: Template
    max_tokens: int
    pad_id: int

    def prompts(self, examples: Sequence[Example], max_new_tokens: int) -> list[list[int]]:
        """The tokens that stand before each answer in training, in what ``max_new_tokens`` leave of the context."""
        room = min(self.max_tokens, prompt_room(self.model, max_new_tokens))
        return [encode_prompt(example, self.tokenizer, template=self.template, max_tokens=room) for example in examples]


def refuse_rows(examples: Sequence[Example], settings: EvaluationConfig) -> None:
    """Raise UserError when rows lack what ``settings.task`` needs, or this machine: better before a run than after."""
    lacking, wanted, fix = {
        "text": (0, "", ""),
        "number": (
            sum(number_in(example.response) is None for example in examples),
            "rows whose reference ends with a number",
            "Leave the others out: they could never be answered right.",
        ),
        "choice": (
            sum(not example.choices for example in examples),
            "rows with choices",
            "Name their column in data.columns.choices, and that of the right one in data.columns.response.",
        ),
        "code": (
            sum(example.program is None for example in examples),
            "rows with tests",
            "Name their column in data.columns.test, and that of the function's name in data.columns.entry_point.",
        ),
    }[settings.task]
    if lacking:
        got = f"{lacking} of {len(examples)} without"
        raise UserError(Problem("held-out rows", f"{wanted} (evaluation.task {settings.task})", got, fix))
    if settings.task == "code" and examples:
        shut_in.refuse()


def answer_all(speaker: Speaker, examples: Sequence[Example], settings: EvaluationConfig) -> list[Answer]:
    """An answer to each of ``examples``, in order; none where ``settings`` want none written.

    Raises UserError when rows lack what the task needs.
    """
    refuse_rows(examples, settings)
    if settings.task == "choice":
        return _choices(speaker, examples, settings)
    if not settings.generate:
        return []
    match settings.task:
        case "text":
            return [Answer(one, text, score(text, one)) for one, text in _written(speaker, examples, settings)]
        case "number":
            return [
                Answer(one, text, {"number_match": float(same_number(text, one.response))})
                for one, text in _written(speaker, examples, settings)
            ]
        case "code":
            return _programs(speaker, examples, settings)
    assert_never(settings.task)


def _written(
    speaker: Speaker, examples: Sequence[Example], settings: EvaluationConfig
) -> Sequence[tuple[Example, str]]:
    """Greedy answers."""
    texts = generate_answers(
        speaker.model,
        speaker.tokenizer,
        speaker.prompts(examples, settings.max_new_tokens),
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
    )
    return list(zip(examples, texts, strict=True))


def _choices(speaker: Speaker, examples: Sequence[Example], settings: EvaluationConfig) -> list[Answer]:
    found = likelihoods(
        speaker.model,
        speaker.tokenizer,
        examples,
        template=speaker.template,
        max_tokens=speaker.max_tokens,
        batch_size=settings.batch_size,
        pad_id=speaker.pad_id,
    )
    answers = []
    for example, likely in zip(examples, found, strict=True):
        chosen = example.choices[likely.chosen()["choice"]]
        more = {"choices": list(example.choices), "log_likelihoods": list(likely.nats), "tokens": list(likely.tokens)}
        answers.append(Answer(example, chosen, likely.scores(example.choices.index(example.response)), more))
    return answers


def _programs(speaker: Speaker, examples: Sequence[Example], settings: EvaluationConfig) -> list[Answer]:
    """Every prompt answered ``samples`` times; every answer tried. Raises UserError unless that was allowed."""
    code = settings.code
    if not code.run_generated_code:
        fix = "What a model wrote is then run on this machine, shut in."
        raise UserError(Problem("evaluation.code.run_generated_code", "true with evaluation.task code", "false", fix))
    prompts = speaker.prompts(examples, settings.max_new_tokens)
    texts = generate_answers(
        speaker.model,
        speaker.tokenizer,
        [prompt for prompt in prompts for _ in range(code.samples)],
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        temperature=code.temperature,
        seeds=[
            derive_seed(code.seed, "code", one.instruction, sample)
            for one in examples
            for sample in range(code.samples)
        ],
        strip=False,  # a function's body begins with its indentation
    )
    limits = shut_in.Limits(code.timeout_s, code.memory_mb * 2**20)
    answers = []
    for place, example in enumerate(examples):
        assert example.program is not None
        own = texts[place * code.samples : (place + 1) * code.samples]
        outcomes = [shut_in.run_shut_in(program(example.instruction, text, example.program), limits) for text in own]
        right = outcomes.count("passed")
        scores = {f"pass_at_{k}": pass_at(k, code.samples, right) for k in PASS_AT if k <= code.samples}
        more = {"samples": [{"answer": text, "outcome": each} for text, each in zip(own, outcomes, strict=True)]}
        answers.append(Answer(example, own[0], scores, more))
    return answers
