"""Rounds of secure aggregation: the same sum as without it, clients that drop out, all that a server gets to see."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flocktune.cohorts import scheduler
from flocktune.config.load import parse_recipe
from flocktune.config.secure_aggregation import (
    CONSISTENCY,
    KEYS,
    MASKED,
    PHASES,
    SHARES,
    UNMASK,
    SecureAggregationConfig,
)
from flocktune.engine.in_process import InProcess
from flocktune.engine.rounds import Hooks, RoundRecord, one_by_one, run_rounds
from flocktune.engine.secure import secure
from flocktune.errors import RoundFailed, UserError
from flocktune.estimate import estimate
from flocktune.interfaces import ClientHalf, Memory, ServerHalf
from flocktune.privacy.secagg import client as protocol
from flocktune.privacy.secagg import masks, shamir
from flocktune.privacy.secagg.fixed_point import TOTALS, Encoding, encode_totals, flat, least_to_unmask
from flocktune.privacy.secagg.half import CLIPPED, secure_half
from flocktune.privacy.secagg.messages import IDENTITY, PEERS, STATE, as_bytes, as_tensor, from_client, unpacked
from flocktune.protection import collect_of, secured
from flocktune.scheduling import Cohort
from flocktune.tensors import add_scaled
from flocktune.types import ClientTask, Failure, Mean, Tensors, Update

NAMES = tuple(f"client-{number}" for number in range(6))
START = {"z": torch.zeros(3, 5), "a": torch.zeros(2), "m": torch.zeros(4, 1)}
SIZE = 21
SETTINGS = SecureAggregationConfig()
SERVER = ServerHalf(
    init=lambda tensors: tensors,
    message=lambda state, round: state,
    step=lambda state, update: add_scaled(state, update.delta),
    result=lambda state: state,
)


def trained(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
    """An update that depends on client, round and what came; it counts its calls in its memory."""
    place = NAMES.index(task.client)
    noise = torch.Generator().manual_seed(task.seed)
    delta = {
        name: 0.1 * torch.randn(value.shape, generator=noise) + 0.01 * (place - value)
        for name, value in task.tensors.items()
    }
    count = memory.get("count", torch.tensor(0)) + 1
    metrics = {"loss": Mean(3.5 * place, 7.0), "tokens": Mean(11.0 + place, 1)}
    return Update(delta, 1.0 + place, 1, metrics), {"count": count}


def equal(half: ClientHalf) -> ClientHalf:
    """Every client counts the same."""

    def train(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
        update, after = half(task, memory)
        return replace(update, weight=1.0), after

    return train


@dataclass
class Watched:
    """Clients in this process; all that passes, and faults. ``lost``: (client, kind) whose reply does not come."""

    half: ClientHalf
    lost: set[tuple[str, str]] = field(default_factory=set)
    absent: set[tuple[str, str]] = field(default_factory=set)
    change_task: Callable[[ClientTask], ClientTask] = lambda task: task
    change_reply: Callable[[ClientTask, Update], Update] = lambda task, reply: reply
    memories: dict[str, Memory] = field(default_factory=dict)
    down: list[ClientTask] = field(default_factory=list)
    up: list[tuple[ClientTask, Update | Failure]] = field(default_factory=list)

    def run(self, tasks: Iterable[ClientTask], wanted: int) -> Iterator[Update | Failure]:
        inside = InProcess(self.half, self.memories)
        for task in map(self.change_task, tasks):
            self.down.append(task)
            if (task.client, task.kind) in self.absent:
                yield Failure(task.client, "not connected")
                continue
            (reply,) = inside.run([task], 1)
            if isinstance(reply, Update):
                reply = self.change_reply(task, reply)
            self.up.append((task, reply))
            yield Failure(task.client, "no answer") if (task.client, task.kind) in self.lost else reply

    def stream(self, issue: object) -> Iterator[tuple[ClientTask, Update | Failure]]:
        raise NotImplementedError

    def sent(self, client: str, kind: str) -> Update:
        """What a client answered last in a phase, whether it arrived or not."""
        (*_, reply) = (reply for task, reply in self.up if (task.client, task.kind) == (client, kind))
        assert isinstance(reply, Update), reply
        return reply


def run(
    engine: object,
    settings: SecureAggregationConfig | None = SETTINGS,
    *,
    names: Sequence[str] = NAMES,
    wanted: int = 0,
    quorum: int = 1,
    first_round: int = 0,
    rounds: int = 1,
    start: Tensors = START,
    seed: int = 5,
) -> tuple[Tensors, list[RoundRecord]]:
    """Rounds over ``engine``: the last state, and what happened."""
    records: list[RoundRecord] = []
    more = {"collect": secure(settings, lambda task: task.tensors)} if settings else {}
    cohort = Cohort(tuple(names), wanted or len(names), quorum)
    state = run_rounds(
        SERVER,
        engine,  # type: ignore[arg-type]
        lambda round: cohort,
        start,
        first_round=first_round,
        rounds=rounds,
        kind="plain",
        seed=seed,
        hooks=Hooks(on_round=lambda record, state: records.append(record)),
        **more,  # type: ignore[arg-type]
    )
    return state, records


def watched(half: ClientHalf = trained, settings: SecureAggregationConfig = SETTINGS, **faults: object) -> Watched:
    if settings.max_weight is None:
        half = equal(half)
    return Watched(secure_half(half, settings), **faults)  # type: ignore[arg-type]


# --- the sum ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [SETTINGS, SecureAggregationConfig(max_weight=6.0), SecureAggregationConfig(range=0.7, max_weight=10.0)],
    ids=["equal", "weighted", "weighted, below the bound"],
)
def test_the_secure_mean_is_the_mean(settings: SecureAggregationConfig) -> None:
    half = trained if settings.max_weight else equal(trained)
    (secret, records), (plain, expected) = run(watched(settings=settings), settings), run(InProcess(half), None)
    step = Encoding(settings.range, len(NAMES)).step
    bound = len(NAMES) * step / 2 * (settings.max_weight or 1) / expected[0].clients.__len__() + 1e-7
    for name in START:
        assert (secret[name] - plain[name]).abs().max() <= bound
    (record,) = records
    assert list(secret) == list(START)
    assert set(record.clients) == set(NAMES)
    weight = sum(client.weight for client in expected[0].clients.values())
    assert sum(client.weight for client in record.clients.values()) == pytest.approx(weight, abs=1e-5)
    for name in ("loss", "tokens"):
        assert record.metrics[name].total == pytest.approx(expected[0].metrics[name].total, abs=1e-5)
        assert record.metrics[name].count == pytest.approx(expected[0].metrics[name].count, abs=1e-5)
    assert record.metrics["seconds"].count == len(NAMES)
    assert all(client.metrics == {} for client in record.clients.values()), "of one nothing is known"


def test_rounds_follow_each_other_and_memory_goes_on() -> None:
    engine = watched()
    secret, _ = run(engine, rounds=3)
    plain, _ = run(InProcess(equal(trained)), None, rounds=3)
    for name in START:
        assert (secret[name] - plain[name]).abs().max() < 1e-6
    assert all(int(memory["count"]) == 3 for memory in engine.memories.values())


def test_weights_and_values_beyond_their_bounds_are_clipped_and_said(caplog: pytest.LogCaptureFixture) -> None:
    settings = SecureAggregationConfig(range=0.05, max_weight=2.0)
    _, (record,) = run(watched(settings=settings), settings)
    assert {round(client.weight, 3) for client in record.clients.values()} == {round((1 + 2 * 5) / 6, 3)}
    clipped = record.metrics[CLIPPED]
    assert 0 < clipped.total < clipped.count == SIZE * len(NAMES)
    assert "values were clipped to secure_aggregation.range 0.05" in caplog.text


def test_the_sum_does_not_depend_on_the_secrets() -> None:
    """So a round that was cut off is repeated to the same bits."""
    one, other = run(watched(), rounds=2)[0], run(watched(), rounds=2)[0]
    assert all(torch.equal(one[name], other[name]) for name in START)


def test_over_selection_takes_the_first_that_answer() -> None:
    engine = watched(absent={(NAMES[1], KEYS)})
    _, (record,) = run(engine, wanted=4)
    assert set(record.clients) == {NAMES[0], *NAMES[2:5]}
    assert NAMES[5] not in {task.client for task in engine.down}


# --- who drops out ---------------------------------------------------------------------------------------


def expected_sum(survivors: Sequence[str], listed: int, tasks: Sequence[ClientTask]) -> np.ndarray:
    """The decoded sum of what these clients encode, bit for bit."""
    total = np.zeros(SIZE, np.uint32)
    encoding = Encoding(SETTINGS.range, listed)
    for task in tasks:
        if task.client in survivors:
            plain = {name: value for name, value in task.tensors.items() if not name.startswith("secagg/")}
            update, _ = trained(replace(task, tensors=plain), {})
            total += encoding.encode(flat(update.delta))[0]
    return encoding.decode(total)


@settings(max_examples=60, deadline=None)
@given(
    faults=st.dictionaries(
        st.sampled_from(NAMES), st.tuples(st.sampled_from(PHASES), st.sampled_from(["lost", "absent"])), max_size=5
    )
)
def test_the_sum_of_those_who_stayed_is_exact_down_to_the_threshold(faults: dict[str, tuple[str, str]]) -> None:
    sets = {
        how: {(client, kind) for client, (kind, what) in faults.items() if what == how} for how in ("lost", "absent")
    }
    engine = watched(**sets)
    gone = {
        kind: {client for client, (at, _) in faults.items() if PHASES.index(at) <= PHASES.index(kind)}
        for kind in PHASES
    }
    listed = len(NAMES) - len(gone[KEYS])
    needed = least_to_unmask(SETTINGS.threshold, SETTINGS.min_clients, listed)
    if listed < SETTINGS.min_clients or len(NAMES) - len(gone[UNMASK]) < needed:
        with pytest.raises(RoundFailed) as failed:
            run(engine)
        # Whoever had dropped out by then is named with phase and reason; who would have later, is not.
        for failure in failed.value.failures:
            kind, what = faults[failure.client]
            assert failure.reason == f"{kind}: {'no answer' if what == 'lost' else 'not connected'}"
        assert failed.value.failures
    else:
        state, (record,) = run(engine)
        survivors = [name for name in NAMES if name not in gone[MASKED]]
        total = expected_sum(survivors, listed, [task for task in engine.down if task.kind == MASKED])
        got = np.concatenate([state[name].reshape(-1).numpy() for name in sorted(state)])
        assert np.array_equal(got, (total / len(survivors)).astype(np.float32))
        assert set(record.clients) == set(survivors)
        assert {failure.client for failure in record.failures} == gone[MASKED]
    assert not any(STATE in memory for memory in engine.memories.values()), "secrets go with the round"


def test_a_round_of_too_few_fails_and_says_which_setting() -> None:
    with pytest.raises(RoundFailed, match=r"at least 3 clients, got 2(.|\n)*secure_aggregation.min_clients"):
        run(watched(), names=NAMES[:2])
    engine = watched()
    state, (record,) = run(engine, names=(), quorum=0)
    assert all(torch.equal(state[name], START[name]) for name in START), "a cohort of nobody changes nothing"
    assert record.clients == {}


def test_a_failed_clients_reason_is_kept() -> None:
    def half(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
        if task.client == NAMES[2]:
            raise ValueError("a disk on fire")
        return trained(task, memory)

    _, (record,) = run(watched(half))
    assert [failure.reason for failure in record.failures] == ["secagg/masked: ValueError: a disk on fire"]


@pytest.mark.parametrize(
    "change",
    [
        lambda update: replace(update, delta={**update.delta, "a": torch.tensor([1.0, math.nan])}),
        lambda update: replace(update, weight=0.0),
        lambda update: replace(update, weight=math.inf),
        lambda update: replace(update, metrics={"loss": Mean(math.nan, 1)}),
        lambda update: replace(update, metrics={f"metric {n}": Mean() for n in range(64)}),
        lambda update: replace(update, delta={"a": update.delta["a"]}),
        lambda update: replace(update, metrics={}),
    ],
)
def test_what_has_no_place_in_a_sum_is_left_out(change: Callable[[Update], Update]) -> None:
    def half(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
        update, after = equal(trained)(task, memory)
        return (change(update) if task.client == NAMES[2] else update), after

    engine = Watched(secure_half(half, SETTINGS))
    _, (record,) = run(engine)
    assert [failure.client for failure in record.failures] == [NAMES[2]]
    assert NAMES[2] not in record.clients


def test_a_run_that_was_killed_within_a_round_does_it_again_to_the_same_bits() -> None:
    whole, _ = run(watched(), rounds=2)
    engine = watched()
    state, _ = run(engine, rounds=1)
    kept = {client: dict(memory) for client, memory in engine.memories.items()}  # what the checkpoint has

    def die(task: ClientTask) -> ClientTask:
        if task.kind == UNMASK:
            raise KeyboardInterrupt
        return task

    engine.change_task = die
    with pytest.raises(KeyboardInterrupt):
        run(engine, first_round=1, rounds=2, start=state)
    again, _ = run(watched(memories=kept), first_round=1, rounds=2, start=state)
    assert all(torch.equal(again[name], whole[name]) for name in START)


# --- what the server sees --------------------------------------------------------------------------------


def vectors(engine: Watched, client: str) -> tuple[np.ndarray, np.ndarray]:
    """A client's masked values and totals, as they left it."""
    delta = engine.sent(client, MASKED).delta
    return delta["secagg/values"].numpy().view(np.uint32), delta["secagg/totals"].numpy().view(np.uint64)


