"""The pictures of a report, each from an experiment to SVG. A section returns nothing when it has nothing to show."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from flocktune.report.charts import Bar, Line, Stack, bar_panel, line_chart, stacked_bars
from flocktune.report.grids import Participation, holdings, participation
from flocktune.report.outcome import main_method
from flocktune.report.runs import Experiment, Run
from flocktune.report.summaries import (
    DECISIVE,
    METRIC_NAMES,
    SHARES,
    categories,
    datasets,
    emulator_dataset,
    headline_metric,
    is_baseline,
    method_label,
    metric,
    number,
    on_pairs,
    plain_dataset,
    travelled,
)
from flocktune.report.tables import format_bytes, format_seconds

_DASHES = (None, "7 3", "2 3", "9 3 2 3")
_HEALTH = {
    "update_norm": "Size of the combined update",
    "aggregation_error": "Aggregation error",
    "staleness": "Mean age of the updates, in rounds",
}
"""What a round tells of itself, as pictures: field of its event -> title."""

Points = Sequence[tuple[float, float]]
Titled = tuple[str, Markup] | None


def style_of(key: str, keys: Sequence[str]) -> tuple[str, str | None]:
    """CSS class and dash pattern of a method; local baselines share a colour and differ in their dashes."""
    if key.startswith("local"):
        local = [other for other in keys if other.startswith("local")]
        return "m-local", _DASHES[(local.index(key) + 1) % len(_DASHES)]
    if key in ("base", "centralised"):
        return f"m-{key}", None if key == "base" else "10 4"
    others = [other for other in keys if not is_baseline(other)]
    return f"m-{others.index(key) % 4}", _DASHES[others.index(key) // 4 % len(_DASHES)]


def curves(experiment: Experiment) -> list[tuple[str, Markup]]:
    """Training loss, then every held-out metric that was measured more than once: (title, picture)."""
    charts = [_training_loss(experiment)]
    for dataset in datasets(experiment.summaries):
        shown = ("loss", *DECISIVE, "rouge_l", "exact_match", "reward_accuracy", "prefers_chosen")
        names = [name for name in shown if _measured(experiment, dataset, name)]
        charts += [_evaluations(experiment, dataset, name) for name in names[:3]]
    main = experiment.methods.get(main_method(experiment)) or []
    for field, title in _HEALTH.items():
        charts.append(_health(main, field, title, _short_label(main_method(experiment), {})))
    return [chart for chart in charts if chart]


def category_panels(experiment: Experiment) -> list[tuple[str, Markup]]:
    """For each category one bar a method; with a single method, one panel with a bar a category: (heading, picture)."""
    summaries = experiment.summaries
    dataset = next(iter(datasets(summaries)), "")
    name = headline_metric(summaries, dataset)
    if name is None:
        return []
    names, keys = categories(summaries, dataset), list(summaries)
    labels = {key: _short_label(key, summaries[key]) for key in keys}
    bars = {
        (key, category): Bar(
            labels[key] if len(keys) > 1 else category.replace("_", " "),
            value.mean if value else None,
            style_of(key, keys)[0],
            value.std if value else None,
        )
        for key in keys
        for category in names
        for value in [metric(summaries[key], dataset, name, category)]
    }
    if len(keys) > 1:
        panels = [(category.replace("_", " "), [bars[key, category] for key in keys]) for category in names]
    else:
        panels = [(METRIC_NAMES[name], [bars[keys[0], category] for category in names])] if names else []
    reach = [(bar.value or 0.0) + (bar.std or 0.0) for bar in bars.values()]
    highest = 1.0 if name in SHARES and max(reach, default=0.0) > 0.5 else max(reach, default=1.0)
    return [(heading, _panel(heading, panel, name, highest)) for heading, panel in panels]


def _panel(heading: str, bars: Sequence[Bar], name: str, highest: float) -> Markup:
    said = ", ".join(f"{bar.label} {_format(name)(bar.value)}" for bar in bars if bar.value is not None)
    title = f"{METRIC_NAMES[name]} by category, {heading}"
    return bar_panel(bars, title=title, description=said, highest=highest, value_format=_format(name))


def holdings_chart(clients: Mapping[str, Mapping[str, int]]) -> Markup:
    """Who holds what, alone: client -> category -> rows, as SVG. Its colours are classes of the page's style."""
    return holdings(clients)


