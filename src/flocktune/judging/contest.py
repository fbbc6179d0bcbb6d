"""From answers to a table: who meets whom, what that will cost, what the verdicts come to, and the files of it.

TO/judge.json    every figure, and every question's scores     TO/judge.md    the table
TO/judge.jsonl   every reply of the judge, with the question and the order in which the answers stood
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flocktune.errors import Problem, UserError
from flocktune.evaluation.judge.asking import (
    Duel,
    Judge,
    Outcome,
    Spent,
    counted,
    from_cache,
    guess_tokens,
    most_tokens,
)
from flocktune.evaluation.judge.rubric import RUBRIC_VERSION
from flocktune.evaluation.judge.statistics import Draw, Scored, summarise
from flocktune.evaluation.judge.verdicts import Verdict
from flocktune.files import write_atomic, write_json
from flocktune.judging.contestants import LineUp, distinct_labels
from flocktune.judging.questions import Question
from flocktune.report.judged import JUDGED, judged_markdown

TABLE, REPLIES = "judge.md", "judge.jsonl"


@dataclass(frozen=True)
class Meeting:
    """One question of one pairing: for every draw the duel with the baseline's answer first, and with ours first."""

    name: str
    question: Question
    draws: Sequence[tuple[Duel, Duel]]


@dataclass(frozen=True)
class Pairing:
    """Ours against one baseline, on the questions that both answered; ``missing``: on how many one did not."""

    baseline: str
    source: str
    digest: str
    meetings: Sequence[Meeting]
    missing: int

    @property
    def duels(self) -> list[Duel]:
        return [duel for meeting in self.meetings for draw in meeting.draws for duel in draw]


@dataclass(frozen=True)
class Contest:
    """All pairings of one table."""

    ours: str
    source: str
    digest: str
    pairings: Sequence[Pairing]

    @property
    def duels(self) -> list[Duel]:
        return [duel for pairing in self.pairings for duel in pairing.duels]


@dataclass(frozen=True)
class Estimate:
    """What is still to be asked, and what it costs: tokens read by the rule, and the most that may be written."""

    duels: int
    cached: int
    tokens_in: int
    tokens_out: int


def contest(lineup: LineUp, draws: int) -> Contest:
    """Pair ours with every baseline. Raises UserError when a pair has no question in common."""
    ours, *baselines = distinct_labels([lineup.ours, *lineup.baselines])
    pairings = []
    for other in baselines:
        meetings = []
        for number, question in enumerate(lineup.questions):
            mine, theirs = ours.texts[number], other.texts[number]
            if mine is None or theirs is None:
                continue
            asked = (question.instruction, question.context)
            pairs = [(Duel(*asked, theirs, mine, draw), Duel(*asked, mine, theirs, draw)) for draw in range(draws)]
            meetings.append(Meeting(question.identifier or str(number + 1), question, pairs))
        if not meetings:
            raise UserError(
                Problem(
                    f"{other.source} beside {ours.source}",
                    "answers to the same questions",
                    "no question in common",
                    "Let both answer the same ones: --questions FILE",
                )
            )
        missing = len(lineup.questions) - len(meetings)
        pairings.append(Pairing(other.label, other.source, other.digest, meetings, missing))
    return Contest(ours.label, ours.source, ours.digest, pairings)


def estimate(found: Contest, judge: Judge, replies: Path) -> Estimate:
    """What is not in the cache yet, each counted once and without second attempts."""
    unique = list(dict.fromkeys(found.duels))
    left = [duel for duel in unique if from_cache(judge, duel, replies) is None]
    tokens = [most_tokens(judge, duel) for duel in left]
    return Estimate(
        len(left), len(unique) - len(left), sum(read for read, _ in tokens), sum(most for _, most in tokens)
    )


