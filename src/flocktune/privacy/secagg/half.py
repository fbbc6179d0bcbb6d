"""The phases around any method's client half: what comes and goes is tensors, what lies between is in memory.

A client's memory holds, beside the method's own:

    secagg/identity   its long-lived Ed25519 private key; made when there is none
    secagg/peers      JSON: name -> identity, in hex, of every client as it was seen first
    secagg/state      the secrets of a round under way; gone when it is over
"""

from __future__ import annotations

import hashlib
import math
import secrets
from dataclasses import replace

import numpy as np
import torch

from flocktune.config.secure_aggregation import KEYS, PHASES, SecureAggregationConfig
from flocktune.interfaces import ClientHalf, Memory
from flocktune.privacy.secagg import client, masks
from flocktune.privacy.secagg.client import Random, State
from flocktune.privacy.secagg.fixed_point import MOST_METRICS, Encoding, encode_totals, flat
from flocktune.privacy.secagg.messages import (
    ATTEMPT_BYTES,
    GROUP,
    IDENTITY,
    SEALED_BYTES,
    SHARE_BYTES,
    SIGNATURE_BYTES,
    STATE,
    SecureAggregationRefused,
    as_bytes,
    as_rows,
    as_tensor,
    asked_for,
    listed,
    message,
    method_part,
    part,
    peers_memory,
    peers_of,
    read_entries,
    without_secrets,
)
from flocktune.tensors import norm
from flocktune.types import ClientTask, Mean, Update

CLIPPED = "clipped_values"
"""A metric: how many values lay outside the range, of how many."""


def secure_half(
    half: ClientHalf, settings: SecureAggregationConfig, random: Random = secrets.token_bytes
) -> ClientHalf:
    """``half`` within secure aggregation: it is run in the phase ``masked``.

    A task of any other kind is refused: its update would leave as it is. ``random``: n -> n secret bytes.
    """

    def answer(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
        if task.kind not in PHASES:
            raise SecureAggregationRefused(f"a task of kind {task.kind!r} in a run with secure aggregation")
        identity = as_bytes(memory[IDENTITY]) if IDENTITY in memory else random(masks.KEY_BYTES)
        memory = {**memory, IDENTITY: as_tensor(identity)}
        if task.kind == KEYS:
            attempt = as_bytes(part(task.tensors, "attempt", ATTEMPT_BYTES))
            context = hashlib.sha256(masks.framed(asked_for(task), attempt)).digest()
            state, entry = client.advertise(asked_for(task), context, task.client, identity, random)
            return _reply(keys=entry.packed), _with(memory, state)
        state = _state(memory, task)
        match task.kind:
            case "secagg/shares":
                return _share(task, memory, state, settings, random)
            case "secagg/masked":
                return _masked(task, memory, state, settings, half)
            case "secagg/consistency":
                state, signature = client.consent(state, listed(task.tensors, "survivors", state.names), identity)
                return _reply(signature=signature), _with(memory, state)
            case _:
                return _unmask(task, memory, state)

    return answer


def _share(
    task: ClientTask, memory: Memory, state: State, settings: SecureAggregationConfig, random: Random
) -> tuple[Update, Memory]:
    own = masks.identity_of(as_bytes(memory[IDENTITY]))  # in its own list, too, no other may sign for it
    entries, known = read_entries(task.tensors), {**peers_of(memory), state.name: own}
    state, sealed, committed = client.share(state, entries, known, settings.threshold, settings.min_clients, random)
    memory = {**memory, **peers_memory({**known, **{entry.name: entry.identity for entry in entries}})}
    return _reply(shares=as_rows(sealed, SEALED_BYTES), commitment=committed), _with(memory, state)


def _masked(
    task: ClientTask, memory: Memory, state: State, settings: SecureAggregationConfig, half: ClientHalf
) -> tuple[Update, Memory]:
    """Train, and send what came out under masks: values times weight, the weight, the metrics."""
    present = listed(task.tensors, "present", state.names)
    rows = part(task.tensors, "shares", len(state.names), SEALED_BYTES)
    sealed = {name: as_bytes(row) for name, row in zip(state.names, rows, strict=True)}
    client.take_shares(state, present, sealed)  # before training: what is to be refused need not be trained for
    update, after = half(replace(task, tensors=method_part(task.tensors)), method_part(memory))
    _refuse_update(update)
    most = settings.max_weight or 1.0
    weight = min(update.weight, most)
    encoding = Encoding(settings.range, len(state.names))
    values, clipped = encoding.encode(flat(update.delta), weight / most)
    metrics = {**update.metrics, CLIPPED: Mean(clipped, values.size)}
    totals = encode_totals(weight, metrics, len(state.names))
    state = client.mask(state, present, sealed, values, totals)
    reply = Update(
        {
            f"{GROUP}/values": torch.from_numpy(values.view(np.int32)),
            f"{GROUP}/totals": torch.from_numpy(totals.view(np.int64)),
        },
        1.0,
        1,
        dict.fromkeys(sorted(metrics), Mean()),  # which there are; what they are is in the totals
    )
    own = {name: value for name, value in memory.items() if name.startswith(f"{GROUP}/")}
    return reply, _with({**after, **own}, state)


def _unmask(task: ClientTask, memory: Memory, state: State) -> tuple[Update, Memory]:
    rows = part(task.tensors, "signatures", len(state.names), SIGNATURE_BYTES)
    signed = listed(task.tensors, "signed", state.names)
    by_name = dict(zip(state.names, rows, strict=True))
    revealed = client.unmask(state, {name: as_bytes(by_name[name]) for name in signed})
    return _reply(revealed=as_rows(revealed, SHARE_BYTES)), without_secrets(memory)


def _refuse_update(update: Update) -> None:
    """Raise SecureAggregationRefused for what has no place in a sum: its like would spoil it, and nobody could tell."""
    numbers = [update.weight, *(number for mean in update.metrics.values() for number in (mean.total, mean.count))]
    if not all(map(math.isfinite, numbers)) or not math.isfinite(norm(update.delta)) or update.weight <= 0:
        raise SecureAggregationRefused("the update, its weight or its metrics are not finite, or the weight is not > 0")
    if len(update.metrics) >= MOST_METRICS:
        raise SecureAggregationRefused(f"expected fewer than {MOST_METRICS} metrics, got {len(update.metrics)}")


def _state(memory: Memory, task: ClientTask) -> State:
    state = client.from_bytes(as_bytes(memory[STATE])) if STATE in memory else None
    if state is None or state.asked_for != asked_for(task):
        raise SecureAggregationRefused("this round is not under way here: it is over, or this client did not begin it")
    return state


def _with(memory: Memory, state: State) -> Memory:
    return {**memory, STATE: as_tensor(client.to_bytes(state))}


def _reply(**parts: bytes | torch.Tensor) -> Update:
    """An answer that is no update: weight 1 and no metrics, whoever gives it."""
    return Update(message(**parts), 1.0)
