"""An owner's policy: read strictly, every reason to refuse, and what may leave."""

import math
import stat
from dataclasses import fields, replace
from datetime import datetime
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from flocktune.algorithms import fedavg, fedbiot
from flocktune.config.privacy import SamplePrivacy, UserPrivacy
from flocktune.config.schema import Columns, LoraConfig
from flocktune.errors import UpdateRefused, UserError
from flocktune.models.lora import A_SUFFIX, B_SUFFIX
from flocktune.owner.leaving import leaving, refuse_large
from flocktune.owner.policy import MB, Asked, Policy, load_policy, refusals, write_policy
from flocktune.tensors import norm
from flocktune.types import Mean, Update

MODEL, OTHER = "a" * 64, "b" * 64
ASKED = Asked("fedit", MODEL, frozenset({MODEL}), 8, 3, fedavg.KIND, False, 1000, 40)
NOON = datetime(2030, 1, 1, 12, 0)
NAME = "model.layers.0.self_attn.q_proj"


def policy_of(tmp_path: Path, text: str) -> Policy:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    return load_policy(path)


def test_the_written_policy_is_the_default_and_names_every_setting(tmp_path: Path) -> None:
    path = tmp_path / "home" / "policy.yaml"
    write_policy(path)
    assert load_policy(path) == Policy()
    lines = path.read_text().splitlines()
    for setting in fields(Policy):
        (line,) = [line for line in lines if line.startswith(f"{setting.name}:")]
        assert "# " in line, f"{setting.name} is not explained"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_policy_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("min_rows: 5\n")
    with pytest.raises(UserError, match="a path that is free"):
        write_policy(tmp_path / "policy.yaml")
    assert load_policy(tmp_path / "policy.yaml").min_rows == 5


def test_settings_are_read(tmp_path: Path) -> None:
    text = f"methods: [fedbiot]\nmodels: ['{MODEL}']\nhours: 20:00-06:00\nclip_norm: 1e-1\nmax_gpu_memory_gb: 8\n"
    text += "columns: {instruction: question, response: answer}\n"
    expected = Policy(
        methods=("fedbiot",),
        models=(MODEL,),
        columns=Columns(instruction="question", response="answer"),
        hours="20:00-06:00",
        clip_norm=0.1,
        max_gpu_memory_gb=8.0,
    )
    assert policy_of(tmp_path, text) == expected


