"""What a stranger's message may do to either end of Flower: be refused, in little memory; and which task is answered.

Messages are Flower's own, cut into the objects that travel; a test changes some of them, or holds some back.
"""

from __future__ import annotations

import json
import os
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

pytest.importorskip("flwr", reason="the extra flocktune[flower] is not installed")

from flwr.app import Message
from flwr.app.message import array, remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from flocktune.engine.flower import objects
from flocktune.engine.flower.grid_link import GridLink, _reply_of
from flocktune.engine.flower.messages import MESSAGE_TYPE, NODE_UNAVAILABLE, content_of, parcel_of
from flocktune.engine.flower.objects import MOST_TOLD_BYTES, Arriving
from flocktune.engine.parcels import REASON_LIMIT, LinkDown, Lost, Parcel
from flocktune.errors import UpdateRefused
from test_flower_link import _in_a_run as _in_a_run
from test_flower_link import fleet_of

MIB = 1 << 20
LIMIT_BYTES = 4 * MIB


class Travelling:
    """A message as its objects. ``contents``: by id, empty when not sent yet; ``pulled``: how often each was given."""

    def __init__(self, parcel: Parcel, reply_to: Message | None = None) -> None:
        made = content_of(parcel)
        self.message = Message(made, reply_to=reply_to) if reply_to else Message(made, 7, MESSAGE_TYPE, ttl=100.0)
        self.message.metadata.__dict__["_message_id"] = self.message.object_id
        self.tree = get_object_tree(self.message)
        self.contents = {name: one.deflate() for name, one in get_all_nested_objects(self.message).items()}
        self.pulled: Counter[str] = Counter()

    @property
    def proto(self) -> MessageProto:
        return message_to_proto(remove_content_from_message(self.message))

    def change(self, kind: str, body: Callable[[bytes], bytes]) -> None:
        """Another body for the objects of ``kind``, as if they had been made so."""
        for name, content in self.contents.items():
            head, _, old = content.partition(b"\x00")
            if head.startswith(kind.encode() + b" "):
                new = body(old)
                self.contents[name] = head.rsplit(b" ", 1)[0] + b" %d\x00" % len(new) + new

    def pull_object(self, request: Any) -> PullObjectResponse:
        content = self.contents[request.object_id]
        self.pulled[request.object_id] += bool(content)
        return PullObjectResponse(object_found=True, object_available=bool(content), object_content=content)


def array_of(pieces: Any) -> Callable[[bytes], bytes]:
    """An array's body that names these pieces."""
    return lambda body: json.dumps({**json.loads(body), "arraychunk_ids": pieces}).encode()


def garbage(sent: Travelling) -> None:
    sent.change("Message", lambda body: b"\xff\xff\xff\xff")


def garbage_in_the_fields(sent: Travelling) -> None:
    sent.change("ConfigRecord", lambda body: b"\xff\xff\xff\xff")


def deep(sent: Travelling) -> None:
    sent.change("Array", lambda body: b'{"arraychunk_ids":' + b"[" * 200_000 + b"]" * 200_000 + b"}")


def bomb(sent: Travelling) -> None:
    sent.change("Array", array_of([0] * 64))


def no_such_piece(sent: Travelling) -> None:
    sent.change("Array", array_of([1]))


def pieces_that_are_none(sent: Travelling) -> None:
    sent.change("Array", array_of({"a": 1}))


def talkative(sent: Travelling) -> None:
    """What Flower says of it repeats what it says."""
    sent.change("ArrayRecord", lambda body: json.dumps({"safetensors": "\x1b[2J" * 100_000}).encode())


def no_message(sent: Travelling) -> None:
    """Its root is what should lie below it."""
    sent.tree = ObjectTree.FromString(sent.tree.children[0].SerializeToString())


def no_divider(sent: Travelling) -> None:
    sent.contents = dict.fromkeys(sent.contents, b"Array")


def no_parcel(sent: Travelling) -> None:
    sent.change("RecordDict", lambda body: body.replace(b"told", b"else"))


HOSTILE = [
    garbage,
    garbage_in_the_fields,
    deep,
    bomb,
    no_such_piece,
    pieces_that_are_none,
    talkative,
    no_message,
    no_divider,
    no_parcel,
]


def parcel(blob_bytes: int = MIB, **fields: Any) -> Parcel:
    return Parcel("update", fields, os.urandom(blob_bytes))


