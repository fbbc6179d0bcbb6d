"""Rules of LoRA aggregation: each against its formula in dense float64, then on real (tiny, random) models."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import World
from flocktune.aggregation.lora import factorised, residual
from flocktune.algorithms import fedavg
from flocktune.algorithms.factors import around_client, around_server, with_own
from flocktune.algorithms.rules import Sharing, combined, diagnose
from flocktune.assemble import federation
from flocktune.config.factors import ByClass, ByName, RankClass, rank_of
from flocktune.config.load import load_recipe
from flocktune.config.schema import AggregationConfig, LocalConfig, LoraConfig, ServerAdaptive, ServerSgd
from flocktune.engine.in_process import InProcess
from flocktune.engine.rounds import Hooks, run_rounds
from flocktune.errors import UserError
from flocktune.estimate import estimate
from flocktune.interfaces import Memory, State
from flocktune.models.factors import B_SUFFIX, cut, fitted, fresh, pairs, rank_in, sides, trained_in
from flocktune.models.load import load_skeleton
from flocktune.models.lora import Adapter, attach, shapes
from flocktune.models.lora_module import scale
from flocktune.models.peft_io import export_peft, folded, import_peft
from flocktune.results import open_result
from flocktune.run_folder import create_run
from flocktune.runs import Stopped, execute
from flocktune.scheduling import Cohort
from flocktune.seeds import derive_seed
from flocktune.tensors import add_scaled, digest, group, subtract
from flocktune.types import ClientTask, Tensors, Update
from test_fedavg import batches
from test_federated import link_to, losses
from tiny_federation import FEDBIOT, make_federated_world, new_run, run_apart
from tiny_models import save_tiny, tiny_model

RULES = ("fedit", "ffa_lora", "rolora", "fedsa_lora", "flora", "fedex_lora", "flexlora", "hetlora")
EXACT = ("flora", "fedex_lora")
SHAPES = {"q": (7, 5), "up": (4, 9)}
RANK, SCALE = 3, 1.7


def draw(seed: int, rank: int = RANK, size: float = 1.0) -> dict[str, Tensor]:
    """Factors of :data:`SHAPES`, A and B both random."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, (out, into) in SHAPES.items():
        found[f"{name}.lora_A"] = size * torch.randn(rank, into, generator=generator)
        found[f"{name}.lora_B"] = size * torch.randn(out, rank, generator=generator)
    return found


def sharing(rule: str, ranks: Mapping[str, int] | None = None, **more: Any) -> Sharing:
    of = (lambda client: ranks.get(client, RANK)) if ranks else None
    return Sharing(rule, RANK, SCALE, seed=11, rank_of=of, **more)


def server(said: Sharing, aggregation: AggregationConfig | None = None):
    return around_server(said, draw(0), fedavg.server_half(aggregation or AggregationConfig()))


def dense(factors: Tensors, scaled: float = SCALE) -> dict[str, Tensor]:
    """What an adapter adds to each weight, float64: s B A and the side."""
    total = {name: scaled * b.double() @ a.double() for name, (a, b) in pairs(trained_in(factors)).items()}
    for name, (a, b) in sides(factors).items():
        total[name] = total.get(name, 0) + b.double() @ a.double()
    return total


def close(got: Mapping[str, Tensor], want: Mapping[str, Tensor], tolerance: float = 2e-6) -> None:
    size = math.sqrt(sum(float(value.square().sum()) for value in want.values())) + 1e-6
    for name in want:
        assert float((got[name] - want[name]).norm()) <= tolerance * size, name


# --- sums of products --------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(1, 9), st.integers(1, 9), st.integers(0, 999))
def test_a_sum_of_products_in_factors_is_the_dense_sum(ranks: list[int], out: int, into: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    terms = [
        (torch.randn(rank, into, generator=generator), torch.randn(out, rank, generator=generator)) for rank in ranks
    ]
    weights = torch.rand(len(ranks), generator=generator).tolist()
    want = sum(weight * b.double() @ a.double() for weight, (a, b) in zip(weights, terms, strict=True))
    a, b = factorised(terms, weights)
    assert len(a) == b.shape[1] <= min(sum(ranks), out, into)
    close({"w": b.double() @ a.double()}, {"w": want})
    values = torch.linalg.svdvals(want)
    for most in (1, 2):
        a, b = factorised(terms, weights, most)
        assert len(a) <= most
        lost = float((want - b.double() @ a.double()).norm())  # Eckart and Young: nothing of that rank is nearer
        assert lost == pytest.approx(float(values[most:].norm()), abs=1e-5)


def test_a_sum_that_is_zero_has_no_rank() -> None:
    a, b = factorised([(torch.randn(2, 5), torch.zeros(4, 2))], [1.0])
    assert (a.shape, b.shape) == ((0, 5), (4, 0))
    one = torch.randn(2, 5), torch.randn(4, 2)
    assert len(factorised([one, one], [1.0, -1.0])[0]) == 0
    assert len(factorised([one, one], [1.0, 2.0])[0]) == 2, "no direction twice"


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 99))
def test_the_residual_is_the_mean_of_products_without_the_product_of_means(count: int, rank: int, seed: int) -> None:
    """[out, in] as the weight of a linear module is, not transposed; and of no higher rank than it must be."""
    clients = [pairs(draw(seed + number, rank))["up"] for number in range(count)]
    shares = np.random.default_rng(seed).dirichlet(np.ones(count)).tolist()
    mean_a = sum(share * a.double() for share, (a, _) in zip(shares, clients, strict=True))
    mean_b = sum(share * b.double() for share, (_, b) in zip(shares, clients, strict=True))
    want = sum(share * b.double() @ a.double() for share, (a, b) in zip(shares, clients, strict=True)) - mean_b @ mean_a
    a, b = factorised(*residual(clients, shares))
    assert b.shape[0] == 4
    assert a.shape[1] == 9
    assert len(a) <= (count - 1) * rank
    assert float((b.double() @ a.double() - want).norm()) <= 1e-5


