"""Scores of answers, generation, and the evaluation of a model."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from flocktune.config.schema import EvaluationConfig
from flocktune.data.encoding import encode, encode_prompt
from flocktune.data.examples import Example
from flocktune.errors import UserError
from flocktune.evaluation.evaluate import Evaluation, choose_rows, evaluate
from flocktune.evaluation.generate import (
    _decode_batch,
    _decode_by_library,
    _drawing,
    _keeps_keys_and_values,
    _likeliest,
    cut_left,
    generate_answers,
    prompt_room,
    stream_answer,
)
from flocktune.evaluation.scores import contains, exact_match, normalise, rouge_l, score
from flocktune.types import Mean
from tiny_models import DECODERS, tiny_decoder, tiny_model, tiny_tokenizer

# --- scores -------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.text(max_size=30))
def test_normalising_twice_is_normalising_once(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)
    assert exact_match(text, text)
    assert contains(text, text)


@pytest.mark.parametrize(
    ("answer", "reference", "exact", "within"),
    [
        ("  The Cat. ", "the cat", True, True),
        ("the  cat\nsat", "The cat", False, True),
        ("category", "cat", False, False),
        ("bobcat", "cat", False, False),
        ("a cat, or two", "cat", False, True),
        ("C++ it is", "C++", False, True),
        ("anything", "", False, False),
        (" .", "", True, True),
        ("ＡＢＣ", "abc", True, True),
    ],
)
def test_exact_match_and_contains(answer: str, reference: str, exact: bool, within: bool) -> None:
    assert exact_match(answer, reference) is exact
    assert contains(answer, reference) is within


def test_rouge_l_by_hand() -> None:
    # Longest common subsequence: police, the, gunman = 3 of 4 and of 4 words.
    assert rouge_l("police kill the gunman", "police killed the gunman") == pytest.approx(0.75)
    # 2 common words; precision 2 / 2, recall 2 / 5.
    assert rouge_l("the dog", "the big dog ran off") == pytest.approx(2 * 1.0 * 0.4 / 1.4)
    assert rouge_l("running", "run") == 0  # no stemming
    assert rouge_l("", "run") == 0
    assert rouge_l("日本 Łódź", "日本 łódź") == 1  # letters beyond ASCII are letters too
    assert rouge_l("łódź", "wódź") == 0


@settings(deadline=None)
@given(st.text(alphabet="abc d,_-X1", max_size=30), st.text(alphabet="abc d,_-X1", max_size=30))
def test_rouge_l_is_the_packages_own_for_ascii(answer: str, reference: str) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    assert rouge_l(answer, reference) == RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure


def test_a_check_counts_only_where_there_is_one() -> None:
    plain = score("Plum.", Example("?", response="plum"))
    assert plain == {"exact_match": 1.0, "contains": 1.0, "rouge_l": 1.0}
    ruled = Example("?", response="fig", check={"one_of": ["plum", "fig"]})
    assert score("Plum.", ruled) == {"exact_match": 0.0, "contains": 0.0, "rouge_l": 0.0, "checked": 1.0}
    assert score("fig plum", ruled)["checked"] == 0.0


# --- generation ---------------------------------------------------------------------------------------

TOKENIZER = tiny_tokenizer()


def prompts_of(count: int, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [[0, *random.integers(3, 259, random.integers(1, 40)).tolist()] for _ in range(count)]


def greedy(model, prompt: list[int], steps: int, stops: tuple[int, ...] = (1,)) -> list[int]:
    """The textbook: one row, no cache, no padding."""
    tokens = list(prompt)
    for _ in range(steps):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())
        if token in stops:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_answers_are_the_textbooks_whatever_the_batch(family: str) -> None:
    model, prompts = tiny_model(family), prompts_of(8)
    expected = [TOKENIZER.decode(greedy(model, prompt, 12), skip_special_tokens=True).strip() for prompt in prompts]
    assert len(set(expected)) > 4
    for batch_size in (1, 3, 8):
        assert generate_answers(model, TOKENIZER, prompts, max_new_tokens=12, batch_size=batch_size) == expected


def test_answers_stop_at_any_stop_token() -> None:
    model, prompts = tiny_model("llama"), prompts_of(6)
    free = [greedy(model, prompt, 12) for prompt in prompts]
    stop = free[0][4]  # let a token of the first answer be a second stop token, as chat models have
    model.generation_config.eos_token_id = [1, stop]
    expected = [TOKENIZER.decode(greedy(model, p, 12, (1, stop)), skip_special_tokens=True).strip() for p in prompts]
    assert generate_answers(model, TOKENIZER, prompts, max_new_tokens=12, batch_size=4) == expected
    assert len(expected[0]) < len(TOKENIZER.decode(free[0]))


@pytest.mark.parametrize("family", sorted(DECODERS))
def test_rows_that_end_leave_the_batch_and_transformers_own_loop_says_the_same(family: str) -> None:
    model, prompts = tiny_decoder(family), prompts_of(6)
    free = [greedy(model, prompt, 10) for prompt in prompts]
    stop = free[0][min(3, len(free[0]) - 1)]  # so that answers end at different steps
    model.generation_config.eos_token_id = [1, stop]
    expected = [tokens[: tokens.index(stop)] if stop in tokens else tokens for tokens in free]
    assert len({len(tokens) for tokens in expected}) > 1
    assert _keeps_keys_and_values(model)
    for decode in (_decode_batch, _decode_by_library):
        assert decode(model, TOKENIZER, prompts, 10, _likeliest) == expected


def test_draws_follow_their_own_seed_whatever_the_batch() -> None:
    model, prompts = tiny_model("llama"), prompts_of(5)

    def draw(batch_size: int, seeds: list[int], temperature: float = 1.0) -> list[str]:
        options = {"max_new_tokens": 8, "temperature": temperature, "seeds": seeds}
        return generate_answers(model, TOKENIZER, prompts, batch_size=batch_size, **options)

    assert draw(1, [1, 2, 3, 4, 5]) == draw(3, [1, 2, 3, 4, 5])
    assert draw(5, [1, 2, 3, 4, 5])[:2] == draw(5, [1, 2, 9, 9, 9])[:2]
    assert draw(5, [1, 2, 3, 4, 5]) != draw(5, [6, 7, 8, 9, 10])
    assert draw(5, [1, 2, 3, 4, 5], 1e-4) == generate_answers(model, TOKENIZER, prompts, max_new_tokens=8, batch_size=5)
    choose, logits = _drawing(0.5, range(4000)), torch.tensor([[0.0, 0.5, 1.0]]).expand(4000, 3)
    shares = torch.bincount(choose(range(4000), logits), minlength=3) / 4000
    assert shares.tolist() == pytest.approx(torch.tensor([0.0, 1.0, 2.0]).softmax(0).tolist(), abs=0.03)


def test_the_first_blanks_of_code_stay_on_request() -> None:
    model = tiny_model("llama")
    [blank] = TOKENIZER(" ", add_special_tokens=False)["input_ids"]
    model.lm_head.register_forward_hook(lambda _, __, logits: functional.one_hot(torch.tensor(blank), 260) + 0 * logits)
    options = {"max_new_tokens": 3, "batch_size": 1}
    assert generate_answers(model, TOKENIZER, [[3]], **options) == [""]
    assert generate_answers(model, TOKENIZER, [[3]], **options, strip=False) == ["   "]


def test_settings_that_come_with_a_model_are_put_aside_and_kept() -> None:
    model, prompts = tiny_model("llama"), prompts_of(5)
    expected = generate_answers(model, TOKENIZER, prompts, max_new_tokens=12, batch_size=5)
    own = model.generation_config
    own.update(do_sample=True, temperature=3.0, repetition_penalty=5.0, max_length=20, num_beams=1, min_length=9)
    assert generate_answers(model, TOKENIZER, prompts, max_new_tokens=12, batch_size=5) == expected
    assert model.generation_config is own


def test_dropout_is_off_and_training_flags_come_back() -> None:
    model, prompts = tiny_model("gpt2", attn_pdrop=0.9, embd_pdrop=0.9, resid_pdrop=0.9), prompts_of(3)
    expected = generate_answers(model, TOKENIZER, prompts, max_new_tokens=8, batch_size=3)
    model.train()
    model.transformer.h[0].eval()
    flags = [module.training for module in model.modules()]
    assert generate_answers(model, TOKENIZER, prompts, max_new_tokens=8, batch_size=3) == expected
    assert [module.training for module in model.modules()] == flags
    assert model(input_ids=torch.tensor([[3]])).logits.requires_grad  # inference mode does not leak


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_stream_is_the_batched_answer_in_pieces(family: str) -> None:
    model, most = tiny_model(family), 0
    for prompt in prompts_of(6):
        pieces = list(stream_answer(model, TOKENIZER, prompt, max_new_tokens=12))
        [whole] = generate_answers(model, TOKENIZER, [prompt], max_new_tokens=12, batch_size=1)
        assert "".join(pieces) == whole
        assert all(pieces)
        most = max(most, len(pieces))
    assert most > 3


def test_a_stream_draws_by_its_seed_and_can_be_left() -> None:
    model, prompt = tiny_model("llama").train(), prompts_of(1)[0]

    def draw(seed: int, temperature: float) -> str:
        options = {"max_new_tokens": 12, "temperature": temperature, "seed": seed}
        return "".join(stream_answer(model, TOKENIZER, prompt, **options))

    assert draw(1, 1.0) == draw(1, 1.0)
    assert len({draw(seed, 1.0) for seed in range(5)}) > 1
    assert draw(1, 1e-4) == draw(1, 0.0)
    stream = stream_answer(model, TOKENIZER, prompt, max_new_tokens=12)
    next(stream)
    assert not torch.is_inference_mode_enabled()
    stream.close()
    assert model.training


def test_letters_of_several_bytes_are_never_torn() -> None:
    letters = "é€😀é"
    ids = TOKENIZER(letters, add_special_tokens=False)["input_ids"]

    class Scripted(torch.nn.Module):
        """Writes ``ids`` one after the other, whatever it reads."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.config = tiny_model("llama").config
            self.generation_config = None
            self.said = 0

        def forward(self, **inputs):
            token = [*ids, TOKENIZER.eos_token_id][self.said]
            self.said += 1
            logits = functional.one_hot(torch.tensor([[token]]), 260).float()
            return type("Output", (), {"logits": logits, "past_key_values": None})()

    assert list(stream_answer(Scripted(), TOKENIZER, [3], max_new_tokens=99)) == list(letters)


