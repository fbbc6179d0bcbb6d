"""What an owner does with what the coordinator sends: check it, refuse it or do it, and write down what left.

A task chooses among what this flocktune does: it names a method and numbers, and brings tensors. Its paths are not
used; the base model, the emulator and the rows are those that the owner named.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from flocktune.audit import AuditLog, nonces, rounds_taken
from flocktune.config.load import build_config, config_digest
from flocktune.config.schema import EMBEDDED, ModelConfig, RunConfig, RuntimeConfig
from flocktune.data.encoding import default_cache_folder
from flocktune.engine.client import answer
from flocktune.engine.parcels import EMULATOR, FAILURE, LACKING, READY, TASK, UPDATE, Parcel
from flocktune.errors import FlocktuneError, UpdateRefused, UserError
from flocktune.federated import OwnersSide, owners_side, write_bundle_tensors
from flocktune.models.bundle import Bundle, bundle_folder, read_bundle, receive_bundle
from flocktune.owner.home import AUDIT, POLICY
from flocktune.owner.leaving import leaving
from flocktune.owner.policy import GB, Asked, Policy, load_policy, refusals
from flocktune.resident import base_digest
from flocktune.types import ClientTask, Update
from flocktune.wire import build_task, decode_tensors, encode_tensors, update_fields

_LOG = logging.getLogger(__name__)


class Refused(FlocktuneError):
    """A task that this owner does not do; the message has every reason."""


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

    def answer(self, parcel: Parcel) -> Parcel:
        """The reply to a parcel. Never raises for what is wrong with it, or with the training; a full disk does."""
        named = _named(parcel.fields)
        self.audit.task_received(**_record(named), kind=parcel.kind[:60], bytes=len(parcel.blob))
        try:
            if named["client"] != self.client:
                raise Refused(f"this is {self.client}, and the task is for {named['client']!r}")
            match parcel.kind:
                case "task":
                    return self._do(parcel, named)
                case "emulator":
                    return self._receive_emulator(parcel, named)
                case other:
                    raise Refused(f"expected a parcel of kind {TASK} or {EMULATOR}, got {other[:60]!r}")
        except (FlocktuneError, OSError) as error:
            self.audit.task_refused(**_record(named), reasons=[str(error)])
            _LOG.warning("round %s: not done: %s", named["round"] + 1, error)
            return Parcel(FAILURE, {**named, "reason": _told(error)})

    def _do(self, parcel: Parcel, named: Mapping[str, Any]) -> Parcel:
        policy = load_policy(self.home / POLICY)
        config, task = _read(parcel)
        if named["nonce"] in nonces(self.home / AUDIT):
            raise Refused("this task was answered before: a replay")
        bundle = self._bundle(task) if config.method == "fedbiot" else None
        asked = self._asked(config, task, len(parcel.blob), policy.min_rows, bundle)
        self._refuse(policy, asked, named["run"])
        if config.method == "fedbiot" and bundle is None:
            return Parcel(LACKING, {**named, "digest": task.model_digest})
        self._limit(policy)
        side = self._side(config, policy, bundle)
        self._refuse(policy, replace(asked, rows=side.rows), named["run"])
        task = replace(task, tensors=decode_tensors(parcel.blob, side.expected))
        reply, _ = answer(task, side.half, {})
        if not isinstance(reply, Update):
            raise Refused(reply.reason)
        return self._let_out(leaving(policy, reply), named)

    def _let_out(self, update: Update, named: Mapping[str, Any]) -> Parcel:
        """The update as a parcel; it is in the audit log, on disk, before it is handed on."""
        reply = Parcel(UPDATE, {**named, "update": update_fields(update)}, encode_tensors(update.delta))
        self.audit.update_left(
            **_record(named),
            digest=reply.sha256,
            bytes=len(reply.blob),
            tensors=len(update.delta),
            weight=update.weight,
        )
        return reply

    def _side(self, config: RunConfig, policy: Policy, bundle: Bundle | None) -> OwnersSide:
        threads = policy.max_threads or self.threads or config.runtime.threads
        if threads:
            torch.set_num_threads(threads)
        model = replace(config.model, path=self.model or EMBEDDED, trust_remote_code=False)
        lora = replace(config.lora, start_from=None)
        mine = replace(config, model=model, lora=lora, runtime=RuntimeConfig(device=self.device))
        return owners_side(mine, self.client, self.data, bundle)

    def _limit(self, policy: Policy) -> None:
        """GPU memory: what is above the owner's limit fails in the allocation, and the task with it."""
        limits = [limit for limit in (policy.max_gpu_memory_gb, self.max_gpu_memory_gb) if limit is not None]
        if limits and torch.cuda.is_available():
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, min(limits) * GB / total))

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
        )

    def _named_models(self, config: RunConfig, task: ClientTask, bundle: Bundle | None) -> list[str]:
        """Digests of what the owner named. Who named no emulator takes the coordinator's, which is theirs anyway."""
        if config.method == "fedbiot":
            return [bundle.digest if bundle else task.model_digest]
        if self.model is None and config.model.path != EMBEDDED:
            raise Refused("no base model was named here: join with --model FOLDER")
        return [base_digest(ModelConfig(path=self.model or EMBEDDED))]

    def _refuse(self, policy: Policy, asked: Asked, run: str) -> None:
        reasons = refusals(policy, asked, datetime.now(), rounds_taken(self.home / AUDIT, run))
        if reasons:
            raise Refused("; ".join(reasons))

    def _bundle(self, task: ClientTask) -> Bundle | None:
        """The emulator that was named, or the one that was received before; None when there is none yet."""
        if self.emulator is not None:
            return read_bundle(Path(self.emulator))
        folder = bundle_folder(default_cache_folder(), task.model_digest)
        return read_bundle(folder, digest=task.model_digest) if folder.exists() else None

    def _receive_emulator(self, parcel: Parcel, named: Mapping[str, Any]) -> Parcel:
        """Keep an emulator under its digest; what has another one is thrown away."""
        policy, digest = load_policy(self.home / POLICY), parcel.fields.get("digest")
        if not isinstance(digest, str) or not digest.isalnum() or self.emulator is not None:
            raise Refused("no emulator was asked for")
        if policy.models and digest not in policy.models:
            raise Refused(f"policy: models: expected a model that is listed here, got digest {digest[:12]}...")
        files = decode_tensors(parcel.blob)
        receive_bundle(digest, lambda folder: write_bundle_tensors(files, folder), default_cache_folder())
        return Parcel(READY, named)


