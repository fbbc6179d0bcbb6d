"""Templates, the loss mask, cutting, and the token cache."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flocktune.config.schema import CustomTemplate
from flocktune.data.encoding import (
    default_cache_folder,
    encode,
    encode_cached,
    encode_prompt,
    read_arrow,
    tokenizer_digest,
)
from flocktune.data.examples import Example, Message, examples_digest
from flocktune.data.templates import Segment, prompt_text, segments
from flocktune.errors import UserError

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
REWRITES = "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}<{{ m['content'] }}>{% endif %}{% endfor %}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}" + CHATML
CUSTOM = CustomTemplate(with_context="[{context}] {instruction} =", without_context="{instruction} =")
TALK = Example(
    "c", response="d", history=(Message("system", "S"), Message("user", "a"), Message("assistant", "b"))
)  # fmt: skip


def make_tokenizer(chat_template: str | None = CHATML, bos: bool = True, eos: bool = True) -> PreTrainedTokenizerFast:
    """One token per byte, so that what a token means can be read off; ids follow the alphabet's order."""
    special = ["<pad>", "<s>", "</s>"]
    vocabulary = {token: at for at, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = {"bos_token": "<s>"} if bos else {}
    names |= {"eos_token": "</s>"} if eos else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", chat_template=chat_template, model_max_length=16, **names
    )


TOKENIZER = make_tokenizer()


def encoded_text(example: Example, template="short", max_tokens=1000, train_on="responses", tokenizer=TOKENIZER):
    """(whole row, its trained part) decoded."""
    rows, _ = encode([example], tokenizer, template=template, max_tokens=max_tokens, train_on=train_on)
    tokens, trainable = rows.rows(0)
    return tokenizer.decode(tokens), tokenizer.decode(tokens[trainable])


def test_alpaca_is_the_usual_wording() -> None:
    """The whole text of the format, letter by letter: adapters tuned elsewhere must fit."""
    assert prompt_text(Example("Add.", "1 2", "3"), "alpaca", TOKENIZER) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n"
        "### Response:\n"
    )
    assert prompt_text(Example("Hi"), "alpaca", TOKENIZER) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nHi\n\n### Response:\n"
    )


def test_short_template_gives_the_space_to_the_answer() -> None:
    assert segments(Example("Add.", "1 2", "3"), "short", TOKENIZER) == [
        Segment("Instruction: Add.\nContext: 1 2\nAnswer:", False),
        Segment(" 3", True, ends=True),
    ]
    assert prompt_text(Example("Hi"), "short", TOKENIZER) == "Instruction: Hi\nAnswer:"


def test_custom_template_leaves_braces_in_the_data_alone() -> None:
    assert (
        prompt_text(Example("{context} {x}", "{instruction}"), CUSTOM, TOKENIZER) == "[{instruction}] {context} {x} ="
    )
    assert prompt_text(Example("a"), CUSTOM, TOKENIZER) == "a ="


def test_chat_template_trains_every_assistant_turn_with_its_end() -> None:
    row = segments(replace(TALK, context="k"), "chat", TOKENIZER)
    assert row == [
        Segment("<|system|>S<|end|><|user|>a<|end|><|assistant|>", False),
        Segment("b<|end|>", True),
        Segment("<|user|>c\n\nk<|end|><|assistant|>", False),
        Segment("d<|end|>", True),
    ]
    assert prompt_text(TALK, "chat", TOKENIZER) == "".join(part.text for part in segments(TALK, "chat", TOKENIZER)[:3])


def test_chat_templates_that_can_not_serve_are_refused() -> None:
    with pytest.raises(UserError, match="one without"):
        segments(TALK, "chat", make_tokenizer(None))
    with pytest.raises(UserError, match="rewrites earlier text"):
        segments(TALK, "chat", make_tokenizer(REWRITES))
    with pytest.raises(UserError, match="no system role here"):
        segments(TALK, "chat", make_tokenizer(NO_SYSTEM))


