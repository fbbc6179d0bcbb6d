"""What a report says and shows of an emulator: the part of the model that clients hold in its place.

Wording matters here. The emulator is made of real layers of the model, so a gap between model and emulator is what
was measured in this run, not a guarantee.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from flocktune.report.charts import Line, line_chart
from flocktune.report.figures import Figure
from flocktune.report.runs import Run
from flocktune.report.summaries import SHARES, Summary, Value, emulator_dataset, metric, number, plug_in_gap
from flocktune.report.svg import drawing, tag, text
from flocktune.report.tables import NOTHING, Cell, Grid, format_bytes, format_metric, format_seconds

_WIDE, _NARROW, _LEFT = 1040.0, 540.0, 84.0
"""As the grids and the charts of a page, so that letters have one size in all pictures."""
_MANY = 24
"""With more layers than this the picture takes the whole width of the page."""
_NAMED = 8
"""So many layers are named in a sentence; the picture shows more."""
_FIDELITY = "Fidelity of the emulator: KL to the full model"
_ROWS = {"public": "Public rows", "held_out": "Held-out rows"}
_FAR = 3.0
"""A first divergence so many times above all later ones would flatten the curve; it is told in words instead."""


@dataclass(frozen=True)
class Emulator:
    """Which layers of the full model clients hold, by their index there (from 0), and how much that is.

    ``share``: of the parameters; None when the log does not say.
    """

    layers: int
    adapter: Sequence[int]
    kept: Sequence[int]
    dropped: Sequence[int]
    share: float | None
    size: float | None

    @property
    def held(self) -> int:
        """How many layers a client has."""
        return len(self.adapter) + len(self.kept)


def read_emulator(runs: Sequence[Run]) -> Emulator | None:
    """The emulator of the first run; None when there is none, or its layers make no sense."""
    said = runs[0].start.get("emulator") if runs else None
    if not isinstance(said, Mapping):
        return None
    adapter, kept, dropped = (_indices(said.get(name)) for name in ("adapter", "kept", "dropped"))
    layers = said.get("full_layers")
    if sorted([*adapter, *kept, *dropped]) != list(range(len(adapter) + len(kept) + len(dropped))):
        return None
    if layers != len(adapter) + len(kept) + len(dropped):
        return None
    own, full = number(said.get("parameters")), number(said.get("full_parameters"))
    share = own / full if own and full else None
    return Emulator(int(layers), adapter, kept, dropped, share, number(said.get("bytes")))


def what_clients_hold(emulator: Emulator) -> str:
    """Which part of the full model is with the clients, in words that promise no more than is so."""
    of_it = [f"{emulator.share * 100:.0f} % of its parameters"] if emulator.share is not None else []
    of_it += [f"{format_bytes(emulator.size)}, sent once to each"] if emulator.size else []
    measured = f" ({', '.join(of_it)})" if of_it else ""
    tuned = f"they tune {spans(emulator.adapter)}"
    unseen = spans(emulator.dropped)
    if unseen.count(",") > _NAMED:
        unseen = f"the other {len(emulator.dropped)}"
    if not emulator.dropped:
        return f"Clients held all {emulator.layers} layers of the model{measured}; {tuned}. Nothing was kept from them."
    return (
        f"The full model never left the server: clients held an emulator of {emulator.held} of its {emulator.layers} "
        f"layers{measured}; {tuned} (counted from 0) and never saw {unseen}. The emulator is made of "
        "real layers of the full model: the gap is what was measured here, not a guarantee."
    )


def two_results(summary: Summary, dataset: str, name: str, spoken: str) -> str:
    """AdapFu, AdapEmu and the gap between them, in sentences; ``spoken`` says AdapFu. Empty without AdapEmu."""
    emulated, gap = metric(summary, emulator_dataset(dataset), name), plug_in_gap(summary, dataset, name)
    if emulated is None or gap is None:
        return ""
    share = name in SHARES
    far = format_metric(name, Value(abs(gap.mean), gap.std)) + (" points" if share else "")
    said = (
        f"The adapter plugged into the full model (AdapFu) {spoken}; on the emulator, as a client could use it "
        f"(AdapEmu), it gets to {format_metric(name, emulated)}{' %' if share else ''}."
    )
    if round(gap.mean, 3) == 0:
        return f"{said} There is no plug-in gap: a client gets as much out of the adapter as the model's owner."
    if gap.std is not None and abs(gap.mean) <= gap.std:
        return f"{said} The plug-in gap of {far} is within its spread over the seeds: it shows no protection."
    if (gap.mean > 0) == share:
        return (
            f"{said} The plug-in gap of {far} is the model owner's protection: what the adapter gains only together "
            "with the full model."
        )
    return f"{said} The gap is the wrong way round by {far}: the emulator did better, so nothing protects the owner."


def client_cost(summaries: Mapping[str, Summary], labels: Mapping[str, str]) -> str:
    """What one local step costs a client, method by method; empty when it was not counted."""
    told = []
    for key, summary in summaries.items():
        cost = summary.get("client_cost")
        names = ("flops_per_step", "flops_per_token_cached", "tokens_per_step", "activation_bytes")
        flops, cached, tokens, activations = (
            number(cost.get(name)) if isinstance(cost, Mapping) else None for name in names
        )
        seconds = number(summary.get("client_seconds_per_step"))
        parts = [spoken_flops(flops)] if flops else []
        parts += [f"{spoken_flops(cached * tokens)} in later epochs of a round"] if cached and tokens else []
        parts += [f"{format_bytes(activations)} of activations"] if activations else []
        parts += [format_seconds(seconds)] if seconds else []
        told += [f"{labels[key]} {', '.join(parts)}"] if parts else []
    return f"One local step costs a client: {'; '.join(told)}." if told else ""


def spans(layers: Sequence[int]) -> str:
    """Layers in words, neighbours joined: ``layers 0, 2–4``."""
    found: list[list[int]] = []
    for layer in sorted(layers):
        if found and layer == found[-1][-1] + 1:
            found[-1].append(layer)
        else:
            found.append([layer])
    pieces = [str(run[0]) if len(run) == 1 else f"{run[0]}{', ' if len(run) == 2 else '–'}{run[-1]}" for run in found]
    return ("layer " if len(layers) == 1 else "layers ") + (", ".join(pieces) or "none")


def is_wide(emulator: Emulator) -> bool:
    """Whether the picture of the split is as wide as the page."""
    return emulator.layers > _MANY


def split_picture(emulator: Emulator) -> Markup:
    """The full model's layers as a row of cells, and below them those that clients hold, in their places."""
    whole = _WIDE if is_wide(emulator) else _NARROW
    width = min(56.0, (whole - _LEFT) / emulator.layers)
    places = [(layer, _LEFT + layer * width) for layer in range(emulator.layers)]
    rows = (("Full model", "server", 0.0), ("Emulator", "clients", 46.0))
    drawn = []
    for name, where, y in rows:
        drawn.append(text(_LEFT - 10, y + 15, name, class_="name", text_anchor="end"))
        drawn.append(text(_LEFT - 10, y + 29, where, class_="tick", text_anchor="end"))
        drawn += [_cell(emulator, layer, x, y, width, bool(y)) for layer, x in places]
    drawn.append(_split_key(100.0))
    said = (
        f"{emulator.layers} layers, counted from 0. Adapter, tuned by clients: {spans(emulator.adapter)}. "
        f"Kept in the emulator: {spans(emulator.kept)}. Dropped, only with the server: {spans(emulator.dropped)}."
    )
    return drawing(whole, 158, "What clients hold of the model", said, *drawn)