def _read(parcel: Parcel) -> tuple[RunConfig, ClientTask]:
    """Recipe and task, without tensors, each checked as if a stranger had written it."""
    recipe, fields = parcel.fields.get("recipe"), parcel.fields.get("task")
    if not isinstance(recipe, dict) or not isinstance(fields, dict):
        raise Refused("expected a recipe and a task, got none")
    config, task = build_config(recipe), build_task(fields, {})
    if task.round != parcel.fields["round"] or task.client != parcel.fields["client"]:
        raise Refused("the task and its parcel disagree about the round or the client")
    if config_digest(config) != task.config_digest:
        raise Refused("the recipe is not the one that the task is for; are both sides' flocktune of one version?")
    if not task.round < config.rounds:
        raise Refused(f"expected a round below the recipe's {config.rounds}, got {task.round}")
    return config, task


def _named(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What every reply repeats. Raises UpdateRefused when it is not there."""
    wanted = {"run": str, "nonce": str, "round": int, "client": str}
    if any(type(fields.get(key)) is not kind for key, kind in wanted.items()) or len(str(fields["nonce"])) > 200:
        raise UpdateRefused(f"message: expected {', '.join(wanted)}, got something else")
    return {key: fields[key] for key in wanted}


def _record(named: Mapping[str, Any]) -> dict[str, Any]:
    return {"run": named["run"][:200], "round": named["round"], "nonce": named["nonce"]}


def _told(error: Exception) -> str:
    """Why a task was not done, as the coordinator is told: nothing that may hold a path or a piece of a row.

    Our own refusals are about the task; problems of files, and what torch or a library said, stay in the owner's log.
    """
    name = str(error).partition(":")[0]
    if isinstance(error, OSError | UserError):
        return "the owner's side has a problem with its files or settings; its own log says which"
    if name.isidentifier() and name.endswith(("Error", "Exception", "Interrupt")):
        return f"{name} while training; the owner's own log says more"
    return str(error)
