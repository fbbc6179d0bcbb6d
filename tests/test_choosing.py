"""Validation rows choose a round and end a run: which rows, what is decided, and that a kill changes nothing of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from conftest import Said, World, dolly_rows, write_rows
from flocktune import looking, runs
from flocktune.allocation import allocate_clients
from flocktune.choosing import Progress, choice, ends_early, progress_by
from flocktune.config.evaluation import EvaluationConfig
from flocktune.config.load import load_recipe, parse_recipe
from flocktune.engine.checkpoint import Checkpoint
from flocktune.errors import UserError
from flocktune.evaluation.evaluate import Evaluation
from flocktune.files import sha256_file
from flocktune.report.html import write_report
from flocktune.report.page import unbroken
from flocktune.report.summaries import choices, combine_seeds
from flocktune.run_folder import create_run
from flocktune.runs import execute
from flocktune.types import Mean
from tiny_federation import SIZES, Direct, make_federated_world, make_owner, new_run, run_apart

Cli = Callable[..., Said]

VALIDATED = ("data.validation_rows_per_category=2", "evaluation.every=1", "evaluation.generate=false")
BEST = (*VALIDATED, "evaluation.keep_best=true", "rounds=6")
FEDBIOT = (
    "method=fedbiot",
    "emulator={adapter_layers: 1, drop: 0.0}",
    "alignment={first_steps: 2, steps: 1, batch_size: 2, fidelity_rows: 0}",
)


def events(folder: Path, kind: str, dataset: str = "") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [event for event in found if event["event"] == kind and dataset in ("", event.get("dataset"))]


def adapter(folder: Path, name: str = "adapter") -> str:
    return sha256_file(folder / name / "adapter_model.safetensors")


def begun(world: World, folder: Path, *overrides: str) -> Path:
    create_run(load_recipe(world.recipe, [*BEST, *overrides]), folder)
    return folder


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, Sequence[float]], None]:
    """From here on, evaluation n of the validation rows of a run finds value n, whoever evaluates after which kill."""
    real = looking.evaluate_adapter

    def write(folder: Path, values: Sequence[float]) -> None:
        def scripted(*arguments: Any, on_the_way: bool = False) -> Evaluation:
            if not on_the_way:
                return real(*arguments)
            done = len(events(folder, "evaluation", "validation"))
            value = values[min(done, len(values) - 1)]  # FedBiOT looks once more, on the emulator
            return Evaluation({"colour": {"loss": Mean(value, 1)}}, {"colour": 1})

        monkeypatch.setattr(looking, "evaluate_adapter", scripted)

    return write


# --- what is decided -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "min_delta", "best", "waited"),
    [
        ([], 0.0, None, 0),
        ([3.0], 0.0, 1, 0),
        ([3.0, 2.0, 1.0], 0.0, 3, 0),
        ([3.0, 1.0, 2.0, 1.5], 0.0, 2, 2),
        ([3.0, 3.0], 0.0, 1, 1),  # the first of equals
        ([3.0, 2.95, 2.9, 2.85], 0.1, 4, 0),  # each step is too small, three together are not
        ([3.0, 2.95, 2.92], 0.1, 3, 2),  # the best is not a gain
        ([None, 3.0, None, 2.0, None], 0.0, 4, 1),
        ([None, None], 0.0, None, 2),
    ],
)
def test_the_best_round_and_how_long_there_was_no_gain(
    values: list[float | None], min_delta: float, best: int | None, waited: int
) -> None:
    less = progress_by(list(enumerate(values, start=1)), more_is_better=False, min_delta=min_delta)
    assert (less.best, less.waited) == (best, waited)
    turned = [(done, value if value is None else -value) for done, value in enumerate(values, start=1)]
    more = progress_by(turned, more_is_better=True, min_delta=min_delta)
    assert (more.best, more.waited) == (best, waited)


def test_patience_and_what_is_told() -> None:
    settings = EvaluationConfig(every=1, keep_best=True, patience=2)
    assert [ends_early(settings, Progress(1, 0.5, waited)) for waited in range(4)] == [False, False, True, True]
    assert not ends_early(EvaluationConfig(), Progress(1, 0.5, 9)), "0 is never"
    told = choice(settings, Progress(4, 0.5, 2), 6, 10)
    assert (told["round"], told["stopped_early"]) == (4, True)
    assert told["said"] == (
        "the result is round 4 of 10, the best by loss on the validation rows (0.500); "
        "stopped after round 6, 2 evaluations without a gain"
    )
    last = choice(EvaluationConfig(every=1, patience=2, metric="checked"), Progress(4, 0.5, 1), 10, 10)
    assert last["said"] == "the result is round 10 of 10; the best was 4 by correct on the validation rows (50.0 %)"
    broken = choice(settings, Progress(None, None, 2), 2, 10)
    assert broken["round"] == 2
    assert "no evaluation of the validation rows gave a number" in broken["said"]


@pytest.mark.parametrize(
    ("text", "where", "says"),
    [
        ("evaluation: {every: 1, keep_best: true}", "evaluation.keep_best", "Set data.validation_rows_per_category=10"),
        ("evaluation: {every: 1, patience: 2}", "evaluation.patience", "Test rows do not choose"),
        ("evaluation: {keep_best: true}\ndata: {validation_rows_per_category: 2}", "evaluation.keep_best", "every=1"),
        (
            "evaluation: {every: 1, keep_best: true, metric: reward_accuracy}\ndata: {validation_rows_per_category: 2}",
            "evaluation.metric",
            "for evaluation.task text",
        ),
        (
            "evaluation: {every: 1, patience: 1, metric: checked, generate: false}\ndata: {validation: a.jsonl}",
            "evaluation.generate",
            "at_end",
        ),
        ("data: {validation: a.jsonl, validation_rows_per_category: 2}", "data.validation_rows_per_category", "0 with"),
    ],
)
def test_what_does_not_go_together_is_refused(text: str, where: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_recipe(text)
    [problem] = caught.value.problems
    assert str(problem).startswith(f"{where}: ")
    assert says in str(problem)


def test_answers_are_written_on_the_way_when_asked_for_or_when_they_decide() -> None:
    assert not EvaluationConfig().answers_on_the_way
    assert EvaluationConfig(generate=True).answers_on_the_way
    assert EvaluationConfig(metric="checked", keep_best=True).answers_on_the_way
    assert not EvaluationConfig(metric="checked").answers_on_the_way, "nothing is decided"


# --- which rows ----------------------------------------------------------------------------------------


def test_validation_rows_are_nobodys_and_the_test_rows_stay_as_they_are(world: World, cli: Cli, tmp_path: Path) -> None:
    plain = allocate_clients(load_recipe(world.recipe))
    data = allocate_clients(load_recipe(world.recipe, VALIDATED))
    assert data.validation is not None
    assert data.test.examples == plain.test.examples
    asked = {part: {row.instruction for row in rows} for part, rows in (("test", data.test.examples),
             ("validation", data.validation.examples))}  # fmt: skip
    held = {data.train.examples[row].instruction for rows in data.clients.values() for row in rows}
    assert len(asked["validation"]) == 6
    assert not asked["validation"] & asked["test"]
    assert not held & (asked["validation"] | asked["test"])
    assert len(held) + 12 == 48
    assert data.describe()["validation"] == {"colour": 2, "size": 2, "sum": 2}
    assert cli("split", world.data, "--clients", "2", "--to", tmp_path / "split").code == 0
    assert not (tmp_path / "split" / "validation.jsonl").exists()


def test_rows_of_a_file_must_not_be_test_rows(world: World, tmp_path: Path) -> None:
    test, own = (tmp_path / name for name in ("test.jsonl", "own.jsonl"))
    write_rows(test, dolly_rows(8))
    write_rows(own, dolly_rows(12)[6:])
    with pytest.raises(UserError, match=r"data\.validation: expected rows that are not in the test set, got 2 of 6"):
        allocate_clients(load_recipe(world.recipe, [f"data.test={test}", f"data.validation={own}"]))
    own = write_rows(tmp_path / "mended.jsonl", dolly_rows(12)[8:])
    data = allocate_clients(load_recipe(world.recipe, [f"data.test={test}", f"data.validation={own}"]))
    assert data.validation is not None
    assert len(data.validation.examples) == 4


# --- whole runs ----------------------------------------------------------------------------------------


def test_the_run_ends_when_it_was_said_to_and_its_result_is_the_best_round_bit_for_bit(
    world: World, tmp_path: Path, scripted: Callable[[Path, Sequence[float]], None]
) -> None:
    folder = begun(world, tmp_path / "run", "evaluation.patience=2", "checkpoint.keep_adapters_every=1")
    scripted(folder, [3.0, 2.0, 2.5, 2.0, 1.0])
    summary = execute(folder)
    assert summary["rounds"] == 4
    assert (summary["choice"]["round"], summary["choice"]["stopped_early"]) == (2, True)
    assert adapter(folder) == adapter(folder, "adapters/round-00002")
    assert adapter(folder) != adapter(folder, "adapters/round-00004")
    assert summary["metrics"]["validation"]["overall"]["loss"] == 2.0
    [test] = events(folder, "evaluation", "held_out")
    assert (test["round"], test["final"]) == (2, True), "the test rows are looked at once, in the result"
    found = [event["categories"] for event in events(folder, "evaluation", "validation")]
    assert len(found) == 4
    assert all(categories.keys() == {"colour"} for categories in found), "category by category"
    assert unbroken(summary["choice"]["said"]) in write_report(folder).read_text().replace("&#39;", "'")
    assert choices({"fedit": combine_seeds([summary, summary])}) == [f"FedIT, seed 0: {summary['choice']['said']}"] * 2


def test_without_keep_best_the_result_is_the_last_round_and_the_best_is_told(
    world: World, tmp_path: Path, scripted: Callable[[Path, Sequence[float]], None]
) -> None:
    folder = begun(world, tmp_path / "run", "evaluation={every: 2, keep_best: false, patience: 1}",
                   "checkpoint.keep_adapters_every=1")  # fmt: skip
    scripted(folder, [1.0, 2.0, 0.5])
    summary = execute(folder)
    assert summary["rounds"] == 4
    assert (summary["choice"]["round"], summary["choice"]["best"]) == (4, 2)
    assert adapter(folder) == adapter(folder, "adapters/round-00004")
    assert not (folder / "state" / "best").exists()


class Killed(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("method", [(), FEDBIOT], ids=["fedit", "fedbiot"])
def test_killed_around_any_checkpoint_it_decides_the_same(
    world: World, tmp_path: Path, scripted: Callable[[Path, Sequence[float]], None], method: tuple[str, ...]
) -> None:
    values = [3.0, 2.0, 2.5, 2.4]
    settings = (
        *method,
        "evaluation.patience=2",
        "local.steps=1",
        "aggregation.server_optimizer={kind: adam, lr: 0.05}",
    )
    whole = begun(world, tmp_path / "whole", *settings)
    scripted(whole, values)
    wanted = execute(whole)
    real, calls = runs.save_checkpoint, 0

    def counting(*arguments: Any, **more: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at and before:
            raise Killed
        real(*arguments, **more)
        if calls == at:
            raise Killed

    # saves: round 1, its best, round 2, its best, ... and with FedBiOT one of the first alignment before
    first = 1 if method else 0
    for at, before in (
        (first + 3, True),
        (first + 3, False),
        (first + 4, False),
        (first + 6, True),
        (first + 6, False),
    ):
        folder = begun(world, tmp_path / f"{at}-{before}", *settings)
        scripted(folder, values)
        calls = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runs, "save_checkpoint", counting)
            with pytest.raises(Killed):
                execute(folder)
        summary = execute(folder)
        assert summary["choice"] == wanted["choice"]
        assert summary["adapter_sha256"] == wanted["adapter_sha256"]
        assert summary["metrics"] == wanted["metrics"]
        assert len(events(folder, "evaluation")) == len(events(whole, "evaluation"))
        assert len(events(folder, "choice")) == 1
        if method:  # E and A of one round
            assert adapter(folder, "emulator_adapter") == adapter(whole, "emulator_adapter")


def test_killed_while_it_ends_it_looks_at_the_result_once_more_and_says_so_once(
    world: World, tmp_path: Path, scripted: Callable[[Path, Sequence[float]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*arguments: Any) -> None:
        raise Killed

    folder = begun(world, tmp_path / "run", "evaluation.patience=1")
    scripted(folder, [3.0, 2.0, 2.5])
    with monkeypatch.context() as patch:
        patch.setattr(runs, "write_json", kill)
        with pytest.raises(Killed):
            execute(folder)
    assert len(events(folder, "run_end")) == 1
    assert execute(folder)["choice"]["round"] == 2
    assert len(events(folder, "evaluation", "held_out")) == 1
    assert [len(events(folder, kind)) for kind in ("choice", "run_end", "round")] == [1, 1, 3]


def test_bests_of_rounds_that_happen_again_are_forgotten(
    world: World, tmp_path: Path, scripted: Callable[[Path, Sequence[float]], None]
) -> None:
    """In a federation a round that happens again may come out otherwise, since others take part."""
    folder = begun(world, tmp_path / "run", "rounds=4")
    real = runs.save_checkpoint

    def killed(at: int) -> Callable[..., None]:
        def save(place: Path, checkpoint: Checkpoint, **more: Any) -> None:
            if place.name == "state" and checkpoint.rounds_done == at:
                raise Killed
            real(place, checkpoint, **more)

        return save

    for values, at in (([3.0, 2.0], 2), ([3.0, 4.0, 2.0], 3)):  # round 2 is the best; then 3 is, and 2 is not
        scripted(folder, values)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runs, "save_checkpoint", killed(at))
            with pytest.raises(Killed):
                execute(folder)
    scripted(folder, [3.0, 4.0, 5.0, 6.0])
    assert execute(folder)["choice"]["round"] == 1


def test_the_emulators_part_is_of_the_best_round_too(
    world: World, tmp_path: Path, scripted: Callable[[Path, Sequence[float]], None]
) -> None:
    short = begun(world, tmp_path / "short", *FEDBIOT, "rounds=2")
    scripted(short, [3.0, 2.0])
    execute(short)
    folder = begun(world, tmp_path / "long", *FEDBIOT, "rounds=3")
    scripted(folder, [3.0, 2.0, 2.5])
    summary = execute(folder)
    assert summary["choice"]["round"] == 2
    assert adapter(folder) == adapter(short)
    assert adapter(folder, "emulator_adapter") == adapter(short, "emulator_adapter")
    assert {"validation", "validation_emulator", "held_out", "held_out_emulator"} == set(summary["metrics"])


def test_buffered_rounds_and_clients_own_adapters_are_of_the_best_round(
    world: World, tmp_path: Path, scripted: Callable[[Path, Sequence[float]], None]
) -> None:
    settings = (
        "scheduling={selection: {kind: uniform}, buffered: {size: 2, concurrency: 3}}",
        "personal={kind: ditto, lambda_: 1.0, keep: true}",
        "evaluation.client_rows=1",
    )
    short = begun(world, tmp_path / "short", *settings, "rounds=2")
    scripted(short, [3.0, 2.0])
    execute(short)
    folder = begun(world, tmp_path / "long", *settings, "rounds=4", "evaluation.patience=1")
    scripted(folder, [3.0, 2.0, 2.5])
    summary = execute(folder)
    assert (summary["rounds"], summary["choice"]["round"]) == (3, 2)
    own = sorted(path.name for path in (short / "personal").iterdir())
    assert own
    for name in ("adapter", *(f"personal/{client}" for client in own)):
        assert adapter(folder, name) == adapter(short, name), name
    by_client = events(folder, "evaluation", "clients")
    assert [(event["round"], event.get("final", False)) for event in by_client] == [(1, False), (2, False), (2, True)]
    assert by_client[0]["clients"], "client by client"


def test_epsilon_is_of_the_rounds_that_were_done(
    world: World, tmp_path: Path, scripted: Callable[[Path, Sequence[float]], None]
) -> None:
    private = (
        "privacy={kind: user, clip_norm: 0.5, noise_multiplier: 1.0, delta: 1.0e-5}",
        "scheduling={selection: {kind: poisson, fraction: 0.5}}",
        "aggregation.weights=equal",
    )
    folder = begun(world, tmp_path / "run", *private, "evaluation.patience=1")
    scripted(folder, [3.0, 2.0, 2.5])
    summary = execute(folder)
    spent = [event["privacy"]["epsilon"] for event in events(folder, "round")]
    assert (len(spent), summary["choice"]["round"]) == (3, 2)
    assert summary["privacy"]["epsilon"] == spent[-1] > spent[1], "what was looked at was spent, kept or not"


def test_a_comparison_says_which_of_its_runs_ended_early(world: World, cli: Cli, tmp_path: Path) -> None:
    settings = (*BEST, "evaluation.patience=1", "evaluation.min_delta=100", "compare={base: true, local: 1}")
    said = cli("run", world.recipe, *settings, "--out", tmp_path / "run")
    assert said.code == 0, said.all
    text = " ".join(said.out.split("Comparison on")[-1].split())
    assert text.count("stopped after round 2, 1 evaluation without a gain") == 2, "base has no rounds to choose from"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["base"]["metrics"]["validation"]["overall"]["rows"] == 3, "max_rows"
    assert "choice" not in summary["base"]
    assert cli("eval", tmp_path / "run", "--max-rows", 2).code == 0


def test_a_federation_chooses_by_rows_of_the_coordinators_own(tmp_path: Path) -> None:
    world = make_federated_world(tmp_path / "world")
    own = write_rows(tmp_path / "own.jsonl", dolly_rows(60)[50:])
    settings = (f"data.validation={own}", "evaluation={every: 1, keep_best: true, patience: 1, min_delta: 100}",
                "rounds=4")  # fmt: skip
    together = execute(new_run(world, tmp_path / "together", *settings))
    link = Direct({client: make_owner(world, client, tmp_path / "homes" / client).answer for client in SIZES})
    apart = run_apart(new_run(world, tmp_path / "apart", *settings, "data.train=/nowhere"), link)
    assert apart["choice"] == together["choice"]
    assert (apart["rounds"], apart["choice"]["stopped_early"]) == (2, True)
    assert apart["adapter_sha256"] == together["adapter_sha256"]
    with pytest.raises(UserError, match=r"data\.validation_rows_per_category: expected 0 in a federation"):
        run_apart(new_run(world, tmp_path / "not", "data.validation_rows_per_category=2"), link)