def fidelity(runs: Sequence[Run]) -> Figure | None:
    """KL(full model || emulator) before and after each alignment, as a saw-tooth.

    Means over seeds. An alignment stands at the rounds done before it; what the rounds in between cost shows as the
    way up, what an alignment gains as the way down.
    """
    curves = {rows: _divergences(runs, rows) for rows in _ROWS}
    first = {rows: curve.pop((0, 0)) for rows, curve in curves.items() if _starts_far(curve)}
    lines = []
    for place, (rows, curve) in enumerate(curves.items()):
        points = [(float(done), statistics.fmean(curve[done, when])) for done, when in sorted(curve)]
        if points:
            lines.append(Line(_ROWS[rows], points, f"m-{place * 2}", "7 3" if place else None))
    if not any(len(line.points) > 1 for line in lines):
        return None
    said = "; ".join(f"{line.label}: {line.points[0][1]:.3g} to {line.points[-1][1]:.3g}" for line in lines)
    far = ", ".join(f"{_ROWS[rows].lower()} {statistics.fmean(values):.3g}" for rows, values in first.items())
    remark = f"Before the first alignment it was off this scale: {far}." if far else ""
    picture = line_chart(lines, title=_FIDELITY, description=said, x_label="rounds done", y_format=_three)
    whole = {
        _ROWS[rows]: {**curve, **({(0, 0): first[rows]} if rows in first else {})} for rows, curve in curves.items()
    }
    return Figure(_FIDELITY, picture, _numbers(whole), remark)


