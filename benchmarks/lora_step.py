"""A step of LoRA on all linear layers, ours beside PEFT's, the same numbers; and beside what frozen weights alone cost.

All variants share one model's weights, its batches (padded, ready made), the loss (logits at labels alone), clipping
and AdamW. Loss and gradients of ours and PEFT's are compared, or the benchmark fails. The floor: the base's forward
pass and the gradients of its activations, with nothing trained; a step of LoRA has that and its own products.

Shapes: B rows, T tokens, D width, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.networks import Network, frozen_base, own_network, peft_names, peft_network, sharing
from benchmarks.paired import Options, Result, Spread, interleaved, ratio, say, timed
from benchmarks.profiled import operations, told
from flocktune.config.schema import Columns, LoraConfig, ModelConfig
from flocktune.costs import flop_counter
from flocktune.data.batching import Batch, training_batches
from flocktune.data.encoding import Encoded, encode
from flocktune.data.sources import read_examples
from flocktune.models.load import load_model, load_tokenizer, pad_id
from flocktune.models.lora import B_SUFFIX, attach
from flocktune.training import next_token_loss
from flocktune.types import Tensors

GOAL = 1.4
TOLERANCE, TOLERANCE_BF16 = 1e-4, 0.1
"""Of loss and gradients: the largest difference over the largest value. Sums are in another order, in float32; on a
base in bfloat16 PEFT casts activations to float32 for its products, which ours has in bfloat16."""
CPU = torch.device("cpu")
OURS, PEFT, FLOOR, FULL = "ours", "PEFT", "floor", "full training"


@dataclass(frozen=True, eq=False)
class Case:
    """A model, and the batches that the turns take one by one."""

    name: str
    model: Any
    batches: Sequence[Batch]
    tolerance: float = TOLERANCE


class Variant:
    """A loss, and what a step trains of it; AdamW keeps its moments from step to step."""

    def __init__(self, loss: Callable[[Batch], Tensor], trained: Sequence[nn.Parameter], rate: float = 1e-3) -> None:
        self.loss = loss
        self.trained = trained
        self.optimizer = torch.optim.AdamW(trained, lr=rate, fused=True) if trained else None

    def step(self, batch: Batch) -> None:
        """Forward, backward, clipping, AdamW; without the last two when nothing is trained."""
        self.loss(batch).backward()
        if self.optimizer:
            nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class Measured:
    """All of one case: ``seconds`` a step by variant and turn, ``flops`` of a step, ``profiles`` of one."""

    seconds: Mapping[str, Sequence[float]]
    difference: float
    flops: Mapping[str, int]
    profiles: Mapping[str, Mapping[str, float]]

    @property
    def times(self) -> Spread:
        """How many of our steps fit into one of PEFT's."""
        return ratio(self.seconds[PEFT], self.seconds[OURS])


def run(options: Options) -> Result:
    """Every case. Raises RuntimeError when ours and PEFT's are not the same numbers."""
    lora = LoraConfig()
    found = {case.name: _measured(case, lora, 1 if options.quick else 24) for case in _cases(options)}
    return Result(
        title="A step of LoRA on all linear layers",
        goal=f"at least {GOAL} times as fast as PEFT, eager, in every case",
        met=None if options.quick else all(each.times.median >= GOAL for each in found.values()),
        header=(
            "",
            "PEFT, ms a step",
            "ours",
            "floor",
            "full training",
            "PEFT / ours",
            "PEFT / floor, the most there is",
            "ours / floor",
            "FLOPs of ours / floor's",
            "full training / ours",
        ),
        rows=[_row(name, each) for name, each in found.items()],
        notes=(
            f"LoRA rank {lora.rank}; medians, ratios turn by turn. Loss and gradients of ours and PEFT's differ by at"
            f" most {max(each.difference for each in found.values()):.0e} of the largest. One profiled step:",
            "",
            *(
                f"- {name}, {way}: {told(spent)}"
                for name, each in found.items()
                for way, spent in each.profiles.items()
            ),
            "",
        ),
        values={name: asdict(each) for name, each in found.items()},
        measured="; ".join(f"{name}: {each.times.median:.2f}" for name, each in found.items()),
        floor="the base's forward pass and the gradients of its activations, nothing trained; LoRA's own products are"
        " beyond it, so ours / floor can not be less than the quotient of FLOPs, products being equally fast",
    )


def _measured(case: Case, lora: LoraConfig, turns: int) -> Measured:
    say(f" {case.name}")
    variants, difference = _variants(case, lora)
    seconds = interleaved({name: partial(_turn, case, name, each) for name, each in variants.items()}, turns)
    flops = {name: _flops(variants[name], case.batches[0]) for name in (OURS, FLOOR)}
    profiles = {name: _profile(variants[name], case.batches[0]) for name in (PEFT, OURS, FLOOR)}
    return Measured(seconds, difference, flops, profiles)


def _row(name: str, found: Measured) -> tuple[str, ...]:
    ours = found.seconds[OURS]
    return (
        name,
        *(f"{1000 * Spread.of(found.seconds[way]).median:.1f}" for way in (PEFT, OURS, FLOOR, FULL)),
        str(found.times),
        f"{ratio(found.seconds[PEFT], found.seconds[FLOOR]).median:.2f}",
        str(ratio(ours, found.seconds[FLOOR])),
        f"{found.flops[OURS] / found.flops[FLOOR]:.2f}",
        f"{ratio(found.seconds[FULL], ours).median:.2f}",
    )


