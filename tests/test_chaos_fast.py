"""Whole federations under seeded faults, in memory: nothing is lost, nothing is counted twice, and every run ends.

One seed is one run: rounds over the link of ``fake_link``, checkpoints in real files, a coordinator that is killed at
any moment and goes on from its last checkpoint. Faults of clients, replies and the link come as the seed has it. The
result is held against one process in which the clients that were left out of a round were merely absent from it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fake_link import ALL_ACTS, FAULTS, START, Act, Down, FakeLink, Sent, Time, pull, remote
from flocktune.algorithms import fedavg
from flocktune.config.engines import FlowerEngine
from flocktune.config.schema import AggregationConfig, ServerAdaptive, ServerSgd
from flocktune.engine.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from flocktune.engine.in_process import InProcess
from flocktune.engine.parcels import Parcel
from flocktune.engine.remote import POLL_S
from flocktune.engine.rounds import Hooks, RoundRecord, run_rounds
from flocktune.errors import RoundFailed
from flocktune.interfaces import State
from flocktune.scheduling import Cohort
from flocktune.seeds import derive_seed
from flocktune.tensors import digest
from flocktune.types import Mean

BLOCKS, RUNS_A_BLOCK = 12, 10
ROUNDS = 5
SETTINGS = FlowerEngine(deadline_s=30.0, absent_s=6.0)
SERVERS = [ServerSgd(), ServerSgd(momentum=0.9), ServerAdaptive("adam"), ServerAdaptive("yogi")]
MOMENTS = ("waiting", "a note", "a reply", "before the checkpoint", "after the checkpoint")
OUTAGES = tuple(f"down in {how}" for how in ("connected", "send", "send, halfway", "receive", "receive, halfway"))
TROUBLE = {
    "dies": 4, "silent": 2, "late": 2, "twice": 4, "replayed": 3, "crashes": 1, **dict.fromkeys(FAULTS, 1)
}  # fmt: skip
"""How often each is drawn, when something is to go wrong."""


class Killed(BaseException):
    """The coordinator's process is gone."""


@dataclass
class Reaper:
    """Kills at the nth occurrence of one moment."""

    moment: str = ""
    left: int = 0

    def __call__(self, moment: str) -> None:
        if moment == self.moment:
            self.left -= 1
            if not self.left:
                raise Killed(moment)


@dataclass
class Life:
    """One coordinator's process. ``before``: replies that were handed on to those before it."""

    before: int
    notes: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Story:
    """What one seed came to. ``records`` are those that the checkpoint holds."""

    seed: int
    link: FakeLink
    lives: list[Life] = field(default_factory=list)
    records: dict[int, RoundRecord] = field(default_factory=dict)
    lives_of: dict[int, Life] = field(default_factory=dict)
    ends_s: dict[int, float] = field(default_factory=dict)
    handed_by: dict[int, int] = field(default_factory=dict)
    failed: list[RoundFailed] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)


