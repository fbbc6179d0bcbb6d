"""The outcome of an experiment in words, and in the few numbers that matter most."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from itertools import pairwise

from flocktune.report.emulator import read_emulator, two_results, what_clients_hold
from flocktune.report.runs import Experiment
from flocktune.report.summaries import (
    METRIC_NAMES,
    SHARES,
    Summary,
    Value,
    datasets,
    emulator_dataset,
    headline_metric,
    is_baseline,
    method_label,
    metric,
    number,
    plug_in_gap,
    travelled,
)
from flocktune.report.tables import format_bytes, format_gap, format_metric, format_seconds

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


def main_method(experiment: Experiment) -> str:
    """The method that the experiment is about: the federated one, else the only or last one.

    Beside FedBiOT, FedIT is only its upper bound.
    """
    keys = list(experiment.summaries)
    federated = [key for key in keys if not is_baseline(key)]
    emulated = [key for key in federated if key.startswith("fedbiot")]
    return (emulated or federated or keys)[-1]


def outcome(experiment: Experiment) -> str:
    """One paragraph: what was done, what came out, how the baselines did, what travelled."""
    summaries = experiment.summaries
    key = main_method(experiment)
    dataset = next(iter(datasets(summaries)), "")
    name = headline_metric(summaries, dataset)
    parts = [_setting(experiment, key)]
    value = metric(summaries[key], dataset, name) if name else None
    if name and value:
        said = _SAYS.get(name, "reaches {}").format(spoken(name, value))
        parts.append(two_results(summaries[key], dataset, name, said) or f"It {said}.")
        parts.append(_baselines(summaries, key, dataset, name))
    else:
        parts.append("It has not been evaluated yet.")
    emulator = read_emulator(experiment.methods.get(key) or [])
    if emulator:
        parts.append(what_clients_hold(emulator))
    sent = travelled(key, summaries[key], "bytes_up")
    if sent:
        parts.append(f"All clients together sent {format_bytes(sent)}; no row of data left its owner.")
    privacy = summaries[key].get("privacy")
    if isinstance(privacy, Mapping) and privacy.get("said"):
        parts.append(f"Differential privacy: {privacy['said']}.")
    return " ".join(part for part in parts if part)


def tiles(experiment: Experiment) -> list[tuple[str, str, str]]:
    """The headline numbers: (number, what it is, a remark)."""
    key = main_method(experiment)
    summary, runs = experiment.summaries[key], experiment.methods.get(key) or []
    dataset = next(iter(datasets(experiment.summaries)), "")
    name = headline_metric(experiment.summaries, dataset)
    found = []
    value = metric(summary, dataset, name) if name else None
    if name and value:
        base = metric(experiment.summaries["base"], dataset, name) if "base" in experiment.summaries else None
        said = {"checked": "answered correctly", "loss": "held-out loss"}.get(name, METRIC_NAMES[name])
        remark = f"base model: {spoken(name, Value(base.mean))}" if base else f"on {dataset}"
        emulated, gap = metric(summary, emulator_dataset(dataset), name), plug_in_gap(summary, dataset, name)
        found.append((spoken(name, value), f"{said}, AdapFu" if emulated else said, remark))
        if emulated and gap:
            unit = " points" if name in SHARES else ""
            found.append(
                (format_gap(name, gap) + unit, "plug-in gap", f"AdapEmu: {spoken(name, Value(emulated.mean))}")
            )
    found += _emulator_tile(experiment, key)
    start = runs[0].start if runs else {}
    planned = start.get("rounds")
    rounds = f"{len(runs[0].rounds)} of {planned}" if planned else str(summary.get("rounds"))
    clients = start.get("clients") or {}
    found.append((rounds, "rounds done", f"{len(clients)} clients" if clients else ""))
    sent, received = travelled(key, summary, "bytes_up"), travelled(key, summary, "bytes_down")
    if sent:
        found.append((format_bytes(sent), "sent by clients", f"{format_bytes(received)} received"))
    trained = number(start.get("trainable_parameters") or summary.get("trainable_parameters"))
    if trained:
        found.append((_count(trained), "trained parameters", "the model stays frozen"))
    seconds = number(summary.get("seconds"))
    if seconds:
        peak = number(summary.get("peak_memory_bytes"))
        found.append(
            (format_seconds(seconds), "time", f"peak memory of the process {format_bytes(peak)}" if peak else "")
        )
    return found


def travel(experiment: Experiment) -> str:
    """What one client sends and receives for one update, and how many updates there were."""
    key = main_method(experiment)
    runs = [] if is_baseline(key) else experiment.methods.get(key) or []
    rounds = runs[0].rounds if runs else []
    answers = sum(len(event.get("answered") or []) for event in rounds)
    asked = sum(len(event.get("selected") or []) for event in rounds)
    sent, received = (sum(number(event.get(name)) or 0 for event in rounds) for name in ("bytes_up", "bytes_down"))
    if not (answers and sent):
        return ""
    plain = sum(number(event.get("bytes_plain")) or 0 for event in rounds)
    share = f" ({100 * sent / plain:.1f} % of their size in float32)" if sent < 0.99 * plain else ""
    return (
        f"{answers} updates of {format_bytes(sent / answers)}{share} came back for {asked} messages of "
        f"{format_bytes(received / max(1, asked))}."
    )


def spoken(name: str, value: Value) -> str:
    """A metric with its unit, as it stands in a sentence: ``61.2 ± 1.0 %``."""
    return format_metric(name, value) + (" %" if name in SHARES else "")


def _emulator_tile(experiment: Experiment, key: str) -> list[tuple[str, str, str]]:
    emulator = read_emulator(experiment.methods.get(key) or [])
    if emulator is None:
        return []
    share = "" if emulator.share is None else f"{emulator.share * 100:.0f} % of the parameters"
    return [(f"{emulator.held} of {emulator.layers}", "layers held by clients", share)]


def _setting(experiment: Experiment, key: str) -> str:
    runs = experiment.methods.get(key) or []
    label = method_label(key, experiment.summaries[key])
    start = runs[0].start if runs else {}
    clients = start.get("clients") or {}
    if not clients:
        return f"{label}."
    rows = sum(number(client.get("rows")) or 0 for client in clients.values())
    done, planned = len(runs[0].rounds), start.get("rounds", 0)
    rounds = f"{done} round{'' if done == 1 else 's'}" if done >= planned else f"{done} of {planned} rounds so far"
    seeds = f", {len(runs)} seeds" if len(runs) > 1 else ""
    return f"{label}: {rounds} with {len(clients)} clients, which hold {rows:,.0f} rows{seeds}."


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


def _count(value: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"
