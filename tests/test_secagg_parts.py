"""What secure aggregation is made of: integers that do not wrap, shares, masks, a client's phases."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flocktune.privacy.secagg import client, masks, server, shamir
from flocktune.privacy.secagg.client import State, from_bytes, to_bytes
from flocktune.privacy.secagg.fixed_point import Encoding, decode_totals, encode_totals, least_to_unmask
from flocktune.privacy.secagg.messages import Entry, SecureAggregationRefused
from flocktune.types import Mean

NAMES = ("ann", "ben", "cid", "dot", "eve")


def drawn(seed: int) -> client.Random:
    """Bytes that a test can repeat."""
    return random.Random(seed).randbytes


# --- fixed point -----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(clients=st.integers(1, 5000), bound=st.floats(1e-3, 1e3), sign=st.sampled_from((-1.0, 1.0)))
def test_everyone_at_the_edge_does_not_wrap(clients: int, bound: float, sign: float) -> None:
    """Also with everyone beyond it: what is clipped is at the edge."""
    encoding = Encoding(bound, clients)
    one, clipped = encoding.encode(np.array([sign * bound, 3 * sign * bound, math.copysign(1e30, sign)], np.float32))
    whole = (one.astype(np.uint64) * clients).astype(np.uint32)
    assert encoding.decode(whole) == pytest.approx([sign * bound * clients] * 3, rel=1e-5)
    assert clipped >= 2
    assert abs(int(one.view(np.int32)[0])) * clients <= 2**31 - 1


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.lists(st.floats(-1.5, 1.5, width=32), min_size=3, max_size=3), min_size=1, max_size=20),
    more=st.integers(0, 30),
    factor=st.floats(0.01, 1),
)
def test_a_sum_is_off_by_half_a_step_a_client_at_most(values: list[list[float]], more: int, factor: float) -> None:
    encoding = Encoding(1.0, len(values) + more)  # some of the listed may drop out
    total = np.zeros(3, np.uint32)
    clipped = 0
    for one in values:
        encoded, outside = encoding.encode(np.array(one, np.float32), factor)
        total += encoded
        clipped += outside
    exact = np.clip(np.array(values, np.float64) * factor, -1, 1).sum(axis=0)
    assert np.abs(encoding.decode(total) - exact).max() <= len(values) * encoding.step * (0.5 + 1e-6)
    assert clipped == int((np.abs(np.array(values) * factor) > 1).sum())


@settings(max_examples=40, deadline=None)
@given(
    clients=st.lists(
        st.tuples(st.floats(0.1, 1e6), st.floats(-1e6, 1e6), st.integers(0, 10**6)), min_size=1, max_size=12
    )
)
def test_weights_and_metrics_are_summed(clients: list[tuple[float, float, int]]) -> None:
    total = sum(
        encode_totals(weight, {"loss": Mean(loss, tokens), "a": Mean(tokens, 1)}, len(clients))
        for weight, loss, tokens in clients
    )
    weight, metrics = decode_totals(total, ["a", "loss"])
    close = {"abs": len(clients) * 2.0**-20}
    assert weight == pytest.approx(sum(one[0] for one in clients), **close)
    assert metrics["loss"].total == pytest.approx(sum(one[1] for one in clients), **close)
    assert metrics["loss"].count == metrics["a"].total == sum(one[2] for one in clients)


def test_totals_of_liars_do_not_wrap() -> None:
    total = sum(encode_totals(1e300, {"loss": Mean(-1e300, 1)}, 7) for _ in range(7))
    weight, metrics = decode_totals(total, ["loss"])
    assert weight > 1e12
    assert metrics["loss"].total < -1e12


@pytest.mark.parametrize(
    ("threshold", "least", "clients", "needed"),
    [(2 / 3, 3, 3, 3), (2 / 3, 2, 3, 2), (2 / 3, 3, 9, 6), (2 / 3, 3, 10, 7), (0.51, 3, 10, 6), (1.0, 3, 10, 10)],
)
def test_how_many_must_stay(threshold: float, least: int, clients: int, needed: int) -> None:
    assert least_to_unmask(threshold, least, clients) == needed


# --- shares ----------------------------------------------------------------------------------------------


def test_the_field_is_one() -> None:
    assert pow(3, shamir.P - 1, shamir.P) == 1
    assert shamir.P > 2 ** (8 * shamir.SECRET_BYTES)


@settings(max_examples=40, deadline=None)
@given(secret=st.binary(min_size=32, max_size=32), data=st.data())
def test_any_threshold_of_shares_gives_the_secret_back(secret: bytes, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 12))
    threshold = data.draw(st.integers(1, count))
    shares = shamir.split(secret, count, threshold, drawn(1))
    some = data.draw(st.lists(st.integers(1, count), min_size=threshold, max_size=count, unique=True))
    assert shamir.join({place: shares[place - 1] for place in some}, threshold) == secret
    assert all(len(each) == shamir.SHARE_BYTES for each in shares)


def test_fewer_shares_say_nothing() -> None:
    """One share of two is the same for any secret, under one polynomial or another."""
    slope = int.from_bytes(drawn(3)(shamir.SHARE_BYTES + 16), "big") % shamir.P
    (one, _) = shamir.split(bytes(32), 2, 2, drawn(3))
    other_slope = (slope - 5) % shamir.P
    (same, _) = shamir.split((5).to_bytes(32, "big"), 2, 2, lambda count: other_slope.to_bytes(count, "big"))
    assert one == same
    with pytest.raises(ValueError, match="expected 2 shares, got 1"):
        shamir.join({1: one}, 2)


def test_shares_that_do_not_belong_together() -> None:
    one, other = (shamir.split(bytes([each]) * 32, 3, 2, drawn(each)) for each in (1, 2))
    with pytest.raises(ValueError, match="do not belong together"):
        shamir.join({1: one[0], 2: other[1]}, 2)


# --- masks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
@pytest.mark.parametrize("count", [0, 1, 7, 2**18 + 3])
def test_a_mask_that_is_taken_away_again_is_none(dtype: type, count: int) -> None:
    values = np.arange(count, dtype=dtype)
    masks.add_mask(values, b"k" * 32, 1)
    if count > 100:
        assert np.unique(values).size > 0.99 * count
        histogram = np.bincount(values.view(np.uint8), minlength=256)
        expected = values.nbytes / 256
        assert ((histogram - expected) ** 2 / expected).sum() < 400  # chi-square of 255 degrees: 1e-7 at 400
    masks.add_mask(values, b"k" * 32, -1)
    assert np.array_equal(values, np.arange(count, dtype=dtype))


def test_a_mask_is_chacha20_of_its_key() -> None:
    """RFC 8439, A.1, test vectors 1 and 2: the zero key's first two blocks begin so."""
    values = np.zeros(32, np.uint32)
    masks.add_mask(values, bytes(32), 1)
    stream = values.astype("<u4").tobytes()
    assert stream[:8].hex() == "76b8e0ada0f13d90"
    assert stream[64:72].hex() == "9f07e7be5551387a"


