"""A task as it comes, before anything is done with it: each field checked as if a stranger had written it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from flocktune.algorithms.local import steps_per_round
from flocktune.config.load import build_config, config_digest
from flocktune.config.schema import CustomTemplate, LocalConfig, RunConfig
from flocktune.engine.parcels import Parcel
from flocktune.errors import FlocktuneError, UpdateRefused, UserError
from flocktune.types import ClientTask
from flocktune.wire import build_task

MOST_MICRO_BATCHES = 1_000_000
"""Of one task. They are planned before the first one, so that many more would take all memory."""

MOST_TEMPLATE_LETTERS = 10_000
"""Of a prompt's template in a recipe: it is repeated for every row."""

_DIGEST = re.compile(r"[0-9a-f]{64}")

_NAMED = {"run": str, "nonce": str, "round": int, "client": str}
_TASK = {"round": int, "client": str, "kind": str, "seed": int, "config_digest": str, "model_digest": str}
"""Fields and their types."""


class Refused(FlocktuneError):
    """A task that this owner does not do; the message has every reason, and is told to the coordinator."""


def read_task(parcel: Parcel) -> tuple[RunConfig, ClientTask]:
    """Recipe and task, without tensors. Raises Refused."""
    recipe, fields = parcel.fields.get("recipe"), parcel.fields.get("task")
    if not isinstance(recipe, dict) or not isinstance(fields, dict):
        raise Refused("expected a recipe and a task, got none")
    if set(fields) != set(_TASK) or not _typed(fields, _TASK):
        raise Refused(f"expected a task of {', '.join(_TASK)}, got something else")
    try:
        config = build_config(recipe)
    except UserError as error:  # it quotes the recipe alone
        raise Refused(f"a recipe that can not be read: {error}") from None
    task = build_task(fields, {})
    if task.round != parcel.fields["round"] or task.client != parcel.fields["client"]:
        raise Refused("the task and its parcel disagree about the round or the client")
    if config_digest(config) != task.config_digest:
        raise Refused("the recipe is not the one that the task is for; are both sides' flocktune of one version?")
    if not task.round < config.rounds:
        raise Refused(f"expected a round below the recipe's {config.rounds}, got {task.round}")
    template = config.data.template
    if isinstance(template, CustomTemplate):
        letters = len(template.with_context) + len(template.without_context)
        if letters > MOST_TEMPLATE_LETTERS:
            raise Refused(f"data.template: expected at most {MOST_TEMPLATE_LETTERS} letters, got {letters}")
    return config, task


def read_names(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What every reply repeats. Raises UpdateRefused when it is not there, or no name."""
    named = {key: fields.get(key) for key in _NAMED}
    if not _typed(named, _NAMED):
        raise UpdateRefused(f"message: expected {', '.join(_NAMED)}, got something else")
    return named


def _typed(fields: Mapping[str, Any], types: Mapping[str, type]) -> bool:
    """Whether every field has its type, no bool for an int, and no more than a name or a number needs."""
    return all(
        type(fields[key]) is kind and (len(fields[key]) <= 200 if kind is str else abs(fields[key]) < 2**64)
        for key, kind in types.items()
    )


def refuse_no_digest(digest: object) -> None:
    """Raise Refused for what is no digest: it becomes a folder's name."""
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise Refused("expected an emulator's digest, 64 hexadecimal digits, got something else")


def rows_used(local: LocalConfig, rows: int) -> int:
    """Rows that can have a part in the update: a few steps see only a few, however many there are."""
    return rows if local.steps is None else min(rows, local.steps * local.accumulate * local.batch_size)


def refuse_endless(local: LocalConfig, rows: int) -> None:
    """Raise Refused for more micro-batches than can be planned."""
    micro_batches = steps_per_round(local, rows) * local.accumulate
    if micro_batches > MOST_MICRO_BATCHES:
        raise Refused(f"local: expected at most {MOST_MICRO_BATCHES:,} micro-batches in a task, got {micro_batches:,}")
