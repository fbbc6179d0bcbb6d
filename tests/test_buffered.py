"""Buffered rounds, by hand on a toy problem: client k pulls three numbers towards its own target, at its own pace."""

from __future__ import annotations

import json
import math
import random
import signal
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Said, World
from flocktune.algorithms import fedavg
from flocktune.config.load import parse_recipe
from flocktune.config.schema import AggregationConfig, Buffered, ServerAdaptive, ServerSgd
from flocktune.engine.buffered import at_work, run_buffered
from flocktune.engine.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from flocktune.engine.client import transformed
from flocktune.engine.in_process import InProcess, duration
from flocktune.engine.rounds import Hooks, RoundRecord, run_rounds
from flocktune.errors import RoundFailed, UserError
from flocktune.interfaces import Issued, Memory, ServerHalf, State, Transform
from flocktune.scheduling import Cohort
from flocktune.seeds import derive_seed
from flocktune.tensors import digest
from flocktune.types import ClientTask, Failure, Mean, Update
from flocktune.wire import encoded_size
from forked_runs import ForkedRuns
from test_resume import events, go_on, result

CLIENTS = [f"c{number}" for number in range(8)]
TARGETS = {client: [float(number), 1.0, -2.0 * number] for number, client in enumerate(CLIENTS)}
WEIGHTS = {client: 1.0 + number for number, client in enumerate(CLIENTS)}
START = {"w": torch.zeros(3)}
SETTINGS = Buffered(size=3, concurrency=5)
OPTIMIZERS = [ServerSgd(), ServerSgd(momentum=0.9), ServerAdaptive("adam"), ServerAdaptive("yogi")]


