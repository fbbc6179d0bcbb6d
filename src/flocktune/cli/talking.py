"""A conversation in the terminal with one result, or with two side by side. What was said is kept nowhere.

Ctrl-C stops an answer, not the program. Instructions may come from a pipe, one a line.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from flocktune.conversation import Settings, Side, answer
from flocktune.data.examples import Message
from flocktune.errors import UserError

SIDE_BY_SIDE = 80
"""Letters that a line must have for two answers beside each other."""

HELP = (
    ("/help", "this list"),
    ("/context TEXT", "a text that the next instructions are about; without TEXT: none"),
    ("/temperature T", "0 is greedy, the same answer each time; higher is more varied"),
    ("/again", "the last instruction once more, with other draws"),
    ("/follow", "answers follow what was said before, or (as at first) each instruction stands alone"),
    ("/quit", "the end; so is Ctrl-D. Ctrl-C stops an answer"),
)


@dataclass
class Talk:
    """What a conversation has come to: the settings, and what was said to and by each side."""

    settings: Settings
    context: str = ""
    last: str = ""
    follow: bool = False
    said: dict[str, list[Message]] = field(default_factory=dict)


def converse(sides: Sequence[Side], settings: Settings, console: Console) -> None:
    """Read instructions and commands until the end, and answer them."""
    with suppress(ImportError):  # arrow keys and earlier lines, in memory only
        import readline  # noqa: F401
    talk = Talk(settings, said={side.name: [] for side in sides})
    console.print(
        Text(printable(" and ".join(side.name for side in sides)), style="bold"), Text("/help, /quit", style="dim")
    )
    for line in _lines(console):
        word, _, rest = line.partition(" ")
        if word in ("/quit", "/exit"):
            return
        try:
            if not line.startswith("/"):
                talk.last = line
                _answer(talk, sides, console)
            elif word == "/again" and talk.last:
                talk.settings = replace(talk.settings, seed=talk.settings.seed + 1)
                _answer(talk, sides, console, again=True)
            else:
                console.print(_command(talk, word, rest.strip()), style="dim", highlight=False)
        except UserError as error:  # a mistake in one instruction does not end the conversation
            console.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)


def _lines(console: Console) -> Iterator[str]:
    """Lines that are not empty, from a person or from a pipe, whose lines are shown so that answers have a question."""
    person = sys.stdin.isatty()
    while True:
        try:
            line = (console.input("[bold]> [/]") if person else input()).strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            console.print("\n/quit or Ctrl-D ends.", style="dim")
            continue
        if line and not person:
            console.print(Text(f"> {line}", style="bold"), soft_wrap=True)
        if line:
            yield line


def _command(talk: Talk, word: str, rest: str) -> RenderableType:
    match word:
        case "/help":
            table = Table.grid(padding=(0, 2))
            for name, what in HELP:
                table.add_row(name, what)
            return table
        case "/context":
            talk.context = rest
            return "Context set." if rest else "No context."
        case "/temperature":
            try:
                talk.settings = replace(talk.settings, temperature=max(0.0, float(rest)))
            except ValueError:
                return (
                    f"/temperature: expected a number, got {escape(repr(rest))}. It is {talk.settings.temperature:g}."
                )
            return f"Temperature {talk.settings.temperature:g}."
        case "/follow":
            talk.follow = not talk.follow
            return "Answers follow what was said." if talk.follow else "Each instruction stands alone."
        case "/again":
            return "Nothing was asked yet."
    return f"{escape(word)} is no command: /help lists them."


def _answer(talk: Talk, sides: Sequence[Side], console: Console, *, again: bool = False) -> None:
    """Every side's answer to the last instruction, as it is written."""
    answers = {side.name: "" for side in sides}
    turn = Message("user", f"{talk.last}\n\n{talk.context}" if talk.context else talk.last)
    wide = len(sides) > 1 and console.width >= SIDE_BY_SIDE
    stopped = False
    with Live(console=console, transient=True, vertical_overflow="ellipsis") as live:
        for side in sides:
            before = talk.said[side.name][: -2 if again else None] if talk.follow else []
            try:
                with closing(answer(side, talk.last, talk.context, talk.settings, before)) as pieces:
                    for piece in pieces:
                        answers[side.name] += piece
                        live.update(_shown(answers, wide))
            except KeyboardInterrupt:
                stopped = True
                break
    console.print(_shown({name: text or "(nothing)" for name, text in answers.items()}, wide))
    if stopped:
        console.print("Stopped.", style="dim")
    for name, text in answers.items():
        kept = talk.said[name][: -2 if again else None]
        talk.said[name] = [*kept, turn, Message("assistant", text)]


def _shown(answers: dict[str, str], wide: bool) -> RenderableType:
    """One answer as it is; two under their names, in columns or one below the other."""
    if len(answers) == 1:
        return Text(printable(*answers.values()))
    table = Table.grid(padding=(0, 2) if wide else (0, 0), expand=wide)
    if wide:
        for _ in answers:
            table.add_column(ratio=1, overflow="fold")
        table.add_row(*(Text(printable(name), style="bold cyan") for name in answers))
        table.add_row(*(Text(printable(text)) for text in answers.values()))
        return table
    for name, text in answers.items():
        table.add_row(Text(printable(name), style="bold cyan"))
        table.add_row(Text(printable(text)))
    return table


def printable(text: str) -> str:
    """``text`` without control characters: what a model writes must not steer a terminal."""
    return "".join(letter for letter in text if letter in "\n\t" or letter.isprintable())
