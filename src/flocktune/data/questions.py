"""Questions that are more than a text: with choices, or with a program that tries the answer.

Choices are a list of texts, or ARC's table of texts and labels. The right one is told by its number from 0, its label,
its letter, or its own text. A program's tests are a text, or MBPP's list of lines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from flocktune.errors import Problem, UserError

ANSWERS = ("answerKey", "answer", "label", "gold")
"""Usual names of the column that tells which choice is right."""


@dataclass(frozen=True)
class Program:
    """``tests``: Python that raises when code is wrong. It defines ``check``, which is called with the function
    ``entry_point`` of the code (HumanEval); or, where that is empty, it stands for itself (MBPP)."""

    tests: str
    entry_point: str = ""


def read_choices(value: Any, where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The choices' texts, and their labels (none: empty). Raises UserError unless there are two texts at least."""
    labels: Any = ()
    if isinstance(value, Mapping) and "text" in value:
        value, labels = value["text"], value.get("label") or ()
    texts = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    if len(texts) < 2 or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(Problem(where, "a list of two texts or more, none of them empty", _short(value)))
    if labels and len(labels) != len(texts):
        raise UserError(Problem(where, f"{len(texts)} labels, one for each choice", f"{len(labels)}"))
    return tuple(texts), tuple(str(label) for label in labels)


def right_choice(answer: Any, choices: Sequence[str], labels: Sequence[str], where: str) -> int:
    """The place of the right choice, from 0.

    A number is a place. A text is a label where there are labels; else a choice's own text, a letter (A is the first),
    or a place in digits. Raises UserError when it is none of these, or two that differ.
    """
    count = len(choices)
    if isinstance(answer, int) and not isinstance(answer, bool):
        readings = {answer}
    elif not isinstance(answer, str):
        readings = set()
    elif answer.strip() in labels:
        readings = {list(labels).index(answer.strip())}
    else:
        told = answer.strip()
        readings = {place for place, choice in enumerate(choices) if choice.strip() == told}
        if len(told) == 1 and told.upper() in ascii_uppercase:
            readings.add(ascii_uppercase.index(told.upper()))
        if told.isascii() and told.isdigit() and len(told) < 4:
            readings.add(int(told))
    found = [place for place in readings if 0 <= place < count]
    if len(found) != 1:
        expected = (
            f"which of the {count} choices is right: a number from 0 to {count - 1}, a letter, a label or its text"
        )
        got = _short(answer) + (", which means several" if found else "")
        raise UserError(Problem(where, expected, got, "Name that column in data.columns.response."))
    return found[0]


def read_program(value: Any, entry_point: str, where: str) -> Program:
    """The tests of a row. Raises UserError when there are none, or the entry point is not a name."""
    if isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(line, str) for line in value):
        value = "\n".join(value)
    if not isinstance(value, str) or not value.strip():
        raise UserError(Problem(f"{where}, column of the tests", "Python, or a list of its lines", _short(value)))
    if entry_point and not entry_point.isidentifier():
        raise UserError(Problem(f"{where}, column of the entry point", "a function's name", _short(entry_point)))
    return Program(value, entry_point)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
