"""Client halves for the workers of tests; a worker imports this file and little else."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch

from flocktune.interfaces import ClientHalf, Memory
from flocktune.types import ClientTask, Mean, Update


def toy(folder: str = "") -> ClientHalf:
    """Pulls its tensors somewhere, by its seed; counts its calls in its memory. Bad clients are bad in their way.

    ``once...`` kills its worker the first time that it is asked, ``deadly...`` always, ``wrong...`` raises.
    """

    def half(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
        if task.client.startswith("wrong"):
            raise ValueError("no rows")
        if task.client.startswith("deadly") or (task.client.startswith("once") and first_time(folder, task)):
            os.kill(os.getpid(), signal.SIGKILL)
        noise = torch.Generator().manual_seed(task.seed)
        delta = {name: 0.1 * value + torch.randn(value.shape, generator=noise) for name, value in task.tensors.items()}
        calls = memory.get("calls", torch.zeros(())) + 1
        kept = {} if task.client.startswith("idle") else {"calls": calls}
        return Update(delta, 1.0 + task.seed % 3, 1, {"calls": Mean(float(calls), 1)}), kept

    return half


def first_time(folder: str, task: ClientTask) -> bool:
    try:
        (Path(folder) / f"{task.round}-{task.client}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def broken() -> ClientHalf:
    """A worker whose machine lacks something."""
    raise FileNotFoundError("/data/rows.jsonl")


def counted(folder: str, recipe_text: str, own_bundle: str | None) -> ClientHalf:
    """The real half of a recipe; each model that is loaded leaves a file."""
    from flocktune import resident
    from flocktune.assemble import client_half_of

    load_model = resident.load_model

    def load(config: Any, device: torch.device) -> Any:
        (Path(folder) / f"{os.getpid()}-{len(list(Path(folder).iterdir()))}").write_text(config.path)
        return load_model(config, device)

    resident.load_model = load
    return client_half_of(recipe_text, own_bundle)
