"""LoRA attached to a frozen base (:mod:`flocktune.models.lora_module`): its factors by name, set, read and merged.

Only A [R, in] and B [out, R] are trained; R rank, in and out the width of a module's input and output.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from flocktune.config.schema import LoraConfig
from flocktune.errors import Problem, UserError
from flocktune.models.factors import fresh, side_like
from flocktune.models.factors import pairs as pairs
from flocktune.models.lora_module import LoraLinear, SharedInput, features, reading_alike
from flocktune.tensors import mismatches
from flocktune.types import A_SUFFIX, B_SUFFIX, Tensors
from flocktune.wire import SIDE_A, SIDE_B

ATTENTION_BLOCK = re.compile(r"attn|attention", re.IGNORECASE)
ATTENTION_ENDINGS = frozenset(
    ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "c_attn", "query_key_value", "Wqkv")
)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What an adapter's factors and side changes were at one time, as copies."""

    factors: Tensors
    sides: Mapping[str, tuple[Tensor, ...]]

    def differs(self, other: Snapshot, but: Container[str]) -> bool:
        """Whether anything is not the same in both, but for factors of names in ``but``."""
        mine, theirs = ({n: v for n, v in each.factors.items() if n not in but} for each in (self, other))
        if mine.keys() != theirs.keys() or self.sides.keys() != other.sides.keys():
            return True
        pairs = [(value, theirs[name]) for name, value in mine.items()]
        for name, side in self.sides.items():
            if len(side) != len(other.sides[name]):
                return True
            pairs += zip(side, other.sides[name], strict=True)
        return not all(one is another or torch.equal(one, another) for one, another in pairs)