# --- one round of each rule against its formula -----------------------------------------------------------


def one_round(
    rule: str, ranks: list[int], weights: list[float], seed: int, turn: int = 0
) -> tuple[State, State, Tensors, list[Update], Sharing]:
    """State before and after a round of random changes; its message and updates."""
    said = sharing(rule, {str(k): rank for k, rank in enumerate(ranks)} if set(ranks) != {RANK} else None)
    half = server(said)
    before = half.init(draw(seed))
    message = half.message(before, turn)
    updates = []
    for number, weight in enumerate(weights):
        expected = half.returned(half.addressed(message, str(number)))
        change = cut(draw(1000 * seed + number, size=0.3), rank_in(expected))
        updates.append(Update({name: change[name] for name in expected}, weight))
        assert all(expected[name].shape == change[name].shape for name in expected)
    after = half.step(before, combined(said, iter(updates), message))
    return before, after, message, updates, said


def formula(rule: str, before: Tensors, message: Tensors, updates: list[Update]) -> dict[str, Tensor]:
    """What the adapter adds to each weight after the round, dense, by the rule's own formula."""
    total = sum(update.weight for update in updates)
    shares = [update.weight / total for update in updates]
    changes = [{name: value.double() for name, value in fitted(update.delta, RANK).items()} for update in updates]
    ranks = [rank_in(update.delta) for update in updates]
    means, found = {}, {}
    for name, value in before.items():
        means[name] = value + sum(p * change.get(name, 0.0) for p, change in zip(shares, changes, strict=True))

    def own(name: str) -> list[tuple[Tensor, Tensor]]:
        """Clients' whole factors, with zeros beyond their ranks."""
        start_a, start_b = message[f"{name}.lora_A"].double(), message[f"{name}.lora_B"].double()
        whole = [(start_a + c[f"{name}.lora_A"], start_b + c[f"{name}.lora_B"]) for c in changes]
        rows = [torch.arange(RANK) < rank for rank in ranks]
        return [(a * has[:, None], b * has) for (a, b), has in zip(whole, rows, strict=True)]

    norms: Any = 0
    if rule == "hetlora":
        norms = sum(torch.stack([(b @ a).square().sum() for a, b in own(name)]) for name in SHAPES).sqrt()
    for name in SHAPES:
        a, b = before[f"{name}.lora_A"].double(), before[f"{name}.lora_B"].double()
        match rule:
            case "flora":
                found[name] = b @ a + sum(p * y @ x for p, (x, y) in zip(shares, own(name), strict=True))
            case "fedex_lora":
                whole = [(a + change[f"{name}.lora_A"], b + change[f"{name}.lora_B"]) for change in changes]
                found[name] = sum(p * y @ x for p, (x, y) in zip(shares, whole, strict=True))
            case "flexlora":
                mean = sum(p * y @ x for p, (x, y) in zip(shares, own(name), strict=True))
                left, values, right = torch.linalg.svd(mean)
                found[name] = (left[:, :RANK] * values[:RANK]) @ right[:RANK]
            case "hetlora":
                w = norms / norms.sum()
                nobodys = torch.arange(RANK) >= max(ranks)
                mean_a = sum(p * x for p, (x, _) in zip(w, own(name), strict=True)) + a * nobodys[:, None]
                mean_b = sum(p * y for p, (_, y) in zip(w, own(name), strict=True)) + b * nobodys
                found[name] = mean_b @ mean_a
            case _:
                found[name] = means[f"{name}.lora_B"].double() @ means[f"{name}.lora_A"].double()
    return {name: SCALE * value for name, value in found.items()}


cohorts = st.lists(st.tuples(st.integers(1, RANK), st.floats(0.1, 9.0)), min_size=1, max_size=5)


