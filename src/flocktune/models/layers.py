"""Decoder layers by structure, for any causal language model of transformers: found, left out, run in two parts.

B batch, T tokens, D width of hidden states, N positions, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from flocktune.config.schema import LoraConfig
from flocktune.errors import Problem, UserError
from flocktune.models.lora import A_SUFFIX, shapes
from flocktune.models.split import SplitPlan

PLACE_NAMES = frozenset(("layer_idx", "layer_id"))
"""What modules of transformers call the place of their layer; it is where their keys and values lie in a cache."""


def layer_stack(model: PreTrainedModel) -> str:
    """The module path of the list of decoder layers, such as ``model.layers``. Raises UserError when there is none."""
    count = model.config.get_text_config().num_hidden_layers
    lists = {
        name: sum(value.numel() for value in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    if not lists:
        raise UserError(
            Problem("model.path", f"a model with a list of its {count} decoder layers", type(model).__name__)
        )
    return max(lists, key=lambda name: lists[name])


def layers_of(model: PreTrainedModel, stack: str) -> Sequence[nn.Module]:
    """The decoder layers, in order."""
    return model.get_submodule(stack)  # type: ignore[return-value]


def drop_layers(model: PreTrainedModel, plan: SplitPlan) -> PreTrainedModel:
    """Leave out what the plan drops, in place: layers, their numbers in caches, and the configuration's lists.

    What then runs, caches and generates is a normal model of fewer layers. Raises UserError when the model has not
    the plan's number of layers.
    """
    parent, _, child = plan.stack.rpartition(".")
    layers = layers_of(model, plan.stack)
    if len(layers) != plan.layers:
        raise UserError(Problem("emulator", f"a model of {plan.layers} layers", f"one of {len(layers)}"))
    kept = nn.ModuleList(layers[index] for index in plan.held)
    for place, layer in enumerate(kept):
        for module in layer.modules():
            for name in PLACE_NAMES & vars(module).keys():
                setattr(module, name, place)
    setattr(model.get_submodule(parent), child, kept)
    config = model.config.get_text_config()
    for name, value in list(vars(config).items()):
        if "layer" in name and isinstance(value, list | tuple) and len(value) == plan.layers:  # such as layer_types
            setattr(config, name, [value[index] for index in plan.held])
    config.num_hidden_layers = len(kept)
    return model


def lora_within(model: PreTrainedModel, lora: LoraConfig, stack: str, layers: Sequence[int]) -> LoraConfig:
    """The same settings for these decoder layers alone: targets become full module paths. Works on the meta device.

    Raises UserError when a target does not exist, or none is in these layers.
    """
    starts = tuple(f"{stack}.{index}." for index in layers)
    modules = [name.removesuffix(A_SUFFIX) for name in shapes(model, lora) if name.endswith(A_SUFFIX)]
    within = tuple(name for name in modules if name.startswith(starts))
    if not within:
        some = f"modules of decoder layers {', '.join(map(str, layers))}"
        raise UserError(Problem("lora.targets", some, f"{lora.targets!r}, which names none there"))
    return replace(lora, targets=within)


class _Reached(Exception):
    """Everything that was wanted of a forward pass is there."""


@contextmanager
def _hooked(modules: Mapping[str, nn.Module], hook: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """``hook(name, x)`` sees the first input of each module, and may give another one in its place."""

    def of(name: str) -> Callable[..., Any]:
        def pre(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            other = hook(name, x)
            if other is None:
                return None
            return ((other, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": other})

        return pre

    with ExitStack() as stack:
        for name, module in modules.items():
            handle = module.register_forward_pre_hook(of(name), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def hidden_states(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor | None, modules: Sequence[nn.Module]
) -> list[Tensor]:
    """What goes into each of ``modules`` in one forward pass, [B, T, D]; nothing above the last of them is computed."""
    found: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> None:
        found[name] = x
        if len(found) == len(modules):
            raise _Reached

    with _hooked({str(place): module for place, module in enumerate(modules)}, keep), suppress(_Reached):
        model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    return [found[str(place)] for place in range(len(modules))]


class _Pass(nn.Module):
    """Stands for a layer that has been computed already; nothing looks into what it hands on.

    [B, T, D] -> [1, B, T, D], and that stays: so it serves models that take what a layer returns, and those that take
    the first of it, for their layers return tuples.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states.unsqueeze(0) if hidden_states.dim() == 3 else hidden_states


@contextmanager
def starting_from(model: PreTrainedModel, stack: str, layer: int, hidden: Tensor) -> Iterator[None]:
    """Inside, a forward pass computes decoder layers ``layer`` and above only, from ``hidden`` [B, T, D].

    Masks, positions, final norm and head are the model's own; the layers below stand still. A model whose layers do
    not simply hand hidden states on is not for this.
    """
    layers: Any = layers_of(model, stack)
    below = list(layers[:layer])
    for place in range(layer):
        layers[place] = _Pass()
    try:
        with _hooked({"first": layers[layer]}, lambda _, x: hidden):
            yield
    finally:
        for place, module in enumerate(below):
            layers[place] = module


@dataclass
class _Normed(BaseModelOutputWithPast):
    """What a decoder returns; all that heads may ask of it beyond this, as router logits, is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def head_logits(model: PreTrainedModel, stack: str, normed: Tensor) -> Tensor:
    """[N, D] that would go into the head -> [N, V] logits, with all that the model does to them (soft caps, scales)."""
    decoder: Any = model.get_submodule(stack.rpartition(".")[0])
    patched = vars(decoder).get("forward")  # by others: hooks of accelerate
    decoder.forward = lambda *args, **kwargs: _Normed(last_hidden_state=normed.unsqueeze(0))
    try:
        ids = torch.zeros(1, normed.shape[0], dtype=torch.long, device=normed.device)
        return model(input_ids=ids, use_cache=False).logits.squeeze(0)
    finally:
        del decoder.forward
        if patched is not None:
            decoder.forward = patched


@torch.no_grad()
def block_influence(model: PreTrainedModel, stack: str, batches: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """How much each layer changes the hidden states: 1 - mean cosine of what goes in and what comes out.

    ``batches``: (input_ids [B, T], flat positions [N] that count). Source: ShortGPT, arXiv 2403.03853, equation 1.
    """
    layers = layers_of(model, stack)
    totals, count = torch.zeros(len(layers), dtype=torch.float64), 0
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        for input_ids, positions in batches:
            outputs.clear()
            into = hidden_states(model, input_ids, None, [*layers, model.get_output_embeddings()])[:-1]
            for index, (before, after) in enumerate(zip(into, outputs, strict=True)):
                x, y = (states.flatten(0, 1)[positions].float() for states in (before, after))
                totals[index] += F.cosine_similarity(x, y, dim=-1).double().sum().cpu()
            count += len(positions)
    finally:
        for handle in handles:
            handle.remove()
    return [1.0 - float(total) / max(1, count) for total in totals]