def known_masks(engine: Watched, listed: Sequence[str]) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Every secret that all revealed shares give: own masks, and private mask keys, by client."""
    threshold = least_to_unmask(SETTINGS.threshold, SETTINGS.min_clients, len(listed))
    rows = {task.client: reply.delta["secagg/revealed"] for task, reply in engine.up if task.kind == UNMASK}  # type: ignore[union-attr]
    own, keys = {}, {}
    for place, name in enumerate(listed):
        shares = {listed.index(who) + 1: as_bytes(row[place]) for who, row in rows.items()}
        secret = shamir.join(shares, threshold) if any(any(share) for share in shares.values()) else b""
        entry = as_bytes(engine.sent(name, KEYS).delta["secagg/keys"])
        if secret and masks.public_key(secret) == entry[32:64]:
            keys[name] = secret
        elif secret:
            own[name] = secret
    return own, keys


def attacks(
    engine: Watched, client: str, listed: Sequence[str], context: bytes
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A client's vectors with any of the masks taken away that the server can compute, in every combination."""
    own, keys = known_masks(engine, listed)
    entries = {name: as_bytes(engine.sent(name, KEYS).delta["secagg/keys"]) for name in listed}
    steps: list[tuple[tuple[bytes, bytes], int]] = []
    if client in own:
        steps.append((protocol.own_keys(context, client, own[client]), -1))
    for other in listed:
        private = keys.get(other) or keys.get(client)
        if other != client and private:
            public = entries[client if other in keys else other][32:64]
            pair = protocol.pair_keys(context, private, public, client, other)
            steps.append((pair, -1 if listed.index(client) < listed.index(other) else 1))
    for chosen in range(2 ** len(steps)):
        values, totals = (part.copy() for part in vectors(engine, client))
        for place, (pair, sign) in enumerate(steps):
            if chosen >> place & 1:
                protocol.add_masks(values, totals, pair, sign)
        yield values, totals


