"""Rules of robust aggregation against dense float64 references, and what a minority can do to them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from conftest import World
from flocktune import api
from flocktune.aggregation.mean import weighted_mean
from flocktune.aggregation.robust import (
    LONGEST,
    bounded,
    gram,
    krum_order,
    least_updates,
    rule,
    shortened,
    weiszfeld,
)
from flocktune.algorithms import fedavg
from flocktune.assemble import federation
from flocktune.config.load import load_recipe, parse_recipe
from flocktune.config.robustness import (
    CoordinateMedian,
    GeometricMedian,
    Krum,
    MultiKrum,
    NormBound,
    Robust,
    TrimmedMean,
)
from flocktune.config.schema import AggregationConfig
from flocktune.engine.in_process import InProcess
from flocktune.engine.rounds import run_rounds
from flocktune.errors import RoundFailed, TooFewUpdates, UserError
from flocktune.protection import around_server
from flocktune.scheduling import Cohort
from flocktune.tensors import norm
from flocktune.types import ClientTask, Mean, Tensors, Update

SCALE, RANK, OUT, IN = 2.0, 2, 5, 4
SHAPES = {"x.lora_A": (RANK, IN), "x.lora_B": (OUT, RANK), "y.lora_A": (RANK, 3), "y.lora_B": (6, RANK)}
RULES: tuple[Robust, ...] = (
    NormBound(),
    CoordinateMedian(),
    TrimmedMean(0.25),
    GeometricMedian(),
    Krum(2),
    MultiKrum(2),
    MultiKrum(2, keep=2),
)
seeds = st.integers(0, 2**32 - 1)


def draw(seed: int, size: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: size * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def updates(seed: int, count: int, size: float = 0.3) -> list[Update]:
    """Changes of like length; weights that differ a lot."""
    return [Update(draw(seed + 7919 * (k + 1), size), 10.0**k, 1, {"loss": Mean(k, 1)}) for k in range(count)]


def products(tensors: Tensors) -> np.ndarray:
    """``s B A`` of both modules, dense float64, as one vector."""
    pairs = [(tensors[f"{m}.lora_A"].double().numpy(), tensors[f"{m}.lora_B"].double().numpy()) for m in "xy"]
    return np.concatenate([SCALE * (b @ a).ravel() for a, b in pairs])


def changes(base: Tensors, held: list[Update]) -> np.ndarray:
    """Of every client, the change of the weights: [K, all]."""
    exact = {name: value.double() for name, value in base.items()}
    moved = [{name: exact[name] + delta.double() for name, delta in update.delta.items()} for update in held]
    return np.stack([products(one) - products(exact) for one in moved])


def flat(update: Update) -> np.ndarray:
    return np.concatenate([update.delta[name].double().numpy().ravel() for name in SHAPES])


# --- geometry ---------------------------------------------------------------------------------------


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_inner_products_are_those_of_dense_weights(seed: int) -> None:
    base, held = draw(seed), updates(seed, 4)
    dense = changes(base, held)
    np.testing.assert_allclose(gram(held, base, SCALE).numpy(), dense @ dense.T, rtol=1e-9, atol=1e-9)


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_inner_products_do_not_change_with_the_way_the_factors_are_written(seed: int) -> None:
    """Every client's own (B G, G^-1 A), and another G for what was sent out."""
    base, held = draw(seed), updates(seed, 4)
    generator = torch.Generator().manual_seed(seed)

    def rewritten(tensors: Tensors) -> dict[str, torch.Tensor]:
        turn = torch.eye(RANK).double() + 0.3 * torch.randn(RANK, RANK, generator=generator).double()
        return {
            name: (torch.linalg.solve(turn, value) if name.endswith("A") else value @ turn)
            for name, value in tensors.items()
        }

    def as_update(before: Tensors, after: Tensors) -> Update:
        return Update({name: after[name] - before[name] for name in before}, 1.0)

    exact = {name: value.double() for name, value in base.items()}
    after = [{name: exact[name] + update.delta[name].double() for name in exact} for update in held]
    other = rewritten(exact)
    again = [as_update(other, rewritten(one)) for one in after]
    torch.testing.assert_close(gram(again, other, SCALE), gram(held, base, SCALE), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("travels", ["A", "B"])
def test_with_one_factor_the_other_is_that_of_the_message(travels: str) -> None:
    base = draw(3)
    held = [
        Update({name: value for name, value in update.delta.items() if name.endswith(travels)}, 1.0)
        for update in updates(3, 4)
    ]
    whole = [replace(one, delta={name: one.delta.get(name, torch.zeros(shape)) for name, shape in SHAPES.items()})
             for one in held]  # fmt: skip
    dense = changes(base, whole)
    np.testing.assert_allclose(gram(held, base, SCALE).numpy(), dense @ dense.T, rtol=1e-9, atol=1e-9)


def test_what_is_no_pair_counts_by_its_own_coordinates() -> None:
    held = [Update({"head": torch.tensor([k, 2.0]), "z.lora_B": torch.ones(2, 2) * k}, 1.0) for k in (1.0, 3.0)]
    assert gram(held, {"head": torch.zeros(2)}, SCALE).tolist() == [[5.0 + 4, 7.0 + 12], [7.0 + 12, 13.0 + 36]]


# --- against textbooks -------------------------------------------------------------------------------


@given(seeds, st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_the_median_is_numpys(seed: int, count: int) -> None:
    held = updates(seed, count)
    median = np.median(np.stack([flat(one) for one in held]), axis=0)
    np.testing.assert_allclose(flat(rule(CoordinateMedian(), SCALE)(held, draw(seed))), median, rtol=1e-6, atol=1e-7)


@given(seeds, st.integers(1, 12), st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.49]))
@settings(max_examples=30, deadline=None)
def test_the_trimmed_mean_is_scipys(seed: int, count: int, fraction: float) -> None:
    held = updates(seed, count)
    trimmed = stats.trim_mean(np.stack([flat(one) for one in held]), fraction, axis=0)
    np.testing.assert_allclose(
        flat(rule(TrimmedMean(fraction), SCALE)(held, draw(seed))), trimmed, rtol=1e-5, atol=1e-7
    )


