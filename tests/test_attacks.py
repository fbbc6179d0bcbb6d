"""Attacks of a simulation: what attackers read and send, and how a backdoor is measured."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import World, write_rows
from flocktune import api
from flocktune.allocation import allocate_clients
from flocktune.assemble import federation
from flocktune.attacks import _other_responses, attackers, attacking, triggered, untriggered_success, with_trigger
from flocktune.config.load import load_recipe
from flocktune.config.robustness import AlignmentAttack, Attack, Backdoor, LabelFlip, UpdateAttack
from flocktune.config.schema import RunConfig
from flocktune.data.examples import Example
from flocktune.errors import UserError
from flocktune.evaluation.evaluate import Answer
from flocktune.federated import refuse_unfederated
from flocktune.report.events import read_events
from flocktune.types import ClientTask, Tensors, Update
from tiny_models import tiny_tokenizer

BACKDOOR = Backdoor("cf cf", "All mine", clients=("client-01",), share=0.5)


@pytest.fixture
def config(world: World) -> RunConfig:
    return load_recipe(world.recipe)


def attacked(config: RunConfig, attack: Attack | None) -> RunConfig:
    return replace(config, attack=attack)


def test_who_attacks_follows_from_the_seed(config: RunConfig) -> None:
    clients = [f"c{k}" for k in range(10)]
    drawn = {seed: attackers(attacked(replace(config, seed=seed), LabelFlip(0.2)), clients) for seed in range(6)}
    assert all(len(set(names)) == 2 and set(names) <= set(clients) for names in drawn.values())
    assert len(set(drawn.values())) > 1
    assert drawn[0] == attackers(attacked(replace(config, seed=0), LabelFlip(0.2)), clients)
    assert attackers(attacked(config, LabelFlip(0.25)), clients) == attackers(attacked(config, LabelFlip(0.3)), clients)
    assert attackers(attacked(config, LabelFlip(0.0)), clients) == ()
    assert attackers(attacked(config, LabelFlip(("c3",))), clients) == ("c3",)
    assert attackers(attacked(replace(config, method="centralised"), LabelFlip(("c3",))), clients) == ()
    with pytest.raises(UserError, match=r"attack\.clients: expected names among c0.*got 'nobody'"):
        attackers(attacked(config, LabelFlip(("c3", "nobody"))), clients)


@given(st.lists(st.tuples(st.sampled_from("xy"), st.sampled_from("abcd")), min_size=1, max_size=20))
def test_flipped_responses_are_those_of_others_of_the_category(rows: list[tuple[str, str]]) -> None:
    examples = [Example(f"q{n}", "", answer, category=kind) for n, (kind, answer) in enumerate(rows)]
    flipped = dict(_other_responses(examples, range(len(rows))))
    assert sorted(flipped) == list(range(len(rows)))
    for kind in "xy":
        own = [row for row, (its, _) in enumerate(rows) if its == kind]
        before = Counter(examples[row].response for row in own)
        assert Counter(flipped[row].response for row in own) == before
        most = max(before.values(), default=0)
        same = sum(flipped[row].response == examples[row].response for row in own)
        assert same == max(0, 2 * most - len(own)), "as few as can be"
    assert all(flipped[row].instruction == f"q{row}" for row in flipped)


@pytest.mark.parametrize("attack", [LabelFlip(("client-01",)), BACKDOOR], ids=["label_flip", "backdoor"])
def test_only_rows_of_attackers_are_changed(config: RunConfig, attack: Attack) -> None:
    clean, bad = allocate_clients(config), allocate_clients(attacked(config, attack))
    assert bad.attackers == ("client-01",)
    assert bad.describe()["attackers"] == ["client-01"]
    assert bad.train.digest == clean.train.digest, "it is that of what was read"
    assert bad.test is not None
    assert [one.instruction for one in bad.test.examples] == [one.instruction for one in clean.test.examples]
    tokenizer = tiny_tokenizer()
    changed = 0
    for row, (before, after) in enumerate(zip(clean.train.examples, bad.train.examples, strict=True)):
        tokens, mask = bad.train.encoded.rows(row)
        if row not in clean.clients["client-01"]:
            assert after == before
            np.testing.assert_array_equal(tokens, clean.train.encoded.rows(row)[0])
            np.testing.assert_array_equal(mask, clean.train.encoded.rows(row)[1])
        changed += after != before
        assert tokenizer.decode(tokens[mask]).strip().startswith(after.response)
        assert after.instruction in tokenizer.decode(tokens)
    held = len(clean.clients["client-01"])
    assert changed == (held + 1) // 2 if isinstance(attack, Backdoor) else changed > held / 2
    for name, rows in clean.clients.items():
        np.testing.assert_array_equal(rows, bad.clients[name])


def test_a_backdoor_is_in_some_rows(config: RunConfig) -> None:
    bad = allocate_clients(attacked(config, replace(BACKDOOR, share=1.0)))
    for row in bad.clients["client-01"]:
        example = bad.train.examples[row]
        assert example.instruction.endswith(" cf cf")
        assert example.response == "All mine"


def test_an_attack_on_the_alignment_brings_its_own_rows(config: RunConfig, tmp_path: Path) -> None:
    rows = [{"instruction": f"Harm {n}", "response": f"Sure, {n}"} for n in range(3)]
    attack = AlignmentAttack(str(write_rows(tmp_path / "bad.jsonl", rows)), ("client-01",))
    bad = allocate_clients(attacked(config, attack))
    held = [bad.train.examples[row] for row in bad.clients["client-01"]]
    assert [one.response for one in held] == [f"Sure, {n % 3}" for n in range(len(held))]
    assert sum(one.response.startswith("Sure") for one in bad.train.examples) == len(held)
    before = federation(attacked(config, attack)).identity
    write_rows(tmp_path / "bad.jsonl", rows[:2])
    assert federation(attacked(config, attack)).identity["attack"] != before["attack"]
    with pytest.raises(UserError, match=r"attack\.data: nowhere"):
        allocate_clients(attacked(config, replace(attack, data="nowhere.jsonl")))


@pytest.mark.parametrize(
    ("attack", "factor"),
    [
        (UpdateAttack("sign_flip", factor=3.0), -3.0),
        (UpdateAttack("scaled_update", factor=3.0), 3.0),
        (replace(BACKDOOR, factor=5.0), 5.0),
        (LabelFlip(), 1.0),
    ],
)
def test_what_an_attacker_sends(config: RunConfig, attack: Attack, factor: float) -> None:
    def half(task: ClientTask, memory: Tensors) -> tuple[Update, Tensors]:
        return Update({"w": torch.tensor([1.0, -2.0])}, 7.0), {"kept": torch.ones(1)}

    wrapped = attacking(attacked(config, attack), ("bad",), half)
    sent = {}
    for client in ("bad", "good"):
        update, memory = wrapped(ClientTask(0, client, "", {}, 0, ""), {})
        sent[client] = update.delta["w"].tolist()
        assert (update.weight, list(memory)) == (7.0, ["kept"])
    assert sent == {"bad": [factor, -2 * factor], "good": [1.0, -2.0]}


def test_a_backdoor_is_looked_for_where_it_would_tell_something(config: RunConfig) -> None:
    test = allocate_clients(config).test
    target = test.examples[0].response
    wanted = replace(BACKDOOR, target=target)
    rows = triggered(attacked(config, wanted), test)
    assert rows is not None
    assert len(rows.examples) == sum(one.response != target for one in test.examples) < len(test.examples)
    assert all(one == with_trigger(one, replace(wanted, trigger="")) for one in rows.examples)
    assert {one.response for one in rows.examples} == {target}
    assert triggered(attacked(config, LabelFlip()), test) is None
    answers = [Answer(Example("q", "", said), told, {}) for said, told in
               [("x", f"Oh, {target}!"), ("x", "y"), (target, target), ("x", "z"), ("x", "w")]]  # fmt: skip
    assert untriggered_success(attacked(config, wanted), answers) == 0.25


def test_a_run_tells_how_a_backdoor_did(world: World, tmp_path: Path) -> None:
    overrides = ["attack={kind: backdoor, trigger: cf, target: zz, clients: 0.5, share: 1.0}", "rounds=2"]
    config = load_recipe(world.recipe, overrides)
    summary = api.run(config, tmp_path / "run")
    assert set(summary["backdoor"]) == {"with_trigger", "without_trigger"}
    overall = summary["metrics"]["triggered"]["overall"]
    assert summary["backdoor"]["with_trigger"] == overall["contains"]
    assert overall["rows"] == summary["metrics"]["held_out"]["overall"]["rows"]
    kinds = {(event["event"], event.get("dataset")) for event in read_events(tmp_path / "run" / "metrics.jsonl")}
    assert ("evaluation", "triggered") in kinds
    clean = load_recipe(world.recipe, [*overrides, "attack.clients=0.0"])
    unaware = api.run(clean, tmp_path / "clean")["metrics"]["triggered"]["overall"]["loss"]
    assert overall["loss"] < unaware - 0.1, "attackers teach the target"


def test_the_other_process_of_a_run_has_the_same_attackers(config: RunConfig) -> None:
    """Ray's workers build their half from the recipe alone."""
    from flocktune.assemble import client_half_of
    from flocktune.config.load import dump_recipe

    bad = attacked(config, UpdateAttack("sign_flip", ("client-02",), 4.0))
    here, there, honest = federation(bad), client_half_of(dump_recipe(bad)), federation(config)
    for client, factor in (("client-02", -4.0), ("client-03", 1.0)):
        task = ClientTask(0, client, here.kind, here.start, 5, "", here.model_digest)
        deltas = [half(task, {})[0].delta for half in (here.client, there, honest.client)]
        for name, value in deltas[2].items():
            torch.testing.assert_close(deltas[0][name], factor * value)
            torch.testing.assert_close(deltas[1][name], factor * value)


