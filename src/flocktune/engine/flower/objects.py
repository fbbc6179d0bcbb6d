"""A message's objects, pulled one by one within a bound: a sender that lies about size, or stops half-way, costs
little.

Flower's own way takes a message of any size into memory, and waits up to two hours for one whose sender died.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from flwr.app import Message
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    inflate_object_from_contents,
)

from flocktune.errors import UpdateRefused

MOST_OBJECTS = 100_000
"""Pieces are of 5 MiB: this is far above any message that flocktune sends."""


class BrokenOff(UpdateRefused):
    """The rest of a message will not come: Flower has given it up, some minutes after its sender did."""


@dataclass
class Arriving:
    """A message whose objects are on their way."""

    tree: ObjectTree
    contents: dict[str, bytes] = field(default_factory=dict)
    pulled_bytes: int = 0

    def pull(self, pull_object: Callable[[str], bytes], limit_bytes: int) -> Message | None:
        """Pull what is there. The message when it is whole, None when some of it has not been sent yet.

        Raises UpdateRefused when it is larger than ``limit_bytes``, or can not be put together, and BrokenOff.
        """
        wanted = [node.object_id for node in iterate_object_tree(self.tree)]
        if len(wanted) > MOST_OBJECTS:
            raise UpdateRefused(f"message: expected at most {MOST_OBJECTS} pieces, got {len(wanted)}")
        try:
            for object_id in wanted:
                if object_id not in self.contents:
                    content = pull_object(object_id)
                    self.pulled_bytes += len(content)
                    if self.pulled_bytes > limit_bytes:
                        raise UpdateRefused(f"message: expected at most {limit_bytes:,} bytes, got more")
                    self.contents[object_id] = content
            message = inflate_object_from_contents(self.tree.object_id, self.contents)
        except ObjectUnavailableError:
            return None
        except ObjectPullError as error:
            raise BrokenOff(f"message: its sender broke off ({error})") from None
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise UpdateRefused(f"message: can not be put together ({type(error).__name__}: {error})") from None
        message.__dict__["_metadata"].__dict__["_message_id"] = self.tree.object_id
        return cast(Message, message)