class SuperLink:
    """What the server's end asks of Flower, for replies that have come, whole or not."""

    def __init__(self, *replies: Travelling) -> None:
        self.replies = replies
        self.confirmed: list[str] = []

    def PullMessages(self, request: Any) -> Any:
        found = [one for one in self.replies if one.message.metadata.reply_to_message_id in request.message_ids]
        return SimpleNamespace(messages_list=[o.proto for o in found], message_object_trees=[o.tree for o in found])

    def PullObject(self, request: Any) -> PullObjectResponse:
        (owner,) = [one for one in self.replies if request.object_id in one.contents]
        return owner.pull_object(request)

    def ConfirmMessageReceived(self, request: Any) -> None:
        self.confirmed.append(request.message_object_id)

    @property
    def link(self) -> GridLink:
        nodes = {f"client-{number}": number for number in range(len(self.replies))}
        grid = SimpleNamespace(_runtime_client=self, run=SimpleNamespace(run_id=5), node=None)
        return GridLink(grid, nodes)  # type: ignore[arg-type]

    @property
    def asked(self) -> dict[str, str]:
        return {f"client-{n}": one.message.metadata.reply_to_message_id for n, one in enumerate(self.replies)}


def replies_of(*parcels: Parcel) -> list[Travelling]:
    tasks = [Travelling(Parcel("task", {"client": number})) for number in range(len(parcels))]
    return [Travelling(one, reply_to=task.message) for one, task in zip(parcels, tasks, strict=True)]


@contextmanager
def most_bytes() -> Iterator[Callable[[], tuple[int, int]]]:
    """Bytes that were taken in the block: so far, and at most."""
    tracemalloc.start()
    try:
        yield tracemalloc.get_traced_memory
    finally:
        tracemalloc.stop()


# --- a message that is none, or more than it says ----------------------------------------------------------


@pytest.mark.parametrize("spoil", HOSTILE)
def test_a_hostile_reply_costs_its_sender_the_round_and_nobody_else(spoil: Callable[[Travelling], None]) -> None:
    hostile, honest = replies_of(parcel(), parcel(round=3))
    spoil(hostile)
    superlink = SuperLink(hostile, honest)
    found = dict(superlink.link.receive(superlink.asked, LIMIT_BYTES))
    lost, whole = found["client-0"], found["client-1"]
    assert isinstance(lost, Lost)
    assert lost.reason.startswith("message: ")
    assert len(lost.reason) <= REASON_LIMIT
    assert not lost.again
    assert whole == parcel_of(honest.message)
    assert superlink.confirmed == [hostile.tree.object_id, honest.tree.object_id], "and neither is looked at again"


@pytest.mark.parametrize("spoil", HOSTILE)
def test_a_hostile_task_is_a_refusal(spoil: Callable[[Travelling], None], tmp_path: Path) -> None:
    task = Travelling(parcel())
    spoil(task)
    coordinator = Coordinator(task)
    received = fleet_of(tmp_path, coordinator).receive(LIMIT_BYTES)
    assert received is not None
    assert received.parcel is None
    assert received.refusal.startswith("message: ")
    assert len(received.refusal) <= REASON_LIMIT, "it is shown to the owner"
    assert received.refusal.isprintable()
    assert coordinator.confirmed == [task.message.metadata.message_id]


def test_memory_that_does_not_suffice_for_one_message_is_its_senders_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def takes_too_much(*given: Any) -> None:
        raise MemoryError

    (reply,) = replies_of(parcel())
    monkeypatch.setattr(objects, "inflate_object_from_contents", takes_too_much)
    superlink = SuperLink(reply)
    ((_, lost),) = superlink.link.receive(superlink.asked, LIMIT_BYTES)
    assert lost == Lost("message: can not be put together (MemoryError: )")


def test_pieces_that_are_named_again_and_again_are_counted_before_they_are_joined() -> None:
    sent = Travelling(parcel())
    bomb(sent)
    assert sum(map(len, sent.contents.values())) < LIMIT_BYTES, "by what is pulled it is within the limit"
    with most_bytes() as taken:
        with pytest.raises(UpdateRefused, match=r"at most 4,194,304 bytes of tensors, got 67,1"):
            Arriving(sent.tree).pull(sent.contents.__getitem__, LIMIT_BYTES)
        assert taken()[1] < MIB


def test_a_parcel_that_repeats_itself_is_taken_at_its_full_size() -> None:
    zeros = Parcel("update", {}, bytes(16 * MIB))
    sent = Travelling(zeros)
    assert sum(map(len, sent.contents.values())) < 7 * MIB, "three pieces of it are one"
    whole = Arriving(sent.tree).pull(sent.contents.__getitem__, 17 * MIB)
    assert whole is not None
    assert parcel_of(whole) == zeros
    with pytest.raises(UpdateRefused, match="bytes of tensors"):
        Arriving(sent.tree).pull(sent.contents.__getitem__, 15 * MIB)


