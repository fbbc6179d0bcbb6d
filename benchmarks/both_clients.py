"""A client of FedIT and a client of FedBiOT on the same rows, and a bare loop over what the latter can not do without.

Models are random and Llama-shaped; half of the layers below the last two are left out of the emulator.

Shapes: B rows, T tokens, N label positions, D width, R rank.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from flocktune.algorithms import fedavg, fedbiot
from flocktune.algorithms.local import ClientData, training_only
from flocktune.config.schema import EmulatorConfig, LocalConfig, ModelConfig, RunConfig
from flocktune.data.batching import Batch, training_batches
from flocktune.data.encoding import Encoded
from flocktune.emulation import Emulated, compress, load_emulator
from flocktune.interfaces import ClientHalf
from flocktune.models.bundle import read_bundle
from flocktune.models.layers import hidden_states, layers_of
from flocktune.models.load import load_tokenizer, quietly
from flocktune.models.lora import B_SUFFIX, Adapter
from flocktune.resident import Base, load_base
from flocktune.seeds import derive_seed
from flocktune.tensors import group
from flocktune.types import ClientTask, Tensors

EMULATOR = EmulatorConfig(adapter_layers=2, drop=0.5)


@dataclass(frozen=True)
class Shape:
    """A model, and a client's rows: ``steps`` batches of ``rows`` rows of ``tokens`` tokens, half of them targets."""

    layers: int
    width: int = 256
    inner: int = 688
    vocabulary: int = 2048
    rows: int = 8
    tokens: int = 64
    steps: int = 3
    epochs: int = 3


TINY = Shape(6, width=32, inner=48, vocabulary=260, rows=2, tokens=16, steps=2, epochs=2)


@dataclass(frozen=True, eq=False)
class Pair:
    """Both clients' models of one shape, loaded."""

    shape: Shape
    full: Base
    emulated: Emulated

    @property
    def held(self) -> Adapter:
        """The emulator with E and A."""
        return self.emulated.base.adapter


@dataclass
class Watch:
    """Seconds that each batch was in use, until the next one was asked for."""

    seconds: list[float] = field(default_factory=list)

    def over(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches."""
        for batch in batches:
            started = now()
            yield batch
            self.seconds.append(now() - started)


def make(shape: Shape, folder: Path, tokenizer: str) -> None:
    """Write a random model to ``folder/full`` and its emulator's bundle to ``folder/emulator``."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=shape.vocabulary,
    )
    with quietly():
        LlamaForCausalLM(config).save_pretrained(folder / "full")
        load_tokenizer(ModelConfig(tokenizer)).save_pretrained(folder / "full")
    compress(recipe(folder), folder / "emulator")


def recipe(folder: Path) -> RunConfig:
    """LoRA of rank 8 on all linear layers; float32; on a GPU when there is one."""
    return RunConfig(model=ModelConfig(str(folder / "full")), emulator=EMULATOR)


def load_full(folder: Path) -> Base:
    """What a client of FedIT holds."""
    config = recipe(folder)
    return load_base(config.model, config.lora, config.runtime.device)


def load_held(folder: Path) -> Emulated:
    """What a client of FedBiOT holds."""
    return load_emulator(recipe(folder), read_bundle(folder / "emulator"))


def fedit_client(base: Base, shape: Shape, watch: Watch) -> ClientHalf:
    """One epoch is enough: all are alike."""
    local = replace(_local(shape), epochs=1)
    return fedavg.client_half(base.adapter, lambda _: data_of(shape, watch), local, "examples", rounds=1)


def fedbiot_client(held: Emulated, shape: Shape, watch: Watch) -> ClientHalf:
    """The first epoch fills the cache, the others read it."""
    bundle, data = held.bundle, data_of(shape, watch)
    return fedbiot.client_half(
        held.base.adapter, bundle.plan, bundle.digest, lambda _: data, _local(shape), EMULATOR, "examples", rounds=1
    )


def fedit_task(base: Base) -> ClientTask:
    """A task of the first round."""
    return ClientTask(0, "client", fedavg.KIND, _drawn(base.adapter), 0, "")


