"""From an example to text, cut into segments that are trained on or not.

A segment boundary is also a token boundary: segments are encoded one by one, in training and in
generation alike, so that the prompt's tokens never depend on the answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeAlias, assert_never

from flocktune.config.schema import CustomTemplate
from flocktune.data.examples import Example, Message
from flocktune.errors import Problem, UserError

Template: TypeAlias = Literal["alpaca", "short", "chat"] | CustomTemplate

ALPACA = CustomTemplate(
    with_context=(
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"
    ),
    without_context=(
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:\n"
    ),
)
"""The wording of Stanford Alpaca with the line breaks of Alpaca-LoRA, which FedIT's code uses too."""

SHORT = CustomTemplate(
    with_context="Instruction: {instruction}\nContext: {context}\nAnswer:",
    without_context="Instruction: {instruction}\nAnswer:",
)

FIELD = re.compile(r"\{(instruction|context)\}")


class Tokenizer(Protocol):
    """What the data room needs of a transformers tokenizer."""

    bos_token_id: int | None
    eos_token_id: int | None
    eos_token: str | None
    chat_template: Any

    def __call__(self, text: list[str], **options: Any) -> Mapping[str, list[list[int]]]: ...

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any: ...


@dataclass(frozen=True)
class Segment:
    """A piece of a row. ``ends``: the answer is complete here, so the tokenizer's end-of-text token follows."""

    text: str
    trainable: bool
    ends: bool = False


def segments(example: Example, template: Template, tokenizer: Tokenizer) -> list[Segment]:
    """The whole row, prompt and answer in turn. The last segment is the answer when there is one.

    Every assistant turn is trainable. An empty response (nothing but white space) gives no segment.
    Raises UserError when the tokenizer has no chat template, or one that rewrites earlier turns.
    """
    if template == "chat":
        return _chat_segments(example, tokenizer)
    fill, before_answer = plain_template(template)
    row: list[Segment] = []
    lead = ""
    turns = [*example.history, Message("user", example.instruction)]
    for at, turn in enumerate(turns):
        last = at == len(turns) - 1
        match turn.role:
            case "system":
                lead = turn.content + "\n\n"
            case "user":
                row.append(Segment(lead + _filled(fill, turn.content, example.context if last else ""), False))
                lead = "\n\n"
            case "assistant":
                row += _answer(before_answer, turn.content)
    return row + _answer(before_answer, example.response)


def prompt_segments(example: Example, template: Template, tokenizer: Tokenizer) -> list[Segment]:
    """All of :func:`segments` that comes before the last answer: what generation starts from."""
    return segments(without_response(example), template, tokenizer)


def prompt_text(example: Example, template: Template, tokenizer: Tokenizer) -> str:
    """The prompt as one text, for people to read."""
    return "".join(segment.text for segment in prompt_segments(example, template, tokenizer))


def prompt_before_answer(example: Example, template: Template, tokenizer: Tokenizer) -> str:
    """The prompt as one text that can be encoded at once: with the ends of earlier answers, and with what the template
    writes before an answer, so that the answer's own letters follow."""
    *before, answer = segments(replace(example, response="x"), template, tokenizer)
    end = tokenizer.eos_token or ""
    told = "".join(segment.text + (end if segment.ends else "") for segment in before)
    return told + answer.text.partition("x")[0]


def without_response(example: Example) -> Example:
    """The example as it is before it was answered."""
    return replace(example, response="")


def plain_template(template: Template) -> tuple[CustomTemplate, str]:
    """A template's texts, and what the answer begins with."""
    match template:
        case "alpaca":
            return ALPACA, ""
        case "short":
            return SHORT, " "
        case CustomTemplate():
            return template, ""
        case "chat":
            raise ValueError("the chat template belongs to the tokenizer")
    assert_never(template)


def _filled(template: CustomTemplate, instruction: str, context: str) -> str:
    """Fill both fields in one pass, so that braces inside a row's text stay as they are."""
    values = {"instruction": instruction, "context": context}
    return FIELD.sub(lambda field: values[field[1]], template.with_context if context else template.without_context)


def _answer(before: str, text: str) -> list[Segment]:
    return [Segment(before + text, True, ends=True)] if text.strip() else []


def _chat_segments(example: Example, tokenizer: Tokenizer) -> list[Segment]:
    """Differences of texts rendered from growing lists of messages; each must continue the one before."""
    question = f"{example.instruction}\n\n{example.context}" if example.context else example.instruction
    turns = [*example.history, Message("user", question)]
    if example.response.strip():
        turns.append(Message("assistant", example.response))
    row: list[Segment] = []
    done = ""

    def extend(rendered: str, trainable: bool) -> None:
        nonlocal done
        if not rendered.startswith(done):
            raise UserError(
                Problem("data.template", "a chat template that only ever adds text as turns are added",
                        f"one that rewrites earlier text after {done[-40:]!r}",
                        "Choose template 'alpaca', 'short' or your own, or give the tokenizer another chat template.")
            )  # fmt: skip
        row.append(Segment(rendered[len(done) :], trainable))
        done = rendered

    for at, turn in enumerate(turns):
        if turn.role == "assistant":
            extend(_render(turns[:at], tokenizer, opens_answer=True), False)
            extend(_render(turns[: at + 1], tokenizer, opens_answer=False), bool(turn.content.strip()))
    if turns[-1].role == "user":
        extend(_render(turns, tokenizer, opens_answer=True), False)
    return row


def _render(turns: Sequence[Message], tokenizer: Tokenizer, *, opens_answer: bool) -> str:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise UserError(
            Problem("data.template", "a tokenizer with a chat template", "one without",
                    "Choose template 'alpaca' or 'short', or write your own.")
        )  # fmt: skip
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens_answer)
    except TemplateError as error:
        roles = ", ".join(turn.role for turn in turns)
        raise UserError(Problem("data.template", f"a chat template that takes {roles}", str(error))) from None
    return str(text)
