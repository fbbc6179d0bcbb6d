"""What a run tells of itself: its start, its rounds, its summary. Counts and means only, never a text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flocktune.algorithms.factors import sharing_of
from flocktune.algorithms.preferences import PREFERENCE_METRICS
from flocktune.algorithms.private_rows import told_of_rows
from flocktune.assemble import Assembly
from flocktune.attacks import untriggered_success
from flocktune.config.privacy_rules import privacy_in_force
from flocktune.config.schema import SamplePrivacy
from flocktune.costs import client_cost
from flocktune.engine.rounds import RoundRecord
from flocktune.environment import peak_memory_bytes, versions
from flocktune.evaluation.evaluate import Evaluation
from flocktune.evaluation.scores import contains
from flocktune.models.bundle import Bundle
from flocktune.models.factors import of_side
from flocktune.models.recompute import is_checkpointed
from flocktune.protection import secured
from flocktune.tensors import digest
from flocktune.types import Mean, Tensors


def start_event(fed: Assembly) -> dict[str, Any]:
    """What a run is, as its log opens. Counts only: no data."""
    return {
        "event": "run_start",
        "name": fed.config.name,
        "method": fed.config.method,
        "seed": fed.config.seed,
        "rounds": fed.rounds,
        **fed.data.describe(),
        **({"emulator": describe_emulator(fed.emulated.bundle)} if fed.emulated else {}),
        "trainable_parameters": _trained(fed),
        **_set_aside(fed),
        "model": fed.config.model.path,
        "device": str(fed.base.device),
        **_recomputing(fed),
        "versions": versions(),
    }


def _recomputing(fed: Assembly) -> dict[str, Any]:
    """What was decided for this machine, where the recipe leaves it open."""
    if fed.config.model.gradient_checkpointing != "auto":
        return {}
    return {"gradient_checkpointing": is_checkpointed((fed.emulated.base if fed.emulated else fed.base).model)}


def _set_aside(fed: Assembly) -> dict[str, Any]:
    """Settings that have no effect in this run, with their reasons."""
    if not (secured(fed.config) and fed.config.aggregation.diagnose_clients):
        return {}
    reason = "with secure aggregation the server sees no single update, so the aggregation error can not be measured"
    return {"set_aside": {"aggregation.diagnose_clients": reason}}


def describe_emulator(bundle: Bundle) -> dict[str, Any]:
    """What clients hold of the full model, as the bundle has it: a recipe that names a bundle may say otherwise."""
    plan = bundle.plan
    return {
        "layers": len(plan.held),
        "full_layers": plan.layers,
        "adapter": list(plan.adapter),
        "kept": list(plan.kept),
        "dropped": list(plan.dropped),
        "drop": len(plan.dropped) / (len(plan.dropped) + len(plan.kept)),
        "placement": "last" if plan.frozen else "first_and_last",
        "bytes": bundle.bytes,
        "parameters": bundle.parameters,
        "full_parameters": bundle.full_parameters,
        "digest": bundle.digest,
    }


def _trained(fed: Assembly) -> int:
    """Numbers in the adapter that clients train, without what lies beside it."""
    adapter = fed.server.result(fed.server.init(fed.start))
    ends = sharing_of(fed.config).learnt
    return sum(value.numel() for name, value in adapter.items() if not of_side(name) and name.endswith(ends))


def summarise(
    fed: Assembly, adapter: Tensors, results: Mapping[str, Evaluation], events: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The run in one JSON object, made from its log and its last evaluation."""
    rounds = [event for event in events if event["event"] == "round"]
    evaluations = [event for event in events if event["event"] == "evaluation"]
    asked = {client for event in rounds for client in event["selected"]}
    alone = {"client": fed.schedule(0).asked[0]} if fed.config.method == "local" else {}
    return {
        "name": fed.config.name,
        "method": fed.config.method,
        **alone,
        "seed": fed.config.seed,
        "rounds": len(rounds),
        "metrics": {name: result.as_dict() for name, result in results.items()},
        "bytes_up": sum(event["bytes_up"] for event in rounds),
        "bytes_down": sum(event["bytes_down"] for event in rounds),
        **({"bytes_emulator": fed.emulated.bundle.bytes * len(asked)} if fed.emulated else {}),
        "seconds": _total(value for event in rounds for value in event["seconds"].values())
        + sum(event["seconds"] for event in evaluations),
        "client_seconds_per_step": _seconds_per_step(rounds),
        "peak_memory_bytes": peak_memory_bytes(),
        "trainable_parameters": _trained(fed),
        "adapter_sha256": digest(adapter),
        **_spent_in_all(fed, rounds),
        **({"rolled_back": sum(event.get("rolled_back", False) for event in rounds)} if fed.config.gate else {}),
        **_backdoor(fed, results),
        **(_client_cost(fed) if fed.data.train.examples else {}),  # owners' rows are not here to be measured
    }