def test_no_combination_of_all_that_the_server_sees_gives_one_clients_values() -> None:
    """One client's values arrive too late: its masks with others become known. The others' own masks do."""
    late = NAMES[2]
    engine = watched(lost={(late, MASKED)})
    _, (record,) = run(engine)
    assert late not in record.clients
    own, keys = known_masks(engine, NAMES)
    assert set(own) == set(NAMES) - {late}
    assert set(keys) == {late}, "never both of one client"
    attempt = next(as_bytes(task.tensors["secagg/attempt"]) for task in engine.down if task.kind == KEYS)
    first = engine.down[0]
    context = context_of(first, attempt)
    encoding = Encoding(SETTINGS.range, len(NAMES))
    for task in (task for task in engine.down if task.kind == MASKED):
        plain = {name: value for name, value in task.tensors.items() if not name.startswith("secagg/")}
        update, _ = equal(trained)(replace(task, tensors=plain), {})
        values, _ = encoding.encode(flat(update.delta))
        metrics = {**update.metrics, CLIPPED: Mean(0, SIZE)}
        totals = encode_totals(1.0, metrics, len(NAMES))
        tries = list(attacks(engine, task.client, NAMES, context))
        assert len(tries) == (2 ** (len(NAMES) - 1) if task.client == late else 4)
        for found in tries:
            assert (found[0] == values).mean() < 0.2, task.client
            assert (found[1] == totals).mean() < 0.05, task.client


