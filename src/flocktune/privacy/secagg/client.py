"""One client's phases, as pure functions over what it remembers within a round.

    advertise -> share -> mask -> consent -> unmask

Each takes the state that the one before left, and only that: a phase that comes twice, or out of its order, is refused,
so that one answer of each is ever given for one set of keys. After the last one nothing is left.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flocktune.privacy.secagg import masks, shamir
from flocktune.privacy.secagg.fixed_point import least_to_unmask
from flocktune.privacy.secagg.messages import SEALED_BYTES, SHARE_BYTES, Entry, SecureAggregationRefused, transcript

Random = Callable[[int], bytes]
"""n -> n secret bytes."""


@dataclass(frozen=True)
class State:
    """What a client remembers within a round; it holds secrets, and goes with the round.

    ``done``: how many phases were. ``asked_for``: round, recipe and model. ``context``: names the round's attempt in
    keys and signatures. ``entries``: the round's list of clients. ``held``: by name, shares that others gave, and this
    client's own: of the mask key, of the own mask. ``added``: those whose masks are in what was sent. ``survivors``:
    those whose sum is to be unmasked.
    """

    done: int
    asked_for: bytes
    context: bytes
    name: str
    mask_private: bytes
    share_private: bytes
    own_mask: bytes = b""
    threshold: int = 0
    entries: tuple[Entry, ...] = ()
    held: Mapping[str, tuple[bytes, bytes]] = field(default_factory=dict)
    added: tuple[str, ...] = ()
    survivors: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The round's clients, in the order of its list."""
        return tuple(entry.name for entry in self.entries)


def to_bytes(state: State) -> bytes:
    """For a client's memory."""
    return json.dumps(asdict(state), default=bytes.hex).encode()


def from_bytes(data: bytes) -> State:
    """The inverse of :func:`to_bytes`."""
    said = json.loads(data)
    plain: dict[str, Any] = {key: said[key] for key in ("done", "name", "threshold")}
    plain |= {key: tuple(said[key]) for key in ("added", "survivors")}
    plain |= {key: bytes.fromhex(said[key]) for key in _SECRET_OR_LONG}
    plain["held"] = {name: (bytes.fromhex(key), bytes.fromhex(own)) for name, (key, own) in said["held"].items()}
    plain["entries"] = tuple(
        Entry(entry.pop("name"), *(bytes.fromhex(value) for value in entry.values())) for entry in said["entries"]
    )
    return State(**plain)


_SECRET_OR_LONG = ("asked_for", "context", "mask_private", "share_private", "own_mask")


def advertise(asked_for: bytes, context: bytes, name: str, identity: bytes, random: Random) -> tuple[State, Entry]:
    """Fresh keys for one round, signed by the client's own ``identity`` (its private key)."""
    state = State(1, asked_for, context, name, random(masks.KEY_BYTES), random(masks.KEY_BYTES))
    keys = masks.public_key(state.mask_private), masks.public_key(state.share_private)
    who = masks.identity_of(identity)
    return state, Entry(name, who, *keys, masks.sign(identity, signed_keys(context, name, who, *keys)))


def share(
    state: State, entries: Sequence[Entry], known: Mapping[str, bytes], threshold: float, least: int, random: Random
) -> tuple[State, list[bytes], bytes]:
    """Sealed shares for each client of the list, and a commitment to the own mask.

    ``known``: identities that were seen before, by name. Raises SecureAggregationRefused for a list that is too short,
    or that holds a key that is not signed by the identity of its client.
    """
    _refuse_other_phase(state, 1)
    _refuse_list(state, entries, known, least)
    needed = least_to_unmask(threshold, least, len(entries))
    own_mask = random(masks.KEY_BYTES)
    of_key, of_mask = (shamir.split(each, len(entries), needed, random) for each in (state.mask_private, own_mask))
    sealed, held = [], {}
    for entry, key_share, mask_share in zip(entries, of_key, of_mask, strict=True):
        if entry.name == state.name:
            held[entry.name] = (key_share, mask_share)
            sealed.append(bytes(SEALED_BYTES))  # its own stays here
            continue
        key, about = _sealing(state, entry, sender=state.name, receiver=entry.name)
        sealed.append(masks.seal(key, key_share + mask_share, about))
    after = replace(state, done=2, own_mask=own_mask, threshold=needed, entries=tuple(entries), held=held)
    return after, sealed, commitment(state.context, state.name, own_mask)


