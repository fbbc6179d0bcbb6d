"""flocktune: federated fine-tuning of large language models. The data never moves, only small adapters do.

The names below are the public API; each is imported when it is first used, so that ``import flocktune`` is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flocktune.aggregation.mean import weighted_mean
    from flocktune.api import resume, run
    from flocktune.config.load import load_recipe, parse_recipe
    from flocktune.config.schema import RunConfig
    from flocktune.data.batching import training_batches
    from flocktune.data.encoding import encode
    from flocktune.data.heterogeneity import heterogeneity
    from flocktune.data.partition import allocate, hold_out
    from flocktune.data.sources import read_examples
    from flocktune.engine.rounds import run_rounds
    from flocktune.errors import FlocktuneError, RoundFailed, UserError
    from flocktune.models.load import load_model, load_tokenizer
    from flocktune.models.lora import attach
    from flocktune.models.peft_io import export_peft, import_peft
    from flocktune.scheduling import select
    from flocktune.training import evaluate_loss, fit
    from flocktune.types import ClientTask, Failure, Mean, Update

_ROOMS = {
    "aggregation.mean": ("weighted_mean",),
    "api": ("resume", "run"),
    "config.load": ("load_recipe", "parse_recipe"),
    "config.schema": ("RunConfig",),
    "data.batching": ("training_batches",),
    "data.encoding": ("encode",),
    "data.heterogeneity": ("heterogeneity",),
    "data.partition": ("allocate", "hold_out"),
    "data.sources": ("read_examples",),
    "engine.rounds": ("run_rounds",),
    "errors": ("FlocktuneError", "RoundFailed", "UserError"),
    "models.load": ("load_model", "load_tokenizer"),
    "models.lora": ("attach",),
    "models.peft_io": ("export_peft", "import_peft"),
    "scheduling": ("select",),
    "training": ("evaluate_loss", "fit"),
    "types": ("ClientTask", "Failure", "Mean", "Update"),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [  # noqa: RUF022 - in the order of a run
    "load_recipe", "parse_recipe", "RunConfig", "run", "resume",
    "read_examples", "hold_out", "allocate", "heterogeneity", "encode", "training_batches",
    "load_model", "load_tokenizer", "attach", "import_peft", "export_peft",
    "select", "fit", "evaluate_loss", "weighted_mean", "run_rounds",
    "ClientTask", "Failure", "Mean", "Update", "FlocktuneError", "RoundFailed", "UserError",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'flocktune' has no attribute {name!r}")
    return getattr(import_module(f"flocktune.{_ROOM_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
