"""A round's replies by secure aggregation: five phases of tasks on any engine, and one sum of all who stayed.

Each phase is a task of its own kind for those who answered the one before. Who drops out is left out with its reason:
before ``masked`` it is simply not in the sum, after it the others' shares take its part in the masks away. With fewer
than the threshold at any time the round fails, and nothing was learnt.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np

from flocktune.config.secure_aggregation import CONSISTENCY, KEYS, MASKED, SHARES, UNMASK, SecureAggregationConfig
from flocktune.engine.client import check_update
from flocktune.engine.rounds import Collect
from flocktune.errors import RoundFailed, UpdateRefused
from flocktune.interfaces import Engine
from flocktune.privacy.secagg import masks, server
from flocktune.privacy.secagg.fixed_point import TOTALS, Encoding, decode_totals, least_to_unmask, shaped
from flocktune.privacy.secagg.half import CLIPPED
from flocktune.privacy.secagg.messages import (
    ENTRY_BYTES,
    GROUP,
    SEALED_BYTES,
    SIGNATURE_BYTES,
    Entry,
    SecureAggregationRefused,
    as_bytes,
    as_list,
    as_rows,
    asked_for,
    from_client,
    message,
    pack_names,
    unpacked,
    without_secrets,
)
from flocktune.scheduling import Cohort
from flocktune.tensors import mismatches
from flocktune.types import ClientTask, Failure, Mean, Tensors, Update, merge_metrics

_LOG = logging.getLogger(__name__)

Replies: TypeAlias = Iterator[tuple[tuple[str, ...], Update | Failure]]


def secure(settings: SecureAggregationConfig, returned: Callable[[ClientTask], Tensors]) -> Collect:
    """How a round's replies are had. ``returned``: a task of the method -> names and shapes of its update.

    A cohort of nobody gives nothing. Raises RoundFailed, with every reason, when fewer than the threshold, or than
    ``min_clients``, stay.
    """

    def collect(engine: Engine, tasks: Iterator[ClientTask], cohort: Cohort) -> Replies:
        given = {task.client: task for task in tasks}
        if not given:
            return
        exchange = _Exchange(settings, engine, given, returned)
        try:
            yield from exchange.run(cohort.wanted)
        finally:
            for client in given:  # those that dropped out have not come to throw them away
                if client in engine.memories:
                    engine.memories[client] = without_secrets(engine.memories[client])

    return collect


@dataclass
class _Exchange:
    """One round under way. ``there``: who answered every phase so far; ``failures``: why the others did not."""

    settings: SecureAggregationConfig
    engine: Engine
    tasks: Mapping[str, ClientTask]
    returned: Callable[[ClientTask], Tensors]
    there: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    seconds: Mean = field(default_factory=Mean)

    def run(self, wanted: int) -> Replies:
        self.there = list(self.tasks)
        first = next(iter(self.tasks.values()))
        attempt = secrets.token_bytes(32)
        context = hashlib.sha256(masks.framed(asked_for(first), attempt)).digest()
        entries: dict[str, Entry] = {}

        def advertised(client: str, update: Update) -> None:
            entry = unpacked(client, as_bytes(update.delta[f"{GROUP}/keys"]))
            server.refuse_unsigned(context, entry)
            entries[client] = entry

        hello = message(attempt=attempt)
        yield from self._phase(KEYS, lambda client: hello, advertised, self.settings.min_clients, wanted)
        method = self._layout()
        needed = least_to_unmask(self.settings.threshold, self.settings.min_clients, len(entries))
        size = sum(value.numel() for value in method.values())
        round = server.begin(context, needed, [entries[client] for client in self.there], size, TOTALS)
        yield from self._share(round)
        names: dict[str, tuple[str, ...]] = {}
        yield from self._masked(round, names)
        survivors = tuple(round.survivors)
        yield from self._unmask(round, survivors)
        yield survivors, self._sum(round, method, names[survivors[0]])

    def _share(self, round: server.Round) -> Replies:
        keys = as_rows([entry.packed for entry in round.entries], ENTRY_BYTES)
        entries = message(names=pack_names(round.names), keys=keys)

        def taken(client: str, update: Update) -> None:
            rows = [as_bytes(row) for row in update.delta[f"{GROUP}/shares"]]
            round.take_shares(client, rows, as_bytes(update.delta[f"{GROUP}/commitment"]))

        yield from self._phase(SHARES, lambda client: entries, taken, round.threshold)

    def _masked(self, round: server.Round, names: dict[str, tuple[str, ...]]) -> Replies:
        present = as_list(self.there, round.names)

        def asked(client: str) -> Tensors:
            own = message(shares=as_rows(round.sealed_for(client), SEALED_BYTES), present=present)
            return {**self.tasks[client].tensors, **own}

        def taken(client: str, update: Update) -> None:
            told = tuple(sorted(name for name in update.metrics if name != "seconds"))
            if told != next(iter(names.values()), told):
                raise SecureAggregationRefused("its metrics are others than those of the clients before it")
            names[client] = told
            values, totals = update.delta[f"{GROUP}/values"].numpy(), update.delta[f"{GROUP}/totals"].numpy()
            round.take_masked(client, values.view(np.uint32), totals.view(np.uint64))

        yield from self._phase(MASKED, asked, taken, round.threshold)

    def _unmask(self, round: server.Round, survivors: tuple[str, ...]) -> Replies:
        """Nobody who drops out here is out of the sum: it is not known any more what its part was."""
        signatures: dict[str, bytes] = {}
        revealed: dict[str, list[bytes]] = {}
        stayed = message(survivors=as_list(survivors, round.names))

        def signed(client: str, update: Update) -> None:
            signatures[client] = as_bytes(update.delta[f"{GROUP}/signature"])

        def shown(client: str, update: Update) -> None:
            revealed[client] = [as_bytes(row) for row in update.delta[f"{GROUP}/revealed"]]

        for _ in self._phase(CONSISTENCY, lambda client: stayed, signed, round.threshold):
            pass
        rows = [signatures.get(name, bytes(SIGNATURE_BYTES)) for name in round.names]
        all_signed = message(signed=as_list(list(signatures), round.names), signatures=as_rows(rows, SIGNATURE_BYTES))
        for _ in self._phase(UNMASK, lambda client: all_signed, shown, round.threshold):
            pass
        try:
            round.unmasked(revealed)
        except SecureAggregationRefused as refusal:
            raise self._failed(round.threshold, Failure("secure aggregation", str(refusal))) from None
        yield from ()

    def _phase(
        self,
        kind: str,
        asked: Callable[[str], Tensors],
        taken: Callable[[str, Update], None],
        needed: int,
        wanted: int | None = None,
    ) -> Replies:
        """One task for each who is there, until ``wanted`` have answered; gives the failures.

        Raises RoundFailed when fewer than ``needed`` answered.
        """
        there, self.there = self.there, []
        phase = {client: replace(self.tasks[client], kind=kind, tensors=asked(client)) for client in there}
        wanted = len(there) if wanted is None else wanted
        for client, reply in zip(there, self.engine.run(iter(phase.values()), wanted), strict=False):
            if isinstance(reply, Update):
                try:
                    check_update(from_client(phase[client], self._method(client)), reply)
                    taken(client, reply)
                except (UpdateRefused, SecureAggregationRefused) as refusal:
                    reply = Failure(client, str(refusal))
            if isinstance(reply, Failure):
                failure = replace(reply, reason=f"{kind}: {reply.reason}")
                self.failures.append(failure)
                yield (client,), failure
                continue
            self.there.append(client)
            self.seconds += reply.metrics.get("seconds", Mean())
            if len(self.there) >= wanted:
                break
        if len(self.there) < needed:
            raise self._failed(needed)

    def _method(self, client: str) -> Tensors:
        return self.returned(self.tasks[client])

    def _layout(self) -> Tensors:
        """The names and shapes of the method's update, which must be the same for all."""
        first = self._method(self.there[0])
        for client in self.there[1:]:
            other = self._method(client)
            if other is not first and mismatches(first, other):
                raise self._failed(len(self.there), Failure(client, "its update has other shapes than those of others"))
        return first

    def _sum(self, round: server.Round, method: Tensors, names: tuple[str, ...]) -> Update:
        """The weighted mean. Each client sent its values times weight / max_weight."""
        weight, metrics = decode_totals(round.totals, names)
        count = len(round.survivors)
        if not 0 < weight < np.inf:
            raise self._failed(round.threshold, Failure("secure aggregation", f"a sum of weights of {weight}"))
        clipped = metrics.pop(CLIPPED, Mean())
        if clipped.total:
            _LOG.warning(
                "%d of %d values were clipped to secure_aggregation.range %g",
                clipped.total,
                clipped.count,
                self.settings.range,
            )
        total = Encoding(self.settings.range, len(round.entries)).decode(round.values)
        mean = total * ((self.settings.max_weight or 1.0) / weight)
        merged = merge_metrics(metrics, {"seconds": Mean(self.seconds.total, count), CLIPPED: clipped})
        return Update(shaped(mean, method), weight, count, merged)

    def _failed(self, needed: int, *more: Failure) -> RoundFailed:
        number = next(iter(self.tasks.values())).round
        setting = "secure_aggregation.threshold or secure_aggregation.min_clients"
        return RoundFailed(number, needed, len(self.there), [*self.failures, *more], setting)
