"""A prompt template as a chat template (Jinja), so that whoever serves a result prompts it as it was trained.

Exported tokenizers carry it: ``apply_chat_template(messages, add_generation_prompt=True)`` gives the tokens that
training had before an answer. ``context=...`` beside the messages is what the last one is about, for templates that
have a place for it.
"""

from __future__ import annotations

import json
from typing import Any

from flocktune.config.schema import CustomTemplate
from flocktune.data.encoding import encode_prompt
from flocktune.data.examples import Example, Message
from flocktune.data.templates import FIELD, Template, plain_template

_SAMPLES = (
    Example("Name three fruits."),
    Example("What is it?\nSay it in one word.", "A plum is\na fruit."),
    Example(
        "And now?", history=(Message("system", "Be brief."), Message("user", "Hello"), Message("assistant", "Hi."))
    ),
)
"""Prompts that a chat template is tried on. The last is a conversation."""


def served_template(template: Template, tokenizer: Any) -> str | None:
    """The chat template that prompts as ``template`` does; None when this tokenizer allows none.

    Training encodes segments one by one, a server one rendered text. They agree where no token spans a segment's
    edge; so each candidate is tried on samples, and one that fits single prompts is taken, a conversation's too if
    there is one.
    """
    found = None
    for candidate in _candidates(template, tokenizer):
        fits = [_agrees(candidate, example, template, tokenizer) for example in _SAMPLES]
        if all(fits):
            return candidate
        if all(fits[:-1]):
            found = found or candidate
    return found


def served_prompt(chat_template: str, example: Example, template: Template, tokenizer: Any) -> list[int]:
    """The token ids that a server which has ``chat_template`` makes of an example's prompt."""
    together = template == "chat" and example.context
    said = f"{example.instruction}\n\n{example.context}" if together else example.instruction
    turns = [*example.history, Message("user", said)]
    ids = tokenizer.apply_chat_template(
        [{"role": turn.role, "content": turn.content} for turn in turns],
        chat_template=chat_template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
        context="" if together else example.context,
    )
    return list(ids)


def _agrees(chat_template: str, example: Example, template: Template, tokenizer: Any) -> bool:
    from jinja2 import TemplateError

    try:
        served = served_prompt(chat_template, example, template, tokenizer)
    except TemplateError:  # some chat templates take no system message; then training has none either
        return bool(example.history)
    return served == encode_prompt(example, tokenizer, template=template, max_tokens=1 << 20)


def _candidates(template: Template, tokenizer: Any) -> list[str]:
    if template == "chat":
        own = tokenizer.get_chat_template()
        return [own, "{{- bos_token -}}" + own]
    texts, before_answer = plain_template(template)
    # Some tokenizers begin every text with a space, but not a text that follows a special token.
    return [_jinja(texts, before_answer, tokenizer, glue) for glue in ("", " ")]


def _jinja(texts: CustomTemplate, before_answer: str, tokenizer: Any, glue: str) -> str:
    bos = tokenizer.bos_token
    written = bos is not None and texts.without_context.startswith(bos)
    ends = "" if tokenizer.eos_token is None else " ~ eos_token"
    before_answer = before_answer if before_answer.startswith(" ") else glue + before_answer
    return (
        f"{{%- set ns = namespace(lead={_text(glue)}) -%}}"
        + ("" if bos is None or written else "{{- bos_token -}}")
        + "{%- for message in messages -%}"
        "{%- if message.role == 'system' -%}"
        f"{{%- set ns.lead = {_text(glue)} ~ message.content ~ {_text(_BETWEEN)} -%}}"
        "{%- elif message.role == 'user' -%}"
        "{{- ns.lead -}}"
        f"{{%- if loop.last and context -%}}{{{{- {_filled(texts.with_context, context=True)} -}}}}"
        f"{{%- else -%}}{{{{- {_filled(texts.without_context, context=False)} -}}}}{{%- endif -%}}"
        f"{{%- set ns.lead = {_text(glue + _BETWEEN)} -%}}"
        "{%- elif message.role == 'assistant' and message.content | trim -%}"
        f"{{{{- {_text(before_answer)} ~ message.content{ends} -}}}}"
        "{%- endif -%}"
        "{%- endfor -%}"
    )


_BETWEEN = "\n\n"


def _filled(text: str, *, context: bool) -> str:
    """A Jinja expression for a template's text with its fields."""
    values = {"instruction": "message.content", "context": "context" if context else _text("")}
    parts = FIELD.split(text)  # text, field, text, field, ..., text
    return " ~ ".join(values[part] if at % 2 else _text(part) for at, part in enumerate(parts) if at % 2 or part)


def _text(value: str) -> str:
    """A Jinja string literal."""
    return json.dumps(value, ensure_ascii=False)
