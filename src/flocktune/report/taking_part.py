"""Who took part, and what left each client: as a picture, client by client, and in a few words."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from flocktune.report.figures import Figure
from flocktune.report.grids import Participation, holdings, legend, participation
from flocktune.report.outcome import main_method
from flocktune.report.runs import Experiment, Run
from flocktune.report.summaries import Value, is_baseline, number
from flocktune.report.tables import NOTHING, Cell, Grid, cell_of, format_bytes, format_metric

_LISTED = 500
"""Clients in the table at most."""


@dataclass(frozen=True)
class Part:
    """One client's part in a run: rounds it was asked in, that it answered and failed in, and what it sent.

    ``sent``: bytes of its updates; ``exact`` says whether the log tells them, or they are equal shares of a round's.
    """

    name: str
    rows: float | None
    asked: frozenset[int]
    answered: frozenset[int]
    failed: frozenset[int]
    sent: float
    exact: bool
    epsilon: float | None
    loss: float | None


class Failed(NamedTuple):
    """A client that gave no usable update: in which run, in which round from 1, and why."""

    run: str
    round: int
    client: str
    reason: str


def parts_of(run: Run) -> list[Part]:
    """Every client of a run, in the order of its start; those who joined later come last."""
    held = run.start.get("clients") or {}
    owners = run.start.get("owners") or []
    named = [*held, *map(str, owners), *(name for event in run.rounds for name in event.get("selected") or [])]
    return [_part(run, name, number((held.get(name) or {}).get("rows"))) for name in dict.fromkeys(named)]


def who_took_part(experiment: Experiment) -> Figure | None:
    """Clients x rounds of the main method's first run; the table of clients has its numbers."""
    run = main_run(experiment)
    if run is None or not run.rounds:
        return None
    shown = {
        part.name: Participation(part.answered, part.failed, part.asked - part.answered - part.failed)
        for part in parts_of(run)
    }
    key = legend([("answered", "answered"), ("failed", "failed"), ("unused", "asked, not needed")])
    title = "Clients, round by round"
    picture = participation(shown, run.rounds[-1]["round"] + 1, title=title)
    return Figure(title, picture, note="At the right: how many of a client's updates counted.", key=key)


def who_holds_what(experiment: Experiment) -> Figure | None:
    """The allocation of the main method's first run."""
    clients = (run.start.get("clients") or {}) if (run := main_run(experiment)) else {}
    counts = {name: client.get("categories") or {"all": client.get("rows") or 0} for name, client in clients.items()}
    return holdings_figure(counts) if counts else None


def holdings_figure(clients: Mapping[str, Mapping[str, int]]) -> Figure:
    """Client -> category -> rows, as a picture and a table."""
    columns = sorted({category for counts in clients.values() for category in counts})
    rows = tuple(
        (Cell(name), *(cell_of(float(counts.get(column, 0)), _whole) for column in columns))
        for name, counts in list(clients.items())[:_LISTED]
    )
    headings = ("Client", *(column.replace("_", " ") for column in columns))
    return Figure("Rows of each client by category", holdings(clients), Grid(headings, rows))


def client_grid(experiment: Experiment) -> tuple[Grid, int] | None:
    """A row a client of the main method's first run, and how many clients more there are than are shown."""
    run = main_run(experiment)
    parts = parts_of(run) if run else []
    if not parts or not any(part.asked for part in parts):
        return None
    told = [part.epsilon is not None for part in parts]
    headings = ("Client", "Rows held", "Asked", "Counted", "Failed", "Sent", *(["Epsilon"] if any(told) else []))
    rows = tuple(
        (
            Cell(part.name),
            cell_of(part.rows, _whole),
            *(cell_of(float(len(rounds)), _whole) for rounds in (part.asked, part.answered, part.failed)),
            cell_of(part.sent, format_bytes if part.exact else _about),
            *([cell_of(part.epsilon, _three)] if any(told) else []),
            Cell(format_metric("loss", Value(part.loss)) if part.loss is not None else NOTHING, value=part.loss),
        )
        for part in parts[:_LISTED]
    )
    return Grid((*headings, "Last training loss"), rows), max(0, len(parts) - _LISTED)


def failures(experiment: Experiment) -> list[Failed]:
    """Every failure of the main method, run by run, and the rounds that were rolled back."""
    runs = experiment.methods.get(main_method(experiment)) or []
    return [failed for run in runs for failed in failures_of(run, experiment.folder if len(runs) > 1 else None)]


def failures_of(run: Run, below: Path | None = None) -> list[Failed]:
    """Of one run, which is named by its place ``below`` a folder."""
    name = run.folder.name if below is None else str(run.folder.relative_to(below))
    return [
        Failed(name, event["round"] + 1, str(failure.get("client")), str(failure.get("reason")))
        for event in run.rounds
        for failure in [*(event.get("failures") or []), *_rolled_back(event)]
    ]


def reasons(found: Iterable[Failed]) -> list[tuple[str, int]]:
    """Why clients failed, the most frequent first."""
    return Counter(failed.reason for failed in found).most_common()


def main_run(experiment: Experiment) -> Run | None:
    """The main method's first run."""
    return next(iter(experiment.methods.get(main_method(experiment)) or []), None)


def is_federated(experiment: Experiment) -> bool:
    """Whether anything travelled at all."""
    return not is_baseline(main_method(experiment))


def _part(run: Run, name: str, rows: float | None) -> Part:
    mine = [(event, (event.get("clients") or {}).get(name) or {}) for event in run.rounds]
    answered = [(event, told) for event, told in mine if name in (event.get("answered") or [])]
    sent = [number(told.get("bytes_up")) for _, told in answered]
    epsilons = [number(told.get("epsilon")) for _, told in answered]
    losses = [number(told.get("loss")) for _, told in answered]
    return Part(
        name=name,
        rows=rows,
        asked=_rounds(event for event, _ in mine if name in (event.get("selected") or [])),
        answered=_rounds(event for event, _ in answered),
        failed=_rounds(event for event, _ in mine if any(_is_of(name, f) for f in event.get("failures") or [])),
        sent=sum(_share(event) if size is None else size for (event, _), size in zip(answered, sent, strict=True)),
        exact=None not in sent,
        epsilon=max((value for value in epsilons if value is not None), default=None),
        loss=next((value for value in reversed(losses) if value is not None), None),
    )


def _rounds(events: Iterable[Mapping[str, Any]]) -> frozenset[int]:
    return frozenset(event["round"] for event in events)


def _is_of(name: str, failure: Mapping[str, Any]) -> bool:
    """A failed sum names all that were in it."""
    return name in str(failure.get("client")).split(", ")


def _share(event: Mapping[str, Any]) -> float:
    return (number(event.get("bytes_up")) or 0.0) / max(1, len(event.get("answered") or []))


def _rolled_back(event: Mapping[str, Any]) -> list[Mapping[str, str]]:
    """A round that the gate did not let count, as a failure of all."""
    if not event.get("rolled_back"):
        return []
    return [{"client": "all (rolled back)", "reason": "; ".join((event.get("gate") or {}).get("reasons") or [])}]


def mean_and_range(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, lowest, highest; zeros of nothing."""
    return (statistics.fmean(values), min(values), max(values)) if values else (0.0, 0.0, 0.0)


def _whole(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.0f}"


def _three(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3g}"


def _about(value: float | None) -> str:
    return "≈ " + format_bytes(value)