def test_long_prompts_lose_their_oldest_tokens_but_not_the_first() -> None:
    assert cut_left([0, 5, 6, 7, 8], 3, bos_token_id=0) == [0, 7, 8]
    assert cut_left([4, 5, 6, 7, 8], 3, bos_token_id=0) == [6, 7, 8]
    assert cut_left([4, 5, 6, 7, 8], 3, bos_token_id=None) == [6, 7, 8]
    assert cut_left([0, 5], 1, bos_token_id=0) == [5]
    assert cut_left([0, 5, 6], 3, bos_token_id=0) == [0, 5, 6]


def test_no_position_lies_beyond_the_context() -> None:
    model = tiny_model("gpt2", n_positions=32)  # learned positions: one too many raises
    long = [0, *range(3, 120)]
    [answer] = generate_answers(model, TOKENIZER, [long], max_new_tokens=10, batch_size=1)
    expected = greedy(model, [0, *range(99, 120)], 10)
    assert answer == TOKENIZER.decode(expected, skip_special_tokens=True).strip()
    assert "".join(stream_answer(model, TOKENIZER, long, max_new_tokens=10)) == answer
    assert prompt_room(model, 31) == 1
    with pytest.raises(UserError, match=r"max_new_tokens.*context of 32"):
        generate_answers(model, TOKENIZER, [long], max_new_tokens=32, batch_size=1)


