"""The view of a run while it runs: a panel that stays in place on a terminal, else one line a round.

It only listens: to the events of the log, and to a tick for each client that has answered.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flocktune.report.summaries import DECISIVE, METRIC_NAMES, SHARES, Value, method_label, number, plain_dataset
from flocktune.report.tables import NOTHING, format_bytes, format_metric, format_seconds

_ROUNDS_REMEMBERED = 5
"""Over so many rounds the speed, and the time that is left, are estimated."""


class LiveView:
    """A context manager to give every event (``on_event``) and every answered client (``on_client``) to.

    ``plain``: one line a round instead of the panel; default: unless ``console`` is a terminal. Several
    runs may follow each other through the same view.
    """

    def __init__(self, console: Console | None = None, *, plain: bool | None = None) -> None:
        self.console = console or Console(soft_wrap=True)
        self.plain = (not self.console.is_terminal) if plain is None else plain
        self._live = None if self.plain else Live(self, console=self.console, refresh_per_second=4, transient=True)
        self._reset({})

    def __enter__(self) -> LiveView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Show one event of the log."""
        match event.get("event"):
            case "run_start":
                self._reset(event)
                clients = len(event.get("clients") or event.get("owners") or ())
                self._say(f"{self._title()}: {_counted(self._rounds, 'round')}, {_counted(clients, 'client')}")
            case "resumed":
                self._done = int(event["round"])
                self._say(f"{self._title()}: resumed after round {self._done}")
            case "round":
                self._on_round(event)
            case "alignment":
                self._aligned = _aligned(event)
                self._say(self._aligned)
            case "evaluation":
                dataset = str(event.get("dataset", "test"))
                told = "AdapFu" if plain_dataset(dataset) == dataset else "AdapEmu"
                told = dataset if dataset.startswith(("clients", "triggered")) else told
                self._scores[told] = _scores(event)
                self._say(f"{dataset} after round {event['round']}: {self._scores[told]}")
            case "choice":
                self._say(f"{self._title()}: {event['said']}", always=True)
            case "run_end":
                self._say(f"{self._title()}: done")

    def on_client(self, done: int, total: int, client: str) -> None:
        """Client ``client`` of the current round has answered, ``done`` of ``total`` so far."""
        self._clients = done, total, client

    def __rich__(self) -> RenderableType:
        """The panel as it stands."""
        done, total, client = self._clients
        bars = Table.grid(padding=(0, 2))
        bars.add_column(justify="right", style="dim")
        bars.add_column(width=30)
        bars.add_column(no_wrap=True)
        bars.add_row("rounds", ProgressBar(max(1, self._rounds), self._done), f"{self._done}/{self._rounds}")
        bars.add_row("clients", ProgressBar(max(1, total), done), Text(f"{done}/{total} {client}".rstrip()))
        numbers = [
            f"loss {_loss(self._last)}",
            f"{self._tokens_per_second()} tok/s",
            f"up {format_bytes(self._bytes_up)}",
            f"down {format_bytes(self._bytes_down)}",
            f"{format_seconds(self._seconds_left())} left",
        ]
        rows: list[RenderableType] = [bars, Text(" · ".join(numbers))]
        for told, scores in self._scores.items():
            where = "" if list(self._scores) == ["AdapFu"] else f", {told}"
            rows.append(Text(f"held out{where}: {scores}", style="dim"))
        if self._aligned:
            rows.append(Text(self._aligned, style="dim"))
        return Panel(Group(*rows), title=Text(self._title()), title_align="left", border_style="dim", width=78)

    def _reset(self, start: Mapping[str, Any]) -> None:
        self._start = start
        self._rounds = int(start.get("rounds") or 0)
        self._done = 0
        self._clients = 0, 0, ""
        self._bytes_up = self._bytes_down = 0.0
        self._recent: deque[tuple[float, float]] = deque(maxlen=_ROUNDS_REMEMBERED)  # (seconds, tokens) of a round
        self._last: Mapping[str, Any] = {}
        self._scores: dict[str, str] = {}  # where the adapter was tried -> what came out
        self._aligned = ""

    def _on_round(self, event: Mapping[str, Any]) -> None:
        self._last = event
        self._done = int(event["round"]) + 1
        self._clients = 0, self._clients[1], ""
        self._bytes_up += number(event.get("bytes_up")) or 0.0
        self._bytes_down += number(event.get("bytes_down")) or 0.0
        self._recent.append((_round_seconds(event), number(event.get("tokens")) or 0.0))
        for failure in event.get("failures") or []:
            self._say(f"round {self._done}: {failure.get('client')} failed: {failure.get('reason')}", "yellow", True)
        if event.get("rolled_back"):
            why = "; ".join((event.get("gate") or {}).get("reasons") or [])
            self._say(f"round {self._done}: rolled back: {why}", "yellow", True)
        if self.plain:
            self._say(self._line(event))

    def _line(self, event: Mapping[str, Any]) -> str:
        width = len(str(self._rounds))
        return "  ".join(
            (
                f"round {self._done:>{width}}/{self._rounds}",
                f"loss {_loss(event)}",
                f"clients {len(event.get('answered') or [])}/{len(event.get('selected') or [])}",
                f"{self._tokens_per_second()} tok/s",
                f"up {format_bytes(number(event.get('bytes_up')))}",
                f"{format_seconds(self._seconds_left())} left",
            )
        )

    def _title(self) -> str:
        name, method = self._start.get("name", "run"), self._start.get("method", "")
        return f"{name} · {method_label(method, self._start)}" if method else str(name)

    def _tokens_per_second(self) -> str:
        seconds, tokens = (sum(column) for column in zip(*self._recent, strict=True)) if self._recent else (0.0, 0.0)
        return f"{tokens / seconds:,.0f}" if seconds else NOTHING

    def _seconds_left(self) -> float | None:
        if not self._recent:
            return None
        mean = sum(seconds for seconds, _ in self._recent) / len(self._recent)
        return mean * max(0, self._rounds - self._done)

    def _say(self, text: str, style: str = "", always: bool = False) -> None:
        """A line that stays: all of them in plain mode, else above the panel only what must not be missed."""
        if self.plain or always:
            self.console.print(Text(text, style=style), highlight=False, soft_wrap=True)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def _loss(event: Mapping[str, Any]) -> str:
    loss = number(event.get("train_loss"))
    return NOTHING if loss is None else f"{loss:.3f}"