def who_holds_what(experiment: Experiment) -> Markup | None:
    """The allocation of the main method's first run."""
    clients = _first_start(experiment).get("clients") or {}
    counts = {name: client.get("categories") or {"all": client.get("rows") or 0} for name, client in clients.items()}
    return holdings(counts) if counts else None


def who_took_part(experiment: Experiment) -> Markup | None:
    """Clients x rounds of the main method's first run."""
    runs = experiment.methods.get(main_method(experiment)) or []
    if not runs or not runs[0].rounds:
        return None
    rounds = runs[0].rounds
    named = [*(runs[0].start.get("clients") or {}), *(name for event in rounds for name in event.get("selected") or [])]
    grid = {}
    for client in dict.fromkeys(named):
        answered = {event["round"] for event in rounds if client in (event.get("answered") or [])}
        failed = {event["round"] for event in rounds for f in event.get("failures") or [] if f.get("client") == client}
        asked = {event["round"] for event in rounds if client in (event.get("selected") or [])}
        grid[client] = Participation(frozenset(answered), frozenset(failed), frozenset(asked - answered - failed))
    return participation(grid, rounds[-1]["round"] + 1, title="Who took part")


def where_time_went(experiment: Experiment) -> Markup | None:
    """Seconds of each method by part of the work, summed over rounds; means over seeds."""
    work = ("load", "data", "align", "forward and backward", "aggregate", "evaluate", "save")
    stacks, parts = [], dict.fromkeys(work)
    for key, runs in experiment.methods.items():
        tables = [_seconds(run) for run in runs]
        names = dict.fromkeys(part for table in tables for part in table)
        parts.update(names)
        means = {part: statistics.fmean(table.get(part, 0.0) for table in tables) for part in names}
        if sum(means.values()) > 0:
            stacks.append(Stack(method_label(key, experiment.summaries[key]), means))
    used = [part for part in parts if any(stack.parts.get(part) for stack in stacks)]
    if not stacks:
        return None
    said = "; ".join(f"{stack.label} {format_seconds(sum(stack.parts.values()))}" for stack in stacks)
    return stacked_bars(stacks, used, title="Where the time went", description=said, value_format=format_seconds)


def what_travelled(experiment: Experiment) -> Markup | None:
    """Bytes of each method by direction; an emulator, which a client gets once, is a part of its own."""
    directions = {
        "down, to clients": "bytes_down",
        "up, from clients": "bytes_up",
        "the emulator, once to a client": "bytes_emulator",
    }
    stacks = []
    for key, summary in experiment.summaries.items():
        parts = {name: travelled(key, summary, where) or 0.0 for name, where in directions.items()}
        if any(parts.values()):
            stacks.append(Stack(method_label(key, summary), parts))
    if not stacks:
        return None
    said = "; ".join(f"{stack.label} {format_bytes(sum(stack.parts.values()))}" for stack in stacks)
    names = [
        name for name in directions if name != "the emulator, once to a client" or any(s.parts[name] for s in stacks)
    ]
    return stacked_bars(stacks, names, title="What travelled", description=said, value_format=format_bytes)


def _training_loss(experiment: Experiment) -> Titled:
    def points(run: Run, _: str) -> Points:
        losses = ((event["round"] + 1, number(event.get("train_loss"))) for event in run.rounds)
        return [(float(done), loss) for done, loss in losses if loss is not None]

    of_pairs = any("reward_accuracy" in event for run in experiment.runs for event in run.rounds)
    title = f"Training loss, nats a {'pair' if of_pairs else 'token'}"
    return _chart(experiment, points, title, lambda value: f"{value:.2f}")


def _evaluations(experiment: Experiment, dataset: str, name: str) -> Titled:
    """A metric over rounds; only evaluations on equally many rows, since others can not be compared."""
    events = [event for run in experiment.runs for event in _on(run, dataset)]
    sizes = Counter(_rows(event) for event in events)
    [(rows, _)] = sizes.most_common(1) or [(None, 0)]

    def points(run: Run, looked_at: str) -> Points:
        same = (event for event in _on(run, looked_at or dataset) if _rows(event) == rows)
        latest = {event["round"]: number((event.get("overall") or {}).get(name)) for event in same}
        return [(float(done), value) for done, value in latest.items() if value is not None]

    unit = "pair" if on_pairs(experiment.summaries, dataset) else "token"
    title = f"Held-out loss, nats a {unit}" if name == "loss" else METRIC_NAMES[name] + ", held-out rows"
    remarks = [dataset] if len(datasets(experiment.summaries)) > 1 else []
    remarks += [f"on {rows} rows"] if len(sizes) > 1 else []
    title = f"{title} ({', '.join(remarks)})" if remarks else title
    return _chart(experiment, points, title, _format(name), emulated=emulator_dataset(dataset))


