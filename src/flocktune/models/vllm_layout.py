"""What vLLM asks of an adapter's folder, checked without vLLM.

As vLLM 0.33 has it (``vllm/lora/peft_helper.py``, ``lora_model.py``, ``config/lora.py``): a plain LoRA in
adapter_config.json, and a safetensors file whose names, not ``target_modules`` or ``layers_to_transform``, say which
modules of which layers are adapted. vLLM itself is never imported here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from flocktune.errors import Problem
from flocktune.files import read_json
from flocktune.models.peft_io import CONFIG_FILE, FACTOR, PLAIN_STARTS, WEIGHTS_FILE

MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` may be; it must be at least an adapter's rank."""

_REFUSED = (
    "modules_to_save",
    "use_dora",
    "lora_bias",
    "alora_invocation_tokens",
    "layer_replication",
    "use_bdlora",
    "use_qalora",
)


def max_lora_rank(rank: int) -> int | None:
    """The smallest ``--max-lora-rank`` for an adapter of ``rank``; None when vLLM has none so large."""
    return next((allowed for allowed in MAX_RANKS if allowed >= rank), None)


def vllm_problems(folder: Path) -> list[Problem]:
    """Why vLLM would refuse an adapter's folder, or read it as something else; empty when it takes it.

    Raises UserError when adapter_config.json is missing or not JSON.
    """
    config = read_json(folder / CONFIG_FILE)
    return [*_of_settings(folder / CONFIG_FILE, config), *_of_weights(folder / WEIGHTS_FILE, config)]


def _of_settings(file: Path, config: Mapping[str, Any]) -> Iterator[Problem]:
    where = str(file)
    for key in ("r", "lora_alpha", "target_modules"):
        if key not in config:
            yield Problem(where, f"a value for {key}", "none")
    rank = config.get("r")
    if not isinstance(rank, int) or rank <= 0 or max_lora_rank(rank) is None:
        yield Problem(where, f"a whole rank r from 1 to {MAX_RANKS[-1]}", repr(rank))
    if config.get("bias", "none") != "none":
        yield Problem(where, "bias: none", repr(config["bias"]))
    if config.get("init_lora_weights", True) not in PLAIN_STARTS:
        yield Problem(where, "init_lora_weights that leaves the base as it is", repr(config["init_lora_weights"]))
    for key in _REFUSED:
        if config.get(key):
            yield Problem(where, f"no {key}", repr(config[key]))


def _of_weights(file: Path, config: Mapping[str, Any]) -> Iterator[Problem]:
    """Names ``base_model.model.MODULE.lora_A.weight`` and both factors of each; ranks as patterns and ``r`` say."""
    try:
        with safe_open(file, "pt") as stored:
            shapes = {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        yield Problem(str(file), "a whole safetensors file", str(error))
        return
    found: dict[str, dict[str, list[int]]] = {}
    for name, shape in shapes.items():
        match = FACTOR.fullmatch(name)
        if match is None:
            yield Problem(str(file), "factors lora_A and lora_B of linear modules", repr(name))
            continue
        found.setdefault(match["module"], {})[match["factor"]] = shape
    for module, factors in found.items():
        if len(factors) < 2:
            yield Problem(str(file), f"both factors of {module}", f"{', '.join(factors)} alone")
            continue
        ranks = {factors["lora_A"][0], factors["lora_B"][1]}
        # Patterns aside, vLLM scales by lora_alpha / r whatever a factor's shape is.
        if not config.get("rank_pattern") and ranks != {config.get("r")}:
            yield Problem(str(file), f"rank {config.get('r')} in {module}", str(sorted(ranks)))