class Federation:
    """A seed's clients, schedule, faults and coordinator."""

    def __init__(self, seed: int, folder: Path) -> None:
        draw = self.draw = random.Random(seed)
        self.seed, self.folder = seed, folder
        self.reaper = Reaper()
        self.clients = tuple(f"client-{number}" for number in range(draw.randint(3, 7)))
        self.wanted = max(1, len(self.clients) - (1 if seed % 3 == 0 else 0))
        self.quorum = draw.randint(1, max(1, self.wanted - 1))
        self.trouble = draw.choice([0.15, 0.3, 0.5])
        self.server = fedavg.server_half(AggregationConfig(server_optimizer=SERVERS[seed % len(SERVERS)]))
        time = Time(lambda: self.reaper("waiting"))
        lacks = {client for client in self.clients if draw.random() < 0.2}
        self.link = FakeLink(self.clients, time, self.plan, tuple(self._outages()), lacks=lacks)
        self.story = Story(seed, self.link)

    def _outages(self) -> Iterator[Down]:
        at_s = 0.0
        while at_s < 200:
            at_s += self.draw.expovariate(1 / 25)
            length_s = self.draw.choice([0.3, 2.0, 9.0])
            method = self.draw.choice(["connected", "send", "receive"])
            yield Down(at_s, at_s + length_s, method, method != "connected" and self.draw.random() < 0.5)
            at_s += length_s

    def plan(self, parcel: Parcel, nth: int) -> Act:
        draw = random.Random(derive_seed(self.seed, str(parcel.fields["client"]), nth))
        takes_s = draw.choice([0.1, 1.0, 3.0, 8.0]) * draw.uniform(0.5, 1.5)
        if draw.random() >= self.trouble:
            return Act(takes_s=takes_s, away_s=draw.choice([3.0, 20.0]) if draw.random() < 0.1 else 0.0)
        how = draw.choices(list(TROUBLE), list(TROUBLE.values()))[0]
        if how == "late":
            return Act(how, takes_s=SETTINGS.deadline_s + draw.choice([1.0, 30.0]))
        away_s = draw.choice([0.0, 3.0, 20.0, 50.0]) if how == "dies" else 0.0
        return Act(how, takes_s, away_s)

    def schedule(self, number: int) -> Cohort:
        order = random.Random(derive_seed(self.seed, number, "order")).sample(self.clients, len(self.clients))
        return Cohort(tuple(order), self.wanted, self.quorum)

    def to_end(self) -> Story:
        """Live until all rounds are done or one failed for good; killed a few times, and mended once."""
        kills_left = self.draw.choice([0, 1, 2, 4])
        while True:
            self.reaper.moment = self.draw.choice(MOMENTS) if kills_left else ""
            self.reaper.left = self.draw.randint(1, 60 if self.reaper.moment == "waiting" else 6)
            try:
                self.live()
            except Killed as killed:
                kills_left -= 1
                self.story.kills[str(killed)] += 1
                self.reaper.moment = ""  # nobody lives who could be killed
                self.link.time.pause(self.draw.choice([0.0, 2.0, 40.0]))
            except RoundFailed as failed:
                self.story.failed.append(failed)
                self.reaper.moment = ""
                if len(self.story.failed) == 1 + self.seed % 2:
                    return self.story
                self.link.time.pause(60.0)
            else:
                return self.story

    def live(self) -> None:
        """One process: from the newest checkpoint on."""
        found = load_checkpoint(self.folder)
        first, state = 0, self.server.init(START)
        if found is not None:
            first, state = found.rounds_done, {name: found.state[name] for name in state}
        life = Life(len(self.link.handed))
        self.story.lives.append(life)

        def note(event: str, **facts: Any) -> None:
            life.notes.append({"event": event, **facts})
            self.reaper("a note")

        def on_round(record: RoundRecord, state: State) -> None:
            self.reaper("before the checkpoint")
            save_checkpoint(self.folder, Checkpoint(record.round + 1, state, {}, {}), keep=2)
            self.story.records[record.round] = record
            self.story.lives_of[record.round] = life
            self.story.ends_s[record.round] = self.link.time()
            self.story.handed_by[record.round] = len(self.link.handed)
            self.reaper("after the checkpoint")

        emulator = {"emulator": lambda: {"file": START["w"]}, "emulator_bytes": 12}
        hooks = Hooks(on_reply=lambda *_: self.reaper("a reply"), on_round=on_round)
        engine = remote(self.link, note, settings=SETTINGS, **emulator)
        self._rounds(engine, self.schedule, state, hooks, first, ROUNDS)

    def alone(self) -> State:
        """The same rounds in one process, with only those whose updates counted."""

        def who_answered(number: int) -> Cohort:
            there = tuple(self.story.records[number].clients)
            return Cohort(there, len(there), 1)

        start = self.server.init(START)
        return self._rounds(InProcess(pull), who_answered, start, Hooks(), 0, len(self.story.records))

    def _rounds(
        self,
        engine: Any,
        schedule: Callable[[int], Cohort],
        state: State,
        hooks: Hooks,
        first: int,
        rounds: int,
    ) -> State:
        return run_rounds(
            self.server,
            engine,
            schedule,
            state,
            first_round=first,
            rounds=rounds,
            kind="toy",
            seed=self.seed,
            hooks=hooks,
        )


def handed(story: Story, number: int) -> list[Sent]:
    """The usable replies of a round that reached the process which finished it."""
    of_this_life = story.link.handed[story.lives_of[number].before : story.handed_by[number]]
    return [one for _, one in of_this_life if one.parcel.fields["round"] == number and one.usable]


def check_it_ended_with_reasons(federation: Federation, story: Story) -> None:
    assert len(story.records) == ROUNDS or story.failed
    assert sorted(story.records) == list(range(len(story.records))), "without a gap"
    for record in story.records.values():
        assert len(record.clients) >= federation.quorum
    for failed in story.failed:
        named = [failure.client for failure in failed.failures]
        assert len(set(named)) == len(named) > len(federation.clients) - federation.quorum
        for failure in failed.failures:
            assert failure.reason
            assert f"{failure.client}: {failure.reason}" in str(failed)


def check_nothing_counts_twice(federation: Federation, story: Story) -> None:
    nonces: set[str] = set()
    for number, record in story.records.items():
        came = {one.client: one for one in handed(story, number)}
        for client, told in record.clients.items():
            fields = came[client].honest.fields
            assert told.weight == fields["update"]["weight"]
            assert fields["nonce"] not in nonces
            nonces.add(str(fields["nonce"]))
        told_by = [came[client].honest.fields["update"]["metrics"]["loss"] for client in record.clients]
        assert record.metrics["loss"] == sum((Mean(*one) for one in told_by), Mean())
        named = {failure.client for failure in record.failures}
        assert not named & record.clients.keys()


def check_nothing_is_lost(federation: Federation, story: Story) -> None:
    """Who answered well and in time is in, or the round had all that it wanted; who is out has the true reason."""
    for number, record in story.records.items():
        full = len(record.clients) == federation.wanted
        assert full or {one.client for one in handed(story, number)} == set(record.clients)
        assert full or {*record.clients, *(one.client for one in record.failures)} == set(federation.clients)
        for failure in record.failures:
            if failure.reason.startswith("no answer within"):
                assert not in_time(story, number, failure.client), f"{failure.client} had answered"


