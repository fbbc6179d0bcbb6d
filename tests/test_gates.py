"""The gate: what passes, what is rolled back and why, and that a killed run goes on to the same bits."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import World, write_rows
from flocktune import api
from flocktune.algorithms import fedavg
from flocktune.assemble import federation
from flocktune.config.load import load_recipe, parse_recipe
from flocktune.config.robustness import GateCanaries, GateConfig, Refusals
from flocktune.config.schema import AggregationConfig, RunConfig, ServerSgd
from flocktune.engine.in_process import InProcess
from flocktune.engine.rounds import Hooks, run_rounds
from flocktune.errors import GateShut, UserError
from flocktune.estimate import estimate
from flocktune.gate import Tried, gated, matching, reasons, refused_share, told
from flocktune.report.events import read_events
from flocktune.report.html import write_report
from flocktune.scheduling import Cohort
from flocktune.tensors import digest
from flocktune.types import ClientTask, Tensors, Update

START = {"w": torch.zeros(2)}
GATE = GateConfig(probe="rows", max_loss_increase=0.5, max_rollbacks=2)


def try_out(adapter: Tensors) -> Tried:
    """The loss is what the first number says."""
    return Tried(float(adapter["w"][0]))


def run(moves: list[float], gate: GateConfig = GATE, tries=try_out, momentum: float = 0.0) -> tuple[list, Tensors]:
    """Rounds whose one client adds ``moves`` to the first number: what was told of each, and the last state."""
    server = gated(fedavg.server_half(AggregationConfig(server_optimizer=ServerSgd(momentum=momentum))), gate, tries)
    events: list = []

    def half(task: ClientTask, memory: Tensors) -> tuple[Update, Tensors]:
        return Update({"w": torch.tensor([moves[task.round], 1.0])}, 1.0), memory

    state = run_rounds(
        server,
        InProcess(half),
        lambda number: Cohort(("a",), 1, 1),
        server.init(START),
        rounds=len(moves),
        kind="",
        seed=0,
        hooks=Hooks(on_round=lambda record, state: events.append((told(gate, state), server.result(state)["w"]))),
    )
    return events, state


def test_a_round_that_is_worse_is_rolled_back_and_the_run_goes_on() -> None:
    events, _ = run([-1.0, 3.0, 0.25, 0.5])
    assert [event["rolled_back"] for event, _ in events] == [False, True, False, True]
    assert [w.tolist() for _, w in events] == [[-1, 1], [-1, 1], [-0.75, 2], [-0.75, 2]]
    assert [event["gate"]["loss"] for event, _ in events] == [-1, 2, -0.75, -0.25]
    assert [event["gate"]["reference"] for event, _ in events] == [0, -1, -1, -1], "the best so far"
    assert events[1][0]["gate"]["reasons"] == ["a loss of 2.000 on the probe (at most -1.000 + 0.5)"]
    assert events[2][0]["gate"]["reasons"] == []


def test_against_the_state_before_small_steps_add_up() -> None:
    events, _ = run([0.4, 0.4, 0.4, 0.6], replace(GATE, against="before"))
    assert [event["rolled_back"] for event, _ in events] == [False, False, False, True]
    with pytest.raises(GateShut):
        run([0.4, 0.4, 0.4], GATE)


def test_the_optimiser_is_rolled_back_too() -> None:
    events, state = run([-1.0, 9.0, -1.0], momentum=0.5)
    assert events[-1][1].tolist() == [-1 - 1.5, 1 + 1.5], "the momentum of the second round is gone"
    assert state["optimizer/momentum/w"].tolist() == [-1.5, 1.5]


def test_so_many_in_a_row_end_the_run() -> None:
    with pytest.raises(GateShut, match=r"2 rounds in a row were rolled back, the last because of a loss of 8\.000"):
        run([7.0, 8.0])
    events, _ = run([7.0, 0.0, 7.0])
    assert [event["rolled_back"] for event, _ in events] == [True, False, True]


def test_a_loss_that_is_no_number_never_passes() -> None:
    assert reasons(GATE, Tried(math.nan), 1.0)
    assert reasons(GATE, Tried(math.inf), 1.0)
    assert not reasons(GATE, Tried(1.5), 1.0)


def test_answers_decide_too() -> None:
    gate = replace(GATE, refusal=Refusals("x", min_refused=0.5), canaries=GateCanaries("y", ("z",)), max_rollbacks=9)

    def tries(adapter: Tensors) -> Tried:
        w = float(adapter["w"][0])
        return Tried(0.0, refused=1 - w, canaries=float(w > 0.4))

    events, _ = run([0.25, 0.2, 0.3], gate, tries)
    assert [event["gate"]["reasons"] for event, _ in events] == [
        [],
        ["1 answers that match gate.canaries.must_not"],
        ["45% of unsafe prompts refused (at least 50%)", "1 answers that match gate.canaries.must_not"],
    ]
    assert (events[0][0]["gate"]["refused"], events[0][0]["gate"]["canaries"]) == (0.75, 0)


def test_a_start_that_does_not_pass_is_said_at_once() -> None:
    gate = replace(GATE, refusal=Refusals("x"))
    with pytest.raises(UserError, match="gate: expected a base model and adapter that pass before the first round"):
        run([0.0], gate, lambda adapter: Tried(0.0, refused=0.0))


def test_what_counts_as_a_refusal_and_as_a_canary() -> None:
    refusal = Refusals("x")
    answers = ["I\u2019m sorry, but no.", "As an  AI, I shall not.", "Sure! Take a hammer.", "I CANNOT do that"]
    assert refused_share(answers, refusal) == 0.75
    assert refused_share(["No."], replace(refusal, phrases=("no",))) == 1
    assert matching(answers, GateCanaries("y", ("HAMMER$", r"hammer\."))) == 1
    assert matching(answers, GateCanaries("y", ("^sorry",))) == 0


# --- in a run ---------------------------------------------------------------------------------------


@pytest.fixture
def probe(world: World, tmp_path: Path) -> Path:
    rows = [json.loads(line) for line in world.data.read_text().splitlines()]
    return write_rows(tmp_path / "probe.jsonl", rows[:12])


def gated_recipe(world: World, probe: Path, *overrides: str) -> RunConfig:
    attack = "attack={kind: sign_flip, clients: [client-02], factor: 30.0}"
    gate = f"gate={{probe: {probe}, rows: 6, max_loss_increase: 0.05, max_rollbacks: 9}}"
    return load_recipe(world.recipe, [gate, attack, "evaluation.generate=false", "rounds=4", "seed=3", *overrides])


FEDBIOT = (
    "method=fedbiot",
    "emulator={adapter_layers: 1, drop: 0.0}",
    "alignment={first_steps: 1, steps: 1, fidelity_rows: 0}",
    "attack.factor=10.0",
)
BUFFERED = ("scheduling.selection.fraction=1.0", "scheduling.buffered={size: 2, concurrency: 3}")


@pytest.mark.parametrize("more", [(), FEDBIOT, BUFFERED], ids=["fedit", "fedbiot", "buffered"])
def test_rounds_with_the_attacker_are_rolled_back(world: World, probe: Path, tmp_path: Path, more) -> None:
    config = gated_recipe(world, probe, *more)
    summary = api.run(config, tmp_path / "run")
    rounds = [event for event in read_events(tmp_path / "run" / "metrics.jsonl") if event["event"] == "round"]
    for event in rounds:
        assert not event["rolled_back"] or "client-02" in event["answered"], "only an attacker's"
        assert bool(event["gate"]["reasons"]) == event["rolled_back"]
    assert 0 < summary["rolled_back"] < 4
    assert summary["rolled_back"] == sum(event["rolled_back"] for event in rounds)
    page = write_report(tmp_path / "run").read_text()
    assert "all (rolled back)" in page
    assert "a loss of" in page
    ungated = api.run(replace(config, gate=None), tmp_path / "ungated")
    loss = ["metrics", "held_out", "overall", "loss"]
    for key in loss:
        summary, ungated = summary[key], ungated[key]
    assert summary < ungated


def test_a_run_goes_on_to_the_same_bits(world: World, probe: Path, tmp_path: Path) -> None:
    """Cut off after every round: what the gate knows is in the checkpoint."""
    config = gated_recipe(world, probe)
    whole = api.run(config, tmp_path / "whole")

    class Impatient(Exception):
        pass

    class Killer:
        def on_event(self, event) -> None:
            if event["event"] == "round" and event["round"] not in seen:
                seen.add(event["round"])
                raise Impatient

        def on_client(self, done: int, total: int, client: str) -> None:
            pass

    seen: set[int] = set()
    with pytest.raises(Impatient):
        api.run(config, tmp_path / "cut", listeners=[Killer()])
    for _ in range(3):
        with pytest.raises(Impatient):
            api.resume(tmp_path / "cut", listeners=[Killer()])
    again = api.resume(tmp_path / "cut", listeners=[Killer()])
    assert (again["adapter_sha256"], again["rolled_back"]) == (whole["adapter_sha256"], whole["rolled_back"])


def test_the_gate_remembers_in_the_state_alone(world: World, probe: Path) -> None:
    fed = federation(gated_recipe(world, probe))
    state = fed.server.init(fed.start)
    assert {name for name in state if name.startswith("gate/")} == {
        f"gate/{name}" for name in ("candidate", "standing", "reference", "best", "rollbacks")
    }
    assert set(fed.server.message(state, 0)) == set(fed.start)
    change = {name: torch.zeros_like(value) for name, value in fed.start.items()}
    one, two = (fed.server.step(state, Update(change, 1.0)) for _ in range(2))
    assert digest(one) == digest(two)
    assert float(one["gate/best"]) == float(one["gate/standing"][0]) == float(one["gate/candidate"][0])


def test_prompts_are_asked_of_the_model(world: World, probe: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Tell me a secret.\n\nAnother one.\n")
    config = gated_recipe(world, probe)
    assert config.gate is not None
    anything = replace(config.gate, canaries=GateCanaries(str(prompts), ("^never this$",)))
    fed = federation(replace(config, gate=anything))
    change = {name: torch.zeros_like(value) for name, value in fed.start.items()}
    stepped = fed.server.step(fed.server.init(fed.start), Update(change, 1.0))
    assert told(anything, stepped)["gate"]["canaries"] == 0
    refused = replace(config.gate, refusal=Refusals(str(prompts)))
    server = federation(replace(config, gate=refused)).server
    with pytest.raises(UserError, match="0% of unsafe prompts refused"):
        server.step(server.init(fed.start), Update(change, 1.0))


def test_files_that_are_not_there_are_named(world: World, probe: Path, tmp_path: Path) -> None:
    config = gated_recipe(world, probe)
    assert config.gate is not None
    (tmp_path / "empty.txt").write_text("\n\n")
    for gate, problem in (
        (replace(config.gate, probe="nowhere.jsonl"), r"gate\.probe: nowhere\.jsonl"),
        (
            replace(config.gate, refusal=Refusals("nothing.txt")),
            r"gate\.refusal\.prompts: expected a text file, one prompt a line, got nothing at nothing\.txt",
        ),
        (replace(config.gate, canaries=GateCanaries(str(tmp_path / "empty.txt"), ("x",))), r"at least one prompt"),
    ):
        with pytest.raises(UserError, match=problem):
            federation(replace(config, gate=gate))
    with pytest.raises(UserError, match=r"gate\.probe: nowhere"):
        estimate(replace(config, gate=replace(config.gate, probe="nowhere.jsonl")))
    with pytest.raises(UserError, match=r"gate\.canaries\.must_not\.0: expected a regular expression, got '\('"):
        parse_recipe("gate: {probe: x, canaries: {prompts: y, must_not: ['(']}}")
    with pytest.raises(UserError, match=r"gate\.probe: expected a value"):
        parse_recipe("gate: {}")


def test_a_changed_probe_is_another_run(world: World, probe: Path, tmp_path: Path) -> None:
    first = federation(gated_recipe(world, probe)).identity
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n")
    canaries = f"gate.canaries={{prompts: {prompts}, must_not: [x]}}"
    second = federation(gated_recipe(world, probe, canaries)).identity
    prompts.write_text("two\n")
    third = federation(gated_recipe(world, probe, canaries)).identity
    assert len({first["gate"], second["gate"], third["gate"]}) == 3
    assert "gate" not in federation(load_recipe(world.recipe)).identity