def test_no_prompts_no_answers_and_a_tokenizer_without_padding() -> None:
    model = tiny_model("llama")
    assert generate_answers(model, TOKENIZER, [], max_new_tokens=4, batch_size=4) == []
    bare, prompts = tiny_tokenizer(pad=False), prompts_of(3)
    expected = generate_answers(model, TOKENIZER, prompts, max_new_tokens=8, batch_size=3)
    assert generate_answers(model, bare, prompts, max_new_tokens=8, batch_size=3) == expected


# --- evaluation ---------------------------------------------------------------------------------------

EXAMPLES = [
    Example(
        f"Say {word}{'!' * (row % 5)}",
        response=word * (1 + row % 3),
        category=("verse", "prose", "prose")[row % 3],
        check={"one_of": [word]} if row % 2 else None,
    )
    for row, word in enumerate(["moss", "bird", "lamp", "fig", "stone", "plum", "salt"])
]
ENCODED, _ = encode(EXAMPLES, TOKENIZER, template="short", max_tokens=64, train_on="responses")


def run(model, examples=EXAMPLES, encoded=ENCODED, max_rows=None, **settings) -> Evaluation:
    chosen = EvaluationConfig(**{"max_new_tokens": 6, "batch_size": 3, **settings})
    return evaluate(model, TOKENIZER, examples, encoded, settings=chosen, template="short", max_tokens=64, pad_id=2,
                    max_rows=max_rows)  # fmt: skip


