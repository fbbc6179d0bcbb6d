"""The frozen base and its tokenizer, from a folder or the hub. Never pickle; remote code only when asked for."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from flocktune.assets import embedded_model
from flocktune.config.schema import EMBEDDED, ModelConfig
from flocktune.errors import Problem, UserError
from flocktune.files import read_json, sha256_file
from flocktune.models.int8 import quantize_linears
from flocktune.models.known import HUB_ID, stand_in
from flocktune.models.recompute import checkpoint_layers
from flocktune.models.row_attention import attend_by_rows

MODEL_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template.*",
)
LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)
"""What the libraries raise when files are missing, damaged, or do not belong together."""


@dataclass(frozen=True)
class Description:
    """A base model's size, known without its weights. ``base_bytes``: its weights as the recipe loads them."""

    family: str
    parameters: int
    base_bytes: int
    layers: int
    width: int
    vocabulary: int
    positions: int | None


def pick_device(name: str) -> torch.device:
    """``auto`` (a GPU when there is one) or a torch device name. Raises UserError when it is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(Problem("runtime.device", "auto, cpu, cuda, cuda:0, ...", repr(name))) from None
    present = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    count = present.get(device.type, 0)
    if (device.index or 0) >= count:
        raise UserError(
            Problem(
                "runtime.device", "a device that is here", f"{name!r} (of its kind here: {count})", "Use auto or cpu."
            )
        )
    return device


def resolve_model(path: str) -> str | Path:
    """The folder that holds a model, or a hub id ``owner/name``.

    Raises UserError that names everything missing: the folder, config.json, weights, shards.
    """
    folder = embedded_model() if path == EMBEDDED else Path(path).expanduser()
    if folder.is_dir():
        UserError.raise_all(_folder_problems(folder))
        return folder
    if path != EMBEDDED and HUB_ID.fullmatch(path):
        return path
    raise UserError(
        Problem(
            "model.path",
            "a model folder or a hub id owner/name",
            f"{str(folder)!r}, which is neither",
            "Check the path.",
        )
    )


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that lies with the model. Raises UserError."""
    with _loading(config, "a tokenizer") as (source, options):
        return AutoTokenizer.from_pretrained(source, **options)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills rows up: the pad token, else the end token. It is never trained on nor attended to."""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if found is None:
        raise UserError(
            Problem(
                "model.path",
                "a tokenizer with a pad or an end token",
                "neither",
                "Set eos_token in tokenizer_config.json.",
            )
        )
    return int(found)


def load_model(config: ModelConfig, device: torch.device, *, stored_dtype: bool = False) -> PreTrainedModel:
    """The base on ``device``: frozen, in eval mode, every weight from the files, in the recipe's dtype or the files'.

    Raises UserError when files are missing or damaged, or quantisation is not possible here.
    """
    quantized: dict[str, Any] = {}
    if config.quantization != "none" and (settings := quantization_settings(config, device)):
        quantized = {"quantization_config": settings, "device_map": {"": device}}
    with _loading(config, "a causal language model's weights") as (source, options):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype="auto" if stored_dtype else getattr(torch, config.dtype),
            use_safetensors=True,
            output_loading_info=True,
            **quantized,
            **options,
        )
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        got = f"none for {missing[0]} ({len(missing)} in all)"
        raise UserError(
            Problem(
                "model.path",
                "weights for every parameter",
                got,
                f"The files of {config.path!r} are not whole or not of this architecture.",
            )
        )
    model = model if quantized else model.to(device)
    if config.quantization != "none" and not quantized:
        quantize_linears(model, model.get_output_embeddings())
    model.eval().requires_grad_(False)
    with quietly():
        attend_by_rows(model)
    if config.gradient_checkpointing is True:  # auto is decided where the rows are known
        checkpoint_layers(model)
    return model


def load_skeleton(config: ModelConfig) -> PreTrainedModel:
    """The model's modules on the meta device: shapes and names; no weights are read, no memory is used.

    Shapes that are known stand in for a hub model that is not on this machine.
    """
    with _settings(config) as settings, torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            settings, dtype=getattr(torch, config.dtype), trust_remote_code=config.trust_remote_code
        )
    return model.eval().requires_grad_(False)


def stored_dtype(config: ModelConfig) -> torch.dtype:
    """In which type of number the files hold the weights, as config.json says; float32 when it does not."""
    with _settings(config) as settings:
        stored = settings.get_text_config().dtype or torch.float32
        return getattr(torch, stored) if isinstance(stored, str) else stored


def describe(config: ModelConfig, skeleton: PreTrainedModel | None = None) -> Description:
    """Parameter counts and shapes without the weights. Tied weights count once."""
    model = skeleton if skeleton is not None else load_skeleton(config)
    text = model.config.get_text_config()
    return Description(
        family=str(model.config.model_type),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        base_bytes=_base_bytes(model, config),
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        vocabulary=text.vocab_size,
        positions=getattr(text, "max_position_embeddings", None),
    )


def model_digest(config: ModelConfig) -> str:
    """Hex SHA-256 over config.json, weights and tokenizer files: equal bytes, equal digest, wherever they lie.

    A hub id is looked up in the local cache, and downloaded when it is not there.
    """
    patterns = [*MODEL_FILES, *TOKENIZER_FILES, *(["*.py"] if config.trust_remote_code else [])]
    digest = hashlib.sha256()
    with _loading(config, "the model's files") as (source, options):
        folder = Path(source) if options["local_files_only"] else _snapshot(source, patterns)
        files = {file.name: file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
        for name in sorted(files):
            digest.update(f"{name}\0{sha256_file(files[name])}\n".encode())
    return digest.hexdigest()


def _folder_problems(folder: Path) -> Iterator[Problem]:
    if not (folder / "config.json").is_file():
        yield Problem("model.path", f"config.json in {folder}", "nothing there", "Save the model with save_pretrained.")
    weights = {file.name for file in folder.glob("*.safetensors")}
    for index in folder.glob("*.safetensors.index.json"):
        absent = sorted(set(read_json(index)["weight_map"].values()) - weights)
        if absent:
            yield Problem("model.path", f"the shards that {index} names", f"no {', '.join(absent)}", "Copy them there.")
    if not weights:
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        yield Problem(
            "model.path",
            f"weights (*.safetensors) in {folder}",
            f"{', '.join(pickled)}, pickled and therefore not read" if pickled else "none",
            "Convert them with save_pretrained." if pickled else "Copy model.safetensors there.",
        )


def _damaged(folder: Path) -> Iterator[Problem]:
    """Weight files whose header does not agree with their length: cut off, or not safetensors at all."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            yield Problem("model.path", f"a whole safetensors file {file}", str(error), "Copy it again.")