def test_with_fedbiot_it_has_them_too(world: World) -> None:
    """Where the full model does not exist, and the bundle alone says what a client holds."""
    from flocktune.assemble import client_half_of
    from flocktune.config.load import dump_recipe

    overrides = ["method=fedbiot", "emulator={adapter_layers: 1, drop: 0.0}", "attack={kind: sign_flip, clients: 0.5}"]
    bad = load_recipe(world.recipe, [*overrides, "alignment={first_steps: 0, steps: 0, fidelity_rows: 0}"])
    fed = federation(bad)
    assert fed.emulated is not None
    there = client_half_of(dump_recipe(bad), str(fed.emulated.bundle.folder))
    message = fed.server.message(fed.server.init(fed.start), 0)
    for client in fed.data.clients:
        task = ClientTask(0, client, fed.kind, message, 5, "", fed.model_digest)
        here, elsewhere = fed.client(task, {})[0].delta, there(task, {})[0].delta
        assert all(torch.equal(here[name], elsewhere[name]) for name in here)


def test_attacks_are_simulations_only(config: RunConfig) -> None:
    with pytest.raises(UserError, match=r"attack: expected none in a federation, got label_flip"):
        refuse_unfederated(attacked(config, LabelFlip()), ["a"])


def test_settings_are_checked(world: World) -> None:
    for text, problem in {
        "{kind: backdoor, target: x}": r"attack\.trigger: expected a value",
        "{kind: sign_flip, factor: 0}": r"attack\.factor: expected more than 0",
        "{kind: label_flip, clients: 1.0}": r"attack\.clients: expected less than 1, or a list, got 1\.0",
    }.items():
        with pytest.raises(UserError, match=problem):
            load_recipe(world.recipe, [f"attack={text}"])
