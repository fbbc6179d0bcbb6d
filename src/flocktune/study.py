"""A study on its way: every cell an ordinary run folder, so that it goes on where it was killed, and one table.

STUDY/METHOD/SETTING/seed-N/           a run; cells whose recipes are equal share the folder of the first
STUDY/inputs.json                      what data and base models the runs stand on
STUDY/study.json .csv .md .html        the results so far, written anew after every cell
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flocktune.allocation import allocate_clients
from flocktune.cohorts import scheduler
from flocktune.config.load import config_digest, differences, load_recipe, to_tree
from flocktune.config.schema import RunConfig
from flocktune.config.study import Cell, Study
from flocktune.emulation import emulator_settings, public_rows
from flocktune.errors import FlocktuneError, Problem, UserError, reason
from flocktune.files import exclusive, read_json, write_json
from flocktune.models.bundle import read_bundle
from flocktune.report.events import LOG_NAME, read_events_leniently
from flocktune.report.study_page import write_study
from flocktune.report.study_rows import Outcome, StudyResult
from flocktune.report.trackers import Trackers, refuse_missing
from flocktune.resident import base_digest
from flocktune.run_folder import IDENTITY, create_run, is_finished
from flocktune.runs import Listener, Stopped, execute

INPUTS = "inputs.json"

_NOT_TRAINING = ("load", "save", "diagnose")
"""Parts of a round's seconds that are not training."""