def fedbiot_task(held: Emulated) -> ClientTask:
    """A task of the first round: E and A."""
    parts = fedbiot.split_tensors(held.bundle.plan, _drawn(held.base.adapter))
    tensors = fedbiot.joined(parts)
    return ClientTask(0, "client", fedbiot.KIND, tensors, 0, "", held.bundle.digest)


def _drawn(adapter: Adapter) -> Tensors:
    """Random factors, B too: with B = 0 gradients of A are nothing but rounding, which AdamW makes as large as any."""
    generator = torch.Generator().manual_seed(0)
    adapter.reset(0)
    return {
        name: 0.02 * torch.randn(value.shape, generator=generator) if name.endswith(B_SUFFIX) else value
        for name, value in adapter.tensors().items()
    }


def bare_loop(pair: Pair, watch: Watch) -> Tensors:
    """The steps of FedBiOT's client from hidden states that are there already; returns the change of A.

    No cache, no hooks, no checks: two decoder layers, norm, head at the labels, loss, gradients, clipping, AdamW.
    """
    plan, adapter, shape = pair.emulated.bundle.plan, pair.held, pair.shape
    task, model, local = fedbiot_task(pair.emulated), pair.emulated.base.model, _local(shape)
    start = group(task.tensors, fedbiot.ADAPTER)
    adapter.load({**group(task.tensors, fedbiot.EMULATOR), **start})
    own: Any = list(layers_of(model, plan.stack))[plan.frozen :]
    drawn = data_of(shape, Watch()).batches(derive_seed(task.seed, "batches"), None, shape.epochs)
    batches = [batch.to(pair.full.device) for batch in drawn]
    with torch.no_grad():
        into = [hidden_states(model, batch.input_ids, None, own[:1])[0] for batch in batches]  # [B, T, D] each
        angles = model.model.rotary_emb(into[0], torch.arange(shape.tokens, device=into[0].device)[None])
    with training_only(adapter, start) as chosen:
        trained = list(chosen.values())
        optimizer = torch.optim.AdamW(trained, lr=local.lr, weight_decay=local.weight_decay, fused=True)
        for batch, states in zip(watch.over(batches), into, strict=True):
            hidden = states
            for layer in own:
                hidden = layer(hidden, attention_mask=None, position_embeddings=angles)
            at_labels = model.model.norm(hidden).flatten(0, 1).index_select(0, batch.label_index)  # [N, D]
            nats = F.cross_entropy(model.lm_head(at_labels).float(), batch.targets, reduction="sum")
            (nats / len(batch.targets)).backward()
            torch.nn.utils.clip_grad_norm_(trained, local.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    now_there = adapter.tensors()
    return {name: now_there[name] - value for name, value in start.items()}


def now() -> float:
    """Seconds, when all that was asked of a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def data_of(shape: Shape, watch: Watch) -> ClientData:
    """Random tokens, rows of one length; the second half of each is its answer."""
    count = shape.rows * shape.steps
    tokens = np.random.default_rng(0).integers(3, shape.vocabulary, count * shape.tokens).astype(np.int32)
    trainable = np.tile(np.arange(shape.tokens) >= shape.tokens // 2, count)
    encoded = Encoded(tokens, trainable, np.arange(count + 1, dtype=np.int64) * shape.tokens)
    return watched_data(encoded, shape.rows, watch)


def watched_data(encoded: Encoded, size: int, watch: Watch) -> ClientData:
    """A client of all these rows, whose padded batches of ``size`` go by ``watch``."""

    def batches(seed: int, steps: int | None, epochs: int | None) -> Iterator[Batch]:
        drawn = training_batches(
            encoded,
            range(len(encoded)),
            batch_size=size,
            batching="padded",
            pad_id=0,
            seed=seed,
            steps=steps,
            epochs=epochs,
        )
        return watch.over(drawn)

    return ClientData(len(encoded), int(encoded.targets.sum()), batches)


def _local(shape: Shape) -> LocalConfig:
    return LocalConfig(epochs=shape.epochs, batch_size=shape.rows)
