"""Memory of a step from shapes alone, against the same step that is really run; how many clients fit at once."""

import numpy as np
import pytest
import torch

from flocktune.algorithms.local import training_only
from flocktune.config.schema import LocalConfig, LoraConfig
from flocktune.costs import measure_step
from flocktune.data.batching import evaluation_batches, training_batches
from flocktune.data.encoding import Encoded
from flocktune.footprint import (
    BatchShape,
    largest_batch,
    step_bytes,
    trained_bytes,
)
from flocktune.models.lora import Adapter, attach
from flocktune.models.recompute import checkpoint_layers
from test_costs import batch
from tiny_models import FAMILIES, tiny_model

LORA = LoraConfig(rank=2)
SHAPE = BatchShape(rows=3, length=16, labels=21)


def tiny(family: str = "llama", *, meta: bool, recompute: bool = False, dtype: str = "float32") -> Adapter:
    model = tiny_model(family, layers=4).to(getattr(torch, dtype))
    if meta:
        model = model.to("meta")
    if recompute:
        checkpoint_layers(model)
    return attach(model, LORA, seed=0)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_alone_tell_what_a_real_step_holds(family: str, dtype: str, recompute: bool) -> None:
    told, held = (
        step_bytes(tiny(family, meta=meta, recompute=recompute, dtype=dtype).model, SHAPE) for meta in (True, False)
    )
    assert told == pytest.approx(held, rel=0.01)


def test_what_autograd_keeps_is_in_it_and_gradients_are() -> None:
    held = tiny(meta=False)
    kept = measure_step(held.model, batch()).activation_bytes
    told = step_bytes(held.model, SHAPE)
    assert kept < told < 2 * kept
    gradients = 4 * sum(value.numel() for value in held.parameters.values())
    with training_only(held, list(held.parameters)[-2:]):
        assert step_bytes(held.model, SHAPE) < told - gradients  # nothing is kept below, and no gradient made
    assert all(value.grad is None for value in held.parameters.values())


def test_attention_is_left_as_it_was() -> None:
    before = torch.nn.functional.scaled_dot_product_attention
    with pytest.raises(ZeroDivisionError):
        step_bytes(tiny(meta=True).model, SHAPE, loss=lambda *_: torch.ones(1 // 0))
    step_bytes(tiny(meta=True).model, SHAPE)
    assert torch.nn.functional.scaled_dot_product_attention is before


@pytest.mark.parametrize(
    ("local", "values"),
    [(LocalConfig(), 4), (LocalConfig(optimizer="sgd"), 2), (LocalConfig(optimizer="sgd", momentum=0.9), 3)],
)
def test_the_optimisers_state_counts(local: LocalConfig, values: int) -> None:
    held = tiny(meta=False)
    count = sum(value.numel() for value in held.parameters.values())
    assert trained_bytes(held.model, local) == 4 * values * count


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_no_batch_is_larger_than_the_largest(batching: str, pairs: bool) -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(3, 40, 28)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    trainable = random.random(offsets[-1]) < 0.5
    trainable[offsets[:-1]], trainable[offsets[1:] - 1] = False, True
    rows = Encoded(np.zeros(offsets[-1], np.int32), trainable, offsets, pairs)
    mine = np.arange(1, len(rows))
    bound = largest_batch(rows, mine, 6, batching)  # type: ignore[arg-type]
    sizes = [
        (one.input_ids.numel(), len(one.targets))
        for one in training_batches(
            rows, mine, batch_size=6, batching=batching, pad_id=0, seed=0, steps=None, epochs=100  # type: ignore[arg-type]
        )
    ]  # fmt: skip
    tokens, labels = (max(column) for column in zip(*sizes, strict=True))
    assert 0.75 * bound.tokens < tokens <= bound.tokens
    assert 0.75 * bound.labels < labels <= bound.labels
    [(_, whole)] = evaluation_batches(rows, mine[:5], batch_size=6, batching=batching, pad_id=0)  # type: ignore[arg-type]
    few = largest_batch(rows, mine[:5], 6, batching)  # type: ignore[arg-type]
    assert (few.rows, few.length, few.labels) == (*whole.input_ids.shape, len(whole.targets))