def execute_study(
    study: Study,
    folder: Path,
    listeners: Sequence[Listener] = (),
    stop: threading.Event | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> StudyResult:
    """Run, or go on with, every cell of a study in ``folder``, write its files, and return what came out.

    A finished cell is not run again. A cell that fails is recorded with its reason, the others go on, and the next
    call tries it again. ``say`` is told of every cell. Raises UserError before anything runs (a cell that is there
    already and whose recipe, data or model is another now; clients that are not there), and OSError, and Stopped
    after ``stop`` was set: the round at hand is finished and saved first.
    """
    stop = stop or threading.Event()
    _make(folder)
    with exclusive(folder):
        for stray in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
            stray.unlink(missing_ok=True)
        _refuse_changed_cells(study, folder)
        runs = _runs(study, folder)
        waiting = [run for run in runs if not is_finished(folder / run)]
        _check_inputs([runs[run][0].config for run in waiting], folder)
        failed: dict[str, str] = {}
        for number, (run, cells) in enumerate(runs.items(), start=1):
            if run not in waiting:
                continue
            if stop.is_set():
                raise Stopped(str(folder))
            say(f"Run {number} of {len(runs)}: {cells[0].label}" + _also(cells))
            try:
                _execute_cell(cells[0].config, folder / run, listeners, stop)
            except FlocktuneError as error:
                failed[run] = str(error)
                say(f"{cells[0].label} failed: {error}")
            write_study(_result(study, folder, runs, failed), folder)
        result = _result(study, folder, runs, failed)
        write_study(result, folder)  # also after a change of the claims alone
        return result


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(Problem(str(folder), "a folder that can be written", reason(error))) from None
    if (folder / "recipe.yaml").exists():
        raise UserError(
            Problem(str(folder), "a new folder or a study's", "that of a run", "Choose another with --out.")
        )


def _execute_cell(config: RunConfig, place: Path, listeners: Sequence[Listener], stop: threading.Event) -> None:
    if not (place / "recipe.yaml").exists():
        create_run(config, place)
    trackers = [Trackers(config, place)] if config.trackers else []
    execute(place, [*listeners, *trackers], stop)


def _runs(study: Study, folder: Path) -> dict[str, list[Cell]]:
    """The runs that the cells ask for: folder -> cells. Equal recipes (and seeds) run once, where one was begun."""
    equal: dict[str, list[Cell]] = {}
    for cell in study.cells:
        equal.setdefault(config_digest(cell.config), []).append(cell)
    runs = {}
    for cells in equal.values():
        begun = [cell for cell in cells if (folder / cell.place / "recipe.yaml").exists()]
        runs[(begun or cells)[0].place] = cells
    return runs


def _also(cells: Sequence[Cell]) -> str:
    return f" (the same as {'; '.join(cell.label for cell in cells[1:])})" if len(cells) > 1 else ""


def _refuse_changed_cells(study: Study, folder: Path) -> None:
    """A cell that was begun keeps its recipe: a table must not hold numbers of two different ones."""

    def changed() -> Iterator[Problem]:
        for cell in study.cells:
            recipe = folder / cell.place / "recipe.yaml"
            if recipe.exists():
                old, new = to_tree(load_recipe(recipe)), to_tree(cell.config)
                for line in differences(old, new):
                    yield Problem(
                        f"{cell.label} ({recipe.parent})",
                        "the recipe that it began with",
                        f"a change of {line}",
                        "Undo the change, give it a label of its own, or choose another folder with --out.",
                    )

    UserError.raise_all(changed())


def _check_inputs(configs: Sequence[RunConfig], folder: Path) -> None:
    """Everything that can be known before a cell runs: clients and trackers are there, data and models are the same.

    Raises UserError with every problem; remembers the digests of what is new.
    """
    path = folder / INPUTS
    known: dict[str, Any] = read_json(path) if path.exists() else {}
    found, problems = dict(known), []
    for config in configs:
        try:
            refuse_missing(config)
            mine = _inputs(config)
        except UserError as error:
            problems += [problem for problem in error.problems if problem not in problems]
            continue
        before = found.setdefault(_named_inputs(config), mine)
        for what, now in mine.items():
            problem = Problem(
                str(folder),
                "what the study began with",
                f"a change of the {IDENTITY[what]}: {before.get(what, 'none')[:12]}... -> {now[:12]}...",
                "Undo the change, or choose another folder with --out.",
            )
            if before.get(what) != now and problem not in problems:
                problems.append(problem)
    UserError.raise_all(problems)
    if found != known:
        write_json(path, found)


def _inputs(config: RunConfig) -> Mapping[str, str]:
    data = allocate_clients(config)
    scheduler(config, data.clients)  # raises for a client that is not there
    inputs = {"data": data.train.digest, "test": data.test.digest, "model": base_digest(config.model)}
    if data.validation:
        inputs["validation"] = data.validation.digest
    if config.method == "fedbiot":
        inputs["public"] = public_rows(config).digest
        if (path := emulator_settings(config).path) is not None:
            inputs["emulator"] = read_bundle(Path(path).expanduser()).digest
    return inputs


def _named_inputs(config: RunConfig) -> str:
    """The parts of a recipe that name what a run stands on, as text."""
    tree = to_tree(config)
    named = [tree["data"], tree["model"]]
    if config.method == "fedbiot":
        named += [tree["alignment"][key] for key in ("public", "columns", "max_rows")] + [tree["emulator"]["path"]]
    return json.dumps(named, sort_keys=True)


def _result(study: Study, folder: Path, runs: Mapping[str, Sequence[Cell]], failed: Mapping[str, str]) -> StudyResult:
    run_of = {cell.place: run for run, cells in runs.items() for cell in cells}
    became = {run: ("failed", failed[run], None) if run in failed else _became(folder / run) for run in runs}
    outcomes = (
        Outcome(cell.method, cell.setting, cell.seed, run_of[cell.place], *became[run_of[cell.place]])
        for cell in study.cells
    )
    return StudyResult(study.config, tuple(outcomes))


def _became(run: Path) -> tuple[str, str, Mapping[str, Any] | None]:
    """State, reason and summary of a run, with what only its log knows."""
    if not is_finished(run):
        return "waiting", "", None
    events, _ = read_events_leniently(run / LOG_NAME)
    rounds = [event for event in events if event["event"] == "round"]
    seconds = (value for event in rounds for part, value in event["seconds"].items() if part not in _NOT_TRAINING)
    summary = {
        **read_json(run / "summary.json"),
        "asked": sum(len(event["selected"]) for event in rounds),
        "answered": sum(len(event["answered"]) for event in rounds),
        "training_seconds": sum(seconds),
    }
    return "finished", "", summary
