"""How clients' updates are made smaller on their way, as settings of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from flocktune.config.numbers import Fraction, Positive


@dataclass(frozen=True)
class CompressionConfig:
    """What travels in place of a client's update in float32 (docs/compression.md).

    ``format`` of a value: float32, bf16, or a code of 8 or 4 bits, of which ``block`` values share a float32 scale.
    ``top_k``: the fraction of each tensor's values that are sent, the largest; null is all. ``error_feedback``
    (arXiv 1901.09847): what was not sent is kept by the client and added to its next update. ``zstd``: a level of
    zstd for the bytes that come of it; null is off.
    """

    format: Literal["float32", "bf16", "int8", "int4"] = "int8"
    block: Positive = 64
    top_k: Fraction | None = None
    error_feedback: bool = True
    zstd: Annotated[int, Field(ge=1, le=22)] | None = None

    @property
    def lossy(self) -> bool:
        """Whether something of an update may not arrive."""
        return self.format != "float32" or self.top_k is not None
