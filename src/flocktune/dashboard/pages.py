"""The pages: each a heading and parts, which the browser replaces one by one as they change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from flocktune.dashboard.figures import Learning, by_category, learning, participation, told_of_clients, where_time_went
from flocktune.dashboard.filling import address, digest, fill
from flocktune.dashboard.logs import FAILURES_KEPT, Told, rows_called, scored_on
from flocktune.dashboard.watching import Seen, Watch
from flocktune.report.grids import legend
from flocktune.report.summaries import (
    METRIC_NAMES,
    SHARES,
    headline_metric,
    is_baseline,
    method_label,
    metric,
    number,
    travelled,
)
from flocktune.report.tables import NOTHING, format_bytes, format_metric, format_seconds
from flocktune.standing import State

STATES: dict[State, str] = {"running": "●", "finished": "✓", "stopped": "■", "failed": "✕", "waiting": "○"}
"""What stands beside the word: colour never stands alone."""

_PARTS = ("state", "numbers", "learning", "categories", "clients", "failures", "cost")
_KEY = [("answered", "answered"), ("failed", "failed"), ("unused", "asked, not needed")]


@dataclass(frozen=True)
class Page:
    """``title``: of the window. ``news``: read aloud when it changes. ``parts``: id -> HTML; empty ones are hidden.

    ``live``: where the browser asks for changes; ``above``: the folders that a run lies in, None for the overview.
    """

    title: str
    heading: str
    news: str
    parts: Mapping[str, Markup]
    live: str
    above: tuple[str, ...] | None = None

    @property
    def tag(self) -> str:
        """Changes with anything on the page."""
        return digest("\0".join((self.title, self.news, *self.parts.values())))

    def as_dict(self) -> dict[str, Any]:
        """What the browser asks for: every part with a digest of it."""
        parts = {name: [digest(html), html] for name, html in self.parts.items()}
        return {"tag": self.tag, "title": self.title, "news": self.news, "parts": parts}

    def as_html(self) -> str:
        """The page as a browser first gets it."""
        return fill("layout.html", page=self, parts={name: (digest(html), html) for name, html in self.parts.items()})


@dataclass(frozen=True)
class Row:
    """A run in words. ``within``: its path within its group; ``score``: the headline metric, in a few letters."""

    seen: Seen
    name: str
    within: str
    label: str
    seed: Any
    address: str
    id: str
    glyph: str
    progress: str
    score: str
    sent: str
    find: str


def overview(watch: Watch) -> Page:
    """Every run below the folder."""
    groups = watch.groups()
    total = sum((seen.counts for seen in groups), Counter[State]())
    counts = [(state, glyph, total[state]) for state, glyph in STATES.items() if total[state]]
    said = ", ".join(f"{count} {state}" for state, _, count in counts) or "no runs yet"
    heading = watch.root.resolve().name or str(watch.root)
    listed = fill(
        "list.html",
        groups=[(seen, [_row(run) for run in seen.runs], _report(watch, seen.group.path)) for seen in groups],
        counts=counts,
        whole=watch.found().whole,
        root=watch.shown_root,
    )
    return Page(f"{said} · {heading}", heading, said, {"runs": listed}, "/live")


def one_run(watch: Watch, path: str) -> Page | None:
    """Everything about one run; None when there is none."""
    found = watch.run(path)
    if found is None:
        return None
    seen, told = found
    row, notes = _row(seen), []

    def drawn(what: str, build: Callable[[], Any]) -> Any:
        try:
            return build()
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            notes.append(f"{what} could not be shown: the log is damaged ({type(error).__name__}).")
            return None

    context = {
        "seen": seen,
        "row": row,
        "told": told,
        "described": _described(row, told),
        "tiles": drawn("The numbers", lambda: _tiles(seen, told, row.score)) or [],
        "figures": drawn("The curves", lambda: learning(seen, told)) or Learning(),
        "rows": drawn("The rows", lambda: rows_called(scored_on(seen.summary) or "held_out")) or "",
        "categories": drawn("The categories", lambda: by_category(seen.summary)),
        "grid": drawn("Who took part", lambda: participation(told)),
        "clients": drawn("The clients", lambda: told_of_clients(told)),
        "key": legend(_KEY),
        "federated": not is_baseline(_method(seen)),
        "time": drawn("The time", lambda: where_time_went(told)),
        "failures": list(reversed(told.failures)),
        "failures_kept": FAILURES_KEPT,
        "report": _report(watch, path),
        "notes": notes,
    }
    parts = {name: fill(f"{name}.html", **context) for name in _PARTS}
    title = f"{row.progress if seen.state == 'running' else seen.state} · {row.name}"
    live = address("live/run", path)
    return Page(title, row.name, f"{row.name}: {seen.state}", parts, live, tuple(path.split("/")[:-1]))


def nothing_here() -> Page:
    """For an address that leads nowhere."""
    return Page("nothing here", "Nothing here", "", {"nothing": fill("nothing.html")}, "", ())


def _described(row: Row, told: Told) -> str:
    """What is run, on what."""
    model, device = (told.start.get(name) for name in ("model", "device"))
    parts = [row.label + (f", seed {row.seed}" if row.seed is not None else "")]
    parts += [f"model {Path(str(model)).name}"] if model else []
    return " · ".join([*parts, *([f"on {device}"] if device else [])])


def _row(seen: Seen) -> Row:
    summary, path, method = seen.summary, seen.place.path, _method(seen)
    name = seen.place.folder.name
    label = method_label(method, summary) if method else NOTHING
    return Row(
        seen=seen,
        name=name,
        within=path.removeprefix(seen.place.group.path).strip("/") or name,
        label=label,
        seed=summary.get("seed"),
        address=address("run", path),
        id=f"run-{digest(path)}",
        glyph=STATES[seen.state],
        progress=f"{seen.done}/{'?' if seen.planned is None else seen.planned}",
        score=" ".join(_score(summary)[:2]) or NOTHING,
        sent=format_bytes(travelled(method, summary, "bytes_up")),
        find=f"{path} {label} {seen.state}".lower(),
    )


def _method(seen: Seen) -> str:
    return str(seen.summary.get("method") or "")


def _score(summary: Mapping[str, Any]) -> tuple[str, str, str] | tuple[()]:
    """The headline metric, its name, and the rows that it is of."""
    try:
        dataset = scored_on(summary)
        name = headline_metric({"": summary}, dataset) if dataset else None
    except (TypeError, AttributeError):  # a damaged summary can hold anything
        return ()
    if dataset is None or name is None:
        return ()
    figure = format_metric(name, metric(summary, dataset, name)) + (" %" if name in SHARES else "")
    return figure, METRIC_NAMES[name].lower(), rows_called(dataset)


def _tiles(seen: Seen, told: Told, score: str) -> list[tuple[str, str, list[str]]]:
    """(what, number, remarks)."""
    summary, pace_s = seen.summary, told.pace_s
    planned = told.planned if told.planned is not None else seen.planned
    done = f"{seen.done} of {'?' if planned is None else planned}"
    found = [("Rounds", done, [] if pace_s is None else [f"{format_seconds(pace_s)} each"])]
    loss = number((told.rounds.get(told.done - 1) or {}).get("train_loss"))
    if loss is not None:
        found.append(("Training loss", f"{loss:.3f}", ["in the last round"]))
    if figures := _score(summary):
        found.append((figures[2].capitalize(), figures[0], [figures[1]]))
    if not is_baseline(_method(seen)):
        clients = len(told.start.get("clients") or told.start.get("owners") or told.clients)
        asked = sum(len(client.asked) for client in told.clients.values())
        answered = sum(len(client.answered) for client in told.clients.values())
        found.append(("Clients", f"{clients:,}", [f"{answered:,} of {asked:,} tasks answered"]))
        up, down = (format_bytes(number(summary.get(name))) for name in ("bytes_up", "bytes_down"))
        found.append(("Sent by clients", up, [f"{down} sent to them"]))
    privacy = summary.get("privacy")
    epsilon = number(privacy.get("epsilon")) if isinstance(privacy, Mapping) else None
    if isinstance(privacy, Mapping) and epsilon is not None:
        delta = number(privacy.get("delta"))
        found.append(("Epsilon", f"{epsilon:.3g}", [] if delta is None else [f"at delta {delta:.3g}"]))
    resumed = f"resumed {told.resumed} time{'s' if told.resumed > 1 else ''}"
    found.append(("Time", format_seconds(number(summary.get("seconds"))), [resumed] if told.resumed else []))
    return found


def _report(watch: Watch, path: str) -> str | None:
    return address("report", path) if watch.page(path) else None
