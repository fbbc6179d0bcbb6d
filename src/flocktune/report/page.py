"""Pages: templates, and what all share: the style, a few lines of script, and a policy that lets in no other."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_HERE = Path(__file__).parent
_UNIT = re.compile(r"(?<=\d) (?=(?:%|×|s\b|[kMGTP]?B\b|[kMGTP]?FLOP\b))")


def render_page(template: str, *, kind: str, title: str, subtitle: str | None = "", **context: Any) -> str:
    """A page as text. ``kind`` says above the title what it is; ``context`` is what the template asks for."""
    style, script, digest = _shared()
    page = _templates().get_template(template)
    return page.render(
        kind=kind, title=title, subtitle=subtitle, style=style, script=script, script_digest=digest, **context
    )


@cache
def _shared() -> tuple[Markup, Markup, str]:
    """Style, script, and the script's digest: the page's policy runs what has this digest, and nothing else."""
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("style.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Markup(style), Markup(script), f"sha256-{digest}"


@cache
def _templates() -> Environment:
    templates = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["unbroken"] = unbroken
    return templates


def unbroken(sentence: str) -> str:
    """With numbers and their units on one line."""
    return _UNIT.sub("\N{NO-BREAK SPACE}", sentence)