@pytest.mark.parametrize("rule", RULES)
@given(cohort=cohorts, seed=st.integers(0, 50), alike=st.booleans(), turn=st.integers(0, 1))
@settings(max_examples=20)
def test_a_round_is_the_rules_formula(rule: str, cohort, seed: int, alike: bool, turn: int) -> None:
    ranks = [RANK if alike else rank for rank, _ in cohort]
    _, after, message, updates, _ = one_round(rule, ranks, [weight for _, weight in cohort], seed, turn)
    close(dense(result_of(after)), formula(rule, draw(seed), message, updates), 5e-6)


def result_of(state: State) -> Tensors:
    return {**group(state, "adapter"), **group(state, "side")}


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_clients_changes_nothing_but_rounding(rule: str) -> None:
    before, _, message, updates, said = one_round(rule, [1, 3, 2, 3], [1.0, 2.0, 3.0, 4.0], seed=3)
    found = [after_round(said, before, message, order) for order in (updates, updates[::-1])]
    close(found[0], found[1])


def after_round(said: Sharing, before: State, message: Tensors, updates: list[Update]) -> dict[str, Tensor]:
    return dense(result_of(server(said).step(before, combined(said, iter(updates), message))))


@pytest.mark.parametrize("rule", ["flora", "fedex_lora", "flexlora"])
def test_products_alone_count_not_how_a_client_writes_them(rule: str) -> None:
    """(B G, G^-1 A) is the same change as (B, A) for the rules that are of products."""
    before, after, message, updates, said = one_round(rule, [RANK] * 3, [1.0, 2.0, 3.0], seed=4)
    whole, generator = trained_in(message), torch.Generator().manual_seed(1)
    other = []
    for update in updates:
        trained = add_scaled(whole, update.delta)
        for name in SHAPES:
            turn = torch.randn(RANK, RANK, generator=generator) + 3 * torch.eye(RANK)
            a, b = f"{name}.lora_A", f"{name}.lora_B"
            trained |= {a: torch.linalg.solve(turn, trained[a]), b: trained[b] @ turn}
        other.append(replace(update, delta=subtract(trained, whole)))
    close(after_round(said, before, message, other), dense(result_of(after)), 1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_of_one_client_a_round_makes_what_it_trained(rule: str) -> None:
    before, after, message, (update,), _ = one_round(rule, [RANK], [5.0], seed=5)
    mine = add_scaled({**group(before, "adapter"), **trained_in(message)}, update.delta)
    close(dense(result_of(after)), dense({**mine, **group(before, "side")}))
    if rule == "fedex_lora":
        assert not any(len(a) for a, _ in sides(group(after, "side")).values()), "nothing is left over"


@given(cohort=cohorts, seed=st.integers(0, 50))
@settings(max_examples=10)
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "fedsa_lora"])
def test_the_aggregation_error_is_the_dense_one(rule: str, cohort, seed: int) -> None:
    ranks, weights = [rank for rank, _ in cohort], [weight for _, weight in cohort]
    _, after, message, updates, said = one_round(rule, ranks, weights, seed)
    told = diagnose(said, server(said))(message, updates)["aggregation_error"]
    reached = dense(result_of(after))
    ideal = formula("flora" if rule == "flora" else "fedex_lora", draw(seed), message, whole_changes(updates))
    error = math.sqrt(sum(float((ideal[name] - reached[name]).square().sum()) for name in SHAPES))
    size = math.sqrt(sum(float(value.square().sum()) for value in ideal.values()))
    assert told == pytest.approx(error / size, abs=3e-6)
    if rule in (*EXACT, "ffa_lora", "rolora"):
        assert told < 1e-6


def whole_changes(updates: list[Update]) -> list[Update]:
    """With zeros for the factor that a rule does not train."""
    nothing = [cut(draw(0, size=0.0), rank_in(update.delta)) for update in updates]
    return [replace(update, delta={**zeros, **update.delta}) for zeros, update in zip(nothing, updates, strict=True)]


def test_averaging_apart_has_an_error_and_it_is_seen() -> None:
    *_, message, updates, said = one_round("fedit", [RANK] * 4, [1.0] * 4, seed=6)
    assert diagnose(said, server(said))(message, updates)["aggregation_error"] > 0.01
    *_, message, updates, said = one_round("fedsa_lora", [RANK] * 4, [1.0] * 4, seed=6)
    assert diagnose(said, server(said))(message, updates) == {}, "the server has no products"


# --- several rounds: who was absent, who is small ------------------------------------------------------------


