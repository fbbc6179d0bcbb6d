"""Client scheduling: sizes, fairness, and the same choice after a resume."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flocktune.config.schema import Availability, BySize, Named, RoundRobin, SchedulingConfig, Uniform
from flocktune.errors import UserError
from flocktune.scheduling import cohort_size, read_trace, select

SIZES = {f"client-{number:02d}": number for number in range(1, 11)}


@pytest.mark.parametrize(
    ("fraction", "clients", "expected"),
    [(0.29, 100, 29), (0.1, 10, 1), (0.05, 10, 1), (0.25, 10, 3), (0.01, 5, 1), (1.0, 7, 7)],
)
def test_the_cohort_is_rounded_half_up_and_never_empty(fraction: float, clients: int, expected: int) -> None:
    assert cohort_size(fraction, clients) == expected


@given(
    st.sampled_from([Uniform(0.3), BySize(0.3), RoundRobin(0.3)]),
    st.integers(0, 50),
    st.integers(0, 2**40),
    st.floats(0, 2),
)
def test_choices_are_distinct_known_and_repeatable(selection, round: int, seed: int, more: float) -> None:
    scheduling = SchedulingConfig(selection, over_select=more)
    cohort = select(scheduling, SIZES, round=round, seed=seed)
    assert len(set(cohort.asked)) == len(cohort.asked) >= cohort.wanted == 3
    assert set(cohort.asked) <= set(SIZES)
    assert cohort == select(scheduling, SIZES, round=round, seed=seed)


def test_rounds_and_seeds_choose_differently() -> None:
    chosen = {
        select(SchedulingConfig(Uniform(0.3)), SIZES, round=r, seed=s).asked for r in range(10) for s in range(10)
    }
    assert len(chosen) > 50


def test_over_selection_asks_more_but_wants_no_more() -> None:
    cohort = select(SchedulingConfig(Uniform(0.4), over_select=0.5, quorum=0.75), SIZES, round=0, seed=0)
    assert (len(cohort.asked), cohort.wanted, cohort.quorum) == (6, 4, 3)


def test_uniform_takes_everyone_equally_often() -> None:
    counts = Counter(
        c for r in range(2000) for c in select(SchedulingConfig(Uniform(0.3)), SIZES, round=r, seed=1).asked
    )
    assert all(abs(counts[name] / 2000 - 0.3) < 0.05 for name in SIZES)


def test_by_size_prefers_large_clients_and_skips_empty_ones() -> None:
    sizes = {"none": 0, "small": 10, "large": 90}
    counts = Counter(
        c for r in range(2000) for c in select(SchedulingConfig(BySize(0.34)), sizes, round=r, seed=1).asked
    )
    assert counts["none"] == 0
    assert abs(counts["large"] / 2000 - 0.9) < 0.03


def test_round_robin_reaches_everyone_before_anyone_again() -> None:
    seen = [c for r in range(5) for c in select(SchedulingConfig(RoundRobin(0.2)), SIZES, round=r, seed=3).asked]
    assert sorted(seen) == sorted(SIZES)


def test_availability_follows_the_trace(tmp_path) -> None:
    trace = {name: [1, 0] if number % 2 else [0, 1] for number, name in enumerate(SIZES)}
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(trace))
    scheduling = SchedulingConfig(Availability(str(path), fraction=1.0))
    read = read_trace(path, list(SIZES))
    for round in range(4):
        asked = select(scheduling, SIZES, round=round, seed=0, trace=read).asked
        assert set(asked) == {name for name in SIZES if trace[name][round % 2]}
    nobody = {name: [0] for name in SIZES}
    assert select(scheduling, SIZES, round=0, seed=0, trace=nobody).asked == ()


@pytest.mark.parametrize("text", ["{", "[]", '{"client-01": [2]}', '{"client-01": []}', '{"client-01": "1"}', "{}"])
def test_bad_traces_are_refused(tmp_path, text: str) -> None:
    path = tmp_path / "trace.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"trace\.json"):
        read_trace(path, ["client-01"])


def test_named_clients_must_exist() -> None:
    assert select(SchedulingConfig(Named(("client-03",))), SIZES, round=0, seed=0).asked == ("client-03",)
    with pytest.raises(UserError, match="'nobody'"):
        select(SchedulingConfig(Named(("nobody", "client-01"))), SIZES, round=0, seed=0)
