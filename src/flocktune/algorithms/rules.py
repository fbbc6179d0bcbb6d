"""How clients' updates become one, by each rule of :mod:`flocktune.algorithms.factors`, and what that loses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from flocktune.aggregation.lora import Pair, aggregation_error, factorised, product_norm_squared, residual
from flocktune.aggregation.mean import weighted_mean
from flocktune.config.factors import Rule
from flocktune.interfaces import ServerHalf
from flocktune.models.factors import (
    A_SUFFIX,
    B_SUFFIX,
    SIDE_A,
    SIDE_B,
    cut,
    fitted,
    named,
    pairs,
    rank_in,
    sides,
    trained_in,
)
from flocktune.tensors import add_scaled, subtract
from flocktune.types import Mean, Tensors, Update, merge_metrics


@dataclass(frozen=True)
class Sharing:
    """What both sides agree on. ``rank``: the largest. ``scale``: of every client, whatever its rank.

    ``given``: the starting factors are a file's, so that clients can not draw them by the seed.
    """

    rule: Rule
    rank: int
    scale: float
    seed: int
    given: bool = False
    rank_of: Callable[[str], int] | None = None

    @property
    def plain(self) -> bool:
        """FedIT with one rank: FedAvg's halves as they are."""
        return self.rule == "fedit" and self.rank_of is None

    def trained(self, round: int) -> tuple[str, ...]:
        """Endings of the factors that come back from a round. B first: while it is zero, A has no gradient."""
        match self.rule:
            case "ffa_lora":
                return (B_SUFFIX,)
            case "rolora":
                return (B_SUFFIX,) if round % 2 == 0 else (A_SUFFIX,)
            case "fedsa_lora":
                return (A_SUFFIX,)
            case _:
                return (A_SUFFIX, B_SUFFIX)

    @property
    def learnt(self) -> tuple[str, ...]:
        """Endings of the factors that clients train in the course of a run, whether or not they come back."""
        return (B_SUFFIX,) if self.rule == "ffa_lora" else (A_SUFFIX, B_SUFFIX)


def combined(sharing: Sharing, updates: Iterable[Update], message: Tensors) -> Update:
    """Updates, changes of ``message``, -> one: the change of factors, and of a side adapter what is to be added to it.

    Rules that are no mean hold all updates of a round. Raises ValueError when there is none.
    """
    message = trained_in(message)
    match sharing.rule:
        case "flora":
            return _flora(sharing, list(updates), message)
        case "fedex_lora":
            return _fedex(sharing, list(updates))
        case "flexlora":
            return _flexlora(sharing, list(updates), message)
        case "hetlora":
            return _hetlora(sharing, list(updates), message)
        case _:
            return weighted_mean(_filled(update, sharing.rank) for update in updates)


def _flora(sharing: Sharing, cohort: Sequence[Update], message: Tensors) -> Update:
    """Every client's own product, stacked: of both factors of one, B alone is weighed."""
    merged = _without_delta(cohort)
    shares = [sharing.scale * update.weight / merged.weight for update in cohort]
    clients = [pairs(trained_by(update, message)) for update in cohort]
    added = {name: factorised([client[name] for client in clients], shares) for name in clients[0]}
    return replace(merged, delta=named(added, SIDE_A, SIDE_B))


def _fedex(sharing: Sharing, cohort: Sequence[Update]) -> Update:
    whole = [_filled(update, sharing.rank) for update in cohort]
    mean = weighted_mean(whole)
    shares = [update.weight / mean.weight for update in whole]
    changes = [pairs(update.delta) for update in whole]
    added: dict[str, Pair] = {}
    for name in changes[0]:
        terms, weights = residual([change[name] for change in changes], shares)
        added[name] = factorised(terms, [sharing.scale * weight for weight in weights])
    return replace(mean, delta={**mean.delta, **named(added, SIDE_A, SIDE_B)})


