"""The round loop, by hand on a toy problem: client k pulls three numbers towards its own target."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

import pytest
import torch

from flocktune.aggregation.mean import weighted_mean
from flocktune.algorithms import fedavg
from flocktune.config.schema import AggregationConfig, SchedulingConfig, ServerAdaptive, ServerSgd, Uniform
from flocktune.engine.checkpoint import Checkpoint, CheckpointDamaged, load_checkpoint, save_checkpoint
from flocktune.engine.client import check_update, restored, transformed
from flocktune.engine.in_process import InProcess
from flocktune.engine.ray_worker import pack, unpack
from flocktune.engine.rounds import Hooks, RoundRecord, run_rounds
from flocktune.errors import RoundFailed, UpdateRefused
from flocktune.interfaces import Memory, State, Transform
from flocktune.scheduling import Cohort, select
from flocktune.tensors import digest
from flocktune.types import ClientTask, Failure, Mean, Tensors, Update
from flocktune.wire import build_task, build_update, encoded_size, task_fields, update_fields

TARGETS = {"a": [1.0, 0.0, 0.0], "b": [0.0, 2.0, 0.0], "c": [0.0, 0.0, 4.0]}
WEIGHTS = {"a": 1.0, "b": 2.0, "c": 5.0}
START = {"w": torch.zeros(3)}


def pull(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
    """Three steps of gradient descent on ||w - target||^2 / 2, with a pinch of seeded noise."""
    w = start = task.tensors["w"]
    noise = torch.Generator().manual_seed(task.seed)
    for _ in range(3):
        w = w - 0.1 * (w - torch.tensor(TARGETS[task.client]) + 0.01 * torch.randn(3, generator=noise))
    count = memory.get("calls", torch.zeros(())) + 1
    return Update({"w": w - start}, WEIGHTS[task.client], 1, {"loss": Mean(1.0, 1)}), {"calls": count}


def everyone(round: int) -> Cohort:
    return Cohort(tuple(TARGETS), 3, 2)


def run(
    rounds: int = 4, half=pull, server=None, state: State | None = None, engine=None, schedule=everyone, **more
) -> State:
    server = server or fedavg.server_half(AggregationConfig())
    state = server.init(START) if state is None else state
    return run_rounds(server, engine or InProcess(half), schedule, state, rounds=rounds, kind="toy", seed=7, **more)


def test_fedavg_equals_the_textbook_loop() -> None:
    from flocktune.seeds import derive_seed

    w = torch.zeros(3, dtype=torch.float64)
    for number in range(4):
        trained = {}
        for client, target in TARGETS.items():
            local = w.clone()
            noise = torch.Generator().manual_seed(derive_seed(7, number, client))
            for _ in range(3):
                local -= 0.1 * (local - torch.tensor(target).double() + 0.01 * torch.randn(3, generator=noise).double())
            trained[client] = local
        w = sum(WEIGHTS[client] * value for client, value in trained.items()) / sum(WEIGHTS.values())
    assert run()["adapter/w"].tolist() == pytest.approx(w.tolist(), abs=1e-6)


def test_fedopt_with_sgd_and_rate_one_is_fedavg() -> None:
    plain = run()
    again = run(server=fedavg.server_half(AggregationConfig(server_optimizer=ServerSgd(1.0, 0.0))))
    assert digest(plain) == digest(again)
    assert digest(plain) != digest(run(server=fedavg.server_half(AggregationConfig(server_optimizer=ServerSgd(0.5)))))


@pytest.mark.parametrize(
    "optimizer", [ServerSgd(), ServerSgd(momentum=0.9), ServerAdaptive("adam"), ServerAdaptive("yogi")]
)
@pytest.mark.parametrize("cut", [1, 3])
def test_stopping_and_going_on_changes_no_bit(tmp_path, optimizer, cut: int) -> None:
    server = fedavg.server_half(AggregationConfig(server_optimizer=optimizer))
    whole = run(5, server=server)
    engine = InProcess(pull)

    def save(record: RoundRecord, state: State) -> None:
        save_checkpoint(tmp_path, Checkpoint(record.round + 1, state, engine.memories, {}), keep=2)

    run(cut, server=server, engine=engine, hooks=Hooks(on_round=save))
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.rounds_done == cut
    resumed = InProcess(pull, memories=dict(found.memories))
    assert digest(run(5, server=server, state=found.state, engine=resumed, first_round=cut)) == digest(whole)
    assert resumed.memories["a"]["calls"].item() == 5, "a client's private state is resumed as well"


class OverTheWire:
    """An engine in which every task and every update is turned into bytes and back."""

    def __init__(self) -> None:
        self.memories: dict[str, Memory] = {}

    def run(self, tasks: Iterable[ClientTask], wanted: int) -> Iterator[Update | Failure]:
        received = (build_task(*unpack(pack(task_fields(task), task.tensors))) for task in tasks)
        for reply in InProcess(pull).run(received, wanted):
            assert isinstance(reply, Update)
            yield build_update(*unpack(pack(update_fields(reply), reply.delta)))


def test_over_the_wire_equals_in_process_bit_for_bit() -> None:
    assert digest(run(engine=OverTheWire())) == digest(run())


def test_one_client_is_local_training() -> None:
    state = run(schedule=lambda number: Cohort(("b",), 1, 1))
    w = torch.zeros(3)
    from flocktune.seeds import derive_seed

    for number in range(4):
        task = ClientTask(number, "b", "toy", {"w": w}, derive_seed(7, number, "b"), "")
        w = w + pull(task, {})[0].delta["w"]
    assert torch.equal(state["adapter/w"], w)


def broken(client: str, how) -> object:
    def half(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
        update, new = pull(task, memory)
        return (how(update), new) if task.client == client else (update, new)

    return half


def explode(update: Update) -> Update:
    raise RuntimeError("out of memory")


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (explode, "RuntimeError: out of memory"),
        (lambda u: replace(u, delta={"w": torch.tensor([0.0, math.nan, 0.0])}), "w: NaN"),
        (lambda u: replace(u, delta={"w": torch.zeros(4)}), "expected shape (3,), got (4,)"),
        (lambda u: replace(u, delta={}), "w: missing"),
        (lambda u: replace(u, delta={**u.delta, "evil": torch.zeros(1)}), "evil: not expected"),
        (lambda u: replace(u, delta={"w": u.delta["w"].double()}), "expected torch.float32, got torch.float64"),
        (lambda u: replace(u, weight=0.0), "weight: expected a positive number"),
        (lambda u: replace(u, weight=-1.0), "weight"),
        (lambda u: replace(u, weight=math.inf), "weight"),
        (lambda u: replace(u, weight=math.nan), "weight"),
        (lambda u: replace(u, clients=0), "clients: expected at least 1"),
        (lambda u: replace(u, clients=1000, weight=1000.0), "clients: expected 1, got 1000"),
    ],
)
def test_a_bad_client_is_left_out_with_its_reason(how, reason: str) -> None:
    records: list[RoundRecord] = []
    state = run(1, half=broken("b", how), hooks=Hooks(on_round=lambda record, _: records.append(record)))
    (failure,) = records[0].failures
    assert failure.client == "b"
    assert reason in failure.reason
    assert list(records[0].clients) == ["a", "c"]
    without = run(1, schedule=lambda number: Cohort(("a", "c"), 2, 1))
    assert torch.equal(state["adapter/w"], without["adapter/w"]), "as if the client had been absent"


def test_below_the_quorum_the_round_fails_and_names_every_reason() -> None:
    seen: list[RoundRecord] = []

    def half(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
        if task.round == 1 and task.client in "ab":
            raise ValueError(f"{task.client} is tired")
        return pull(task, memory)

    with pytest.raises(
        RoundFailed, match=r"(?s)round 2: expected updates of at least 2 clients, got 1.*a is tired.*b is tired"
    ):
        run(half=half, hooks=Hooks(on_round=lambda record, _: seen.append(record)))
    assert [record.round for record in seen] == [0], "a failed round reaches no checkpoint"


def test_a_round_without_anyone_fails() -> None:
    with pytest.raises(RoundFailed, match="got 0"):
        run(schedule=lambda number: Cohort((), 2, 1))


def test_over_selection_uses_the_first_usable_updates() -> None:
    asked: list[str] = []

    def half(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
        asked.append(task.client)
        if task.client == "a":
            raise ValueError("gone")
        return pull(task, memory)

    records: list[RoundRecord] = []
    run(
        1,
        half=half,
        schedule=lambda n: Cohort(("a", "b", "c"), 1, 1),
        hooks=Hooks(on_round=lambda r, _: records.append(r)),
    )
    assert asked == ["a", "b"], "nobody is asked once there is enough"
    assert list(records[0].clients) == ["b"]
    assert records[0].bytes_down == 2 * records[0].bytes_up
    assert sum(client.bytes_up or 0 for client in records[0].clients.values()) == encoded_size(START)


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


def test_a_stop_is_taken_between_rounds() -> None:
    done: list[int] = []
    run(10, hooks=Hooks(on_round=lambda record, _: done.append(record.round), should_stop=lambda: len(done) == 3))
    assert done == [0, 1, 2]


def test_a_method_may_bring_its_own_combine() -> None:
    def last(updates: Iterable[Update], message: Tensors) -> Update:
        *_, final = updates
        return final

    server = replace(fedavg.server_half(AggregationConfig()), combine=last)
    only_c = run(1, schedule=lambda n: Cohort(("c",), 1, 1))
    assert torch.equal(run(1, server=server)["adapter/w"], only_c["adapter/w"])


def test_selection_by_seed_and_round_is_the_same_after_a_resume() -> None:
    scheduling = SchedulingConfig(Uniform(0.67))
    sizes = dict.fromkeys(TARGETS, 1)

    def schedule(number: int) -> Cohort:
        return select(scheduling, sizes, round=number, seed=3)

    whole = run(6, schedule=schedule)
    half = run(3, schedule=schedule)
    assert digest(run(6, schedule=schedule, state=half, first_round=3)) == digest(whole)


def test_check_update_lists_all_problems_at_once() -> None:
    with pytest.raises(UpdateRefused) as refused:
        check_update(START, Update({"v": torch.ones(1)}, -1.0, 0))
    for words in ("v: not expected", "w: missing", "weight", "clients"):
        assert words in str(refused.value)


# --- checkpoints -----------------------------------------------------------------------------------------


def save_rounds(folder, count: int) -> None:
    for number in range(1, count + 1):
        state = {"adapter/w": torch.full((3,), float(number))}
        save_checkpoint(folder, Checkpoint(number, state, {"a": {"m": torch.ones(1)}}, {"seed": 1}), keep=2)


def test_only_the_newest_checkpoints_are_kept(tmp_path) -> None:
    save_rounds(tmp_path, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"round-0000{n}.{kind}" for n in (4, 5) for kind in ("json", "safetensors")
    ]
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert (found.rounds_done, found.identity) == (5, {"seed": 1})
    assert found.state["adapter/w"].tolist() == [5.0] * 3
    assert found.memories["a"]["m"].item() == 1


def flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip(folder / "round-00003.safetensors"),
        lambda folder: (folder / "round-00003.safetensors").write_bytes(b""),
        lambda folder: (folder / "round-00003.safetensors").unlink(),
        lambda folder: (folder / "round-00003.json").write_text("{"),
        lambda folder: (folder / "round-00003.json").write_text("{}"),
        lambda folder: (folder / "round-00003.json").unlink(),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, damage, caplog) -> None:
    save_rounds(tmp_path, 3)
    damage(tmp_path)
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.rounds_done == 2
    unfinished = not (tmp_path / "round-00003.json").exists()
    assert unfinished or "damaged checkpoint" in caplog.text


def test_without_a_sound_checkpoint_every_one_is_named(tmp_path) -> None:
    assert load_checkpoint(tmp_path) is None
    save_rounds(tmp_path, 2)
    flip(tmp_path / "round-00001.safetensors")
    flip(tmp_path / "round-00002.safetensors")
    with pytest.raises(CheckpointDamaged, match=r"(?s)round-00002.*round-00001"):
        load_checkpoint(tmp_path)


def test_a_client_is_sent_what_is_addressed_to_it_and_its_update_is_checked_against_that() -> None:
    seen: dict[str, int] = {}

    def narrow(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
        seen[task.client] = len(task.tensors["w"])
        wrong = 1 if task.client == "b" else 0  # one value more than it was sent
        return Update({"w": torch.ones(len(task.tensors["w"]) + wrong)}, 1.0), memory

    def padded(updates: Iterable[Update], message: Tensors) -> Update:
        rows = [torch.nn.functional.pad(update.delta["w"], (0, 3 - len(update.delta["w"]))) for update in updates]
        return Update({"w": torch.stack(rows).sum(0)}, 1.0, len(rows))

    widths = {"a": {"w": torch.zeros(1)}, "b": {"w": torch.zeros(2)}, "c": START}
    server = replace(
        fedavg.server_half(AggregationConfig()), addressed=lambda message, client: widths[client], combine=padded
    )
    records: list[RoundRecord] = []
    state = run(1, narrow, server, hooks=Hooks(on_round=lambda record, _: records.append(record)))
    assert seen == {"a": 1, "b": 2, "c": 3}
    assert state["adapter/w"].tolist() == [2.0, 1.0, 1.0]
    assert [failure.client for failure in records[0].failures] == ["b"]
    assert "expected shape (2,), got (3,)" in records[0].failures[0].reason
    assert records[0].bytes_down == sum(encoded_size(tensors) for tensors in widths.values())


def test_a_cohort_that_may_be_empty_changes_nothing_when_it_is() -> None:
    before = fedavg.server_half(AggregationConfig()).init(START)
    records: list[RoundRecord] = []
    hooks = Hooks(on_round=lambda record, _: records.append(record))
    state = run(1, schedule=lambda number: Cohort((), 0, 0), hooks=hooks)
    assert digest(state) == digest(before)
    assert (records[0].clients, records[0].bytes_down, records[0].update_norm) == ({}, 0, 0.0)
    with pytest.raises(RoundFailed, match="at least 1"):
        run(1, schedule=lambda number: Cohort((), 1, 1))


def test_one_sum_of_many_clients_counts_as_all_of_them() -> None:
    """As secure aggregation has it: the loop sees no client's own update, and takes the sum for their mean."""

    def summed(engine, tasks, cohort) -> Iterator[tuple[tuple[str, ...], Update | Failure]]:
        replies = list(engine.run(tasks, cohort.wanted))
        yield ("a",), Failure("a", "gone")
        rest = weighted_mean(reply for reply in replies[1:] if isinstance(reply, Update))
        yield ("b", "c"), rest

    records: list[RoundRecord] = []
    hooks = Hooks(on_round=lambda record, _: records.append(record))
    state = run(1, collect=summed, hooks=hooks)
    without_a = run(1, schedule=lambda number: Cohort(("b", "c"), 2, 2))
    assert torch.equal(state["adapter/w"], without_a["adapter/w"])
    assert list(records[0].clients) == ["b", "c"]
    assert records[0].clients["b"].metrics == {}
    assert records[0].clients["b"].bytes_up is None, "of a sum nothing is known of one"
    assert records[0].clients["b"].weight == (WEIGHTS["b"] + WEIGHTS["c"]) / 2
    assert records[0].bytes_up == 3 * encoded_size(START)
    with pytest.raises(RoundFailed, match="at least 3"):
        run(1, collect=summed, schedule=lambda number: Cohort(tuple(TARGETS), 3, 3))


