"""A message's objects, pulled one by one within a bound: a sender that lies about size, or stops half-way, costs
little.

Flower's own way takes a message of any size into memory, and waits up to two hours for one whose sender died.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

from flwr.app import Array, Message
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.constant import HEAD_BODY_DIVIDER
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_children_ids_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    inflate_object_from_contents,
)

from flocktune.engine.parcels import shown
from flocktune.errors import UpdateRefused

MOST_OBJECTS = 100_000
"""Pieces are of 5 MiB: this is far above any message that flocktune sends."""

MOST_TOLD_BYTES = 16 << 20
"""Beside the pieces' own bytes: a parcel's fields, and which pieces there are. To read it takes many times its size."""


class BrokenOff(UpdateRefused):
    """The rest of a message will not come: Flower has given it up, some minutes after its sender did."""


@dataclass
class Arriving:
    """A message whose objects are on their way. ``there``: the ids of those that have come, kept or not."""

    tree: ObjectTree
    contents: dict[str, bytes] = field(default_factory=dict)
    there: set[str] = field(default_factory=set)
    pulled_bytes: int = 0

    def pull(self, pull_object: Callable[[str], bytes], limit_bytes: int) -> Message | None:
        """Pull what is there. The message when it is whole, None when some of it has not been sent yet.

        Raises UpdateRefused when it is larger than ``limit_bytes``, or can not be put together, and BrokenOff.
        """
        wanted = [node.object_id for node in iterate_object_tree(self.tree)]
        if len(wanted) > MOST_OBJECTS:
            raise UpdateRefused(f"message: expected at most {MOST_OBJECTS} pieces, got {len(wanted)}")
        try:
            for object_id in sorted(wanted, key=self.there.__contains__):  # what was let go: when all the rest is there
                if object_id not in self.contents:
                    content = pull_object(object_id)
                    self.pulled_bytes += 0 if object_id in self.there else len(content)
                    if self.pulled_bytes > limit_bytes:
                        raise UpdateRefused(f"message: expected at most {limit_bytes:,} bytes, got more")
                    self.contents[object_id] = content
                    self.there.add(object_id)
        except ObjectUnavailableError:
            return None
        except ObjectPullError as error:
            raise BrokenOff(f"message: its sender broke off ({error})") from None
        return self._put_together(limit_bytes)

    def let_go(self) -> None:
        """Keep no piece in memory, only that it is there: it is pulled once more when the last one has come."""
        self.contents.clear()

    def _put_together(self, limit_bytes: int) -> Message:
        try:
            _refuse_swelling(self.contents, limit_bytes)
            message = inflate_object_from_contents(self.tree.object_id, self.contents)
            message.__dict__["_metadata"].__dict__["_message_id"] = self.tree.object_id
        except Exception as error:  # whatever a stranger's bytes raise, in Flower's code and below it
            raise UpdateRefused(shown(f"message: can not be put together ({type(error).__name__}: {error})")) from None
        return cast(Message, message)


def _refuse_swelling(contents: Mapping[str, bytes], limit_bytes: int) -> None:
    """Raise ValueError when ``contents`` would grow beyond the limit: an array may name one piece many times over."""
    told_bytes = sum(
        content.index(HEAD_BODY_DIVIDER) if content.startswith(b"ArrayChunk ") else len(content)
        for content in contents.values()
    )
    if told_bytes > MOST_TOLD_BYTES:
        raise ValueError(f"expected at most {MOST_TOLD_BYTES:,} bytes beside tensors, got {told_bytes:,}")
    array_bytes = 0
    for content in contents.values():
        if content.startswith(b"Array "):
            pieces = get_object_children_ids_from_object_content(content)
            numbers = json.loads(get_object_body(content, Array).decode())["arraychunk_ids"]
            array_bytes += sum(len(contents[pieces[number]]) for number in numbers)
    if array_bytes > limit_bytes:
        raise ValueError(f"expected at most {limit_bytes:,} bytes of tensors, got {array_bytes:,}")