def drifting(seen: dict[tuple[int, str], Tensors], ranks: Mapping[str, int]) -> Callable:
    """A client that changes whatever it is given at random, and notes the model that it was given."""

    def half(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
        seen[task.round, task.client] = task.tensors
        trained = trained_in(task.tensors)
        noise = draw(derive_seed(task.seed, "noise") % 10**6, RANK, 0.3)
        return Update({name: noise[name] for name in trained}, 1.0 + len(task.client)), memory

    return half


@pytest.mark.parametrize("rule", EXACT)
def test_whoever_was_absent_gets_the_model_of_all_and_no_bytes_grow_without_bound(rule: str) -> None:
    """Every second round one of three clients takes part; what each receives is the model of the dense recursion."""
    ranks = {"a": 1, "b": 3, "cc": 2}
    said, seen = sharing(rule, ranks), {}
    half, names = server(said), list(ranks)
    client = around_client(said, draw(0), drifting(seen, ranks))
    cohorts = [names if number % 2 else [names[number // 2 % 3]] for number in range(12)]
    states: list[State] = [half.init(draw(8))]
    run_rounds(
        half, InProcess(client), lambda n: Cohort(tuple(cohorts[n]), len(cohorts[n]), 1), states[0],
        rounds=12, kind="toy", seed=7, hooks=Hooks(on_round=lambda record, state: states.append(state)),
    )  # fmt: skip
    total = dense(draw(8))
    for number, cohort in enumerate(cohorts):
        close(dense(result_of(states[number])), total, 1e-5)
        shares = np.array([1.0 + len(name) for name in cohort]) / sum(1.0 + len(name) for name in cohort)
        for share, name in zip(shares, cohort, strict=True):
            given = seen[number, name]
            rest = dense({**cut(group(states[number], "adapter"), ranks[name]), **group(states[number], "side")})
            factors = {**trained_in(given), **group(given, "fixed")}
            close(dense({**factors, **{n: v for n, v in given.items() if ".side" in n}}), rest, 1e-5)
            noise = draw(derive_seed(derive_seed(7, number, name), "noise") % 10**6, RANK, 0.3)
            trained = add_scaled(factors, fitted(cut(noise, ranks[name]), RANK))
            change = {m: value - dense(factors)[m] for m, value in dense(trained).items()}
            total = {m: value + share * change[m] for m, value in total.items()}
    for name, (a, b) in sides(group(states[-1], "side")).items():
        assert len(a) == b.shape[1] <= min(SHAPES[name])


@pytest.mark.parametrize("rule", RULES)
def test_clients_of_one_rank_are_given_one_object_of_their_rank(rule: str) -> None:
    said = sharing(rule, {"a": 1, "b": 2, "c": 1})
    half = server(said)
    message = half.message(half.init(draw(1)), 0)
    for client, rank in {"a": 1, "b": 2, "d": RANK}.items():
        assert rank_in(half.returned(half.addressed(message, client))) == rank
    assert half.addressed(message, "a") is half.addressed(message, "c")
    assert half.addressed(message, "a") is not half.addressed(message, "b")


@pytest.mark.parametrize("rule", ["flexlora", "hetlora"])
def test_rows_that_nobody_has_can_still_be_learnt_later(rule: str) -> None:
    """A row of A and the column of B beside it must not both become zero: no gradient leads away from there."""
    said = sharing(rule, {"a": 1, "b": 1})
    half = server(said)
    state = half.init(fresh(draw(0), 3))
    message = half.message(state, 0)
    update = Update({name: torch.ones_like(v) for name, v in half.returned(half.addressed(message, "a")).items()}, 1.0)
    after = half.step(state, half.combine([update], message))  # type: ignore[misc]
    for name in SHAPES:
        assert (after[f"adapter/{name}.lora_A"].norm(dim=1) > 0).all()


def test_fedsa_keeps_every_b_to_its_client_and_goes_on_with_it() -> None:
    said, seen = sharing("fedsa_lora", {"a": 2}), {}
    client = around_client(said, draw(0), drifting(seen, {}))
    half = server(said)
    state, memory = half.init(fresh(draw(0), said.seed)), {"other/x": torch.ones(1)}
    for number in range(3):
        message = half.addressed(half.message(state, number), "a")
        assert all(name.endswith("lora_A") for name in message)
        update, after = client(ClientTask(number, "a", "toy", message, number, ""), memory)
        assert all(name.endswith("lora_A") and len(value) == 2 for name, value in update.delta.items())
        start = group(memory, "own") or {name: torch.zeros(out, 2) for name, (out, _) in B_SHAPES.items()}
        noise = draw(derive_seed(number, "noise") % 10**6, RANK, 0.3)
        for name, value in group(after, "own").items():
            assert torch.equal(value, start[name] + noise[name][:, :2]), "the B of the round before, and its change"
        memory = after
        state = half.step(state, half.combine([update], half.message(state, number)))  # type: ignore[misc]
    mine = with_own(half.result(state), memory)
    shared = {name: mine[f"{name}.lora_A"][:2].double() for name in SHAPES}
    close(dense(mine), {name: SCALE * memory[f"own/{name}.lora_B"].double() @ a for name, a in shared.items()})
    assert torch.equal(memory["other/x"], torch.ones(1)), "others' memory is theirs"
    assert not any(value.any() for name, value in half.result(state).items() if name.endswith("lora_B"))


B_SHAPES = {f"{name}.lora_B": shape for name, shape in SHAPES.items()}


@pytest.mark.parametrize("optimizer", [ServerSgd(momentum=0.9), ServerAdaptive("adam"), ServerAdaptive("yogi")])
def test_a_server_optimiser_moves_only_what_a_round_trained(optimizer) -> None:
    said, seen = sharing("rolora"), {}
    half = server(said, AggregationConfig(server_optimizer=optimizer))
    states = [half.init(draw(2))]
    client = around_client(said, draw(0), drifting(seen, {}))
    run_rounds(
        half, InProcess(client), lambda n: Cohort(("a", "b"), 2, 1), states[0],
        rounds=4, kind="toy", seed=7, hooks=Hooks(on_round=lambda record, state: states.append(state)),
    )  # fmt: skip
    for number, (before, after) in enumerate(pairwise(states)):
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved
        assert all(name.endswith("lora_B" if number % 2 == 0 else "lora_A") for name in moved)


# --- on a model ------------------------------------------------------------------------------------------


LORA = LoraConfig(rank=4, alpha=6.0)


def train(
    rule: str,
    rank: int | None,
    local: LocalConfig,
    family: str = "llama",
    lora: LoraConfig = LORA,
    start: Tensors | None = None,
) -> tuple[Tensors, Update, Adapter]:
    """One client's round: what it received, its update, and the adapter as training left it."""
    adapter = attach(tiny_model(family), lora, seed=3)
    said = Sharing(rule, lora.rank, scale(lora), 3, rank_of=(lambda client: rank) if rank else None)
    data = lambda client: fedavg.ClientData(5, 9, lambda seed, steps, epochs: batches("b", seed, local))  # noqa: E731
    half = around_client(said, adapter.tensors(), fedavg.client_half(adapter, data, local, "equal", rounds=1))
    server = around_server(said, adapter.tensors(), fedavg.server_half(AggregationConfig()))
    message = server.addressed(server.message(server.init(start or adapter.tensors()), 0), "b")
    update, _ = half(ClientTask(0, "b", "fedavg", message, 1, ""), {})
    return message, update, adapter


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_client_of_lower_rank_trains_as_an_adapter_of_that_rank(family: str, optimizer: str) -> None:
    """Filled up with zeros, in the adapter of the largest rank; with weight decay, and started from trained factors."""
    local = LocalConfig(steps=3, batch_size=2, lr=2e-2, optimizer=optimizer, weight_decay=0.1)
    model = attach(tiny_model(family), LORA, seed=3)
    start = {name: value for name, value in filled(model, 0).items() if ".side_" not in name}
    message, update, adapter = train("fedit", 2, local, family, start=start)
    small = replace(LORA, rank=2, alpha=3.0)  # the scale of rank 4
    alone, wanted, _ = train("fedit", None, local, family, small, start=cut(start, 2))
    assert all(torch.equal(message[name], alone[name]) for name in alone)
    for name, value in wanted.delta.items():
        torch.testing.assert_close(update.delta[name], value, rtol=2e-3, atol=2e-5)
    for name, value in adapter.tensors().items():
        rest = value[2:] if name.endswith("lora_A") else value[:, 2:]
        assert not rest.any(), "zeros stay zeros"


def test_ffa_never_trains_a() -> None:
    message, update, adapter = train("ffa_lora", None, LocalConfig(steps=3, batch_size=2, lr=2e-2, weight_decay=0.5))
    assert all(name.endswith("lora_B") for name in (*message, *update.delta))
    drawn = fresh(adapter.parameters, 3)
    now = adapter.tensors()
    assert all(torch.equal(now[name], drawn[name]) for name in now if name.endswith("lora_A"))
    assert all(value.any() for value in update.delta.values())


def test_rolora_trains_one_factor_and_sends_the_other_along() -> None:
    message, update, _ = train("rolora", None, LocalConfig(steps=1, batch_size=2))
    assert {name.partition("/")[0] for name in message if name.startswith("fixed/")} == {"fixed"}
    assert all(name.endswith("lora_B") for name in update.delta)
    assert len(message) == 2 * len(update.delta)


def filled(adapter: Adapter, rank: int, seed: int = 4) -> dict[str, Tensor]:
    """Factors and a side adapter of ``rank``, all random."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: 0.2 * torch.randn(v.shape, generator=generator) for name, v in adapter.parameters.items()}
    for name, (a, b) in pairs(dict(tensors)).items():
        tensors[f"{name}.side_A"] = 0.2 * torch.randn(rank, a.shape[1], generator=generator)
        tensors[f"{name}.side_B"] = 0.2 * torch.randn(len(b), rank, generator=generator)
    return tensors


INPUT = torch.arange(3, 25).reshape(2, 11)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=INPUT).logits


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("rank", [3, 30])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_side_adapter_acts_as_its_product_and_is_read_by_peft(
    family: str, rank: int, rslora: bool, tmp_path: Path
) -> None:
    """As factors, or as their product (rank 30 of at most 32): in the forward pass, merged, and from PEFT's files."""
    lora = replace(LORA, rslora=rslora)
    adapter = attach(tiny_model(family), lora, seed=0)
    bare = logits(adapter.model)
    tensors = filled(adapter, rank)
    adapter.load(tensors)
    got = logits(adapter.model)
    with adapter.disabled():
        torch.testing.assert_close(logits(adapter.model), logits(tiny_model(family)))
    export_peft(tensors, lora, adapter.model, tmp_path, "base")
    _, theirs = import_peft(tmp_path)
    assert theirs.rank <= lora.rank + rank
    loaded = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), got, rtol=1e-3, atol=1e-4)
    adapter.load({name: value for name, value in tensors.items() if ".side_" not in name})
    assert not torch.allclose(logits(adapter.model), got, atol=1e-2), "without a side there is none"
    adapter.reset(0)
    torch.testing.assert_close(logits(adapter.model), bare)
    adapter.load(tensors)
    torch.testing.assert_close(logits(adapter.merge()), got, rtol=1e-3, atol=1e-4)


def test_an_exported_side_adapter_of_full_rank_is_opened_again(tmp_path: Path) -> None:
    """Its rank, 4 + 30, is above what any module of the model could be trained with."""
    save_tiny(tmp_path / "model")
    adapter = attach(tiny_model("llama"), LORA, seed=0)
    tensors = filled(adapter, 30)
    adapter.load(tensors)
    export_peft(tensors, LORA, adapter.model, tmp_path / "adapter", str(tmp_path / "model"))
    opened = open_result(tmp_path / "adapter")
    assert opened.config.lora.rank == 16, "the smaller side of k_proj"
    torch.testing.assert_close(logits(opened.base.model), logits(adapter.model), rtol=1e-3, atol=1e-4)


def test_a_side_adapter_that_does_not_fit_is_refused_by_name() -> None:
    adapter = attach(tiny_model("llama"), replace(LORA, targets=("q_proj",)), seed=0)
    tensors = filled(adapter, 3)
    name = "model.layers.0.self_attn.q_proj"
    for wrong, words in (
        ({**tensors, f"{name}.side_B": torch.zeros(32, 2)}, f"{name}.side_B: expected shape"),
        ({**tensors, "head.side_A": torch.zeros(3, 32)}, "head.side_A: not expected"),
        ({n: v for n, v in tensors.items() if n != f"{name}.side_B"}, f"{name}.side_B: missing"),
    ):
        with pytest.raises(UserError, match=words):
            adapter.load(wrong)


def test_gradients_pass_through_a_side_adapter_and_leave_it_alone() -> None:
    local = LocalConfig(steps=2, batch_size=2, lr=1e-2)
    adapter = attach(tiny_model("llama"), LORA, seed=3)
    tensors = filled(adapter, 3)
    data = lambda client: fedavg.ClientData(5, 9, lambda seed, steps, epochs: batches("b", seed, local))  # noqa: E731
    task = ClientTask(0, "b", "fedavg", tensors, 1, "")
    update, _ = fedavg.client_half(adapter, data, local, "equal", rounds=1)(task, {})
    assert set(update.delta) == set(adapter.parameters)
    merged = attach(tiny_model("llama"), LORA, seed=3)
    for name, layer in merged.layers.items():
        layer.base.weight.data += tensors[f"{name}.side_B"] @ tensors[f"{name}.side_A"]
    plain = {name: value for name, value in tensors.items() if ".side_" not in name}
    wanted, _ = fedavg.client_half(merged, data, local, "equal", rounds=1)(replace(task, tensors=plain), {})
    for name, value in wanted.delta.items():
        torch.testing.assert_close(update.delta[name], value, rtol=5e-2, atol=2e-4)


# --- ranks as a recipe has them ----------------------------------------------------------------------------


def test_a_clients_rank_follows_from_seed_and_name() -> None:
    classes = ByClass((RankClass(2, 0.25), RankClass(4, 0.5), RankClass(8, 0.25)))
    drawn = [rank_of(classes, f"client-{k}", 8, seed=1) for k in range(2000)]
    assert drawn == [rank_of(classes, f"client-{k}", 8, seed=1) for k in range(2000)]
    assert drawn != [rank_of(classes, f"client-{k}", 8, seed=2) for k in range(2000)]
    for rank, fraction in ((2, 0.25), (4, 0.5), (8, 0.25)):
        assert drawn.count(rank) / 2000 == pytest.approx(fraction, abs=0.04)
    named = ByName({"a": 2})
    assert [rank_of(named, name, 8, 0) for name in "ab"] == [2, 8]
    assert rank_of(None, "a", 8, 0) == 8


BUFFERED = "scheduling={selection: {kind: uniform}, buffered: {size: 1, concurrency: 2}}"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("ranks={kind: by_name, ranks: {client-01: 3}}",), "ranks.ranks.client-01: expected at most lora.rank, 2"),
        (("ranks={kind: by_class, classes: [{rank: 1, fraction: 0.5}]}",), "fractions that sum to 1"),
        (("aggregation.rule=flora", "aggregation.server_optimizer={kind: adam}"), "A server optimiser moves by a mean"),
        (("aggregation.rule=ffa_lora", "method=fedbiot"), "other rules are for FedIT"),
        (("aggregation.rule=flexlora", BUFFERED), "all updates of one message"),
        (("aggregation.rule=rolora", BUFFERED), "of the other factor"),
        (("ranks={kind: by_name, ranks: {a: 1}}", BUFFERED), "updates of one shape"),
        (("aggregation.rule=rolora", "local.proximal_mu=1.0", "local.proximal_on=products"), "these rules train one"),
    ],
)  # fmt: skip
def test_what_can_not_be_is_refused_with_its_reason(world: World, overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words.replace(".", r"\.")):
        load_recipe(world.recipe, overrides)