def result(found: Contest, outcomes: Mapping[Duel, Outcome], judge: Judge, draws: int, spent: Spent) -> dict[str, Any]:
    """Everything that judge.json holds. No text of a question or an answer is in it."""
    endpoint = judge.endpoint
    replies = [
        counted(guess_tokens(duel.message(number)), reply)
        for duel, outcome in outcomes.items()
        for number, reply in enumerate(outcome.replies)
    ]
    tokens_in, tokens_out = sum(read for read, _ in replies), sum(wrote for _, wrote in replies)
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "judge": {
            "url": endpoint.url,
            "model": endpoint.model,
            "temperature": judge.parameters.get("temperature", judge.temperature),
            "max_tokens": judge.max_tokens,
            "parameters": dict(judge.parameters),
            "draws": draws,
            "attempts": judge.attempts,
            "rubric": RUBRIC_VERSION,
            "same_draws": draws > 1 and _all_alike(found, outcomes),
        },
        "ours": {"label": found.ours, "source": found.source, "answers_sha256": found.digest},
        "pairs": [_pair(pairing, outcomes) for pairing in found.pairings],
        "usage": {
            "requests_now": spent.requests,
            "tokens_now": [spent.tokens_in, spent.tokens_out],
            "cost_now": spent.cost,
            "replies": len(replies),
            "tokens": [tokens_in, tokens_out],
            "cost": spent.prices.cost(tokens_in, tokens_out),
            "priced": bool(spent.prices.tokens_in or spent.prices.tokens_out),
            "tokens_guessed": any(
                reply.tokens_in is None or reply.tokens_out is None
                for outcome in outcomes.values()
                for reply in outcome.replies
            ),
        },
    }


def _all_alike(found: Contest, outcomes: Mapping[Duel, Outcome]) -> bool:
    """Whether every draw of a question got the same reply: then the server does not draw."""
    return all(
        len({outcomes[draw[order]].replies[:1] for draw in meeting.draws}) == 1
        for pairing in found.pairings
        for meeting in pairing.meetings
        for order in (0, 1)
    )


def _pair(pairing: Pairing, outcomes: Mapping[Duel, Outcome]) -> dict[str, Any]:
    scored = [one for meeting in pairing.meetings if (one := _scored(meeting, outcomes))]
    faults = Counter(
        str(outcome.result) for duel in pairing.duels if not isinstance((outcome := outcomes[duel]).result, Verdict)
    )
    categories: dict[str, list[Scored]] = {}
    for one in scored:
        categories.setdefault(one.category, []).append(one)
    return {
        "baseline": pairing.baseline,
        "source": pairing.source,
        "answers_sha256": pairing.digest,
        **summarise(scored),
        "asked": len(pairing.meetings),
        "unanswered": pairing.missing,
        "verdicts": len(pairing.duels),
        "faults": dict(faults.most_common()),
        "asked_again": sum(len(outcomes[duel].replies) > 1 for duel in pairing.duels),
        "categories": {name: summarise(rows) for name, rows in sorted(categories.items())},
        "scores": [
            {"question": one.question, "category": one.category, "baseline": one.baseline, "ours": one.ours}
            for one in scored
        ],
    }


def _scored(meeting: Meeting, outcomes: Mapping[Duel, Outcome]) -> Scored | None:
    """Only draws of which both orders have a verdict: one order alone would bring its bias in."""
    draws = []
    for pair in meeting.draws:
        first, second = (outcomes[duel].result for duel in pair)
        if isinstance(first, Verdict) and isinstance(second, Verdict):
            draws.append(Draw(first, second))
    return Scored(meeting.name, meeting.question.category, draws) if draws else None


def write_result(found: Contest, outcomes: Mapping[Duel, Outcome], data: Mapping[str, Any], to: Path) -> None:
    """Write the three files, each atomically. Raises OSError."""
    to.mkdir(parents=True, exist_ok=True)
    write_atomic(to / REPLIES, "".join(json.dumps(line) + "\n" for line in _lines(found, outcomes)))
    write_atomic(to / TABLE, judged_markdown(data))
    write_json(to / JUDGED, data)


def _lines(found: Contest, outcomes: Mapping[Duel, Outcome]) -> list[dict[str, Any]]:
    return [
        {
            "baseline": pairing.baseline,
            "question": meeting.name,
            "category": meeting.question.category,
            "instruction": meeting.question.instruction,
            "first": first,
            "draw": duel.draw,
            "scores": [verdict.first, verdict.second] if isinstance(verdict := outcome.result, Verdict) else None,
            "fault": None if isinstance(verdict, Verdict) else verdict,
            "reason": outcome.reason,
            "replies": [reply.text for reply in outcome.replies],
        }
        for pairing in found.pairings
        for meeting in pairing.meetings
        for pair in meeting.draws
        for first, duel in zip(("baseline", "ours"), pair, strict=True)
        for outcome in [outcomes[duel]]
    ]