@pytest.mark.parametrize("kind", ["ConfigRecord", "ArrayChunk"])
def test_what_is_beside_the_tensors_is_little(kind: str) -> None:
    """Were it read, it would take many times its size: a list of what stands between so many commas."""
    sent = Travelling(parcel())
    for name, content in sent.contents.items():
        if content.startswith(kind.encode()):
            sent.contents[name] = kind.encode() + b" " + b"," * (MOST_TOLD_BYTES + 1) + b" 0\x00"
    with most_bytes() as taken:
        with pytest.raises(UpdateRefused, match="bytes beside tensors"):
            Arriving(sent.tree).pull(sent.contents.__getitem__, 100 * MIB)
        assert taken()[1] < MIB


# --- replies that come piece by piece ----------------------------------------------------------------------


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array, "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", 100_000)


def test_replies_that_never_become_whole_do_not_fill_the_memory(small_pieces: None) -> None:
    parcels = [parcel(1_000_000, client=number) for number in range(20)]
    superlink = SuperLink(*replies_of(*parcels))
    held_back = [(one, one.contents[one.tree.object_id]) for one in superlink.replies]
    for reply, _ in held_back:
        reply.contents[reply.tree.object_id] = b""
    link, asked = superlink.link, superlink.asked
    with most_bytes() as taken:
        for _ in range(3):
            assert list(link.receive(asked, LIMIT_BYTES)) == []
        now_bytes, most = taken()
    assert now_bytes < 500_000
    assert most < 3_000_000, "one reply's pieces at a time"
    for reply, content in held_back:
        reply.contents[reply.tree.object_id] = content
    assert [whole for _, whole in link.receive(asked, LIMIT_BYTES)] == parcels


def test_a_piece_is_pulled_twice_at_most_however_slowly_the_others_come(small_pieces: None) -> None:
    (reply,) = replies_of(parcel(1_000_000))
    superlink, contents = SuperLink(reply), dict(reply.contents)
    size_bytes = sum(map(len, contents.values()))
    link = superlink.link
    reply.contents = dict.fromkeys(contents, b"")
    for name, content in contents.items():
        assert list(link.receive(superlink.asked, size_bytes)) == []
        reply.contents[name] = content
    ((_, whole),) = link.receive(superlink.asked, size_bytes)
    assert whole == parcel_of(reply.message), "a piece that is pulled twice counts once"
    assert set(reply.pulled) == set(contents)
    assert max(reply.pulled.values()) == 2


def test_a_reply_that_grows_beyond_the_limit_is_refused_though_nothing_of_it_is_kept(small_pieces: None) -> None:
    (reply,) = replies_of(parcel(1_000_000))
    superlink, contents = SuperLink(reply), dict(reply.contents)
    link = superlink.link
    reply.contents = dict.fromkeys(contents, b"")
    found: list[Any] = []
    for name, content in contents.items():
        reply.contents[name] = content
        if found := list(link.receive(superlink.asked, 500_000)):
            break
    ((_, lost),) = found
    assert lost == Lost("message: expected at most 500,000 bytes, got more")
    assert not all(reply.contents.values()), "before it was whole"


# --- which task is answered --------------------------------------------------------------------------------


class Coordinator:
    """What an owner's end asks of Flower, for tasks that wait there, the oldest first.

    ``refuses``: runs that are over. ``down_after``: so many tasks are handed out, then there is no connection.
    """

    def __init__(self, *tasks: Travelling, refuses: set[int] | None = None, down_after: int = 99) -> None:
        self.tasks, self.waiting = tasks, list(tasks)
        self.refuses, self.down_after = refuses or set(), down_after
        self.pushed: list[Any] = []
        self.confirmed: list[str] = []

    def ActivateNode(self, request: Any) -> Any:
        return SimpleNamespace(node_id=7)

    def DeactivateNode(self, request: Any) -> None:
        pass

    def PullMessages(self, request: Any) -> Any:
        if len(self.tasks) - len(self.waiting) == self.down_after:
            raise httpx.ConnectError("refused")
        one = [self.waiting.pop(0)] if self.waiting else []
        return SimpleNamespace(messages_list=[o.proto for o in one], message_object_trees=[o.tree for o in one])

    def PullObject(self, request: Any) -> PullObjectResponse:
        (owner,) = [one for one in self.tasks if request.object_id in one.contents]
        return owner.pull_object(request)

    def PushObject(self, request: Any) -> None:
        raise AssertionError("nothing was to be pushed")

    def ConfirmMessageReceived(self, request: Any) -> None:
        self.confirmed.append(request.message_object_id)
        self._refuse(request.run_id)

    def PushMessages(self, request: Any) -> Any:
        self._refuse(request.messages_list[0].metadata.run_id)
        self.pushed += request.messages_list
        return SimpleNamespace(session_id="session", objects_to_push=[])

    def _refuse(self, run_id: int) -> None:
        if run_id in self.refuses:
            response = httpx.Response(403, json={"detail": "run is over"})
            raise httpx.HTTPStatusError("no", request=httpx.Request("POST", "https://x"), response=response)


