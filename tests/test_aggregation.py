"""The mean, the server optimisers and the aggregation error, against dense float64 references."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flocktune.aggregation import lora, server_opt
from flocktune.aggregation.lora import product_norm_squared
from flocktune.aggregation.mean import weighted_mean
from flocktune.config.schema import ServerAdaptive, ServerSgd
from flocktune.types import Mean, Update


def update(*values: float, weight: float = 1.0) -> Update:
    return Update({"w": torch.tensor(values)}, weight, 1, {"loss": Mean(sum(values), 1)})


def test_the_mean_by_hand() -> None:
    merged = weighted_mean([update(1.0, 2.0, 3.0, weight=1), update(4.0, 6.0, 8.0, weight=3)])
    assert merged.delta["w"].tolist() == [3.25, 5.0, 6.75]
    assert (merged.weight, merged.clients, merged.metrics["loss"]) == (4, 2, Mean(24.0, 2))


def test_one_client_comes_through_unchanged() -> None:
    delta = {"w": torch.randn(100), "v": torch.randn(3, 3)}
    merged = weighted_mean([Update(delta, 17.3)])
    assert all(torch.equal(merged.delta[name], delta[name]) for name in delta)
    assert merged.delta["w"] is not delta["w"], "the caller's tensors are not written to"


@given(st.lists(st.tuples(st.floats(-1e3, 1e3, width=32), st.floats(0.5, 1e6)), min_size=1, max_size=30))
def test_the_mean_equals_float64(pairs: list[tuple[float, float]]) -> None:
    merged = weighted_mean(update(value, weight=weight) for value, weight in pairs)
    values, weights = np.array(pairs).T
    assert merged.delta["w"].item() == pytest.approx(np.average(values, weights=weights), abs=1e-3)
    assert merged.weight == pytest.approx(weights.sum())


@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=12), st.integers(1, 11))
def test_merging_is_closed(values: list[float], cut: int) -> None:
    """A mean of means is the mean: hierarchical aggregation follows."""
    updates = [update(value, weight=number + 1) for number, value in enumerate(values)]
    left, right = updates[:cut], updates[cut:]
    halves = [weighted_mean(part) for part in (left, right) if part]
    assert weighted_mean(halves).delta["w"].item() == pytest.approx(weighted_mean(updates).delta["w"].item(), abs=1e-4)
    assert weighted_mean(halves).clients == len(values)


def test_the_order_of_clients_matters_only_to_rounding() -> None:
    updates = [update(*torch.randn(5).tolist(), weight=w) for w in (1.0, 20.0, 300.0)]
    results = [weighted_mean(order).delta["w"] for order in permutations(updates)]
    assert all(torch.allclose(results[0], other, atol=1e-6) for other in results)
    assert torch.equal(weighted_mean(updates).delta["w"], weighted_mean(updates).delta["w"])


def test_updates_are_taken_one_at_a_time() -> None:
    alive = 0

    class Counted(Update):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def stream():
        nonlocal alive
        for number in range(20):
            alive += 1
            assert alive <= 3, "updates pile up"
            yield Counted({"w": torch.full((4,), float(number))}, 1.0)

    assert weighted_mean(stream()).delta["w"].tolist() == pytest.approx([9.5] * 4)


def test_no_update_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        weighted_mean([])


# --- server optimisers: three-element vectors, two steps, by hand ------------------------------------


def two_steps(settings, changes) -> torch.Tensor:
    parameters = {"w": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)}
    state = server_opt.init(settings, parameters)
    for change in changes:
        parameters, state = server_opt.step(
            settings, parameters, {"w": torch.tensor(change, dtype=torch.float64)}, state
        )
    return parameters["w"]


CHANGES = [[0.1, -0.2, 0.0], [0.3, 0.1, -0.5]]


def test_sgd_with_rate_one_is_fedavg() -> None:
    assert two_steps(ServerSgd(), CHANGES).tolist() == pytest.approx([1.4, 1.9, 2.5])


def test_momentum_by_hand() -> None:
    # v1 = d1; v2 = 0.9 d1 + d2; w = w0 + lr (v1 + v2)
    expected = [1 + 0.5 * (0.1 + 0.09 + 0.3), 2 + 0.5 * (-0.2 - 0.18 + 0.1), 3 + 0.5 * (0.0 + 0.0 - 0.5)]
    assert two_steps(ServerSgd(lr=0.5, momentum=0.9), CHANGES).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["adam", "yogi", "adagrad"])
def test_adaptive_rules_follow_algorithm_2(kind) -> None:
    settings = ServerAdaptive(kind, lr=0.1, beta1=0.9, beta2=0.99, tau=0.01)
    expected = []
    for weight, changes in zip([1.0, 2.0, 3.0], zip(*CHANGES, strict=True), strict=True):
        m, v = 0.0, 0.01**2
        for d in changes:
            m = 0.9 * m + 0.1 * d
            match kind:
                case "adagrad":
                    v = v + d * d
                case "adam":
                    v = 0.99 * v + 0.01 * d * d
                case "yogi":
                    v = v - 0.01 * d * d * math.copysign(1, v - d * d) if v != d * d else v
            weight += 0.1 * m / (math.sqrt(v) + 0.01)
        expected.append(weight)
    assert two_steps(settings, CHANGES).tolist() == pytest.approx(expected, rel=1e-9)


RULES = {
    # Reddi et al., arXiv 2003.00295, algorithm 2, lines 9 to 15: v_t of FedAdagrad, FedYogi, FedAdam
    "adagrad": lambda v, d2, beta2: v + d2,
    "yogi": lambda v, d2, beta2: v - (1 - beta2) * d2 * np.sign(v - d2),
    "adam": lambda v, d2, beta2: beta2 * v + (1 - beta2) * d2,
}


@given(
    kind=st.sampled_from(sorted(RULES)),
    lr=st.floats(1e-3, 1.0),
    beta1=st.sampled_from([0.0, 0.5, 0.9]),
    beta2=st.sampled_from([0.9, 0.99]),
    tau=st.sampled_from([1e-4, 1e-3, 1e-1]),
    seed=st.integers(0, 1000),
)
def test_fedopt_over_many_rounds_equals_the_published_algorithm(kind, lr, beta1, beta2, tau, seed) -> None:
    """Eight rounds of several tensors, in float64, by arrays alone: no bias correction, tau outside the root."""
    draw = np.random.default_rng(seed)
    shapes = {"down.lora_A": (2, 3), "down.lora_B": (4, 2), "scalar": ()}
    x = {name: draw.normal(size=shape) for name, shape in shapes.items()}
    m = {name: np.zeros(shape) for name, shape in shapes.items()}
    v = {name: np.full(shape, tau**2) for name, shape in shapes.items()}
    settings = ServerAdaptive(kind, lr=lr, beta1=beta1, beta2=beta2, tau=tau)
    parameters = {name: torch.tensor(value) for name, value in x.items()}
    state = server_opt.init(settings, parameters)
    for _ in range(8):
        change = {name: draw.normal(scale=0.1, size=shape) for name, shape in shapes.items()}
        parameters, state = server_opt.step(
            settings, parameters, {name: torch.tensor(value) for name, value in change.items()}, state
        )
        for name, d in change.items():
            m[name] = beta1 * m[name] + (1 - beta1) * d
            v[name] = RULES[kind](v[name], d**2, beta2)
            x[name] = x[name] + lr * m[name] / (np.sqrt(v[name]) + tau)
    for name, value in x.items():
        np.testing.assert_allclose(parameters[name].numpy(), value, rtol=1e-9, atol=1e-12)


@given(lr=st.floats(0.01, 2.0), momentum=st.floats(0.0, 0.99), seed=st.integers(0, 1000))
def test_fedavgm_over_many_rounds_is_sgd_with_momentum_on_the_negative_change(lr, momentum, seed) -> None:
    """Hsu et al., arXiv 1909.06335: v <- beta v + change, w <- w + v; torch's own SGD says the same."""
    draw = torch.Generator().manual_seed(seed)
    start = torch.randn(3, 2, generator=draw, dtype=torch.float64)
    w = torch.nn.Parameter(start.clone())
    reference = torch.optim.SGD([w], lr=lr, momentum=momentum)
    settings, parameters = ServerSgd(lr=lr, momentum=momentum), {"w": start}
    state = server_opt.init(settings, parameters)
    for _ in range(8):
        change = torch.randn(3, 2, generator=draw, dtype=torch.float64)
        parameters, state = server_opt.step(settings, parameters, {"w": change}, state)
        w.grad = -change
        reference.step()
    torch.testing.assert_close(parameters["w"], w.detach(), rtol=1e-9, atol=1e-12)