def test_two_clients_agree_and_each_purpose_has_its_key() -> None:
    one, other = drawn(1)(32), drawn(2)(32)
    key = masks.agree(one, masks.public_key(other), b"a", b"bc")
    assert masks.agree(other, masks.public_key(one), b"a", b"bc") == key
    assert len({key, masks.agree(one, masks.public_key(other), b"ab", b"c"), masks.derive(key, b"a")}) == 3
    pairs = {client.pair_keys(b"round", one, masks.public_key(other), *names) for names in (("a", "b"), ("b", "a"))}
    assert len(pairs) == 1
    assert len(set(pairs.pop())) == 2
    own = client.own_keys(b"round", "a", one)
    assert len({*own, *client.own_keys(b"round", "b", one), *client.own_keys(b"next", "a", one)}) == 6


# --- one client's phases -----------------------------------------------------------------------------------


class Cohort:
    """Five clients as far as the phase before ``phase``; everything is drawn from fixed bytes."""

    def __init__(self, phase: str, least: int = 3) -> None:
        self.identities = {name: drawn(place)(32) for place, name in enumerate(NAMES)}
        self.states: dict[str, State] = {}
        self.entries: list[Entry] = []
        for place, name in enumerate(NAMES):
            made = client.advertise(b"asked", b"round 1", name, self.identities[name], drawn(10 + place))
            self.states[name] = made[0]
            self.entries.append(made[1])
        self.sealed: dict[str, list[bytes]] = {}
        if phase == "share":
            return
        for place, name in enumerate(NAMES):
            state, rows, _ = self.share(name, drawn(20 + place))
            self.states[name], self.sealed[name] = state, rows
        if phase == "mask":
            return
        for name in NAMES:
            self.states[name] = client.take_shares(self.states[name], NAMES, self.to(name))
        if phase == "consent":
            return
        self.signatures: dict[str, bytes] = {}
        for name in NAMES[:4]:
            self.states[name], self.signatures[name] = client.consent(
                self.states[name], NAMES[:4], self.identities[name]
            )

    def share(self, name: str, random: client.Random = drawn(0), **changes: object) -> tuple[State, list[bytes], bytes]:
        given = {"entries": self.entries, "known": {}, "threshold": 0.6, "least": 3, **changes}
        return client.share(self.states[name], random=random, **given)  # type: ignore[arg-type]

    def to(self, name: str) -> dict[str, bytes]:
        place = NAMES.index(name)
        return {other: rows[place] for other, rows in self.sealed.items()}


