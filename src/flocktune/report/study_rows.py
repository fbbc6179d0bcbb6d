"""What came out of a study: its cells, and one row for each method and setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flocktune.config.study import EVERY_SETTING, StudyConfig
from flocktune.report.summaries import Summary, combine_seeds


@dataclass(frozen=True)
class Outcome:
    """One cell. ``folder``: where it ran, within the study's; equal cells share one.

    ``state``: ``finished``, ``failed`` (``reason`` says why) or ``waiting``. ``summary``: of a finished run, with
    ``asked`` and ``answered``, the messages that clients got and the updates that came back, and ``training_seconds``.
    """

    method: str
    setting: str
    seed: int
    folder: str
    state: str
    reason: str = ""
    summary: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class StudyResult:
    """A study and its cells, in the order of its file."""

    config: StudyConfig
    outcomes: tuple[Outcome, ...]


@dataclass(frozen=True)
class Row:
    """One method in one setting: the summary over its finished seeds, and that of each seed.

    ``kind`` is the recipe's method (``base``, ``fedit``, ...), which ``label`` may call something else.
    """

    label: str
    setting: str
    summary: Summary
    by_seed: Mapping[int, Summary]

    @property
    def kind(self) -> str:
        return str(self.summary.get("method", ""))


@dataclass(frozen=True)
class Column:
    """One column of a study's table, a text for each row. ``short``: its heading where room is scarce."""

    heading: str
    short: str
    cells: tuple[str, ...]


def rows(result: StudyResult) -> list[Row]:
    """A row for each method and setting that has a finished run, in the order of the study file."""
    found: dict[tuple[str, str], dict[int, Summary]] = {}
    for outcome in result.outcomes:
        if outcome.summary is not None:
            found.setdefault((outcome.method, outcome.setting), {})[outcome.seed] = outcome.summary
    return [
        Row(label, setting, combine_seeds(list(by_seed.values())), by_seed)
        for (label, setting), by_seed in found.items()
    ]


def settings_of(config: StudyConfig) -> list[str]:
    """The settings to compare within: those of the file, or the one there is without any."""
    return list(config.settings) or [EVERY_SETTING]


def in_setting(found: Sequence[Row], setting: str) -> list[Row]:
    """The rows that can be compared in a setting: its own, and those of methods that settings do not bear on."""
    return [row for row in found if row.setting in (setting, EVERY_SETTING)]


def outcome_label(outcome: Outcome) -> str:
    """How a cell is called on paper."""
    setting = [] if outcome.setting == EVERY_SETTING else [outcome.setting]
    return ", ".join([outcome.method, *setting, f"seed {outcome.seed}"])
