"""What the pages show of every run: how it stands, how far it is, what to do about it. Nothing is ever written."""

from __future__ import annotations

import json
import os
import shlex
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from flocktune.dashboard.folders import Found, Group, Place, find_runs
from flocktune.dashboard.logs import Log, Told
from flocktune.files import is_held
from flocktune.report.events import LOG_NAME
from flocktune.report.summaries import number
from flocktune.standing import EXPERIMENT, Standing, State, is_finished, standing

_LOOK_AGAIN_S = 1.0
"""Folders are looked for at most so often, whoever asks."""
_LOGS_KEPT = 64
"""So many logs of finished runs, that somebody looked at, stay in memory."""


@dataclass(frozen=True)
class Seen:
    """A run as it stands. ``summary``: its own, or what its log has told so far. Times are seconds since 1970.

    ``advice``: the command that goes on with it, when that is for the user to do.
    """

    place: Place
    standing: Standing
    done: int
    planned: int | None
    until_s: float | None
    newest_s: float | None
    summary: Mapping[str, Any]
    advice: str = ""

    @property
    def state(self) -> State:
        return self.standing.state


@dataclass(frozen=True)
class SeenGroup:
    """Runs that belong together. ``planned``: how many there will be; None where nobody can say.

    ``advice``: the command that goes on with them, when they were left between two runs.
    """

    group: Group
    planned: int | None
    runs: tuple[Seen, ...]
    advice: str = ""

    @property
    def counts(self) -> Counter[State]:
        """State -> how many runs; what has no folder yet is waiting."""
        counts: Counter[State] = Counter(seen.state for seen in self.runs)
        if missing := max(0, (self.planned or 0) - len(self.runs)):
            counts["waiting"] += missing
        return counts


