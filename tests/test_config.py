"""Recipes: read, checked, written back; all problems at once."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flocktune.config.load import (
    build_config,
    config_digest,
    differences,
    dump_recipe,
    load_recipe,
    parse_recipe,
    to_tree,
)
from flocktune.config.schema import Dirichlet, RoundRobin, RunConfig, ServerAdaptive
from flocktune.errors import UserError


def problems_of(text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_recipe(text, overrides)
    return str(caught.value)


def test_an_empty_recipe_is_all_defaults() -> None:
    assert parse_recipe("") == RunConfig()


def test_kinds_choose_their_settings() -> None:
    config = parse_recipe(
        "allocation: {kind: dirichlet, alpha: 0.3}\n"
        "aggregation: {server_optimizer: {kind: yogi, lr: 0.1}}\n"
        "scheduling: {selection: {kind: round_robin, fraction: 0.2}}\n"
    )
    assert config.allocation == Dirichlet(alpha=0.3)
    assert config.aggregation.server_optimizer == ServerAdaptive("yogi", lr=0.1)
    assert config.scheduling.selection == RoundRobin(fraction=0.2)


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", "1E-3"])
def test_scientific_notation_is_a_number(text: str) -> None:
    assert parse_recipe(f"local: {{steps: 1, lr: {text}}}").local.lr == 0.001
    assert parse_recipe("local: {steps: 1}", [f"local.lr={text}"]).local.lr == 0.001


def test_overrides_reach_every_depth_and_change_kinds() -> None:
    text = "allocation: {kind: dirichlet, alpha: 0.3, clients: 4}\nlocal: {steps: 3}\n"
    config = parse_recipe(
        text, ["rounds=7", "lora.targets=[q_proj, v_proj]", "allocation.kind=iid", "allocation.clients=3"]
    )
    assert (config.rounds, config.lora.targets) == (7, ("q_proj", "v_proj"))
    assert (config.allocation.kind, config.allocation.clients) == ("iid", 3)


def test_every_problem_is_in_one_message() -> None:
    message = problems_of(
        "locl: 3\n"
        "local: {steps: '5', lr: -1, foo: 1}\n"
        "allocation: {kind: nope}\n"
        "lora: {targets: 3, rank: 0}\n"
        "data: {template: latin}\n"
        "scheduling: {selection: {kind: named}}\n",
        "rounds",
        "a.b=[",
    )
    for words in (
        "locl: expected a known setting, got an unknown one. Did you mean local?",
        'local.steps: expected a whole number, got "5"',
        "local.lr: expected more than 0, got -1",
        "local.foo: expected a known setting",
        "allocation.kind: expected one of 'iid', 'by_category', 'dirichlet'",
        "lora.targets: expected 'attention' or 'all-linear'",
        "lora.rank: expected at least 1, got 0",
        "data.template: expected 'alpaca', 'short' or 'chat'",
        "scheduling.selection.clients: expected a value, got nothing",
        "rounds: expected an override key=value",
        "a.b=[: expected a value in YAML",
    ):
        assert words in message, f"{words!r} not in\n{message}"
    assert message.count("lora.targets") == 1, "what two members of a union say is one problem"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "expected YAML"),
        ("- 1", "a mapping of settings, got a list"),
        ("allocation: {alpha: 1}", "allocation.kind: expected a value, got nothing"),
        ("local: {steps: 1, epochs: 1}", "local: expected exactly one of steps and epochs, got steps 1 and epochs 1"),
        ("local: {lr: 0.1}", "local: expected exactly one of steps and epochs, got neither"),
        ("local: {steps: 1, momentum: 0.9}", "local.momentum: expected 0 with optimizer adamw"),
        ("data: {test_rows_per_category: 0}\nevaluation: {every: 1}", "evaluation.every"),
        ("rounds: true", "rounds: expected a whole number, got true"),
        ("lora: {alpha: .inf}", "lora.alpha"),
        ("local: {steps: 1, lr: .nan}", "local.lr"),
        ("allocation: {kind: iid, clients: 0}", "allocation.clients: expected at least 1, got 0"),
        ("seed: -1", "seed: expected at least 0"),
        ("name: ../up", "name: expected"),
        ("method: local", "scheduling.selection: expected one named client with method local, got uniform"),
        ("1: 2", "1: expected a known setting"),
        (
            "engine: {kind: ray, wrokers: 2}",
            "engine.wrokers: expected a known setting, got an unknown one. Did you mean",
        ),
        ("engine: {kind: flower, deadlines: 2}", "Did you mean engine.deadline_s?"),
        ("engine: {stack: 0}", "engine.stack: expected"),
        ("engine: {stack: many}", "engine.stack: expected"),
        ("engine: {stack_md: 100}", "Did you mean engine.stack_mb?"),
        ("local: {steps: 1, correction: {kind: feddyn, alhpa: 1}}", "Did you mean local.correction.alpha?"),
        (
            "local: {steps: 1, correction: scaffold}",
            'group of settings, {key: value}, got "scaffold". Its settings: kind',
        ),
        ("method: fedbiot\nalignment: {initial_step: 1}", "alignment.initial_step: expected a known setting"),
        ("compression: int8", "Its settings: format, block, top_k, error_feedback, zstd."),
        ("ranks: {kind: by_class, classes: []}", "ranks.classes: expected at least 1 of them, got []"),
        ("compare: {local: all}", "compare.local: expected a whole number, or a list"),
    ],
)
def test_mistakes_are_named(text: str, words: str) -> None:
    assert words in problems_of(text)


def test_a_list_with_a_wrong_entry_is_not_said_to_be_too_short() -> None:
    message = problems_of("ranks: {kind: by_class, classes: [{rank: 4, fracton: 1.0}]}")
    assert "ranks.classes.0.fracton: expected a known setting" in message
    assert "Did you mean ranks.classes.fraction?" in message
    assert "at least" not in message


def test_a_missing_or_binary_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing there"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"b\.yaml"):
        load_recipe(tmp_path / "b.yaml")


def test_the_resolved_recipe_reads_back_to_the_same_value() -> None:
    config = parse_recipe(
        "lora: {targets: [q_proj]}\ndata: {template: {with_context: '{context}{instruction}', "
        "without_context: '{instruction}'}}"
    )
    assert parse_recipe(dump_recipe(config)) == config
    assert hash(config) == hash(parse_recipe(dump_recipe(config)))


@example(seed=0, rounds=0, lr=1.0, path="0E0")
@given(seed=st.integers(0, 2**40), rounds=st.integers(0, 10**6), lr=st.floats(1e-9, 1e3), path=st.text(max_size=20))
def test_any_value_survives_the_round_trip(seed: int, rounds: int, lr: float, path: str) -> None:
    tree = to_tree(RunConfig()) | {"seed": seed, "rounds": rounds}
    tree["local"]["lr"], tree["data"]["train"] = lr, path
    config = build_config(tree)
    assert parse_recipe(dump_recipe(config)) == config


def test_the_digest_ignores_only_what_can_not_change_a_result() -> None:
    base = RunConfig()
    same = parse_recipe(
        "name: other\nruntime: {threads: 2}\ncheckpoint: {keep: 5}\ntrackers: [tensorboard]\ncompare: {base: true}"
    )
    assert config_digest(base) == config_digest(same)
    for change in ("seed: 1", "rounds: 11", "local: {steps: 10, lr: 0.5}", "data: {max_tokens: 64}", "lora: {rank: 4}"):
        assert config_digest(base) != config_digest(parse_recipe(change)), change


def test_differences_are_named_by_path() -> None:
    old, new = (
        to_tree(RunConfig()),
        to_tree(parse_recipe("name: x\nlocal: {steps: 10, lr: 0.5}\nallocation: {kind: natural}")),
    )
    assert differences(old, new) == [
        "allocation.clients: 10 -> absent",
        "allocation.kind: iid -> natural",
        "local.lr: 0.001 -> 0.5",
    ]
    assert differences(old, old) == []