def _numbers(curves: Mapping[str, Mapping[tuple[int, int], list[float]]]) -> Grid:
    """A row an alignment: before -> after, of each kind of rows."""
    told = {rows: curve for rows, curve in curves.items() if curve}
    done = sorted({round for curve in told.values() for round, _ in curve})

    def said(values: Sequence[float] | None) -> str:
        return _three(statistics.fmean(values)) if values else NOTHING

    rows = (
        (Cell(str(round)), *(Cell(f"{said(c.get((round, 0)))} → {said(c.get((round, 1)))}") for c in told.values()))
        for round in done
    )
    return Grid(("Rounds done", *told), tuple(rows))


def _three(value: float) -> str:
    return f"{value:.3g}"


def _divergences(runs: Sequence[Run], rows: str) -> dict[tuple[int, int], list[float]]:
    """(round, 0 before or 1 after its alignment) -> the divergence of every seed that measured it."""
    found: dict[tuple[int, int], list[float]] = {}
    for event in (event for run in runs for event in run.alignments):
        measured: Any = event.get("fidelity")
        values = measured.get(rows) if isinstance(measured, Mapping) else None
        for place, when in enumerate(("before", "after")):
            value = number(values.get(when)) if isinstance(values, Mapping) else None
            if value is not None:
                found.setdefault((event["round"], place), []).append(value)
    return found


def _starts_far(curve: Mapping[tuple[int, int], list[float]]) -> bool:
    later = [value for key, values in curve.items() if key != (0, 0) for value in values]
    return (0, 0) in curve and len(later) > 1 and statistics.fmean(curve[0, 0]) > _FAR * max(later)


def _cell(emulator: Emulator, layer: int, x: float, y: float, width: float, client: bool) -> Markup:
    """A layer: filled where it is tuned, pale where it is kept, an outline where it is dropped."""
    adapter, dropped = layer in emulator.adapter, layer in emulator.dropped
    role = "adapter" if adapter else "dropped" if dropped else "kept"
    place = {"x": x + 1, "y": y, "width": max(1.0, width - 3), "height": 36, "rx": min(4.0, width / 5)}
    note = tag("title", f"layer {layer}: {role}")
    if dropped:
        drawn = [tag("rect", note, **place, class_="unused", stroke_dasharray="3 3" if client else None)]
    else:
        drawn = [tag("rect", note, **place, class_="heat", fill_opacity=None if adapter else 0.25)]
    if width >= 20 and not (dropped and client):
        style = "on" if adapter else "tick" if dropped else "off"
        drawn.append(text(x + width / 2 - 0.5, y + 22, str(layer), class_=style, text_anchor="middle"))
    return tag("g", *drawn)


def _split_key(y: float) -> Markup:
    drawn = []
    for style, opacity, said in (
        ("heat", None, "adapter: tuned by clients, plugged into the full model"),
        ("heat", 0.25, "kept in the emulator"),
        ("unused", None, "dropped: only with the server"),
    ):
        drawn.append(tag("rect", x=_LEFT + 1, y=y, width=11, height=11, rx=2, class_=style, fill_opacity=opacity))
        drawn.append(text(_LEFT + 19, y + 10, said, class_="tick"))
        y += 20
    return tag("g", *drawn)


def _indices(value: Any) -> list[int]:
    return [index for index in value if isinstance(index, int)] if isinstance(value, list) else []


def spoken_flops(value: float) -> str:
    for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} FLOP"
