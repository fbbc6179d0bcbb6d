"""What the documentation tells its readers to type: found in README and docs/, page by page."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}

PROGRAMS = ("flocktune", "make", "pip", "python", "mkdocs", "vllm", "ollama", "llama-server", "docker", "curl")
"""An indented line that begins with one of these is a command; in a fenced block of a shell every line is."""

SHELLS = ("sh", "bash", "shell", "console")

_BLOCK = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```[ ]*$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block; ``file``: the name that the words before it say to save it under."""

    page: str
    language: str
    text: str
    start: int
    file: str | None = None


@dataclass(frozen=True)
class Typed:
    """One command line of a page, without its comment. ``start``: where it stands."""

    page: str
    text: str
    start: int


def fenced(page: str) -> list[Block]:
    """The fenced blocks of a page, in its order."""
    text = PAGES[page]
    found = []
    for match in _BLOCK.finditer(text):
        indent, language, inner = match.groups()
        saved = re.search(r"[Ss]ave this as `([\w.-]+)`:?\s*$", text[: match.start()])
        body = "\n".join(line.removeprefix(indent) for line in inner.splitlines()) + "\n"
        found.append(Block(page, language, body, match.start(), saved[1] if saved else None))
    return found


def typed(page: str) -> list[Typed]:
    """The command lines of a page, in its order."""
    found = []
    for block in fenced(page):
        if block.language in SHELLS:
            lines = re.sub(r"\\\n\s*", " ", block.text).splitlines()
            found += [Typed(page, command, block.start) for line in lines if (command := _without_comment(line))]
    plain = _BLOCK.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), PAGES[page])
    for match in re.finditer(r"^ {4}(\S.*)$", plain, re.MULTILINE):
        if match[1].split()[0] in PROGRAMS:
            # Beside a command stands what it does, after some blanks.
            found.append(Typed(page, re.split(r" {3,}", _without_comment(match[1]))[0], match.start()))
    return sorted(found, key=lambda command: command.start)


def within_sentences(page: str) -> list[Typed]:
    """Commands with arguments that stand within a sentence."""
    plain = _BLOCK.sub(lambda match: " " * len(match[0]), PAGES[page])
    found = re.finditer(r"`(flocktune [^`]+)`", plain)
    return [Typed(page, match[1], match.start()) for match in found if re.search(r"[-A-Z./=]", match[1])]


def _without_comment(line: str) -> str:
    return re.sub(r"(^|\s)#.*$", "", line.strip()).removeprefix("$ ").strip()


def understood(command: str) -> Any:
    """The context in which flocktune's own parser understands ``command``: raises for what it does not know."""
    import typer

    from flocktune.cli import app

    arguments = shlex.split(re.split(r" [<>|&]+ ", command)[0])[1:]
    known: Any = typer.main.get_command(app)
    context = known.make_context("flocktune", list(arguments))
    while hasattr(known, "commands"):
        name, known, arguments = known.resolve_command(context, arguments)
        context = known.make_context(name, list(arguments), parent=context)
    return context
