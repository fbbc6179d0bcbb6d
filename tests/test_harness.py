"""lm-evaluation-harness on a run's result, beside our own multiple choice on the same rows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from conftest import Said, World, write_rows
from flocktune import api
from flocktune.config.load import load_recipe
from flocktune.data.encoding import encode_prompt
from flocktune.data.examples import Example, Message
from flocktune.data.templates import prompt_before_answer
from flocktune.results import evaluate_on, open_result
from tiny_models import tiny_tokenizer

WORDS = ("red", "green", "dark blue", "grey")
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: questions.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{text}"
doc_to_target: "{{{{choices.label.index(answerKey)}}}}"
doc_to_choice: "{{{{choices.text}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_bytes, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of task files beside local data of ARC's shape."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "question": f"Which has number {row}" + "?" * (1 + row % 3),
            "choices": {"text": list(WORDS[: 3 + row % 2]), "label": ["A", "B", "C", "D"][: 3 + row % 2]},
            "answerKey": "ABC"[row % 3],
        }
        for row in range(7)
    ]
    write_rows(folder / "questions.jsonl", rows)
    texts = {"spelled_out": r"Instruction: {{question}}\nAnswer:", "as_instructions": "{{question}}"}
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, text=text))
    (folder / "elsewhere.yaml").write_text(
        TASK.format(name="elsewhere", text="{{question}}").replace("dataset_path: json", "dataset_path: nobody/nothing")
        .replace("dataset_kwargs", "metadata")
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def tuned(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned") / "run"
    api.run(load_recipe(world.recipe, ["rounds=1", "evaluation.generate=false", "lora.alpha=64"]), folder)
    return folder


@pytest.fixture(scope="module")
def ours(tuned: Path, tasks: Path) -> Mapping[str, Any]:
    """Our own log-likelihoods and shares, on the same rows in the run's template."""
    opened = open_result(tuned)
    settings = dataclasses.replace(opened.config.evaluation, task="choice")
    found = evaluate_on(opened, str(tasks / "questions.jsonl"), settings=settings)
    nats = {answer.example.instruction: answer.more["log_likelihoods"] for answer in found.answers}
    return {**found.as_dict()["overall"], "nats": nats}


@pytest.mark.parametrize(("task", "options"), [("spelled_out", []), ("as_instructions", ["--in-template"])])
def test_log_likelihoods_are_our_own(
    cli: Callable[..., Said], tuned: Path, tasks: Path, ours: Mapping[str, Any], task: str, options: list[str],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    said = cli(
        "eval", tuned, "--harness", task, "--harness-tasks", tasks, *options,
        "--json", "numbers.json", "--answers", "answers.jsonl",
    )  # fmt: skip
    assert said.code == 0, said.all
    assert "acc_bytes" in said.out
    numbers = json.loads(Path("numbers.json").read_text())["harness"][task]
    assert numbers["rows"] == 7
    assert numbers["metrics"] == pytest.approx({"acc": ours["choice"], "acc_bytes": ours["choice_per_byte"]})
    assert numbers["standard_errors"]["acc"] == pytest.approx((ours["choice"] * (1 - ours["choice"]) / 6) ** 0.5)
    rows = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert len(rows) == 7
    for row in rows:
        theirs = [float(response[0]) for response in row["filtered_resps"]]
        assert theirs == pytest.approx(ours["nats"][row["doc"]["question"]], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--harness", "spelled_out, spelled_ot"], "Near it: spelled_out"),
        (["--harness", "elsewhere"], "a task whose data can be had"),
        (["--harness", "elsewhere", "--task", "choice"], "--task: expected none beside --harness"),
        (["--harness", "elsewhere", "--seed", "0"], "--seed: expected none beside --harness"),
        ([], "--harness-tasks: expected --harness beside it"),
    ],
)
def test_tasks_that_can_not_be_had(
    cli: Callable[..., Said],
    tuned: Path,
    tasks: Path,
    options: list[str],
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lm_eval.tasks import TaskManager

    own = TaskManager(include_path=str(tasks), include_defaults=False)  # reading all of the library's takes seconds
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: own)
    said = cli("eval", tuned, *options, "--harness-tasks", tasks)
    assert said.code == 2, said.all
    assert problem in " ".join(said.err.split())
    assert "Traceback" not in said.err


def test_a_folder_that_is_none_and_a_library_that_is_missing(
    cli: Callable[..., Said], tuned: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nowhere = cli("eval", tuned, "--harness", "arc_easy", "--harness-tasks", tmp_path / "none")
    assert nowhere.code == 2
    assert "a folder with task files" in nowhere.err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    missing = cli("eval", tuned, "--harness", "arc_easy")
    assert missing.code == 2
    assert "flocktune[harness]" in missing.err


@pytest.mark.parametrize("template", ["alpaca", "short", "chat"])
def test_a_prompt_in_one_text_has_the_tokens_of_training(template: Any) -> None:
    tokenizer = tiny_tokenizer(chat=True)
    example = Example("And now?", history=(Message("user", "Hello"), Message("assistant", "Well")))
    text = prompt_before_answer(example, template, tokenizer)
    blank = 1 if template == "short" else 0  # belongs to the answer's first token there
    tokens = [0, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert tokens[: len(tokens) - blank] == encode_prompt(example, tokenizer, template=template, max_tokens=500)
