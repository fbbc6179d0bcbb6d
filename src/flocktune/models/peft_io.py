"""PEFT adapter folders, read and written: adapter_config.json and adapter_model.safetensors. Never pickle.

PEFT writes ``base_model.model.<module path>.lora_A.weight`` where we write ``<module path>.lora_A``;
the factors have the same orientation, for Conv1D too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from flocktune.config.schema import LoraConfig
from flocktune.errors import Problem, UserError
from flocktune.files import read_json, write_atomic, write_json
from flocktune.models.lora import A_SUFFIX, B_SUFFIX, SIDE_A, SIDE_B, bare_modules, ends_with, pairs
from flocktune.models.lora_module import scale
from flocktune.types import Tensors

CONFIG_FILE, WEIGHTS_FILE, PICKLED_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.(?P<factor>lora_[AB])\.weight")

IN_LAYER = re.compile(r"(?P<stack>.*?)\.(?P<layer>\d+)\.(?P<rest>.+)")

UNDERSTOOD = frozenset(
    ("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "fan_in_fan_out")
)
"""Keys of adapter_config.json that we read, or that follow from the base model."""

HARMLESS = frozenset(
    (
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "auto_mapping",
        "megatron_core",
        "qalora_group_size",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "ensure_weight_tying",
    )
)
"""Keys that do not change what given factors mean: labels, settings of switched-off features, choices of modules."""

PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the base as it is. PiSSA, OLoRA, LoftQ and others change it on loading."""


def export_peft(
    tensors: Tensors, lora: LoraConfig, model_or_names: nn.Module | Iterable[str], folder: Path, base_name: str
) -> None:
    """Write factors as an adapter folder that ``PeftModel.from_pretrained(base, folder)`` and vLLM read.

    ``model_or_names``: the base (with or without our adapter), or the names of all its modules; it
    decides how short target_modules can be. ``base_name`` is written as base_model_name_or_path. A side
    adapter is :func:`folded` into the factors.
    Each file appears whole or not at all, the configuration last. Raises ValueError when a factor's
    rank is not the recipe's: PEFT would scale it otherwise.
    """
    tensors, lora = folded(tensors, lora)
    modules = pairs(tensors)
    ranks = {name: factor_a.shape[0] for name, (factor_a, _) in modules.items() if factor_a.shape[0] != lora.rank}
    if ranks:
        raise ValueError(f"expected rank {lora.rank} everywhere, got {ranks}")
    base = bare_modules(model_or_names) if isinstance(model_or_names, nn.Module) else dict.fromkeys(model_or_names)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        **_chosen_modules(modules, base),
        "fan_in_fan_out": all(isinstance(base.get(name), Conv1D) for name in modules),
        "bias": "none",
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    renamed = {
        f"base_model.model.{name}.lora_{factor}.weight": value.detach().float().contiguous()
        for name, both in modules.items()
        for factor, value in zip("AB", both, strict=True)
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / WEIGHTS_FILE, save(renamed, metadata={"format": "pt"}))
    write_json(folder / CONFIG_FILE, config)


def import_peft(folder: Path) -> tuple[dict[str, Tensor], LoraConfig]:
    """Canonical float32 factors, and the settings they were trained with, from a PEFT adapter folder.

    Raises UserError that names every feature we do not support (DoRA, biases, saved modules, rank
    patterns, starts that change the base, ...) and every missing or damaged file.
    """
    if not (folder / WEIGHTS_FILE).is_file() and (folder / PICKLED_FILE).is_file():
        raise UserError(
            Problem(
                str(folder),
                WEIGHTS_FILE,
                f"{PICKLED_FILE}, pickled and therefore not read",
                "Save the adapter again with safe_serialization=True.",
            )
        )
    config = read_json(folder / CONFIG_FILE)
    UserError.raise_all(_config_problems(folder / CONFIG_FILE, config))
    try:
        stored = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(Problem(str(folder / WEIGHTS_FILE), "a whole safetensors file", str(error))) from None
    matches = {name: FACTOR.fullmatch(name) for name in stored}
    UserError.raise_all(
        Problem(
            str(folder / WEIGHTS_FILE),
            "factors lora_A and lora_B of linear modules",
            repr(name),
            "Its feature is not supported.",
        )
        for name, match in matches.items()
        if match is None
    )
    tensors = {
        f"{match['module']}.{match['factor']}": stored[name].to(torch.float32)
        for name, match in sorted(matches.items())
        if match is not None
    }
    return tensors, _settings(folder / WEIGHTS_FILE, config, tensors)


