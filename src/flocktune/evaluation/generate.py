"""Answers from a causal language model: in batches, or one at a time as it is written.

A batch is decoded with a cache of keys and values, and a row leaves it, cache and all, when its answer ends: so a batch
costs what its rows are long, not what its longest is. What a row is answered depends on its batch by rounding only.

Shapes: B rows of a batch that are not done, T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from flocktune.errors import Problem, UserError

Choose: TypeAlias = Callable[[Sequence[int], Tensor], Tensor]
"""(which rows, their logits [B, V]) -> the next token of each, [B]."""

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""How a decoder shows the first bytes of a letter whose other bytes are still to come."""


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    seeds: Sequence[int] = (),
    strip: bool = True,
) -> list[str]:
    """Answers, in the order of ``prompts`` (token ids each), without special tokens; stripped unless ``strip`` is off.

    ``temperature`` 0 is greedy; above, tokens are drawn from softmax(logits / temperature), for each prompt by its own
    one of ``seeds``. Prompts of like length share a batch; they are padded on the left and masked, so an answer does
    not depend on its batch mates. Sampling settings, penalties and length limits that came with the model
    are left out: greedy means the most likely token. A prompt longer than the model's context minus
    ``max_new_tokens`` loses its oldest tokens, but for a first BOS token. The model's training flags are
    as before afterwards.

    Raises UserError when ``max_new_tokens`` leaves no room for a prompt.
    """
    room = prompt_room(model, max_new_tokens)
    cut = [cut_left(prompt, room, tokenizer.bos_token_id) for prompt in prompts]
    order = sorted(range(len(cut)), key=lambda index: -len(cut[index]))  # longest first: memory fails at once
    answers = [""] * len(cut)
    decode = _decode_batch if _keeps_keys_and_values(model) else _decode_by_library
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            choose = _drawing(temperature, [seeds[index] for index in chosen]) if temperature > 0 else _likeliest
            written = decode(model, tokenizer, [cut[index] for index in chosen], max_new_tokens, choose)
            for index, tokens in zip(chosen, written, strict=True):
                answers[index] = _decode(tokenizer, tokens, strip=strip)
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


def _likeliest(_: Sequence[int], logits: Tensor) -> Tensor:
    return logits.argmax(-1)


def _drawing(temperature: float, seeds: Sequence[int]) -> Choose:
    """Draws from softmax(logits / temperature), every row by its own seed, so that its batch does not matter.

    The largest of logits / temperature - log E, with E drawn from an exponential distribution, is such a draw.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def choose(rows: Sequence[int], logits: Tensor) -> Tensor:
        drawn = [torch.empty(logits.shape[-1]).exponential_(generator=generators[row]) for row in rows]
        return (logits.float() / temperature - torch.stack(drawn).log().to(logits.device)).argmax(-1)

    return choose


def _keeps_keys_and_values(model: Any) -> bool:
    """Whether a model's memory is keys and values of every position, told apart by position ids: most have that."""
    core = _core(model)
    known = {"position_ids", "attention_mask", "past_key_values"} <= set(inspect.signature(core.forward).parameters)
    return known and not getattr(core, "_is_stateful", False)


@torch.inference_mode()
def _decode_batch(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, choose: Choose
) -> list[list[int]]:
    """The tokens of the answers to one batch of prompts, without the one that ends them."""
    stops = _stop_tokens(model, tokenizer)
    ids, mask = _padded_left(prompts, _padding(tokenizer, sorted(stops)), _device(model))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(_core(model).forward).parameters else {}
    written: list[list[int]] = [[] for _ in prompts]
    rows, cache = list(range(len(prompts))), None
    for step in range(max_new_tokens):
        places = {"attention_mask": mask, "position_ids": positions}
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, **places, **last)
        tokens, cache = choose(rows, output.logits[:, -1]), output.past_key_values
        going = [place for place, token in enumerate(tokens.tolist()) if token not in stops]
        for place in going:
            written[rows[place]].append(int(tokens[place]))
        if not going or step == max_new_tokens - 1:
            break
        if len(going) < len(rows):
            kept = torch.tensor(going, device=ids.device)
            cache.batch_select_indices(kept)
            rows, tokens, mask, positions = [rows[place] for place in going], tokens[kept], mask[kept], positions[kept]
        ids, positions = tokens[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return written


@torch.inference_mode()
def _decode_by_library(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, choose: Choose
) -> list[list[int]]:
    """As :func:`_decode_batch`, by transformers' own loop: for models with a memory of another kind.

    ``generate`` fills whatever a call leaves open from the configuration that came with the model
    (temperature, repetition penalty, ...), so that configuration is put aside meanwhile.
    """
    core, stops = _core(model), _stop_tokens(model, tokenizer)
    padding = _padding(tokenizer, sorted(stops))
    ids, mask = _padded_left(prompts, padding, _device(model))

    def only_chosen(_: Tensor, logits: Tensor) -> Tensor:
        tokens = choose(range(len(prompts)), logits)
        return torch.full_like(logits, -torch.inf).scatter_(-1, tokens[:, None], 0.0)

    own = core.generation_config
    core.generation_config = type(own)(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        bos_token_id=own.bos_token_id,
        eos_token_id=sorted(stops) or None,
        pad_token_id=padding,
    )
    try:
        written = model.generate(input_ids=ids, attention_mask=mask, logits_processor=[only_chosen])
    finally:
        core.generation_config = own
    return [_until(row, stops) for row in written[:, ids.shape[1] :].tolist()]


def _padded_left(prompts: Sequence[Sequence[int]], padding: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] with every prompt at the right, and a mask that is 1 where a token is a prompt's."""
    longest = max(1, *(len(prompt) for prompt in prompts))
    ids = torch.full((len(prompts), longest), padding)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, dtype=ids.dtype)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _core(model: Any) -> Any:
    """The model inside of PEFT's, if it is one of those."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


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


def _decode(tokenizer: Any, tokens: Sequence[int], *, strip: bool = True) -> str:
    # Without clean-up of spaces: it would change text that stream_answer has shown already.
    text = str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return text.strip() if strip else text


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
