"""Pretraining of the small Llama on the endless text of the world.

Muon turns the matrices, AdamW the embeddings and norms; the learning rate warms
up over 60 steps and falls to zero over the last 40 %. One thread, bf16 autocast:
about 5,000 tokens a second on one core of a 2-core machine.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from world.facts import World
from world.text import documents
from world.tokenizer import BOS, EOS, PAD

# B rows of a batch, T tokens of a row, V vocabulary


@dataclass(frozen=True)
class Plan:
    """Sizes of the model and amounts of training."""

    layers: int = 8
    hidden_size: int = 192
    heads: int = 6
    intermediate_size: int = 512
    context_length: int = 256
    rows: int = 16
    row_tokens: int = 128
    steps: int = 900
    muon_learning_rate: float = 0.01
    adamw_learning_rate: float = 3e-3
    warm_up_steps: int = 60
    decay_share: float = 0.4
    held_out_batches: int = 16


def new_model(tokenizer: Tokenizer, plan: Plan) -> LlamaForCausalLM:
    """A Llama of the planned size with fresh weights."""
    special = {
        f"{name}_token_id": tokenizer.token_to_id(token) for name, token in (("pad", PAD), ("bos", BOS), ("eos", EOS))
    }
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=plan.hidden_size,
        intermediate_size=plan.intermediate_size,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads,
        num_key_value_heads=plan.heads,
        max_position_embeddings=plan.context_length,
        tie_word_embeddings=True,
        **special,
    )
    return LlamaForCausalLM(config)


def batches(
    world: World, vocabulary: list[str], tokenizer: Tokenizer, plan: Plan, rng: random.Random
) -> Iterator[torch.Tensor]:
    """Documents joined, each within <bos> and <eos>, and cut to (B, T) token ids."""
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    needed = plan.rows * plan.row_tokens
    stream: list[int] = []
    for document in documents(world, vocabulary, rng):
        stream += [bos, *tokenizer.encode(document).ids, eos]
        while len(stream) >= needed:
            yield torch.tensor(stream[:needed]).view(plan.rows, plan.row_tokens)
            stream = stream[needed:]


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss in nats."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits  # (B, T, V)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def _pace(step: int, plan: Plan) -> float:
    """The learning rate's factor at a step."""
    left = (plan.steps - step) / (plan.decay_share * plan.steps)
    return min(1.0, (step + 1) / plan.warm_up_steps, left)


def pretrain(
    world: World, vocabulary: list[str], tokenizer: Tokenizer, plan: Plan, seed: int
) -> tuple[LlamaForCausalLM, float]:
    """The trained model and its loss on text it has not seen."""
    torch.manual_seed(seed)
    model = new_model(tokenizer, plan)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=plan.muon_learning_rate, weight_decay=0.0),
        torch.optim.AdamW(others, lr=plan.adamw_learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    pace = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: _pace(step, plan)) for each in optimizers]
    text = batches(world, vocabulary, tokenizer, plan, random.Random(f"text {seed}"))
    began = time.monotonic()
    for step, ids in enumerate(islice(text, plan.steps), start=1):
        loss = loss_of(model, ids)
        loss.backward()
        for part in (*optimizers, *pace):
            part.step()
        model.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == plan.steps:
            minutes = (time.monotonic() - began) / 60
            print(f"step {step} of {plan.steps}: loss {loss.item():.3f}, {minutes:.1f} min", flush=True)
    return model, held_out_loss(model, world, vocabulary, tokenizer, plan, seed)


@torch.no_grad()
def held_out_loss(
    model: LlamaForCausalLM,
    world: World,
    vocabulary: list[str],
    tokenizer: Tokenizer,
    plan: Plan,
    seed: int,
) -> float:
    """Mean loss on documents of another random stream."""
    text = batches(world, vocabulary, tokenizer, plan, random.Random(f"held out {seed}"))
    losses = [loss_of(model, ids).item() for ids in islice(text, plan.held_out_batches)]
    return sum(losses) / len(losses)
