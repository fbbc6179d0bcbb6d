"""Who is judged: a run, a method beside it, its base model, another run, or a file of answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flocktune.config.load import load_recipe
from flocktune.data.encoding import encode_prompt
from flocktune.data.examples import Example
from flocktune.errors import Problem, UserError
from flocktune.evaluation.generate import generate_answers, prompt_room
from flocktune.files import read_json, sha256_path, write_json
from flocktune.judging.questions import Answered, Question, read_answers, read_questions, spread, texts_for
from flocktune.report.summaries import method_label, method_order
from flocktune.resident import base_digest
from flocktune.results import find_run, open_result

BASE = "base"


@dataclass(frozen=True)
class Contestant:
    """Who answered, and what: ``texts`` stand in the order of the questions, None where there is no answer.

    ``digest``: SHA-256 of the texts, so that a table can be told to be of them.
    """

    label: str
    source: str
    texts: Sequence[str | None]

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(list(self.texts)).encode()).hexdigest()


@dataclass(frozen=True)
class LineUp:
    """The questions, who is measured, and against whom."""

    questions: Sequence[Question]
    ours: Contestant
    baselines: Sequence[Contestant]


@dataclass(frozen=True)
class _Writer:
    """What it takes to have a run answer questions, and where its answers are kept."""

    questions: Sequence[Question]
    max_new_tokens: int | None
    cache: Path
    say: Callable[[str], None]


def line_up(
    ours: Path,
    against: Sequence[str],
    cache: Path,
    *,
    method: str | None = None,
    questions: Path | None = None,
    max_questions: int | None = None,
    max_new_tokens: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> LineUp:
    """Find every contestant and its answers.

    ``ours`` and each of ``against``: a run's folder, a comparison's, or a file of answers; ``against`` may be ``base``
    or the name of a run beside ours, too, and is all of these when it is empty. Without ``questions`` the questions
    are those that ours has answered; with them, runs answer them now, greedily, and their answers are kept in
    ``cache``. Raises UserError.
    """
    run = None if ours.is_file() else _find_run(ours, method)
    if questions is not None:
        asked = read_questions(questions)
    else:
        asked = [one.question for one in (_held_out(run) if run else read_answers(ours))]
        if unnamed := next((one for one in asked if not one.instruction), None):
            got = f"answers that name their questions, such as {unnamed.identifier}"
            raise UserError(Problem(str(ours), "answers with their questions", got, "Give the questions: --questions"))
    asked = spread(asked, max_questions)
    writer = _Writer(asked, max_new_tokens, cache, say)
    fresh = questions is not None
    first = _file(ours, asked) if run is None else _run(run, writer, fresh)
    others = [_find(name, run, writer, fresh) for name in against or _all_beside(run, ours)]
    _refuse_twins([first, *others])
    return LineUp(asked, first, others)


def _find_run(path: Path, method: str | None = None) -> Path:
    if not (path / "recipe.yaml").exists():
        got = "a folder without recipe.yaml" if path.is_dir() else "nothing there"
        raise UserError(Problem(str(path), "a run's folder, a comparison's, or a file of answers", got))
    return find_run(path, method)


def _all_beside(run: Path | None, ours: Path) -> list[str]:
    if run is None:
        fix = "Name a run, or a file of answers."
        raise UserError(Problem("--against", f"who {ours} is measured against", "nobody", fix))
    beside = _beside(run)
    return sorted(beside, key=method_order) if beside else [BASE]


def _beside(run: Path) -> list[str]:
    """The names of the other finished runs of a comparison."""
    home = run.resolve().parent
    in_comparison = any((place / "experiment.json").exists() for place in (home, home.parent))
    return [entry.parent.parent.name for entry in home.glob("*/adapter/adapter_config.json")
            if entry.parent.parent.name != run.name] if in_comparison else []  # fmt: skip


def _find(name: str, run: Path | None, writer: _Writer, fresh: bool) -> Contestant:
    if run is not None and name in _beside(run):
        return _run(run.parent / name, writer, fresh)
    if run is not None and name == BASE:
        return Contestant("Base model", str(run), _answers_of(run, writer, base=True))
    path = Path(name)
    if path.is_file():
        return _file(path, writer.questions)
    if path.is_dir():
        return _run(_find_run(path), writer, fresh)
    known = ", ".join([*(_beside(run) if run else []), BASE])
    raise UserError(Problem("--against", f"{known}, a run's folder or a file of answers", repr(name)))


def _file(path: Path, questions: Sequence[Question]) -> Contestant:
    return Contestant(path.stem, str(path), texts_for(questions, read_answers(path)))


def _run(run: Path, writer: _Writer, fresh: bool) -> Contestant:
    texts = _answers_of(run, writer) if fresh else texts_for(writer.questions, _held_out(run))
    return Contestant(_label(run), str(run), texts)


def _label(run: Path) -> str:
    """As the run's comparison calls it; alone, its method's name."""
    summary = read_json(run / "summary.json") if (run / "summary.json").exists() else {}
    config = load_recipe(run / "recipe.yaml")
    return method_label(run.name if run.name.startswith("local") else config.method, summary)


def _held_out(run: Path) -> list[Answered]:
    path = run / "answers.jsonl"
    if not path.exists():
        fix = "Give questions, which it will answer now: --questions"
        raise UserError(Problem(str(path), "the run's answers to its held-out rows", "nothing there", fix))
    return read_answers(path)


def _answers_of(run: Path, writer: _Writer, *, base: bool = False) -> list[str | None]:
    """The run's greedy answers, written now or taken from the cache; ``base``: its model's without the adapter."""
    config = load_recipe(run / "recipe.yaml")
    new_tokens = writer.max_new_tokens or config.evaluation.max_new_tokens
    made_of: list[Any] = [
        base_digest(config.model),
        BASE if base else sha256_path(run / "adapter"),
        repr((config.data.template, config.data.max_tokens, new_tokens, config.model.dtype, config.model.quantization)),
        [(one.instruction, one.context) for one in writer.questions],
    ]
    place = writer.cache / "answers" / f"{hashlib.sha256(json.dumps(made_of).encode()).hexdigest()}.json"
    if place.exists():
        return list(read_json(place))
    writer.say(f"{_label(run) if not base else 'Base model'}: answering {len(writer.questions)} questions ...")
    tuned = open_result(run)
    room = min(config.data.max_tokens, prompt_room(tuned.base.model, new_tokens))
    asked = [Example(one.instruction, one.context) for one in writer.questions]
    prompts = [
        encode_prompt(one, tuned.base.tokenizer, template=config.data.template, max_tokens=room) for one in asked
    ]

    def answers() -> list[str]:
        size = config.evaluation.batch_size
        model, tokenizer = tuned.base.model, tuned.base.tokenizer
        return generate_answers(model, tokenizer, prompts, max_new_tokens=new_tokens, batch_size=size)

    if base:
        with tuned.base.adapter.disabled():
            texts = answers()
    else:
        texts = answers()
    place.parent.mkdir(parents=True, exist_ok=True)
    write_json(place, texts)
    return list(texts)


def _refuse_twins(contestants: Sequence[Contestant]) -> None:
    """Nobody is measured against itself, and a table's names must differ."""
    seen = set()
    for one in contestants:
        if (one.label, one.source) in seen:
            raise UserError(Problem("--against", "contestants that differ", f"{one.source} twice"))
        seen.add((one.label, one.source))


def distinct_labels(contestants: Sequence[Contestant]) -> list[Contestant]:
    """Contestants of the same name get their folder's beside it."""
    labels = [one.label for one in contestants]
    return [
        replace(one, label=f"{one.label} ({one.source})") if labels.count(one.label) > 1 else one for one in contestants
    ]