def _cases(options: Options) -> Iterator[Case]:
    """The model that was asked for with batches of 1, 4 and 8 rows; and a random one of middle size."""
    count = 2 if options.quick else 8
    tokenizer = load_tokenizer(ModelConfig(options.model))
    examples = read_examples(options.data, Columns(), max_rows=60 if options.quick else 1000)
    encoded, _ = encode(examples, tokenizer, template="short", max_tokens=256, train_on="responses")
    model = load_model(ModelConfig(options.model), CPU)
    for rows in (1, 4) if options.quick else (1, 4, 8):
        batches = _batches(encoded, rows, count, pad_id(tokenizer))
        yield Case(f"{Path(options.model).name}, {rows} x T", model, batches)
    if not options.quick:
        model = load_model(ModelConfig(options.model, dtype="bfloat16"), CPU)
        yield Case(f"the same in bfloat16, {rows} x T", model, batches, TOLERANCE_BF16)
    yield random_case(*((2, 32, 260, 2, 16) if options.quick else (12, 768, 32_000, 2, 128)), count=2)


def random_case(layers: int, width: int, vocabulary: int, rows: int, tokens: int, *, count: int) -> Case:
    """A random Llama and random rows of one length, half of each an answer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        num_key_value_heads=max(1, width // 64),
        vocab_size=vocabulary,
    )
    drawn = np.random.default_rng(0).integers(3, vocabulary, rows * count * tokens).astype(np.int32)
    trainable = np.tile(np.arange(tokens) >= tokens // 2, rows * count)
    encoded = Encoded(drawn, trainable, np.arange(rows * count + 1, dtype=np.int64) * tokens)
    model = LlamaForCausalLM(config)
    return Case(f"random, {layers} x {width}, {rows} x {tokens}", model, _batches(encoded, rows, count, 0))


def _batches(encoded: Encoded, rows: int, count: int, pad: int) -> list[Batch]:
    drawn = training_batches(
        encoded,
        range(len(encoded.lengths)),
        batch_size=rows,
        batching="padded",
        pad_id=pad,
        seed=0,
        steps=count,
        epochs=None,
    )
    return list(drawn)


def _variants(case: Case, lora: LoraConfig) -> tuple[dict[str, Variant], float]:
    """All of them on shared weights, and how far ours and PEFT's numbers are apart."""
    case.model.requires_grad_(False)
    ours = attach(sharing(case.model), lora, seed=0)
    start = _drawn(ours.tensors())
    ours.load(start)
    own, usual = own_network(ours), peft_network(sharing(case.model), lora, start)
    usual.write(peft_names(start))
    difference = _difference(case, own.model, ours.parameters, usual)
    plain, whole = frozen_base(sharing(case.model), list(ours.layers)), sharing(case.model)
    return {
        PEFT: Variant(_loss(usual.model), usual.trained),
        OURS: Variant(_loss(own.model), own.trained),
        FLOOR: Variant(_loss(plain), []),
        # A rate of 0 takes as long, and leaves the weights that all share as they are.
        FULL: Variant(_loss(whole), list(whole.parameters()), rate=0.0),
    }, difference


def _turn(case: Case, name: str, variant: Variant, turn: int) -> float:
    """Seconds of one step; every variant has the same batch in the same turn."""
    with _all_trained(case.model) if name == FULL else nullcontext():
        return timed(lambda: variant.step(case.batches[turn % len(case.batches)]))


@contextmanager
def _all_trained(model: nn.Module) -> Iterator[None]:
    """Inside, the weights want gradients; those are dropped afterwards."""
    model.requires_grad_(True)
    try:
        yield
    finally:
        model.requires_grad_(False)
        model.zero_grad(set_to_none=True)


def _loss(model: Any) -> Callable[[Batch], Tensor]:
    return lambda batch: next_token_loss(model, batch) / len(batch.targets)


def _drawn(tensors: Tensors) -> dict[str, Tensor]:
    """Random B: with B = 0 the gradients of A are 0, and equal whatever is wrong."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: 0.02 * torch.randn(value.shape, generator=generator) if name.endswith(B_SUFFIX) else value
        for name, value in tensors.items()
    }


def _difference(case: Case, own: Any, parameters: Mapping[str, nn.Parameter], usual: Network) -> float:
    """Of the first batch's loss and gradients, relative to the largest. Raises RuntimeError when it is too large."""
    other = {name: value for name, value in usual.model.named_parameters() if value.requires_grad}
    found = []
    for model, trained in ((own, list(parameters.values())), (usual.model, list(other.values()))):
        loss = _loss(model)(case.batches[0])
        found.append((float(loss.detach()), torch.autograd.grad(loss, trained)))
    (our_loss, ours), (its_loss, its) = found
    names = [name.replace(".default", "") for name in other]
    by_name = dict(zip(names, its, strict=True))
    largest = max(float(each.abs().max()) for each in ours)
    apart = max(
        float((grad - by_name[name]).abs().max()) / largest
        for name, grad in peft_names(dict(zip(parameters, ours, strict=True))).items()
    )
    difference = max(apart, abs(our_loss / its_loss - 1))
    if not difference <= case.tolerance:
        raise RuntimeError(f"ours and PEFT's are not the same numbers: they differ by {difference:.1e}")
    return difference


def _flops(variant: Variant, batch: Batch) -> int:
    """Of matrix products and attention, forward and backward."""
    with flop_counter() as counter:
        variant.loss(batch).backward()
    for parameter in variant.trained:
        parameter.grad = None
    return int(counter.get_total_flops())


def _profile(variant: Variant, batch: Batch) -> dict[str, float]:
    """A step after one that is left out."""
    variant.step(batch)
    return operations(lambda: variant.step(batch))