def _on(run: Run, dataset: str) -> list[Mapping[str, Any]]:
    unnamed = plain_dataset(dataset)  # old logs do not name it
    return [event for event in run.evaluations if event.get("dataset", unnamed) == dataset]


def _rows(event: Mapping[str, Any]) -> Any:
    return (event.get("overall") or {}).get("rows")


def _health(runs: Sequence[Run], field: str, title: str, label: str) -> Titled:
    events = [(event["round"] + 1, number(event.get(field))) for run in runs[:1] for event in run.rounds]
    points = [(float(done), value) for done, value in events if value is not None]
    if len(points) < 2:
        return None
    line = Line(label, points, "m-0")
    said = f"From {points[0][1]:.3g} to {points[-1][1]:.3g}."
    return title, line_chart(
        [line], title=title, description=said, x_label="round", y_format=lambda value: f"{value:.3g}"
    )


def _chart(
    experiment: Experiment,
    points: Callable[[Run, str], Points],
    title: str,
    y_format: Callable[[float], str],
    *,
    emulated: str = "",
) -> Titled:
    """One line a method: the mean over its seeds, with a band from the lowest to the highest.

    ``points`` gets a run and the data set to look at (empty: the usual one). A method that was evaluated on
    ``emulated`` too has two lines, AdapFu and AdapEmu.
    """
    lines = []
    twice = {key for key, runs in experiment.methods.items() if emulated and any(_on(run, emulated) for run in runs)}
    for key, runs in experiment.methods.items():
        style, dash = style_of(key, list(experiment.methods))
        label = _short_label(key, experiment.summaries[key])
        whose = f"{label}, " if len(twice) > 1 else ""  # room is short, and the colour says it too
        full = _averaged([points(run, "") for run in runs])
        if full[0]:
            named = f"{whose}AdapFu" if key in twice else label
            lines.append(Line(named, full[0], style, dash, full[1], reference=key == "base"))
        on_emulator = _averaged([points(run, emulated) for run in runs]) if key in twice else ([], [])
        if on_emulator[0]:
            lines.append(Line(f"{whose}AdapEmu", on_emulator[0], style, "2 5", on_emulator[1]))
    flat = len({y for line in lines for _, y in line.points}) < 2
    if flat or not any(len(line.points) > 1 for line in lines):
        return None
    said = "; ".join(f"{line.label}: {y_format(line.points[0][1])} to {y_format(line.points[-1][1])}" for line in lines)
    return title, line_chart(lines, title=title, description=said, x_label="rounds done", y_format=y_format)


def _averaged(seeds: Sequence[Points]) -> tuple[Points, Sequence[tuple[float, float, float]]]:
    """The mean over seeds at every place, and with several the lowest and highest there."""
    tables = [dict(points) for points in seeds]
    places = sorted({x for table in tables for x in table})
    values = {x: [table[x] for table in tables if x in table] for x in places}
    band = [(x, min(values[x]), max(values[x])) for x in places] if len(tables) > 1 else []
    return [(x, statistics.fmean(values[x])) for x in places], band


def _measured(experiment: Experiment, dataset: str, name: str) -> bool:
    return any(metric(summary, dataset, name) for summary in experiment.summaries.values())


def _seconds(run: Run) -> dict[str, float]:
    """Seconds by part, summed over rounds; evaluations have their own events."""
    parts: dict[str, float] = {}
    for event in run.rounds:
        for name, value in (event.get("seconds") or {}).items():
            part = name.replace("_", " and ")
            parts[part] = parts.get(part, 0.0) + (number(value) or 0.0)
    if "evaluate" not in parts:
        parts["evaluate"] = sum(number(event.get("seconds")) or 0.0 for event in run.evaluations)
    return parts


def _first_start(experiment: Experiment) -> Mapping[str, Any]:
    runs = experiment.methods.get(main_method(experiment)) or []
    return runs[0].start if runs else {}


def _short_label(key: str, summary: Mapping[str, Any]) -> str:
    return method_label(key, summary).replace("Base model", "Base")


def _format(name: str) -> Callable[[float], str]:
    return (lambda value: f"{value * 100:.0f} %") if name in SHARES else (lambda value: f"{value:.2f}")
