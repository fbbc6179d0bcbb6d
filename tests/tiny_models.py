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
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from flocktune.config.schema import LoraConfig
from flocktune.models.lora import pairs

FAMILIES = ("llama", "qwen2", "gpt2", "gemma", "gemma2")
"""Rotary and grouped heads; biased projections; fused Conv1D; tied and scaled embeddings; soft-capped logits."""

SLIDING, FULL = "sliding_attention", "full_attention"
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3},
    "qwen3": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3},
    "gemma2": {"sliding_window": 5},
    "gemma3": {"sliding_window": 5, "layer_types": [SLIDING, FULL, SLIDING, SLIDING, FULL, SLIDING]},
    "gpt2": {},
    "opt": {"word_embed_proj_dim": 16},
    "gpt_neo": {},
    "gpt_neox": {},
    "phi": {},
}
"""Families of models to leave layers out of, and how each of 6 layers is made: windows are shorter than a test's rows,
and layers of one kind do not simply lie below those of the other."""

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


def tiny_config(family: str, *, layers: int = 2, **changes: Any) -> PreTrainedConfig:
    """The settings of a tiny model: 2 layers, 32 wide, 4 heads, a vocabulary of 260."""
    common = {"vocab_size": 260, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    if family == "gpt2":
        return GPT2Config(**{**common, "n_layer": layers, "n_embd": 32, "n_head": 4, "n_positions": 256, **changes})
    if family == "gpt_neo":
        kinds_of_layers = {"attention_types": [[["global", "local"], layers // 2]], "window_size": 5}
        common |= {"num_layers": layers, "num_heads": 4, "hidden_size": 32, "max_position_embeddings": 256}
        return GPTNeoConfig(**{**common, **kinds_of_layers, **changes})
    shape = {
        "num_hidden_layers": layers,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    if family in ("gemma", "gemma2", "gemma3", "qwen3", "qwen3_moe"):
        shape["head_dim"] = 8
    if family == "gemma2":
        # A low cap, so that a test sees when it is left out.
        common["final_logit_softcapping"] = 1.5
    if family == "granite":
        common["logits_scaling"] = 3.0
    if family == "opt":
        shape["ffn_dim"] = shape.pop("intermediate_size")
        del shape["num_key_value_heads"]
    if family == "gpt_neox":
        del shape["num_key_value_heads"]
    if family == "qwen3_moe":
        shape |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    if family == "mixtral":
        shape |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    kinds: dict[str, type[PreTrainedConfig]] = {
        "llama": LlamaConfig,
        "mistral": MistralConfig,
        "mixtral": MixtralConfig,
        "qwen2": Qwen2Config,
        "qwen3": Qwen3Config,
        "qwen3_moe": Qwen3MoeConfig,
        "gemma": GemmaConfig,
        "gemma2": Gemma2Config,
        "gemma3": Gemma3TextConfig,
        "opt": OPTConfig,
        "gpt_neox": GPTNeoXConfig,
        "phi": PhiConfig,
        "granite": GraniteConfig,
        "cohere": CohereConfig,
    }
    return kinds[family](**{**common, **shape, **changes})


def tiny_decoder(family: str) -> PreTrainedModel:
    """A tiny model of 6 layers, as :data:`DECODERS` has it."""
    return tiny_model(family, layers=6, **DECODERS[family])


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