def test_a_transform_has_its_own_part_of_memory_and_of_the_message() -> None:
    def half(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
        assert list(task.tensors) == ["w"]
        assert set(memory) <= {"own"}
        return Update({"w": task.tensors["w"] + 1}, 1.0), {"own": torch.ones(1)}

    def count(update: Update, task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
        assert set(memory) <= {"count"}
        step = task.tensors["counter/step"]
        return update, {"count": memory.get("count", torch.zeros(())) + step}

    whole = transformed(half, [Transform("counter", count, lambda update, expected: update)])
    task = ClientTask(0, "a", "toy", {"w": torch.zeros(1), "counter/step": torch.tensor(2.0)}, 1, "")
    memory: Memory = {}
    for times in range(1, 4):
        _, memory = whole(task, memory)
        assert set(memory) == {"own", "counter/count"}
        assert float(memory["counter/count"]) == 2.0 * times
    assert transformed(half, []) is half


def test_what_travels_is_checked_before_and_after_it_is_undone() -> None:
    def halve(expected: Tensors) -> Tensors:
        return {"w": torch.zeros(len(expected["w"]), dtype=torch.bfloat16)}

    def back(update: Update, expected: Tensors) -> Update:
        wide = update.delta["w"].float()
        return replace(update, delta={"w": wide / 0 if float(wide[0]) == 7 else wide})

    transform = Transform("half", lambda update, task, memory: (update, memory), back, halve)
    sound = Update({"w": torch.ones(3, dtype=torch.bfloat16)}, 1.0)
    assert restored(sound, [transform], START).delta["w"].dtype == torch.float32
    with pytest.raises(UpdateRefused, match=r"expected torch\.bfloat16, got torch\.float32"):
        restored(Update({"w": torch.ones(3)}, 1.0), [transform], START)
    with pytest.raises(UpdateRefused, match="NaN or infinite"):
        restored(Update({"w": torch.full((3,), 7.0, dtype=torch.bfloat16)}, 1.0), [transform], START)


def test_what_a_client_no_longer_keeps_is_gone() -> None:
    """As the secrets of a round of secure aggregation: they must not be in the checkpoint that follows."""

    def half(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
        if task.round == 2:
            raise RuntimeError("at the third round")
        update = Update({"w": torch.zeros(3)}, 1.0)
        return update, {} if memory else {"secret": torch.ones(1)}

    engine = InProcess(half)
    kept: list[set[str]] = []
    hooks = Hooks(on_round=lambda record, state: kept.append(set(engine.memories)))
    run(2, engine=engine, hooks=hooks)
    assert kept == [set(TARGETS), set()]
    engine.memories["a"] = {"secret": torch.ones(1)}
    with pytest.raises(RoundFailed):
        run(3, engine=engine, state=fedavg.server_half(AggregationConfig()).init(START), first_round=2)
    assert set(engine.memories) == {"a"}, "a client that fails keeps what it had"
