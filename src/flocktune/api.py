"""What ``flocktune run`` does, for a user's own script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flocktune.config.schema import RunConfig
from flocktune.config.study import load_study
from flocktune.experiment import execute_experiment, start
from flocktune.report.study_rows import StudyResult
from flocktune.run_folder import EXPERIMENT
from flocktune.runs import Listener, execute
from flocktune.study import execute_study


def run(
    config: RunConfig, out: Path | str | None = None, *, seeds: Sequence[int] = (), listeners: Sequence[Listener] = ()
) -> dict[str, Any]:
    """Run a recipe in a new folder (default ``runs/<name>``) and return its summary.

    With baselines in ``config.compare``, or several ``seeds``: one entry per method. Raises UserError, RoundFailed.
    """
    folder = Path(out) if out is not None else Path("runs") / config.name
    start(config, folder, tuple(seeds) or (config.seed,))
    return resume(folder, listeners=listeners)


def resume(folder: Path | str, *, listeners: Sequence[Listener] = ()) -> dict[str, Any]:
    """Go on with a run or a comparison from its last saved round, and return its summary. Raises as :func:`run`."""
    place = Path(folder)
    several = (place / EXPERIMENT).exists()
    return (execute_experiment if several else execute)(place, listeners)


def study(path: Path | str, out: Path | str | None = None, *, listeners: Sequence[Listener] = ()) -> StudyResult:
    """Run, or go on with, a study file in a folder (default ``runs/<name>``), write its tables, and return its cells.

    A cell that fails is in the result with its reason. Raises UserError, OSError.
    """
    plan = load_study(Path(path))
    return execute_study(plan, Path(out) if out is not None else Path("runs") / plan.config.name, listeners)