def row_nats(model, index: int) -> tuple[float, int]:
    """Summed loss and label positions of one row, written without our batches."""
    tokens, trainable = (torch.tensor(part) for part in ENCODED.rows(index))
    with torch.no_grad():
        log_probs = model(input_ids=tokens[None].long()).logits[0, :-1].log_softmax(-1)
    nats = -log_probs.gather(1, tokens[1:, None].long())[:, 0]
    return float(nats[trainable[1:]].sum()), int(trainable[1:].sum())


def test_loss_by_category_is_the_textbooks() -> None:
    model = tiny_model("llama")
    found = run(model, generate=False)
    for category in ("verse", "prose"):
        rows = [row_nats(model, i) for i, example in enumerate(EXAMPLES) if example.category == category]
        assert found.categories[category]["loss"].total == pytest.approx(sum(nats for nats, _ in rows), rel=1e-5)
        assert found.categories[category]["loss"].count == sum(count for _, count in rows)
    every = [row_nats(model, i) for i in range(len(EXAMPLES))]
    mean = sum(nats for nats, _ in every) / sum(count for _, count in every)
    table = found.as_dict()
    assert table["overall"]["loss"] == pytest.approx(mean, rel=1e-5)
    assert table["overall"]["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
    assert table["overall"]["rows"] == 7
    assert table["categories"]["verse"]["rows"] == 3
    assert "rouge_l" not in table["overall"]
    assert found.answers == ()


def test_evaluation_does_not_depend_on_the_batch_size_or_the_order_of_rows() -> None:
    model = tiny_model("llama")
    one, eight = run(model, batch_size=1).as_dict(), run(model, batch_size=8).as_dict()
    flat = [pytest.approx(list(table.values())) for table in (one["overall"], *one["categories"].values())]
    assert [list(table.values()) for table in (eight["overall"], *eight["categories"].values())] == flat


def test_scores_are_means_over_rows_and_checks_over_rows_that_have_one() -> None:
    model = tiny_model("llama")
    found = run(model)
    assert len(found.answers) == 7
    for answer in found.answers:
        prompt = encode_prompt(answer.example, TOKENIZER, template="short", max_tokens=64)
        assert answer.text == TOKENIZER.decode(greedy(model, prompt, 6), skip_special_tokens=True).strip()
        assert answer.scores == score(answer.text, answer.example)
    assert found.overall["rouge_l"].count == 7
    assert found.overall["checked"].count == 3
    row = json.loads(json.dumps(found.answers[0].as_dict(), allow_nan=False))
    assert set(row) == {"category", "instruction", "context", "reference", "answer", "scores"}


def test_max_rows_takes_from_every_category_and_always_the_same() -> None:
    rows = [Example("?", category=name) for name in ["a"] * 60 + ["b"] * 30 + ["c"] * 10]
    shuffled = [rows[place] for place in np.random.default_rng(0).permutation(100)]
    for order in (rows, shuffled):
        chosen = choose_rows(order, 10)
        assert [order[index].category for index in chosen] == ["a"] * 6 + ["b"] * 3 + ["c"]
        assert chosen == choose_rows(order, 10)
    assert sorted(choose_rows(shuffled, None)) == list(range(100))
    assert sorted(choose_rows(shuffled, 500)) == list(range(100))
    assert run(tiny_model("llama"), max_rows=3, generate=False).as_dict()["overall"]["rows"] == 3


def test_what_can_not_be_measured_is_null() -> None:
    silent = [Example("Say nothing", response="", category="mute"), EXAMPLES[0]]
    encoded, _ = encode(silent, TOKENIZER, template="short", max_tokens=64, train_on="responses")
    cut = encoded.trainable.copy()
    cut[: encoded.offsets[1]] = False  # whether or not an empty answer's end is trained
    blank = type(encoded)(encoded.tokens, cut, encoded.offsets)
    table = run(tiny_model("llama"), silent, blank, generate=False).as_dict()
    assert table["categories"]["mute"] == {"loss": None, "perplexity": None, "rows": 1}
    assert table["overall"]["loss"] is not None
    huge = Evaluation({"x": {"loss": Mean(1e6, 1)}}, {"x": 1}).as_dict()
    assert huge["overall"]["perplexity"] is None
    json.dumps(table, allow_nan=False)
    nothing = run(tiny_model("llama"), [], encoded).as_dict()
    assert nothing == {"overall": {"perplexity": None, "rows": 0}, "categories": {}}
