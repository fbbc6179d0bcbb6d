"""Rules by which LoRA updates become the next adapter, around FedIT's halves (:mod:`flocktune.algorithms.fedavg`).

s is the LoRA scale, p_k a client's share of the weights, A_k and B_k what it trained. Ideal is ``sum p_k s B_k A_k``.

    fedit       2305.05644  mean A, mean B
    ffa_lora    2403.12313  A is never trained and the same for all; mean B
    rolora      2502.01755  B is trained in rounds 1, 3, ..., A in rounds 2, 4, ...; the mean of it
    fedsa_lora  2410.01463  mean A; each client's B stays in its memory
    flora       2409.05976  base += sum p_k s B_k A_k; the next round starts from fresh factors
    fedex_lora  2410.09432  mean A, mean B; base += the ideal - s (mean B)(mean A)
    flexlora    2402.11505  the best factors of lora.rank for sum p_k s B_k A_k; clients get their rank's best
    hetlora     2401.06432  means of zero-padded factors, weighted by || B_k A_k ||_F; clients get the first rows

What we do differently: the base is never written to. What FLoRA and FedEx-LoRA add to it is a *side adapter*, low-rank
factors that travel with the next message, so that clients who were absent, and those with a quantised base, have the
same model as all others. Where a paper's rule is a mean, a client of lower rank proposes no change to what it did not
receive; FlexLoRA and HetLoRA take clients' whole factors, as published, but leave alone what nobody in a round has.

A message has factors by their own names, which are trained and come back; ``fixed/`` and ``own/``: that are used, and
with which a client begins that keeps its own; ``fresh``: the rank of factors that the client draws.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from flocktune.aggregation.lora import Pair, factorised
from flocktune.algorithms.fedavg import FIXED, server_half
from flocktune.algorithms.rules import Sharing, combined
from flocktune.config.factors import NOT_A_MEAN, SIDED, rank_of
from flocktune.config.schema import FEDERATED, AggregationConfig, RunConfig
from flocktune.interfaces import ClientHalf, Memory, ServerHalf, State
from flocktune.models.factors import (
    A_SUFFIX,
    B_SUFFIX,
    SIDE_A,
    SIDE_B,
    cut,
    fitted,
    fresh,
    named,
    of_side,
    pairs,
    rank_in,
    sides,
    trained_in,
)
from flocktune.models.lora_module import scale
from flocktune.seeds import derive_seed
from flocktune.tensors import group, prefixed, without
from flocktune.types import ClientTask, Tensors, Update
from flocktune.wire import side_factors

SIDE, OWN, FRESH = "side", "own", "fresh"
"""Of the state, of messages and memories, and of messages."""


def sharing_of(config: RunConfig) -> Sharing:
    """What a recipe says of it; baselines always are FedIT with one rank."""
    lora, ranks = config.lora, config.ranks

    def of(client: str) -> int:
        return rank_of(ranks, client, lora.rank, config.seed)

    plain = Sharing("fedit", lora.rank, scale(lora), config.seed, lora.start_from is not None)
    if config.method not in FEDERATED:
        return plain
    return replace(plain, rule=config.aggregation.rule, rank_of=of if ranks else None)


# --- the server's side -----------------------------------------------------------------------------


def around_server(sharing: Sharing, factors: Tensors, half: ServerHalf) -> ServerHalf:
    """FedAvg's server half by another rule. State: its own, and with :data:`SIDED` rules ``side/*``.

    ``factors``: tensors of the names and shapes of a whole adapter.
    """
    if sharing.plain:
        return half
    rule, addressed = sharing.rule, _Addressing(sharing)

    def init(adapter: Tensors) -> State:
        if rule not in SIDED:
            return half.init(adapter)
        side = {name: (a[:0], b[:, :0]) for name, (a, b) in pairs(adapter).items()}
        if rule == "flora":  # every round begins with factors that change nothing: what the run was given goes aside
            side = {name: (a, sharing.scale * b) if b.any() else side[name] for name, (a, b) in pairs(adapter).items()}
            adapter = {
                name: torch.zeros_like(value) if name.endswith(B_SUFFIX) else value for name, value in adapter.items()
            }
        return {**half.init(adapter), **prefixed(SIDE, named(side, SIDE_A, SIDE_B))}

    def message(state: State, round: int) -> Tensors:
        whole = half.message(state, round)
        if rule == "flora":
            whole = fresh(whole, _fresh_seed(sharing, round))
        trained = {name: value for name, value in whole.items() if name.endswith(sharing.trained(round))}
        others = {name: value for name, value in whole.items() if name not in trained}
        if rule == "rolora" or (rule == "ffa_lora" and sharing.given):
            trained |= prefixed(FIXED, others)
        if rule == "fedsa_lora" and sharing.given:
            trained |= prefixed(OWN, others)
        return {**trained, **_not_empty(group(state, SIDE))}

    def step(state: State, update: Update) -> State:
        delta = {name: value for name, value in update.delta.items() if not of_side(name)}
        state = half.step(state, replace(update, delta=delta))
        before = sides(group(state, SIDE))
        joined = {name: _stacked(before[name], more) for name, more in sides(update.delta).items()}
        return {**state, **prefixed(SIDE, named(joined, SIDE_A, SIDE_B))}

    def result(state: State) -> Tensors:
        return {**half.result(state), **_not_empty(group(state, SIDE))}

    def returned(received: Tensors) -> Tensors:
        return cut(factors, int(received[FRESH])) if FRESH in received else trained_in(received)

    def combine(updates: Iterable[Update], message: Tensors) -> Update:
        return combined(sharing, updates, message)

    return replace(
        half,
        init=init,
        message=message,
        step=step,
        result=result,
        combine=combine if rule in NOT_A_MEAN or sharing.rank_of else None,
        addressed=addressed,
        returned=returned,
    )


class _Addressing:
    """What of a message clients of one rank receive: one object for each rank, as long as the message is the same."""

    def __init__(self, sharing: Sharing) -> None:
        self.sharing = sharing
        self.message: Tensors = {}
        self.made: dict[int, Tensors] = {}

    def __call__(self, message: Tensors, client: str) -> Tensors:
        sharing = self.sharing
        if sharing.rank_of is None and sharing.rule != "flora":
            return message
        if message is not self.message:
            self.message, self.made = message, {}
        rank = sharing.rank_of(client) if sharing.rank_of else sharing.rank
        if rank not in self.made:
            self.made[rank] = self._of(message, rank)
        return self.made[rank]

    def _of(self, message: Tensors, rank: int) -> Tensors:
        if self.sharing.rule != "flora":
            return cut(message, rank)
        return {FRESH: torch.tensor([rank]), **{name: value for name, value in message.items() if of_side(name)}}


def _not_empty(side: Tensors) -> Tensors:
    return {name: value for name, value in side.items() if value.numel()}


def _stacked(side: Pair, more: Pair) -> Pair:
    """Their sum: one beside the other, and as factors of its own rank when those would be more than that can be."""
    (a, b), (more_a, more_b) = side, more
    if len(a) + len(more_a) > min(a.shape[1], len(b)):
        return factorised([side, more], [1.0, 1.0])
    return torch.cat([a, more_a]), torch.cat([b, more_b], dim=1)


# --- a client's side -------------------------------------------------------------------------------


def around_client(sharing: Sharing, factors: Tensors, half: ClientHalf) -> ClientHalf:
    """``half``, which trains factors of the largest rank, for tasks of another rule or rank.

    ``factors``: tensors of its adapter's names and shapes. Factors are filled up with zeros for it: rows of A and
    columns of B that are both zero have no gradient and stay zero, so that it trains as if it had the lower rank.
    Memory: ``own/*``, the B of FedSA-LoRA.
    """
    if sharing.plain:
        return half

    def train(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
        said = task.tensors
        mine = {**group(said, FIXED), **group(said, OWN), **group(memory, OWN), **trained_in(said)}
        rank = int(said[FRESH]) if FRESH in said else rank_in(trained_in(said))
        drawn = fresh(
            {name: value for name, value in factors.items() if name not in mine}, _fresh_seed(sharing, task.round)
        )
        mine = cut({**drawn, **mine}, rank)
        private = {name for name in mine if sharing.rule == "fedsa_lora" and name.endswith(B_SUFFIX)}
        back = set(mine) if FRESH in said else set(trained_in(said))
        whole = fitted({name: mine[name] for name in factors}, sharing.rank)
        tensors = {
            **{name: value for name, value in whole.items() if name in back | private},
            **prefixed(FIXED, {name: value for name, value in whole.items() if name not in back | private}),
            **{name: value for name, value in said.items() if of_side(name)},
        }
        update, kept = half(replace(task, tensors=tensors), without(memory, OWN))
        delta = cut(update.delta, rank)
        own = {name: mine[name] + delta[name] for name in delta if name in private}
        leaving = {name: value for name, value in delta.items() if name in back}
        return replace(update, delta=leaving), {**kept, **prefixed(OWN, own)}

    return train


def with_own(result: Tensors, memory: Memory) -> Tensors:
    """A client's own adapter: the run's result with what the client keeps to itself (FedSA-LoRA's B).

    That of a lower rank has zeros beyond it, so that the rows of A beside them change nothing.
    """
    rank = max((value.shape[0] for name, value in result.items() if name.endswith(A_SUFFIX)), default=0)
    return {**result, **fitted(group(memory, OWN), rank)}


def optional(sharing: Sharing, factors: Tensors, client: str) -> dict[str, tuple[str, Sequence[int | None]]]:
    """What a message may have beside what the rule always sends: a side adapter of any rank, and starting factors.

    ``factors``: of the names and shapes of a whole adapter.
    """
    given = around_server(replace(sharing, given=True), factors, server_half(AggregationConfig()))
    whole = given.addressed(given.message(given.init(factors), 0), client)
    begun: dict[str, tuple[str, Sequence[int | None]]] = {
        name: ("F32", tuple(value.shape)) for name, value in whole.items() if name.startswith((FIXED + "/", OWN + "/"))
    }
    return {**begun, **(side_factors(factors) if sharing.rule in SIDED else {})}


def _fresh_seed(sharing: Sharing, round: int) -> int:
    """FLoRA draws new factors every round; other rules have only those that a run starts from."""
    return derive_seed(sharing.seed, round, "fresh") if sharing.rule == "flora" else sharing.seed
