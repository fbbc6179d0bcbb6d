"""One recipe, any family: nothing in the code knows a model by its name."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from conftest import dolly_rows, write_rows
from flocktune import api
from flocktune.config.load import load_recipe
from flocktune.report.events import read_events
from tiny_models import save_tiny

ROOT = Path(__file__).parent.parent
SMALL = [
    "rounds=2",
    "lora.rank=2",
    "local.steps=3",
    "local.lr=2.0e-2",
    "data.max_tokens=96",
    "data.test_rows_per_category=2",
    "allocation.clients=3",
    "allocation.min_rows=4",
    "evaluation.every=1",
    "evaluation.max_new_tokens=2",
    "compare.base=false",
    "compare.local=0",
    "compare.centralised=false",
]


@pytest.mark.parametrize(
    ("family", "batching", "dtype"),
    [
        ("llama", "padded", "bfloat16"),
        ("qwen2", "padded", "float32"),
        ("qwen2", "packed", "float32"),
        ("gpt2", "padded", "float32"),
        ("gpt2", "packed", "float32"),
        ("gemma", "padded", "float32"),
        ("gemma", "packed", "bfloat16"),
        ("gemma2", "padded", "float32"),
    ],
)
def test_the_dolly_recipe_runs_on_any_family(family: str, batching: str, dtype: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", family)
    data = write_rows(tmp_path / "rows.jsonl", dolly_rows(60))
    overrides = [f"model.path={model}", f"data.train={data}", f"data.batching={batching}", f"model.dtype={dtype}"]
    config = load_recipe(ROOT / "recipes/fedit_dolly.yaml", [*SMALL, *overrides])
    summary = api.run(config, tmp_path / "run")
    held_out = [event for event in read_events(tmp_path / "run/metrics.jsonl") if event["event"] == "evaluation"]
    losses = [event["overall"]["loss"] for event in held_out]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[1] < losses[0], "tuning brings the loss down"
    assert set(summary["metrics"]["held_out"]["categories"]) == {"colour", "size", "sum"}


def test_no_code_names_a_model_family() -> None:
    names = re.compile(r"\b(llama|qwen|gpt2|gpt_2|gemma|mistral|phi3)\b", re.IGNORECASE)
    code = list((ROOT / "src/flocktune").rglob("*.py"))
    assert code
    for path in code:
        text = re.sub(r'""".*?"""|#.*', "", path.read_text(), flags=re.DOTALL)
        assert not names.search(text), path
