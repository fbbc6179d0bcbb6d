"""An owner's end of Flower: parcels from the coordinator, and replies to them, over Flower's own Fleet API.

Flower's SuperNode is not used: it runs whatever code the server sends (an app bundle, the FAB) in a new process for
every message. This speaks the same protocol with Flower's own client, takes no app, and runs nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Error, Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError, push_objects
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient

from flocktune.engine.flower.messages import NODE_UNAVAILABLE, content_of, parcel_of
from flocktune.engine.flower.objects import Arriving
from flocktune.engine.flower.signing import CORRECTED_S, Signed, clock_ahead_s
from flocktune.engine.parcels import LinkDown, Parcel
from flocktune.errors import FlocktuneError, UpdateRefused
from flocktune.files import write_atomic

_LOG = logging.getLogger(__name__)

HEARTBEAT_S = 15.0
"""The coordinator takes a client for gone when twice this time has passed without a sign of it."""

PATIENCE_S = 60.0
"""How long the rest of a message is waited for when the coordinator answers, and has none of it: its sender died."""

_UNAVAILABLE = (502, 503, 504)


class NotAdmitted(FlocktuneError):
    """The coordinator knows no such key, or does not accept its signature.

    ``ahead_s``: by how many seconds this machine's clock is ahead of the coordinator's.
    """

    def __init__(self, ahead_s: float, said: str) -> None:
        self.ahead_s = ahead_s
        way = "ahead of" if ahead_s > 0 else "behind"
        wrong = f"this machine's clock is {round(abs(ahead_s), -1):,.0f} s {way} the coordinator's: set it"
        super().__init__(wrong if abs(ahead_s) > CORRECTED_S else f"the key is not enrolled ({said})")


@dataclass(frozen=True)
class Received:
    """A parcel, or why it is none, and what a reply to it needs."""

    message: Message
    parcel: Parcel | None
    refusal: str = ""


class Fleet:
    """One owner's connection. Every method raises LinkDown when the coordinator can not be reached, NotAdmitted.

    ``stop`` ends waits. ``known``: a file for what the coordinator calls this client, to take leave by after a crash;
    beside it, in ``task``, is which task was taken last, to give it back then.
    """

    def __init__(self, host: str, port: int, ca: Path, key: Path, known: Path, stop: threading.Event) -> None:
        private = load_ssh_private_key(key.read_bytes(), None)
        if not isinstance(private, ec.EllipticCurvePrivateKey):
            raise FlocktuneError(f"{key}: expected an elliptic curve key, got another kind")
        self._public = public_key_to_bytes(private.public_key())
        self._signed = Signed(private, self._public)
        # A context of the federation's own CA alone: no public authority can vouch for another server.
        self._client = FleetHttpClient.from_server_address(
            f"{host}:{port}",
            insecure=False,
            root_certificates=ca.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperNode"), self._signed],
        )
        self._known, self._taken, self._stop = known, known.with_name("task"), stop
        self._node = Node()
        self._forgotten = False

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Be there for the coordinator, with heartbeats, until the block ends."""
        self._leave_before()
        self._node = Node(node_id=self._activated())
        with suppress(OSError):  # a full disk: it matters after a crash alone
            write_atomic(self._known, str(self._node.node_id))
        self._give_back()
        self._forgotten, ended = False, threading.Event()
        beats = threading.Thread(target=self._beat, args=(ended,), name="heartbeat", daemon=True)
        beats.start()
        try:
            yield
        finally:
            ended.set()
            beats.join()
            self._deactivate(self._node.node_id)

    def _activated(self) -> int:
        """The node id; by the coordinator's clock when ours was refused."""
        request = ActivateNodeRequest(public_key=self._public, heartbeat_interval=HEARTBEAT_S)
        try:
            with _errors_said():
                return int(self._client.ActivateNode(request).node_id)
        except NotAdmitted as refusal:
            if not self._signed.corrected(refusal.ahead_s):
                raise
        with _errors_said():
            return int(self._client.ActivateNode(request).node_id)

    def _leave_before(self) -> None:
        """Take leave for a process of this client that was killed.

        A client that is still taken to be there could not come back before its heartbeats are missed.
        """
        if self._known.exists() and (text := self._known.read_text()).isdigit():
            self._deactivate(int(text))

    def _give_back(self) -> None:
        """Say that the task that was taken last will have no answer, if it had none: it may be given out anew."""
        if not self._taken.exists():
            return
        try:
            message = message_from_proto(MessageProto.FromString(self._taken.read_bytes()))
            self._answer(Message(Error(NODE_UNAVAILABLE, "the client was started anew"), reply_to=message))
        except (LinkDown, NotAdmitted):
            raise
        except Exception as error:  # it is wanted no more, or what was taken, or the file, is no message
            _LOG.debug("a task of before: %s", error)
            self._taken.unlink(missing_ok=True)

    def _deactivate(self, node_id: int) -> None:
        with suppress(httpx.HTTPError):
            self._client.DeactivateNode(DeactivateNodeRequest(node_id=node_id))

    def _beat(self, ended: threading.Event) -> None:
        while not ended.wait(0.8 * HEARTBEAT_S):
            try:
                request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_S)
                self._forgotten = not self._client.SendNodeHeartbeat(request).success
            except httpx.HTTPError as error:
                _LOG.debug("no heartbeat: %s", error)

    def receive(self, limit_bytes: int) -> Received | None:
        """The newest parcel, or None when there is none now. What is larger than ``limit_bytes`` comes as a refusal.

        Flower hands messages out oldest first; those before the newest are tasks that nobody waits for any more, or
        else of another run, which gives them out anew.
        """
        if self._forgotten:
            raise LinkDown("the coordinator does not know this connection any more")
        newest = None
        while not self._stop.is_set() and (found := self._next()):
            if newest is not None:
                self._supersede(newest[0])
            newest = found
        if newest is None:
            return None
        message, tree = newest
        try:
            whole = self._pull(Arriving(tree), message.metadata.run_id, limit_bytes)
            received = Received(message, parcel_of(whole))
        except UpdateRefused as refusal:
            received = Received(message, None, str(refusal))
        self._confirm(message)
        return received

    def _next(self) -> tuple[Message, ObjectTree] | None:
        """The oldest message that was not handed out, without its objects."""
        with _errors_said():
            found = self._client.PullMessages(PullMessagesRequest(node=self._node))
        if not found.messages_list:
            return None
        with suppress(OSError):
            write_atomic(self._taken, found.messages_list[0].SerializeToString())
        return message_from_proto(found.messages_list[0]), found.message_object_trees[0]

    def _supersede(self, message: Message) -> None:
        """Give a task back for a newer one. The note of the task that was taken last is the newer one's: it stays."""
        with suppress(FlocktuneError):  # as when its run is over: then nobody waits for it
            self._confirm(message)
            self._push(Message(Error(NODE_UNAVAILABLE, "superseded by a newer task"), reply_to=message))

    def _confirm(self, message: Message) -> None:
        """Say that a message has come, and need not be kept."""
        metadata = message.metadata
        request = ConfirmMessageReceivedRequest(
            node=self._node, run_id=metadata.run_id, message_object_id=metadata.message_id
        )
        with _errors_said():
            self._client.ConfirmMessageReceived(request)

    def _pull(self, arriving: Arriving, run_id: int, limit_bytes: int) -> Message:
        """All of a message. A connection that breaks in the middle is waited for: nobody sends this message again."""
        pull_object = make_pull_object_fn_protobuf(self._client.PullObject, self._node, run_id)
        until, pieces = time.monotonic() + PATIENCE_S, 0
        while not self._stop.is_set():
            try:
                with _errors_said():
                    whole = arriving.pull(pull_object, limit_bytes)
                if whole is not None:
                    return whole
            except LinkDown as down:
                _LOG.debug("in the middle of a message: %s", down)
                pieces = -1
            if len(arriving.contents) != pieces:
                until, pieces = time.monotonic() + PATIENCE_S, len(arriving.contents)
            if time.monotonic() > until:
                raise UpdateRefused(f"message: the rest of it did not come within {PATIENCE_S:g} s")
            self._stop.wait(0.3)
        raise LinkDown("stopping")

    def reply(self, received: Received, parcel: Parcel) -> None:
        """Send the reply. Raises FlocktuneError when the coordinator does not want it any more."""
        self._answer(Message(content_of(parcel), reply_to=received.message))

    def _answer(self, message: Message) -> None:
        try:
            self._push(message)
        except (LinkDown, NotAdmitted):
            raise
        except FlocktuneError:
            self._taken.unlink(missing_ok=True)
            raise
        self._taken.unlink(missing_ok=True)

    def _push(self, message: Message) -> None:
        message.metadata.__dict__["_message_id"] = message.object_id
        request = PushMessagesRequest(
            node=self._node,
            messages_list=[message_to_proto(remove_content_from_message(message))],
            message_object_trees=[get_object_tree(message)],
            clientapp_runtime_list=[0.0],
        )
        with _errors_said():
            answer = self._client.PushMessages(request)
            push = make_push_object_fn_protobuf(
                self._client.PushObject, self._node, message.metadata.run_id, answer.session_id
            )
            try:
                push_objects(get_all_nested_objects(message), push, object_ids_to_push=set(answer.objects_to_push))
            except ObjectPushError as error:
                raise FlocktuneError(f"the coordinator no longer takes this reply: {error}") from None


def _detail(response: httpx.Response) -> str:
    """What a refusal says for people."""
    try:
        return str(response.json()["detail"])[:300]
    except (ValueError, KeyError, TypeError):
        return response.text[:300]


@contextmanager
def _errors_said() -> Iterator[None]:
    """HTTP's errors as ours."""
    try:
        yield
    except httpx.TransportError as error:
        raise LinkDown(str(error)) from None
    except httpx.HTTPStatusError as error:
        code = error.response.status_code
        if code in _UNAVAILABLE:
            raise LinkDown(f"HTTP {code}") from None
        if code == 401:
            raise NotAdmitted(clock_ahead_s(error.response), f"HTTP 401: {_detail(error.response)}") from None
        if code == 412:  # one code for all reasons not to be let in
            why = "its key is not enrolled, or was removed, or another process is connected with it"
            raise FlocktuneError(f"the coordinator does not let this client in yet: {why}") from None
        raise FlocktuneError(f"the coordinator said: HTTP {code}: {_detail(error.response)}") from None