def test_ranks_of_unknown_clients_are_named(world: World) -> None:
    config = load_recipe(world.recipe, ["ranks={kind: by_name, ranks: {nobody: 1}}"])
    with pytest.raises(UserError, match="nobody"):
        estimate(config)


def test_baselines_beside_clients_whose_ranks_are_named_ignore_them(world: World) -> None:
    config = load_recipe(world.recipe, ["ranks={kind: by_name, ranks: {client-01: 1}}"])
    everyone = federation(replace(config, method="centralised"))
    assert list(everyone.data.clients) == ["everyone"]
    unnamed = federation(replace(config, method="centralised", ranks=None))
    assert digest(everyone.start) == digest(unnamed.start)


# --- whole runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_federated_world(tmp_path_factory.mktemp("apart"))


MIXED = "ranks={kind: by_name, ranks: {alice: 1}}"


@pytest.mark.parametrize("rule", RULES)
def test_a_run_in_any_place_and_resumed_is_the_same_to_the_bit(apart: Path, tmp_path: Path, rule: str) -> None:
    """In one process; with owners behind a link; stopped after a round and gone on with. Clients of two ranks."""
    settings = (f"aggregation.rule={rule}", MIXED, "rounds=3")
    together = execute(new_run(apart, tmp_path / "together", *settings))
    link = link_to(apart, tmp_path / "homes")
    summary = run_apart(new_run(apart, tmp_path / "apart", *settings, "data.train=/nowhere/at/all"), link)
    assert summary["adapter_sha256"] == together["adapter_sha256"]
    assert losses(tmp_path / "apart") == losses(tmp_path / "together")

    stop = threading.Event()

    class Watcher:
        def on_event(self, event: Any) -> None:
            if event["event"] == "round":
                stop.set()

        def on_client(self, done: int, total: int, client: str) -> None: ...

    folder = new_run(apart, tmp_path / "cut", *settings)
    with pytest.raises(Stopped):
        execute(folder, listeners=[Watcher()], stop=stop)
    execute(folder)
    assert losses(folder) == losses(tmp_path / "together")
    opened = open_result(folder)
    assert digest(folded(opened.adapter, opened.config.lora)[0]) == digest(import_peft(folder / "adapter")[0])


