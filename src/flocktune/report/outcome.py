"""The outcome of an experiment in words, and in the few numbers that matter most."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from flocktune.report.emulator import read_emulator, two_results, what_clients_hold
from flocktune.report.runs import Experiment
from flocktune.report.summaries import (
    METRIC_NAMES,
    SHARES,
    Summary,
    Value,
    choices,
    datasets,
    emulator_dataset,
    headline_metric,
    is_baseline,
    method_label,
    metric,
    number,
)
from flocktune.report.tables import format_metric

_SAYS = {
    "checked": "answers {} of the held-out questions correctly",
    "number_match": "ends {} of its answers with the right number",
    "choice": "holds the right one of several choices for the likeliest in {} of the held-out questions",
    "pass_at_1": "writes a program that passes its tests for {} of the held-out prompts",
    "rouge_l": "reaches a ROUGE-L of {} on the held-out rows",
    "exact_match": "gives {} of the held-out answers exactly",
    "contains": "gives {} of the held-out answers somewhere in its own",
    "reward_accuracy": "gives the chosen answer the higher reward in {} of the held-out pairs",
    "loss": "reaches a held-out loss of {} nats a token",
}
_IS = {
    "checked": "of the held-out questions answered correctly",
    "number_match": "of the answers end with the right number",
    "choice": "of the held-out questions: the likeliest choice is the right one",
    "pass_at_1": "of the prompts: the program passes its tests",
    "rouge_l": "ROUGE-L between the answers and the references, on held-out rows",
    "exact_match": "of the held-out answers exactly as the reference has them",
    "contains": "of the held-out answers contain the reference",
    "reward_accuracy": "of the held-out pairs: the chosen answer has the higher reward",
    "loss": "nats a token: the loss on held-out rows; less is better",
}

_CHOICES_SHOWN = 4
"""Of how many runs it is told, in the page's first lines, which round is the result."""


@dataclass(frozen=True)
class Headline:
    """The figure that the page is about: how large, of what, by which method, and how sure."""

    figure: str
    unit: str
    what: str
    sure: str


def main_method(experiment: Experiment) -> str:
    """The method that the experiment is about: the federated one, else the only or last one.

    Beside FedBiOT, FedIT is only its upper bound.
    """
    keys = list(experiment.summaries)
    federated = [key for key in keys if not is_baseline(key)]
    emulated = [key for key in federated if key.startswith("fedbiot")]
    return (emulated or federated or keys)[-1]


def headline(experiment: Experiment) -> Headline | None:
    """The main method's headline metric; None before the first evaluation."""
    summaries, key = experiment.summaries, main_method(experiment)
    dataset = next(iter(datasets(summaries)), "")
    name = headline_metric(summaries, dataset)
    value = metric(summaries[key], dataset, name) if name else None
    if name is None or value is None:
        return None
    figure, _, spread = format_metric(name, value).partition(" ± ")
    unit = " ".join([*([f"± {spread}"] if spread else []), *(["%"] if name in SHARES else [])])
    emulated = metric(summaries[key], emulator_dataset(dataset), name)
    whose = method_label(key, summaries[key]) + (", adapter in the full model (AdapFu)" if emulated else "")
    what = f"{_IS.get(name, METRIC_NAMES[name])}: {whose}"
    return Headline(figure, unit, what, _how_sure(experiment, key, dataset, name))


def what_was_run(experiment: Experiment) -> str:
    """A sentence: who tuned what, how, on how much."""
    key = main_method(experiment)
    runs = experiment.methods.get(key) or []
    label = method_label(key, experiment.summaries[key])
    start = runs[0].start if runs else {}
    named = Path(str(start.get("model") or "a model")).name
    model = "the embedded model" if named == "embedded" else named
    clients, owners = start.get("clients") or {}, start.get("owners") or []
    people = len(clients) or len(owners)
    if not people:
        return f"{label}."
    done, planned = len(runs[0].rounds), start.get("rounds", 0)
    so_far = "" if runs[0].ended else " so far"  # it may have ended early, and well
    rounds = f"{done} round{'' if done == 1 else 's'}" if done >= planned else f"{done} of {planned} rounds{so_far}"
    held = sum(number(client.get("rows")) or 0 for client in clients.values())
    rows = f" on {held:,.0f} rows" if held else ""
    seeds = f", {len(runs)} seeds" if len(runs) > 1 else ""
    if key == "base":
        return f"{label}: {model} as it comes, without tuning."
    if is_baseline(key):
        return f"{label}: {rounds} of tuning {model}{seeds}."
    # Who held all rows in one place can not claim that they stayed where they were.
    who, stayed = ("client", ", on rows that never left them") if owners else ("simulated client", "")
    plural = "" if people == 1 else "s"
    return f"{people} {who}{plural} tuned {model} together by {label}: {rounds}{rows}{stayed}{seeds}."