def test_plain_templates_hold_conversations_too() -> None:
    whole, trained = encoded_text(TALK)
    assert whole == "<s>S\n\nInstruction: a\nAnswer: b</s>\n\nInstruction: c\nAnswer: d</s>"
    assert trained == " b</s> d</s>"
    with_context, _ = encoded_text(replace(TALK, context="k"))
    assert with_context == whole.replace("Instruction: c", "Instruction: c\nContext: k")


def test_an_empty_turn_of_the_assistant_is_not_taught() -> None:
    silent = Example("c", response="d", history=(Message("user", "a"), Message("assistant", "")))
    assert encoded_text(silent, "chat")[1] == "d<|end|>"
    assert encoded_text(silent, "short")[1] == " d</s>"


def test_the_mask_is_the_response_and_its_end() -> None:
    assert encoded_text(Example("Add.", "1", "3")) == ("<s>Instruction: Add.\nContext: 1\nAnswer: 3</s>", " 3</s>")
    assert encoded_text(TALK, "chat")[1] == "b<|end|>d<|end|>"
    whole, trained = encoded_text(Example("Add.", "", "3"), train_on="everything")
    assert whole == "<s>" + trained


def test_bos_is_written_once_and_only_if_there_is_one() -> None:
    example = Example("a", response="b")
    assert encoded_text(example, "chat", tokenizer=make_tokenizer("<s>" + CHATML))[0].count("<s>") == 1
    plain = make_tokenizer(bos=False)
    rows, _ = encode([example], plain, template="short", max_tokens=99, train_on="everything")
    assert plain.decode(rows.rows(0)[0]).startswith("Instruction")
    assert not rows.rows(0)[1][0], "a row's first token can not be predicted"
    assert rows.rows(0)[1][1:].all()


def test_a_row_that_says_the_end_of_text_does_not_end_there() -> None:
    end = TOKENIZER.eos_token
    example = Example(f"Say {end} now", "", f"first{end}second")
    for template in ("alpaca", "short"):
        encoded, _ = encode([example], TOKENIZER, template=template, max_tokens=1000, train_on="responses")
        assert list(encoded.tokens).count(TOKENIZER.eos_token_id) == 1
        assert encoded.tokens[-1] == TOKENIZER.eos_token_id
    own = CustomTemplate(with_context="{instruction}{context}", without_context=f"{end}{{instruction}}")
    encoded, _ = encode([Example("Say", "", "yes")], TOKENIZER, template=own, max_tokens=1000, train_on="responses")
    assert list(encoded.tokens).count(TOKENIZER.eos_token_id) == 2, "a template of one's own may mean it"


def test_a_tokenizer_without_an_end_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    assert encoded_text(Example("a", response="b"), tokenizer=make_tokenizer(eos=False))[1] == " b"
    assert "no end-of-text token" in caplog.text


def test_rows_without_a_response_are_counted_and_kept() -> None:
    silent = Example("b", response=" \n", history=TALK.history[1:])
    examples = [Example("a"), Example("b", response="x"), Example("c", response="\n"), silent]
    rows, report = encode(examples, TOKENIZER, template="short", max_tokens=99, train_on="responses")
    assert report.untrainable == (0, 2)
    assert (report.rows, len(rows), report.truncated) == (4, 4, 0)
    assert rows.targets.tolist() == [0, 3, 0, 3]
    assert report.tokens == rows.lengths.sum() == len(rows.tokens)
    assert report.trainable_tokens == 6


def test_an_empty_list_encodes_to_nothing() -> None:
    rows, report = encode([], TOKENIZER, template="short", max_tokens=99, train_on="responses")
    assert (len(rows), report.tokens, report.untrainable) == (0, 0, ())


def test_cutting_takes_the_middle_of_the_longer_field_and_keeps_the_response() -> None:
    example = Example("Say it.", "0" * 300 + "1" * 300, "answer")
    whole, trained = encoded_text(example, max_tokens=120)
    assert trained == " answer</s>"
    assert whole.startswith("<s>Instruction: Say it.\nContext: 000")
    assert whole.endswith("111\nAnswer: answer</s>")
    assert whole.count(" ... ") == 1
    rows, report = encode([example], TOKENIZER, template="short", max_tokens=120, train_on="responses")
    assert 110 <= rows.lengths[0] <= 120
    assert report.truncated == 1