@contextmanager
def quietly() -> Iterator[None]:
    """Inside, transformers warns of nothing and draws no progress bars."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _loading(config: ModelConfig, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(source, options for from_pretrained), quietly; what the libraries raise becomes one UserError."""
    source = resolve_model(config.path)
    local = isinstance(source, Path)
    if isinstance(source, Path):
        UserError.raise_all(_damaged(source))
    try:
        with quietly():
            yield str(source), {"local_files_only": local, "trust_remote_code": config.trust_remote_code}
    except LOAD_ERRORS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        fix = "Copy the model again." if local else "Check the name and the network, or give a local folder."
        raise UserError(Problem("model.path", f"{what} in {str(source)!r}", reason, fix)) from error


@contextmanager
def _settings(config: ModelConfig) -> Iterator[PretrainedConfig]:
    """What config.json says, or would: of a hub model that is not here, what is known of it."""
    with _loading(config, "a causal language model's config.json") as (source, options):
        known = stand_in(config.path)
        yield known.settings() if known else AutoConfig.from_pretrained(source, **options)


def quantization_settings(config: ModelConfig, device: torch.device) -> BitsAndBytesConfig | None:
    """For bitsandbytes; None where 8 bits are our own (:mod:`int8`). Raises UserError where it is not possible."""
    if config.quantization == "8bit" and device.type == "cpu":
        return None
    problems = []
    if device.type != "cuda":
        problems.append(
            Problem(
                "model.quantization",
                f"none on {device.type}",
                config.quantization,
                "4bit needs an NVIDIA GPU (runtime.device: cuda), 8bit one or a CPU.",
            )
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        problems.append(
            Problem(
                "model.quantization",
                f"bitsandbytes for {config.quantization}",
                "not installed",
                "pip install 'flocktune[quantization]'",
            )
        )
    UserError.raise_all(problems)
    if config.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, config.dtype)
    )


def _base_bytes(model: PreTrainedModel, config: ModelConfig) -> int:
    """Linear weights but the head's are packed when quantised; the rest has the dtype of the recipe."""
    head = model.get_output_embeddings()
    linear = {module.weight for module in model.modules() if isinstance(module, nn.Linear) and module is not head}
    packed_bits = {"8bit": 8, "4bit": 4}.get(config.quantization)
    return sum(
        value.numel() * (packed_bits if packed_bits and value in linear else 8 * value.element_size()) // 8
        for value in model.parameters()
    )


def _snapshot(hub_id: str, patterns: list[str]) -> Path:
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns, local_files_only=True))
    except OSError:  # not in the cache
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
