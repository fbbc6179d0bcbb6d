"""Allocation of rows to clients: properties of every kind, and the numbers that describe it."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flocktune.config.schema import (
    Allocation,
    ByCategory,
    ClusterDirichlet,
    Dirichlet,
    Iid,
    Natural,
    QuantitySkew,
)
from flocktune.data.heterogeneity import category_counts, heterogeneity
from flocktune.data.partition import Partition, allocate, help_short, hold_out, text_clusters
from flocktune.errors import UserError

EIGHT = [f"c{row % 8}" for row in range(800)]


def deal(allocation: Allocation, categories=EIGHT, seed: int = 0, clients=None, texts=None) -> Partition:
    return allocate(
        allocation,
        categories=categories,
        clients=clients or [None] * len(categories),
        texts=lambda: texts or pytest.fail("texts are for clustering only"),
        seed=seed,
    )


CATEGORIES = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=120)
COUNTS = st.integers(1, 12)
KINDS = st.one_of(
    st.builds(Iid, clients=COUNTS, min_rows=st.integers(0, 6)),
    st.builds(ByCategory, clients=COUNTS, categories_per_client=st.integers(1, 4), min_rows=st.integers(0, 6)),
    st.builds(Dirichlet, clients=COUNTS, alpha=st.sampled_from([1e-6, 0.1, 1.0, 1e6]), min_rows=st.integers(0, 6)),
    st.builds(QuantitySkew, clients=COUNTS, alpha=st.sampled_from([1e-6, 0.1, 10.0]), min_rows=st.integers(0, 6)),
)


@settings(max_examples=200, deadline=None)
@given(CATEGORIES, KINDS, st.integers(0, 2**40))
def test_every_row_is_dealt_once_and_every_client_has_its_least(categories, allocation, seed) -> None:
    if len(categories) < allocation.clients * allocation.min_rows:
        with pytest.raises(UserError, match=f"{allocation.clients} clients x {allocation.min_rows} rows"):
            deal(allocation, categories, seed)
        return
    partition = deal(allocation, categories, seed)
    assert sorted(row for rows in partition.clients.values() for row in rows) == list(range(len(categories)))
    assert partition.unassigned == []
    assert len(partition.clients) == allocation.clients
    assert all(len(rows) >= allocation.min_rows and rows == sorted(rows) for rows in partition.clients.values())
    assert deal(allocation, categories, seed) == partition


@pytest.mark.parametrize("kind", [Dirichlet, QuantitySkew])
def test_the_most_uneven_draw_still_gives_everyone_the_least(kind: type[Dirichlet] | type[QuantitySkew]) -> None:
    """At this alpha one client draws nearly all; it still has what the others do not need."""
    sizes = [len(rows) for rows in deal(kind(alpha=1e-6, min_rows=30), ["x"] * 800).clients.values()]
    assert sorted(sizes) == [30] * 9 + [530]


@pytest.mark.parametrize("allocation", [Iid(), ByCategory(), Dirichlet(), QuantitySkew()])
def test_the_seed_decides(allocation: Allocation) -> None:
    assert deal(allocation, seed=1) != deal(allocation, seed=2)


def test_client_names_sort_by_number() -> None:
    assert list(deal(Iid(clients=3)).clients) == ["client-01", "client-02", "client-03"]
    names = list(deal(Iid(clients=100)).clients)
    assert names == sorted(names)
    assert names[-1] == "client-100"


def test_iid_is_even_in_size_and_mix() -> None:
    partition = deal(Iid(clients=7))
    sizes = [len(rows) for rows in partition.clients.values()]
    assert max(sizes) - min(sizes) <= 1
    assert heterogeneity(partition.clients, EIGHT).distance < 0.15


def test_by_category_gives_few_categories_and_equal_sizes() -> None:
    partition = deal(ByCategory(clients=8, categories_per_client=2))
    assert {len(rows) for rows in partition.clients.values()} == {100}
    held = [len({EIGHT[row] for row in rows}) for rows in partition.clients.values()]
    assert max(held) == 2
    one_each = deal(ByCategory(clients=8, categories_per_client=1))
    assert {len({EIGHT[row] for row in rows}) for rows in one_each.clients.values()} == {1}
    halves = deal(ByCategory(clients=16, categories_per_client=1)).clients.values()
    assert all(rows[-1] - rows[0] > 50 * 8 for rows in halves), "a category's rows are mixed before it is cut"


def test_dirichlet_alpha_sets_how_different_clients_are() -> None:
    distances = [heterogeneity(deal(Dirichlet(alpha=alpha)).clients, EIGHT).distance for alpha in (0.05, 1.0, 1e5)]
    assert distances[0] > 0.6 > distances[1] > 0.1 > distances[2]


def test_quantity_skew_changes_sizes_and_not_the_mix() -> None:
    rows = [f"c{row % 4}" for row in range(8000)]
    numbers = heterogeneity(deal(QuantitySkew(alpha=0.5, min_rows=200), rows).clients, rows)
    assert numbers.size_gini > 0.2
    assert numbers.distance < 0.1


def test_clusters_follow_the_texts() -> None:
    words = {"sea": "ship wave harbour sailor", "kitchen": "oven bread butter flour", "law": "judge court trial jury"}
    texts = [f"{about} {words[about].split()[row % 4]} {words[about].split()[row // 4 % 4]}"
             for row in range(60) for about in words]  # fmt: skip
    labels = text_clusters(texts, 3, seed=0)
    pairs = set(zip(labels, [text.split()[0] for text in texts], strict=True))
    assert len(pairs) == 3
    assert text_clusters(texts, 3, seed=0) == labels
    partition = deal(ClusterDirichlet(clients=4, alpha=0.01, clusters=3), ["all"] * len(texts), texts=texts)
    assert heterogeneity(partition.clients, [text.split()[0] for text in texts]).distance > 0.5
    assert sorted(row for rows in partition.clients.values() for row in rows) == list(range(len(texts)))


def test_clusters_of_odd_texts() -> None:
    assert len(set(text_clusters(["same text"] * 5, 3, seed=0))) == 1
    assert len(set(text_clusters(["one text", "other words"], 3, seed=0))) == 2
    with pytest.raises(UserError, match="words"):
        text_clusters(["", "?"], 2, seed=0)


def test_natural_keeps_owners_and_never_moves_rows() -> None:
    owners = ["b", "a", None, "b", "tiny", "a"]
    assert deal(Natural(), ["x"] * 6, clients=owners) == Partition({"a": [1, 5], "b": [0, 3], "tiny": [4]}, [2])
    assert deal(Natural(min_rows=2), ["x"] * 6, clients=owners) == Partition({"a": [1, 5], "b": [0, 3]}, [2, 4])
    with pytest.raises(UserError, match=r"data\.columns\.client"):
        deal(Natural(), ["x"] * 2)
    with pytest.raises(UserError, match="at most 2 rows each"):
        deal(Natural(min_rows=3), ["x"] * 6, clients=owners)


def test_help_comes_in_categories_that_are_already_held() -> None:
    categories = list("aaaaaabbbbb")
    parts = [list(range(10)), [10]]
    help_short(parts, categories, 3)
    assert Counter(categories[row] for row in parts[1]) == {"b": 3}
    strangers = [list(range(10)), []]
    help_short(strangers, categories, 3)
    assert Counter(categories[row] for row in strangers[1]) == {"a": 3}


def test_help_never_makes_the_donor_short() -> None:
    parts = [[0, 1, 2, 3], [4, 5], []]
    help_short(parts, ["x"] * 6, 2)
    assert [len(part) for part in parts] == [2, 2, 2]
    parts = [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    help_short(parts, ["x"] * 9, 3)
    assert [len(part) for part in parts] == [3, 3, 3]
    assert set(parts[0]) < {0, 1, 2, 3}, "whoever gives is not given to"


@settings(deadline=None)
@given(CATEGORIES, st.integers(0, 20), st.integers(0, 9))
def test_hold_out_takes_at_most_half_of_each_category(categories, per_category, seed) -> None:
    train, test = hold_out(categories, per_category, seed)
    assert sorted(train + test) == list(range(len(categories)))
    assert train == sorted(train)
    assert test == sorted(test)
    for category, number in Counter(categories).items():
        assert sum(categories[row] == category for row in test) == min(per_category, number // 2)


def test_hold_out_of_one_category_does_not_depend_on_the_others() -> None:
    _, few = hold_out(["a"] * 50, 5, seed=3)
    _, more = hold_out(["a"] * 50 + ["b"] * 50, 5, seed=3)
    assert few == [row for row in more if row < 50]
    assert hold_out(["a"] * 50, 5, seed=4)[1] != few


def test_category_counts_is_a_full_table() -> None:
    table = category_counts({"one": [0, 1], "two": [2], "none": []}, ["b", "b", "a"])
    assert table == {"one": {"a": 0, "b": 2}, "two": {"a": 1, "b": 0}, "none": {"a": 0, "b": 0}}
    assert list(table["one"]) == ["a", "b"]


def test_heterogeneity_by_hand() -> None:
    """Two clients, one category each: entropy 0, and each is JS(1-0, 1/2-1/2) = H(3/4) - H(1/2)/2 from the mean."""
    numbers = heterogeneity({"one": [0, 1], "two": [2, 3]}, ["a", "a", "b", "b"])
    divergence = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)) - 0.5
    assert numbers.distance == pytest.approx(math.sqrt(divergence))
    assert (numbers.label_entropy, numbers.size_gini) == (0, 0)
    mixed = heterogeneity({"one": [0, 2, 4], "two": [1]}, ["a", "a", "b", "b", "b"])
    assert mixed.label_entropy == pytest.approx((math.log(3) - 2 / 3 * math.log(2)) / 2)
    assert mixed.label_entropy_share == pytest.approx(mixed.label_entropy / math.log(2))
    assert mixed.size_gini == pytest.approx(0.25)
    assert (mixed.rows_min, mixed.rows_median, mixed.rows_max, mixed.clients, mixed.categories) == (1, 2, 3, 2, 2)


def test_heterogeneity_at_its_ends() -> None:
    same = heterogeneity({"one": [0], "two": [1], "none": []}, ["a", "a"])
    assert (same.distance, same.label_entropy_share, same.rows_min) == (0, 0, 0)
    apart = heterogeneity({str(row): [row] for row in range(64)}, [str(row) for row in range(64)])
    assert 0.9 < apart.distance < 1
    assert np.isfinite(apart.label_entropy)
    with pytest.raises(ValueError, match="no client"):
        heterogeneity({"one": []}, ["a"])
