"""A model with LoRA, PEFT's or ours, as the same thing: what is trained of it, and its state by names."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from flocktune.config.schema import LoraConfig
from flocktune.models.lora import Adapter, pairs
from flocktune.types import Tensors


@dataclass(frozen=True, eq=False)
class Network:
    """A resident model with an adapter, PEFT's or ours: its trained parameters, and its state read and written."""

    model: Any
    trained: Sequence[nn.Parameter]
    read: Callable[[], Mapping[str, Tensor]]
    write: Callable[[Mapping[str, Tensor]], object]


def own_network(adapter: Adapter) -> Network:
    """The model our adapter is attached to."""
    return Network(adapter.model, list(adapter.parameters.values()), adapter.tensors, adapter.load)


def peft_network(base: nn.Module, lora: LoraConfig, start: Tensors) -> Network:
    """PEFT's LoRA on the modules that ``start`` has factors for."""
    alpha: Any = lora.alpha  # PEFT says int, and takes any number
    settings = PeftLoraConfig(
        r=lora.rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=list(pairs(start)), task_type="CAUSAL_LM"
    )
    model: Any = get_peft_model(base, settings)
    model.config.use_cache = False
    return Network(
        model,
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lambda: {name: value.detach().clone() for name, value in get_peft_model_state_dict(model).items()},
        lambda state: set_peft_model_state_dict(model, dict(state)),
    )


def peft_names(tensors: Tensors) -> dict[str, Tensor]:
    """Our factors under PEFT's names."""
    return {f"base_model.model.{name}.weight": value for name, value in tensors.items()}


def own_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`peft_names`."""
    return {name.removeprefix("base_model.model.").removesuffix(".weight"): value for name, value in state.items()}


def sharing(model: Any) -> Any:
    """A copy of the modules with the same weights."""
    return copy.deepcopy(model, {id(value): value for value in (*model.parameters(), *model.buffers())})


def frozen_base(model: Any, targets: Sequence[str]) -> Any:
    """A frozen model whose backward pass reaches as far down as with LoRA on ``targets``, and trains nothing.

    LoRA wants the gradient of every target's output; of what goes into the first ones nobody does.
    """

    def wanted(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_(True)

    for name in targets:
        model.get_submodule(name).register_forward_hook(wanted)
    return model
