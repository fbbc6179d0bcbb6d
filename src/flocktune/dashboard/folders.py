"""Which runs lie below a folder, and what they belong to: comparisons, studies, federations."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flocktune.report.events import LOG_NAME
from flocktune.standing import ENDED, EXPERIMENT

Kind = Literal["folder", "comparison", "study", "federation"]

MOST_FOLDERS, _DEPTH = 20_000, 8
"""So many are looked at, so deep: somebody may give the root of a disk."""

_READ = {
    LOG_NAME,
    EXPERIMENT,
    ENDED,
    "summary.json",
    "recipe.yaml",
    ".lock",
    "study.json",
    "inputs.json",
    "federation.json",
}
"""Files that are read, or asked for their lock."""
_PAGES = {"comparison": "report.html", "study": "study.html"}


@dataclass(frozen=True)
class Group:
    """What runs belong to. ``path`` is relative to the folder that is followed, empty for that folder itself."""

    path: str
    folder: Path
    kind: Kind

    @property
    def page(self) -> Path | None:
        """Its report, whether it is written or not."""
        return self.folder / _PAGES[self.kind] if self.kind in _PAGES else None


@dataclass(frozen=True)
class Place:
    """A run's folder."""

    path: str
    folder: Path
    group: Group

    @property
    def page(self) -> Path:
        return self.folder / "report.html"


@dataclass(frozen=True)
class Found:
    """``runs`` by their paths, sorted; ``whole``: whether every folder was looked at."""

    runs: dict[str, Place]
    groups: dict[str, Group]
    whole: bool


def find_runs(root: Path) -> Found:
    """Every run at or below ``root``. Links are not followed; what can not be read is left out."""
    seen = 0

    def walk(folder: Path, path: str, above: Group, depth: int) -> Iterator[Place]:
        nonlocal seen
        seen += 1
        if seen > MOST_FOLDERS or depth > _DEPTH:
            return
        try:
            with os.scandir(folder) as entries:
                found = list(entries)
            names = {entry.name: entry.is_dir(follow_symlinks=False) for entry in found}
            if any(entry.name in _READ and not entry.is_file(follow_symlinks=False) for entry in found):
                # A link would lead elsewhere, and reading a pipe would never end: only folders below are looked at.
                names = {name: True for name, is_folder in names.items() if is_folder and name not in _READ}
        except OSError:  # gone meanwhile, or not ours to read
            return
        if _is_run(names):
            yield Place(path, folder, above)
            return
        own = _kind(names)
        # What a study or a federation holds belongs to it, its comparisons too.
        group = above if above.kind != "folder" and own == "folder" else Group(path, folder, own)
        for name in sorted(name for name, is_folder in names.items() if is_folder and _can_be_shown(name)):
            yield from walk(folder / name, f"{path}/{name}" if path else name, group, depth + 1)

    runs = {place.path: place for place in walk(root, "", Group("", root, "folder"), 0)}
    groups = {place.group.path: place.group for place in runs.values()}
    return Found(runs, groups, seen <= MOST_FOLDERS)


def _is_run(names: dict[str, bool]) -> bool:
    """A recipe alone is none: people keep theirs in folders of their own. A run's folder was locked once."""
    return LOG_NAME in names or ("recipe.yaml" in names and ".lock" in names and EXPERIMENT not in names)


def _can_be_shown(name: str) -> bool:
    """Hidden folders are left out, and names that are no text: an address could not hold them."""
    return not name.startswith(".") and name.isprintable()


def _kind(names: dict[str, bool]) -> Kind:
    if EXPERIMENT in names:
        return "comparison"
    if "study.json" in names or ("inputs.json" in names and ".lock" in names):
        return "study"
    return "federation" if "federation.json" in names else "folder"