def tasks(number: int, run_id: int = 5) -> list[Travelling]:
    made = [Travelling(Parcel("task", {"round": one}, os.urandom(100))) for one in range(number)]
    for one in made[:-1]:
        one.message.metadata.__dict__["_run_id"] = run_id
    return made


def test_the_newest_task_is_the_one_that_is_answered(tmp_path: Path) -> None:
    first, second, last = tasks(3)
    coordinator = Coordinator(first, second, last)
    fleet = fleet_of(tmp_path, coordinator)
    received = fleet.receive(LIMIT_BYTES)
    assert received is not None
    assert received.parcel == parcel_of(last.message)
    assert not first.pulled + second.pulled, "what nobody waits for is not even fetched"
    assert [(one.metadata.reply_to_message_id, one.error.code) for one in coordinator.pushed] == [
        (first.tree.object_id, NODE_UNAVAILABLE),
        (second.tree.object_id, NODE_UNAVAILABLE),
    ], "a run that does wait gives it out anew"
    assert coordinator.confirmed == [one.tree.object_id for one in (first, second, last)]
    fleet.reply(received, parcel(10))
    assert coordinator.pushed[-1].metadata.reply_to_message_id == last.tree.object_id
    assert not (tmp_path / "task").exists()
    assert fleet.receive(LIMIT_BYTES) is None


def test_one_who_stops_takes_no_more_tasks(tmp_path: Path) -> None:
    coordinator = Coordinator(*tasks(2))
    fleet = fleet_of(tmp_path, coordinator)
    fleet._stop.set()
    assert fleet.receive(LIMIT_BYTES) is None
    assert len(coordinator.waiting) == 2


def test_after_a_crash_the_newest_task_is_given_back(tmp_path: Path) -> None:
    first, last = tasks(2)
    assert fleet_of(tmp_path, Coordinator(first, last)).receive(LIMIT_BYTES) is not None
    after = Coordinator()
    with fleet_of(tmp_path, after).connected():
        (given_back,) = after.pushed
    assert given_back.metadata.reply_to_message_id == last.tree.object_id
    assert not (tmp_path / "task").exists()


def test_tasks_of_a_run_that_is_over_do_not_stand_in_the_way(tmp_path: Path) -> None:
    old, older, live = tasks(3, run_id=4)
    coordinator = Coordinator(old, older, live, refuses={4})
    received = fleet_of(tmp_path, coordinator).receive(LIMIT_BYTES)
    assert received is not None
    assert received.parcel == parcel_of(live.message)
    assert coordinator.pushed == []


def test_a_task_that_was_taken_when_the_connection_broke_is_given_back(tmp_path: Path) -> None:
    first, second, last = tasks(3)
    coordinator = Coordinator(first, second, last, down_after=2)
    fleet = fleet_of(tmp_path, coordinator)
    with pytest.raises(LinkDown):
        fleet.receive(LIMIT_BYTES)
    coordinator.down_after = 99
    with fleet.connected():
        given_back = [one.metadata.reply_to_message_id for one in coordinator.pushed]
        assert given_back == [first.tree.object_id, second.tree.object_id]
        received = fleet.receive(LIMIT_BYTES)
    assert received is not None
    assert received.parcel == parcel_of(last.message)


def test_what_was_taken_and_is_no_message_never_keeps_a_client_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message that Flower's own reading chokes on is in the note; it must not do so at every start."""
    from flocktune.engine.flower import fleet as room

    def chokes(proto: Any) -> None:
        raise AssertionError("not expected")

    (tmp_path / "task").write_bytes(tasks(1)[0].proto.SerializeToString())
    monkeypatch.setattr(room, "message_from_proto", chokes)
    with fleet_of(tmp_path, Coordinator()).connected():
        assert not (tmp_path / "task").exists()


def test_what_flower_says_of_a_client_is_fit_for_a_terminal() -> None:
    error = SimpleNamespace(code=2, reason="\x1b]0;mine\x07gone" + "x" * 9000)
    lost = _reply_of(SimpleNamespace(has_error=lambda: True, error=error))
    assert lost.reason.startswith("Flower's error 2:  ]0;mine gone")
    assert len(lost.reason) <= REASON_LIMIT
