"""One instruction with its answer, whatever shape the row had.

Understood by their column names (or as :class:`~flocktune.config.schema.Columns` tells): Dolly
(instruction, context, response, category), Alpaca (instruction, input, output), prompt and
completion, question and answer (GSM8K), chat rows (``messages`` of role and content, or
``conversations`` of from and value), and preference rows (``chosen`` and ``rejected``, beside a prompt or
as whole conversations, as TRL's data sets have them), questions with ``choices`` (ARC, MMLU), and
programs to write with a ``test`` (HumanEval, MBPP).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias

from flocktune.config.schema import Columns
from flocktune.data.questions import ANSWERS, Program, read_choices, read_program, right_choice
from flocktune.errors import Problem, UserError

Role: TypeAlias = Literal["system", "user", "assistant"]

EVERYTHING = "all"
"""The category of every row when the data has none."""

PROBLEMS_SHOWN = 5


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class Example:
    """An instruction and its answer; ``history`` holds the turns before it.

    ``history`` is an optional system message, then pairs of user and assistant messages; each of its
    assistant turns is trained on as well. ``response`` may be empty. ``client`` is the row's owner if
    it has one. ``check`` is the rule that decides whether an answer is right, if there is one. ``rejected``: in
    preference data, the answer that was liked less than ``response``. ``choices``: what there is to choose from;
    ``response`` is one of them. ``program``: what tries a response that is code.
    """

    instruction: str
    context: str = ""
    response: str = ""
    history: tuple[Message, ...] = ()
    category: str = EVERYTHING
    client: str | None = None
    check: Mapping[str, Any] | None = None
    rejected: str | None = None
    choices: tuple[str, ...] = ()
    program: Program | None = None


_USUAL: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations"),
    "instruction": ("instruction", "prompt", "question"),
    "context": ("context", "input"),
    "response": ("response", "output", "completion", "answer", "canonical_solution"),
    "category": ("category",),
    "client": ("client", "client_id"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "choices": ("choices", "options", "endings"),
    "test": ("test", "test_list"),
    "entry_point": ("entry_point",),
}
_ROLES: Mapping[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}


def find_layout(names: Sequence[str], columns: Columns, where: str) -> Columns:
    """Choose the columns by the recipe first, by their usual names else; ``messages`` or a pair stays None.

    A row with ``chosen`` and ``rejected`` is a preference row, unless the recipe names its response or messages; one
    with choices is a question with choices, unless the recipe names its response and not its choices.
    ``where`` is the file for the message. Raises UserError naming every column that is missing and
    the columns there are.
    """
    told = {field: getattr(columns, field) for field in _USUAL}
    have = ", ".join(names) or "no columns"
    UserError.raise_all(
        Problem(where, f"a column {name!r} (data.columns.{field})", f"columns {have}")
        for field, name in told.items()
        if name is not None and name not in names
    )
    # One column can say both what kind a row is of and whose it is.
    taken = {name for field, name in told.items() if name is not None and field not in ("category", "client")}

    def pick(field: str) -> str | None:
        return told[field] or next((name for name in _USUAL[field] if name in names and name not in taken), None)

    category, client = pick("category"), pick("client")
    chosen, rejected = pick("chosen"), pick("rejected")
    if chosen and rejected and not (told["response"] or told["messages"]):
        prompt = Columns(pick("instruction"), pick("context"), category=category, client=client)
        return replace(prompt, chosen=chosen, rejected=rejected)
    choices = pick("choices")
    answer = told["response"] or next((name for name in ANSWERS if name in names and name not in taken), None)
    if choices and answer and (told["choices"] or not (told["response"] or told["messages"])):
        question = Columns(pick("instruction"), pick("context"), answer, category=category, client=client)
        return replace(question, choices=choices)
    pairs_told = told["instruction"] or told["response"]
    messages = None if pairs_told and not told["messages"] else pick("messages")
    if messages:
        return Columns(messages=messages, category=category, client=client)
    layout = Columns(pick("instruction"), pick("context"), pick("response"), None, category, client)
    test, entry_point = pick("test"), pick("entry_point")
    if test and (told["test"] or entry_point or test == "test_list"):  # any column may be called "test"
        layout = replace(layout, test=test, entry_point=entry_point)
    UserError.raise_all(
        Problem(
            where,
            f"a column for the {field} ({', '.join(_USUAL[field])}), or a chat column 'messages'",
            f"columns {have}",
            f"Name the column in data.columns.{field}.",
        )
        for field, name in (("instruction", layout.instruction), ("response", layout.response))
        if name is None
    )
    return layout


def to_examples(
    rows: Iterable[tuple[str, Mapping[str, Any] | Problem]], columns: Columns, *, client: str | None = None
) -> list[Example]:
    """Turn rows into examples.

    ``rows`` yields (where, row), ``where`` being ``file:line``; a row that could not even be read
    comes as a Problem. ``client`` is the owner of rows that name none. Raises UserError with the
    first few problems and their total number.
    """
    examples: list[Example] = []
    problems: list[Problem] = []
    layouts: dict[tuple[str, ...], Columns] = {}
    count = 0
    for where, row in rows:
        count += 1
        try:
            if isinstance(row, Problem):
                raise UserError(row)
            names = tuple(row)
            if names not in layouts:
                layouts[names] = find_layout(names, columns, where)
            examples.append(_example(row, layouts[names], where, client))
        except UserError as error:
            problems += [problem for problem in error.problems if isinstance(problem, Problem)]
    if problems:
        counted = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(*problems[:PROBLEMS_SHOWN], f"In all: {counted} in {count} rows.")
    return examples


def examples_digest(examples: Iterable[Example]) -> str:
    """Hex SHA-256 of all that the tokens depend on: instructions, contexts, responses and histories, in order."""
    sha = hashlib.sha256()
    for example in examples:
        turns = [(message.role, message.content) for message in example.history]
        second = [] if example.rejected is None else [example.rejected]
        sha.update(json.dumps([example.instruction, example.context, example.response, turns, *second]).encode())
    return sha.hexdigest()


def rows_digest(examples: Sequence[Example]) -> str:
    """Hex SHA-256 of all that a run depends on: the texts, and every row's category, owner and check."""
    sha = hashlib.sha256(examples_digest(examples).encode())
    for example in examples:
        rule = dict(example.check) if example.check else None
        more = [
            *([example.choices] if example.choices else []),
            *([asdict(example.program)] if example.program else []),
        ]
        sha.update(json.dumps([example.category, example.client, rule, *more], sort_keys=True).encode())
    return sha.hexdigest()


