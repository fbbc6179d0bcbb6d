"""What an owner does with what the coordinator sends: check it, refuse it or do it, and write down what left.

A task chooses among what this flocktune does: it names a method and numbers, and brings tensors. Its paths are not
used; the base model, the emulator and the rows are those that the owner named.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch

from flocktune.algorithms.private_rows import BudgetSpent
from flocktune.audit import AuditLog, nonces, rounds_taken, updates_taken
from flocktune.config.schema import EMBEDDED, ModelConfig, RunConfig, RuntimeConfig
from flocktune.config.secure_aggregation import MASKED
from flocktune.data.encoding import default_cache_folder
from flocktune.engine.client import answer
from flocktune.engine.parcels import EMULATOR, FAILURE, LACKING, READY, TASK, UPDATE, Parcel
from flocktune.errors import FlocktuneError, UpdateRefused, UserError
from flocktune.federated import OwnersSide, owners_side, write_bundle_tensors
from flocktune.interfaces import ClientHalf, Memory
from flocktune.models.bundle import Bundle, bundle_folder, read_bundle, receive_bundle
from flocktune.models.load import pick_device
from flocktune.owner.home import AUDIT, POLICY, PRIVACY_KEY
from flocktune.owner.leaving import bounded, refuse_large
from flocktune.owner.memory import load_memory, save_memory
from flocktune.owner.policy import GB, Asked, Policy, columns_read, load_policy, refusals
from flocktune.owner.reading import Refused, read_names, read_task, refuse_endless, refuse_no_digest, rows_used
from flocktune.owner.trust import load_trust, save_trust
from flocktune.privacy.noise import read_or_make_key
from flocktune.privacy.secagg.messages import SecureAggregationRefused, to_client
from flocktune.protection import around_client, secured
from flocktune.resident import base_digest
from flocktune.training import NotFinite
from flocktune.types import ClientTask, Failure, Update
from flocktune.wire import decode_tensors, encode_tensors, update_fields

_LOG = logging.getLogger(__name__)

_LONGEST = 2000
"""Letters of a reason."""

_USUAL_THREADS = torch.get_num_threads()
"""Torch's own choice, before any task made another."""

_sound_bundle = lru_cache(maxsize=2)(read_bundle)
"""Once in a process, as the model that is loaded from it: it may be gigabytes."""


class Failed(FlocktuneError):
    """Training that went wrong; ``told`` is what the coordinator hears, the message may hold a path or a row's text."""

    def __init__(self, told: str, message: str) -> None:
        self.told = told
        super().__init__(message)