def textbook_krum(points: np.ndarray, byzantine: int) -> list[int]:
    scores = []
    for i in range(len(points)):
        others = sorted(float(((points[i] - points[j]) ** 2).sum()) for j in range(len(points)) if j != i)
        scores.append(sum(others[: len(points) - byzantine - 2]))
    return list(np.argsort(scores))


@given(seeds, st.integers(7, 10), st.integers(0, 2))
@settings(max_examples=25, deadline=None)
def test_krum_picks_what_a_dense_implementation_picks(seed: int, count: int, byzantine: int) -> None:
    base, held = draw(seed), updates(seed, count)
    order = textbook_krum(changes(base, held), byzantine)
    assert krum_order(gram(held, base, SCALE), byzantine) == order
    assert shortened(held) == held, "updates of like length are left as they are"
    picked = rule(Krum(byzantine), SCALE)(held, base)
    np.testing.assert_allclose(flat(picked), flat(held[order[0]]), rtol=1e-6)
    most = count - byzantine - 2
    for keep, number in ((None, most), (2, 2), (99, most)):
        several = rule(MultiKrum(byzantine, keep), SCALE)(held, base)
        wanted = np.mean([flat(held[place]) for place in order[:number]], axis=0)
        np.testing.assert_allclose(flat(several), wanted, rtol=1e-5, atol=1e-7)


@given(seeds, st.integers(3, 9))
@settings(max_examples=25, deadline=None)
def test_at_the_geometric_median_the_unit_vectors_cancel(seed: int, count: int) -> None:
    base, held = draw(seed), updates(seed, count)
    points = changes(base, held)
    shares = weiszfeld(gram(held, base, SCALE), GeometricMedian(iterations=2000)).numpy()
    assert shares.min() >= 0
    assert shares.sum() == pytest.approx(1)
    away = points - shares @ points
    lengths = np.linalg.norm(away, axis=1)
    if lengths.min() < 1e-4 * lengths.max():  # it may be one of the points
        near = lengths.argmin()
        pull = (np.delete(away, near, 0) / np.delete(lengths, near)[:, None]).sum(0)
        assert np.linalg.norm(pull) <= 1 + 1e-3
    else:
        assert np.linalg.norm((away / lengths[:, None]).sum(0)) < 1e-3


def test_the_geometric_median_of_points_on_a_line_is_their_median() -> None:
    line = torch.tensor([0.0, 1.0, 2.0, 3.0, 1000.0], dtype=torch.float64)
    shares = weiszfeld(line[:, None] * line[None, :], GeometricMedian(iterations=300))
    assert float(shares @ line) == pytest.approx(2.0, abs=1e-3)