def test_every_problem_of_a_file_is_in_one_message(tmp_path: Path) -> None:
    text = (
        "method: [fedit]\nmethods: [fedavg]\nmodels: [abc]\nmax_rounds: '3'\nrequire: magic\nhours: 20-6\n"
        "max_rank: 0\nclip_norm: 0\ntensors: []\n"
    )
    with pytest.raises(UserError) as caught:
        policy_of(tmp_path, text)
    message = str(caught.value)
    for words in (
        "method: expected a known setting, got an unknown one. Did you mean methods?",
        "methods.0: expected 'fedit' or 'fedbiot', got \"fedavg\"",
        "models.0: expected a text like",
        'max_rounds: expected a whole number, got "3"',
        "require: expected 'none', 'differential_privacy' or 'secure_aggregation'",
        "hours: expected a text like",
        "max_rank: expected at least 1",
        "clip_norm: expected more than 0",
        "tensors: expected",
    ):
        assert words in message, f"{words!r} not in\n{message}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (" \n", "an empty file"),
        ("- 1", "a mapping of settings"),
        ("hours: '06:00-06:00'", "two different times"),
        ("columns: {answer: response}", "columns.answer: expected a known setting"),
        ("hours: 2030-01-01", "plain values with text keys"),
        ("max_minutes: .inf", "max_minutes: expected"),
        ("max_minutes: .nan", "max_minutes: expected"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        policy_of(tmp_path, text)


def test_a_missing_policy_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing there"):
        load_policy(tmp_path / "policy.yaml")


def test_a_task_inside_the_policy_is_not_refused() -> None:
    assert refusals(Policy(), ASKED, NOON, 0, 0) == []
    of_fedbiot = replace(ASKED, method="fedbiot", kind=fedbiot.KIND)
    strict = Policy(
        methods=("fedbiot",),
        models=(MODEL,),
        columns=Columns(response="answer"),
        max_rounds=4,
        max_updates=10,
        hours="12:00-12:01",
        max_rank=8,
        max_task_mb=1,
        min_rows=40,
    )
    assert refusals(strict, replace(of_fedbiot, task_bytes=MB), NOON, 3, 9) == [], (
        "every bound belongs to what is allowed"
    )
    same = replace(of_fedbiot, columns=Columns(response="answer"))
    assert refusals(strict, same, NOON, 3, 9) == [], "a recipe may name the columns that the owner did"


@pytest.mark.parametrize(
    ("policy", "change", "taken", "words"),
    [
        (Policy(), {"trust_remote_code": True}, 0, "policy: trust_remote_code: expected false"),
        (Policy(methods=("fedbiot",)), {}, 0, "policy: methods: expected one of fedbiot, got 'fedit'"),
        (Policy(), {"method": "centralised"}, 0, "policy: methods: expected one of fedit, fedbiot, got 'centralised'"),
        (Policy(), {"kind": "shell"}, 0, "policy: methods: expected a task of kind 'fedavg' for fedit, got 'shell'"),
        (Policy(), {"kind": fedbiot.KIND}, 0, "policy: methods: expected a task of kind 'fedavg' for fedit"),
        (
            Policy(models=(OTHER,)),
            {},
            0,
            "policy: models: expected a model that is listed here, got digest aaaaaaaaaaaa",
        ),
        (Policy(), {"model_digest": OTHER}, 0, "policy: models: expected a model that is named on the command line"),
        (Policy(), {"model_digest": ""}, 0, "got digest none"),
        (Policy(require="differential_privacy"), {}, 0, "protected by differential privacy, got a recipe without it"),
        (Policy(require="secure_aggregation"), {}, 0, "protected by secure aggregation, got a recipe without it"),
        (
            Policy(require="differential_privacy"),
            {"privacy": UserPrivacy(1.0, 1e-5, epsilon=1.0)},
            0,
            "protected by differential privacy, got a recipe without it",
        ),
        (
            Policy(require="differential_privacy"),
            {"privacy": SamplePrivacy(1.0, 1e-5, noise_multiplier=1.0)},
            0,
            "protected by differential privacy, got a recipe without it",
        ),
        (
            Policy(max_epsilon=2.0),
            {"privacy": SamplePrivacy(1.0, 1e-5, epsilon=8.0)},
            0,
            "max_epsilon: expected a recipe that tells of a row at most epsilon 2, got one with 8",
        ),
        (
            Policy(max_epsilon=2.0),
            {"privacy": SamplePrivacy(1.0, 0.5, epsilon=1.0)},
            0,
            "at most epsilon 2, got one with inf",
        ),
        (Policy(max_epsilon=2.0), {}, 0, "max_epsilon: expected a recipe that tells of a row at most epsilon 2"),
        (Policy(hours="20:00-06:00"), {}, 0, "policy: hours: expected 20:00-06:00, got 12:00"),
        (
            Policy(max_rounds=4),
            {},
            4,
            "policy: max_rounds: expected at most 4 updates of one run, got one more after 4",
        ),
        (Policy(), {"round": -1}, 0, "expected a round from 0 on, got -1"),
        (Policy(max_rank=7), {}, 0, "policy: max_rank: expected a rank from 1 to 7, got 8"),
        (Policy(), {"rank": 0}, 0, "expected a rank from 1 to 256, got 0"),
        (Policy(max_task_mb=1), {"task_bytes": 3 * MB // 2}, 0, "expected a task of at most 1 MB, got 1.5 MB"),
        (Policy(max_updates=9), {}, 0, "policy: max_updates: expected at most 9 updates in all, got one more after 9"),
        (
            Policy(),
            {"columns": Columns(response="patient_name")},
            0,
            "policy: columns: expected columns with the usual names, got a recipe that reads response from 'pat",
        ),
        (
            Policy(columns=Columns(response="a")),
            {"columns": Columns(response="b")},
            0,
            "expected response from 'a', got",
        ),
        (Policy(min_rows=41), {}, 0, "policy: min_rows: expected at least 41 rows to train on, got 40"),
    ],
)
def test_each_reason_to_refuse(policy: Policy, change: dict[str, object], taken: int, words: str) -> None:
    (reason,) = refusals(policy, replace(ASKED, **change), NOON, taken, 9)  # type: ignore[arg-type]
    assert words in reason


def test_every_reason_is_given() -> None:
    policy = Policy(methods=("fedbiot",), models=(OTHER,), hours="20:00-06:00", max_rank=4, min_rows=50)
    assert len(refusals(policy, ASKED, NOON, 1000, 1000)) == 6


@pytest.mark.parametrize(
    ("hours", "clock", "inside"),
    [
        ("20:00-06:00", "20:00", True),
        ("20:00-06:00", "23:59", True),
        ("20:00-06:00", "00:00", True),
        ("20:00-06:00", "05:59", True),
        ("20:00-06:00", "06:00", False),
        ("20:00-06:00", "19:59", False),
        ("08:00-17:30", "08:00", True),
        ("08:00-17:30", "17:29", True),
        ("08:00-17:30", "17:30", False),
        ("08:00-17:30", "07:59", False),
    ],
)
def test_hours_may_go_over_midnight(hours: str, clock: str, inside: bool) -> None:
    now = datetime.fromisoformat(f"2030-01-01T{clock}:00")
    assert (refusals(Policy(hours=hours), ASKED, now, 0, 0) == []) is inside


# --- what may leave --------------------------------------------------------------------------------


def update_of(*tensors: torch.Tensor, suffix: str = A_SUFFIX, weight: float = 3.0) -> Update:
    delta = {f"{NAME}_{place}{suffix}": value for place, value in enumerate(tensors)}
    return Update(delta, weight, metrics={"loss": Mean(2.0, 1.0)})


def refused(policy: Policy, update: Update) -> str:
    with pytest.raises(UpdateRefused) as caught:
        leaving(policy, update)
    return str(caught.value)


def test_flocktunes_own_factors_may_leave(world: object) -> None:
    from flocktune.config.schema import ModelConfig
    from flocktune.models.load import load_skeleton
    from flocktune.models.lora import shapes

    skeleton = load_skeleton(ModelConfig(path=str(world.model)))  # type: ignore[attr-defined]
    delta = {name: torch.ones(shape) for name, shape in shapes(skeleton, LoraConfig(rank=2)).items()}
    assert {name[-len(A_SUFFIX) :] for name in delta} == {A_SUFFIX, B_SUFFIX}
    update = Update(delta, 1.0)
    assert leaving(Policy(), update) is update


def test_every_problem_of_an_update_is_named() -> None:
    delta = {
        "model.embed_tokens.weight": torch.ones(2),
        f"{NAME}{A_SUFFIX}": torch.tensor([1.0, math.nan]),
        f"{NAME}{B_SUFFIX}": torch.ones(2, dtype=torch.float64),
    }
    message = refused(Policy(), Update(delta, math.inf))
    for words in (
        "model.embed_tokens.weight: expected a name like *.lora_A or *.lora_B",
        "lora_B: expected torch.float32, got torch.float64",
        "values: expected finite ones",
        "weight: expected a positive number, got inf",
    ):
        assert words in message, f"{words!r} not in\n{message}"


def test_the_size_is_that_of_what_travels() -> None:
    refuse_large(Policy(max_update_mb=1), update_of(torch.zeros(MB // 4 - 100)))
    with pytest.raises(UpdateRefused, match=r"may not leave: size: expected at most 1 MB, got 1\.0 MB"):
        refuse_large(Policy(max_update_mb=1), update_of(torch.zeros(MB // 4)))


def test_names_are_matched_whole_and_letter_by_letter() -> None:
    policy = Policy(tensors=("*.q_proj_0.lora_A",))
    assert leaving(policy, update_of(torch.ones(2))).delta.keys() == {f"{NAME}_0{A_SUFFIX}"}
    assert "q_proj_1.lora_A: expected" in refused(policy, update_of(torch.ones(2), torch.ones(2)))
    assert "expected a name like" in refused(Policy(), update_of(torch.ones(2), suffix=".lora_a"))
    assert "expected a name like" in refused(Policy(), update_of(torch.ones(2), suffix=".lora_A.copy"))


def test_an_empty_or_infinite_update_does_not_leave() -> None:
    assert "expected at least one, got none" in refused(Policy(), Update({}, 1.0))
    assert "finite" in refused(Policy(clip_norm=1.0), update_of(torch.tensor([math.inf, 1.0])))
    assert "weight" in refused(Policy(), update_of(torch.ones(2), weight=0.0))


values = st.floats(-(2.0**20), 2.0**20, width=32, allow_subnormal=False)
parts = st.lists(st.lists(values, min_size=1, max_size=6), min_size=1, max_size=3)


@given(parts, st.floats(1e-6, 1e6))
def test_clipping_bounds_the_norm_and_keeps_the_direction(rows: list[list[float]], bound: float) -> None:
    update = update_of(*(torch.tensor(row, dtype=torch.float32) for row in rows))
    before = norm(update.delta)
    left = leaving(Policy(clip_norm=bound), update)
    assert norm(left.delta) <= bound * (1 + 1e-6)
    assert (left.weight, left.metrics, left.clients) == (update.weight, update.metrics, update.clients)
    if before <= bound:
        assert left is update, "below the bound not a bit changes"
        return
    assume(before > 0)
    old, new = (torch.cat([value.double() for value in one.delta.values()]) for one in (update, left))
    assert torch.allclose(new / norm(left.delta), old / before, atol=1e-6)
    assert norm(left.delta) >= bound * (1 - 1e-6), "and it is scaled no further than it must"
    assert all(value.dtype == torch.float32 for value in left.delta.values())


def test_without_a_bound_nothing_is_clipped() -> None:
    update = update_of(torch.full((4,), 1e30))
    assert leaving(Policy(), update) is update
    assert norm(leaving(Policy(clip_norm=2.0), update).delta) == pytest.approx(2.0)


def test_own_noise_within_the_bound_is_a_protection() -> None:
    hidden = replace(ASKED, privacy=SamplePrivacy(1.0, 1e-5, epsilon=2.0))
    assert refusals(Policy(require="differential_privacy", max_epsilon=2.0), hidden, NOON, 0, 0) == []
