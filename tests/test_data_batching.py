"""Batches: every row once, padded == packed, and rows that do not see each other."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from flocktune.data.batching import (
    Batch,
    collate,
    evaluation_batches,
    packing_leak,
    plan_batches,
    trainable_rows,
    training_batches,
)
from flocktune.data.encoding import Encoded
from flocktune.data.merging import merged
from flocktune.errors import UserError

PAD, VOCABULARY = 0, 64


def make_rows(*masks: str, seed: int = 0) -> Encoded:
    """One row per string: ``.`` is a token that is not trained, ``x`` one that is."""
    lengths = [len(mask) for mask in masks]
    tokens = np.random.default_rng(seed).integers(1, VOCABULARY, sum(lengths)).astype(np.int32)
    trainable = np.array([letter == "x" for mask in masks for letter in mask], np.bool_)
    return Encoded(tokens, trainable, np.cumsum([0, *lengths], dtype=np.int64))


def test_padded_by_hand() -> None:
    rows = Encoded(np.arange(10, 16, dtype=np.int32), np.array([0, 0, 1, 0, 1, 1], np.bool_), np.array([0, 2, 6]))
    batch = collate(rows, [1, 0], batching="padded", pad_id=PAD)
    assert batch.input_ids.tolist() == [[12, 13, 14, 15], [10, 11, PAD, PAD]]
    assert batch.input_ids.dtype == batch.label_index.dtype == batch.targets.dtype == torch.int64
    assert batch.position_ids is None
    assert batch.label_index.tolist() == [1, 2]
    assert batch.targets.tolist() == [14, 15], "12 is trainable, but a row's first token is never a target"
    assert (batch.rows, batch.tokens) == (2, 6)


def test_packed_by_hand() -> None:
    rows = Encoded(np.arange(10, 16, dtype=np.int32), np.array([0, 1, 1, 0, 1, 1], np.bool_), np.array([0, 2, 6]))
    batch = collate(rows, [0, 1], batching="packed", pad_id=PAD)
    assert batch.input_ids.tolist() == [[10, 11, 12, 13, 14, 15]]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2, 3]]
    assert batch.label_index.tolist() == [0, 3, 4]
    assert batch.targets.tolist() == [11, 14, 15]
    moved = batch.to("meta")
    assert moved.input_ids.device.type == moved.targets.device.type == "meta"
    assert moved.position_ids is not None
    assert moved.position_ids.device.type == "meta"
    assert (moved.rows, moved.tokens) == (2, 6)


MASKS = st.lists(st.text(".x", min_size=1, max_size=12), min_size=1, max_size=9)


@settings(deadline=None)
@given(MASKS, st.sampled_from(["padded", "packed"]))
def test_a_label_is_the_token_after_its_position(masks, batching) -> None:
    rows = make_rows(*masks)
    batch = collate(rows, range(len(masks)), batching=batching, pad_id=PAD)
    flat = batch.input_ids.reshape(-1)
    assert torch.equal(flat[batch.label_index + 1], batch.targets)
    wanted = [int(token) for at in range(len(masks)) for token in rows.rows(at)[0][1:][rows.rows(at)[1][1:]]]
    assert batch.targets.tolist() == wanted


PARTS = st.lists(st.tuples(MASKS, st.sampled_from(["padded", "packed"])), min_size=1, max_size=4)


@settings(deadline=None)
@given(PARTS, st.sampled_from(["padded", "packed"]))
def test_batches_merged_are_one_batch_of_all_their_rows(parts, batching) -> None:
    rows = make_rows(*(mask for masks, _ in parts for mask in masks))
    ends = np.cumsum([len(masks) for masks, _ in parts])
    own = [
        collate(rows, range(end - len(masks), end), batching=how, pad_id=PAD)
        for end, (masks, how) in zip(ends, parts, strict=True)
    ]
    found = merged(own, packed=batching == "packed")
    whole = collate(rows, range(len(rows)), batching=batching, pad_id=PAD)
    for name in ("input_ids", "position_ids", "label_index", "targets", "index", "lengths", "labels"):
        mine, theirs = getattr(found.batch, name), getattr(whole, name)
        assert (mine is None and theirs is None) or np.array_equal(mine, theirs), name
    assert found.labels == tuple(len(part.targets) for part in own)
    assert sum(found.tokens) == found.batch.input_ids.numel()
    pieces = found.batch.input_ids.reshape(-1).split(found.tokens)
    trained = iter(found.batch.label_index.split(found.labels))
    start = 0
    for part, piece, places in zip(own, pieces, found.places, strict=True):
        assert len(places) == len(piece)
        width = len(piece) // part.rows
        padded = [np.arange(width) < length for length in part.lengths]
        real = np.concatenate(padded) if batching == "padded" else np.ones(len(piece), np.bool_)
        assert torch.equal(part.input_ids.reshape(-1)[places][real], piece[real]), "every token is its own again"
        assert int(places.max()) < part.input_ids.numel()
        labels = next(trained)
        assert torch.equal(places[labels - start], part.label_index)
        start += len(piece)


LENGTHS = st.lists(st.integers(1, 500), min_size=1, max_size=200)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 9), st.integers(0, 2**40), st.integers(1, 3))
def test_every_row_is_in_every_epoch_once(lengths, batch_size, seed, epochs) -> None:
    plan = plan_batches(lengths, batch_size=batch_size, seed=seed, steps=None, epochs=epochs)
    per_epoch = -(-len(lengths) // batch_size)
    assert len(plan) == epochs * per_epoch
    for epoch in range(epochs):
        batches = plan[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
        assert sum(len(batch) < batch_size for batch in batches) <= 1


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 9), st.integers(0, 2**40), st.integers(0, 60))
def test_steps_are_the_beginning_of_enough_epochs(lengths, batch_size, seed, steps) -> None:
    plan = plan_batches(lengths, batch_size=batch_size, seed=seed, steps=steps, epochs=None)
    whole = plan_batches(lengths, batch_size=batch_size, seed=seed, steps=None, epochs=60)
    assert len(plan) == steps
    assert all(np.array_equal(left, right) for left, right in zip(plan, whole, strict=False))


def test_order_is_random_between_epochs_and_seeds_and_lengths_are_alike_within_batches() -> None:
    lengths = np.random.default_rng(0).integers(10, 500, 1024)
    plan = plan_batches(lengths, batch_size=8, seed=1, steps=None, epochs=2)
    assert any(not np.array_equal(left, right) for left, right in zip(plan[:128], plan[128:], strict=True))
    first, second = ({frozenset(batch.tolist()) for batch in epoch} for epoch in (plan[:128], plan[128:]))
    assert len(first & second) < 10, "other rows are together in the next epoch"
    other = plan_batches(lengths, batch_size=8, seed=2, steps=None, epochs=1)
    assert any(not np.array_equal(left, right) for left, right in zip(plan, other, strict=False))
    padded = sum(int(lengths[batch].max()) * len(batch) for batch in plan[:128])
    assert padded < 1.08 * lengths.sum()
    longest = [int(lengths[batch].max()) for batch in plan[:128]]
    assert 0.3 < np.mean(np.diff(longest) > 0) < 0.7, "batches do not come in order of length"


@pytest.mark.parametrize(("steps", "epochs"), [(None, None), (1, 1)])
def test_steps_and_epochs_exclude_each_other(steps, epochs) -> None:
    with pytest.raises(ValueError, match="either steps or epochs"):
        plan_batches([1, 2], batch_size=1, seed=0, steps=steps, epochs=epochs)


def test_packed_batches_are_as_mixed_as_the_data() -> None:
    rows = make_rows(*("." * (1 + row % 7) + "x" for row in range(64)))
    spread = {}
    for batching in ("padded", "packed"):
        batches = training_batches(
            rows, range(64), batch_size=8, batching=batching, pad_id=PAD, seed=0, steps=None, epochs=1
        )
        shown = list(batches)
        assert sorted(int(row) for batch in shown for row in batch.index) == list(range(64))
        spread[batching] = sum(float(batch.lengths.max() - batch.lengths.min()) for batch in shown) / len(shown)
    assert spread["padded"] < 2 < 4 < spread["packed"]


def test_rows_without_a_target_are_in_no_batch() -> None:
    rows = make_rows("..x", "...", ".x", "....", ".xxx")
    batches = training_batches(
        rows, [0, 1, 2, 3], batch_size=1, batching="padded", pad_id=PAD, seed=0, steps=None, epochs=1
    )
    assert sorted(batch.tokens for batch in batches) == [2, 3]
    shown = list(evaluation_batches(rows, [1, 2, 4, 0], batch_size=2, batching="packed", pad_id=PAD))
    assert [group.tolist() for group, _ in shown] == [[4, 0], [2]]
    assert [batch.tokens for _, batch in shown] == [7, 2]


def test_a_client_without_rows_is_told_at_once() -> None:
    rows = make_rows("..x", "...")
    assert trainable_rows(rows, [0, 1]).tolist() == [0]
    with pytest.raises(UserError, match="got no rows"):
        training_batches(rows, [], batch_size=1, batching="padded", pad_id=PAD, seed=0, steps=1, epochs=None)
    with pytest.raises(UserError, match="got 1 rows without one"):
        evaluation_batches(rows, [1], batch_size=1, batching="padded", pad_id=PAD)


# --- packed == padded, on the architectures themselves ----------------------------------------------

SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
NO_SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "use_cache": False}


def make_model(family: str) -> torch.nn.Module:
    gemma = {"head_dim": 8, "sliding_window": 4}
    config = {
        "llama": lambda: transformers.LlamaConfig(**SIZE, **NO_SPECIAL),
        "qwen2": lambda: transformers.Qwen2Config(**SIZE, **NO_SPECIAL),
        "gemma": lambda: transformers.GemmaConfig(**SIZE, head_dim=8, **NO_SPECIAL),
        "gemma3": lambda: transformers.Gemma3TextConfig(**SIZE, **gemma, **NO_SPECIAL),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, **NO_SPECIAL
        ),
        "bloom": lambda: transformers.BloomConfig(
            vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, **NO_SPECIAL
        ),
        "opt": lambda: transformers.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
            **NO_SPECIAL,
        ),
    }[family]()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    # Larger weights than a fresh model's: attention must matter for a leak to show.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    return model


def summed_loss(model: torch.nn.Module, batch: Batch) -> float:
    with torch.no_grad():
        out = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    logits = out.logits.reshape(-1, VOCABULARY)[batch.label_index]
    return float(torch.nn.functional.cross_entropy(logits, batch.targets, reduction="sum"))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gemma3", "gpt2"])
def test_packed_loss_is_padded_loss_is_row_by_row_loss(family: str) -> None:
    model = make_model(family)
    rows = make_rows("...xxxx", "x", ".x.x.x.xxxxx", "..xxx", ".x")
    indices = [0, 1, 2, 3, 4]
    single = sum(
        summed_loss(model, collate(rows, [at], batching="padded", pad_id=PAD)) for at in indices if rows.targets[at]
    )
    for batching in ("padded", "packed"):
        batch = collate(rows, indices, batching=batching, pad_id=PAD)
        assert summed_loss(model, batch) == pytest.approx(single, abs=1e-4 * len(batch.targets))
    wrong = collate(rows, indices, batching="packed", pad_id=PAD)
    one_long_row = replace(wrong, position_ids=None)
    assert summed_loss(model, one_long_row) != pytest.approx(single, abs=0.1), "or this test could not fail"


@pytest.mark.parametrize(
    ("family", "leaks"), [("llama", False), ("gemma3", False), ("gpt2", False), ("bloom", True), ("opt", True)]
)
def test_a_model_that_can_not_keep_packed_rows_apart_is_found_out(family: str, leaks: bool) -> None:
    model = make_model(family)

    def logits(input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        known = {"position_ids": position_ids} if family != "bloom" else {}
        return model(input_ids=input_ids, use_cache=False, **known).logits

    assert (packing_leak(logits, VOCABULARY) > 1e-3) == leaks


def test_seeds_do_not_depend_on_how_rows_are_dealt() -> None:
    """The same seed gives the same plan for the same lengths, whatever the process did before."""
    np.random.seed(0)
    first = plan_batches([5, 3, 9, 1], batch_size=2, seed=7, steps=5, epochs=None)
    np.random.seed(1)
    again = plan_batches([5, 3, 9, 1], batch_size=2, seed=7, steps=5, epochs=None)
    assert all(np.array_equal(left, right) for left, right in zip(first, again, strict=True))
    assert Counter(np.concatenate(first[:2]).tolist()) == {0: 1, 1: 1, 2: 1, 3: 1}
