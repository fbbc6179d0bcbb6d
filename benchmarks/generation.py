"""Writing answers: batches that shrink as answers end, beside transformers' own loop, one by one, and without a cache.

All ways answer the same prompts greedily with the same model; that the answers are the same is checked, but for those
that rounding turns: in another batch sums are ordered otherwise, and two tokens can be as likely as each other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from benchmarks.paired import Options, Result, Spread, interleaved, ratio
from flocktune.config.schema import Columns, ModelConfig
from flocktune.data.encoding import encode_prompt
from flocktune.data.sources import read_examples
from flocktune.evaluation.generate import _decode_batch, _decode_by_library, _likeliest, _stop_tokens
from flocktune.models.load import load_model, load_tokenizer

GOAL = 3.0
SAME = 0.9
"""Of the answers, how many must be the same in all ways: the float32 of random models has more ties than that of any
trained one."""
BATCHES, LIBRARY, ALONE, NO_CACHE = "batches that shrink", "transformers' generate", "one by one", "without a cache"

Answers = list[list[int]]


def run(options: Options) -> Result:
    """All ways in turns, on the first prompts of the data."""
    turns, count, new, rows = (1, 6, 4, 3) if options.quick else (3, 64, 64, 32)
    model, tokenizer, prompts = _prepared(options, count)
    decode = partial(_in_batches, model, tokenizer, prompts, new)
    ways: dict[str, Callable[[], Answers]] = {
        BATCHES: partial(decode, rows, _decode_batch),
        LIBRARY: partial(decode, rows, _decode_by_library),
        ALONE: partial(decode, 1, _decode_batch),
        NO_CACHE: partial(_without_cache, model, tokenizer, prompts, new),
    }
    answers: dict[str, Answers] = {}

    def way(name: str, _: int) -> float:
        started = time.process_time()
        answers[name] = ways[name]()
        return time.process_time() - started

    seconds = interleaved({name: partial(way, name) for name in ways}, turns, warm_up=0 if options.quick else 1)
    same = {name: _same(found, answers[ALONE]) for name, found in answers.items()}
    if min(same.values()) < SAME:
        raise RuntimeError(f"the ways do not answer alike: {same}")
    written = sum(len(answer) for answer in answers[ALONE])
    times = {name: ratio(seconds[name], seconds[BATCHES]) for name in ways}
    return Result(
        title="Writing answers",
        goal=f"at least {GOAL:g} times as fast as one by one, and not slower than transformers' own loop",
        met=None if options.quick else times[ALONE].median >= GOAL and times[LIBRARY].median >= 1,
        header=("way", "seconds", "tokens a second", "times as long", "answers as one by one"),
        rows=[
            (
                name,
                str(Spread.of(spent)),
                f"{written / Spread.of(spent).median:,.0f}",
                str(times[name]),
                f"{same[name]:.0%}",
            )
            for name, spent in seconds.items()
        ],
        notes=(
            f"{count} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens, at most {new} new ones, "
            f"{written} in all; batches of {rows}; {turns} turns, medians of processor seconds.",
        ),
        values={
            "seconds": seconds,
            "same": same,
            "written": written,
            "times": {n: asdict(t) for n, t in times.items()},
        },
        measured=f"{times[ALONE].median:.2f} times one by one, {times[LIBRARY].median:.2f} times transformers' loop",
    )


def _prepared(options: Options, count: int) -> tuple[Any, Any, list[list[int]]]:
    settings = ModelConfig(options.model)
    model, tokenizer = load_model(settings, torch.device("cpu")).eval(), load_tokenizer(settings)
    examples = read_examples(options.data, Columns())
    chosen = examples[:: max(1, len(examples) // count)][:count]
    return model, tokenizer, [encode_prompt(one, tokenizer, template="short", max_tokens=192) for one in chosen]


def _in_batches(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], new: int, rows: int, decode: Callable[..., Answers]
) -> Answers:
    """As the product does: of like length together, the longest first."""
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    answers: Answers = [[] for _ in prompts]
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        for index, answer in zip(
            chosen, decode(model, tokenizer, [prompts[i] for i in chosen], new, _likeliest), strict=True
        ):
            answers[index] = answer
    return answers


@torch.inference_mode()
def _without_cache(model: Any, tokenizer: Any, prompts: Sequence[list[int]], new: int) -> Answers:
    """The whole row again for every token."""
    stops = _stop_tokens(model, tokenizer)
    answers: Answers = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(new):
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False, logits_to_keep=1).logits[0, -1]
            token = int(logits.argmax())
            if token in stops:
                break
            tokens.append(token)
        answers.append(tokens[len(prompt) :])
    return answers


def _same(one: Answers, other: Answers) -> float:
    return sum(mine == theirs for mine, theirs in zip(one, other, strict=True)) / len(one)
