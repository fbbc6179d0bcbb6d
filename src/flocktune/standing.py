"""How a run stands: what its folder says of it to whoever comes by. Reading it loads no model's library."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flocktune.errors import FlocktuneError, UserError
from flocktune.files import is_held, write_json

EXPERIMENT = "experiment.json"
"""Its presence tells an experiment's folder, of several runs, from a run's."""

ENDED = "ended.json"
"""In a run's folder: how its last attempt ended, if not with a summary: stopped, or failed with the reasons."""

State = Literal["running", "finished", "stopped", "failed", "waiting"]


@dataclass(frozen=True)
class Standing:
    """``waiting``: nothing has begun. ``stopped``: on request, or killed. ``problems``: why it failed."""

    state: State
    problems: tuple[str, ...] = ()


def is_finished(folder: Path) -> bool:
    """Whether the run in ``folder`` has reached its end."""
    return (folder / "summary.json").exists()


def standing(folder: Path, *, begun: bool) -> Standing:
    """How the run or the experiment in ``folder`` stands; ``begun``: whether anything has happened in it.

    It is looked at without being disturbed: nothing is written, and whoever holds it goes on holding it. What can not
    be read counts as not there.
    """
    if is_finished(folder):
        return Standing("finished")
    with suppress(OSError):
        if is_held(folder):
            return Standing("running")
    told = _how_it_ended(folder)
    if told.get("how") == "failed":
        problems = told.get("problems")
        return Standing("failed", tuple(map(str, problems)) if isinstance(problems, list) else ())
    return Standing("stopped" if begun or told else "waiting")


@contextmanager
def told_ending(folder: Path, stopped: type[BaseException]) -> Iterator[None]:
    """Whatever ends the attempt is written to RUN/ended.json, for whoever looks later, and raised."""
    (folder / ENDED).unlink(missing_ok=True)
    try:
        yield
    except (stopped, KeyboardInterrupt):
        with suppress(OSError):
            write_ended(folder, "stopped")
        raise
    except Exception as error:
        mistake = isinstance(error, UserError)
        problems = [str(problem) for problem in error.problems] if isinstance(error, UserError) else [_said(error)]
        with suppress(OSError):  # a full disk: the error at hand says so
            write_ended(folder, "failed", problems, users_mistake=mistake)
        raise


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, FlocktuneError) else f"{type(error).__name__}: {error}"


def write_ended(run: Path, how: str, problems: Sequence[str] = (), *, users_mistake: bool = False) -> None:
    """Say how an attempt ended: ``stopped`` or ``failed``. Raises OSError."""
    write_json(run / ENDED, {"how": how, "problems": list(problems), "users_mistake": users_mistake})


def _how_it_ended(folder: Path) -> dict[str, object]:
    try:
        told = json.loads((folder / ENDED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}