@pytest.mark.parametrize("rule", RULES)
def test_the_estimate_counts_a_rules_bytes(apart: Path, tmp_path: Path, rule: str) -> None:
    settings = (f"aggregation.rule={rule}", MIXED, "rounds=4")
    costs = estimate(load_recipe(apart / "recipe.yaml", settings))
    summary = execute(new_run(apart, tmp_path / "run", *settings))
    sizes = (costs.round_bytes_down, summary["bytes_down"]), (costs.round_bytes_up, summary["bytes_up"])
    for told, counted in sizes:
        messages = 4 * 3
        assert 0 < counted - 4 * told < messages * 4096, "headers alone"
    assert costs.trainable_parameters == summary["trainable_parameters"]


def test_the_estimate_counts_what_a_rule_trains(world: World) -> None:
    """FFA never trains A; RoLoRA trains both, one a round."""
    told = {rule: estimate(load_recipe(world.recipe, [f"aggregation.rule={rule}"])) for rule in RULES}
    config = load_recipe(world.recipe)
    made = shapes(load_skeleton(config.model), config.lora)
    whole, of_b = (
        sum(math.prod(shape) for name, shape in made.items() if name.endswith(end)) for end in ("", B_SUFFIX)
    )
    for rule, costs in told.items():
        assert costs.trainable_parameters == (of_b if rule == "ffa_lora" else whole)
        assert costs.alternating == (rule == "rolora")