def _round_seconds(event: Mapping[str, Any]) -> float:
    return sum(number(value) or 0.0 for value in (event.get("seconds") or {}).values())


def _aligned(event: Mapping[str, Any]) -> str:
    """What the alignment before a round did to the divergence of the emulator; held-out rows say it best."""
    fidelity = event.get("fidelity")
    measured = [fidelity.get(rows) for rows in ("held_out", "public")] if isinstance(fidelity, Mapping) else []
    values = next((value for value in measured if isinstance(value, Mapping)), {})
    before, after = (number(values.get(when)) for when in ("before", "after"))
    done = f"round {int(event['round']) + 1}: " + ("aligned" if event.get("steps") else "not aligned")
    if after is None:
        return done
    return f"{done}, KL {'' if before in (None, after) else f'{_short(before)} -> '}{_short(after)}"


def _short(divergence: float) -> str:
    return f"{divergence:.2f}" if divergence >= 0.1 else f"{divergence:.2g}"


def _scores(event: Mapping[str, Any]) -> str:
    overall = event.get("overall") or {}
    names = (*DECISIVE, "exact_match", "rouge_l", "reward_accuracy", "prefers_chosen")
    shown = [name for name in names if number(overall.get(name)) is not None]
    shown = [*shown[:2], *(["loss"] if number(overall.get("loss")) is not None else [])]  # fits 80 columns
    texts = (
        f"{METRIC_NAMES[name].lower()} {format_metric(name, Value(overall[name]))}{' %' if name in SHARES else ''}"
        for name in shown
    )
    return ", ".join(texts) or NOTHING
