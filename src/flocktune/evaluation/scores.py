"""Scores of one answer against one example. Pure functions of text; every score lies in [0, 1]."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping
from functools import cache
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Protocol

from flocktune.config.evaluation import OF_TASK
from flocktune.data.checks import passes

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

TEXT_SCORES = ("exact_match", "contains", "rouge_l", "checked")
SCORES = (*TEXT_SCORES, *OF_TASK["number"], *OF_TASK["choice"], *OF_TASK["code"])
"""Every score there is, in the order in which they are shown."""

_END = " .,;:!?"


class Scored(Protocol):
    """What a score needs of an example: the reference and, perhaps, a rule that decides."""

    @property
    def response(self) -> str: ...

    @property
    def check(self) -> Mapping[str, Any] | None: ...


def normalise(text: str) -> str:
    """One form for texts that differ in case, runs of white space, final punctuation or Unicode form only."""
    return " ".join(unicodedata.normalize("NFKC", text).split()).rstrip(_END).casefold()


def exact_match(answer: str, reference: str) -> bool:
    """Whether both texts are the same once normalised."""
    return normalise(answer) == normalise(reference)


def contains(answer: str, reference: str) -> bool:
    """Whether the reference occurs in the answer as whole words: ``cat`` is not in ``category``.

    An empty reference is contained in an empty answer only, else it would score every answer as right.
    """
    wanted, given = normalise(reference), normalise(answer)
    if not wanted:
        return not given
    return re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", given) is not None


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L F1 (Lin 2004): from the longest common subsequence of words, without stemming.

    The rouge-score package computes it. Words are runs of letters and digits of any script; for ASCII
    text they are the words of that package's own tokenizer, which drops all other letters.
    """
    return float(_rouge().score(reference, answer)["rougeL"].fmeasure)


def score(answer: str, example: Scored) -> dict[str, float]:
    """All scores of an answer; ``checked`` (0 or 1) only when the example carries a rule."""
    reference = example.response
    scores = {
        "exact_match": float(exact_match(answer, reference)),
        "contains": float(contains(answer, reference)),
        "rouge_l": rouge_l(answer, reference),
    }
    return scores if example.check is None else {**scores, "checked": float(passes(answer, example.check))}


def interval(share: float, count: int) -> tuple[float, float]:
    """A 95 % confidence interval of a share of ``count`` rows: Wilson's (1927), which holds for few rows too.

    Of a mean of numbers between 0 and 1, such as pass@k over questions, it is on the safe side: right or wrong varies
    the most.
    """
    z2 = NormalDist().inv_cdf(0.975) ** 2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    reach = math.sqrt(z2 * (share * (1 - share) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    return max(0.0, middle - reach), min(1.0, middle + reach)


class _Words:
    """The tokenizer that rouge-score asks for."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


@cache
def _rouge() -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer  # late: it imports nltk, about a second

    return RougeScorer(["rougeL"], use_stemmer=False, tokenizer=_Words())
