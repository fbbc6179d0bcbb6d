"""One row from segments to tokens, and how a row that is too long is cut.

Cutting keeps the response: first the oldest exchanges of a conversation go, then the middle of the
longer field of the prompt, and only what is still too much is cut from the end of the response.
Texts are shortened and encoded again, so a cut prompt is still one that the template wrote.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice

from flocktune.data.examples import Example
from flocktune.data.templates import Segment, Template, Tokenizer, prompt_segments, segments

ELLIPSIS = " ... "
"""Stands for the part of a field that was cut away."""

PROMPT_SHARE = 4
"""A prompt is never cut below a quarter of ``max_tokens``: an answer to no question teaches nothing."""

CHUNK_ROWS = 4096


@dataclass(frozen=True)
class Row:
    """Tokens and mask; ``answer`` is where the last response begins (the length when there is none)."""

    tokens: list[int]
    trainable: list[bool]
    answer: int


def encode_rows(examples: Sequence[Example], tokenizer: Tokenizer, template: Template) -> Iterator[Row]:
    """Rows at full length. Texts are encoded many at a time, which a fast tokenizer does in parallel."""
    waiting = iter(examples)
    while chunk := list(islice(waiting, CHUNK_ROWS)):
        rows = [segments(example, template, tokenizer) for example in chunk]
        ids = iter(_tokenize([segment.text for row in rows for segment in row], tokenizer, template))
        for example, row in zip(chunk, rows, strict=True):
            yield _assemble(row, list(islice(ids, len(row))), bool(example.response.strip()), tokenizer)


def _tokenize(texts: list[str], tokenizer: Tokenizer, template: Template) -> list[list[int]]:
    """Tokens of each text. A row that happens to say ``</s>`` says four letters, not the end of a text.

    A chat template, or one of the user's own, writes special tokens on purpose: there they are read as such.
    """
    if not texts:
        return []
    as_letters = isinstance(template, str) and template != "chat"
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    return tokenizer(texts, split_special_tokens=as_letters, **options)["input_ids"]


def _assemble(row: Sequence[Segment], ids: Sequence[list[int]], answered: bool, tokenizer: Tokenizer) -> Row:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    starts = bos is not None and not (ids and ids[0][:1] == [bos])
    pieces: list[list[int]] = [[bos]] if starts and bos is not None else [[]]
    flags = [False] * len(pieces[0])
    for segment, piece in zip(row, ids, strict=True):
        whole = [*piece, eos] if segment.ends and eos is not None else piece
        pieces.append(whole)
        flags += [segment.trainable] * len(whole)
    answer = len(flags) - (len(pieces[-1]) if answered else 0)
    return Row(list(chain.from_iterable(pieces)), flags, answer)


def encode_prompt_row(example: Example, tokenizer: Tokenizer, template: Template) -> Row:
    """All that comes before the last answer, at full length."""
    row = prompt_segments(example, template, tokenizer)
    return _assemble(row, _tokenize([segment.text for segment in row], tokenizer, template), False, tokenizer)


def shorten(
    rows: Sequence[Row], example: Example, tokenizer: Tokenizer, template: Template, max_tokens: int
) -> list[Row]:
    """Cut the prompt to what the longest response leaves of ``max_tokens``, then a response's end if need be.

    ``rows``: the responses to one prompt, each after it; afterwards it is still the same for all.
    """
    longest = max(len(row.tokens) - row.answer for row in rows)
    room = max(max_tokens - longest, max_tokens // PROMPT_SHARE)
    first = rows[0]
    prompt = Row(first.tokens[: first.answer], first.trainable[: first.answer], first.answer)
    prompt = fit_prompt(prompt, example, tokenizer, template, room)
    end = max_tokens - prompt.answer
    return [
        Row(
            prompt.tokens + row.tokens[row.answer :][:end],
            prompt.trainable + row.trainable[row.answer :][:end],
            prompt.answer,
        )
        for row in rows
    ]


def fit_prompt(prompt: Row, example: Example, tokenizer: Tokenizer, template: Template, room: int) -> Row:
    """``prompt``, the prompt of ``example``, in at most ``room`` tokens.

    Shorter texts first; when nothing is left of them, tokens off the left (the begin-of-text token stays).
    """
    while (excess := len(prompt.tokens) - room) > 0:
        shorter = _drop_oldest(example) or _cut_longer_field(example, excess / len(prompt.tokens))
        if shorter is None:
            kept = min(room, 1 if prompt.tokens[0] == tokenizer.bos_token_id else 0)
            cut = slice(kept, kept + excess)
            del prompt.tokens[cut], prompt.trainable[cut]
            return Row(prompt.tokens, prompt.trainable, room)
        example = shorter
        prompt = encode_prompt_row(example, tokenizer, template)
    return prompt


def _drop_oldest(example: Example) -> Example | None:
    """Without the first exchange of the history; a system message stays."""
    system = 1 if example.history and example.history[0].role == "system" else 0
    if len(example.history) == system:
        return None
    return replace(example, history=example.history[:system] + example.history[system + 2 :])


def _cut_longer_field(example: Example, share: float) -> Example | None:
    """Take ``share`` of both fields' characters out of the middle of the longer one; None when both are gone."""
    context, instruction = example.context, example.instruction
    text = context if len(context) >= len(instruction) else instruction
    if not text:
        return None
    # Always shorter than before, so that the caller ends; the middle of a text once cut is its mark.
    keep = len(text) - len(ELLIPSIS) - max(1, math.ceil(share * (len(context) + len(instruction))))
    head, tail = (keep + 1) // 2, keep // 2
    cut = text[:head] + ELLIPSIS + text[len(text) - tail :] if keep >= 2 else ""
    return replace(example, context=cut) if text is context else replace(example, instruction=cut)