def _backdoor(fed: Assembly, results: Mapping[str, Evaluation]) -> dict[str, Any]:
    """The shares of held-out prompts that are answered with a backdoor's target, with its trigger and without."""
    found = results.get("triggered")
    if found is None or not found.answers:
        return {}
    without = untriggered_success(fed.config, results["held_out"].answers)
    told = [contains(answer.text, answer.example.response) for answer in found.answers]
    return {"backdoor": {"with_trigger": sum(told) / len(told), "without_trigger": without}}


def _client_cost(fed: Assembly) -> dict[str, Any]:
    return client_cost(
        fed.config,
        fed.emulated.base if fed.emulated else fed.base,
        fed.data.train.encoded,
        fed.data.clients,
        fed.schedule(0).asked,
        fed.emulated.bundle.plan if fed.emulated else None,
    )


def spent(fed: Assembly, rounds: int, record: RoundRecord | None = None) -> dict[str, Any]:
    """What of a privacy budget is spent after ``rounds`` rounds, as a round's event and a summary have it.

    Of clients who hide their own rows, it is the largest that one of ``record`` said; empty when nobody did.
    """
    if fed.privacy:
        return {"privacy": fed.privacy.told(rounds)}
    settings = privacy_in_force(fed.config)
    if not isinstance(settings, SamplePrivacy) or record is None:
        return {}
    said = [client.metrics["epsilon"].value for client in record.clients.values() if "epsilon" in client.metrics]
    return {"privacy": told_of_rows(max(said), settings)} if said else {}


def _spent_in_all(fed: Assembly, rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A run's: of rows, the largest that any client said in any round."""
    if fed.privacy:
        return spent(fed, len(rounds))
    told = [event["privacy"] for event in rounds if event.get("privacy")]
    return {"privacy": max(told, key=lambda each: each["epsilon"])} if told else {}


def _seconds_per_step(rounds: Sequence[Mapping[str, Any]]) -> float | None:
    """Of clients' own time, everything that a step needs in it; None when nobody took one."""
    clients = [client for event in rounds for client in event["clients"].values()]
    steps = _total(client["steps"] for client in clients)
    return _total(client["seconds"] for client in clients) / steps if steps else None


def _total(values: Iterable[float | None]) -> float:
    """Of those that are known: a client elsewhere may have told nonsense, which is null in the log."""
    return sum(value for value in values if value is not None)


def round_event(record: RoundRecord, more_seconds: Mapping[str, float]) -> dict[str, Any]:
    """A round as the log tells it. Counts and means only: no data."""
    # A client elsewhere may leave some out; it must not end the run by that.
    told = defaultdict(Mean, record.metrics)
    data_s = told["data_seconds"].total
    seconds = {
        "data": data_s,
        "forward_backward": record.seconds["train"] - data_s,
        "aggregate": record.seconds["aggregate"],
        "diagnose": record.seconds["diagnose"],
        **more_seconds,
    }
    clients = {
        name: {
            "loss": metrics["loss"].value,
            "weight": client.weight,
            "tokens": metrics["tokens"].total,
            "seconds": metrics["seconds"].total,
            "steps": metrics["steps"].total,
            **({"bytes_up": client.bytes_up} if client.bytes_up is not None else {}),
            **({"epsilon": metrics["epsilon"].value} if "epsilon" in metrics else {}),
        }
        for name, client in record.clients.items()
        for metrics in [defaultdict(Mean, client.metrics)]
    }
    return {
        "event": "round",
        "round": record.round,
        "selected": list(record.selected),
        "answered": list(record.clients),
        "failures": [{"client": failure.client, "reason": failure.reason} for failure in record.failures],
        "train_loss": told["loss"].value,
        **{name: record.metrics[name].value for name in PREFERENCE_METRICS if name in record.metrics},
        "clients": clients,
        "update_norm": record.update_norm,
        "aggregation_error": record.diagnostics.get("aggregation_error"),
        **({"staleness": record.diagnostics["staleness"]} if "staleness" in record.diagnostics else {}),
        "bytes_down": record.bytes_down,
        "bytes_up": record.bytes_up,
        **({"bytes_plain": record.bytes_plain} if record.bytes_plain else {}),
        "tokens": told["tokens"].total,
        "seconds": seconds,
    }