def in_time(story: Story, number: int, client: str) -> list[Sent]:
    """Usable replies to the parcel that the client was sent last, which a working link would have handed on."""
    life, end_s = story.lives_of[number], story.ends_s[number]
    told = [note for note in life.notes if (note["event"], note["client"], note["round"]) == ("sent", client, number)]
    last = [one for one in story.link.sent if told and one.parcel.fields["nonce"] == told[-1]["nonce"]]
    return [
        one
        for one in last
        if one.usable
        and one.ready_s <= end_s - 3 * POLL_S
        and story.link.is_up("receive", max(one.ready_s, end_s - 3 * POLL_S), end_s)
    ]


def check_the_account_is_true(story: Story) -> None:
    """What left and what came, by the notes, is what the clients saw."""
    sent = {one.parcel.fields["nonce"]: one for one in story.link.sent}
    for life in story.lives:
        for note in life.notes:
            one = sent[note["nonce"]]
            assert (note["client"], note["round"]) == (one.client, one.parcel.fields["round"])
            if note["event"] == "sent":
                assert (note["sha256"], note["bytes"]) == (one.parcel.sha256, len(one.parcel.blob))
            elif note["event"] == "received" and one.usable:
                assert (note["sha256"], note["bytes"]) == (one.honest.sha256, len(one.honest.blob))


def check_it_equals_one_process(federation: Federation, story: Story) -> None:
    found = load_checkpoint(federation.folder)
    assert (found.rounds_done if found else 0) == len(story.records)
    if found:
        assert digest(found.state) == digest(federation.alone())


@pytest.fixture(scope="module")
def happened() -> Counter[str]:
    """Over all blocks."""
    return Counter()


@pytest.mark.parametrize("block", range(BLOCKS))
def test_whatever_happens_nothing_is_lost_or_counted_twice(
    block: int, tmp_path: Path, happened: Counter[str], record_property: Callable[[str, object], None]
) -> None:
    for seed in range(block * RUNS_A_BLOCK, (block + 1) * RUNS_A_BLOCK):
        federation = Federation(seed, tmp_path / str(seed))
        story = federation.to_end()
        check_it_ended_with_reasons(federation, story)
        check_nothing_counts_twice(federation, story)
        check_nothing_is_lost(federation, story)
        check_the_account_is_true(story)
        check_it_equals_one_process(federation, story)
        happened.update(story.link.happened)
        happened.update({f"killed: {moment}": count for moment, count in story.kills.items()})
        happened.update(outcomes(federation, story))
    record_property("happened so far", dict(happened))


def outcomes(federation: Federation, story: Story) -> Counter[str]:
    """How the rounds of a run went."""
    counted = Counter({"runs": 1, "rounds": len(story.records), "rounds failed": len(story.failed)})
    counted["runs complete"] = len(story.records) == ROUNDS
    counted["resumed and complete"] = bool(story.kills) and len(story.records) == ROUNDS
    for number, record in story.records.items():
        came = [one.client for one in handed(story, number)]
        counted["rounds out of order"] += came != sorted(came, key=record.selected.index)
        counted["rounds with everyone"] += len(record.clients) == len(federation.clients)
        counted["updates"] += len(record.clients)
        for failure in record.failures:
            for reason in ("not connected for", "no answer within", "still at work"):
                counted[f"left out: {reason}"] += failure.reason.startswith(reason)
    sends = Counter((one.client, one.parcel.fields["nonce"]) for one in story.link.sent)
    asked = {note["nonce"] for life in story.lives for note in life.notes if note["event"] == "sent"}
    counted["computed for a send that was cut off"] = sum(nonce not in asked for _, nonce in sends)
    return counted


def test_every_kind_of_fault_has_happened(happened: Counter[str], capsys: pytest.CaptureFixture[str]) -> None:
    if happened["runs"] < BLOCKS * RUNS_A_BLOCK:
        pytest.skip("counts the faults of all blocks, and they were not all run")
    kinds = [*ALL_ACTS, *OUTAGES, "absent", "lacking", "emulator delivered", *(f"killed: {one}" for one in MOMENTS)]
    kinds += ["rounds failed", "resumed and complete", "rounds out of order", "computed for a send that was cut off"]
    kinds += [f"left out: {reason}" for reason in ("not connected for", "no answer within", "still at work")]
    with capsys.disabled():
        print("\n" + ", ".join(f"{name} {count}" for name, count in sorted(happened.items())))
    assert not [kind for kind in kinds if kind != "answers" and not happened[kind]]
    assert happened["runs"] >= 100


def test_a_run_of_a_seed_is_the_same_every_time(tmp_path: Path) -> None:
    """Otherwise a seed that fails could not be looked at."""
    stories = [Federation(17, tmp_path / name).to_end() for name in ("once", "again")]
    tales = [
        [(at_s, one.client, one.act, one.parcel.fields["round"]) for at_s, one in story.link.handed]
        for story in stories
    ]
    assert tales[0] == tales[1]
