"""Answers from a causal language model: greedy in batches, or one at a time as it is written.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flocktune.errors import Problem, UserError

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""How a decoder shows the first bytes of a letter whose other bytes are still to come."""


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """Greedy answers, in the order of ``prompts`` (token ids each), stripped, without special tokens.

    Prompts of like length share a batch; they are padded on the left and masked, so an answer does not
    depend on its batch mates. Sampling settings, penalties and length limits that came with the model
    are left out: greedy means the most likely token. A prompt longer than the model's context minus
    ``max_new_tokens`` loses its oldest tokens, but for a first BOS token. The model's training flags are
    as before afterwards.

    Raises UserError when ``max_new_tokens`` leaves no room for a prompt.
    """
    room = prompt_room(model, max_new_tokens)
    cut = [cut_left(prompt, room, tokenizer.bos_token_id) for prompt in prompts]
    order = sorted(range(len(cut)), key=lambda index: -len(cut[index]))  # longest first: memory fails at once
    answers = [""] * len(cut)
    with evaluating(model), _greedy(model, tokenizer, max_new_tokens):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            for index, answer in zip(chosen, _answer_batch(model, tokenizer, [cut[i] for i in chosen]), strict=True):
                answers[index] = answer
    return answers


def stream_answer(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Generator[str, None, None]:
    """The answer to one prompt, piece by piece; together the pieces are the stripped answer.

    ``temperature`` 0 is greedy and gives what :func:`generate_answers` gives; above, tokens are drawn
    from softmax(logits / temperature) with ``seed``. Closing the iterator ends the work.

    Raises UserError when ``max_new_tokens`` leaves no room for a prompt.
    """
    ids = cut_left(prompt, prompt_room(model, max_new_tokens), tokenizer.bos_token_id)
    stops = _stop_tokens(model, tokenizer)
    generator = torch.Generator().manual_seed(seed)
    last = torch.tensor([ids], device=_device(model))
    written: list[int] = []
    cache, shown = None, ""
    with evaluating(model):
        for _ in range(max_new_tokens):
            logits, cache = _next_logits(model, last, cache)
            token = _choose(logits, temperature, generator)
            if token in stops:
                break
            written.append(token)
            text = _decode(tokenizer, written)
            if len(text) > len(shown) and not text.endswith(_UNFINISHED):
                yield text[len(shown) :]
                shown = text
            last = torch.tensor([[token]], device=last.device)
    rest = _decode(tokenizer, written)[len(shown) :]
    if rest:
        yield rest


def prompt_room(model: Any, max_new_tokens: int) -> int:
    """How many tokens a prompt may have so that the answer still fits into the model's context.

    Raises UserError when it would be none.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:  # models without positions, such as state space models
        return 1 << 30
    if max_new_tokens >= context:
        raise UserError(
            Problem(
                "evaluation.max_new_tokens",
                f"less than the model's context of {context} tokens",
                str(max_new_tokens),
                "An answer needs room for its prompt: lower it.",
            )
        )
    return int(context) - max_new_tokens


def cut_left(prompt: Sequence[int], room: int, bos_token_id: int | None) -> list[int]:
    """The last ``room`` tokens of a prompt; a first BOS token stays first, since models lean on it."""
    if len(prompt) <= room:
        return list(prompt)
    if prompt[0] == bos_token_id and room > 1:
        return [prompt[0], *prompt[len(prompt) - room + 1 :]]
    return list(prompt[len(prompt) - room :])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) inside; afterwards each module has its own training flag again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _greedy(model: Any, tokenizer: Any, max_new_tokens: int) -> Iterator[None]:
    """Let ``model.generate`` be greedy and nothing else.

    ``generate`` fills whatever a call leaves open from the configuration that came with the model
    (temperature, repetition penalty, ...), so that configuration is put aside meanwhile.
    """
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    stops = sorted(_stop_tokens(core, tokenizer))
    own = core.generation_config
    core.generation_config = type(own)(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        bos_token_id=own.bos_token_id,
        eos_token_id=stops or None,
        pad_token_id=_padding(tokenizer, stops),
    )
    try:
        yield
    finally:
        core.generation_config = own


@torch.inference_mode()
def _answer_batch(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]]) -> list[str]:
    """The answers to one batch of prompts."""
    stops = _stop_tokens(model, tokenizer)
    longest = max(1, *(len(prompt) for prompt in prompts))
    ids = torch.full((len(prompts), longest), _padding(tokenizer, sorted(stops)), device=_device(model))  # B x T
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, dtype=ids.dtype)
        mask[row, longest - len(prompt) :] = 1
    written = model.generate(input_ids=ids, attention_mask=mask)[:, longest:].tolist()
    return [_decode(tokenizer, _until(row, stops)) for row in written]


@torch.inference_mode()
def _next_logits(model: Any, last: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """The logits (V) that follow ``last`` (1 x T) after what ``cache`` holds, and the longer cache."""
    output = model(input_ids=last, past_key_values=cache, use_cache=True)
    return output.logits[0, -1].float().cpu(), output.past_key_values


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    """The most likely token, or a drawn one when ``temperature`` is above 0."""
    if temperature <= 0:
        return int(logits.argmax())
    return int(torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator))


def _stop_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer: the tokenizer's, and those of the model (chat models have several)."""
    own = getattr(model.generation_config, "eos_token_id", None)
    several = own if isinstance(own, list) else [own]
    return frozenset(token for token in (*several, tokenizer.eos_token_id) if token is not None)


def _padding(tokenizer: Any, stops: Sequence[int]) -> int:
    """Any valid token does: it is masked before the prompt, and cut off after the answer."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return stops[0] if stops else 0


def _until(tokens: Sequence[int], stops: frozenset[int]) -> list[int]:
    """The tokens before the first stop token."""
    end = next((place for place, token in enumerate(tokens) if token in stops), len(tokens))
    return list(tokens[:end])


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    # Without clean-up of spaces: it would change text that stream_answer has shown already.
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)).strip()


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