def context_of(task: ClientTask, attempt: bytes) -> bytes:
    import hashlib

    from flocktune.privacy.secagg.messages import asked_for

    return hashlib.sha256(masks.framed(asked_for(task), attempt)).digest()


def test_the_attack_finds_values_that_lack_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: without own masks the late client's values are there, without pairs' everyone's."""
    for spared, client in (("own_keys", NAMES[2]), ("pair_keys", NAMES[0])):
        with monkeypatch.context() as patch:
            from flocktune.privacy.secagg import server

            nothing = lambda *given: (b"", b"")  # noqa: E731
            add = protocol.add_masks

            def add_all_but(
                values: np.ndarray, totals: np.ndarray, keys: tuple[bytes, bytes], sign: int, add: object = add
            ) -> None:
                if keys != (b"", b""):
                    add(values, totals, keys, sign)  # type: ignore[operator]

            for module in (protocol, server):
                patch.setattr(module, spared, nothing)
                patch.setattr(module, "add_masks", add_all_but)
            engine = watched(lost={(NAMES[2], MASKED)})
            run(engine)
            task = next(task for task in engine.down if (task.client, task.kind) == (client, MASKED))
            attempt = next(as_bytes(task.tensors["secagg/attempt"]) for task in engine.down if task.kind == KEYS)
            plain = {name: value for name, value in task.tensors.items() if not name.startswith("secagg/")}
            update, _ = equal(trained)(replace(task, tensors=plain), {})
            values, _ = Encoding(SETTINGS.range, len(NAMES)).encode(flat(update.delta))
            found = attacks(engine, client, NAMES, context_of(task, attempt))
            assert any(np.array_equal(values, each) for each, _ in found)


