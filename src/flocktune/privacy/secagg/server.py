"""The server's side, as pure functions over what came: it adds, passes sealed shares on, and takes masks away.

What it holds at any time is in :class:`Round`. It never sees a client's own mask before that client's sum with others
is to be unmasked, and a mask key only of a client whose values are in no sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flocktune.privacy.secagg import masks, shamir
from flocktune.privacy.secagg.client import add_masks, commitment, own_keys, pair_keys, signed_keys
from flocktune.privacy.secagg.messages import SEALED_BYTES, Entry, SecureAggregationRefused


@dataclass
class Round:
    """What came so far. ``entries``: the list, in its order; ``sealed``: sender -> its row of sealed shares."""

    context: bytes
    threshold: int
    entries: tuple[Entry, ...]
    values: NDArray[np.uint32]
    totals: NDArray[np.uint64]
    sealed: dict[str, tuple[Sequence[bytes], bytes]] = field(default_factory=dict)
    survivors: list[str] = field(default_factory=list)

    @property
    def names(self) -> tuple[str, ...]:
        """The round's clients, in the order of its list."""
        return tuple(entry.name for entry in self.entries)

    def take_shares(self, name: str, rows: Sequence[bytes], committed: bytes) -> None:
        """A client's sealed shares, one for each of the list, and the commitment to its own mask."""
        self.sealed[name] = rows, committed

    def sealed_for(self, name: str) -> list[bytes]:
        """The row that ``name`` gets: what each of the list gave it; zeros of those who gave nothing."""
        place = self.names.index(name)
        nothing = bytes(SEALED_BYTES)
        return [self.sealed[other][0][place] if other in self.sealed else nothing for other in self.names]

    def take_masked(self, name: str, values: NDArray[np.uint32], totals: NDArray[np.uint64]) -> None:
        """Add one client's masked values."""
        np.add(self.values, values, out=self.values)
        np.add(self.totals, totals, out=self.totals)
        self.survivors.append(name)

    def unmasked(self, revealed: Mapping[str, Sequence[bytes]]) -> None:
        """Take all masks away, by the shares that each of enough clients revealed; ``values`` is then the sum.

        Raises SecureAggregationRefused when there are too few, or when shares do not give back what was committed to.
        """
        if len(revealed) < self.threshold:
            raise SecureAggregationRefused(
                f"{len(revealed)} of {len(self.entries)} clients revealed shares; {self.threshold} are needed"
            )
        for place, entry in enumerate(self.entries):
            if entry.name not in self.sealed:
                continue
            secret = self._joined(entry.name, {self._number(who): rows[place] for who, rows in revealed.items()})
            if entry.name in self.survivors:
                self._take_own_mask(entry, secret)
            else:
                self._take_pair_masks(entry, secret)

    def _number(self, name: str) -> int:
        return self.names.index(name) + 1

    def _joined(self, name: str, shares: Mapping[int, bytes]) -> bytes:
        try:
            return shamir.join(shares, self.threshold)
        except ValueError as error:
            raise SecureAggregationRefused(f"the shares for {name}: {error}") from None

    def _take_own_mask(self, entry: Entry, own_mask: bytes) -> None:
        if commitment(self.context, entry.name, own_mask) != self.sealed[entry.name][1]:
            raise SecureAggregationRefused(f"the shares for {entry.name} do not give the mask that it committed to")
        add_masks(self.values, self.totals, own_keys(self.context, entry.name, own_mask), -1)

    def _take_pair_masks(self, gone: Entry, private: bytes) -> None:
        """What the survivors added for a client that is not in the sum."""
        if masks.public_key(private) != gone.mask_key:
            raise SecureAggregationRefused(f"the shares for {gone.name} do not give its key")
        mine = self.names.index(gone.name)
        for place, entry in enumerate(self.entries):
            if entry.name in self.survivors:
                keys = pair_keys(self.context, private, entry.mask_key, gone.name, entry.name)
                add_masks(self.values, self.totals, keys, -1 if place < mine else 1)


def begin(context: bytes, threshold: int, entries: Sequence[Entry], values: int, totals: int) -> Round:
    """A round of these clients, whose updates have so many values."""
    return Round(context, threshold, tuple(entries), np.zeros(values, np.uint32), np.zeros(totals, np.uint64))


def refuse_unsigned(context: bytes, entry: Entry) -> None:
    """Raise SecureAggregationRefused for keys that other clients would refuse, and end the round by it."""
    text = signed_keys(context, entry.name, entry.identity, entry.mask_key, entry.share_key)
    if not masks.is_signed(entry.identity, text, entry.signature):
        raise SecureAggregationRefused("its keys are not signed by its identity for this round")