def test_cutting_drops_the_oldest_exchange_of_a_conversation_first() -> None:
    whole, _ = encoded_text(TALK, max_tokens=len("S..Instruction: c.Answer: d") + 5)
    assert whole == "<s>S\n\nInstruction: c\nAnswer: d</s>"


def test_a_response_that_is_too_long_loses_its_end_and_leaves_the_prompt_a_quarter() -> None:
    rows, _ = encode(
        [Example("a" * 500, response="r" * 500)], TOKENIZER, template="short", max_tokens=100, train_on="responses"
    )
    tokens, trainable = rows.rows(0)
    assert len(tokens) <= 100
    assert 70 <= trainable.sum() <= 80
    assert TOKENIZER.eos_token_id not in tokens
    whole, trained = encoded_text(Example("a", response="r" * 500), max_tokens=100)
    assert whole.startswith("<s>Instruction: a\nAnswer: rrr")
    assert set(trained) == {" ", "r"}


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="<|>"), max_size=60)
TURNS = st.lists(st.tuples(TEXT, TEXT), max_size=3)
EXAMPLES = st.builds(
    lambda instruction, context, response, system, turns: Example(
        instruction,
        context,
        response,
        tuple([Message("system", system)] * bool(system))
        + tuple(turn for asked, said in turns for turn in (Message("user", asked), Message("assistant", said))),
    ),
    TEXT, TEXT, TEXT, TEXT, TURNS,
)  # fmt: skip
TEMPLATES = st.sampled_from(["alpaca", "short", "chat", CUSTOM])


@settings(max_examples=60, deadline=None)
@given(EXAMPLES, TEMPLATES)
def test_generation_starts_from_exactly_what_precedes_the_response_in_training(example, template) -> None:
    rows, _ = encode([example], TOKENIZER, template=template, max_tokens=10_000, train_on="responses")
    tokens, trainable = rows.rows(0)
    prompt = encode_prompt(example, TOKENIZER, template=template, max_tokens=10_000)
    assert tokens[: len(prompt)].tolist() == prompt
    assert trainable[len(prompt) :].all()
    assert bool(len(tokens) > len(prompt)) == bool(example.response.strip())
    assert prompt == encode_prompt(replace(example, response="x"), TOKENIZER, template=template, max_tokens=10_000)


@settings(max_examples=60, deadline=None)
@given(EXAMPLES, TEMPLATES, st.integers(8, 150), st.sampled_from(["responses", "everything"]))
def test_no_row_is_longer_than_allowed(example, template, max_tokens, train_on) -> None:
    rows, report = encode([example], TOKENIZER, template=template, max_tokens=max_tokens, train_on=train_on)
    full, _ = encode([example], TOKENIZER, template=template, max_tokens=10_000, train_on=train_on)
    assert rows.lengths[0] <= max_tokens
    assert report.truncated == (full.lengths[0] > max_tokens)
    assert rows.tokens[0] == TOKENIZER.bos_token_id
    prompt = encode_prompt(example, TOKENIZER, template=template, max_tokens=max_tokens)
    assert 0 < len(prompt) <= max_tokens
    # A response that leaves the prompt its quarter is whole: the row ends as the full one does.
    answer = full.lengths[0] - len(encode_prompt(example, TOKENIZER, template=template, max_tokens=10_000))
    if answer <= max_tokens - max_tokens // 4:
        assert rows.tokens[len(rows.tokens) - answer :].tolist() == full.tokens[len(full.tokens) - answer :].tolist()


# --- cache -----------------------------------------------------------------------------------------

DATA = [Example("Add.", "1 2", "3"), Example("none"), TALK]


def cached(folder: Path, examples=DATA, tokenizer=TOKENIZER, template="short", max_tokens=64, train_on="responses"):
    return encode_cached(
        examples,
        tokenizer,
        template=template,
        max_tokens=max_tokens,
        train_on=train_on,
        digest=examples_digest(examples),
        folder=folder,
    )


