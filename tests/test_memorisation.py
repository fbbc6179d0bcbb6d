"""The audit: its numbers by their definitions, and what it finds in a run that remembers and in one with noise."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch.nn.functional as F
from scipy import stats

from conftest import Said
from flocktune.allocation import allocate_clients
from flocktune.config.load import load_recipe, parse_recipe
from flocktune.config.privacy import Canaries
from flocktune.data.batching import collate
from flocktune.data.canaries import CATEGORY, canaries, others
from flocktune.errors import UserError
from flocktune.evaluation.memorisation import exposure, membership, row_losses
from flocktune.federated import refuse_unfederated
from flocktune.leakage import matched, memorisation
from flocktune.run_folder import create_run
from flocktune.runs import execute
from test_fedavg import encoded_rows
from tiny_federation import make_federated_world
from tiny_models import tiny_model

SETTINGS = Canaries(count=4, digits=5)


def test_the_auc_is_the_share_of_pairs_in_order() -> None:
    draw = np.random.default_rng(0)
    members, outsiders = draw.integers(0, 6, 30) / 1.0, draw.integers(0, 5, 40) / 1.0
    pairs = [1.0 if m > o else 0.5 if m == o else 0.0 for m, o in product(members, outsiders)]
    found = membership(members, outsiders)
    assert found.value == pytest.approx(np.mean(pairs))
    assert found.value == pytest.approx(stats.mannwhitneyu(members, outsiders).statistic / 1200)
    assert membership(outsiders, members).value == pytest.approx(1 - found.value)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Normals one deviation apart: the AUC is Phi(1 / sqrt 2)."""
    draw, truth = np.random.default_rng(1), stats.norm.cdf(1 / math.sqrt(2))
    found = [membership(draw.normal(1, 1, 60), draw.normal(0, 1, 80)) for _ in range(500)]
    held = np.mean([each.low <= truth <= each.high for each in found])
    assert 0.91 < held < 0.98
    assert np.mean([each.value for each in found]) == pytest.approx(truth, abs=0.01)


def test_exposure_is_bits_of_rank() -> None:
    losses = np.arange(1.0, 8.0)
    assert exposure(0.0, losses) == 3.0
    assert exposure(9.0, losses) == 0.0
    assert exposure(3.5, losses) == 1.0
    assert exposure(1.0, np.ones(7)) == pytest.approx(math.log2(8 / 4.5))
    draw = np.random.default_rng(2).random((2000, 64))
    assert np.mean([exposure(row[0], row[1:]) for row in draw]) == pytest.approx(1.44, abs=0.12)


def test_row_losses_are_those_of_each_row_alone() -> None:
    model, rows = tiny_model("llama"), encoded_rows()
    chosen = [7, 0, 3, 9, 1]
    found = row_losses(model, rows, chosen, batch_size=2, pad_id=2)
    for place, index in enumerate(chosen):
        one = collate(rows, [index], batching="padded", pad_id=2)
        logits = model(input_ids=one.input_ids).logits[0, one.label_index]
        assert found[place] == pytest.approx(F.cross_entropy(logits, one.targets).item(), rel=1e-5)


def test_canaries_are_drawn_by_the_seed_and_their_others_as_they_are() -> None:
    secrets = canaries(SETTINGS, 0)
    assert len({secret.instruction for secret in secrets}) == len({secret.response for secret in secrets}) == 4
    assert secrets == canaries(SETTINGS, 0)
    assert secrets != canaries(SETTINGS, 1)
    drawn = others(SETTINGS, 0, 2, 200)
    assert {other.instruction for other in drawn} == {secrets[2].instruction}
    assert all(len(other.response) == 5 and other.response.isdigit() for other in [*drawn, *secrets])
    assert len({other.response for other in drawn}) > 190


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_federated_world(tmp_path_factory.mktemp("leaks"))


CANARIES = "canaries={client: bob, count: 4, repeats: 2, digits: 3}"


def test_canaries_lie_with_one_client_alone(world: Path) -> None:
    plain = allocate_clients(load_recipe(world / "recipe.yaml"))
    found = allocate_clients(load_recipe(world / "recipe.yaml", [CANARIES]))
    categories = found.train.categories
    assert {name: len(rows) - len(plain.clients[name]) for name, rows in found.clients.items()} == {
        "alice": 0,
        "bob": 8,
        "carol": 0,
    }
    own = [int(row) for row in found.clients["bob"] if categories[row] == CATEGORY]
    assert [found.train.examples[row] for row in own] == canaries(Canaries("bob", 4, 2, 3), 0) * 2
    assert (found.train.encoded.targets[own] > 0).all()
    assert (
        found.train.encoded.take(range(len(plain.train.encoded))).tokens.tolist() == plain.train.encoded.tokens.tolist()
    )
    assert found.test.examples == plain.test.examples
    with pytest.raises(UserError, match=r"canaries.client: expected one of alice, bob, carol, got 'dora'"):
        allocate_clients(load_recipe(world / "recipe.yaml", ["canaries={client: dora}"]))
    with pytest.raises(UserError, match="canaries: expected none in a federation"):
        refuse_unfederated(load_recipe(world / "recipe.yaml", [CANARIES]), ["bob"])


def test_members_and_outsiders_are_of_the_same_categories() -> None:
    """Else rows of a harder category among one of them would look like memory."""
    mine, theirs = ["a", "b", "a", "a", "c", "b"], ["b", "a", "a", "d"]
    members, outsiders = matched([5, 4, 3, 2, 1, 0], [3, 2, 1, 0], mine, theirs)
    assert members.tolist() == [5, 3, 2]
    assert outsiders.tolist() == [2, 1, 0]


REMEMBERS = """
name: leaks
rounds: 1
data: {train: embedded, template: short, max_tokens: 96, max_rows: 64, test_rows_per_category: 4}
allocation: {kind: iid, clients: 1}
scheduling: {selection: {kind: poisson, fraction: 1.0}}
local: {steps: 60, batch_size: 8, lr: 5.0e-3}
aggregation: {weights: equal}
canaries: {count: 2, repeats: 10, digits: 3}
evaluation: {generate: false}
runtime: {device: cpu, threads: 1}
"""


def test_the_attack_finds_what_a_run_remembers_and_noise_hides_it(tmp_path: Path, cli: Callable[..., Said]) -> None:
    """One client, trained for long on 41 rows; with noise for epsilon 8, of one client, nothing else is left."""
    found = {}
    noise = ["privacy={kind: user, clip_norm: 0.5, delta: 1.0e-3, epsilon: 8}", "local.steps=4"]
    for name, settings in {"plain": [], "private": noise}.items():
        folder = tmp_path / name
        create_run(parse_recipe(REMEMBERS, settings), folder)
        execute(folder)
        found[name] = json.loads(memorisation(folder, candidates=31).read_text())
    plain, private = found["plain"], found["private"]
    assert plain["membership"]["loss"]["interval"][0] > 0.7
    assert plain["membership"]["loss"]["members"] == plain["membership"]["loss"]["outsiders"] > 10
    assert private["membership"]["loss"]["interval"][0] < 0.5
    assert plain["canaries"]["mean_tuned"] > plain["canaries"]["mean_base"] + 1.5
    assert plain["canaries"]["base"] == private["canaries"]["base"]
    assert plain["canaries"]["most_bits"] == 5
    told = cli("memorisation", tmp_path / "private", "--max-rows", 10, "--candidates", 7)
    assert told.code == 0
    assert re.search(r"AUC 0\.\d+, 95 % interval .* \d+ rows trained on, \d+ held out", " ".join(told.out.split()))
    assert "2 canaries, exposure" in told.out