# --- aggregation error ---------------------------------------------------------------------------------


def clients(count: int, rank: int = 3, seed: int = 0) -> list[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"q": (7, 5), "up": (4, 9)}
    return [
        {
            name: (torch.randn(rank, n, generator=draw), torch.randn(m, rank, generator=draw))
            for name, (m, n) in shapes.items()
        }
        for _ in range(count)
    ]


def aggregation_error(factors, weights) -> float:
    """FedIT's: the mean of factors is what is achieved."""
    shares = [weight / sum(weights) for weight in weights]
    means = {
        module: tuple(
            sum(s * client[module][n].double() for s, client in zip(shares, factors, strict=True)) for n in (0, 1)
        )
        for module in factors[0]
    }
    return lora.aggregation_error(factors, shares, means)


def dense_error(factors, weights) -> float:
    shares = np.array(weights) / sum(weights)
    error = ideal = 0.0
    for module in factors[0]:
        products = [b.double() @ a.double() for a, b in (client[module] for client in factors)]
        best = sum(share * product for share, product in zip(shares, products, strict=True))
        mean_a = sum(share * client[module][0].double() for share, client in zip(shares, factors, strict=True))
        mean_b = sum(share * client[module][1].double() for share, client in zip(shares, factors, strict=True))
        error += float((best - mean_b @ mean_a).square().sum())
        ideal += float(best.square().sum())
    return math.sqrt(error / ideal)


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 100))
def test_the_error_equals_the_dense_one(count: int, rank: int, seed: int) -> None:
    factors, weights = clients(count, rank, seed), list(range(1, count + 1))
    assert aggregation_error(factors, weights) == pytest.approx(dense_error(factors, weights), abs=1e-6)


def test_the_error_vanishes_when_a_factor_is_shared_or_clients_agree() -> None:
    one, two = clients(2)
    assert aggregation_error([one], [3]) == pytest.approx(0, abs=1e-6)
    assert aggregation_error([one, one], [1, 2]) == pytest.approx(0, abs=1e-6)
    shared_a = {name: (one[name][0], two[name][1]) for name in one}
    assert aggregation_error([one, shared_a], [1, 2]) == pytest.approx(0, abs=1e-6)
    assert aggregation_error([one, two], [1, 2]) > 0.1
    zero = {name: (a, torch.zeros_like(b)) for name, (a, b) in one.items()}
    assert aggregation_error([zero, zero], [1, 1]) == 0.0


def test_products_of_differing_ranks() -> None:
    (small,), (large,) = clients(1, 2, 5), clients(1, 6, 6)
    pairs = [small["q"], large["q"]]
    dense = 0.5 * pairs[0][1] @ pairs[0][0] - 2.0 * pairs[1][1] @ pairs[1][0]
    assert product_norm_squared(pairs, [0.5, -2.0]) == pytest.approx(float(dense.square().sum()), rel=1e-5)
