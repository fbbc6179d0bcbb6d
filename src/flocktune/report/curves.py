"""Curves over the rounds, from an experiment to pictures. A curve that has nothing to show is left out."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flocktune.report.charts import Line, line_chart
from flocktune.report.figures import Figure, numbers_of_lines
from flocktune.report.outcome import main_method
from flocktune.report.runs import Experiment, Run
from flocktune.report.styles import short_label, spoken_as, style_of
from flocktune.report.summaries import (
    DECISIVE,
    METRIC_NAMES,
    datasets,
    emulator_dataset,
    headline_metric,
    metric,
    number,
    on_pairs,
    plain_dataset,
)

_HEALTH = {
    "update_norm": "Size of the combined update",
    "aggregation_error": "Aggregation error",
    "staleness": "Mean age of the updates, in rounds",
}
"""What a round tells of itself, as pictures: field of its event -> title."""

_VALIDATION = "validation"
"""The data set of rows that choose among rounds, if a run has such."""

Points = Sequence[tuple[float, float]]


def learning(experiment: Experiment) -> list[Figure]:
    """Every held-out metric that was measured more than once, the headline metric first, then the training loss."""
    found = []
    for dataset in _looked_at(experiment):
        shown = (*DECISIVE, "rouge_l", "exact_match", "reward_accuracy", "prefers_chosen")
        names = [name for name in shown if _measured(experiment, dataset, name)]
        found += [_evaluations(experiment, dataset, name) for name in [*names[:2], "loss"]]
    found.append(_training_loss(experiment))
    return [figure for figure in found if figure]


def health(experiment: Experiment) -> list[Figure]:
    """What the rounds of the main method's first run tell of themselves."""
    key = main_method(experiment)
    runs = experiment.methods.get(key) or []
    label = short_label(key, experiment.summaries[key])
    return [figure for field, title in _HEALTH.items() if (figure := _health(runs, field, title, label))]


def category_curves(experiment: Experiment) -> list[Figure]:
    """The headline metric over the rounds in each category; the loss, if only that was measured in between."""
    for dataset in _looked_at(experiment):
        events = [event for run in experiment.runs for event in _on(run, dataset)]
        named = sorted({category for event in events for category in event.get("categories") or {}})
        for name in dict.fromkeys([headline_metric(experiment.summaries, dataset), "loss"]):
            found = [_evaluations(experiment, dataset, name, category) for category in named if name]
            if any(found):
                return [figure for figure in found if figure]
    return []


def _training_loss(experiment: Experiment) -> Figure | None:
    def points(run: Run, _: str) -> Points:
        losses = ((event["round"] + 1, number(event.get("train_loss"))) for event in run.rounds)
        return [(float(done), loss) for done, loss in losses if loss is not None]

    of_pairs = any("reward_accuracy" in event for run in experiment.runs for event in run.rounds)
    title = f"Training loss, nats a {'pair' if of_pairs else 'token'}"
    return _chart(experiment, points, title, lambda value: f"{value:.2f}")


def _evaluations(experiment: Experiment, dataset: str, name: str, category: str | None = None) -> Figure | None:
    """A metric over rounds; only evaluations on equally many rows, since others can not be compared."""
    events = [event for run in experiment.runs for event in _on(run, dataset)]
    sizes = Counter(_rows(event) for event in events)
    [(rows, _)] = sizes.most_common(1) or [(None, 0)]

    def points(run: Run, looked_at: str) -> Points:
        same = (event for event in _on(run, looked_at or dataset) if _rows(event) == rows)
        latest = {event["round"]: number(_scores(event, category).get(name)) for event in same}
        return [(float(done), value) for done, value in latest.items() if value is not None]

    unit = "pair" if on_pairs(experiment.summaries, dataset) else "token"
    kind = "validation" if dataset == _VALIDATION else "held-out"
    title = f"{kind.capitalize()} loss, nats a {unit}" if name == "loss" else f"{METRIC_NAMES[name]}, {kind} rows"
    remarks = [] if dataset in (*datasets(experiment.summaries)[:1], _VALIDATION) else [dataset]
    remarks += [f"on {rows} rows"] if len(sizes) > 1 else []
    title = f"{title} ({', '.join(remarks)})" if remarks else title
    emulated = emulator_dataset(dataset)
    if category is not None:
        return _chart(experiment, points, category.replace("_", " "), spoken_as(name), emulated=emulated, note=title)
    return _chart(experiment, points, title, spoken_as(name), emulated=emulated)


