"""Base models whose shapes are known without their files, so that a recipe is checked before gigabytes are fetched."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import get_session
from transformers import AutoConfig, PretrainedConfig

from flocktune.assets import known_model_files
from flocktune.files import read_json

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class KnownModel:
    """Shapes of the hub models ``ids``, which are alike. ``parameters``: how many there are, tied ones once."""

    ids: tuple[str, ...]
    source: str
    parameters: int
    config: Mapping[str, Any]

    def settings(self) -> PretrainedConfig:
        """As ``config.json`` has them, as far as shapes need it."""
        return AutoConfig.for_model(**self.config)


@cache
def known_models() -> Mapping[str, KnownModel]:
    """Hub id, in lower case -> what is known of it."""
    found: dict[str, KnownModel] = {}
    for file in known_model_files():
        told = read_json(file)
        known = KnownModel(tuple(told["ids"]), told["source"], told["parameters"], told["config"])
        found |= {name.lower(): known for name in known.ids}
    return found


def is_hub_model(path: str) -> bool:
    """Whether ``model.path`` is an id on the hub: it looks like one, and no folder has its name."""
    return HUB_ID.fullmatch(path) is not None and not Path(path).expanduser().is_dir()


def to_be_fetched(path: str) -> bool:
    """Whether ``model.path`` is on the hub and not on this machine yet."""
    return is_hub_model(path) and not isinstance(try_to_load_from_cache(path, "config.json"), str)


def fetching(path: str) -> str:
    """The command that fetches hub model ``path``."""
    return f"hf download {path} --local-dir FOLDER"


def hub_answers() -> bool:
    """Whether the hub can be reached now, asked once and not for long: the library itself would try for a minute."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # of whatever library carries it, and of proxies and certificates
        return False
    return True


def stand_in(path: str) -> KnownModel | None:
    """What is known of a model that is still to be fetched; None for one that is here, or that nobody wrote down."""
    return known_models().get(path.lower()) if to_be_fetched(path) else None
