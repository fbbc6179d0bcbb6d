"""Templates, and what stands in them: addresses, digests, times."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

_HERE = Path(__file__).parent / "templates"


def fill(template: str, **values: Any) -> Markup:
    """A filled template. What is not Markup is escaped."""
    return Markup(_environment().get_template(template).render(**values).strip())


def address(what: str, path: str) -> str:
    """Where ``what`` (run, live/run, report) of a path is shown."""
    return f"/{what}/{quote(path)}"


def digest(text: str) -> str:
    """A short name for a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def style() -> str:
    """The style of reports, and what a page that lives needs besides."""
    report = _HERE.parent.parent / "report" / "style.css"
    return report.read_text(encoding="utf-8") + (_HERE / "live.css").read_text(encoding="utf-8")


@cache
def script() -> str:
    """What follows a run in the browser."""
    return (_HERE / "follow.js").read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("flocktune.dashboard"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(moment=_moment, iso=_iso)
    return made


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%d %B %Y, %H:%M:%S UTC").lstrip("0")


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