@dataclass(frozen=True)
class Owner:
    """Who joined, with what. ``home`` holds key, policy and audit log; ``model``, ``emulator``: paths, or None."""

    client: str
    home: Path
    data: str
    model: str | None = None
    emulator: str | None = None
    device: str = "auto"
    threads: int = 0
    max_gpu_memory_gb: float | None = None

    @cached_property
    def audit(self) -> AuditLog:
        """Where every task, refusal and update is written down."""
        return AuditLog(self.home / AUDIT)

    @cached_property
    def _lacking(self) -> dict[str, Parcel]:
        """The emulator that was asked for last, and the task that waits for it."""
        return {}

    def answer(self, parcel: Parcel) -> Parcel:
        """The reply to a parcel. Never raises, whatever is wrong with it, with the training, or with the disk."""
        named: dict[str, Any] = {}
        try:
            named = read_names(parcel.fields)
            self.audit.task_received(**_record(named), kind=parcel.kind[:60], bytes=len(parcel.blob))
            return self._reply(parcel, named)
        except Exception as error:  # what a stranger sent must not end the process that holds the model
            expected = isinstance(error, FlocktuneError | OSError)
            _LOG.warning("round %s: not done: %s", named.get("round", "?"), error, exc_info=not expected)
            with suppress(OSError):  # a full disk: nothing leaves but that it was not done
                self.audit.task_refused(**_record(named), reasons=[str(error)])
            return Parcel(FAILURE, {**named, "reason": _told(error)})

    def _reply(self, parcel: Parcel, named: Mapping[str, Any]) -> Parcel:
        if named["client"] != self.client:
            raise Refused(f"this is {self.client}, and the task is for {named['client']!r}")
        match parcel.kind:
            case "task":
                return self._do(parcel, named)
            case "emulator":
                return self._receive_emulator(parcel, named)
            case other:
                raise Refused(f"expected a parcel of kind {TASK} or {EMULATOR}, got {other[:60]!r}")

    def _do(self, parcel: Parcel, named: Mapping[str, Any]) -> Parcel:
        policy = load_policy(self.home / POLICY)
        config, task = read_task(parcel)
        if named["nonce"] in nonces(self.home / AUDIT):
            raise Refused("this task was answered before: a replay")
        bundle = self._bundle(task) if config.method == "fedbiot" else None
        rows = rows_used(config.local, policy.min_rows)
        asked = self._asked(config, task, len(parcel.blob), rows, bundle)
        taken = self._taken(named["run"])
        _refuse(policy, asked, *taken)
        if config.method == "fedbiot" and bundle is None:
            self._lacking.clear()
            self._lacking[task.model_digest] = parcel
            return Parcel(LACKING, {**named, "digest": task.model_digest})
        self._limit(policy)
        side = self._side(config, policy, bundle)
        _refuse(policy, replace(asked, rows=rows_used(config.local, side.rows)), *taken)
        refuse_endless(config.local, side.rows)
        secure = secured(config) is not None
        expected = side.expected(task) if not secure or task.kind == MASKED else {}
        more = {**side.optional, **(to_client() if secure else {})}
        task = replace(task, tensors=decode_tensors(parcel.blob, expected, more=more))
        kept = load_memory(self.home, named["run"])
        trust = load_trust(self.home) if secure else {}
        half = around_client(config, bounded(policy, side.half))
        update, memory = _trained(task, half, {**kept.for_task(task, side.data), **trust})
        refuse_large(policy, update)
        if secure:
            memory = save_trust(self.home, memory)
        save_memory(self.home, named["run"], kept.following(task, memory, side.data), policy.max_memory_mb)
        return self._let_out(update, named, task.kind if secure else "")

    def _let_out(self, update: Update, named: Mapping[str, Any], phase: str = "") -> Parcel:
        """The update as a parcel; it is in the audit log, on disk, before it is handed on.

        ``phase``: of secure aggregation; what leaves in all but one is keys, shares and signatures.
        """
        reply = Parcel(UPDATE, {**named, "update": update_fields(update)}, encode_tensors(update.delta))
        if phase and phase != MASKED:
            self.audit.phase_left(**_record(named), kind=phase, digest=reply.sha256, bytes=len(reply.blob))
            return reply
        self.audit.update_left(
            **_record(named),
            digest=reply.sha256,
            bytes=len(reply.blob),
            tensors=len(update.delta),
            weight=update.weight,
            protected_by="secure_aggregation" if phase else "",
        )
        return reply

    def _side(self, config: RunConfig, policy: Policy, bundle: Bundle | None) -> OwnersSide:
        wanted = [count for count in (policy.max_threads, self.threads, config.runtime.threads) if count]
        torch.set_num_threads(min([*(wanted or [_USUAL_THREADS]), os.cpu_count() or 1]))
        data = replace(config.data, columns=columns_read(policy))
        model = replace(config.model, path=self.model or EMBEDDED, trust_remote_code=False)
        lora = replace(config.lora, start_from=None)
        mine = replace(config, data=data, model=model, lora=lora, runtime=RuntimeConfig(device=self.device))
        secret = read_or_make_key(self.home / PRIVACY_KEY) if config.privacy else None
        return owners_side(mine, self.client, self.data, bundle, secret)

    def _limit(self, policy: Policy) -> None:
        """GPU memory: what is above the owner's limit fails in the allocation, and the task with it.

        Without a limit all of it is set: the task before may have had one.
        """
        device = pick_device(self.device)
        if device.type == "cuda":
            index = device.index or 0
            total = torch.cuda.get_device_properties(index).total_memory
            limits = [limit for limit in (policy.max_gpu_memory_gb, self.max_gpu_memory_gb) if limit is not None]
            torch.cuda.set_per_process_memory_fraction(min([1.0, *(limit * GB / total for limit in limits)]), index)

    def _asked(self, config: RunConfig, task: ClientTask, task_bytes: int, rows: int, bundle: Bundle | None) -> Asked:
        return Asked(
            method=config.method,
            model_digest=task.model_digest,
            allowed_digests=frozenset(self._named_models(config, task, bundle)),
            rank=config.lora.rank,
            round=task.round,
            kind=task.kind,
            trust_remote_code=config.model.trust_remote_code,
            task_bytes=task_bytes,
            rows=rows,
            columns=config.data.columns,
            privacy=config.privacy,
            secure=secured(config) is not None,
        )

    def _named_models(self, config: RunConfig, task: ClientTask, bundle: Bundle | None) -> list[str]:
        """Digests of what the owner named. Who named no emulator takes the coordinator's, which is theirs anyway."""
        if config.method == "fedbiot":
            return [bundle.digest if bundle else task.model_digest]
        if self.model is None and config.model.path != EMBEDDED:
            raise Refused("no base model was named here: join with --model FOLDER")
        return [base_digest(ModelConfig(path=self.model or EMBEDDED))]

    def _taken(self, run: str) -> tuple[int, int]:
        """How many updates left in ``run``, and in all; the log may be long, and is read once a task for it."""
        log = self.home / AUDIT
        return rounds_taken(log, run), updates_taken(log)

    def _bundle(self, task: ClientTask) -> Bundle | None:
        """The emulator that was named, or the one that was received before; None when there is no sound one yet."""
        if self.emulator is not None:
            return _sound_bundle(Path(self.emulator))
        refuse_no_digest(task.model_digest)
        folder = bundle_folder(default_cache_folder(), task.model_digest)
        if not folder.exists():
            return None
        try:
            return _sound_bundle(folder, digest=task.model_digest)
        except UserError as error:
            _LOG.warning("the emulator in the cache is damaged and is asked for again: %s", error)
            return None

    def _receive_emulator(self, parcel: Parcel, named: Mapping[str, Any]) -> Parcel:
        """Keep an emulator under its digest, and do the task that waited for it; what has another is thrown away."""
        policy, digest = load_policy(self.home / POLICY), parcel.fields.get("digest")
        refuse_no_digest(digest)
        if self.emulator is not None or digest not in self._lacking:
            raise Refused("no emulator was asked for")
        waiting = self._lacking[digest]
        config, task = read_task(waiting)
        asked = Asked(
            method="fedbiot",
            model_digest=digest,
            allowed_digests=frozenset({digest}),
            rank=1,
            round=named["round"],
            kind=task.kind,
            trust_remote_code=False,
            task_bytes=len(parcel.blob),
            rows=policy.min_rows,
            privacy=config.privacy,
            secure=secured(config) is not None,
        )
        _refuse(policy, asked, *self._taken(named["run"]))
        files = decode_tensors(parcel.blob)
        receive_bundle(digest, lambda folder: write_bundle_tensors(files, folder), default_cache_folder())
        del self._lacking[digest]
        if any(waiting.fields[key] != named[key] for key in ("run", "round", "client")):
            return Parcel(READY, named)
        # What it was asked for with is done at once, under this parcel's nonce: the task need not be sent again.
        return self._do(replace(waiting, fields={**waiting.fields, "nonce": named["nonce"]}), named)