def test_every_field_that_a_client_sends_is_one_of_these() -> None:
    """Names, shapes and dtypes of all phases; nothing else, no weight, no number of a metric."""
    engine = watched()
    run(engine)
    count = len(NAMES)
    byte = torch.uint8
    expected = {
        KEYS: {"secagg/keys": ((160,), byte)},
        SHARES: {"secagg/shares": ((count, 148), byte), "secagg/commitment": ((32,), byte)},
        MASKED: {"secagg/values": ((SIZE,), torch.int32), "secagg/totals": ((TOTALS,), torch.int64)},
        CONSISTENCY: {"secagg/signature": ((64,), byte)},
        UNMASK: {"secagg/revealed": ((count, 66), byte)},
    }
    assert [task.kind for task in engine.down] == [kind for kind in PHASES for _ in NAMES]
    for task, reply in engine.up:
        assert isinstance(reply, Update)
        assert {name: (tuple(value.shape), value.dtype) for name, value in reply.delta.items()} == expected[task.kind]
        wanted = from_client(task, START)
        assert {name: (value.shape, value.dtype) for name, value in wanted.items()} == {
            name: (value.shape, value.dtype) for name, value in reply.delta.items()
        }
        told = {name: mean for name, mean in reply.metrics.items() if name != "seconds"}
        names = ("loss", "tokens", CLIPPED) if task.kind == MASKED else ()
        assert (reply.weight, reply.clients, told) == (1.0, 1, dict.fromkeys(names, Mean()))


def test_no_phases_bytes_hold_a_value_or_a_secret() -> None:
    engine = watched()
    run(engine)
    seen = b"".join(as_bytes(value) for task in engine.down for value in task.tensors.values() if task.kind != MASKED)
    seen += b"".join(as_bytes(value) for _, reply in engine.up for value in reply.delta.values())  # type: ignore[union-attr]
    encoding = Encoding(SETTINGS.range, len(NAMES))
    for task in (task for task in engine.down if task.kind == MASKED):
        plain = {name: value for name, value in task.tensors.items() if not name.startswith("secagg/")}
        delta = flat(equal(trained)(replace(task, tensors=plain), {})[0].delta)
        for form in (delta, delta.astype(np.float64), encoding.encode(delta)[0]):
            assert not any(form[place : place + 2].tobytes() in seen for place in range(SIZE - 1))
        assert as_bytes(engine.memories[task.client][IDENTITY]) not in seen