def pull(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
    """Three steps towards the client's target, with a pinch of seeded noise; its memory bears on what it does."""
    w = start = task.tensors["w"]
    noise = torch.Generator().manual_seed(task.seed)
    count = memory.get("calls", torch.zeros(())) + 1
    for _ in range(3):
        w = w - 0.1 / count * (w - torch.tensor(TARGETS[task.client]) + 0.01 * torch.randn(3, generator=noise))
    return Update({"w": w - start}, WEIGHTS[task.client], 1, {"loss": Mean(1.0, 1)}), {"calls": count}


class Watched:
    """A client half that notes every task, in the order in which the updates came."""

    def __init__(self, half=pull) -> None:
        self.half, self.tasks = half, []

    def __call__(self, task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
        self.tasks.append(task)
        return self.half(task, memory)


def run(
    rounds: int = 6,
    settings: Buffered = SETTINGS,
    half=pull,
    server: ServerHalf | None = None,
    state: State | None = None,
    engine=None,
    clients: list[str] = CLIENTS,
    **more: Any,
) -> State:
    server = server or fedavg.server_half(AggregationConfig())
    state = server.init(START) if state is None else state
    engine = engine or InProcess(half)
    return run_buffered(server, engine, clients, settings, state, rounds=rounds, kind="toy", seed=7, **more)


def recorded(*arguments: Any, **more: Any) -> list[RoundRecord]:
    records: list[RoundRecord] = []
    run(*arguments, hooks=Hooks(on_round=lambda record, _: records.append(record), diagnose_clients=2), **more)
    return records


# --- what a round computes -----------------------------------------------------------------------------------


def plain(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
    """Without noise: the same client from the same message gives the same update, whatever the seed."""
    w = task.tensors["w"]
    return Update({"w": 0.3 * (torch.tensor(TARGETS[task.client]) - w)}, WEIGHTS[task.client]), memory


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_with_everyone_at_work_and_waited_for_a_round_is_a_synchronous_one(optimizer) -> None:
    server, watched = fedavg.server_half(AggregationConfig(server_optimizer=optimizer)), Watched(plain)
    state = run(3, Buffered(size=8, concurrency=8), watched, server)
    orders = [tuple(task.client for task in watched.tasks[at : at + 8]) for at in (0, 8, 16)]
    assert all(sorted(order) == CLIENTS for order in orders)
    assert len(set(orders)) == 3, "everyone's pace differs from round to round"
    assert not [name for name in at_work(state) if "counts" not in name], "nobody is at work between two rounds"

    def in_that_order(number: int) -> Cohort:
        return Cohort(orders[number], 8, 8)

    same = run_rounds(server, InProcess(plain), in_that_order, server.init(START), rounds=3, kind="toy", seed=7)
    assert {name: value.tolist() for name, value in state.items() if name not in at_work(state)} == {
        name: value.tolist() for name, value in same.items()
    }


@pytest.mark.parametrize("exponent", [0.0, 0.5, 2.0])
def test_staleness_weights_equal_the_textbook_loop(exponent: float) -> None:
    """Who was given out when, and who came when, is played again in float64 with none of our loop."""
    settings, watched = Buffered(3, 5, staleness_exponent=exponent), Watched()
    state = run(6, settings, watched)
    w, models, calls, ages = torch.zeros(3, dtype=torch.float64), [], dict.fromkeys(CLIENTS, 0), []
    for number in range(6):
        models.append(w)
        total, weights = torch.zeros(3, dtype=torch.float64), 0.0
        for task in watched.tasks[3 * number : 3 * number + 3]:
            local, noise = models[task.round].clone(), torch.Generator().manual_seed(task.seed)
            calls[task.client] += 1
            for _ in range(3):
                pinch = 0.01 * torch.randn(3, generator=noise).double()
                local -= 0.1 / calls[task.client] * (local - torch.tensor(TARGETS[task.client]).double() + pinch)
            ages.append(number - task.round)
            weight = WEIGHTS[task.client] / (1 + ages[-1]) ** exponent
            total += weight * (local - models[task.round])
            weights += weight
        w = w + total / weights
    assert max(ages) >= 2
    assert state["adapter/w"].tolist() == pytest.approx(w.tolist(), abs=1e-6)


def test_weights_that_vanish_with_age_still_have_a_mean() -> None:
    def light(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
        return replace(plain(task, memory)[0], weight=1e-300), memory

    state = run(12, Buffered(3, 8, staleness_exponent=4000.0), light)
    assert bool(state["adapter/w"].isfinite().all())


def test_five_are_at_work_and_never_one_twice() -> None:
    out: list[list[str]] = []

    class Watching(InProcess):
        def stream(self, issue):
            working: list[str] = []

            def noted() -> Issued | None:
                issued = issue()
                if issued:
                    assert issued.task.client not in working
                    working.append(issued.task.client)
                return issued

            for task, reply in super().stream(noted):
                out.append(list(working))
                working.remove(task.client)
                yield task, reply

    run(20, engine=Watching(pull))
    assert [len(working) for working in out] == [5] * 60
    assert {client for working in out for client in working} == set(CLIENTS)


def test_every_task_counts_once_and_none_is_lost() -> None:
    watched = Watched()
    records = recorded(10, half=watched)
    seeds = [task.seed for task in watched.tasks]
    assert len(seeds) == len(set(seeds)) == 30
    assert sum(client.metrics["loss"].count for record in records for client in record.clients.values()) == 30
    everyones = [derive_seed(7, issue, client) for issue in range(10 * 3 + 4) for client in CLIENTS]
    assert set(seeds) <= set(everyones), "numbers of tasks that are given out have no gap"


def test_a_record_tells_what_came_in_its_round() -> None:
    watched = Watched()
    records = recorded(8, Buffered(6, 2), watched)
    for record in records:
        came = watched.tasks[6 * record.round : 6 * record.round + 6]
        assert record.selected == tuple(task.client for task in came) == tuple(record.clients)
        assert len(set(record.selected)) == 6, "a fast client is not asked twice from the same state"
        assert record.metrics["loss"].count == 6
        assert record.diagnostics["staleness"] == sum(record.round - task.round for task in came) / 6
        assert record.bytes_up == 6 * encoded_size(START)
        assert {client.bytes_up for client in record.clients.values()} == {encoded_size(START)}
        # Two at the start; then one after each reply, but for the last of a round: that one belongs to the next.
        assert record.bytes_down == (7 if record.round == 0 else 6) * encoded_size(START)
        for client, told in record.clients.items():
            assert told.weight == WEIGHTS[client], "as the client gave it"


def test_diagnosis_sees_the_message_and_the_first_updates_as_they_came() -> None:
    seen = []

    def diagnose(message, updates) -> dict[str, float]:
        seen.append((message, updates))
        return {"aggregation_error": 0.5}

    records: list[RoundRecord] = []
    hooks = Hooks(on_round=lambda record, _: records.append(record), diagnose=diagnose, diagnose_clients=2)
    run(4, hooks=hooks)
    assert [len(updates) for _, updates in seen] == [2] * 4
    assert all(update.weight in WEIGHTS.values() for _, updates in seen for update in updates), "not weighed by age"
    assert records[0].diagnostics["aggregation_error"] == 0.5


def test_transforms_are_undone_in_reverse_order() -> None:
    def scaled(factor: float, name: str) -> Transform:
        return Transform(
            name,
            lambda update, task, memory: (
                replace(update, delta={"w": update.delta["w"] * factor + factor}),
                {"calls": memory.get("calls", torch.zeros(())) + 1},
            ),
            lambda update, expected: replace(update, delta={"w": (update.delta["w"] - factor) / factor}),
        )

    transforms = [scaled(2.0, "first"), scaled(4.0, "second")]
    state = run(engine=InProcess(transformed(pull, transforms)), transforms=transforms)
    assert state["adapter/w"].tolist() == pytest.approx(run()["adapter/w"].tolist(), abs=1e-5)


def test_in_one_process_replies_come_in_the_order_of_the_logical_time() -> None:
    """Played again with a list that is sorted anew for every reply."""
    tasks = [ClientTask(0, f"c{seed % 8}", "toy", START, seed, "") for seed in range(40)]
    waiting, order, clock, at_once = list(tasks), [], 0, 6

    def issue() -> Issued | None:
        return Issued(waiting.pop(0), clock / at_once) if waiting and 40 - len(waiting) - clock < at_once else None

    for task, reply in InProcess(pull).stream(issue):
        assert isinstance(reply, Update)
        order.append(task.seed)
        clock += 1
    begun = [max(0, seed - at_once + 1) / at_once for seed in range(40)]
    working, expected = list(range(at_once)), []
    while working:
        expected.append(min(working, key=lambda seed: begun[seed] + duration(seed)))
        working = [seed for seed in range(min(40, at_once + len(expected))) if seed not in expected]
    assert order == expected
    assert order != sorted(order)


def test_of_two_that_are_done_at_once_the_first_given_out_comes_first() -> None:
    twins = [ClientTask(0, client, "toy", START, 5, "") for client in ("c7", "c1", "c4")]
    given = iter(twins)
    issue = lambda: next((Issued(task, 0.0) for task in given), None)  # noqa: E731
    assert [task.client for task, _ in InProcess(pull).stream(issue)] == ["c7", "c1", "c4"]


def test_a_message_that_nobody_works_on_any_more_is_let_go() -> None:
    seen: dict[int, weakref.ref[torch.Tensor]] = {}
    needed: set[int] = set()

    def half(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
        seen[task.round] = weakref.ref(task.tensors["w"])
        return pull(task, memory)

    def check(record: RoundRecord, state: State) -> None:
        held = {number for number, tensor in seen.items() if tensor() is not None}
        assert held <= needed | {record.round}, "more than was worked on when the round began"
        needed.clear()
        needed.update(int(name.split("/")[2]) for name in state if name.startswith("buffered/message/"))

    run(20, half=half, hooks=Hooks(on_round=check))
    assert len(seen) == 20


def test_durations_are_half_normal_with_mean_one() -> None:
    drawn = sorted(duration(seed) for seed in range(4000))
    assert drawn[0] >= 0
    assert sum(drawn) / 4000 == pytest.approx(1.0, abs=0.05)
    for quantile in (0.25, 0.5, 0.9):
        assert math.erf(drawn[int(quantile * 4000)] / math.sqrt(math.pi)) == pytest.approx(quantile, abs=0.03)
    assert max(duration(seed) for seed in (0, 2**63 - 1)) < math.inf


# --- killed and resumed --------------------------------------------------------------------------------------


def aligning(optimizer=ServerSgd()) -> ServerHalf:
    """FedBiOT's shape: the server's own work before a round, a part of the message that does not come back."""
    inner = fedavg.server_half(AggregationConfig(server_optimizer=optimizer))

    def prepare(state: State, round: int) -> tuple[State, dict[str, Any]]:
        assert not at_work(state), "the algorithm sees its own state only"
        if int(state["aligned"]) > round:
            return state, {}
        moved = state["emulator/e"] + state["adapter/w"].mean() + round
        return {**state, "emulator/e": moved, "aligned": torch.tensor(round + 1)}, {"seconds": 0.0}

    def message(state: State, round: int) -> dict[str, torch.Tensor]:
        assert not at_work(state)
        # Not in the order of the alphabet, as files have it.
        return {"z/w": state["adapter/w"], "e": state["emulator/e"], "a/fixed": state["fixed"]}

    return replace(
        inner,
        init=lambda start: {
            **inner.init(start),
            "emulator/e": torch.ones(2),
            "fixed": torch.ones(1),
            "aligned": torch.tensor(0),
        },
        message=message,
        returned=lambda message: {"w": message["z/w"]},
        step=lambda state, update: {**state, **inner.step(state, update)},
        prepare=prepare,
    )


def beside(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
    """The client of :func:`aligning`: what it does depends on every tensor it got, and on their order."""
    assert list(task.tensors) == ["z/w", "e", "a/fixed"]
    update, memory = pull(replace(task, tensors={"w": task.tensors["z/w"]}), memory)
    return replace(update, delta={"w": update.delta["w"] + 0.01 * task.tensors["e"].sum()}), memory


def kept(folder: Path, engine: InProcess) -> Hooks:
    """What a run keeps: the state after every round, and the first alignment."""

    def save(rounds_done: int, state: State) -> None:
        save_checkpoint(folder, Checkpoint(rounds_done, state, engine.memories, {}), keep=2)

    return Hooks(
        on_prepared=lambda number, told, state: save(0, state) if number == 0 else None,
        on_round=lambda record, state: save(record.round + 1, state),
    )


class Killed(BaseException):
    """Nothing catches it on the way out, as nothing catches SIGKILL."""


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("make", "half"), [(None, pull), (aligning, beside)], ids=["fedavg", "fedbiot"])
def test_killed_at_every_single_reply_and_resumed_from_files_no_bit_changes(tmp_path, optimizer, make, half) -> None:
    make = make or (lambda optimizer: fedavg.server_half(AggregationConfig(server_optimizer=optimizer)))
    server, watched = make(optimizer), Watched(half)
    memories = InProcess(watched)
    whole = run(5, server=server, engine=memories)
    for fatal in range(15):
        folder, replies = tmp_path / str(fatal), 0

        def dies(task: ClientTask, memory: Memory, fatal: int = fatal) -> tuple[Update, Memory]:
            nonlocal replies
            replies += 1
            if replies > fatal:
                raise Killed
            return half(task, memory)

        first = InProcess(dies)
        with pytest.raises(Killed):
            run(5, server=server, engine=first, hooks=kept(folder, first))
        found = load_checkpoint(folder)
        done = found.rounds_done if found else 0
        assert done == fatal // 3
        again = Watched(half)
        second = InProcess(again, memories=dict(found.memories) if found else {})
        state = found.state if found else server.init(START)
        resumed = run(5, server=server, state=state, engine=second, first_round=done, hooks=kept(folder, second))
        assert digest(resumed) == digest(whole), fatal
        assert [task.seed for task in again.tasks] == [task.seed for task in watched.tasks[3 * done :]]
        assert {client: digest(own) for client, own in second.memories.items()} == {
            client: digest(own) for client, own in memories.memories.items()
        }


def test_stopping_after_any_round_and_going_on_again_and_again_changes_no_bit() -> None:
    whole, engine = run(9, Buffered(1, 8)), InProcess(pull)
    state = None
    for number in range(9):
        state = run(number + 1, Buffered(1, 8), state=state, first_round=number, engine=engine)
    assert state is not None
    assert digest(state) == digest(whole)


def test_a_resumed_round_tells_the_same_of_itself(tmp_path: Path) -> None:
    whole = recorded(6)
    engine = InProcess(pull)
    run(3, engine=engine, hooks=kept(tmp_path, engine))
    found = load_checkpoint(tmp_path)
    assert found is not None
    engine = InProcess(pull, memories=dict(found.memories))
    rest = recorded(6, state=found.state, first_round=3, engine=engine)
    for one, other in zip(whole[3:], rest, strict=True):
        assert timed_out(one) == timed_out(other)


def timed_out(record: RoundRecord) -> dict[str, Any]:
    """A record without what a clock said."""
    told = vars(record) | {"seconds": None, "metrics": record.metrics["loss"]}
    clients = {name: (client.weight, client.metrics["loss"]) for name, client in record.clients.items()}
    return told | {"clients": clients}


def test_a_message_is_saved_once_however_many_work_on_it_and_no_longer_than_that() -> None:
    states: list[State] = []
    run(20, hooks=Hooks(on_round=lambda record, state: states.append(state)))
    for done, state in enumerate(states, start=1):
        own = at_work(state)
        work = {name: value.tolist() for name, value in own.items() if "/work/" in name}
        assert len(work) == 4, "who was last is not replaced before the step"
        messages = {name for name in own if "/message/" in name}
        assert messages == {f"buffered/message/{version}/w" for _, version, _ in work.values()}
        assert own["buffered/counts"].tolist() == [3 * done + 4, 3 * done]


def test_whoever_was_at_work_is_given_out_first_and_in_the_order_of_before() -> None:
    given: list[Issued] = []

    class Asking(InProcess):
        def stream(self, issue) -> Iterator[tuple[ClientTask, Update | Failure]]:
            given.extend(iter(issue, None))
            yield from ()

    state = run(6)
    shuffled = dict(sorted(state.items(), reverse=True))  # files have an order of their own
    with pytest.raises(RoundFailed):
        run(7, state=shuffled, first_round=6, engine=Asking(pull))
    work = {name.split("/")[-1]: value.tolist() for name, value in state.items() if "/work/" in name}
    before = sorted(work, key=lambda client: work[client][0])
    assert [issued.task.client for issued in given[:-1]] == before
    assert [issued.task.round for issued in given] == [*(work[client][1] for client in before), 6]
    assert [issued.at for issued in given] == [*(work[client][2] / 5 for client in before), 18 / 5]


def test_a_stop_is_taken_between_rounds() -> None:
    done: list[int] = []
    hooks = Hooks(on_round=lambda record, _: done.append(record.round), should_stop=lambda: len(done) == 3)
    state = run(10, hooks=hooks)
    assert done == [0, 1, 2]
    assert digest(state) == digest(run(3))


# --- faults --------------------------------------------------------------------------------------------------


def tired(*clients: str, once: bool = False) -> Callable[..., tuple[Update, Memory]]:
    been: set[str] = set()

    def half(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
        if task.client in clients and not (once and task.client in been):
            been.add(task.client)
            raise ValueError(f"{task.client} is tired")
        return pull(task, memory)

    return half


def test_a_failed_client_is_left_out_and_another_is_asked() -> None:
    records = recorded(12, half=tired("c3"))
    assert all(sum(client.metrics["loss"].count for client in record.clients.values()) == 3 for record in records)
    failures = [failure for record in records for failure in record.failures]
    assert failures
    assert set(failures) == {Failure("c3", "ValueError: c3 is tired")}
    for record in records:
        assert "c3" not in record.clients
        assert ("c3" in record.selected) == bool(record.failures)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda update: replace(update, delta={"w": torch.tensor([0.0, math.nan, 0.0])}), "w: NaN"),
        (lambda update: replace(update, delta={"v": torch.zeros(3)}), "v: not expected"),
        (lambda update: replace(update, weight=0.0), "weight: expected a positive number"),
    ],
)
def test_a_bad_update_never_touches_the_state(change, reason: str) -> None:
    def half(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
        update, memory = pull(task, memory)
        return (change(update) if task.client == "c3" else update), memory

    states: list[State] = []
    records: list[RoundRecord] = []
    run(12, half=half, hooks=Hooks(on_round=lambda record, state: (records.append(record), states.append(state))))
    assert any(reason in failure.reason for record in records for failure in record.failures)
    assert all(bool(value.isfinite().all()) for state in states for value in state.values())
    assert digest(states[-1]) == digest(run(12, half=tired("c3"))), "as if it had failed"


def test_when_everyone_failed_the_round_fails_and_names_every_reason_once() -> None:
    seen: list[int] = []
    watched = Watched(tired(*CLIENTS))

    def half(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
        return pull(task, memory) if len(seen) < 2 else watched(task, memory)

    with pytest.raises(RoundFailed, match="round 3: expected updates of at least 3 clients, got 0") as failed:
        run(half=half, hooks=Hooks(on_round=lambda record, _: seen.append(record.round)))
    assert seen == [0, 1], "a failed round reaches no checkpoint"
    assert [failure.client for failure in failed.value.failures] == [task.client for task in watched.tasks]
    assert sorted(task.client for task in watched.tasks) == CLIENTS


def test_one_good_client_keeps_the_rest_in_hope() -> None:
    """Seven of eight fail; whenever an update of the eighth has come, they are asked again."""
    records = recorded(10, Buffered(1, 8), tired(*CLIENTS[1:]))
    assert [list(record.clients) for record in records] == [["c0"]] * 10
    failed = [[failure.client for failure in record.failures] for record in records]
    assert max(len(clients) for clients in failed) > 3
    assert all(len(clients) == len(set(clients)) for clients in failed), "each is asked once until an update has come"
    assert {client for clients in failed for client in clients} == set(CLIENTS[1:])
    records = recorded(10, Buffered(3, 8), tired(*CLIENTS[1:], once=True))
    assert len(records[0].clients) == 3, "who has recovered is in"


def test_a_round_that_can_not_be_filled_fails() -> None:
    with pytest.raises(RoundFailed, match=r"(?s)round 1: expected updates of at least 8 clients, got 7.*c3 is tired"):
        run(settings=Buffered(8, 8), half=tired("c3"))


def test_too_old_an_update_is_left_out_and_its_client_asked_again() -> None:
    free, bounded = Watched(), Watched()
    ages = [record.diagnostics["staleness"] for record in recorded(20, Buffered(1, 8), free)]
    assert max(ages) > 2
    records = recorded(20, Buffered(1, 8, max_staleness=2), bounded)
    assert max(record.diagnostics["staleness"] for record in records) == 2
    failures = [failure for record in records for failure in record.failures]
    assert failures
    for failure in failures:
        assert "too old: begun" in failure.reason
        assert "the oldest that counts is 2" in failure.reason
    assert len(bounded.tasks) == 20 + len(failures)


def test_not_a_single_old_update_is_no_reason_to_fail() -> None:
    records = recorded(20, Buffered(1, 8, max_staleness=0))
    assert len(records) == 20
    assert all(record.diagnostics["staleness"] == 0 for record in records)


def test_replies_that_come_twice_or_from_nowhere_count_once(caplog) -> None:
    class Echo(InProcess):
        def stream(self, issue) -> Iterator[tuple[ClientTask, Update | Failure]]:
            came = []
            for task, reply in super().stream(issue):
                came.append((task, reply))
                yield task, reply
                yield replace(task, client="nobody"), reply
                yield from came  # also of clients that are at work on something else by now

    assert digest(run(engine=Echo(pull))) == digest(run())
    assert "left out an answer of nobody that nobody waits for" in caplog.text


def test_an_engine_that_is_out_of_replies_ends_the_run() -> None:
    class Short(InProcess):
        def stream(self, issue) -> Iterator[tuple[ClientTask, Update | Failure]]:
            replies = super().stream(issue)
            for _ in range(4):
                yield next(replies)

    with pytest.raises(RoundFailed, match="round 2: expected updates of at least 3 clients, got 1"):
        run(engine=Short(pull))


def test_what_can_not_be_buffered_is_refused() -> None:
    server = replace(fedavg.server_half(AggregationConfig()), combine=lambda updates, message: next(iter(updates)))
    with pytest.raises(UserError, match=r"scheduling\.buffered: expected a method that averages"):
        run(server=server)
    with pytest.raises(UserError, match=r"concurrency: expected at most the 4 clients of the federation, got 5"):
        run(clients=CLIENTS[:4])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "selection: {kind: by_size}, buffered: {size: 2, concurrency: 3}",
            "expected kind uniform with scheduling.buf",
        ),
        (
            "selection: {fraction: 0.5, kind: uniform}, buffered: {size: 2, concurrency: 3}",
            "scheduling.selection.fraction",
        ),
        ("over_select: 0.5, buffered: {size: 2, concurrency: 3}", "scheduling.over_select: expected 0"),
        ("buffered: {size: 2, concurrency: 11}", "expected at most the 10 clients of allocation.clients, got 11"),
        ("buffered: {size: 11, concurrency: 3}", "scheduling.buffered.size: expected at most the 10 clients"),
        ("buffered: {size: 2}", "scheduling.buffered.concurrency: expected a value, got nothing"),
        ("buffered: {size: 0, concurrency: 3}", "scheduling.buffered.size"),
        ("buffered: {size: 2, concurrency: 3, k: 3}", "scheduling.buffered.k: expected a known setting"),
    ],
)
def test_impossible_pairs_are_refused_when_the_recipe_is_checked(text: str, words: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_recipe(f"scheduling: {{{text}}}")
    assert words in str(refused.value)


def test_baselines_of_a_buffered_recipe_are_no_mistake() -> None:
    for method, selection in (("centralised", "{kind: uniform}"), ("local", "{kind: named, clients: [client-01]}")):
        buffered = "{size: 2, concurrency: 3}"
        text = f"method: {method}\nscheduling: {{selection: {selection}, buffered: {buffered}}}"
        assert parse_recipe(text).scheduling.buffered == Buffered(2, 3)


# --- whole runs ----------------------------------------------------------------------------------------------

BUFFERED = (
    "scheduling={selection: {kind: uniform}, buffered: {size: 2, concurrency: 3}}",
    "rounds=4",
    "aggregation.server_optimizer={kind: sgd, momentum: 0.9}",
)
VARIANTS = {
    "fedit": BUFFERED,
    "fedbiot": (
        *BUFFERED,
        "method=fedbiot",
        "emulator={adapter_layers: 1, drop: 0.0}",
        "alignment={first_steps: 3, steps: 1, batch_size: 2, fidelity_rows: 3}",
        "evaluation.max_rows=2",
        "rounds=3",
    ),
}


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedRuns]:
    with ForkedRuns(tmp_path_factory.mktemp("forked"), {"CUDA_VISIBLE_DEVICES": ""}) as runs:
        yield runs


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_killed_run_goes_on_to_the_same_bits(forked: ForkedRuns, world: World, tmp_path: Path, variant: str) -> None:
    overrides = VARIANTS[variant]
    whole = forked.run("run", world.recipe, *overrides, "--out", tmp_path / "whole")
    assert whole.code == 0, whole.output
    wanted = result(tmp_path / "whole")
    counted = forked.run("run", world.recipe, *overrides, "--out", tmp_path / "counted", count=True)
    assert result(tmp_path / "counted") == wanted
    calls, draw = counted.disk_calls or 0, random.Random(variant)
    assert calls > 40
    for crash_at in draw.sample(range(1, calls + 1), 10):
        folder = tmp_path / str(crash_at)
        killed = go_on(forked, world, folder, overrides, crash_at=crash_at).wait()
        assert killed.code == -signal.SIGKILL
        ended = go_on(forked, world, folder, overrides).wait()
        assert ended.code == 0, f"killed at disk call {crash_at}:\n{ended.output}"
        assert result(folder) == wanted, f"killed at disk call {crash_at}"


def test_a_run_tells_how_old_updates_were(cli: Callable[..., Said], world: World, tmp_path: Path) -> None:
    said = cli("run", world.recipe, *BUFFERED, "compare={local: 1, centralised: true}", "--out", tmp_path / "run")
    assert said.code == 0, said.all
    rounds = events(tmp_path / "run" / "fedit", "round")
    assert [event["round"] for event in rounds] == [0, 1, 2, 3]
    assert rounds[0]["staleness"] == 0
    assert sum(event["staleness"] for event in rounds) > 0
    assert all("staleness" not in event for event in events(tmp_path / "run" / "centralised", "round"))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Mean age of the updates, in rounds" in page
    summary = json.loads((tmp_path / "run" / "fedit" / "summary.json").read_text())
    assert summary["rounds"] == 4
    assert summary["bytes_up"] == sum(event["bytes_up"] for event in rounds)


def test_a_check_refuses_and_a_resume_names_a_change(cli: Callable[..., Said], world: World, tmp_path: Path) -> None:
    said = cli("check", world.recipe, "scheduling.buffered={size: 2, concurrency: 3}")
    assert said.code == 2, said.all
    assert "scheduling.selection.fraction: expected 1.0 with scheduling.buffered, got 0.5" in said.err
    said = cli("run", world.recipe, *BUFFERED, "rounds=1", "evaluation.generate=false", "--out", tmp_path)
    assert said.code == 0, said.all
    (tmp_path / "summary.json").unlink()
    text = (tmp_path / "recipe.yaml").read_text()
    assert "concurrency: 3" in text
    (tmp_path / "recipe.yaml").write_text(text.replace("concurrency: 3", "concurrency: 4"))
    refused = cli("resume", tmp_path)
    assert refused.code == 2, refused.all
    assert "a change of recipe, scheduling.buffered.concurrency: 3 -> 4" in refused.err
