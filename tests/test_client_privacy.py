"""User-level differential privacy: clipping, noise, denominators, budgets, over a toy and over whole runs."""

from __future__ import annotations

import json
import math
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy import stats

from flocktune.algorithms import fedavg
from flocktune.config.load import parse_recipe
from flocktune.config.privacy import AdaptiveClipping, UserPrivacy
from flocktune.config.schema import AggregationConfig, Poisson, SchedulingConfig, ServerSgd
from flocktune.engine.client import restored, transformed
from flocktune.engine.in_process import InProcess
from flocktune.engine.rounds import run_rounds
from flocktune.errors import FlocktuneError, UpdateRefused, UserError
from flocktune.interfaces import Memory, State
from flocktune.privacy.accounting import Budget
from flocktune.privacy.clients import CLIP_NORM, WITHIN, ClientPrivacy, clipping, noised
from flocktune.privacy.gaussian import GaussianMechanism
from flocktune.privacy.noise import derive_key, uniforms
from flocktune.runs import Stopped, execute
from flocktune.scheduling import Cohort, select
from flocktune.tensors import digest, norm
from flocktune.types import ClientTask, Update
from tiny_federation import SIZES, Direct, make_federated_world, make_owner, new_run, run_apart

KEY = bytes(range(32))
CLIENTS = ("a", "b", "c", "d", "e")
START = {"w": torch.zeros(40), "v": torch.zeros(3, 5)}


