"""The embedded world: its rows, its tokenizer, its model, and that they can be remade."""

import json
import random
import re
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from flocktune.evaluation.checks import passes

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "src" / "flocktune" / "assets" / "world"
sys.path.insert(0, str(ROOT / "tools"))

import make_world  # noqa: E402
from world.facts import build_world  # noqa: E402
from world.instructions import CATEGORIES, instruction_rows  # noqa: E402
from world.text import documents  # noqa: E402
from world.tokenizer import split_words  # noqa: E402


def prompt_of(row):
    context = f"Context: {row['context']}\n" if row["context"] else ""
    return f"Instruction: {row['instruction']}\n{context}Answer: "


@pytest.fixture(scope="module")
def rows():
    with (ASSETS / "instructions.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


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


def test_the_shipped_files_are_those_of_the_manifest(manifest):
    found = make_world.file_digests(ASSETS)
    assert found == manifest["files"]
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