def folded(tensors: Tensors, lora: LoraConfig) -> tuple[Tensors, LoraConfig]:
    """Factors with a side adapter as factors alone, for PEFT and vLLM: of one larger rank, with the same scale.

    ``s B A + side_B side_A = s [B, side_B / s] [A; side_A]``. Directions that change nothing are left out; modules that
    have fewer than others get zeros, since one rank is what readers of adapters know.
    """
    sides = {name: value for name, value in tensors.items() if name.endswith((SIDE_A, SIDE_B))}
    factors = {name: value for name, value in tensors.items() if name not in sides}
    if not any(value.numel() for value in sides.values()):
        return factors, lora
    stacked: dict[str, tuple[Tensor, Tensor]] = {}
    for name, (a, b) in pairs(factors).items():
        a, b = torch.cat([a, sides[name + SIDE_A]]), torch.cat([b, sides[name + SIDE_B] / scale(lora)], dim=1)
        used = a.any(dim=1) & b.any(dim=0)
        stacked[name] = a[used], b[:, used]
    rank = max([lora.rank, *(len(a) for a, _ in stacked.values())])
    filled: dict[str, Tensor] = {}
    for name, (a, b) in stacked.items():
        room = rank - len(a)
        filled |= {name + A_SUFFIX: F.pad(a, (0, 0, 0, room)), name + B_SUFFIX: F.pad(b, (0, room))}
    return filled, replace(lora, rank=rank, alpha=scale(lora) * (math.sqrt(rank) if lora.rslora else rank))


def unfolded(tensors: Tensors, lora: LoraConfig, rank: int) -> Tensors:
    """Factors of ``lora.rank`` as factors of a lower ``rank`` and a side adapter with the rest; else as they are."""
    if lora.rank <= rank:
        return tensors
    found: dict[str, Tensor] = {}
    for name, (a, b) in pairs(tensors).items():
        found |= {name + A_SUFFIX: a[:rank], name + B_SUFFIX: b[:, :rank]}
        found |= {name + SIDE_A: a[rank:], name + SIDE_B: scale(lora) * b[:, rank:]}
    return found


def _chosen_modules(adapted: Iterable[str], all_modules: Iterable[str]) -> dict[str, Any]:
    """How PEFT finds ``adapted``: by endings alone, or in some layers only by endings and numbers of layers."""
    names = list(adapted)
    found = [IN_LAYER.fullmatch(name) for name in names]
    within = {(match["stack"], match["rest"]) for match in found if match}
    layers = sorted({int(match["layer"]) for match in found if match})
    same_everywhere = len({stack for stack, _ in within}) == 1 and len(within) * len(layers) == len(names)
    others = [name for name in all_modules if not (match := IN_LAYER.fullmatch(name)) or int(match["layer"]) in layers]
    if not same_everywhere or len(others) == len(list(all_modules)):
        return {"target_modules": shortest_endings(names, all_modules)}
    return {"target_modules": shortest_endings(names, others), "layers_to_transform": layers}


def shortest_endings(adapted: Iterable[str], all_modules: Iterable[str]) -> list[str]:
    """The shortest name endings that PEFT matches to ``adapted`` and to no other module of the base."""
    wanted, names = set(adapted), set(all_modules)
    endings: set[str] = set()
    for name in sorted(wanted):
        parts = name.split(".")
        candidates = (".".join(parts[start:]) for start in range(len(parts) - 1, 0, -1))
        exact = (end for end in candidates if all(other in wanted for other in names if ends_with(other, end)))
        endings.add(next(exact, name))
    return sorted(endings)


def _config_problems(file: Path, config: Mapping[str, Any]) -> Iterator[Problem]:
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        got = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        yield Problem(str(file), "peft_type LORA", str(got))
        return
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float):
            yield Problem(str(file), f"a number {key}", repr(config.get(key)))
    if config.get("init_lora_weights", True) not in PLAIN_STARTS:
        yield Problem(
            str(file),
            "init_lora_weights that leaves the base as it is",
            repr(config["init_lora_weights"]),
            "Convert it to plain LoRA with PEFT (path_initial_model_for_weight_conversion).",
        )
    if config.get("bias", "none") != "none":
        yield Problem(str(file), "bias: none", repr(config["bias"]), "Trained biases are not supported.")
    for key in sorted(config.keys() - UNDERSTOOD - HARMLESS - {"init_lora_weights", "bias"}):
        if config[key]:
            yield Problem(str(file), f"an adapter without {key}", repr(config[key]), "This feature is not supported.")


def _settings(file: Path, config: Mapping[str, Any], tensors: Tensors) -> LoraConfig:
    """The recipe's settings. Targets are PEFT's name endings, or full module paths where it chose in other ways."""
    rank = int(config["r"])
    try:
        modules = pairs(tensors)
    except ValueError as error:
        raise UserError(Problem(str(file), "both factors of each module", str(error))) from None
    if not modules or any(a.shape[0] != rank or b.shape[1] != rank for a, b in modules.values()):
        raise UserError(Problem(str(file), f"factors of rank {rank}, as adapter_config.json says", "none or others"))
    listed, chosen_otherwise = config.get("target_modules"), ("exclude_modules", "layers_to_transform")
    if isinstance(listed, list) and not any(config.get(key) for key in chosen_otherwise):
        targets = sorted(end for end in listed if any(ends_with(name, end) for name in modules))
    else:
        targets = list(modules)
    return LoraConfig(
        rank=rank,
        alpha=float(config["lora_alpha"]),
        dropout=float(config.get("lora_dropout", 0.0)),
        rslora=bool(config.get("use_rslora", False)),
        targets=tuple(targets),
    )
