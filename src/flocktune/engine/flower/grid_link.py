"""The server's end of Flower: parcels over a Grid.

Replies are pulled by the calls below ``Grid.pull_messages`` (see :mod:`objects` for why); flwr is pinned to the release
that has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

import httpx
from flwr.app import ArrayRecord, Message
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.superlink.grid import HttpGrid

from flocktune.engine.flower.messages import MESSAGE_TYPE, NODE_UNAVAILABLE, content_of, parcel_of
from flocktune.engine.flower.objects import Arriving, BrokenOff
from flocktune.engine.parcels import LinkDown, Lost, Parcel, shown
from flocktune.errors import UpdateRefused

CLOCKS_APART_S = 900.0
"""A message lives so much longer than its round: owners' clocks may differ by what Flower's signatures allow."""


class GridLink:
    """Clients, by name, as the nodes of a Flower grid. ``nodes``: client -> node id, as they are enrolled."""

    def __init__(self, grid: HttpGrid, nodes: Mapping[str, int]) -> None:
        self._grid = grid
        self._nodes = dict(nodes)
        self._names = {node: name for name, node in nodes.items()}
        self._arriving: dict[str, Arriving] = {}

    def connected(self) -> set[str]:
        """The enrolled clients that are there now."""
        with _as_link_down():
            return {self._names[node] for node in self._grid.get_node_ids() if node in self._names}

    def send(self, parcels: Mapping[str, Parcel], lifetime_s: float) -> Mapping[str, str]:
        """Send each client its parcel; all in one call, so that what they share is stored once."""
        carried: dict[int, ArrayRecord] = {}
        messages = [
            Message(content_of(parcel, carried), self._nodes[client], MESSAGE_TYPE, ttl=lifetime_s + CLOCKS_APART_S)
            for client, parcel in parcels.items()
        ]
        with _as_link_down():
            ids = list(self._grid.push_messages(messages))
        return {client: number for client, number in zip(parcels, ids, strict=False) if number}

    def receive(self, asked: Mapping[str, str], limit_bytes: int) -> Iterator[tuple[str, Parcel | Lost]]:
        """Replies that have come. A message whose objects have not all come is looked at again next time.

        Until then nothing of it is kept: clients that send almost all of a reply do not fill the memory.
        """
        clients = {number: client for client, number in asked.items()}
        self._arriving = {number: arriving for number, arriving in self._arriving.items() if number in clients}
        fresh = [number for number in clients if number not in self._arriving]
        runtime = self._grid._runtime_client
        if fresh:
            with _as_link_down():
                found = runtime.PullMessages(PullAppMessagesRequest(message_ids=fresh))
            for message, tree in zip(found.messages_list, found.message_object_trees, strict=True):
                self._arriving[message.metadata.reply_to_message_id] = Arriving(tree)
        run_id = self._grid.run.run_id
        pull_object = make_pull_object_fn_protobuf(runtime.PullObject, self._grid.node, run_id)
        for number, arriving in list(self._arriving.items()):
            if number not in clients:  # not asked for: never handed on
                del self._arriving[number]
                continue
            try:
                try:
                    with _as_link_down():
                        message = arriving.pull(pull_object, limit_bytes)
                finally:
                    arriving.let_go()
                if message is None:
                    continue
                reply = _reply_of(message)
            except BrokenOff as broken:
                reply = Lost(str(broken), again=True)
            except UpdateRefused as refusal:
                reply = Lost(str(refusal))
            del self._arriving[number]
            with suppress(LinkDown), _as_link_down():  # it lies there until the run is over, no more
                runtime.ConfirmMessageReceived(
                    ConfirmMessageReceivedRequest(
                        node=self._grid.node, run_id=run_id, message_object_id=arriving.tree.object_id
                    )
                )
            yield clients[number], reply


def _reply_of(message: Message) -> Parcel | Lost:
    if message.has_error():
        error = message.error
        if error.code == NODE_UNAVAILABLE:
            return Lost("the connection was lost", again=True)
        return Lost(shown(f"Flower's error {error.code}: {error.reason}"))
    return parcel_of(message)


@contextmanager
def _as_link_down() -> Iterator[None]:
    """What is wrong with the connection is worth another try; what is wrong with a request is not."""
    try:
        yield
    except (httpx.TransportError, ObjectPushError) as error:
        raise LinkDown(str(error)) from None
    except httpx.HTTPStatusError as error:
        if not error.response.is_server_error:
            raise
        raise LinkDown(str(error)) from None