@dataclass
class Watch:
    """Follows everything below ``root``, which the user calls ``shown_root``. Many threads may ask at once."""

    root: Path
    shown_root: str
    _found: Found = field(default_factory=lambda: Found({}, {}, True))
    _found_at_s: float = -1e9
    _logs: OrderedDict[str, Log] = field(default_factory=OrderedDict)
    _files: dict[Path, tuple[tuple[int, int], Mapping[str, Any]]] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def found(self) -> Found:
        """The runs that there are, a second old at most."""
        with self._lock:
            if time.monotonic() - self._found_at_s >= _LOOK_AGAIN_S:
                self._found = find_runs(self.root)
                self._found_at_s = time.monotonic()
                self._forget()
            return self._found

    def groups(self) -> list[SeenGroup]:
        """Every run in its group; where something happens or has just happened comes first."""
        with self._lock:
            by_group: dict[str, list[Seen]] = {}
            found = self.found()
            for place in found.runs.values():
                by_group.setdefault(place.group.path, []).append(self._see(place))
            groups = [self._see_group(found.groups[path], tuple(runs)) for path, runs in by_group.items()]
        return sorted(groups, key=_liveliness)

    def run(self, path: str) -> tuple[Seen, Told] | None:
        """One run, and what its log has told; None when there is none of this path."""
        with self._lock:
            place = self.found().runs.get(path)
            if place is None:
                return None
            told = self._log(place).catch_up()
            return self._see(place), told

    def page(self, path: str) -> Path | None:
        """The report of a run or a group, if it is written, and no link to something else."""
        found = self.found()
        place = found.runs.get(path) or found.groups.get(path)
        page = place.page if place else None
        if page is None or page.is_symlink() or not page.is_file():  # a link may lead to what is not to be shown
            return None
        return page

    def _see(self, place: Place) -> Seen:
        ended_s, summary = self._read(place.folder / "summary.json")
        if summary:
            done = int(number(summary.get("rounds")) or 0)
            return Seen(place, Standing("finished"), done, done, None, ended_s, summary)
        told = self._log(place).catch_up()
        stands = standing(place.folder, begun=(place.folder / LOG_NAME).exists())
        if stands.state == "stopped" and self._is_held(place.group):  # it is between two runs, or about to begin
            stands = Standing("waiting")
        until_s = told.until_s if stands.state == "running" else None
        advice = self._advice(place) if stands.state in ("stopped", "failed") else ""
        return Seen(place, stands, told.done, told.planned, until_s, told.newest_s, told.summary(), advice)

    def _see_group(self, group: Group, runs: tuple[Seen, ...]) -> SeenGroup:
        planned = None
        if group.kind == "comparison":
            planned = _planned_runs(group.folder, _changed_ns(group.folder / "recipe.yaml"))
        elif group.kind == "study":
            cells = self._read(group.folder / "study.json")[1].get("cells")
            folders = {str(cell.get("folder")) for cell in cells if isinstance(cell, dict)} if cells else set()
            planned = len(folders) or None
        begun = [seen for seen in runs if seen.state != "waiting"]
        over = planned is not None and len(begun) >= planned
        idle = group.kind in ("comparison", "study") and not over and not self._is_held(group)
        # Where a run was broken off, its own row says how to go on.
        last_resort = idle and all(seen.state == "finished" for seen in begun)
        return SeenGroup(group, planned, runs, self._advice_of(group) if last_resort else "")

    def _advice(self, place: Place) -> str:
        match place.group.kind:
            case "folder":
                return f"flocktune resume {self._shown(place.folder)}"
            case "federation":
                return f"flocktune federation run {self._shown(place.group.folder)} --resume {place.folder.name}"
        return self._advice_of(place.group)

    def _advice_of(self, group: Group) -> str:
        shown = self._shown(group.folder)
        return f"flocktune study STUDY_FILE --out {shown}" if group.kind == "study" else f"flocktune resume {shown}"

    def _shown(self, folder: Path) -> str:
        """A path as the user would type it, from where this program was started."""
        return shlex.quote(os.path.normpath(os.path.join(self.shown_root, folder.relative_to(self.root))))

    def _is_held(self, group: Group) -> bool:
        try:
            return group.kind in ("comparison", "study") and is_held(group.folder)
        except OSError:
            return False

    def _log(self, place: Place) -> Log:
        log = self._logs.setdefault(place.path, Log(place.folder / LOG_NAME))
        self._logs.move_to_end(place.path)
        return log

    def _forget(self) -> None:
        """What is gone, and the logs of finished runs that nobody has looked at for long."""
        for gone in set(self._logs) - set(self._found.runs):
            del self._logs[gone]
        finished = [path for path in self._logs if is_finished(self.root / path)]
        for path in finished[:-_LOGS_KEPT]:
            del self._logs[path]

    def _read(self, path: Path) -> tuple[float, Mapping[str, Any]]:
        """When a JSON file was written, in seconds since 1970, and the object in it; empty when there is none."""
        try:
            found = path.stat()
            version = found.st_mtime_ns, found.st_ino
            if self._files.get(path, (None,))[0] != version:
                value = json.loads(path.read_text(encoding="utf-8"))
                self._files[path] = version, value if isinstance(value, dict) else {}
        except (OSError, ValueError):
            return 0.0, {}
        return found.st_mtime, self._files[path][1]


def _liveliness(seen: SeenGroup) -> tuple[bool, float]:
    newest_s = max((run.newest_s or 0.0 for run in seen.runs), default=0.0)
    return not any(run.state == "running" for run in seen.runs), -newest_s


def _changed_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


@lru_cache(maxsize=1024)
def _planned_runs(folder: Path, changed_ns: int) -> int | None:
    """How many runs a comparison asks for, by its recipe, which was written at ``changed_ns``."""
    try:
        seeds = len(json.loads((folder / EXPERIMENT).read_text(encoding="utf-8"))["seeds"])
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        compare = recipe["compare"]
        local = compare["local"] if isinstance(compare["local"], int) else len(compare["local"])
        return seeds * (1 + bool(compare["base"]) + local + bool(compare["fedit"]) + bool(compare["centralised"]))
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None
