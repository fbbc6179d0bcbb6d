"""Losses without logits: equal to cross-entropy of all logits, whatever the model does to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flocktune.config.schema import LoraConfig
from flocktune.data.batching import Batch
from flocktune.models import head
from flocktune.models.head import label_logits, linear_cross_entropy, token_losses
from flocktune.models.lora import Adapter, attach
from test_row_attention import batch_of
from tiny_models import FAMILIES, fill, tiny_model

N, D, V = 11, 6, 40


def drawn(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((N, D), (V, D), (V,))
    states, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return states.requires_grad_(), weight, bias, torch.randint(V, (N,), generator=generator)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("at_once", [1, V, 4 * V, N * V, 10**6])
def test_each_loss_and_its_gradient_under_any_weights(
    at_once: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", at_once)
    states, weight, bias, targets = drawn()
    if not with_bias:
        bias = None  # type: ignore[assignment]
    found = linear_cross_entropy(states, weight, bias, targets)
    wanted = F.cross_entropy(F.linear(states, weight, bias), targets, reduction="none")
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for weighed in (lambda x: x.sum(), lambda x: (x * torch.arange(N)).sum(), lambda x: x.square().mean().log()):
        mine, theirs = (torch.autograd.grad(weighed(each), states, retain_graph=True)[0] for each in (found, wanted))
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_no_more_logits_than_allowed_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    states, weight, bias, targets = drawn()
    sizes: list[int] = []
    real = F.linear
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 3 * V + 1)
    monkeypatch.setattr(F, "linear", lambda *args: sizes.append(len(args[0])) or real(*args))
    linear_cross_entropy(states, weight, bias, targets)
    assert sizes == [3, 3, 3, 2]


def test_nothing_but_the_states_gradient_is_kept() -> None:
    states, weight, bias, targets = drawn(torch.bfloat16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        losses = linear_cross_entropy(states, weight, bias, targets)
    assert losses.dtype == torch.float32
    assert [(value.shape, value.dtype) for value in kept] == [((N, D), torch.bfloat16)]
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(states, weight, bias, targets), losses)


def test_no_label_is_no_loss() -> None:
    states, weight, bias, targets = drawn()
    losses = linear_cross_entropy(states[:0], weight, bias, targets[:0])
    assert losses.shape == (0,)
    assert not torch.autograd.grad(losses.sum(), states)[0].any()


# --- in a model ----------------------------------------------------------------------------------


def tuned(family: str, **changes: Any) -> Adapter:
    adapter = attach(tiny_model(family, **changes), LoraConfig(rank=4, targets="all-linear"), seed=0)
    fill(adapter.parameters)
    return adapter


def gradients(adapter: Adapter, losses: Tensor, batch: Batch) -> list[Tensor]:
    weights = torch.linspace(0.5, 2.0, len(batch.targets))
    return list(torch.autograd.grad((losses * weights).sum(), list(adapter.parameters.values())))


@pytest.mark.parametrize("batching", ["padded", "packed"])
@pytest.mark.parametrize("family", [*FAMILIES, "phi", "gpt_neox", "granite", "cohere"])
def test_losses_are_those_of_the_logits(family: str, batching: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 2 caps its logits; Granite and Cohere scale them; Phi's head has a bias."""
    adapter, batch = tuned(family), batch_of((7, 3, 10), batching)
    wanted = F.cross_entropy(label_logits(adapter.model, batch), batch.targets, reduction="none")
    fused: list[int] = []
    real = head.linear_cross_entropy
    monkeypatch.setattr(head, "linear_cross_entropy", lambda *args: fused.append(1) or real(*args))
    found = token_losses(adapter.model, batch)
    assert bool(fused) == (family not in ("gemma2", "granite", "cohere"))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for left, right in zip(gradients(adapter, found, batch), gradients(adapter, wanted, batch), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)


def test_logits_that_are_changed_in_place_are_noticed() -> None:
    model, batch = tiny_model("llama").requires_grad_(False), batch_of((7, 3), "padded")
    real = model.forward

    def halved(**known: Any) -> Any:
        out = real(**known)
        out.logits.mul_(0.5)
        return out

    model.forward = halved
    with torch.no_grad():
        wanted = F.cross_entropy(label_logits(model, batch), batch.targets, reduction="none")
        torch.testing.assert_close(token_losses(model, batch), wanted)
    with torch.inference_mode():  # where torch does not count changes
        torch.testing.assert_close(token_losses(model, batch), wanted)


@pytest.mark.parametrize("kind", ["trained", "of another kind", "patched"])
def test_other_heads_are_computed_as_they_are(kind: str) -> None:
    model, batch = tiny_model("llama", tie_word_embeddings=False), batch_of((7, 3), "padded")
    model.requires_grad_(False)
    if kind == "trained":
        model.lm_head.weight.requires_grad_()
    elif kind == "of another kind":
        weight = model.lm_head.weight

        class Tripled(nn.Linear):
            def forward(self, input: Tensor) -> Tensor:
                return 3 * super().forward(input)

        model.lm_head = Tripled(32, 260, bias=False)
        model.lm_head.weight = weight
    else:
        real = model.lm_head.forward
        model.lm_head.forward = lambda x: 3 * real(x)
    wanted = F.cross_entropy(label_logits(model, batch), batch.targets, reduction="none")
    found = token_losses(model, batch)
    torch.testing.assert_close(found, wanted)
    if kind == "trained":
        found.sum().backward()
        assert model.lm_head.weight.grad is not None
