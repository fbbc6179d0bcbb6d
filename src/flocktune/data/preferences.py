"""Preference rows out of rows whose answers can be decided by rule, as those of the embedded world can.

The rejected answer of a row is another row's right answer: of those in the same category that the row's own ``check``
finds wrong, that of the row whose instruction shares the most words with its own; of equals, the first after it, around
the end of the category. So both answers are of one kind, "Which trade does Otto have?" is answered by two trades, and
nothing is drawn at random.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flocktune.data.checks import passes

_WORD = re.compile(r"\w+")


def preference_rows(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """``rows`` of instruction, context, response, category and check, with ``chosen`` and ``rejected`` as answers.

    A row for which no other answer is wrong is left out.
    """
    words = [frozenset(_WORD.findall(row["instruction"].casefold())) for row in rows]
    places: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        places.setdefault(row["category"], []).append(index)
    order = {index: at for kin in places.values() for at, index in enumerate(kin)}
    for index, row in enumerate(rows):
        kin, at = places[row["category"]], order[index] + 1
        best, most = None, -1
        for other in (*kin[at:], *kin[: at - 1]):
            shared = len(words[index] & words[other])
            if shared > most and not passes(rows[other]["response"], row["check"]):
                best, most = other, shared
        if best is not None:
            rest = {key: value for key, value in row.items() if key != "response"}
            yield {**rest, "chosen": row["response"], "rejected": rows[best]["response"]}