def mask(
    state: State,
    present: Sequence[str],
    sealed: Mapping[str, bytes],
    values: NDArray[np.uint32],
    totals: NDArray[np.uint64],
) -> State:
    """Mask ``values`` and ``totals`` in place, by the own mask and one with each of ``present``.

    Raises SecureAggregationRefused when they are too few, or when a share was changed on its way.
    """
    state = take_shares(state, present, sealed)
    add_masks(values, totals, own_keys(state.context, state.name, state.own_mask), 1)
    place = state.names.index(state.name)
    for other, entry in enumerate(state.entries):
        if entry.name in state.added and other != place:
            keys = pair_keys(state.context, state.mask_private, entry.mask_key, state.name, entry.name)
            add_masks(values, totals, keys, 1 if place < other else -1)
    return state


def take_shares(state: State, present: Sequence[str], sealed: Mapping[str, bytes]) -> State:
    """Open what the clients that are present gave this one: without it, this one could not help to unmask."""
    _refuse_other_phase(state, 2)
    if state.name not in present:
        raise SecureAggregationRefused("this client gave shares, and is not on the list of those who did")
    _refuse_few(state, present, "gave shares")
    held = dict(state.held)
    for entry in state.entries:
        if entry.name in present and entry.name != state.name:
            key, about = _sealing(state, entry, sender=entry.name, receiver=state.name)
            text = masks.unseal(key, sealed[entry.name], about)
            if text is None or len(text) != 2 * SHARE_BYTES:
                raise SecureAggregationRefused(
                    f"the shares of {entry.name} can not be opened: changed on their way, or of another round"
                )
            held[entry.name] = (text[:SHARE_BYTES], text[SHARE_BYTES:])
    return replace(state, done=3, held=held, added=tuple(present))


def consent(state: State, survivors: Sequence[str], identity: bytes) -> tuple[State, bytes]:
    """A signature under the list of those whose sum is to be unmasked. One list in one round."""
    _refuse_other_phase(state, 3)
    strangers = set(survivors) - set(state.added)
    if strangers or state.name not in survivors:
        got = f"{sorted(strangers)[0]}, whose masks are not in it" if strangers else "a list without this client"
        raise SecureAggregationRefused(f"survivors: expected some of those who gave shares, got {got}")
    _refuse_few(state, survivors, "survived")
    after = replace(state, done=4, survivors=tuple(survivors))
    return after, masks.sign(identity, signed_survivors(after))


def unmask(state: State, signatures: Mapping[str, bytes]) -> list[bytes]:
    """A share for each client of the list: of the own mask of one that survived, of the mask key of one that did not.

    Never both for one client. Those who gave no shares have none: zeros. Raises SecureAggregationRefused unless enough
    survivors signed the very list that this client signed.
    """
    _refuse_other_phase(state, 4)
    text = signed_survivors(state)
    identities = {entry.name: entry.identity for entry in state.entries}
    forged = [name for name, each in signatures.items() if not masks.is_signed(identities[name], text, each)]
    if forged:
        raise SecureAggregationRefused(f"survivors: {forged[0]} did not sign this list")
    _refuse_few(state, [name for name in signatures if name in state.survivors], "signed the list of survivors")
    revealed = []
    for name in state.names:
        of_key, of_mask = state.held.get(name, (bytes(SHARE_BYTES), bytes(SHARE_BYTES)))
        revealed.append(of_mask if name in state.survivors else of_key if name in state.added else bytes(SHARE_BYTES))
    return revealed


# --- what both sides compute ----------------------------------------------------------------------------


