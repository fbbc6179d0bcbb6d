"""What a run stands on: versions of libraries, and the memory that was needed."""

from __future__ import annotations

import platform
import resource
from importlib.metadata import PackageNotFoundError, version

import torch


def versions() -> dict[str, str]:
    """Versions of what bears on a result."""
    found = {"python": platform.python_version()}
    for name in ("flocktune", "torch", "transformers", "peft", "tokenizers", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def peak_memory_bytes() -> int:
    """The most memory this process has held so far, plus the most on the GPU."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return host + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