def refused(words: str) -> object:
    return pytest.raises(SecureAggregationRefused, match=words)


def other_entry(name: str, context: bytes = b"round 1") -> Entry:
    """Sound keys of somebody else, under this name."""
    return client.advertise(b"asked", context, name, drawn(99)(32), drawn(98))[1]


def test_memory_keeps_a_state_as_it_is() -> None:
    for phase in ("share", "mask", "consent", "unmask"):
        for state in Cohort(phase).states.values():
            assert from_bytes(to_bytes(state)) == state


def test_keys_that_are_not_signed_for_this_round_are_refused() -> None:
    cohort = Cohort("share")
    ben = cohort.entries[1]
    changed = {
        "mask key": replace(ben, mask_key=other_entry("ben").mask_key),
        "share key": replace(ben, share_key=other_entry("ben").share_key),
        "signature": replace(ben, signature=bytes(64)),
        "name": replace(ben, name="bob"),
        "another round's": client.advertise(b"asked", b"round 0", "ben", cohort.identities["ben"], drawn(11))[1],
        "no key at all": replace(ben, identity=bytes(31) + b"\x01"),
    }
    for what, entry in changed.items():
        entries = [entry if each is ben else each for each in cohort.entries]
        with refused(f"the keys of {entry.name} are not signed by its identity for this round"):
            cohort.share("ann", entries=entries)
            pytest.fail(what)


def test_a_key_that_is_not_the_one_seen_first_is_refused() -> None:
    cohort = Cohort("share")
    entries = [other_entry("ben") if each.name == "ben" else each for each in cohort.entries]
    assert cohort.share("ann", entries=entries), "a stranger's sound keys, where nobody was seen before"
    known = {each.name: each.identity for each in cohort.entries}
    with refused("ben has another identity key than the one that was seen first"):
        cohort.share("ann", entries=entries, known=known)
    assert cohort.share("ann", known=known)


def test_lists_that_hide_nobody_are_refused() -> None:
    cohort = Cohort("share")
    ann, ben = cohort.entries[:2]
    twin = client.advertise(b"asked", b"round 1", "zoe", cohort.identities["ben"], drawn(50))[1]
    for entries, words in (
        ([ann, ben], "a list of 2 clients: a sum of fewer than 3 hides too little"),
        ([*cohort.entries, ben], "one client, or one identity, more than once"),
        ([*cohort.entries, twin], "one client, or one identity, more than once"),
        (cohort.entries[1:], "without this client's own keys"),
        ([other_entry("ann"), *cohort.entries[1:]], "without this client's own keys"),
    ):
        with refused(words):
            cohort.share("ann", entries=entries)


def test_shares_that_were_changed_or_are_anothers_are_refused() -> None:
    cohort = Cohort("mask")
    before = Cohort("mask")  # of another round: the same people, other keys
    before.states = {
        name: client.advertise(b"asked", b"round 0", name, before.identities[name], drawn(30))[0] for name in NAMES
    }
    good = cohort.to("ann")
    for wrong in (
        {**good, "ben": good["ben"][:-1] + bytes([good["ben"][-1] ^ 1])},
        {**good, "ben": good["cid"]},
        {**good, "ben": cohort.to("dot")["ben"]},
        {**good, "ben": bytes(148)},
    ):
        with refused("the shares of ben can not be opened: changed on their way, or of another round"):
            client.take_shares(cohort.states["ann"], NAMES, wrong)
    with refused("2 of 5 clients gave shares; fewer than 3 are never unmasked"):
        client.take_shares(cohort.states["ann"], NAMES[:2], good)
    with refused("is not on the list of those who did"):
        client.take_shares(cohort.states["ann"], NAMES[1:], good)