def test_the_cache_gives_back_the_same_and_does_not_encode_again(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "new" / "cache"
    made, report = cached(folder, max_tokens=40)
    assert report.truncated == 2
    monkeypatch.setattr("flocktune.data.encoding.encode", None)
    kept, same_report = cached(folder, max_tokens=40)
    assert same_report == report
    for name in ("tokens", "trainable", "offsets"):
        old, new = getattr(made, name), getattr(kept, name)
        assert old.dtype == new.dtype
        assert np.array_equal(old, new)
        assert not new.flags.owndata
        assert not new.flags.writeable


def test_everything_that_changes_tokens_changes_the_file(tmp_path: Path) -> None:
    cached(tmp_path)
    cached(tmp_path, examples=DATA[:2])
    cached(tmp_path, tokenizer=make_tokenizer(bos=False))
    cached(tmp_path, tokenizer=make_tokenizer(None))
    cached(tmp_path, template="alpaca")
    cached(tmp_path, template=CUSTOM)
    cached(tmp_path, max_tokens=65)
    cached(tmp_path, train_on="everything")
    assert len(list(tmp_path.glob("*.arrow"))) == 8


def test_using_a_tokenizer_does_not_change_its_digest() -> None:
    tokenizer = make_tokenizer()
    before = tokenizer_digest(tokenizer)
    tokenizer(["a", "bb"], padding=True, truncation=True, max_length=1)
    assert tokenizer_digest(tokenizer) == before


@pytest.mark.parametrize("damage", ["cut", "garbage", "bit", "empty", "rows"])
def test_a_damaged_cache_file_is_made_anew(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    made, _ = cached(tmp_path)
    (path,) = tmp_path.glob("*.arrow")
    content = path.read_bytes()
    at = content.find(made.tokens.tobytes())
    assert at > 0
    flipped = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    broken = {"cut": content[: len(content) // 2], "garbage": b"garbage" * 99, "bit": flipped, "empty": b""}
    if damage == "rows":
        cached(other := tmp_path / "other", examples=DATA[:1])
        path.write_bytes(next(other.glob("*.arrow")).read_bytes())
    else:
        path.write_bytes(broken[damage])
    again, _ = cached(tmp_path)
    assert np.array_equal(again.tokens, made.tokens)
    assert path.read_bytes() == content
    assert ("can not be read" in caplog.text) == (damage != "rows")


def test_a_folder_that_can_not_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        rows, report = cached(tmp_path / "file" / "cache")
    assert len(rows) == report.rows == 3
    assert "not cached" in caplog.text


def test_no_rows_can_be_cached(tmp_path: Path) -> None:
    cached(tmp_path, examples=[])
    (path,) = tmp_path.glob("*.arrow")
    kept = read_arrow(path)
    assert kept is not None
    assert len(kept[0]) == 0


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("FLOCKTUNE_CACHE", raising=False)
    assert default_cache_folder() == Path("/home/someone/.cache/flocktune")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_cache_folder() == Path("/x/flocktune")
    monkeypatch.setenv("FLOCKTUNE_CACHE", "/mine")
    assert default_cache_folder() == Path("/mine")


def test_tokens_are_kept_and_read_without_pandas(tmp_path: Path) -> None:
    script = (
        "import sys, numpy as np; from pathlib import Path; from flocktune.data.encoding import *\n"
        "made = Encoded(np.arange(5, dtype=np.int32), np.array([0, 1, 1, 0, 1], np.bool_), np.array([0, 2, 5]))\n"
        "path = Path(sys.argv[1]); write_arrow(path, made, 0); kept, _ = read_arrow(path)\n"
        "print(kept.tokens.tolist(), kept.trainable.tolist(), kept.offsets.tolist(), 'pandas' in sys.modules)"
    )
    call = [sys.executable, "-c", script, str(tmp_path / "kept.arrow")]
    said = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    assert said == "[0, 1, 2, 3, 4] [False, True, True, False, True] [0, 2, 5] False\n"
