"""Replies on disk by the digest of what was asked, so that nothing is paid twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flocktune.evaluation.judge.rubric import RUBRIC_VERSION
from flocktune.files import write_atomic


@dataclass(frozen=True)
class Reply:
    """What a server answered. Tokens are None where it did not report them."""

    text: str
    finish_reason: str | None
    tokens_in: int | None = None
    tokens_out: int | None = None


def reply_key(url: str, body: Mapping[str, Any], draw: int, attempt: int) -> str:
    """Digest of all that a reply depends on: where, the whole request, which draw and attempt. No key is in it."""
    asked = [url, body, draw, attempt, RUBRIC_VERSION]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def stored_reply(folder: Path, key: str) -> Reply | None:
    """The reply to ``key``; None when there is none, or its file is damaged."""
    try:
        return Reply(**json.loads(_place(folder, key).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def store_reply(folder: Path, key: str, reply: Reply) -> None:
    """Write ``reply``, whole or not at all, for its owner alone: judges quote answers. Raises OSError."""
    place = _place(folder, key)
    place.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(place, json.dumps(asdict(reply)) + "\n", mode=0o600)


def _place(folder: Path, key: str) -> Path:
    return folder / key[:2] / f"{key}.json"