def _refuse(policy: Policy, asked: Asked, taken_in_run: int, taken: int) -> None:
    reasons = refusals(policy, asked, datetime.now(), taken_in_run, taken)
    if reasons:
        raise Refused("; ".join(reasons))


def _record(named: Mapping[str, Any]) -> dict[str, Any]:
    """Of a parcel that names nothing: round -1."""
    return {"run": named.get("run", ""), "round": named.get("round", -1), "nonce": named.get("nonce", "")}


def _trained(task: ClientTask, half: ClientHalf, memory: Memory) -> tuple[Update, Memory]:
    """The update, and the new memory.

    Raises Refused when training diverged, its update may not leave, or a phase may not be done; Failed for all else.
    """
    raised: list[Exception] = []

    def kept(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
        try:
            return half(task, memory)
        except Exception as error:
            raised.append(error)
            raise

    reply, after = answer(task, kept, memory)
    if isinstance(reply, Failure):
        if isinstance(raised[0], NotFinite | UpdateRefused | BudgetSpent | SecureAggregationRefused):
            raise Refused(reply.reason)
        raise Failed(f"{type(raised[0]).__name__} while training; the owner's own log says more", reply.reason)
    return reply, after


def _told(error: Exception) -> str:
    """Why a task was not done, as the coordinator is told: nothing that may hold a path or a piece of a row.

    Our own refusals are about the task; problems of files, and what torch or a library said, stay in the owner's log.
    """
    match error:
        case Refused() | UpdateRefused():
            return str(error)[:_LONGEST]
        case Failed():
            return error.told
        case _:
            return "the owner's side has a problem with its files or settings; its own log says which"