def test_masked_vectors_are_uniform_whatever_is_in_them() -> None:
    """Chi-square of bytes, for each client and each pair's difference; of a sum alike, two inputs look alike."""
    start = {"w": torch.zeros(60_000)}
    for sign in (1, -1):

        def half(task: ClientTask, memory: Memory, sign: int = sign) -> tuple[Update, Memory]:
            size = {NAMES[0]: 0.5 * sign, NAMES[1]: -0.5 * sign}.get(task.client, 0.0)
            return Update({"w": torch.full((60_000,), size)}, 1.0), memory

        engine = watched(half)
        state, _ = run(engine, start=start)
        assert state["w"].abs().max() == 0, "the sum is the same, nothing, for both"
        sent = [vectors(engine, client)[0] for client in NAMES]
        differences = [one - other for place, one in enumerate(sent) for other in sent[:place]]
        for vector in (*sent, *differences):
            counts = np.bincount(vector.view(np.uint8), minlength=256)
            expected = 4 * vector.size / 256
            assert ((counts - expected) ** 2 / expected).sum() < 400  # 255 degrees of freedom: 1e-7 at 400
        totals = np.concatenate([vectors(engine, client)[1] for client in NAMES]).view(np.uint8)
        counts = np.bincount(totals, minlength=256)
        assert ((counts - totals.size / 256) ** 2 / (totals.size / 256)).sum() < 400


def test_no_key_mask_or_vector_comes_twice() -> None:
    """The same clients, the same values, two rounds and two runs: nothing that left is alike."""
    seen: list[bytes] = []
    for _ in range(2):
        engine = watched()
        run(engine, rounds=2)
        for task, reply in engine.up:
            assert isinstance(reply, Update)
            for name, value in reply.delta.items():
                if (task.kind, name) != (UNMASK, "secagg/revealed"):
                    seen.append(as_bytes(value))
    assert len(set(seen)) == len(seen)


# --- a server that does not follow the protocol ---------------------------------------------------------


def refused_all(engine: Watched, words: str) -> None:
    """The round fails, and the reason is in it."""
    with pytest.raises(RoundFailed) as failed:
        run(engine)
    assert words in str(failed.value), failed.value


def changed(task: ClientTask, **parts: torch.Tensor) -> ClientTask:
    return replace(task, tensors={**task.tensors, **{f"secagg/{name}": value for name, value in parts.items()}})


def test_a_man_in_the_middle_is_refused() -> None:
    """The server lists keys of its own making under a client's name: by a new identity, or under the old signature."""
    engine = watched()
    run(engine)  # everyone has seen everyone

    def swapped(task: ClientTask) -> ClientTask:
        if task.kind != SHARES or task.client == NAMES[1]:
            return task
        keys = task.tensors["secagg/keys"].clone()
        context = protocol.from_bytes(as_bytes(engine.memories[task.client][STATE])).context
        _, mine = protocol.advertise(b"", context, NAMES[1], b"m" * 32, lambda count: b"m" * count)
        keys[1] = as_tensor(mine.packed)
        return changed(task, keys=keys)

    engine.change_task = swapped
    refused_all(engine, "client-1 has another identity key than the one that was seen first")

    def spliced(task: ClientTask) -> ClientTask:
        if task.kind != SHARES or task.client == NAMES[1]:
            return task
        keys = task.tensors["secagg/keys"].clone()
        keys[1, 32:64] = as_tensor(masks.public_key(b"m" * 32))
        return changed(task, keys=keys)

    engine.change_task = spliced
    refused_all(engine, "the keys of client-1 are not signed by its identity for this round")


def test_a_client_is_listed_to_itself_by_its_own_identity() -> None:
    """Else the server could sign for it in the list that it is shown, the first time."""
    engine = watched()

    def swapped(task: ClientTask) -> ClientTask:
        if task.kind != SHARES or task.client != NAMES[1]:
            return task
        keys = task.tensors["secagg/keys"].clone()
        context = protocol.from_bytes(as_bytes(engine.memories[task.client][STATE])).context
        mine, who = unpacked(NAMES[1], as_bytes(keys[1])), masks.identity_of(b"m" * 32)
        text = protocol.signed_keys(context, NAMES[1], who, mine.mask_key, mine.share_key)
        keys[1] = as_tensor(replace(mine, identity=who, signature=masks.sign(b"m" * 32, text)).packed)
        return changed(task, keys=keys)

    engine.change_task = swapped
    _, (record,) = run(engine)
    (failure,) = record.failures
    assert failure.client == NAMES[1]
    assert "client-1 has another identity key than the one that was seen first" in failure.reason


def test_a_client_whose_own_signature_is_wrong_is_left_out_alone() -> None:
    def change(task: ClientTask, reply: Update) -> Update:
        if (task.client, task.kind) != (NAMES[3], KEYS):
            return reply
        keys = reply.delta["secagg/keys"].clone()
        keys[-1] ^= 1
        return replace(reply, delta={"secagg/keys": keys})

    _, (record,) = run(watched(change_reply=change))
    (failure,) = record.failures
    assert (failure.client, failure.reason) == (
        NAMES[3],
        "secagg/keys: its keys are not signed by its identity for this round",
    )