def signed_keys(context: bytes, name: str, identity: bytes, mask_key: bytes, share_key: bytes) -> bytes:
    """What a client signs of its keys."""
    return masks.framed(b"flocktune secagg keys", context, name.encode(), identity, mask_key, share_key)


def signed_survivors(state: State) -> bytes:
    """What survivors sign: the round, its list with all keys, and who of it survived."""
    survivors = [name.encode() for name in state.survivors]
    return masks.framed(
        b"flocktune secagg survivors", *transcript(state.context, state.entries), b"survived", *survivors
    )


def commitment(context: bytes, name: str, own_mask: bytes) -> bytes:
    """By which the server knows that it put an own mask together from right shares; it hides 256 random bits."""
    return hashlib.sha256(masks.framed(b"flocktune secagg own mask", context, name.encode(), own_mask)).digest()


def own_keys(context: bytes, name: str, own_mask: bytes) -> tuple[bytes, bytes]:
    """Of the own mask: the key for values, and the one for totals."""
    values, totals = (masks.derive(own_mask, context, b"own", name.encode(), what) for what in (b"values", b"totals"))
    return values, totals


def pair_keys(context: bytes, private: bytes, public: bytes, one: str, other: str) -> tuple[bytes, bytes]:
    """Of the mask of two clients: the key for values, and the one for totals; the same from either side."""
    pair = masks.framed(*sorted((one.encode(), other.encode())))
    shared = masks.agree(private, public, context, b"pair", pair)
    return masks.derive(shared, b"values"), masks.derive(shared, b"totals")


def add_masks(values: NDArray[np.uint32], totals: NDArray[np.uint64], keys: tuple[bytes, bytes], sign: int) -> None:
    """One mask more (``sign`` 1) or less (-1) in both, in place."""
    masks.add_mask(values, keys[0], sign)
    masks.add_mask(totals, keys[1], sign)


# --- what is refused -----------------------------------------------------------------------------------


def _refuse_other_phase(state: State, done: int) -> None:
    if state.done != done:
        raise SecureAggregationRefused(
            f"this phase is not the next one of the round: {state.done} were done, and it comes after {done}; "
            "each is answered once"
        )


def _refuse_list(state: State, entries: Sequence[Entry], known: Mapping[str, bytes], least: int) -> None:
    names = [entry.name for entry in entries]
    if len(entries) < least:
        raise SecureAggregationRefused(
            f"a list of {len(entries)} clients: a sum of fewer than {least} hides too little"
        )
    if len(set(names)) < len(names) or len({entry.identity for entry in entries}) < len(names):
        raise SecureAggregationRefused("a list with one client, or one identity, more than once")
    mine = [masks.public_key(state.mask_private), masks.public_key(state.share_private)]
    if not any(e.name == state.name and [e.mask_key, e.share_key] == mine for e in entries):
        raise SecureAggregationRefused("a list without this client's own keys")
    for entry in entries:
        if known.get(entry.name, entry.identity) != entry.identity:
            raise SecureAggregationRefused(f"{entry.name} has another identity key than the one that was seen first")
        text = signed_keys(state.context, entry.name, entry.identity, entry.mask_key, entry.share_key)
        if not masks.is_signed(entry.identity, text, entry.signature):
            raise SecureAggregationRefused(f"the keys of {entry.name} are not signed by its identity for this round")


def _refuse_few(state: State, names: Sequence[str], what: str) -> None:
    if len(names) < state.threshold:
        raise SecureAggregationRefused(
            f"{len(names)} of {len(state.entries)} clients {what}; fewer than {state.threshold} are never unmasked"
        )


def _sealing(state: State, other: Entry, *, sender: str, receiver: str) -> tuple[bytes, bytes]:
    """Key for shares from ``sender`` to ``receiver``, one of whom is ``other``, and what they are bound to."""
    about = masks.framed(state.context, sender.encode(), receiver.encode())
    return masks.agree(state.share_private, other.share_key, b"shares", about), about