def test_only_one_list_of_survivors_is_signed() -> None:
    cohort = Cohort("consent")
    ann, key = cohort.states["ann"], cohort.identities["ann"]
    with refused("2 of 5 clients survived"):
        client.consent(ann, NAMES[:2], key)
    with refused("a list without this client"):
        client.consent(ann, NAMES[1:], key)
    with refused("zoe, whose masks are not in it"):
        client.consent(ann, (*NAMES, "zoe"), key)
    after, _ = client.consent(ann, NAMES[:4], key)
    with refused("each is answered once"):
        client.consent(after, NAMES[:3], key)


def test_nothing_is_unmasked_without_the_signatures_of_enough_under_the_same_list() -> None:
    cohort = Cohort("unmask")
    ann = cohort.states["ann"]
    shares = client.unmask(ann, cohort.signatures)
    assert shares[:4] == [ann.held[name][1] for name in NAMES[:4]]
    assert shares[4] == ann.held["eve"][0], "of the one who is gone the other kind, and no client's both"
    few = dict(list(cohort.signatures.items())[:2])
    with refused("2 of 5 clients signed the list of survivors"):
        client.unmask(ann, few)
    eve_signs = client.consent(cohort.states["eve"], NAMES, cohort.identities["eve"])[1]
    with refused("eve did not sign this list"):
        client.unmask(ann, {**few, "eve": eve_signs})
    with refused("ben did not sign this list"):
        client.unmask(ann, {**cohort.signatures, "ben": cohort.signatures["ann"]})
    cid_signs_more = client.consent(Cohort("consent").states["cid"], NAMES, cohort.identities["cid"])[1]
    with refused("cid did not sign this list"):
        client.unmask(ann, {**cohort.signatures, "cid": cid_signs_more})
    # Who is not among the survivors does not count, whatever it signed.
    eve = replace(cohort.states["ann"], name="eve")
    signed = masks.sign(cohort.identities["eve"], client.signed_survivors(eve))
    with refused("2 of 5 clients signed"):
        client.unmask(ann, {**few, "eve": signed})


@pytest.mark.parametrize("phase", ["share", "mask", "consent", "unmask"])
def test_a_phase_out_of_its_order_is_refused(phase: str) -> None:
    steps = {
        "share": lambda cohort, state: client.share(state, cohort.entries, {}, 0.6, 3, drawn(0)),
        "mask": lambda cohort, state: client.take_shares(state, NAMES, {}),
        "consent": lambda cohort, state: client.consent(state, NAMES, cohort.identities["ann"]),
        "unmask": lambda cohort, state: client.unmask(state, {}),
    }
    cohort = Cohort(phase)
    for name, step in steps.items():
        if name != phase:
            with refused("is not the next one of the round"):
                step(cohort, cohort.states["ann"])


def test_a_server_notices_shares_that_are_lies() -> None:
    cohort = Cohort("unmask")
    revealed = {name: client.unmask(cohort.states[name], cohort.signatures) for name in NAMES[:4]}
    for changed, words in ((0, "do not give the mask that it committed to"), (4, "do not give its key")):
        round = server.begin(b"round 1", 3, cohort.entries, 4, 4)
        for name in NAMES:
            made = cohort.states[name]
            round.take_shares(name, cohort.sealed[name], client.commitment(b"round 1", name, made.own_mask))
        round.survivors = list(NAMES[:4])
        lies = {name: list(rows) for name, rows in revealed.items()}
        for place, name in enumerate(NAMES[:4]):  # all of them: a secret, and another one
            lies[name][changed] = shamir.split(b"\x01" * 32, 5, 3, drawn(7))[place]
        with refused(f"the shares for {NAMES[changed]} {words}"):
            round.unmasked(lies)
        with refused("2 of 5 clients revealed shares; 3 are needed"):
            round.unmasked({name: revealed[name] for name in NAMES[:2]})