def test_a_run_from_given_factors_tells_them_to_clients(apart: Path, tmp_path: Path) -> None:
    """FFA's A and FedSA's first B do not follow from the seed then; FLoRA's start goes aside."""
    execute(new_run(apart, tmp_path / "first", "seed=5"))
    given = f"lora.start_from={tmp_path / 'first' / 'adapter'}"
    for rule in ("ffa_lora", "fedsa_lora", "flora"):
        settings = (f"aggregation.rule={rule}", given)
        together = execute(new_run(apart, tmp_path / rule / "together", *settings))
        summary = run_apart(new_run(apart, tmp_path / rule / "apart", *settings), link_to(apart, tmp_path / rule))
        assert summary["adapter_sha256"] == together["adapter_sha256"]
        start = evaluated(tmp_path / "first")
        assert evaluated(tmp_path / rule / "together") != start or rule == "fedsa_lora"
        nothing = execute(new_run(apart, tmp_path / rule / "nothing", *settings, "local.lr=1.0e-12"))
        assert nothing["metrics"]["held_out"]["overall"]["loss"] == pytest.approx(start, rel=1e-5)


def test_packed_rows_and_recomputed_layers_change_nothing_beside_a_side_adapter(apart: Path, tmp_path: Path) -> None:
    whole = "local={epochs: 2, batch_size: 16, lr: 0.01}"  # all rows in each batch, as packed ones are mixed otherwise
    settings = ("aggregation.rule=fedex_lora", MIXED, "lora.targets=all-linear", whole)
    execute(new_run(apart, tmp_path / "plain", *settings))
    sparing = ("data.batching=packed", "model.gradient_checkpointing=true")
    execute(new_run(apart, tmp_path / "sparing", *settings, *sparing))
    assert evaluated(tmp_path / "sparing") == pytest.approx(evaluated(tmp_path / "plain"), rel=1e-3)