def test_shares_of_another_round_are_refused() -> None:
    engine = watched()
    run(engine)
    old = {task.client: task.tensors["secagg/shares"] for task in engine.down if task.kind == MASKED}
    engine.change_task = lambda task: changed(task, shares=old[task.client]) if task.kind == MASKED else task
    refused_all(engine, "can not be opened: changed on their way, or of another round")


def test_two_lists_of_survivors_unmask_nothing() -> None:
    """Half of the clients are shown one list, half another: no client gets enough signatures under its own."""

    def two(task: ClientTask) -> ClientTask:
        if task.kind != CONSISTENCY or task.client in NAMES[:3]:
            return task
        fewer = task.tensors["secagg/survivors"].clone()
        fewer[0] = 0
        return changed(task, survivors=fewer)

    engine = watched(change_task=two)
    refused_all(engine, "did not sign this list")
    assert not any(task.kind == UNMASK and isinstance(reply, Update) for task, reply in engine.up)


def test_a_second_request_to_unmask_is_refused() -> None:
    engine = watched()
    run(engine)
    again = [task for task in engine.down if task.kind in (SHARES, MASKED, CONSISTENCY, UNMASK)]
    for task in again:
        (reply,) = engine.run([task], 1)
        assert isinstance(reply, Failure)
        assert "this round is not under way here" in reply.reason


def test_a_second_list_of_survivors_is_refused_within_the_round() -> None:
    answers: list[Update | Failure] = []

    def twice(task: ClientTask) -> ClientTask:
        if task.kind == UNMASK and task.client == NAMES[0]:
            earlier = next(each for each in engine.down if each.kind == CONSISTENCY and each.client == NAMES[0])
            answers.extend(InProcess(engine.half, engine.memories).run([earlier], 1))
            for kind in (SHARES, MASKED):
                earlier = next(each for each in engine.down if each.kind == kind and each.client == NAMES[0])
                answers.extend(InProcess(engine.half, engine.memories).run([earlier], 1))
        return task

    engine = watched(change_task=twice)
    run(engine)
    assert [("each is answered once" in each.reason) for each in answers if isinstance(each, Failure)] == [True] * 3


def test_a_task_without_protection_is_refused() -> None:
    """Also in the middle of a round: a client of a secure run has no plain answer."""
    half = secure_half(equal(trained), SETTINGS)
    task = ClientTask(0, NAMES[0], "plain", START, 1, "")
    (reply,) = InProcess(half).run([task], 1)
    assert isinstance(reply, Failure)
    assert "a task of kind 'plain' in a run with secure aggregation" in reply.reason


def test_a_phase_of_another_round_or_recipe_is_refused() -> None:
    for change in ({"round": 7}, {"config_digest": "other"}, {"model_digest": "other"}):
        engine = watched(
            change_task=lambda task, change=change: replace(task, **change) if task.kind == MASKED else task
        )
        refused_all(engine, "this round is not under way here")


@pytest.mark.parametrize(
    ("kind", "part", "value"),
    [
        (KEYS, "attempt", torch.zeros(31, dtype=torch.uint8)),
        (SHARES, "names", as_tensor(b"[")),
        (SHARES, "names", as_tensor(b'["client-0"]')),
        (SHARES, "names", as_tensor(b"[1, 2, 3, 4, 5, 6]")),
        (SHARES, "keys", torch.zeros(6, 161, dtype=torch.uint8)),
        (MASKED, "present", torch.ones(5, dtype=torch.uint8)),
        (MASKED, "present", torch.full((6,), 2, dtype=torch.uint8)),
        (MASKED, "shares", torch.zeros(6, 147, dtype=torch.uint8)),
        (CONSISTENCY, "survivors", torch.ones(6)),
        (UNMASK, "signatures", torch.zeros(5, 64, dtype=torch.uint8)),
    ],
)
def test_messages_of_another_shape_are_refused(kind: str, part: str, value: torch.Tensor) -> None:
    engine = watched(change_task=lambda task: changed(task, **{part: value}) if task.kind == kind else task)
    with pytest.raises(RoundFailed) as failed:
        run(engine)
    assert len(failed.value.failures) == len(NAMES)
    assert all(failure.reason.startswith(kind) and "Error" not in failure.reason for failure in failed.value.failures)


