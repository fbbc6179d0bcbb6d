"""Packed rows that attend row by row: equal to the rows alone, and never to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

from flocktune.config.schema import LoraConfig, ModelConfig
from flocktune.data.batching import Batch, Batching, collate
from flocktune.data.encoding import Encoded
from flocktune.models import row_attention
from flocktune.models.head import label_logits, token_losses
from flocktune.models.load import load_model
from flocktune.models.lora import Adapter, attach
from flocktune.models.recompute import checkpoint_layers
from flocktune.models.row_attention import NAME, Rows, attend_by_rows, rows_apart, rows_of
from flocktune.training import next_token_loss, training_mode
from tiny_models import DECODERS, fill, save_tiny, tiny_decoder, tiny_model

LORA = LoraConfig(rank=4, alpha=6.0, targets="all-linear")


def encoded(lengths: Sequence[int], seed: int = 0) -> Encoded:
    """Random rows; all their tokens but the first are trained."""
    tokens = np.random.default_rng(seed).integers(3, 259, sum(lengths)).astype(np.int32)
    return Encoded(tokens, np.ones(len(tokens), np.bool_), np.cumsum([0, *lengths], dtype=np.int64))


def batch_of(lengths: Sequence[int], batching: Batching, seed: int = 0) -> Batch:
    return collate(encoded(lengths, seed), range(len(lengths)), batching=batching, pad_id=2)


def tuned(model: PreTrainedModel, dtype: torch.dtype = torch.float64) -> Adapter:
    adapter = attach(model, LORA, seed=0)
    fill(adapter.parameters)
    model.to(dtype)
    return adapter


def loss_and_gradients(adapter: Adapter, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    loss = next_token_loss(adapter.model, batch)
    return loss.detach(), list(torch.autograd.grad(loss, list(adapter.parameters.values())))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The lengths of rows that attention went through row by row, call by call."""
    seen: list[tuple[int, ...]] = []
    real = row_attention._row_by_row

    def watched(query: Any, key: Any, value: Any, lengths: tuple[int, ...], *rest: Any) -> Tensor:
        seen.append(lengths)
        return real(query, key, value, lengths, *rest)

    monkeypatch.setattr(row_attention, "_row_by_row", watched)
    return seen


# --- equal to padded rows ------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("lengths", [(5, 1, 12, 2, 1), (9,), (1, 2), (3,) * 20])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_packed_is_padded_to_the_last_digits(
    family: str, lengths: Sequence[int], checkpointed: bool, calls: list[tuple[int, ...]]
) -> None:
    """Keys of llama and gemma are shared by heads."""
    adapter = tuned(tiny_model(family))
    assert attend_by_rows(adapter.model)
    if checkpointed:
        checkpoint_layers(adapter.model)
    wanted, wanted_gradients = loss_and_gradients(adapter, batch_of(lengths, "padded"))
    calls.clear()
    found, gradients = loss_and_gradients(adapter, batch_of(lengths, "packed"))
    assert calls == [lengths] * (4 if checkpointed else 2), "in the layers that are computed again, too"
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    largest = max(float(value.abs().max()) for value in wanted_gradients)
    for left, right in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-12 * largest)
    with torch.no_grad():
        logits = [label_logits(adapter.model, batch_of(lengths, batching)) for batching in ("packed", "padded")]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-12 * float(logits[0].abs().max()))


def test_backward_passes_may_come_after_other_batches(calls: list[tuple[int, ...]]) -> None:
    """Layers that are computed again know their own rows."""
    adapter = tuned(tiny_model("llama"))
    attend_by_rows(adapter.model)
    checkpoint_layers(adapter.model)
    one, other = batch_of((4, 3, 7), "packed"), batch_of((6, 8), "packed", seed=1)
    wanted = [loss_and_gradients(adapter, batch)[1] for batch in (one, other)]
    losses = [next_token_loss(adapter.model, batch) for batch in (one, other)]
    with rows_of(other):
        for loss, gradients in zip(losses, wanted, strict=True):
            found = torch.autograd.grad(loss, list(adapter.parameters.values()))
            assert all(torch.equal(left, right) for left, right in zip(found, gradients, strict=True))