@given(seeds, st.floats(0.1, 20))
@settings(max_examples=25, deadline=None)
def test_a_bound_holds_for_dense_weights_and_leaves_the_others(seed: int, bound: float) -> None:
    base, held = draw(seed), updates(seed, 4)
    before = np.linalg.norm(changes(base, held), axis=1)
    after = np.linalg.norm(changes(base, bounded(held, base, SCALE, bound)), axis=1)
    assert (after <= bound * (1 + 1e-5)).all()
    np.testing.assert_allclose(after, np.minimum(before, bound), rtol=1e-4)
    lengths = np.linalg.norm(changes(base, bounded(held, base, SCALE, None)), axis=1)
    np.testing.assert_allclose(lengths, np.minimum(before, np.sort(before)[1]), rtol=1e-4)


# --- what all rules have in common -------------------------------------------------------------------


@pytest.mark.parametrize("robust", RULES, ids=lambda robust: str(robust))
def test_the_order_of_clients_does_not_matter(robust: Robust) -> None:
    base, held = draw(1), updates(1, 7)
    wanted = rule(robust, SCALE)(held, base)
    for order in itertools.islice(itertools.permutations(held), 0, 5040, 501):
        np.testing.assert_allclose(flat(rule(robust, SCALE)(order, base)), flat(wanted), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("robust", RULES, ids=lambda robust: str(robust))
def test_of_clients_that_agree_it_is_the_mean(robust: Robust) -> None:
    base, [one] = draw(2), updates(2, 1)
    same = [replace(one, weight=float(k + 1)) for k in range(7)]
    combined = rule(robust, SCALE)(iter(same), base)
    mean = weighted_mean(same)
    np.testing.assert_allclose(flat(combined), flat(mean), rtol=1e-6)
    assert (combined.weight, combined.clients, combined.metrics) == (mean.weight, mean.clients, mean.metrics)


@pytest.mark.parametrize("robust", RULES, ids=lambda robust: str(robust))
@pytest.mark.parametrize("size", [-30.0, 1e6])
def test_two_of_nine_can_not_carry_it_off(robust: Robust, size: float) -> None:
    """Honest clients are near one point; the result is no further from it than they are, or bounded by their length."""
    base, [centre] = draw(4), updates(4, 1)
    honest = [
        Update({name: value + 0.02 * draw(100 + k)[name] for name, value in centre.delta.items()}, 1.0)
        for k in range(7)
    ]
    bad = [Update({name: size * value for name, value in draw(11).items()}, 1e9) for _ in range(2)]
    result = flat(rule(robust, SCALE)([*bad, *honest], base))
    spread = max(np.linalg.norm(flat(one) - flat(centre)) for one in honest)
    longest = max(norm(one.delta) for one in honest)
    off = np.linalg.norm(result - flat(centre))
    if isinstance(robust, NormBound):  # it bounds what a client can do, and does not find out who it is
        assert off < longest
    else:
        assert off < 3 * spread
    assert np.linalg.norm(flat(weighted_mean([*bad, *honest])) - flat(centre)) > 5 * longest


@pytest.mark.parametrize("robust", RULES, ids=lambda robust: str(robust))
def test_large_factors_can_not_hide_in_a_small_product(robust: Robust) -> None:
    """An attacker writes an honest client's weights as (B / c, c A): at distance 0, and ruin to a mean of factors."""
    base = draw(5)
    honest = updates(5, 7, size=0.1)

    def hidden(one: Update, c: float) -> Update:
        whole = {name: base[name] + delta for name, delta in one.delta.items()}
        return replace(one, delta={
            name: (c * value if name.endswith("A") else value / c) - base[name] for name, value in whole.items()
        })  # fmt: skip

    held = [*honest, hidden(honest[0], 1e4), hidden(honest[1], 1e4)]
    assert float(gram([held[0], held[-2]], base, SCALE).diff().abs().max()) < 1e-2
    longest = max(norm(one.delta) for one in honest)
    assert norm(rule(robust, SCALE)(held, base).delta) <= LONGEST * longest


def test_behind_b_of_zero_nothing_can_hide_either() -> None:
    base = {name: value if name.endswith("A") else torch.zeros_like(value) for name, value in draw(6).items()}
    honest = updates(6, 5)
    huge = {name: 1e6 * value if name.endswith("A") else torch.zeros_like(value) for name, value in draw(8).items()}
    held = [*honest, Update(huge, 1.0)]
    assert float(gram(held, base, SCALE)[-1, -1]) == 0, "its weights have not changed"
    for robust in RULES[:4]:
        assert norm(rule(robust, SCALE)(held, base).delta) <= LONGEST * max(norm(one.delta) for one in honest)


def test_krum_needs_enough_clients() -> None:
    assert [least_updates(one) for one in (None, CoordinateMedian(), Krum(1), MultiKrum(3))] == [1, 1, 5, 9]
    held = updates(0, 6)
    rule(Krum(1), SCALE)(held[:5], draw(0))
    with pytest.raises(TooFewUpdates, match="at least 7 updates"):
        rule(MultiKrum(2), SCALE)(held, draw(0))


# --- in a run ---------------------------------------------------------------------------------------


def test_a_round_that_is_too_small_fails_and_says_what_to_do() -> None:
    server = replace(fedavg.server_half(AggregationConfig()), combine=rule(Krum(1), SCALE))

    def half(task: ClientTask, memory: Tensors) -> tuple[Update, Tensors]:
        return Update(draw(task.seed % 97), 1.0), memory

    def run(clients: str) -> Tensors:
        cohort = Cohort(tuple(clients), len(clients), 1)
        return run_rounds(server, InProcess(half), lambda n: cohort, server.init(draw(0)), rounds=1, kind="", seed=0)

    assert run("abcde")
    with pytest.raises(RoundFailed, match=r"at least 5 clients, got 4(.|\n)*lower aggregation\.robust\.byzantine"):
        run("abcd")


def test_names_of_a_message_are_found_by_those_of_updates() -> None:
    """FedBiOT's messages have parts; what a half returns is what its updates are changes of."""
    config = parse_recipe("aggregation: {robust: {kind: krum, byzantine: 1}}")
    plain = fedavg.server_half(AggregationConfig())
    base, held = draw(7), updates(7, 5)
    parts = replace(plain, returned=lambda message: {name[4:]: value for name, value in message.items()})
    server = around_server(config, parts)
    message = {f"own/{name}": value for name, value in base.items()}
    [best, *_] = textbook_krum(changes(base, held), 1)
    np.testing.assert_allclose(flat(server.combine(held, message)), flat(held[best]), rtol=1e-6)


def test_settings_are_checked() -> None:
    for text, problem in {
        "{kind: trimmed_mean, fraction: 0.5}": r"aggregation\.robust\.fraction: expected less than 0\.5",
        "{kind: krum}": r"aggregation\.robust\.byzantine: expected a value",
        "{kind: magic}": r"aggregation\.robust\.kind: expected one of",
        "{kind: median, fraction: 0.1}": r"aggregation\.robust\.fraction: expected a known setting",
    }.items():
        with pytest.raises(UserError, match=problem):
            parse_recipe(f"aggregation: {{robust: {text}}}")
    buffered = "scheduling={buffered: {size: 2, concurrency: 2}}"
    with pytest.raises(
        UserError, match=r"aggregation\.robust: expected buffered rounds \(scheduling\.buffered\) without robust"
    ):
        parse_recipe("aggregation: {robust: {kind: median}}", [buffered])
    assert parse_recipe("{method: centralised, aggregation: {robust: {kind: median}}}", [buffered])


@pytest.mark.parametrize("method", ["fedit", "fedbiot"])
def test_a_run_bears_with_attackers(world: World, tmp_path, method: str) -> None:
    more = ["emulator={adapter_layers: 1, drop: 0.0}", "alignment={first_steps: 1, steps: 0, fidelity_rows: 0}"]
    attack = "attack={kind: sign_flip, clients: [client-02], factor: 10.0}"

    def loss(*overrides: str) -> float:
        common = [f"method={method}", *(more if method == "fedbiot" else []), "scheduling.selection={kind: uniform}"]
        config = load_recipe(world.recipe, [*common, "evaluation.generate=false", "rounds=2", *overrides])
        summary = api.run(config, tmp_path / str(len(list(tmp_path.iterdir()))))
        return summary["metrics"]["held_out"]["overall"]["loss"]

    before, clean = loss("rounds=0"), loss()
    assert clean < before < loss(attack)
    for kind in ("median", "geometric_median", "norm_bound"):
        assert loss(attack, f"aggregation.robust={{kind: {kind}}}") < before, kind


def test_a_cohort_that_is_always_too_small_is_refused_at_once(world: World) -> None:
    config = load_recipe(world.recipe, ["aggregation.robust={kind: krum, byzantine: 1}"])
    with pytest.raises(UserError, match=r"aggregation\.robust\.byzantine: expected at least 5 clients a round"):
        federation(config)