def _example(row: Mapping[str, Any], layout: Columns, where: str, client: str | None) -> Example:
    problems: list[Problem] = []

    def text(column: str | None, also: type = str) -> str:
        """The column's text; an absent or null field is empty."""
        value = row.get(column) if column else None
        if value is None:
            return ""
        if _is_text(value) or (also is not str and isinstance(value, also) and not isinstance(value, bool)):
            return str(value)
        problems.append(Problem(f"{where}, column {column!r}", "text", f"{type(value).__name__} {_short(value)}"))
        return ""

    if layout.chosen and layout.rejected:
        example = replace(_preferred(row, layout, where, problems.append), context=text(layout.context))
    elif layout.choices:
        choices, labels = read_choices(row.get(layout.choices), f"{where}, column {layout.choices!r}")
        right = right_choice(row.get(str(layout.response)), choices, labels, f"{where}, column {layout.response!r}")
        example = Example(text(layout.instruction), text(layout.context), choices[right], choices=choices)
    elif layout.messages:
        example = _from_turns(_messages(row[layout.messages], f"{where}, column {layout.messages!r}", problems.append))
    else:
        example = Example(text(layout.instruction), text(layout.context), text(layout.response))
        if layout.test:
            entry_point = text(layout.entry_point)
            example = replace(example, program=read_program(row.get(layout.test), entry_point, where))
    category = text(layout.category, int) or EVERYTHING
    owner = text(layout.client, int) or client
    UserError.raise_all(problems)
    check = row.get("check")
    rule = {key: value for key, value in check.items() if value is not None} if isinstance(check, Mapping) else None
    return replace(example, category=category, client=owner, check=rule or None)


def _preferred(row: Mapping[str, Any], layout: Columns, where: str, report: Callable[[Problem], None]) -> Example:
    """Read a preference row: two answers, as texts or messages, to one prompt.

    The prompt is a column of its own, a text or messages; or both answers are whole conversations that begin with it.
    """
    prompt = row.get(layout.instruction) if layout.instruction else None
    opening = prompt if isinstance(prompt, list) else [] if prompt is None else [{"role": "user", "content": prompt}]

    def conversation(column: str) -> list[Message]:
        answer = row.get(column)
        place = f"{where}, column {column!r}"
        if not isinstance(answer, list):
            answer = [{"role": "assistant", "content": "" if answer is None else answer}]
        begins = answer and isinstance(answer[0], Mapping) and _role(answer[0]) != "assistant"
        turns = answer if begins else [*opening, *answer]
        if not begins and not opening:
            expected = "a column for the prompt, or messages that begin with it"
            report(Problem(place, expected, "neither", "Name the column in data.columns.instruction."))
            return []
        read = _messages(turns, place, report)
        if read and read[-1].role != "assistant":
            report(Problem(place, "an answer at the end", "a question"))
            return []
        return read

    chosen, rejected = conversation(str(layout.chosen)), conversation(str(layout.rejected))
    if chosen and rejected and chosen[:-1] != rejected[:-1]:
        report(Problem(where, "two answers to one prompt", "chosen and rejected differ before their last message"))
    return replace(_from_turns(chosen), rejected=rejected[-1].content if rejected else None)


def _role(item: Mapping[str, Any]) -> Role | None:
    return _ROLES.get(str(item.get("role", item.get("from"))))


def _messages(value: Any, where: str, report: Callable[[Problem], None]) -> list[Message]:
    """Read a chat row: an optional system message, then user and assistant in turn."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        report(Problem(where, "a list of messages", _short(value)))
        return []
    turns: list[Message] = []
    for number, item in enumerate(value, start=1):
        fields = item if isinstance(item, Mapping) else {}
        role = _role(fields)
        content = fields.get("content", fields.get("value"))
        if role is None or not _is_text(content):
            expected = "a role (system, user, assistant) and a text as content"
            report(Problem(f"{where}, message {number}", expected, _short(item)))
            return []
        turns.append(Message(role, content))
    spoken = turns[1:] if turns[0].role == "system" else turns
    if not spoken or any(turn.role != ("user", "assistant")[at % 2] for at, turn in enumerate(spoken)):
        got = ", ".join(turn.role for turn in turns[:8])
        report(Problem(where, "user and assistant in turn, user first, after at most one system message", got))
        return []
    return turns


def _from_turns(turns: Sequence[Message]) -> Example:
    """The last user turn is the instruction; the assistant turn after it, if any, the response."""
    if not turns:
        return Example("")
    if turns[-1].role == "assistant":
        return Example(turns[-2].content, response=turns[-1].content, history=tuple(turns[:-2]))
    return Example(turns[-1].content, history=tuple(turns[:-1]))


def _is_text(value: Any) -> bool:
    """Whether a tokenizer can take it: JSON allows half of a surrogate pair, UTF-8 does not."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