@dataclass(frozen=True)
class Adapter:
    """The factors attached to a model. ``parameters`` are the live ones, in the order of the model's modules."""

    model: PreTrainedModel
    layers: Mapping[str, LoraLinear]
    parameters: dict[str, nn.Parameter]

    def tensors(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """A copy of all factors, or of ``names``: canonical name -> float32 on the CPU, contiguous."""
        return {
            name: self.parameters[name].detach().cpu().clone(memory_format=torch.contiguous_format)
            for name in (self.parameters if names is None else names)
        }

    @torch.no_grad()
    def load(self, tensors: Tensors) -> None:
        """Set every factor, and the side changes: a module that ``tensors`` has none for has none.

        Raises UserError naming each name, shape, dtype or value that does not fit.
        """
        sides = {name: value for name, value in tensors.items() if name.endswith((SIDE_A, SIDE_B))}
        factors = {name: value for name, value in tensors.items() if name not in sides}
        problems = mismatches(self.parameters, factors) + mismatches(side_like(self.parameters, sides), sides)
        UserError.raise_all(f"adapter: {problem}" for problem in problems)
        self.put(factors)
        for name, layer in self.layers.items():
            layer.side = _side(*(sides[name + end].to(layer.lora_A) for end in (SIDE_A, SIDE_B) if name + end in sides))

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Start as PEFT does: A uniform within 1/sqrt(in), B zero. A factor depends on seed and name alone."""
        for name, value in fresh(self.parameters, seed).items():
            self.parameters[name].copy_(value)
        for layer in self.layers.values():
            layer.side = ()

    def snapshot(self) -> Snapshot:
        """All factors as they are now, where they are, and side changes."""
        factors = {name: value.detach().clone() for name, value in self.parameters.items()}
        return Snapshot(factors, {name: layer.side for name, layer in self.layers.items() if layer.side})

    def restore(self, snapshot: Snapshot) -> None:
        """Be again as a snapshot says."""
        self.put(snapshot.factors)
        for name, layer in self.layers.items():
            layer.side = snapshot.sides.get(name, ())

    def forget_inputs(self) -> None:
        """Let go of what a forward pass that broke off has left in the modules."""
        for layer in self.layers.values():
            layer.beside.forget()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model answers as its base does."""
        before = [layer.enabled for layer in self.layers.values()]
        for layer in self.layers.values():
            layer.enabled = False
        try:
            yield
        finally:
            for layer, enabled in zip(self.layers.values(), before, strict=True):
                layer.enabled = enabled

    @contextmanager
    def holding(self, tensors: Tensors) -> Iterator[None]:
        """Inside, the factors named in ``tensors`` have these values and no dropout is on; afterwards all is as it was.

        For forward passes without gradients.
        """
        before = {name: self.parameters[name].detach().clone() for name in tensors}
        training = [layer.training for layer in self.layers.values()]
        self.put(tensors)
        for layer in self.layers.values():
            layer.training = False
        try:
            yield
        finally:
            self.put(before)
            for layer, was in zip(self.layers.values(), training, strict=True):
                layer.training = was

    @torch.no_grad()
    def put(self, tensors: Tensors) -> None:
        """Set the factors named in ``tensors``, of whose names and shapes the caller is sure."""
        for name, value in tensors.items():
            self.parameters[name].copy_(value)

    def detach(self) -> PreTrainedModel:
        """Give the model its own modules back: it is as it was before :func:`attach`."""
        for name, layer in self.layers.items():
            _replace(self.model, name, layer.base)
        return self.model

    def reattach(self) -> PreTrainedModel:
        """Put the factors beside the model's modules again, after :meth:`detach`."""
        for name, layer in self.layers.items():
            _replace(self.model, name, layer)
        return self.model

    @torch.no_grad()
    def merge(self) -> PreTrainedModel:
        """Write W + scale * B A + side (computed in float32) into the base's weights for good, then detach.

        Raises UserError for a quantised base, whose packed weights can not take it.
        """
        packed = [name for name, layer in self.layers.items() if not layer.weight.is_floating_point()]
        if packed:
            raise UserError(
                Problem(
                    "model.quantization",
                    "none, to merge an adapter",
                    f"packed weights in {packed[0]}",
                    "Load the model without quantisation and merge there.",
                )
            )
        for layer in self.layers.values():
            change = layer.scale * (layer.lora_B @ layer.lora_A)
            if layer.side:
                change = change + (layer.side[1] @ layer.side[0] if len(layer.side) == 2 else layer.side[0])
            layer.weight.copy_(layer.weight.float() + (change.t() if isinstance(layer.base, Conv1D) else change))
        return self.detach()


def attach(model: PreTrainedModel, lora: LoraConfig, *, seed: int) -> Adapter:
    """Freeze the model and put LoRA, started from ``seed``, beside its target modules.

    Raises UserError when a target does not exist, the rank is too large, or an adapter is there already.
    """
    if any(isinstance(module, LoraLinear) for module in model.modules()):
        raise UserError(Problem("model", "a model without an adapter", "one that has an adapter", "Detach it first."))
    layers = {name: LoraLinear(module, lora) for name, module in _targets(model, lora).items()}
    model.requires_grad_(False)
    for members in reading_alike(layers):
        shared = SharedInput(members)
        for member in members:
            member.beside = shared
    parameters: dict[str, nn.Parameter] = {}
    for name, layer in layers.items():
        _replace(model, name, layer)
        parameters |= {name + A_SUFFIX: layer.lora_A, name + B_SUFFIX: layer.lora_B}
    adapter = Adapter(model, layers, parameters)
    adapter.reset(seed)
    return adapter


def shapes(model: PreTrainedModel, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of each factor that :func:`attach` would make. Works on the meta device."""
    found: dict[str, tuple[int, ...]] = {}
    for name, module in _targets(model, lora).items():
        inputs, outputs = features(module)
        found |= {name + A_SUFFIX: (lora.rank, inputs), name + B_SUFFIX: (outputs, lora.rank)}
    return found


def bare_modules(model: nn.Module) -> dict[str, nn.Module]:
    """``model.named_modules()`` as they are without an adapter."""
    wrapped = [name for name, module in model.named_modules() if isinstance(module, LoraLinear)]
    own_name = {f"{name}.base": name for name in wrapped}
    return {own_name.get(name, name): module for name, module in model.named_modules() if name not in wrapped}


def ends_with(name: str, ending: str) -> bool:
    """Whether a module path ends with these whole parts of a path, as PEFT matches target modules."""
    return name == ending or name.endswith("." + ending)


def _targets(model: PreTrainedModel, lora: LoraConfig) -> dict[str, nn.Module]:
    """The linear modules that get factors, in module order. Never the head: its weight often is the embedding."""
    head = model.get_output_embeddings()
    linear: dict[str, nn.Module] = {
        name: module
        for name, module in bare_modules(model).items()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    if lora.targets == "all-linear":
        chosen = linear
    elif lora.targets == "attention":
        chosen = {name: module for name, module in linear.items() if _in_attention(name)}
    else:
        chosen = {name: module for name, module in linear.items() if any(ends_with(name, end) for end in lora.targets)}
    UserError.raise_all(_target_problems(linear, chosen, lora))
    return chosen


def _target_problems(
    linear: Mapping[str, nn.Module], chosen: Mapping[str, nn.Module], lora: LoraConfig
) -> Iterator[Problem]:
    endings = ", ".join(sorted({name.rpartition(".")[2] for name in linear})) or "no linear modules"
    if isinstance(lora.targets, str):
        if not chosen:
            yield Problem(
                "lora.targets",
                f"a model with modules for {lora.targets!r}",
                "none",
                f"It has {endings}: name some of them.",
            )
    else:
        for target in lora.targets:
            if not any(ends_with(name, target) for name in linear):
                yield Problem(
                    "lora.targets", "endings of linear modules' names", repr(target), f"This model has {endings}."
                )
    small = [name for name, module in chosen.items() if lora.rank > min(features(module))]
    if small:
        smallest = min(small, key=lambda name: min(features(chosen[name])))
        most = f"at most {min(features(chosen[smallest]))}, the smaller side of {smallest}"
        yield Problem("lora.rank", most, f"{lora.rank}, too large for {len(small)} of {len(chosen)} targets")


def _in_attention(name: str) -> bool:
    block, _, ending = name.rpartition(".")
    return bool(ATTENTION_BLOCK.search(block)) or ending in ATTENTION_ENDINGS


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _side(*factors: Tensor) -> tuple[Tensor, ...]:
    """(side_A, side_B) as a forward pass takes it: nothing, both, or their product where that is cheaper."""
    if not factors or not len(factors[0]):
        return ()
    a, b = factors
    return (b @ a,) if len(a) * (a.shape[1] + b.shape[0]) > a.shape[1] * b.shape[0] else (a, b)
