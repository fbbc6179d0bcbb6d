"""The embedded world: its rows, its tokenizer, its model, and that they can be remade."""

import json
import random
import re
import shutil
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from flocktune.data.checks import passes

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "src" / "flocktune" / "assets" / "world"
sys.path.insert(0, str(ROOT / "tools"))

import make_world  # noqa: E402
from world.facts import build_world  # noqa: E402
from world.instructions import CATEGORIES, PUBLIC_PART, instruction_rows, prompt_key, public_rows  # noqa: E402
from world.text import documents  # noqa: E402
from world.tokenizer import split_words  # noqa: E402


def prompt_of(row):
    context = f"Context: {row['context']}\n" if row["context"] else ""
    return f"Instruction: {row['instruction']}\n{context}Answer: "


def read_rows(name):
    with (ASSETS / name).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def rows():
    return read_rows("instructions.jsonl")


@pytest.fixture(scope="module")
def public():
    return read_rows("public.jsonl")


@pytest.fixture(scope="module")
def manifest():
    return json.loads((ASSETS / "MANIFEST.json").read_text())


@pytest.fixture(scope="module")
def texts(manifest, rows):
    words = make_world.instruction_words(rows)
    world = build_world(manifest["seed"])
    return list(islice(documents(world, words, random.Random("test")), 8000))


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ASSETS / "model", local_files_only=True)


def test_rows_are_whole_and_unique(rows):
    assert all(list(row) == ["instruction", "context", "response", "category", "check"] for row in rows)
    assert len({(row["instruction"], row["context"]) for row in rows}) == len(rows)
    amounts = Counter(row["category"] for row in rows)
    assert amounts == {category: amount for category, (_, amount) in CATEGORIES.items()}
    assert len(amounts) == 8


def test_each_response_passes_its_own_check_and_a_wrong_one_does_not(rows):
    assert all(passes(row["response"], row["check"]) for row in rows)
    assert not any(passes("nobody knows", row["check"]) for row in rows)


def test_the_shipped_rows_are_those_of_the_seed(rows, manifest):
    world = build_world(manifest["seed"])
    assert instruction_rows(world, manifest["seed"]) == rows
    assert instruction_rows(world, manifest["seed"] + 1) != rows


def test_public_rows_are_whole_right_and_those_of_the_seed(rows, public, manifest):
    assert all(list(row) == ["instruction", "context", "response", "category", "check"] for row in public)
    amounts = Counter(row["category"] for row in public)
    assert amounts == {category: amount // PUBLIC_PART for category, (_, amount) in CATEGORIES.items()}
    assert all(passes(row["response"], row["check"]) for row in public)
    assert public_rows(build_world(manifest["seed"]), manifest["seed"], rows) == public


def test_no_public_prompt_is_a_clients_or_comes_twice(rows, public):
    prompts = {prompt_key(row) for row in public}
    assert len(prompts) == len(public)
    assert not prompts & {prompt_key(row) for row in rows}


def test_every_word_of_public_rows_is_one_token_and_known_from_text(public, texts, tokenizer):
    words = make_world.world_words(public, [])
    assert split_words(tokenizer.backend_tokenizer, words) == []
    assert words - make_world.world_words([], texts) == set()


def test_public_rows_can_be_made_without_the_rest(tmp_path):
    out = tmp_path / "world"
    shutil.copytree(ASSETS, out)
    (out / "public.jsonl").unlink()
    make_world.renew_public(out)
    assert make_world.file_digests(out) == make_world.file_digests(ASSETS)
    assert (out / "MANIFEST.json").read_bytes() == (ASSETS / "MANIFEST.json").read_bytes()


def test_public_rows_that_clients_hold_or_the_tokenizer_tears_are_refused(rows, public, tokenizer, monkeypatch):
    world, words = build_world(0), tokenizer.backend_tokenizer
    monkeypatch.setattr(make_world, "public_rows", lambda *_: [*public, rows[0]])
    with pytest.raises(ValueError, match="1 public prompts are those of clients"):
        make_world.make_public(world, rows, words, 0)
    monkeypatch.setattr(make_world, "public_rows", lambda *_: [public[0] | {"response": "Zyzzyva"}])
    with pytest.raises(ValueError, match="1 words are not single tokens: Zyzzyva"):
        make_world.make_public(world, rows, words, 0)


def test_the_shipped_files_are_those_of_the_manifest(manifest, rows, public):
    found = make_world.file_digests(ASSETS)
    assert found == manifest["files"]
    assert (manifest["rows"], manifest["public_rows"]) == (len(rows), len(public))
    assert sum(file["bytes"] for file in found.values()) < 12_000_000


def test_a_question_about_a_fact_has_one_answer(rows):
    answers = {}
    for row in rows:
        if row["category"] in ("open_qa", "general_qa"):
            answers.setdefault(row["instruction"], set()).add(row["response"])
    assert all(len(each) == 1 for each in answers.values())


def test_text_neither_asks_nor_shows_the_template(texts):
    whole = "\n".join(texts)
    assert not any(f"{word}:" in whole for word in make_world.TEMPLATE_WORDS)
    assert not re.search(r"\w\?", whole)


def test_every_word_is_one_token_and_known_from_text(rows, texts, tokenizer):
    words = make_world.world_words(rows, texts)
    assert split_words(tokenizer.backend_tokenizer, words) == []
    prompts = make_world.world_words(rows, [])
    assert prompts - make_world.world_words([], texts) == set()


def test_tokens_give_the_text_back_wherever_it_is_cut(rows, texts, tokenizer):
    for row in rows[:200]:
        prompt, response = prompt_of(row), row["response"]
        parts = tokenizer.encode(prompt) + tokenizer.encode(response)
        assert tokenizer.encode(prompt + response) == parts
        assert tokenizer.decode(parts) == prompt + response
    for text in (*texts[:200], "Grüße, 東京 and 12 (twelve) x=y!"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_model_loads_offline_and_knows_the_tokens(tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(ASSETS / "model", local_files_only=True)
    assert model.dtype == torch.bfloat16
    assert model.config.vocab_size == len(tokenizer)
    for source in (model.config, model.generation_config, tokenizer):
        assert (source.bos_token_id, source.eos_token_id, source.pad_token_id) == (1, 2, 0)


def test_the_model_knows_the_world(texts, tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(ASSETS / "model", dtype=torch.float32)
    ids = [[1, *tokenizer.encode(text), 2] for text in texts[:20]]
    with torch.no_grad():
        losses = [model(input_ids=torch.tensor([each]), labels=torch.tensor([each])).loss.item() for each in ids]
    assert sum(losses) / len(losses) < 1.5
