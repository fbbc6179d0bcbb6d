"""Every random draw of a run comes from here, so no generator's state is ever stored."""

from __future__ import annotations

import hashlib


def derive_seed(root: int, *path: int | str) -> int:
    """A seed in [0, 2**63) that depends on nothing but its arguments.

    Independent draws name their purpose: ``derive_seed(seed, round, client, "batches")``. Stable
    across processes, platforms and Python versions (SHA-256, no ``hash()``).
    """
    text = "\x1f".join([str(int(root)), *(f"{type(part).__name__}:{part}" for part in path)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
