"""Questions with the answers of every method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flocktune.report.outcome import main_method
from flocktune.report.runs import Experiment
from flocktune.report.styles import style_of
from flocktune.report.summaries import DECISIVE, method_label, number

_SAMPLES = 6


def sample_answers(experiment: Experiment) -> list[dict[str, Any]]:
    """Questions with the answers of every method, one of each category first."""
    main = main_method(experiment)
    tables = {key: {_question(row): row for row in runs[0].answers} for key, runs in experiment.methods.items() if runs}
    rows = list((tables.get(main) or next(iter(tables.values()), {})).values())
    by_category: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_category.setdefault(str(row.get("category") or ""), []).append(row)
    lists = list(by_category.values())
    spread = [rows[place] for place in range(max(map(len, lists), default=0)) for rows in lists if place < len(rows)]
    return [
        {
            "category": row.get("category") or "",
            "instruction": row.get("instruction") or "",
            "context": row.get("context") or "",
            "reference": row.get("reference") or "",
            "answers": [
                (
                    method_label(key, experiment.summaries[key]),
                    style_of(key, list(tables))[0],
                    given.get("answer") or "",
                    _verdict(given),
                )
                for key, table in tables.items()
                for given in [table.get(_question(row))]
                if given
            ],
        }
        for row in spread[:_SAMPLES]
    ]


def _question(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(row.get(name)) for name in ("category", "instruction", "context", "reference"))


def _verdict(row: Mapping[str, Any]) -> str:
    """Right, wrong, or ROUGE-L when nothing decides."""
    scores = row.get("scores") or {}
    right = next((value for name in DECISIVE if (value := number(scores.get(name))) is not None), None)
    rouge = number(scores.get("rouge_l"))
    if right is not None:
        return {0.0: "wrong", 1.0: "right"}.get(right, f"{right * 100:.0f} % of its programs pass")
    return "" if rouge is None else f"ROUGE-L {rouge * 100:.0f} %"
