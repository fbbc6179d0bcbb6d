"""Methods side by side in bars: on all rows, and category by category. Nothing when nothing was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from flocktune.report.charts import Bar, bar_panel
from flocktune.report.figures import Figure, numbers_of_bars
from flocktune.report.runs import Experiment
from flocktune.report.styles import short_label, spoken_as, style_of
from flocktune.report.summaries import (
    METRIC_NAMES,
    SHARES,
    categories,
    datasets,
    emulator_dataset,
    headline_metric,
    method_label,
    metric,
)
from flocktune.report.tables import Cell, Grid, score_cell

_SMALL_SHARE = 0.1
"""Where no bar is longer than this, tracks end here: it would not be seen on one that ends at 1."""


def ladder(experiment: Experiment) -> Figure | None:
    """The headline metric of every method as a bar; one of a method alone would say nothing."""
    summaries = experiment.summaries
    dataset = next(iter(datasets(summaries)), "")
    name = headline_metric(summaries, dataset)
    if name is None or len(summaries) < 2:
        return None
    bars = []
    for key, summary in summaries.items():
        style, label = style_of(key, list(summaries))[0], short_label(key, summary)
        emulated = metric(summary, emulator_dataset(dataset), name)
        value = metric(summary, dataset, name)
        bars.append(Bar(label, value.mean if value else None, style, value.std if value else None))
        bars += [Bar("on the emulator", emulated.mean, style, emulated.std)] if emulated else []
    note = "More is better." if name in SHARES else "Less is better."
    note += " Whiskers are one standard deviation over seeds." if any(bar.std is not None for bar in bars) else ""
    title = f"{METRIC_NAMES[name]}, side by side"
    return _figure(title, bars, name, _highest(bars, name), title=title, width=480, note=note)


def category_panels(experiment: Experiment) -> list[Figure]:
    """For each category one bar a method; with a single method, one panel with a bar a category."""
    summaries = experiment.summaries
    dataset = next(iter(datasets(summaries)), "")
    name = headline_metric(summaries, dataset)
    if name is None:
        return []
    names, keys = categories(summaries, dataset), list(summaries)
    labels = {key: short_label(key, summaries[key]) for key in keys}
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
    highest = _highest(list(bars.values()), name)
    found = []
    for heading, panel in panels:
        title = f"{METRIC_NAMES[name]} by category, {heading}"
        found.append(replace(_figure(heading, panel, name, highest, title=title), numbers=None))
    return found


def category_numbers(experiment: Experiment) -> Grid | None:
    """What the panels show, as one table: a row a category, a column a method."""
    summaries = experiment.summaries
    dataset = next(iter(datasets(summaries)), "")
    name = headline_metric(summaries, dataset)
    if name is None:
        return None
    rows = [
        (
            Cell(category.replace("_", " ")),
            *(score_cell(name, metric(one, dataset, name, category)) for one in summaries.values()),
        )
        for category in categories(summaries, dataset)
    ]
    return (
        Grid(("Category", *(method_label(key, one) for key, one in summaries.items())), tuple(rows)) if rows else None
    )


def _figure(
    heading: str, bars: Sequence[Bar], name: str, highest: float, *, title: str, width: float = 320, note: str = ""
) -> Figure:
    spoken = spoken_as(name)
    said = ", ".join(f"{bar.label} {spoken(bar.value)}" for bar in bars if bar.value is not None)
    picture = bar_panel(bars, title=title, description=said, highest=highest, value_format=spoken, width=width)
    return Figure(heading, picture, numbers_of_bars(bars, "Name", METRIC_NAMES[name], spoken), note)


def _highest(bars: Sequence[Bar], name: str) -> float:
    reach = max(((bar.value or 0.0) + (bar.std or 0.0) for bar in bars), default=0.0)
    if name in SHARES:  # a bar that fills its track says all of it
        return 1.0 if reach > _SMALL_SHARE else _SMALL_SHARE
    return reach or 1.0
