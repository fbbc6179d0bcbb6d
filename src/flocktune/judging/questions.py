"""Questions and answers as files have them: a run's answers.jsonl, and what other tools write."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flocktune.data.examples import EVERYTHING
from flocktune.data.sources import rows_of_file
from flocktune.errors import Problem, UserError

_QUESTION = ("instruction", "question", "prompt")
_CONTEXT = ("context", "input")
_ANSWER = ("answer", "response", "output", "completion", "text")
_IDENTIFIER = ("question_id", "id")
_SHOWN = 5


@dataclass(frozen=True)
class Question:
    """What is asked. ``identifier``: the file's own name for it; ``reference`` tells equal questions apart."""

    instruction: str
    context: str = ""
    category: str = EVERYTHING
    identifier: str | None = None
    reference: str = ""


@dataclass(frozen=True)
class Answered:
    """An answer; its question may be known by the identifier alone."""

    question: Question
    text: str


def read_questions(path: Path) -> list[Question]:
    """A question a row: ``instruction``, ``question`` or ``prompt``, with ``context`` and ``category``; or ``turns``.

    The last is how question files of judge benchmarks have it: {question_id, category, turns: [text]}.
    Raises UserError.
    """
    return [_question(row, where) for where, row in _rows(path)]


def read_answers(path: Path) -> list[Answered]:
    """An answer a row, with its question: ``answer``, ``response``, ``output``, ``completion``, ``text``, ``choices``.

    Where a row has no question, ``question_id`` must name it. Raises UserError.
    """
    answers = []
    problems: list[Problem | str] = []
    for where, row in _rows(path):
        text = _first(row, _ANSWER)
        if text is None:
            text = _of_choices(row)
        if text is None:
            problems.append(Problem(where, f"an answer, as text in {', '.join(_ANSWER)}", _columns(row)))
            continue
        answers.append(Answered(_question(row, where, named_is_enough=True), text))
    UserError.raise_all(problems[:_SHOWN])
    return answers


def texts_for(questions: Sequence[Question], answers: Sequence[Answered]) -> list[str | None]:
    """The answer to each question, None where there is none.

    Matched by instruction and context; of equal questions by the reference, else in their order; by identifier where an
    answer comes without its question.
    """
    by_text: dict[tuple[str, str], list[Answered]] = {}
    by_name: dict[str, Answered] = {}
    for one in answers:
        if one.question.instruction:
            by_text.setdefault((one.question.instruction, one.question.context), []).append(one)
        elif one.question.identifier is not None:
            by_name[one.question.identifier] = one
    found: list[str | None] = []
    for question in questions:
        same = by_text.get((question.instruction, question.context), [])
        mine = next((one for one in same if _may_be(question, one.question)), None)
        if mine is not None:
            same.remove(mine)
        elif question.identifier is not None:
            mine = by_name.get(question.identifier)
        found.append(mine.text if mine else None)
    return found


def spread(questions: Sequence[Question], most: int | None) -> list[Question]:
    """``most`` questions in equal steps over the categories, always the same ones; all for None."""
    if most is None or most >= len(questions):
        return list(questions)
    ordered = sorted(questions, key=lambda question: question.category)
    return [ordered[place * len(ordered) // most] for place in range(most)]


def _may_be(wanted: Question, found: Question) -> bool:
    return not wanted.reference or not found.reference or wanted.reference == found.reference


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    empty = True
    try:
        for where, row in rows_of_file(path):
            if isinstance(row, Problem):
                raise UserError(row)
            empty = False
            yield where, row
    except OSError as error:
        raise UserError(Problem(str(path), "a readable file", str(error))) from None
    if empty:
        raise UserError(Problem(str(path), "at least one row", "none: it is empty"))


def _question(row: Mapping[str, Any], where: str, *, named_is_enough: bool = False) -> Question:
    name = next((str(row[key]) for key in _IDENTIFIER if row.get(key) is not None), None)
    turns = row.get("turns")
    instruction = _first(row, _QUESTION)
    if instruction is None and isinstance(turns, list) and turns and isinstance(turns[0], str):
        if len(turns) > 1:
            raise UserError(Problem(where, "one turn", f"{len(turns)} turns", "Only single questions can be judged."))
        instruction = turns[0]
    if not instruction and not (named_is_enough and name is not None):
        raise UserError(Problem(where, f"a question, as text in {', '.join(_QUESTION)} or turns", _columns(row)))
    category = row.get("category")
    return Question(
        instruction or "",
        _first(row, _CONTEXT) or "",
        EVERYTHING if category is None else str(category),
        name,
        _first(row, ("reference",)) or "",
    )


def _first(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((value for name in names if _is_text(value := row.get(name))), None)


def _of_choices(row: Mapping[str, Any]) -> str | None:
    """The form of judge benchmarks' answer files: ``{"choices": [{"turns": [text]}]}``."""
    try:
        value = row["choices"][0]["turns"][0]
    except (KeyError, IndexError, TypeError):
        return None
    return value if _is_text(value) else None


def _is_text(value: Any) -> bool:
    """JSON allows half of a surrogate pair, UTF-8 does not."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _columns(row: Mapping[str, Any]) -> str:
    return f"columns {', '.join(map(str, row)) or '(none)'}"