def verdict(experiment: Experiment) -> str:
    """What came out beside the baselines, in sentences; with an emulator, what it is worth to whom."""
    summaries, key = experiment.summaries, main_method(experiment)
    dataset = next(iter(datasets(summaries)), "")
    name = headline_metric(summaries, dataset)
    value = metric(summaries[key], dataset, name) if name else None
    if name is None or value is None:
        return "It has not been evaluated yet."
    said = _SAYS.get(name, "reaches {}").format(spoken(name, value))
    parts = [two_results(summaries[key], dataset, name, said) or f"{method_label(key, summaries[key])} {said}."]
    parts.append(_baselines(summaries, key, dataset, name))
    emulator = read_emulator(experiment.methods.get(key) or [])
    parts += [what_clients_hold(emulator)] if emulator else []
    chosen = choices(summaries)
    parts += [f"{said}." for said in chosen[:_CHOICES_SHOWN]]
    parts += [f"So for {len(chosen) - _CHOICES_SHOWN} more runs." if len(chosen) > _CHOICES_SHOWN else ""]
    return " ".join(part for part in parts if part)


def spoken(name: str, value: Value) -> str:
    """A metric with its unit, as it stands in a sentence: ``61.2 ± 1.0 %``."""
    return format_metric(name, value) + (" %" if name in SHARES else "")


def _how_sure(experiment: Experiment, key: str, dataset: str, name: str) -> str:
    """Deviation over seeds; of one seed, what the choice of rows alone leaves open."""
    summary = experiment.summaries[key]
    seeds = len(summary.get("seeds") or [])
    if seeds > 1:
        return f"Mean ± standard deviation of {seeds} seeds."
    measured = (summary.get("metrics") or {}).get(dataset) or {}
    rows = number((measured.get("overall") or {}).get("rows"))
    interval = (measured.get("intervals") or {}).get(name) or {}
    low, high = number(interval.get("low")), number(interval.get("high"))
    if low is None or high is None:
        return f"One seed, {rows:,.0f} rows." if rows else "One seed."
    return f"95 % interval {low * 100:.1f} to {high * 100:.1f} %, of {rows or 0:,.0f} rows; one seed."


def _baselines(summaries: Mapping[str, Summary], main: str, dataset: str, name: str) -> str:
    """How the baselines did on the same metric, and whether they come in the expected order."""
    values = {key: value.mean for key, summary in summaries.items() if (value := metric(summary, dataset, name))}
    local = [value for key, value in values.items() if key.startswith("local")]
    told: list[tuple[str, float]] = []
    if "base" in values:
        told.append(("the base model without tuning", values["base"]))
    if local:
        told.append((f"a client alone (mean of {len(local)})" if len(local) > 1 else "a client alone",
                     statistics.fmean(local)))  # fmt: skip
    if "fedit" in values and main != "fedit":
        told.append(("FedIT on the full model", values["fedit"]))
    if "centralised" in values:
        told.append(("centralised training on all rows", values["centralised"]))
    told = [(said, value) for said, value in told if main not in ("base", "centralised") or value != values[main]]
    if not told:
        return ""
    text = "For comparison: " + ", ".join(f"{said} {spoken(name, Value(value))}" for said, value in told) + "."
    # With an emulator the claim needs its upper bound; a client alone is beside the point there.
    bound = main.startswith("fedbiot") and "fedit" in values
    steps = ["base", "local", main, *(["fedit"] if bound else []), "centralised"]
    rungs = [(start, value) for start in steps for value in _rung(values, start)]
    if main in values and (len(told) == 3 if not bound else "base" in values):
        rising = [value if name in SHARES else -value for _, value in rungs]
        holds = all(left < right for left, right in pairwise(rising))
        seeds = len(summaries[main].get("seeds") or [main])
        called = {main: method_label(main), "fedit": "FedIT"}
        order = " < ".join(called.get(start, start) for start, _ in rungs)
        text += f" The order {order} {'holds' if holds else 'does not hold'}"
        text += f" in the means of {seeds} seeds." if seeds > 1 else " in this one seed."
    return text


def _rung(values: Mapping[str, float], start: str) -> list[float]:
    found = [value for key, value in values.items() if key.startswith(start)]
    return [statistics.fmean(found)] if found else []