def test_fedbiots_adapters_have_an_aggregation_error_too(apart: Path, tmp_path: Path) -> None:
    execute(new_run(apart, tmp_path / "biot", *FEDBIOT, "rounds=1", "local.lr=0.1"))
    events = [json.loads(line) for line in (tmp_path / "biot" / "metrics.jsonl").read_text().splitlines()]
    assert [event["aggregation_error"] > 1e-3 for event in events if event["event"] == "round"] == [True]


PRIVATE = (
    "privacy={kind: user, clip_norm: 1.0, delta: 1.0e-5, noise_multiplier: 0.1, adaptive: {}}",
    "scheduling.selection={kind: poisson, fraction: 0.9}",
    "aggregation.weights=equal",
)
MASKED = ("secure_aggregation={min_clients: 2}", "aggregation.weights=equal", "scheduling.selection={kind: uniform}")
ROWS = (
    "privacy={kind: sample, clip_norm: 1.0, delta: 1.0e-5, noise_multiplier: 0.1}",
    "local.clip_norm=0",
)
TUNED = ("personal={kind: fine_tune, steps: 1}", "evaluation.client_rows=1")


@pytest.mark.parametrize(
    ("rule", "others"),
    [
        ("ffa_lora", PRIVATE),
        ("rolora", PRIVATE),
        ("fedsa_lora", PRIVATE),
        ("ffa_lora", MASKED),
        ("rolora", MASKED),
        ("fedsa_lora", MASKED),
        ("flora", ROWS),
        ("rolora", ROWS),
        ("fedex_lora", ("compression={format: int8}",)),
        ("flora", ("compression={format: bf16, error_feedback: false}",)),
        ("rolora", ("compression={format: int8}",)),
        ("flora", TUNED),
        ("fedsa_lora", TUNED),
        ("fedex_lora", ("gate={probe: embedded-public}",)),
        ("fedsa_lora", (BUFFERED,)),
        ("ffa_lora", (BUFFERED,)),
        ("flexlora", ("attack={kind: sign_flip}",)),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0].partition("=")[0],
)
def test_what_goes_together_runs(world: World, tmp_path: Path, rule: str, others: tuple[str, ...]) -> None:
    config = load_recipe(world.recipe, [f"aggregation.rule={rule}", "rounds=2", "evaluation.every=0", *others])
    create_run(config, tmp_path / "run")
    summary = execute(tmp_path / "run")
    assert math.isfinite(summary["metrics"]["held_out"]["overall"]["loss"])
    told = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rounds = [event for event in told if event["event"] == "round"]
    assert not [failure for event in rounds for failure in event["failures"]]


def evaluated(folder: Path) -> float:
    return json.loads((folder / "summary.json").read_text())["metrics"]["held_out"]["overall"]["loss"]
