"""Tiny random models and a tokenizer for tests, in transformers' folder format.

The tokenizer is byte-level (no merges), so it is lossless for any text and needs no training.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from flocktune.config.schema import LoraConfig
from flocktune.models.lora import pairs

FAMILIES = ("llama", "qwen2", "gpt2", "gemma", "gemma2")
"""Rotary and grouped heads; biased projections; fused Conv1D; tied and scaled embeddings; soft-capped logits."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_tokenizer(*, pad: bool = True, chat: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: 3 special tokens (``<s>`` 0, ``</s>`` 1, ``<pad>`` 2) and 256 bytes, 259 ids."""
    special = ["<s>", "</s>", "<pad>"]
    vocabulary = {token: index for index, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>" if pad else None,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    """The settings of a tiny model: 2 layers, 32 wide, 4 heads, a vocabulary of 260."""
    common = {"vocab_size": 260, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    if family == "gpt2":
        return GPT2Config(**{**common, "n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 256, **changes})
    shape = {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    if family in ("gemma", "gemma2"):
        shape["head_dim"] = 8
    if family == "gemma2":
        # A low cap, so that a test sees when it is left out.
        common["final_logit_softcapping"] = 1.5
    kinds = {"llama": LlamaConfig, "qwen2": Qwen2Config, "gemma": GemmaConfig, "gemma2": Gemma2Config}
    return kinds[family](**{**common, **shape, **changes})


def tiny_model(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random float32 model in eval mode, its weights drawn wide enough that outputs differ clearly."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **changes))
        with torch.no_grad():
            for parameter in model.parameters():
                change = torch.randn_like(parameter)
                parameter.copy_(0.15 * change if parameter.dim() > 1 else parameter + 0.1 * change)
    return model.eval()


def save_tiny(folder: Path, family: str = "llama", *, seed: int = 0, pad: bool = True, chat: bool = False) -> Path:
    """Write a tiny model and tokenizer to ``folder`` and return it."""
    tiny_model(family, seed=seed).save_pretrained(folder)
    tiny_tokenizer(pad=pad, chat=chat).save_pretrained(folder)
    return folder


def fill(parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Give every factor random values, B too; return them."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in parameters.values():
            value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    return {name: value.detach().clone() for name, value in parameters.items()}


def peft_twin(family: str, lora: LoraConfig, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """The same base with PEFT's LoRA on the same modules, holding the same factors."""
    modules = list(pairs(tensors))
    import peft

    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        target_modules=modules,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it corrects fan_in_fan_out for Conv1D, and says so
        model = peft.get_peft_model(tiny_model(family), config).eval()
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in tensors.items():
            own[f"base_model.model.{name}.default.weight"].copy_(value)
    return model
