"""A run of a federation, as it lies in its folder for whoever starts, serves and watches it.

RUN/roster.json    the run's name for all time, its clients, where its paths start; written before the recipe
RUN/stop           its presence asks the run to end after the round at hand
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from flocktune.files import read_json, write_json

ROSTER, STOP = "roster.json", "stop"


@dataclass(frozen=True)
class Roster:
    """``run`` names the run for all time; ``clients`` are asked for its whole length; ``folder``: of relative paths."""

    run: str
    clients: tuple[str, ...]
    folder: str


def write_roster(run: Path, names: Sequence[str]) -> None:
    """Fix who takes part. Raises OSError."""
    write_json(run / ROSTER, asdict(Roster(secrets.token_hex(8), tuple(sorted(names)), os.getcwd())))


def read_roster(run: Path) -> Roster:
    """Raises UserError when it is missing."""
    told = read_json(run / ROSTER)
    return Roster(told["run"], tuple(told["clients"]), told["folder"])
