"""A federation without a network: clients in memory behind a Link, a clock that only the test moves, faults by script.

Parcels pass as the text and bytes that a real transport carries. A client computes when its parcel is sent; its reply
is there ``takes_s`` later, on the clock, as its :class:`Act` says: sound, late, twice, damaged, or not at all.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from flocktune.config.engines import FlowerEngine
from flocktune.engine.client import answer
from flocktune.engine.parcels import (
    EMULATOR,
    FAILURE,
    LACKING,
    READY,
    TASK,
    UPDATE,
    LinkDown,
    Lost,
    Parcel,
    from_text,
    to_text,
)
from flocktune.engine.remote import Federated, Remote
from flocktune.errors import UpdateRefused
from flocktune.interfaces import ClientHalf, Memory
from flocktune.seeds import derive_seed
from flocktune.types import ClientTask, Failure, Mean, Tensors, Update
from flocktune.wire import build_task, decode_tensors, encode_tensors, update_fields

RUN = "run-1"
START = {"w": torch.zeros(3), "a": torch.zeros(2, 2), "m": torch.zeros(1)}
"""Not in the order in which a file keeps them."""


def pull(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
    """A step towards a target of the client's own, with seeded noise: no two tasks give the same update.

    The order of the tensors bears on it, as rounding in a real model's sums does.
    """
    noise = torch.Generator().manual_seed(task.seed)
    weight = 1.0 + derive_seed(0, task.client) % 7
    delta = {
        name: 0.3 * (weight - value) + 0.1 * torch.randn(value.shape, generator=noise)
        for name, value in task.tensors.items()
    }
    return Update(delta, weight, 1, {"loss": Mean(weight * (1 + task.round), 1)}), memory


class Time:
    """Seconds that pass only when someone pauses. ``on_pause`` is told of each."""

    def __init__(self, on_pause: Callable[[], None] = lambda: None) -> None:
        self.now_s, self.on_pause = 0.0, on_pause

    def __call__(self) -> float:
        return self.now_s

    def pause(self, seconds: float) -> None:
        self.now_s += seconds
        self.on_pause()


@dataclass(frozen=True)
class Act:
    """What a client does with one parcel: ``how`` is a name of :data:`SOUND` or :data:`FAULTS`.

    ``away_s``: for so long it is not connected afterwards.
    """

    how: str = "answers"
    takes_s: float = 1.0
    away_s: float = 0.0


@dataclass(frozen=True)
class Down:
    """From ``start_s`` to ``end_s`` a method of the link raises LinkDown, ``halfway``: after a part of its work."""

    start_s: float
    end_s: float
    method: str
    halfway: bool = False


@dataclass(frozen=True)
class Sent:
    """A parcel that reached its client, and when its reply is there."""

    number: str
    parcel: Parcel
    act: Act
    ready_s: float
    honest: Parcel

    @property
    def client(self) -> str:
        return str(self.parcel.fields["client"])

    @property
    def usable(self) -> bool:
        return self.act.how in SOUND and self.honest.kind == UPDATE


@dataclass
class FakeLink:
    """``plan(parcel, nth)``: what a client does with the nth parcel that it gets. ``lacks``: who has no emulator.

    ``handed``: when which reply was handed on. ``happened``: how often which fault was met, by name.
    """

    clients: Sequence[str]
    time: Time
    plan: Callable[[Parcel, int], Act] = lambda parcel, nth: Act()
    down: Sequence[Down] = ()
    half: ClientHalf = pull
    lacks: set[str] = field(default_factory=set)
    away_until_s: dict[str, float] = field(default_factory=dict)
    sent: list[Sent] = field(default_factory=list)
    handed: list[tuple[float, Sent]] = field(default_factory=list)
    happened: Counter[str] = field(default_factory=Counter)
    limits: list[int] = field(default_factory=list)
    lifetimes_s: list[float] = field(default_factory=list)

    def connected(self) -> set[str]:
        self._refuse_when_down("connected")
        return {client for client in self.clients if self.time() >= self.away_until_s.get(client, 0.0)}

    def send(self, parcels: Mapping[str, Parcel], lifetime_s: float) -> Mapping[str, str]:
        down = self._refuse_when_down("send")
        self.lifetimes_s.append(lifetime_s)
        reached = list(parcels)[: (len(parcels) + 1) // 2] if down else list(parcels)
        numbers = {client: self._deliver(parcels[client]) for client in reached}
        if down:
            raise self._down(down)
        return numbers

    def receive(self, asked: Mapping[str, str], limit_bytes: int) -> Iterator[tuple[str, Parcel | Lost]]:
        down = self._refuse_when_down("receive")
        self.limits.append(limit_bytes)
        numbers = {number: client for client, number in asked.items()}
        gone = {one.number for _, one in self.handed}
        due = [one for one in self.sent if one.number in numbers and one.number not in gone]
        due = sorted((one for one in due if one.ready_s <= self.time()), key=lambda one: one.ready_s)
        for one in due:
            if one.act.how == "silent":
                continue
            reply = self._reply(one, limit_bytes)
            self.handed.append((self.time(), one))
            if one.act.how not in SOUND or one.act.how == "twice":
                self.happened[one.act.how] += 1
            for _ in range(2 if one.act.how == "twice" else 1):
                yield numbers[one.number], reply
            if down:
                raise self._down(down)

    def is_up(self, method: str, from_s: float, to_s: float) -> bool:
        """Whether ``method`` works in all of that time, and no other one stands before it."""
        methods = (method, "connected", "send")  # one look calls all of them
        return not any(one.start_s <= to_s and from_s <= one.end_s for one in self.down if one.method in methods)

    def _refuse_when_down(self, method: str) -> Down | None:
        """The outage that is to come halfway, if there is one."""
        for one in self.down:
            if one.method == method and one.start_s <= self.time() < one.end_s:
                if not one.halfway:
                    raise self._down(one)
                return one
        return None

    def _down(self, one: Down) -> LinkDown:
        self.happened[f"down in {one.method}" + (", halfway" if one.halfway else "")] += 1
        return LinkDown(f"no route, in {one.method}")

    def _deliver(self, parcel: Parcel) -> str:
        parcel = from_text(to_text(parcel), parcel.blob)
        client = str(parcel.fields["client"])
        honest = self._honest(client, parcel)
        act = self.plan(parcel, sum(one.client == client for one in self.sent))
        if act.how in FAULTS and honest.kind != UPDATE:  # there is nothing to be spoilt
            act = replace(act, how="answers")
        ready_s = self.time() + act.takes_s
        if act.away_s:
            self.away_until_s[client] = ready_s + act.away_s
            self.happened["absent"] += 1
        if act.how in ("silent", "late"):
            self.happened[act.how] += 1
        number = f"message-{len(self.sent)}"
        self.sent.append(Sent(number, parcel, act, ready_s, honest))
        return number

    def _honest(self, client: str, parcel: Parcel) -> Parcel:
        """What a client that does as it is told replies."""
        named = {key: parcel.fields[key] for key in ("run", "nonce", "round", "client")}
        if parcel.kind == EMULATOR:
            self.lacks.discard(client)
            self.happened["emulator delivered"] += 1
            return Parcel(READY, named)
        assert parcel.kind == TASK
        if client in self.lacks:
            self.happened["lacking"] += 1
            return Parcel(LACKING, {**named, "digest": parcel.fields["task"]["model_digest"]})
        task = build_task(parcel.fields["task"], decode_tensors(parcel.blob, START))
        reply, _ = answer(task, self.half, {})
        if isinstance(reply, Failure):
            return Parcel(FAILURE, {**named, "reason": reply.reason})
        return Parcel(UPDATE, {**named, "update": update_fields(reply)}, encode_tensors(reply.delta))

    def _reply(self, one: Sent, limit_bytes: int) -> Parcel | Lost:
        if one.act.how == "dies":
            return Lost("the connection was lost", again=True)
        if one.act.how == "crashes":
            return Lost("Flower's error 2: the client's process ended")
        if one.act.how == "replayed":
            earlier = [o.honest for o in self.sent if o.client == one.client and o.number != one.number]
            text, blob = _written(earlier[0] if earlier else _other(one.honest, nonce="0" * 32))
        else:
            text, blob = _written(one.honest) if one.act.how in SOUND else FAULTS[one.act.how](one.honest)
        if len(blob) > limit_bytes:
            return Lost(f"a reply of {len(blob)} bytes, at most {limit_bytes} are taken")
        try:
            return from_text(text, blob)
        except UpdateRefused as refusal:
            return Lost(str(refusal))


SOUND = ("answers", "late", "twice")
"""How a reply comes that is as it should be; whether in time is another question."""


def _written(parcel: Parcel) -> tuple[str, bytes]:
    return to_text(parcel), parcel.blob


def _other(parcel: Parcel, **fields: object) -> Parcel:
    return replace(parcel, fields={**parcel.fields, **fields})


def _failure(reason: str) -> Callable[[Parcel], tuple[str, bytes]]:
    return lambda honest: _written(Parcel(FAILURE, {**honest.fields, "reason": reason}))


def _changed(change: Callable[[Tensors], Tensors]) -> Callable[[Parcel], tuple[str, bytes]]:
    """Other tensors, under a digest that is theirs."""
    return lambda honest: _written(replace(honest, blob=encode_tensors(change(decode_tensors(honest.blob)))))


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Parcel], tuple[str, bytes]]:
    return lambda honest: _written(replace(honest, blob=change(honest.blob)))


def _said(**update: object) -> Callable[[Parcel], tuple[str, bytes]]:
    """Another weight, other metrics."""
    return lambda honest: _written(_other(honest, update={**honest.fields["update"], **update}))


def claiming(blob: bytes, elements: int) -> bytes:
    """The blob with a header in which the first tensor has so many elements."""
    (length,) = struct.unpack_from("<Q", blob)
    header = blob[8 : 8 + length].replace(b'"shape":[3]', b'"shape":[%d]' % elements)
    return struct.pack("<Q", len(header)) + header + blob[8 + length :]


FAULTS: dict[str, Callable[[Parcel], tuple[str, bytes]]] = {
    "other nonce": lambda honest: _written(_other(honest, nonce="0" * 32)),
    "other round": lambda honest: _written(_other(honest, round=honest.fields["round"] + 1)),
    "other run": lambda honest: _written(_other(honest, run="run-0")),
    "other client": lambda honest: _written(_other(honest, client="somebody")),
    "other kind": lambda honest: _written(replace(honest, kind="rubbish")),
    "damaged": lambda honest: (to_text(honest), honest.blob[:-1] + bytes([honest.blob[-1] ^ 1])),
    "truncated": _bytes(lambda blob: blob[: len(blob) // 2]),
    "trailing": _bytes(lambda blob: blob + b"more"),
    "oversized": _bytes(lambda blob: blob + bytes(2 << 20)),
    "immense": _bytes(lambda blob: claiming(blob, 10**12)),
    "names": _changed(lambda tensors: {**tensors, "evil": torch.zeros(1)}),
    "shapes": _changed(lambda tensors: {name: torch.zeros(7) for name in tensors}),
    "dtypes": _changed(lambda tensors: {name: value.double() for name, value in tensors.items()}),
    "not finite": _changed(lambda tensors: {name: value * float("nan") for name, value in tensors.items()}),
    "weightless": _said(weight=0.0),
    "overweight": _said(weight=10**400),
    "disk full": _failure("the owner's side has a problem with its files or settings; its own log says which"),
    "refused": _failure("policy: rounds: expected at most 3 rounds, got 4"),
}
"""Replies that must not touch the state, from honest ones."""

ALL_ACTS = (*SOUND, *FAULTS, "dies", "crashes", "silent", "replayed")


def remote(link: FakeLink, note: Callable[..., object] = lambda event, **facts: None, **more: object) -> Remote:
    """The engine over ``link``. ``more``: of :class:`Federated`, and ``settings``."""
    settings = more.pop("settings", FlowerEngine(deadline_s=60.0, absent_s=10.0))
    common = Federated(RUN, {"name": "toy"}, **{"returned": lambda task: task.tensors, **more})
    return Remote(link, settings, common, note, clock=link.time, pause=link.time.pause)
