"""Task accuracy: right numbers and right choices, from a model's own probabilities to a run's report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Said, World, write_rows
from flocktune import api
from flocktune.config.load import load_recipe
from flocktune.config.schema import Columns, EvaluationConfig
from flocktune.data.encoding import encode_prompt
from flocktune.data.examples import Example, to_examples
from flocktune.errors import UserError
from flocktune.evaluation.choices import Likelihoods, by_chance, likelihoods
from flocktune.evaluation.evaluate import Evaluation
from flocktune.evaluation.generate import cut_left
from flocktune.evaluation.scores import interval
from flocktune.evaluation.tasks import Speaker, answer_all
from flocktune.types import Mean
from tiny_models import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
QUESTIONS = [
    Example("Is it so?", response="no", choices=("yes", "no")),
    Example("Which colour has the sky?", "It is day.", "blue", choices=("red", "blue", "a very dark green")),
    Example("One?", response="1", choices=("1", "2", "3", "4")),
    Example("Who is it, then?", response="Ümit", choices=("Ümit", "Eve", "Bo")),
]  # fmt: skip


def asked(model: Any, examples: list[Example], **changes: Any) -> list[Likelihoods]:
    options = {"template": "short", "max_tokens": 128, "batch_size": 3, "pad_id": 2, **changes}
    return likelihoods(model, options.pop("tokenizer", TOKENIZER), examples, **options)


def by_hand(model: Any, example: Example, choice: str) -> float:
    """Prompt and choice in one row, log-softmax over it, the choice's tokens summed."""
    prompt = encode_prompt(example, TOKENIZER, template="short", max_tokens=128)
    answer = TOKENIZER(" " + choice, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return sum(float(log_p[len(prompt) + place - 1, token]) for place, token in enumerate(answer))


# --- choices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_likelihoods_are_sums_of_log_softmax_whatever_the_batch(family: str) -> None:
    model = tiny_model(family)
    expected = [[by_hand(model, example, choice) for choice in example.choices] for example in QUESTIONS]
    for batch_size in (1, 3, 16):
        for found, wanted in zip(asked(model, QUESTIONS, batch_size=batch_size), expected, strict=True):
            assert list(found.nats) == pytest.approx(wanted, rel=1e-5)
    found = asked(model, QUESTIONS)[3]
    assert found.tokens == (6, 4, 3)  # a blank, then bytes
    assert found.bytes == (5, 3, 2)


def test_the_likeliest_choice_as_it_is_and_by_token_and_by_byte() -> None:
    likely = Likelihoods((-4.0, -5.0, -6.0), (2, 5, 4), (4, 5, 12))
    assert likely.chosen() == {"choice": 0, "choice_per_token": 1, "choice_per_byte": 2}
    assert likely.scores(2) == {"choice": 0.0, "choice_per_token": 0.0, "choice_per_byte": 1.0}
    assert Likelihoods((-1.0, -1.0), (1, 1), (1, 1)).chosen()["choice"] == 0
    assert by_chance(QUESTIONS) == pytest.approx((1 / 2 + 1 / 3 + 1 / 4 + 1 / 3) / 4)


def test_the_end_of_an_answer_is_not_counted_and_a_chat_templates_is_no_other() -> None:
    model, chat = tiny_model("llama"), tiny_tokenizer(chat=True)
    [found] = asked(model, QUESTIONS[:1], tokenizer=chat, template="chat")
    prompt = encode_prompt(QUESTIONS[0], chat, template="chat", max_tokens=96)
    answer = chat("yes", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    wanted = sum(float(log_p[len(prompt) + place - 1, token]) for place, token in enumerate(answer))
    assert found.nats[0] == pytest.approx(wanted, rel=1e-5)
    assert found.tokens == (3, 2)


def test_a_long_prompt_is_cut_alike_for_all_choices_and_a_choice_never() -> None:
    model = tiny_model("llama")
    long = replace(QUESTIONS[0], instruction="so " * 60)
    [found] = asked(model, [long], max_tokens=48)
    assert found.tokens == (4, 3)
    with pytest.raises(UserError, match=r"max_tokens: expected room for every choice, not 16"):
        asked(model, [replace(long, choices=("no", "yes " * 9))], max_tokens=16)


ROWS: Mapping[str, tuple[dict[str, Any], str]] = {
    "ARC": ({"choices": {"text": ["red", "blue"], "label": ["1", "2"]}, "answerKey": "2"}, "blue"),
    "MMLU": ({"choices": ["red", "blue"], "answer": 1}, "blue"),
    "HellaSwag": ({"endings": ["red", "blue"], "label": "0"}, "red"),
    "letter": ({"options": ["red", "blue"], "answer": "b"}, "blue"),
    "text": ({"options": ["red", "blue"], "answer": "red"}, "red"),
    "digits that are choices": ({"choices": ["0", "1"], "answer": "1"}, "1"),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_with_choices_as_data_sets_have_them(name: str) -> None:
    row, right = ROWS[name]
    [example] = to_examples([("rows:1", {"question": "Which?", **row})], Columns())
    assert (example.instruction, example.response) == ("Which?", right)
    assert right in example.choices
    assert len(example.choices) == 2


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"choices": ["red", "blue"], "answer": 2}, r"which of the 2 choices is right.*got 2"),
        ({"choices": ["red", "blue"], "answer": True}, r"which of the 2 choices"),
        ({"choices": ["red", "blue"], "answer": "green"}, r"got 'green'.*data.columns.response"),
        ({"choices": ["2", "1", "0"], "answer": "2"}, "means several"),
        ({"choices": ["red", "red"], "answer": "red"}, "means several"),
        ({"choices": ["red"], "answer": 0}, "two texts or more"),
        ({"choices": "red, blue", "answer": 0}, "two texts or more"),
        ({"choices": ["red", " "], "answer": 0}, "none of them empty"),
        ({"choices": {"text": ["red", "blue"], "label": ["A"]}, "answer": "A"}, "2 labels"),
        ({"choices": {"text": ["red", "blue"], "label": ["A", "B"]}, "answer": "C"}, "got 'C'"),
    ],
)
def test_choices_that_say_nothing_are_refused(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        to_examples([("rows:1", {"question": "Which?", **row})], Columns())


def test_a_response_that_the_recipe_names_is_one() -> None:
    row = {"question": "Which?", "choices": ["red", "blue"], "answer": "It is blue.", "output": "blue"}
    [example] = to_examples([("rows:1", row)], Columns(response="answer"))
    assert (example.response, example.choices) == ("It is blue.", ())
    [example] = to_examples([("rows:1", row)], Columns(choices="choices", response="output"))
    assert example.choices == ("red", "blue")


# --- scores and intervals -----------------------------------------------------------------------------


def test_intervals_are_wilsons() -> None:
    # By its textbook form: (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n), z = 1.959964.
    assert interval(0.5, 10) == pytest.approx((0.236593, 0.763407), abs=1e-6)
    assert interval(0.0, 100) == pytest.approx((0.0, 0.036993), abs=1e-6)
    assert interval(1.0, 3) == pytest.approx((0.438503, 1.0), abs=1e-6)
    table = Evaluation({"a": {"choice": Mean(3, 6)}, "b": {"choice": Mean(2, 4)}}, {"a": 6, "b": 4}).as_dict()
    assert table["intervals"] == {"choice": {"low": pytest.approx(0.236593), "high": pytest.approx(0.763407)}}
    assert "intervals" not in Evaluation({"a": {"loss": Mean(3, 6), "rouge_l": Mean(1, 2)}}, {"a": 2}).as_dict()


def test_a_task_refuses_rows_that_it_can_not_be_measured_on() -> None:
    speaker = Speaker(tiny_model("llama"), TOKENIZER, "short", 96, 2)
    plain = [Example("Say it", response="it"), Example("Say 3", response="3")]
    with pytest.raises(UserError, match=r"held-out rows: expected rows whose reference ends with a number.*1 of 2"):
        answer_all(speaker, plain, EvaluationConfig(task="number"))
    with pytest.raises(UserError, match=r"rows with choices \(evaluation.task choice\), got 2 of 2 without"):
        answer_all(speaker, plain, EvaluationConfig(task="choice"))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["evaluation.task=number", "evaluation.generate=false"], "evaluation.generate: expected true"),
        (["evaluation.task=choice", "local.loss={kind: dpo}"], "text with local.loss dpo"),
        (
            ["evaluation.task=choice", "attack={kind: backdoor, clients: [client-01], trigger: x, target: y}"],
            "text or number with a backdoor",
        ),
        (["evaluation.task=sums"], "evaluation.task"),
    ],
)
def test_a_recipe_that_leaves_nothing_to_measure_is_refused(world: World, settings: list[str], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        load_recipe(world.recipe, settings)


# --- a run --------------------------------------------------------------------------------------------


def choice_rows(count: int) -> list[dict[str, Any]]:
    """Rows as ARC has them, in two categories."""
    words = ("red", "green", "dark blue", "grey")
    return [
        {
            "question": f"Which has number {row}?",
            "choices": {"text": list(words[: 3 + row % 2]), "label": ["A", "B", "C", "D"][: 3 + row % 2]},
            "answerKey": "ABC"[row % 3],
            "category": ("sky", "sea")[row % 2],
        }
        for row in range(count)
    ]


@pytest.fixture(scope="module")
def chosen(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on questions with choices, and its base model beside it."""
    folder = tmp_path_factory.mktemp("chosen")
    rows = write_rows(folder / "questions.jsonl", choice_rows(40))
    changes = [f"data.train={rows}", "data.test_rows_per_category=6", "rounds=1", "evaluation.task=choice"]
    api.run(load_recipe(world.recipe, [*changes, "compare.base=true", "evaluation.generate=false"]), folder / "run")
    return folder / "run"


def test_a_recipes_task_is_in_answers_and_summary_and_report(chosen: Path) -> None:
    answers = [json.loads(line) for line in (chosen / "fedit/answers.jsonl").read_text().splitlines()]
    assert len(answers) == 12
    for row in answers:
        best = max(range(len(row["choices"])), key=lambda place, row=row: row["log_likelihoods"][place])
        assert row["answer"] == row["choices"][best]
        assert row["scores"]["choice"] == float(row["answer"] == row["reference"])
    numbers = json.loads((chosen / "fedit/summary.json").read_text())["metrics"]["held_out"]
    share = sum(row["scores"]["choice"] for row in answers) / 12
    assert numbers["overall"]["choice"] == pytest.approx(share)
    assert numbers["intervals"]["choice"]["low"] < share < numbers["intervals"]["choice"]["high"]
    assert "rouge_l" not in numbers["overall"]


def test_eval_of_each_task_on_rows_of_ones_own(cli: Callable[..., Said], chosen: Path, tmp_path: Path) -> None:
    again = cli("eval", chosen, "--json", tmp_path / "again.json")
    assert again.code == 0, again.all
    assert "Right choice" in again.out
    assert "95 % interval: Right choice" in again.out
    assert "Guessing gives 29.2 %" in again.out  # of 12 questions, half with 3 choices and half with 4
    assert max(map(len, again.out.splitlines())) <= 80
    numbers = json.loads((tmp_path / "again.json").read_text())
    assert numbers["task"] == "choice"
    summary = json.loads((chosen / "fedit/summary.json").read_text())
    assert numbers["overall"] == pytest.approx(summary["metrics"]["held_out"]["overall"])
    sums = [{"stem": f"{n} + {n}?", "solution": f"It is {2 * n}.\n#### {2 * n}"} for n in range(6)]
    data = write_rows(tmp_path / "sums.jsonl", sums)
    written = tmp_path / "answers.jsonl"
    options = ["--data", data, "--task", "number", "--column", "instruction=stem", "--column", "response=solution"]
    said = cli("eval", chosen, *options, "--answers", written, "--max-new-tokens", "3", "--json", tmp_path / "n.json")
    assert said.code == 0, said.all
    numbers = json.loads((tmp_path / "n.json").read_text())
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert [set(row["scores"]) for row in rows] == [{"number_match"}] * 6
    assert numbers["overall"]["number_match"] == sum(row["scores"]["number_match"] for row in rows) / 6
    assert not math.isnan(numbers["overall"]["loss"])
    assert cli("eval", chosen, "--task", "text", "--data", data, *options[4:], "--max-new-tokens", "2").code == 0


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--task", "sums"], "--task: expected one of text, number, choice"),
        (["--task", "number"], "12 of 12 without"),
        (["--samples", "3"], "--samples: expected --task code beside it"),
        (["--column", "choices=options"], "--data besides"),
        (["--data", "x.jsonl", "--column", "options"], "FIELD=COLUMN"),
        (["--data", "x.jsonl", "--column", "option=choices"], "with one of instruction"),
    ],
)
def test_eval_says_what_is_wrong(cli: Callable[..., Said], chosen: Path, options: list[str], problem: str) -> None:
    said = cli("eval", chosen, *options)
    assert said.code == 2
    assert problem in " ".join(said.err.split())


def test_prompts_leave_room_for_answers() -> None:
    speaker = Speaker(tiny_model("llama"), TOKENIZER, "short", 300, 2)
    [prompt] = speaker.prompts([Example("so " * 200)], 50)
    assert len(prompt) <= 206
    assert prompt == cut_left(prompt, 206, 0)
