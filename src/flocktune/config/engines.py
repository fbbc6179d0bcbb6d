"""Where clients' tasks run, as settings of a recipe.

The result is the same, bit for bit on CPUs, whichever it is, where every client is trained by itself; clients trained
at once (``stack``) give it to the rounding of sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from flocktune.config.numbers import Count, NonNegative, Positive, PositiveFloat


@dataclass(frozen=True)
class InProcessEngine:
    """Every client in this process, on one resident base model.

    ``stack``: how many clients are trained at once; ``auto`` is as many as half of ``stack_mb`` megabytes holds of what
    they train, and 64 at the most, which depends on the recipe alone; 1 is one after another. The other half is for
    the tokens of a pass.
    """

    stack: Positive | Literal["auto"] = "auto"
    stack_mb: Positive = 2048
    kind: Literal["in_process"] = "in_process"


@dataclass(frozen=True)
class RayEngine:
    """Clients on the workers of a Ray cluster, each of which keeps the base model.

    ``address``: of a running cluster (``auto``, or ``host:port``); None starts one on this machine. ``workers``: how
    many, None is as many as fit. ``gpus_per_worker`` may be a fraction. ``retries``: how often a task whose worker died
    is given to another.
    """

    workers: Positive | None = None
    cpus_per_worker: PositiveFloat = 1.0
    gpus_per_worker: NonNegative = 0.0
    address: str | None = None
    retries: Count = 2
    kind: Literal["ray"] = "ray"


@dataclass(frozen=True)
class FlowerEngine:
    """Clients are data owners who joined a federation (``flocktune federation run``).

    ``deadline_s``: seconds that a round may take; who has not answered by then is left out of it. ``absent_s``: seconds
    a round waits for a client that is not connected. ``emulator_mb``: the largest emulator, in megabytes, that is sent
    to a client that lacks it; a larger one is handed out otherwise, and 0 sends none.
    """

    deadline_s: PositiveFloat = 3600.0
    absent_s: NonNegative = 60.0
    emulator_mb: Count = 512
    kind: Literal["flower"] = "flower"


Engine: TypeAlias = Annotated[InProcessEngine | RayEngine | FlowerEngine, Field(discriminator="kind")]
