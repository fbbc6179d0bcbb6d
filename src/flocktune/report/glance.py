"""A run at a glance: who took part, what left each client, what it cost; each a figure and a few remarks."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flocktune.report.cost import seconds_of, training_flops
from flocktune.report.emulator import read_emulator, spoken_flops
from flocktune.report.outcome import main_method
from flocktune.report.runs import Experiment, Run
from flocktune.report.settings import read_settings
from flocktune.report.summaries import number, travelled
from flocktune.report.tables import format_bytes, format_seconds
from flocktune.report.taking_part import failures_of, is_federated, main_run, mean_and_range, parts_of, reasons


@dataclass(frozen=True)
class Glance:
    """One of the three: its question, the figure that answers it, remarks."""

    heading: str
    figure: str
    remarks: tuple[str, ...]


def at_a_glance(experiment: Experiment) -> list[Glance]:
    """What a reader asks next, after the answer. Of a baseline alone only the cost is left."""
    found = [_who(experiment), _what_left(experiment)] if is_federated(experiment) else []
    return [glance for glance in [*found, _cost(experiment)] if glance]


def _who(experiment: Experiment) -> Glance | None:
    run = main_run(experiment)
    parts = parts_of(run) if run else []
    if run is None or not parts:
        return None
    asked, answered = (sum(len(rounds) for rounds in found) for found in
                       ([part.asked for part in parts], [part.answered for part in parts]))  # fmt: skip
    active = sum(bool(part.answered) for part in parts)
    planned = run.start.get("rounds") or len(run.rounds)
    remarks = [f"{len(run.rounds)} of {planned} rounds done; {answered} of {asked} updates counted."]
    if run.rounds and active < len(parts):
        remarks.append(f"{active} of them gave an update that counted.")
    broken = failures_of(run)
    why = reasons(broken)
    if why:
        (reason, times), *others = why
        more = f", and {len(others)} more reason{'s' if len(others) > 1 else ''}" if others else ""
        remarks.append(f"{len(broken)} failure{'s' if len(broken) > 1 else ''}: {reason} ({times} ×){more}.")
    held = [part.rows for part in parts if part.rows is not None]
    if held:
        remarks.append(f"They hold {sum(held):,.0f} rows, {min(held):,.0f} to {max(held):,.0f} each.")
    remarks += ["Rounds, updates and failures are the first seed's."] if len(_runs(experiment)) > 1 else []
    return Glance("Who took part", f"{len(parts)} client{'' if len(parts) == 1 else 's'}", tuple(remarks))


def _what_left(experiment: Experiment) -> Glance | None:
    run = main_run(experiment)
    sent = [part.sent for part in parts_of(run) if part.answered] if run else []
    if run is None or not sent:
        return None
    mean, low, high = mean_and_range(sent)
    spread = f", {format_bytes(low)} to {format_bytes(high)}" if format_bytes(low) != format_bytes(high) else ""
    answers = sum(len(event.get("answered") or []) for event in run.rounds)
    up = sum(number(event.get("bytes_up")) or 0.0 for event in run.rounds)
    plain = sum(number(event.get("bytes_plain")) or 0.0 for event in run.rounds)
    share = f" ({100 * up / plain:.1f} % of their size in float32)" if up < 0.99 * plain else ""
    remarks = [
        f"Changes of the adapter alone, no row of data; mean over the clients{spread}.",
        f"{answers} updates of {format_bytes(up / max(1, answers))}{share}.",
        *_guarantees(experiment, read_settings(run.recipe)),
    ]
    return Glance("What left each client", format_bytes(mean), tuple(remarks))


def _guarantees(experiment: Experiment, settings: Mapping[str, Any]) -> list[str]:
    """What protects the clients, or that nothing does."""
    told = experiment.summaries[main_method(experiment)].get("privacy")
    private = isinstance(told, Mapping) and told.get("said")
    secure = settings.get("secure_aggregation")
    if not private and not secure:
        return ["No differential privacy and no secure aggregation: the server saw every update as it was."]
    return [
        f"Differential privacy: {private}." if private else "No differential privacy.",
        "Secure aggregation: the server saw sums, no single update."
        if secure
        else "No secure aggregation: the server saw every update.",
    ]


def _cost(experiment: Experiment) -> Glance | None:
    key = main_method(experiment)
    summary, runs = experiment.summaries[key], experiment.methods.get(key) or []
    seconds = number(summary.get("seconds"))
    if not seconds:
        return None
    tables = [seconds_of(run) for run in runs]
    training, evaluating = (
        statistics.fmean(table.get(part, 0.0) for table in tables) if tables else 0.0
        for part in ("forward and backward", "evaluate")
    )
    each = " a seed (mean)" if len(runs) > 1 else ""
    remarks = [f"Time{each}; {format_seconds(training)} of it training, {format_seconds(evaluating)} evaluating."]
    flops = training_flops(runs)
    emulated = read_emulator(runs) is not None
    if flops:
        remarks.append(f"{'At most ' if emulated else ''}{spoken_flops(flops)} of training, all clients together.")
    up, down = (travelled(key, summary, name) for name in ("bytes_up", "bytes_down"))
    if up or down:
        remarks.append(f"{format_bytes(up)} up and {format_bytes(down)} down, all clients together.")
    peak, trained = number(summary.get("peak_memory_bytes")), number(summary.get("trainable_parameters"))
    remarks += [f"Peak memory of the process {format_bytes(peak)}."] if peak else []
    remarks += [f"{spoken_count(trained)} parameters trained; the model stayed frozen."] if trained else []
    return Glance("What it cost", format_seconds(seconds), tuple(remarks))


def _runs(experiment: Experiment) -> Sequence[Run]:
    return experiment.methods.get(main_method(experiment)) or []


def spoken_count(value: float) -> str:
    """A large number with three digits: ``492 k``."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"