def test_what_a_client_keeps_is_its_key_its_peers_and_its_own() -> None:
    engine = watched()
    run(engine)
    for memory in engine.memories.values():
        assert set(memory) == {IDENTITY, PEERS, "count"}


# --- settings --------------------------------------------------------------------------------------------

SECURE = ("secure_aggregation={}", "aggregation.weights=equal")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            "aggregation.weights=tokens",
            "secure_aggregation.max_weight: expected the largest weight that counts, got none",
        ),
        (
            "scheduling.buffered={size: 3, concurrency: 5}",
            "Masks cancel among clients who begin and end a round together",
        ),
        ("secure_aggregation.threshold=0.5", "secure_aggregation.threshold"),
        ("secure_aggregation.min_clients=1", "secure_aggregation.min_clients"),
        ("compression={format: int8}", "Masks make every value 32 random bits"),
        ("aggregation.robust={kind: median}", "only a sum leaves the clients"),
    ],
)
def test_a_recipe_that_can_not_be_is_refused_with_its_reason(more: str, words: str) -> None:
    assert parse_recipe("", SECURE).secure_aggregation == SecureAggregationConfig()
    with pytest.raises(UserError) as refused:
        parse_recipe("", (*SECURE, more))
    assert words in str(refused.value)


def test_a_cohort_below_the_floor_is_refused_before_the_run() -> None:
    sizes = {name: range(3) for name in NAMES}
    few = parse_recipe("", (*SECURE, "scheduling.selection={kind: uniform, fraction: 0.34}"))
    with pytest.raises(UserError, match=r"expected at least secure_aggregation.min_clients, 3, in a round, got 2"):
        scheduler(few, sizes)
    assert scheduler(parse_recipe("", SECURE), sizes)(0).wanted == len(NAMES)


def test_cohorts_that_are_drawn_may_be_too_small_only_by_a_rare_chance() -> None:
    """A round of too few fails, and is drawn again as it was: the run would end there."""
    drawn = ("privacy={kind: user, clip_norm: 1.0, delta: 1.0e-5, noise_multiplier: 1.0}", "rounds=20")
    poisson = "scheduling.selection={kind: poisson, fraction: 0.2}"
    recipe = parse_recipe("", (*SECURE, *drawn, poisson))
    many = {f"client-{number}": range(3) for number in range(100)}
    scheduler(recipe, many, secret=bytes(32))
    some = dict(list(many.items())[:30])  # a round of 0, 1 or 2 of 30: 4.4 %
    with pytest.raises(UserError, match=r"min_clients, 3, got 0\.59, with 30 clients of which each is drawn with 0\.2"):
        scheduler(recipe, some, secret=bytes(32))


def test_baselines_have_one_client_and_leave_it_out() -> None:
    """A comparison's baselines are settings of the same recipe."""
    assert secured(parse_recipe("", (*SECURE, "method=centralised"))) is None
    assert secured(parse_recipe("", SECURE)) == SecureAggregationConfig()


def test_a_method_that_does_not_average_has_no_licence() -> None:
    config = parse_recipe("", SECURE)
    combining = replace(SERVER, combine=lambda updates, message: next(iter(updates)))
    with pytest.raises(UserError, match="expected a method whose updates are averaged"):
        collect_of(config, combining)
    assert collect_of(config, SERVER) is not one_by_one
    assert collect_of(parse_recipe(""), SERVER) is one_by_one


def test_adaptive_clipping_needs_room_for_its_element() -> None:
    privacy = "privacy={kind: user, clip_norm: 1.0, delta: 1.0e-5, noise_multiplier: 1.0, adaptive: {}}"
    poisson = "scheduling.selection={kind: poisson, fraction: 0.9}"
    with pytest.raises(UserError, match=r"secure_aggregation.range: expected at least 0.5 with adaptive clipping"):
        parse_recipe("", (*SECURE, privacy, poisson, "secure_aggregation.range=0.4"))
    assert parse_recipe("", (*SECURE, privacy, poisson)).secure_aggregation


def test_without_its_library_check_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flocktune.protection.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"secure_aggregation: expected .*cryptography.*flocktune\[privacy\]"):
        estimate(parse_recipe("", SECURE))
    assert estimate(parse_recipe("")).clients