def _scores(event: Mapping[str, Any], category: str | None) -> Mapping[str, Any]:
    found = event.get("overall") if category is None else (event.get("categories") or {}).get(category)
    return found or {}


def _looked_at(experiment: Experiment) -> list[str]:
    """The data sets of the results, and those that were looked at on the way only."""
    found = datasets(experiment.summaries)
    logged = (str(event["dataset"]) for run in experiment.runs for event in run.evaluations if event.get("dataset"))
    return list(dict.fromkeys([*found, *(name for name in logged if plain_dataset(name) not in found)]))


def _on(run: Run, dataset: str) -> list[Mapping[str, Any]]:
    unnamed = plain_dataset(dataset)  # old logs do not name it
    return [event for event in run.evaluations if event.get("dataset", unnamed) == dataset]


def _rows(event: Mapping[str, Any]) -> Any:
    return (event.get("overall") or {}).get("rows")


def _health(runs: Sequence[Run], field: str, title: str, label: str) -> Figure | None:
    events = [(event["round"] + 1, number(event.get(field))) for run in runs[:1] for event in run.rounds]
    points = [(float(done), value) for done, value in events if value is not None]
    if len(points) < 2:
        return None
    line = Line(label, points, "m-0")
    said = f"From {points[0][1]:.3g} to {points[-1][1]:.3g}."
    picture = line_chart([line], title=title, description=said, x_label="round", y_format=_three)
    return Figure(title, picture, numbers_of_lines([line], "round", _three))


def _chart(
    experiment: Experiment,
    points: Callable[[Run, str], Points],
    title: str,
    y_format: Callable[[float], str],
    *,
    emulated: str = "",
    note: str = "",
) -> Figure | None:
    """One line a method: the mean over its seeds, with a band from the lowest to the highest.

    ``points`` gets a run and the data set to look at (empty: the usual one). A method that was evaluated on
    ``emulated`` too has two lines, AdapFu and AdapEmu.
    """
    lines = []
    twice = {key for key, runs in experiment.methods.items() if emulated and any(_on(run, emulated) for run in runs)}
    for key, runs in experiment.methods.items():
        style, dash = style_of(key, list(experiment.methods))
        label = short_label(key, experiment.summaries[key])
        whose = f"{label}, " if len(twice) > 1 else ""  # room is short, and the colour says it too
        full = _averaged([points(run, "") for run in runs])
        if full[0]:
            named = f"{whose}AdapFu" if key in twice else label
            level = all(run.start.get("method") == "base" for run in runs)
            lines.append(Line(named, full[0], style, dash, full[1], reference=level))
        on_emulator = _averaged([points(run, emulated) for run in runs]) if key in twice else ([], [])
        if on_emulator[0]:
            lines.append(Line(f"{whose}AdapEmu", on_emulator[0], style, "2 5", on_emulator[1]))
    flat = len({y for line in lines for _, y in line.points}) < 2
    if flat or not any(len(line.points) > 1 for line in lines):
        return None
    said = "; ".join(f"{line.label}: {y_format(line.points[0][1])} to {y_format(line.points[-1][1])}" for line in lines)
    drawn = f"{note}, {title}" if note else title
    kept = _kept_round(experiment)
    mark = (kept, "kept") if kept else None
    said += f". Round {kept:g} was kept" if kept else ""
    picture = line_chart(lines, title=drawn, description=said, x_label="rounds done", y_format=y_format, mark=mark)
    return Figure(title, picture, numbers_of_lines(lines, "rounds done", y_format), note)


def _kept_round(experiment: Experiment) -> float | None:
    """The round that is the main method's result, where rows chose it; of several seeds each has its own."""
    runs = experiment.methods.get(main_method(experiment)) or []
    chosen = runs[0].summary.get("choice") if len(runs) == 1 else None
    return number(chosen.get("round")) if isinstance(chosen, Mapping) else None


def _averaged(seeds: Sequence[Points]) -> tuple[Points, Sequence[tuple[float, float, float]]]:
    """The mean over seeds at every place, and with several the lowest and highest there."""
    tables = [dict(points) for points in seeds]
    places = sorted({x for table in tables for x in table})
    values = {x: [table[x] for table in tables if x in table] for x in places}
    band = [(x, min(values[x]), max(values[x])) for x in places] if len(tables) > 1 else []
    return [(x, statistics.fmean(values[x])) for x in places], band


def _measured(experiment: Experiment, dataset: str, name: str) -> bool:
    return any(metric(summary, dataset, name) for summary in experiment.summaries.values())


def _three(value: float) -> str:
    return f"{value:.3g}"
