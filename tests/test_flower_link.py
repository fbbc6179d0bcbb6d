"""Both ends of Flower with nobody between them: what a crash leaves half done is given back, and asked for again."""

from __future__ import annotations

import threading
import time
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

pytest.importorskip("flwr", reason="the extra flocktune[flower] is not installed")

from flwr.app import Message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.task_identity import TaskIdentity

from flocktune.engine.flower.fleet import Fleet, NotAdmitted
from flocktune.engine.flower.grid_link import GridLink
from flocktune.engine.flower.messages import MESSAGE_TYPE, NODE_UNAVAILABLE, content_of
from flocktune.engine.parcels import LinkDown, Lost, Parcel
from flocktune.enrolment import new_private_key
from flocktune.federation.certificates import create_authority

TASK = Parcel("task", {"round": 0}, b"tensors")


@pytest.fixture(autouse=True)
def _in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's messages are of the run that its process is for."""
    for name, value in {"_run_id": 5, "_task_id": 6, "_node_id": 1}.items():
        monkeypatch.setattr(TaskIdentity, name, value)


class Coordinator:
    """What an owner's end asks of Flower. ``refusals``: HTTP statuses that activation gives first; ``ahead_s``: its
    clock is so much before ours."""

    def __init__(self, *refusals: int, ahead_s: float = 0.0) -> None:
        self.refusals, self.ahead_s = list(refusals), ahead_s
        self.left: list[int] = []
        self.pushed: list[Any] = []

    def ActivateNode(self, request: Any) -> Any:
        if self.refusals:
            headers = {"date": formatdate(time.time() + self.ahead_s, usegmt=True)}
            response = httpx.Response(self.refusals.pop(0), headers=headers, json={"detail": "no"})
            raise httpx.HTTPStatusError("no", request=httpx.Request("POST", "https://x"), response=response)
        return SimpleNamespace(node_id=7)

    def DeactivateNode(self, request: Any) -> None:
        self.left.append(request.node_id)

    def PushMessages(self, request: Any) -> Any:
        if self.refusals:
            self.ActivateNode(request)
        self.pushed += request.messages_list
        return SimpleNamespace(session_id="session", objects_to_push=[])

    def PushObject(self, request: Any) -> None:
        raise AssertionError("nothing was to be pushed")


def fleet_of(folder: Path, coordinator: Coordinator) -> Fleet:
    create_authority(folder, "fed")
    (folder / "key").write_bytes(new_private_key())
    made = Fleet("localhost", 1, folder / "ca.pem", folder / "key", folder / "node", threading.Event())
    made.__dict__["_client"] = coordinator
    return made


def message_of(parcel: Parcel) -> Message:
    message = Message(content_of(parcel), 7, MESSAGE_TYPE, ttl=100.0)
    message.metadata.__dict__["_message_id"] = message.object_id
    return message


def test_a_task_that_a_killed_process_had_is_given_back(tmp_path: Path) -> None:
    coordinator, message = Coordinator(), message_of(TASK)
    (tmp_path / "node").write_text("7")
    (tmp_path / "task").write_bytes(message_to_proto(message).SerializeToString())
    with fleet_of(tmp_path, coordinator).connected():
        assert coordinator.left == [7], "or it would be taken for the old one"
        (given_back,) = coordinator.pushed
        assert given_back.metadata.reply_to_message_id == message.object_id
        assert given_back.error.code == NODE_UNAVAILABLE
        assert not (tmp_path / "task").exists()


@pytest.mark.parametrize("content", [b"", b"not a message"])
def test_a_damaged_note_of_a_task_is_dropped(tmp_path: Path, content: bytes) -> None:
    coordinator = Coordinator()
    (tmp_path / "task").write_bytes(content)
    with fleet_of(tmp_path, coordinator).connected():
        assert not (tmp_path / "task").exists()


def test_a_task_of_a_run_that_is_over_is_dropped(tmp_path: Path) -> None:
    coordinator = Coordinator()
    fleet = fleet_of(tmp_path, coordinator)
    (tmp_path / "task").write_bytes(message_to_proto(message_of(TASK)).SerializeToString())
    coordinator.PushMessages = lambda request: Coordinator(403).ActivateNode(request)  # type: ignore[method-assign]
    with fleet.connected():
        assert not (tmp_path / "task").exists()


@pytest.mark.parametrize("ahead_s", [-200, 200])
def test_a_clock_that_is_off_is_made_up_for_once(tmp_path: Path, ahead_s: int) -> None:
    fleet = fleet_of(tmp_path, Coordinator(401, ahead_s=ahead_s))
    with fleet.connected():
        pass
    with pytest.raises(
        NotAdmitted, match=r"the key is not enrolled \(HTTP 401: no"
    ):  # with the right time it is the key
        fleet_of(tmp_path, Coordinator(401, 401, ahead_s=ahead_s)).connected().__enter__()


def test_a_clock_that_is_far_off_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotAdmitted, match="this machine's clock is 400 s behind the coordinator's: set it"):
        fleet_of(tmp_path, Coordinator(401, ahead_s=400)).connected().__enter__()


def grid_of(**calls: Any) -> Any:
    run = SimpleNamespace(run_id=5)
    return SimpleNamespace(_runtime_client=SimpleNamespace(**calls), run=run, node=None, **calls)


def test_a_reply_that_broke_off_is_asked_for_again() -> None:
    reply = Message(content_of(TASK), reply_to=message_of(TASK))
    reply.metadata.__dict__["_message_id"] = reply.object_id
    found = SimpleNamespace(messages_list=[message_to_proto(reply)], message_object_trees=[get_object_tree(reply)])
    answers = [
        PullObjectResponse(object_found=True, object_available=False),
        PullObjectResponse(object_found=False, object_available=False),
    ]
    link = GridLink(
        grid_of(
            PullMessages=lambda request: found,
            PullObject=lambda request: answers.pop(0),
            ConfirmMessageReceived=lambda request: None,
        ),
        {"ada": 7},
    )
    asked = {"ada": reply.metadata.reply_to_message_id}
    assert list(link.receive(asked, 10_000)) == [], "it may be on its way"
    ((client, lost),) = link.receive(asked, 10_000)
    assert client == "ada"
    assert isinstance(lost, Lost)
    assert lost.again


@pytest.mark.parametrize(
    "error",
    [
        httpx.ConnectError("refused"),
        ObjectPushError("an object", 5, "a session"),
        httpx.HTTPStatusError("", request=httpx.Request("POST", "https://x"), response=httpx.Response(503)),
    ],
)
def test_what_a_superlink_that_is_started_anew_says_is_an_outage(error: Exception) -> None:
    def fails(messages: Any) -> Any:
        raise error

    with pytest.raises(LinkDown):
        GridLink(grid_of(push_messages=fails), {"ada": 7}).send({"ada": TASK}, 10.0)


def test_what_is_wrong_with_a_request_is_no_outage() -> None:
    def refuses(messages: Any) -> Any:
        raise httpx.HTTPStatusError("", request=httpx.Request("POST", "https://x"), response=httpx.Response(403))

    with pytest.raises(httpx.HTTPStatusError):
        GridLink(grid_of(push_messages=refuses), {"ada": 7}).send({"ada": TASK}, 10.0)