def pull(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
    """Client number k wants to go k units along every coordinate."""
    size = float(CLIENTS.index(task.client))
    return Update({name: torch.full_like(value, size) for name, value in START.items()}, 1.0), memory


def privacy(clip_norm: float = 1.0, z: float = 0.0, q: float = 0.8, clients: int = 5, **more) -> ClientPrivacy:
    return ClientPrivacy(UserPrivacy(clip_norm, 1e-5, noise_multiplier=z, **more), clients, q, rounds=10)


def run(own: ClientPrivacy, rounds: int = 1, asked=CLIENTS, key=KEY, half=pull, state=None, first=0, **more) -> State:
    server = noised(fedavg.server_half(AggregationConfig(weights="equal", **more)), own, key)
    transforms = [clipping(own.settings)]
    schedule = asked if callable(asked) else lambda number: Cohort(tuple(asked), len(asked), 0)
    return run_rounds(
        server, InProcess(transformed(half, transforms)), schedule, server.init(START) if state is None else state,
        rounds=rounds, first_round=first, kind="toy", seed=7, transforms=transforms,
    )  # fmt: skip


def moved(state: State) -> torch.Tensor:
    return torch.cat([state["adapter/w"].flatten(), state["adapter/v"].flatten()]).double()


# --- clipping --------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=30), st.floats(1e-3, 1e3))
def test_clipping_is_of_all_tensors_together_exact_and_done_once(values: list[float], clip_norm: float) -> None:
    mechanism = GaussianMechanism(clip_norm, 0.0, 1.0, 1.0)
    tensors = {"a": torch.tensor(values[:1]), "b": torch.tensor(values[1:])}
    clipped, within = mechanism.clipped(tensors)
    assert within == (norm(tensors) <= clip_norm)
    assert norm(clipped) <= clip_norm
    if within:
        assert clipped is tensors
    else:
        assert norm(clipped) > clip_norm * (1 - 1e-5)
        together = torch.cat([clipped["a"], clipped["b"]]).double()
        before = torch.tensor(values).double()
        assert torch.allclose(together * before.norm(), before * together.norm(), rtol=1e-5, atol=1e-30)
    again, unmoved = mechanism.clipped(clipped)
    assert unmoved
    assert again is clipped


def test_the_server_enforces_what_clients_say_they_did() -> None:
    honest = run(privacy(clip_norm=0.5))
    server = noised(fedavg.server_half(AggregationConfig()), privacy(clip_norm=0.5), KEY)
    lies = run_rounds(
        server, InProcess(pull), lambda number: Cohort(CLIENTS, 5, 0), server.init(START),
        rounds=1, kind="toy", seed=7, transforms=[clipping(privacy(clip_norm=0.5).settings)],
    )  # fmt: skip
    assert digest(honest) == digest(lies)


def test_a_client_that_weighs_more_is_refused() -> None:
    transform = clipping(privacy().settings)
    with pytest.raises(UpdateRefused, match="expected 1 of each client, got 1000"):
        restored(Update(START, 1000.0), [transform], START)
    assert restored(Update(START, 3.0, 3), [transform], START).clients == 3, "a sum of three weighs three"


def test_a_task_without_a_norm_is_not_done() -> None:
    half = transformed(pull, [clipping(privacy().settings)])
    for value in ({}, {CLIP_NORM: torch.tensor(math.nan)}, {CLIP_NORM: torch.tensor(-1.0)}):
        with pytest.raises(FlocktuneError, match="expected a positive number"):
            half(ClientTask(0, "b", "toy", {**START, **value}, 0, ""), {})


# --- denominators and noise ------------------------------------------------------------------------


def test_the_denominator_is_fixed_whoever_comes() -> None:
    """Clients b and c of five with probability 0.8: a sum of unit vectors over four."""
    unit = 1 / math.sqrt(55)
    both = moved(run(privacy(), asked=("b", "c")))
    assert torch.allclose(both, torch.full((55,), 2 * unit / 4, dtype=torch.float64), rtol=1e-5)
    alone = moved(run(privacy(), asked=("c",)))
    assert torch.allclose(alone, both / 2, rtol=1e-5)
    assert not moved(run(privacy(), asked=())).any()


def test_without_noise_and_bound_it_is_the_plain_mean() -> None:
    settings = UserPrivacy(1.0, 1e-5, noise_multiplier=0.0)
    own = ClientPrivacy(replace(settings, clip_norm=1e30), 5, 1.0, 10)
    server = fedavg.server_half(AggregationConfig(weights="equal"))
    plain = run_rounds(
        server, InProcess(pull), lambda number: Cohort(CLIENTS, 5, 1), server.init(START), rounds=3, kind="toy", seed=7
    )
    state = run(own, rounds=3)
    for name in START:
        assert torch.allclose(state[f"adapter/{name}"], plain[f"adapter/{name}"], rtol=1e-6)


@pytest.mark.parametrize("asked", [(), CLIENTS], ids=["nobody", "everybody"])
def test_noise_has_its_standard_deviation_on_every_coordinate(asked: tuple[str, ...]) -> None:
    z, clip_norm, q, clients = 1.3, 0.7, 0.1, 200
    big = {"w": torch.zeros(400, 250)}

    def still(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
        return Update({"w": torch.zeros(400, 250)}, 1.0), memory

    own = privacy(clip_norm, z, q, clients)
    server = noised(fedavg.server_half(AggregationConfig()), own, KEY)
    state = run(own, half=still, asked=asked, state=server.init(big))
    drawn = state["adapter/w"].double().numpy().ravel() * (q * clients) / (z * clip_norm)
    n = len(drawn)
    assert abs(drawn.mean()) < 4 / math.sqrt(n)
    assert abs(drawn.var() - 1) < 4 * math.sqrt(2 / n)
    assert stats.kstest(drawn, "norm").pvalue > 1e-3


def test_noise_of_rounds_tensors_and_runs_is_independent_and_repeats_for_the_same_key() -> None:
    big = {"w": torch.zeros(60_000), "v": torch.zeros(60_000)}
    own = privacy(1.0, 1.0)

    def after(rounds: int, key: bytes = KEY) -> dict[str, torch.Tensor]:
        server = noised(fedavg.server_half(AggregationConfig()), own, key)
        return dict(run(own, rounds, asked=(), key=key, state=server.init(big)))

    first, second = after(1), after(2)
    samples = [
        first["adapter/w"], first["adapter/v"], second["adapter/w"] - first["adapter/w"],
        after(1, derive_key(KEY, "other"))["adapter/w"],
    ]  # fmt: skip
    found = np.corrcoef(np.stack([sample.numpy() for sample in samples]))
    assert np.abs(found - np.eye(4)).max() < 4.5 / math.sqrt(60_000)
    assert digest(after(2)) == digest(second)


def test_another_mean_in_a_repeated_round_has_other_noise() -> None:
    """Who sees both would see their difference in the clear otherwise."""
    zero, some = run(privacy(z=1.0), asked=("a",)), run(privacy(z=1.0), asked=("a", "b"))
    unit = 1 / math.sqrt(55) / 4
    assert (moved(some) - moved(zero) - unit).abs().max() > 0.1


def test_noise_follows_the_sum_and_not_the_mean() -> None:
    """One client and two of the same change have one mean, and two sums."""
    server = noised(fedavg.server_half(AggregationConfig()), privacy(z=1.0), KEY)
    delta = {name: torch.full_like(value, 0.01) for name, value in START.items()}
    one, two = (server.step(server.init(START), Update(delta, float(count), count)) for count in (1, 2))
    assert (moved(two) - moved(one) - 0.01 / 4).abs().max() > 0.1


def test_the_servers_optimiser_sees_the_noisy_mean_alone() -> None:
    plain = moved(run(privacy(z=1.0)))
    double = moved(run(privacy(z=1.0), server_optimizer=ServerSgd(lr=2.0)))
    assert torch.allclose(double, 2 * plain)


def test_without_the_runs_key_no_step_is_taken() -> None:
    with pytest.raises(FlocktuneError, match="secret key"):
        run(privacy(z=1.0), key=None)


def test_a_method_that_combines_otherwise_is_no_sum() -> None:
    half = replace(fedavg.server_half(AggregationConfig()), combine=lambda updates, message: next(iter(updates)))
    with pytest.raises(ValueError, match="another way"):
        noised(half, privacy(), KEY)


def test_stopping_and_going_on_changes_no_bit_and_forgets_no_round() -> None:
    own = privacy(z=1.0, adaptive=AdaptiveClipping())
    whole = run(own, 6)
    assert digest(run(own, 6, state=run(own, 4), first=4)) == digest(whole)
    assert int(whole["privacy/rounds"]) == 6


# --- adaptive clipping -----------------------------------------------------------------------------


@pytest.mark.parametrize("quantile", [0.3, 0.5, 0.9])
def test_the_clip_norm_goes_to_the_quantile(quantile: float) -> None:
    """Norms of clients: 0, 1, 2, 3, 4 times sqrt(55)."""
    own = privacy(clip_norm=5.0, q=1.0, adaptive=AdaptiveClipping(quantile=quantile, lr=0.3))
    state = run(own, 150)
    norms = np.arange(5) * math.sqrt(55)
    between = np.quantile(norms, quantile, method="lower"), np.quantile(norms, quantile, method="higher")
    assert between[0] * 0.85 <= float(state[CLIP_NORM]) <= between[1] * 1.15


def test_updates_and_bits_together_cost_what_is_said() -> None:
    own = privacy(z=1.2, adaptive=AdaptiveClipping(share=0.2))
    assert own.for_within is not None
    parts = [own.for_updates.noise_multiplier, own.for_within.noise_multiplier]
    assert sum(z**-2 for z in parts) == pytest.approx(1.2**-2)
    assert own.for_within.clip_norm == 0.5
    assert privacy(z=1.2).for_updates.noise_multiplier == 1.2


def test_nobody_says_more_than_one_bit() -> None:
    own = privacy(adaptive=AdaptiveClipping())
    update = Update({**START, WITHIN: torch.tensor(1e9)}, 1.0)
    taken = restored(update, [clipping(own.settings)], {**START, WITHIN: torch.tensor(1.0)})
    assert float(taken.delta[WITHIN]) == 0.5


def test_the_norm_in_force_is_the_one_enforced() -> None:
    """After a round it is another one than the recipe's, and clients' word is still not taken."""
    own = privacy(clip_norm=4.0, q=1.0, adaptive=AdaptiveClipping(lr=2.0))
    server = noised(fedavg.server_half(AggregationConfig()), own, KEY)

    def lie(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
        update, memory = pull(task, memory)
        size = norm(update.delta)
        within = torch.tensor(0.5 if size <= float(task.tensors[CLIP_NORM]) else -0.5)
        return replace(update, delta={**update.delta, WITHIN: within}), memory

    state = run_rounds(
        server, InProcess(lie), lambda number: Cohort(CLIENTS, 5, 0), server.init(START),
        rounds=5, kind="toy", seed=7, transforms=[clipping(own.settings)],
    )  # fmt: skip
    assert digest(state) == digest(run(own, 5))


def test_the_server_clips_to_the_norm_of_the_round_not_of_the_recipe() -> None:
    transform = clipping(privacy(clip_norm=4.0, adaptive=AdaptiveClipping()).settings)
    update = Update({"w": torch.full((9,), 2.0), WITHIN: torch.tensor(0.5)}, 1.0)
    for in_force, left in ((1.0, 1.0), (5.0, 5.0), (7.0, 6.0)):
        taken = transform.on_server(update, {"w": update.delta["w"], WITHIN: torch.tensor(in_force)})
        assert norm({"w": taken.delta["w"]}) == pytest.approx(left, rel=1e-5)


# --- cohorts ---------------------------------------------------------------------------------------


def test_poisson_cohorts_are_independent_draws() -> None:
    sizes = {f"client-{number:03d}": 1 for number in range(100)}
    scheduling = SchedulingConfig(selection=Poisson(fraction=0.1))
    cohorts = [select(scheduling, sizes, round=r, seed=0, coins=uniforms(derive_key(KEY, r), 100)) for r in range(400)]
    counts = np.array([len(cohort.asked) for cohort in cohorts])
    assert abs(counts.mean() - 10) < 4 * 3 / 20
    assert abs(counts.var() - 9) < 4 * 9 * math.sqrt(2 / 400)
    assert all(cohort.wanted == len(cohort.asked) for cohort in cohorts)
    small = SchedulingConfig(selection=Poisson(fraction=0.01))
    empty = [select(small, {"a": 1}, round=number, seed=0) for number in range(20)]
    assert Cohort((), 0, 0) in empty


# --- recipes ---------------------------------------------------------------------------------------

USER = "privacy: {kind: user, clip_norm: 1.0, delta: 1.0e-5, noise_multiplier: 1.0}\naggregation: {weights: equal}\n"
POISSON = "scheduling: {selection: {kind: poisson, fraction: 0.5}}\n"


@pytest.mark.parametrize(
    ("text", "overrides", "reason"),
    [
        (USER, [], "scheduling.selection: expected kind poisson with privacy of kind user, got uniform"),
        (USER + POISSON, ["aggregation.weights=examples"], "aggregation.weights: expected equal"),
        (USER + POISSON, ["scheduling.over_select=0.5"], "scheduling.over_select: expected 0"),
        (USER + POISSON, ["privacy.epsilon=8"], "exactly one of noise_multiplier and epsilon, got both"),
        (USER + POISSON, ["privacy.noise_multiplier=null"], "exactly one of noise_multiplier and epsilon, got neither"),
        (
            USER + POISSON,
            ["privacy.noise_multiplier=null", "privacy.epsilon=8", "privacy.max_epsilon=9"],
            "privacy.max_epsilon: expected null with privacy.epsilon",
        ),
        (USER + POISSON, ["privacy.noise_multiplier=0", "privacy.max_epsilon=9"], "null with noise_multiplier 0"),
        (USER + POISSON, ["privacy.clipnorm=1"], "privacy.clipnorm: expected a known setting"),
        (
            USER,
            ["scheduling.buffered={size: 2, concurrency: 4}"],
            "Epsilon is for clients who are drawn anew in every round",
        ),
    ],
)
def test_a_recipe_that_would_not_keep_the_promise_is_refused(text: str, overrides: list[str], reason: str) -> None:
    with pytest.raises(UserError, match=reason.replace("(", r"\(")):
        parse_recipe(text, overrides)


def test_baselines_have_no_privacy() -> None:
    parse_recipe(USER, ["method=centralised"])


# --- whole runs ------------------------------------------------------------------------------------

PRIVATE = (
    "allocation={kind: natural}", "aggregation.weights=equal", "rounds=3",
    "scheduling.selection={kind: poisson, fraction: 0.7}",
    "privacy={kind: user, clip_norm: 0.1, delta: 1.0e-3, noise_multiplier: 1.0, adaptive: {}}",
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_federated_world(tmp_path_factory.mktemp("private"))


def events(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [event for event in lines if event["event"] == "round"]


def test_every_round_says_what_is_spent_and_the_key_stays_in_the_folder(world: Path, tmp_path: Path) -> None:
    folder = new_run(world, tmp_path / "run", *PRIVATE)
    summary = execute(folder)
    spent = [event["privacy"]["epsilon"] for event in events(folder)]
    assert spent == [epsilon_after(rounds) for rounds in (1, 2, 3)]
    assert summary["privacy"]["epsilon"] == spent[-1]
    assert "add/remove one client, Poisson q=0.7" in summary["privacy"]["said"]
    key = folder / "secret.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    secret = key.read_bytes()
    for path in folder.rglob("*"):
        if path.is_file() and path != key:
            assert secret not in path.read_bytes()
            assert secret.hex() not in path.read_text(errors="ignore")


def epsilon_after(rounds: int) -> float:
    return Budget(0.7, 1.0, 1e-3).epsilon(rounds)


def test_a_run_that_was_stopped_goes_on_to_the_same_bits_and_spends_no_round_twice(world: Path, tmp_path: Path) -> None:
    whole, cut = (new_run(world, tmp_path / name, *PRIVATE) for name in ("whole", "cut"))
    expected = execute(whole)
    (cut / "secret.key").write_bytes((whole / "secret.key").read_bytes())

    class StopsAfterOne:
        def is_set(self) -> bool:
            return (cut / "state" / "round-00001.json").exists()

    with pytest.raises(Stopped):
        execute(cut, stop=StopsAfterOne())  # type: ignore[arg-type]
    assert len(events(cut)) == 1
    summary = execute(cut)
    assert summary["adapter_sha256"] == expected["adapter_sha256"]
    assert summary["privacy"] == expected["privacy"]
    assert [event["selected"] for event in events(cut)] == [event["selected"] for event in events(whole)]


def test_a_lost_key_is_not_replaced(world: Path, tmp_path: Path) -> None:
    folder = new_run(world, tmp_path / "run", *PRIVATE)

    class StopsAfterOne:
        def is_set(self) -> bool:
            return (folder / "state" / "round-00001.json").exists()

    with pytest.raises(Stopped):
        execute(folder, stop=StopsAfterOne())  # type: ignore[arg-type]
    (folder / "secret.key").unlink()
    with pytest.raises(UserError, match="the run's secret key, got nothing there"):
        execute(folder)


def test_two_runs_of_one_recipe_have_other_noise_and_other_cohorts(world: Path, tmp_path: Path) -> None:
    one, other = (execute(new_run(world, tmp_path / name, *PRIVATE)) for name in ("one", "other"))
    assert one["adapter_sha256"] != other["adapter_sha256"]


def test_the_run_ends_before_the_round_that_would_exceed_the_budget(world: Path, tmp_path: Path) -> None:
    most = epsilon_after(2) * 1.001
    folder = new_run(world, tmp_path / "run", *PRIVATE, f"privacy.max_epsilon={most}", "rounds=5")
    summary = execute(folder)
    assert summary["rounds"] == 2
    assert summary["privacy"]["epsilon"] <= most
    with pytest.raises(UserError, match=r"privacy.max_epsilon: expected at least what one round costs"):
        execute(new_run(world, tmp_path / "poor", *PRIVATE, "privacy.max_epsilon=0.1"))


def test_two_sides_compute_what_one_process_does(world: Path, tmp_path: Path) -> None:
    here, apart = (new_run(world, tmp_path / name, *PRIVATE) for name in ("here", "apart"))
    expected = execute(here)
    (apart / "secret.key").write_bytes((here / "secret.key").read_bytes())
    link = Direct({client: make_owner(world, client, tmp_path / "homes" / client).answer for client in SIZES})
    summary = run_apart(apart, link)
    assert summary["adapter_sha256"] == expected["adapter_sha256"]
    assert summary["privacy"] == expected["privacy"]
    secret = (here / "secret.key").read_bytes()
    assert all(secret.hex() not in str(parcel.fields) and secret not in parcel.blob for _, parcel in link.sent)


def test_under_secure_aggregation_noise_is_added_to_the_sum(world: Path, tmp_path: Path) -> None:
    """Without noise it is the sum of clipped updates to the fixed-point step; with noise a round repeats to the bit."""
    all_of_them = (*PRIVATE, "scheduling.selection={kind: poisson, fraction: 1.0}")
    secure = "secure_aggregation={min_clients: 2}"
    silent = (*all_of_them, "privacy.noise_multiplier=0", "rounds=1")  # later rounds train apart
    plain, summed = (tmp_path / "plain", tmp_path / "summed")
    execute(new_run(world, plain, *silent))
    execute(new_run(world, summed, *silent, secure))
    adapters = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (plain, summed)]
    for name, value in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], value, atol=1e-6, rtol=0)
    one, again = (new_run(world, tmp_path / name, *all_of_them, secure) for name in ("one", "again"))
    expected = execute(one)
    (again / "secret.key").write_bytes((one / "secret.key").read_bytes())
    assert execute(again)["adapter_sha256"] == expected["adapter_sha256"]
    assert [event["privacy"]["epsilon"] for event in events(one)] == [
        Budget(1.0, 1.0, 1e-3).epsilon(rounds) for rounds in (1, 2, 3)
    ]
