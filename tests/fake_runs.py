"""Run folders as runs leave them, without a run: for whoever only reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

START_S = 1_700_000_000.0
SECRET = "the patient's name is in this answer"


def start_event(planned: int, **more: Any) -> dict[str, Any]:
    clients = {name: {"rows": 10, "categories": {"colour": 4, "sum": 6}} for name in ("anna", "bert", "carl")}
    told = {
        "name": "fake",
        "method": "fedit",
        "seed": 0,
        "rounds": planned,
        "clients": clients,
        "model": "somewhere/small",
    }
    return {"event": "run_start", **told, "device": "cpu", "time": START_S, **more}


def round_event(number: int, **more: Any) -> dict[str, Any]:
    """Round ``number`` (from 0), ten seconds after the one before: anna and bert answered, carl failed."""
    told = {"loss": 2.0 - 0.01 * number, "weight": 10.0, "tokens": 100, "seconds": 1.5, "steps": 2}
    return {
        "event": "round",
        "round": number,
        "selected": ["anna", "bert", "carl"],
        "answered": ["anna", "bert"],
        "failures": [{"client": "carl", "reason": "its <b>disk</b> is full"}],
        "train_loss": 2.0 - 0.01 * number,
        "clients": {"anna": told, "bert": {**told, "weight": 30.0}},
        "update_norm": 1.0,
        "aggregation_error": 0.1,
        "bytes_down": 3000,
        "bytes_up": 2000,
        "tokens": 200,
        "seconds": {"data": 0.5, "forward_backward": 2.0, "aggregate": 0.1},
        "privacy": {"epsilon": 1.5 + number, "delta": 1e-5},
        "time": START_S + 10.0 * (number + 1),
        **more,
    }


def evaluation_event(rounds: int, **more: Any) -> dict[str, Any]:
    scores = {"rows": 8, "loss": 1.5, "perplexity": 4.5, "rouge_l": 0.25}
    told = {"dataset": "held_out", "overall": {**scores, "rows": 16}, "categories": {"colour": scores, "sum": scores}}
    return {"event": "evaluation", "round": rounds, **told, "seconds": 3.0, "time": START_S + 10.0 * rounds + 3, **more}


def log_of(done: int, planned: int = 10) -> list[dict[str, Any]]:
    events = [start_event(planned), *(round_event(number) for number in range(done))]
    return [*events, evaluation_event(done)] if done else events


def as_lines(events: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(event) + "\n" for event in events).encode()


def fake_run(folder: Path, done: int = 3, planned: int = 10, *, finished: bool = False) -> Path:
    """A run that was killed after ``done`` rounds, or is finished."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".lock").touch()
    (folder / "recipe.yaml").write_text("name: fake\n")
    (folder / "metrics.jsonl").write_bytes(as_lines(log_of(done, planned)))
    (folder / "answers.jsonl").write_text(json.dumps({"answer": SECRET}) + "\n")
    if finished:
        numbers = {"overall": {"rows": 16, "rouge_l": 0.25, "loss": 1.5}, "categories": {}}
        summary = {"name": "fake", "method": "fedit", "seed": 0, "rounds": done, "metrics": {"held_out": numbers},
                   "bytes_up": 2000 * done, "bytes_down": 3000 * done, "seconds": 12.0}  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "report.html").write_text("<!doctype html><title>the report</title>")
    return folder