def _flexlora(sharing: Sharing, cohort: Sequence[Update], message: Tensors) -> Update:
    merged = _without_delta(cohort)
    shares = [update.weight / merged.weight for update in cohort]
    clients = [pairs(trained_by(update, message)) for update in cohort]
    best: dict[str, Pair] = {}
    for name, (old_a, old_b) in pairs(message).items():
        a, b = factorised([client[name] for client in clients], shares, sharing.rank)
        # A direction that the sum lacks has B = 0. With A = 0 too it could never be learnt: it keeps the A it had.
        best[name] = torch.cat([a, old_a[len(a) :]]), F.pad(b, (0, old_b.shape[1] - len(a)))
    return replace(merged, delta=subtract(named(best, A_SUFFIX, B_SUFFIX), message))


def _hetlora(sharing: Sharing, cohort: Sequence[Update], message: Tensors) -> Update:
    clients = [trained_by(update, message) for update in cohort]
    norms = [
        math.sqrt(max(0.0, sum(product_norm_squared([pair], [1.0]) for pair in pairs(client).values())))
        for client in clients
    ]
    if not any(norms):  # nobody has learnt anything
        norms = [update.weight for update in cohort]
    counted = [(client, norm) for client, norm in zip(clients, norms, strict=True) if norm]
    mean = weighted_mean(Update(fitted(client, sharing.rank), norm) for client, norm in counted).delta
    # Rows that nobody has in this round stay as they are; at zero nobody could ever learn them.
    largest = max(rank_in(client) for client, _ in counted)
    beyond = subtract(message, fitted(cut(message, largest), sharing.rank))
    return replace(_without_delta(cohort), delta=subtract(add_scaled(mean, beyond), message))


def _filled(update: Update, rank: int) -> Update:
    """As of a client of this rank: it changes nothing of what it did not receive."""
    return replace(update, delta=fitted(update.delta, rank))


def trained_by(update: Update, message: Tensors) -> dict[str, Tensor]:
    """A client's whole factors, of its own rank: what it received of ``message``, and its change."""
    return add_scaled(cut(trained_in(message), rank_in(update.delta)), update.delta)


def _without_delta(cohort: Sequence[Update]) -> Update:
    if not cohort:
        raise ValueError("a sum needs at least one update")
    metrics: dict[str, Mean] = {}
    for update in cohort:
        metrics = merge_metrics(metrics, update.metrics)
    return Update({}, sum(update.weight for update in cohort), sum(update.clients for update in cohort), metrics)


def diagnose(sharing: Sharing, server: ServerHalf) -> Callable[[Tensors, Sequence[Update]], Mapping[str, float]]:
    """-> what a round tells of its rule: ``aggregation_error``, ``|| ideal - achieved || / || ideal ||``, all modules.

    Ideal: what the side adapter holds, and the mean of the products of clients' whole factors, where a client of lower
    rank has changed nothing of what it did not receive. Achieved: what the rule makes of these updates. From small
    products alone. Nothing is told when the server has no products (FedSA-LoRA).
    """

    def told(message: Tensors, updates: Sequence[Update]) -> Mapping[str, float]:
        received = trained_in(server.returned(message))
        if sharing.rule == "fedsa_lora":
            return {}
        if sharing.rule in ("ffa_lora", "rolora"):  # one factor is the same for all: sum p_k B_k A = (sum p_k B_k) A
            return {"aggregation_error": 0.0}
        after = combined(sharing, updates, message)
        clients = [pairs(add_scaled(received, fitted(trained_in(update.delta), sharing.rank))) for update in updates]
        weights = [sharing.scale * update.weight / after.weight for update in updates]
        factors = pairs(add_scaled(received, trained_in(after.delta)))
        reached = {name: (a, sharing.scale * b) for name, (a, b) in factors.items()}
        error = aggregation_error(clients, weights, reached, sides(message), sides(after.delta))
        return {"aggregation_error": error}

    return told