def test_rows_do_not_see_each_other() -> None:
    adapter = tuned(tiny_model("llama"))
    attend_by_rows(adapter.model)
    batch = batch_of((6, 5, 7), "packed")
    changed = batch.input_ids.clone()
    changed[0, 6:11] = 100  # the row in the middle
    with torch.no_grad():
        before, after = (
            label_logits(adapter.model, replace(batch, input_ids=ids)) for ids in (batch.input_ids, changed)
        )
    same = (before == after).all(dim=1)
    assert same.tolist() == [True] * 5 + [False] * 4 + [True] * 6


def test_bfloat16_is_close() -> None:
    adapter = tuned(tiny_model("llama"), torch.bfloat16)
    assert attend_by_rows(adapter.model)
    losses = [next_token_loss(adapter.model, batch_of((9, 4, 11), batching)) for batching in ("packed", "padded")]
    torch.testing.assert_close(*losses, rtol=0.01, atol=0)


def test_short_rows_of_bfloat16_attend_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = torch.randn(3, 1, 2, 10, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = row_attention._row_by_row(*drawn.double(), (4, 6), 0.0, None)
    found = row_attention._row_by_row(*drawn, (4, 6), 0.0, None)
    assert torch.equal(found, exact.bfloat16())
    monkeypatch.setattr(row_attention, "BETTER_IN_FLOAT32", 5)
    again = row_attention._row_by_row(*drawn, (4, 6), 0.0, None)
    assert again.dtype == torch.bfloat16
    assert not torch.equal(again, found)


def test_short_padded_rows_of_bfloat16_attend_in_float32_too() -> None:
    drawn = torch.randn(3, 4, 2, 10, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    module = torch.nn.Module()
    found, _ = row_attention._attention(module, *drawn, None, is_causal=True)
    exact, _ = row_attention._attention(module, *drawn.double(), None, is_causal=True)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.bfloat16())


@pytest.mark.parametrize("family", [family for family in DECODERS if family != "opt"])
def test_windows_shorter_than_a_row_stay_exact(family: str) -> None:
    """Layers with windows leave such rows to transformers. OPT can not be packed at all: it ignores position ids."""
    model = tiny_decoder(family).double()
    attend_by_rows(model)
    for lengths in ((9, 3, 14), (4, 5, 3)):
        with torch.no_grad():
            packed, padded = (token_losses(model, batch_of(lengths, batching)) for batching in ("packed", "padded"))
        torch.testing.assert_close(packed, padded, rtol=1e-6, atol=1e-6)  # eager attention's softmax is in float32


def test_layers_with_windows_join_in_when_rows_are_short(calls: list[tuple[int, ...]]) -> None:
    model = tiny_decoder("gemma3")  # two of six layers see everything, the others five tokens
    assert attend_by_rows(model)
    calls.clear()
    for lengths, layers in (((9, 3, 14), 2), ((4, 5, 3), 6)):
        with torch.no_grad():
            token_losses(model, batch_of(lengths, "packed"))
        assert calls == [lengths] * layers
        calls.clear()


# --- who may -------------------------------------------------------------------------------------


def test_models_are_probed_not_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [attend_by_rows(tiny_model(family)) for family in ("llama", "qwen2", "gpt2")] == [True] * 3
    assert not attend_by_rows(tiny_decoder("gpt_neo")), "which has its own attention"
    model = tiny_model("llama")
    real = row_attention._row_by_row
    monkeypatch.setattr(row_attention, "_row_by_row", lambda *args: 1.01 * real(*args))
    assert not attend_by_rows(model)
    assert model.config._attn_implementation == "sdpa"
    monkeypatch.setattr(row_attention, "_row_by_row", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attend_by_rows(model)


def test_a_transformers_that_asks_for_masks_in_other_words_is_left_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    real = row_attention._only_causal
    monkeypatch.setattr(
        row_attention, "_only_causal", lambda rows, known: real(rows, {**known, "q_length": known["queries"]})
    )
    model = tiny_model("llama")
    assert not attend_by_rows(model)
    assert model.config._attn_implementation == "sdpa"


def test_masks_that_say_more_than_causal_are_transformers_own() -> None:
    config = tiny_model("llama").config
    config._attn_implementation = NAME
    known = {"config": config, "inputs_embeds": torch.zeros(1, 7, 32), "attention_mask": None, "past_key_values": None}
    with rows_apart((4, 3), torch.device("cpu")):
        assert isinstance(create_causal_mask(**known), Rows)
        others = [
            create_causal_mask(**known, or_mask_function=lambda batch, head, q, kv: kv == 0),
            create_causal_mask(**known | {"inputs_embeds": torch.zeros(1, 6, 32)}),
            create_causal_mask(**known | {"inputs_embeds": torch.zeros(2, 7, 32)}),
            create_bidirectional_mask(**known),
        ]
    assert not any(isinstance(mask, Rows) for mask in others)


def test_a_model_that_asks_for_more_is_refused() -> None:
    model = tiny_model("llama")
    attend_by_rows(model)
    attention = model.model.layers[0].self_attn
    real = attention.forward
    attention.forward = lambda *args, **known: real(*args, **known, softcap=30.0)
    with pytest.raises(ValueError, match="more than causal attention"):
        token_losses(model, batch_of((3, 4), "packed"))
    model.set_attn_implementation("sdpa")
    assert not attend_by_rows(model)


def test_loaded_models_attend_by_rows_and_save_nothing_of_it(tmp_path: Any) -> None:
    model = load_model(ModelConfig(str(save_tiny(tmp_path / "one"))), torch.device("cpu"))
    assert model.config._attn_implementation == NAME
    model.save_pretrained(tmp_path / "two")
    assert NAME not in (tmp_path / "two" / "config.json").read_text()


def test_without_packed_rows_it_is_transformers_own() -> None:
    plain, model = tiny_model("llama"), tiny_model("llama")
    attend_by_rows(model)
    batch = batch_of((5, 9), "padded")
    assert torch.equal(label_logits(model, batch), label_logits(plain, batch))
    label_logits(model, batch_of((5, 4), "packed"))
    one_row = batch_of((9,), "padded")  # as many tokens as those rows had
    assert torch.equal(label_logits(model, one_row), label_logits(plain, one_row))
    prompt = batch.input_ids[1:, :4]
    mask = torch.tensor([[0, 1, 1, 1]])
    wrote = [each.generate(prompt, attention_mask=mask, max_new_tokens=6, do_sample=False) for each in (plain, model)]
    assert torch.equal(*wrote)


def test_dropout_of_attention_is_passed_on() -> None:
    model = tiny_model("llama", attention_dropout=0.5)
    attend_by_rows(model)
    batch = batch_of((12, 9), "packed")
    with training_mode(model, []), torch.no_grad():
        still = [token_losses(model, batch) for _ in range(2)]
        model.model.layers[0].self_attn.training = True
        moved = token_losses(model, batch)
    assert torch.equal(*still)
    assert not torch.equal(still[0], moved)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_kernel_for_all_rows_on_a_gpu(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = tuned(tiny_model(family), torch.bfloat16)
    adapter.model.cuda()
    kernels: list[int] = []
    real = row_attention._varlen
    monkeypatch.setattr(row_attention, "_varlen", lambda *args: kernels.append(1) or real(*args))
    assert attend_by_rows(adapter.model)
    lengths = (40, 1, 77, 12)
    loss, gradients = loss_and_gradients(adapter, batch_of(lengths, "packed").to("cuda"))
    assert kernels
    wanted, wanted_gradients = loss_and_gradients(adapter, batch_of(lengths, "padded").to("cuda"))
    torch.testing.assert_close(loss, wanted, rtol=0.01, atol=0)
    for left, right in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0.05 * float(right.abs().max()))
