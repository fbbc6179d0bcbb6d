"""The local loop: equal to textbook code and to PEFT's step, however the work is cut up."""

import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flocktune.config.schema import LocalConfig, LoraConfig
from flocktune.errors import UserError
from flocktune.models.head import label_logits
from flocktune.models.lora import Adapter, attach
from flocktune.models.recompute import checkpoint_layers
from flocktune.tensors import norm, subtract
from flocktune.training import (
    NotFinite,
    evaluate_loss,
    fit,
    learning_rate,
    next_token_loss,
    proximal_penalty,
)
from tiny_models import FAMILIES, fill, peft_twin, tiny_model

LORA = LoraConfig(rank=4, alpha=6.0)
LOCAL = LocalConfig(epochs=1, lr=1e-2, clip_norm=0.0)


def rows(count: int, seed: int = 0) -> list[tuple[list[int], int]]:
    """(token ids, prompt length) of random rows with 4 to 12 tokens, whose prompt is not trained."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    lengths = [draw(4, 13) for _ in range(count)]
    return [(torch.randint(3, 259, (length,), generator=generator).tolist(), draw(1, length)) for length in lengths]


def batch_of(chosen: Sequence[tuple[list[int], int]], *, packed: bool = False) -> Any:
    """What the data side builds, written out the simple way."""
    width = max(len(ids) for ids, _ in chosen)
    flat, positions, labels, targets = [], [], [], []
    for ids, prompt in chosen:
        start = len(flat)
        flat += ids if packed else ids + [2] * (width - len(ids))
        positions += range(len(ids))
        labels += [start + place - 1 for place in range(prompt, len(ids))]
        targets += ids[prompt:]
    shape = (1, -1) if packed else (len(chosen), width)
    batch = SimpleNamespace(
        input_ids=torch.tensor(flat).view(shape),
        position_ids=torch.tensor([positions]) if packed else None,
        label_index=torch.tensor(labels, dtype=torch.int64),
        targets=torch.tensor(targets, dtype=torch.int64),
        lengths=np.array([len(ids) for ids, _ in chosen]),
        rows=len(chosen),
        units=len(targets),
        tokens=sum(len(ids) for ids, _ in chosen),
    )
    batch.to = lambda device: batch
    return batch


def textbook_loss(model: Any, chosen: Sequence[tuple[list[int], int]]) -> Tensor:
    """Row by row, all logits."""
    total = torch.zeros(())
    for ids, prompt in chosen:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        total = total + F.cross_entropy(logits[prompt - 1 : -1], torch.tensor(ids[prompt:]), reduction="sum")
    return total


def tuned(family: str = "llama", lora: LoraConfig = LORA, **changes: Any) -> Adapter:
    """A tiny model with an adapter whose factors are all random."""
    adapter = attach(tiny_model(family, **changes), lora, seed=0)
    fill(adapter.parameters)
    return adapter


def train(adapter: Adapter, batches: Any, settings: LocalConfig = LOCAL, **options: Any) -> dict[str, Any]:
    return fit(adapter.model, adapter.parameters, batches, settings, **{"total_steps": 10, "seed": 0, **options})


def after(batches: Any, settings: LocalConfig = LOCAL, lora: LoraConfig = LORA, **options: Any) -> dict[str, Tensor]:
    adapter = tuned(lora=lora)
    train(adapter, batches, settings, **options)
    return adapter.tensors()


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor], *, within: float = 0.0) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert (value - right[name]).abs().max() <= within, name


# --- loss ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_label_only_loss_is_the_textbook_loss(family: str, packed: bool) -> None:
    adapter, chosen = tuned(family), rows(4)
    loss = next_token_loss(adapter.model, batch_of(chosen, packed=packed))
    expected = textbook_loss(adapter.model, chosen)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    got = torch.autograd.grad(loss, list(adapter.parameters.values()))
    want = torch.autograd.grad(expected, list(adapter.parameters.values()))
    for left, right in zip(got, want, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)


def test_head_sees_label_positions_only_and_its_hook_is_gone_afterwards() -> None:
    model, batch = tuned().model, batch_of(rows(4))
    shapes: list[tuple[int, ...]] = []
    handle = model.lm_head.register_forward_hook(lambda _, inputs, out: shapes.append(tuple(out.shape)))
    label_logits(model, batch)
    next_token_loss(model, batch)
    model(input_ids=batch.input_ids)
    handle.remove()
    labels = len(batch.targets)
    assert shapes == [(1, labels, 260), (4, 0, 260), (*batch.input_ids.shape, 260)], "losses need no logits of it"
    for asked in (label_logits, next_token_loss):
        with pytest.raises(IndexError):
            asked(model, SimpleNamespace(**vars(batch) | {"label_index": torch.tensor([10**6])}))
    assert not model.lm_head._forward_pre_hooks
    assert not model.lm_head._forward_hooks


def test_bfloat16_loss_is_float32_and_close() -> None:
    exact, rounded = tuned(), attach(tiny_model("llama").to(torch.bfloat16), LORA, seed=0)
    fill(rounded.parameters)
    batch = batch_of(rows(4))
    loss = next_token_loss(rounded.model, batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, next_token_loss(exact.model, batch), rtol=0.02, atol=0)


def test_evaluation_is_the_mean_over_label_tokens_of_all_batches() -> None:
    adapter, chosen = tuned(), rows(7)
    found = evaluate_loss(adapter.model, [batch_of(chosen[:3]), batch_of(chosen[3:], packed=True)])
    assert found.count == sum(len(ids) - prompt for ids, prompt in chosen)
    assert found.total == pytest.approx(textbook_loss(adapter.model, chosen).item(), rel=1e-5)


def test_evaluation_records_no_graph() -> None:
    losses: list[Tensor] = []

    def kept(model: Any, batch: Any) -> Tensor:
        losses.append(next_token_loss(model, batch))
        return losses[-1]

    evaluate_loss(tuned().model, [batch_of(rows(2))], kept)
    assert [loss.requires_grad for loss in losses] == [False]


# --- the step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_one_adamw_step_equals_pefts(family: str) -> None:
    adapter, chosen = tuned(family), rows(4)
    start = adapter.tensors()
    twin = peft_twin(family, LORA, start)
    trained = {name: value for name, value in twin.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3, weight_decay=0.1)
    labels = sum(len(ids) - prompt for ids, prompt in chosen)
    (textbook_loss(twin, chosen) / labels).backward()
    torch.nn.utils.clip_grad_norm_(trained.values(), 0.5)
    optimizer.step()
    metrics = train(adapter, [batch_of(chosen)], replace(LOCAL, lr=1e-3, weight_decay=0.1, clip_norm=0.5))
    theirs = {f"base_model.model.{name}.default.weight": value for name, value in adapter.tensors().items()}
    assert_same(theirs, {name: value.detach() for name, value in trained.items()}, within=1e-6)
    assert max(float(value.abs().max()) for value in subtract(adapter.tensors(), start).values()) > 5e-4
    assert metrics["loss"].count == labels


def test_sgd_is_w_minus_lr_times_gradient_with_momentum_and_decay() -> None:
    adapter, batch = tuned(), batch_of(rows(3))
    labels = len(batch.targets)
    now = {name: value.detach().clone() for name, value in adapter.parameters.items()}
    velocity = {name: torch.zeros_like(value) for name, value in now.items()}
    for _ in range(3):
        adapter.load({name: value.contiguous() for name, value in now.items()})
        gradients = torch.autograd.grad(next_token_loss(adapter.model, batch), list(adapter.parameters.values()))
        for (name, value), gradient in zip(now.items(), gradients, strict=True):
            velocity[name] = 0.9 * velocity[name] + gradient / labels + 0.1 * value
            now[name] = value - 0.05 * velocity[name]
    settings = replace(LOCAL, optimizer="sgd", lr=0.05, momentum=0.9, weight_decay=0.1)
    assert_same(after([batch] * 3, settings), now, within=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_accumulating_k_batches_is_one_batch_k_times_as_large(packed: bool) -> None:
    chosen = rows(8)  # of different lengths: a mean of means would differ
    small = [batch_of(chosen[start : start + 2], packed=packed) for start in range(0, 8, 2)]
    large = [batch_of(chosen[:4], packed=packed), batch_of(chosen[4:], packed=packed)]
    settings = replace(LOCAL, optimizer="sgd", lr=0.1)
    assert_same(after(small, replace(settings, accumulate=2)), after(large, settings), within=1e-6)


def test_last_step_may_be_shorter() -> None:
    chosen = rows(6)
    pieces = [batch_of(chosen[start : start + 2]) for start in (0, 2, 4)]
    settings = replace(LOCAL, optimizer="sgd", lr=0.1)
    expected = after([batch_of(chosen[:4]), batch_of(chosen[4:])], settings)
    assert_same(after(pieces, replace(settings, accumulate=2)), expected, within=1e-6)


def test_a_step_that_broke_off_leaves_nothing_to_the_next_client() -> None:
    def breaks(parameters: Any) -> Tensor:
        raise MemoryError

    adapter, batch = tuned(), batch_of(rows(3))
    start = adapter.tensors()
    with pytest.raises(MemoryError):
        train(adapter, [batch], penalty=breaks)
    adapter.load(start)
    train(adapter, [batch])
    assert_same(adapter.tensors(), after([batch]))


def test_gradient_checkpointing_trains_alike_with_dropout() -> None:
    lora, batches = replace(LORA, dropout=0.3), [batch_of(rows(4, seed)) for seed in range(3)]
    plain, checkpointed = tuned(lora=lora), tuned(lora=lora)
    checkpoint_layers(checkpointed.model)
    train(plain, batches)
    train(checkpointed, batches)
    assert_same(plain.tensors(), checkpointed.tensors())


def test_steps_bound_an_endless_stream_and_metrics_add_up() -> None:
    batch, taken = batch_of(rows(3)), []

    def endless() -> Any:
        while True:
            taken.append(1)
            yield batch

    metrics = train(tuned(), endless(), replace(LOCAL, epochs=None, steps=3, accumulate=2))
    assert len(taken) == 6
    assert {name: (mean.total, mean.count) for name, mean in metrics.items() if name != "loss"} == {
        "tokens": (6 * batch.tokens, 1),
        "steps": (3, 1),
    }
    assert metrics["loss"].count == 6 * len(batch.targets)


def test_reported_loss_is_that_before_the_step_over_all_its_batches() -> None:
    adapter, chosen = tuned(), rows(4)
    before = textbook_loss(adapter.model, chosen).item()
    metrics = train(adapter, [batch_of(chosen[:1]), batch_of(chosen[1:])], replace(LOCAL, accumulate=2))
    assert metrics["loss"].total == pytest.approx(before, rel=1e-5)


def test_training_lowers_the_loss() -> None:
    adapter, batch = tuned(), batch_of(rows(4))
    before = evaluate_loss(adapter.model, [batch])
    train(adapter, [batch] * 20)
    assert evaluate_loss(adapter.model, [batch]).value < before.value - 0.5


def test_clipping_bounds_the_step() -> None:
    batch, start = [batch_of(rows(4))], tuned().tensors()
    settings = replace(LOCAL, optimizer="sgd", lr=1.0, clip_norm=0.01)
    assert norm(subtract(after(batch, settings), start)) == pytest.approx(0.01, rel=1e-3)
    assert norm(subtract(after(batch, replace(settings, clip_norm=0.0)), start)) > 0.1


def test_only_the_given_parameters_move() -> None:
    adapter = tuned()
    start = adapter.tensors()
    base = {name: value.clone() for name, value in adapter.model.state_dict().items() if "lora_" not in name}
    frozen_a = {name: value for name, value in adapter.parameters.items() if name.endswith("lora_B")}
    fit(adapter.model, frozen_a, [batch_of(rows(3))] * 2, LOCAL, total_steps=2, seed=0)
    assert {name for name, value in adapter.tensors().items() if not torch.equal(value, start[name])} == set(frozen_a)
    assert all(torch.equal(value, base[name]) for name, value in adapter.model.state_dict().items() if name in base)


def test_modes_gradients_and_random_state_are_as_before() -> None:
    adapter = tuned(lora=replace(LORA, dropout=0.5))
    state = torch.random.get_rng_state()
    modes = {name: module.training for name, module in adapter.model.named_modules()}
    train(adapter, [batch_of(rows(3))])
    assert torch.equal(state, torch.random.get_rng_state())
    assert {name: module.training for name, module in adapter.model.named_modules()} == modes
    assert all(value.grad is None for value in adapter.parameters.values())


def test_dropout_follows_the_seed_and_acts_on_the_adapter_alone() -> None:
    batches, dropping = [batch_of(rows(4))] * 2, replace(LORA, dropout=0.5)
    assert_same(after(batches, lora=dropping, seed=1), after(batches, lora=dropping, seed=1))
    with pytest.raises(AssertionError):
        assert_same(after(batches, lora=dropping, seed=1), after(batches, lora=dropping, seed=2))
    # GPT-2's own dropout stays off: with none in the adapter, the seed does not matter.
    results = []
    for seed in (1, 2):
        adapter = tuned("gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
        adapter.model.train()
        train(adapter, batches, seed=seed)
        results.append(adapter.tensors())
    assert_same(*results)


def test_embeddings_carry_no_gradient() -> None:
    """Backward ends at the first adapted layer."""
    adapter, needs = tuned(), []
    adapter.model.get_input_embeddings().register_forward_hook(lambda _, inputs, out: needs.append(out.requires_grad))
    train(adapter, [batch_of(rows(2))])
    assert needs == [False]


# --- penalty -------------------------------------------------------------------------------------


def test_fedprox_with_mu_zero_is_no_penalty() -> None:
    batches, reference = [batch_of(rows(4))] * 3, tuned().tensors()
    assert_same(after(batches, penalty=proximal_penalty(reference, 0.0)), after(batches))


def test_fedprox_is_half_mu_times_squared_distance_once_a_step() -> None:
    adapter = tuned()
    reference = {name: value + 0.1 for name, value in adapter.tensors().items()}
    penalty = proximal_penalty(reference, 0.5)
    value = penalty(adapter.parameters)
    assert value.item() == pytest.approx(0.25 * 0.01 * sum(each.numel() for each in reference.values()), rel=1e-4)
    for gradient in torch.autograd.grad(value, list(adapter.parameters.values())):
        torch.testing.assert_close(gradient, torch.full_like(gradient, -0.05))
    batches = [batch_of(rows(2)), batch_of(rows(2, seed=1))]
    settings = replace(LOCAL, optimizer="sgd", lr=0.1, accumulate=2)
    moved = subtract(after(batches, settings, penalty=penalty), after(batches, settings))
    for difference in moved.values():
        torch.testing.assert_close(difference, torch.full_like(difference, 0.1 * 0.05), rtol=1e-3, atol=1e-6)


def test_fedprox_takes_part_of_the_names() -> None:
    adapter = tuned()
    part = dict(list(adapter.parameters.items())[:3])
    reference = {name: value + 0.1 for name, value in adapter.tensors().items()}
    expected = 0.5 * 0.01 * sum(value.numel() for value in part.values())
    assert proximal_penalty(reference, 1.0)(part).item() == pytest.approx(expected, rel=1e-4)


# --- schedule ------------------------------------------------------------------------------------


def test_schedule_values() -> None:
    def rates(**changes: Any) -> list[float]:
        return [learning_rate(replace(LOCAL, lr=8.0, **changes), step, 6) for step in range(7)]

    assert rates() == [8.0] * 7
    assert rates(warmup_steps=2) == [4.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0]
    assert rates(schedule="linear", warmup_steps=2) == [4.0, 8.0, 8.0, 6.0, 4.0, 2.0, 0.0]
    assert rates(schedule="cosine") == pytest.approx([4 * (1 + math.cos(math.pi * step / 6)) for step in range(7)])
    assert rates(schedule="cosine", warmup_steps=9)[:3] == pytest.approx([8 / 9, 16 / 9, 24 / 9])


@given(
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    warmup=st.integers(0, 5),
    step=st.integers(0, 50),
    total=st.integers(1, 20),
)
def test_rates_stay_within_zero_and_lr(schedule: Any, warmup: int, step: int, total: int) -> None:
    rate = learning_rate(replace(LOCAL, schedule=schedule, warmup_steps=warmup), step, total)
    assert 0.0 <= rate <= LOCAL.lr
    assert rate > 0.0 or step >= total


def test_fit_follows_the_schedule_from_its_first_step() -> None:
    """Two calls of SGD without memory, with first_step, are one call."""
    batches = [batch_of(rows(2, seed)) for seed in range(4)]
    settings = replace(LOCAL, optimizer="sgd", lr=0.1, schedule="linear", warmup_steps=1)
    adapter = tuned()
    train(adapter, batches[:2], settings, total_steps=4)
    train(adapter, batches[2:], settings, total_steps=4, first_step=2)
    assert_same(adapter.tensors(), after(batches, settings, total_steps=4))


def test_fit_takes_the_rate_of_its_step() -> None:
    batch, start = [batch_of(rows(2))], tuned().tensors()
    settings = replace(LOCAL, optimizer="sgd", lr=0.1)
    whole = subtract(after(batch, settings), start)
    quarter = subtract(after(batch, replace(settings, schedule="linear"), total_steps=4, first_step=3), start)
    assert norm(quarter) == pytest.approx(norm(whole) / 4, rel=1e-3)


# --- what goes wrong -----------------------------------------------------------------------------


def test_nan_in_the_loss_names_the_step() -> None:
    calls = []

    def broken(model: Any, batch: Any) -> Tensor:
        calls.append(1)
        return next_token_loss(model, batch) * (math.nan if len(calls) == 2 else 1.0)

    with pytest.raises(NotFinite, match=r"nan at step 6 \(step 2 of 3 here\)"):
        train(tuned(), [batch_of(rows(2))] * 3, loss=broken, first_step=5)


def test_broken_parameters_are_caught_though_the_last_loss_was_finite() -> None:
    def broken_backward(model: Any, batch: Any) -> Tensor:
        loss = next_token_loss(model, batch)
        loss.register_hook(lambda gradient: gradient * math.nan)
        return loss

    with pytest.raises(NotFinite, match="trained tensors"):
        train(tuned(), [batch_of(rows(2))], loss=broken_backward)


def test_no_batches_is_an_error() -> None:
    with pytest.raises(UserError, match="at least one batch"):
        train(tuned(), [])


def test_a_batch_without_labels_changes_nothing_by_itself() -> None:
    empty = batch_of([([5, 6, 7], 3)])
    metrics = train(adapter := tuned(), [empty])
    assert_same(adapter.tensors(), tuned().tensors())
    assert math.isnan(metrics["loss"].value)
