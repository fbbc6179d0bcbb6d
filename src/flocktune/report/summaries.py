"""The numbers of a comparison: a summary for each method, and what can be read from them.

A summary is a JSON object: method, seed, rounds, metrics ``{dataset: {"overall": {name: value}, "categories":
{category: {name: value}}}}``, bytes_up, bytes_down, seconds, and more. Over several seeds it has ``seeds``,
``metrics`` (means), ``metrics_std`` and ``runs`` (the summaries of each seed).

Where clients hold an emulator of the model, the adapter was evaluated twice on the same rows: plugged into the
full model (AdapFu, data set ``held_out``) and on the emulator (AdapEmu, ``held_out_emulator``).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Summary: TypeAlias = Mapping[str, Any]

METRIC_NAMES = {
    "checked": "Correct",
    "number_match": "Right number",
    "choice": "Right choice",
    "choice_per_token": "Choice by token",
    "choice_per_byte": "Choice by byte",
    "pass_at_1": "pass@1",
    "pass_at_10": "pass@10",
    "pass_at_100": "pass@100",
    "rouge_l": "ROUGE-L",
    "exact_match": "Exact match",
    "contains": "Contains",
    "reward_accuracy": "Reward accuracy",
    "prefers_chosen": "Prefers chosen",
    "loss": "Loss",
    "perplexity": "Perplexity",
    "loss_std": "Spread of the loss",
    "loss_worst_tenth": "Loss, worst tenth",
}
"""How a metric is called on paper; the headline metric is the first of these that was measured."""

DECISIVE = ("checked", "number_match", "choice", "pass_at_1")
"""Metrics that say whether an answer is right: where one is measured, likeness to the reference matters less."""

SHARES = frozenset(
    {*DECISIVE, "choice_per_token", "choice_per_byte", "pass_at_10", "pass_at_100"}
    | {"exact_match", "contains", "rouge_l", "reward_accuracy", "prefers_chosen"}
)
"""Metrics between 0 and 1, shown in percent: more is better. Of the others, less is better."""

_ON_EMULATOR = "_emulator"


@dataclass(frozen=True)
class Value:
    """A number, or a mean over seeds with its sample standard deviation."""

    mean: float
    std: float | None = None


def metric(summary: Summary, dataset: str, name: str, category: str | None = None) -> Value | None:
    """One metric of one method, overall or in one category; None when it was not measured."""
    mean = _look_up(summary.get("metrics"), dataset, name, category)
    return None if mean is None else Value(mean, _look_up(summary.get("metrics_std"), dataset, name, category))


def datasets(summaries: Mapping[str, Summary]) -> list[str]:
    """The names of the data sets that any method was evaluated on, in order of first appearance.

    An evaluation on the emulator is a second look at the same rows, so it has no data set of its own.
    """
    names = list(dict.fromkeys(name for summary in summaries.values() for name in summary.get("metrics") or {}))
    return [name for name in names if name.removesuffix(_ON_EMULATOR) == name or plain_dataset(name) not in names]


def plain_dataset(dataset: str) -> str:
    """The data set whose rows an evaluation used, be it on the full model or on the emulator."""
    return dataset.removesuffix(_ON_EMULATOR)


def emulator_dataset(dataset: str) -> str:
    """How the evaluation on the emulator is called, on the same rows as ``dataset``."""
    return dataset + _ON_EMULATOR


def has_emulator(summaries: Mapping[str, Summary], dataset: str) -> bool:
    """Whether any method was evaluated on an emulator too."""
    return any(emulator_dataset(dataset) in (summary.get("metrics") or {}) for summary in summaries.values())


def plug_in_gap(summary: Summary, dataset: str, name: str) -> Value | None:
    """AdapFu - AdapEmu: the mean over the seeds that measured both, with the deviation of their differences.

    The two are measured on the same run, so the deviation of the difference is not that of either.
    """
    runs = [run for run in summary.get("runs") or [] if isinstance(run, Mapping)] or [summary]
    pairs = ((metric(run, dataset, name), metric(run, emulator_dataset(dataset), name)) for run in runs)
    gaps = [full.mean - emulated.mean for full, emulated in pairs if full and emulated]
    return Value(statistics.fmean(gaps), _deviation(gaps)) if gaps else None


def categories(summaries: Mapping[str, Summary], dataset: str) -> list[str]:
    """The categories of a data set, sorted."""
    tables = (((summary.get("metrics") or {}).get(dataset) or {}).get("categories") for summary in summaries.values())
    return sorted({name for table in tables for name in table or {}})


def headline_metric(summaries: Mapping[str, Summary], dataset: str) -> str | None:
    """The metric that a comparison is about: correct answers by rule, else ROUGE-L, ..., else the loss."""
    return next((name for name in METRIC_NAMES if _measured(summaries, dataset, name)), None)


def table_metrics(summaries: Mapping[str, Summary], dataset: str) -> list[str]:
    """The columns of a comparison: right answers, or exact match and ROUGE-L when nothing decides; the loss.

    Of preference data: whose chosen answer has the higher reward, and whose the higher probability.
    """
    decisive = [name for name in DECISIVE if _measured(summaries, dataset, name)]
    scores = decisive or ["exact_match", "rouge_l"]
    scores += ["reward_accuracy", "prefers_chosen"]
    return [name for name in (*scores, "loss") if _measured(summaries, dataset, name)]


def on_pairs(summaries: Mapping[str, Summary], dataset: str) -> bool:
    """Whether the rows are pairs of answers: a loss is then nats a pair, not nats a token."""
    return _measured(summaries, dataset, "reward_accuracy")


def best_methods(summaries: Mapping[str, Summary], dataset: str, name: str) -> set[str]:
    """The methods with the best value of a metric; none when all are the same."""
    values = {key: value.mean for key, summary in summaries.items() if (value := metric(summary, dataset, name))}
    if len(set(values.values())) < 2:
        return set()
    best = max(values.values()) if name in SHARES else min(values.values())
    return {key for key, value in values.items() if value == best}


def combine_seeds(runs: Sequence[Summary]) -> dict[str, Any]:
    """One summary of the same method over several seeds; a single summary stays as it is.

    Means and sample standard deviations, metric by metric, over the seeds that measured it; bytes and
    seconds are means, the peak of memory is the highest.
    """
    if len(runs) == 1:
        return dict(runs[0])
    # An interval is of one run's rows; over seeds there is the deviation.
    metrics = [
        {name: {part: of for part, of in table.items() if part != "intervals"} for name, table in measured.items()}
        for measured in (run.get("metrics") or {} for run in runs)
    ]
    combined = {**runs[0], "seeds": [run.get("seed") for run in runs], "runs": [dict(run) for run in runs]}
    for key in ("seed", "adapter_sha256", "choice"):
        combined.pop(key, None)
    if len({run.get("client") for run in runs}) > 1:  # each seed draws its own clients for the local baselines
        combined.pop("client", None)
    for key in ("bytes_up", "bytes_down", "seconds", "rounds"):
        combined[key] = _over([run.get(key) for run in runs], statistics.fmean)
    for key in ("bytes_emulator", "client_cost", "rolled_back", "backdoor"):  # only some methods have them
        if key in combined:
            combined[key] = _over([run.get(key) for run in runs], statistics.fmean)
    combined["peak_memory_bytes"] = _over([run.get("peak_memory_bytes") for run in runs], max)
    combined["metrics"] = _over(metrics, statistics.fmean)
    combined["metrics_std"] = _over(metrics, _deviation)
    return combined


def choices(summaries: Mapping[str, Summary]) -> list[str]:
    """One sentence for each run whose result was chosen by validation rows, or that ended before its last round."""
    found = []
    for key in sorted(summaries, key=method_order):
        runs = [run for run in summaries[key].get("runs") or [] if isinstance(run, Mapping)]
        for run in runs or [summaries[key]]:
            said = (run.get("choice") or {}).get("said")
            seed = f", seed {run.get('seed')}" if len(runs) > 1 else ""
            found += [f"{method_label(key, run)}{seed}: {said}"] if said else []
    return found


def method_order(key: str) -> tuple[int, str]:
    """Sorts methods the way the claim reads: base, local, the federated ones (with an emulator first), centralised."""
    for place, start in ((0, "base"), (1, "local"), (2, "fedbiot"), (4, "centralised")):
        if key.startswith(start):
            return place, key
    return 3, key


def method_label(key: str, summary: Summary | None = None) -> str:
    """How a method is called on paper, such as ``Local, client-3``; a summary with a ``label`` has said it."""
    if (summary or {}).get("label"):
        return str((summary or {})["label"])
    client = (summary or {}).get("client")
    if key.startswith("local"):
        number = key.removeprefix("local").strip("_-")
        return f"Local, {client}" if client else f"Local {number}".strip()
    names = {"base": "Base model", "fedbiot": "FedBiOT", "fedit": "FedIT", "centralised": "Centralised"}
    return names.get(key, key)


def is_baseline(key: str) -> bool:
    """Whether a method is one that others are compared with: nothing travels in it, whatever a log counts."""
    return key.startswith(("base", "local", "centralised"))


def travelled(key: str, summary: Summary, name: str) -> float | None:
    """``bytes_up``, ``bytes_down``, ``bytes_emulator`` of a federated method; None for others, and for nothing sent."""
    return None if is_baseline(key) else number(summary.get(name)) or None


def number(value: Any) -> float | None:
    """``value`` as a float when it is a number, else None: logs may hold null, and damaged ones anything."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _look_up(metrics: Any, dataset: str, name: str, category: str | None) -> float | None:
    path = (dataset, "overall", name) if category is None else (dataset, "categories", category, name)
    for part in path:
        metrics = metrics.get(part) if isinstance(metrics, Mapping) else None
    return number(metrics)


def _measured(summaries: Mapping[str, Summary], dataset: str, name: str) -> bool:
    return any(metric(summary, dataset, name) for summary in summaries.values())


def _over(values: Iterable[Any], combine: Callable[[list[float]], float | None]) -> Any:
    """Combine numbers, or nested tables of numbers key by key; what is missing in a table does not count."""
    present = [value for value in values if value is not None]
    tables = [value for value in present if isinstance(value, Mapping)]
    if tables:
        keys = dict.fromkeys(key for table in tables for key in table)
        return {key: _over([table.get(key) for table in tables], combine) for key in keys}
    numbers = [value for value in map(number, present) if value is not None]
    return combine(numbers) if numbers else None


def _deviation(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None
