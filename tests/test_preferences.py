"""Preference tuning: rows with two answers, their encoding, DPO's loss against TRL's and a textbook's, whole runs."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import write_rows
from flocktune import resident
from flocktune.algorithms import fedavg
from flocktune.algorithms.local import ClientData
from flocktune.algorithms.preferences import (
    PREFERENCE_METRICS,
    PreferenceLoss,
    Preferences,
    measure_preferences,
    no_adapter,
    pair_losses,
    sequence_log_probs,
    with_its_reference,
    with_reference,
)
from flocktune.allocation import allocate_clients
from flocktune.assemble import federation
from flocktune.config.load import build_config, load_recipe
from flocktune.config.losses import Dpo
from flocktune.config.schema import AggregationConfig, Columns, LocalConfig, LoraConfig
from flocktune.costs import measure_step
from flocktune.data.batching import Batch, collate, training_batches
from flocktune.data.checks import passes
from flocktune.data.encoding import Encoded, encode, encode_cached
from flocktune.data.examples import Example, Message, examples_digest, to_examples
from flocktune.data.sources import read_examples
from flocktune.engine.in_process import InProcess
from flocktune.engine.rounds import run_rounds
from flocktune.errors import UserError
from flocktune.estimate import estimate
from flocktune.evaluation.evaluate import evaluate
from flocktune.interfaces import ServerHalf
from flocktune.models import head
from flocktune.models.lora import Adapter, attach
from flocktune.results import evaluate_on, open_result
from flocktune.run_folder import create_run
from flocktune.runs import Stopped, execute
from flocktune.scheduling import Cohort
from flocktune.splitting import write_split
from flocktune.tensors import group
from flocktune.types import ClientTask, Update
from tiny_federation import FEDBIOT, SIZES, Direct, make_federated_world, make_owner, run_apart
from tiny_models import fill, peft_twin, tiny_model, tiny_tokenizer

LORA = LoraConfig(rank=2, alpha=4.0)
USER, ANSWER = {"role": "user", "content": "Which?"}, {"role": "assistant", "content": "good"}
WORSE = {"role": "assistant", "content": "bad"}


# --- rows ------------------------------------------------------------------------------------------


def read(*rows: dict[str, Any], columns: Columns | None = None) -> list[Example]:
    return to_examples([(f"rows:{number}", row) for number, row in enumerate(rows, 1)], columns or Columns())


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Which?", "chosen": "good", "rejected": "bad"},
        {"instruction": "Which?", "chosen": "good", "rejected": "bad"},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE]},
        {"prompt": "Which?", "chosen": [ANSWER], "rejected": "bad"},
        {"chosen": [USER, ANSWER], "rejected": [USER, WORSE]},
        {"prompt": "Which?", "chosen": [USER, ANSWER], "rejected": [USER, WORSE], "messages": [USER, ANSWER]},
        {"chosen": [{"from": "human", "value": "Which?"}, ANSWER], "rejected": [USER, WORSE]},
    ],
)
def test_preference_rows_of_every_shape_are_one_prompt_and_two_answers(row: dict[str, Any]) -> None:
    assert read(row) == [Example("Which?", response="good", rejected="bad")]


def test_a_conversation_context_category_client_and_own_names_are_kept() -> None:
    history = [{"role": "system", "content": "Be brief."}, USER, ANSWER, {"role": "user", "content": "Why?"}]
    [example] = read({"prompt": history, "chosen": [ANSWER], "rejected": [WORSE]})
    assert example.history == (Message("system", "Be brief."), Message("user", "Which?"), Message("assistant", "good"))
    assert (example.instruction, example.response, example.rejected) == ("Why?", "good", "bad")
    own = Columns(instruction="q", context="c", chosen="yes", rejected="no", category="kind", client="of")
    [example] = read({"q": "Which?", "c": "all", "yes": "a", "no": "b", "kind": "k", "of": 7}, columns=own)
    assert example == Example("Which?", "all", "a", category="k", client="7", rejected="b")


def test_without_a_recipe_that_says_else_the_chosen_answer_is_the_one_to_learn() -> None:
    row = {"prompt": "Which?", "chosen": "good", "rejected": "bad", "response": "other"}
    assert read(row)[0].response == "good"
    assert read(row, columns=Columns(response="response"))[0] == Example("Which?", response="other")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"chosen": "a", "rejected": "b"}, "expected a column for the prompt, or messages that begin with it"),
        ({"prompt": "p", "chosen": 3, "rejected": "b"}, "column 'chosen'"),
        ({"prompt": "p", "chosen": "a", "rejected": []}, "an answer at the end"),
        ({"chosen": [USER, ANSWER], "rejected": [USER]}, "column 'rejected': expected an answer at the end"),
        ({"chosen": [USER, ANSWER], "rejected": [{"role": "user", "content": "?"}, WORSE]}, "two answers to one"),
    ],
)
def test_a_row_that_is_no_pair_is_named(row: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=r"rows:1") as caught:
        read(row)
    assert said in str(caught.value)


def test_the_digest_knows_the_rejected_answer() -> None:
    one, other = Example("p", response="a", rejected="b"), Example("p", response="a", rejected="c")
    assert len({examples_digest([example]) for example in (one, other, replace(one, rejected=None))}) == 3


def test_the_embedded_pairs_are_a_right_and_a_wrong_answer_of_one_category() -> None:
    pairs = read_examples("embedded-preferences", Columns())
    rows = read_examples("embedded", Columns())
    kinds = {(row.category, row.response) for row in rows}
    assert [pair.instruction for pair in pairs] == [row.instruction for row in rows]
    for pair in pairs:
        assert passes(pair.response, pair.check or {})
        assert not passes(pair.rejected or "", pair.check or {})
        assert (pair.category, pair.rejected) in kinds
    assert pairs == read_examples("embedded-preferences", Columns())


# --- encoding and batches --------------------------------------------------------------------------

PAIRS = [
    Example("What is this?", response="a long and good answer", rejected="bad"),
    Example("And that?", "in a room", "yes", rejected="no, it is something else"),
    Example("Nothing?", response="text", rejected=" "),
    Example("Third?", response="three", rejected="four"),
    Example("Fourth?", response="the fourth one", rejected="a fifth"),
]


def encoded_pairs(examples: list[Example] | None = None, max_tokens: int = 120) -> Encoded:
    options = {"template": "short", "max_tokens": max_tokens, "train_on": "responses", "pairs": True}
    return encode(examples or PAIRS, tiny_tokenizer(), **options)[0]


def test_both_sequences_begin_with_the_same_prompt_which_is_no_target() -> None:
    tokenizer, encoded = tiny_tokenizer(), encoded_pairs()
    assert len(encoded) == len(PAIRS)
    assert encoded.sequences([1, 3]).tolist() == [1, 3, 6, 8]
    for row, example in enumerate(PAIRS):
        prompt = f"<s>Instruction: {example.instruction}\n" + (f"Context: {example.context}\n" if row == 1 else "")
        for sequence, answer in zip(encoded.sequences([row]), (example.response, example.rejected), strict=True):
            tokens, mask = encoded.rows(int(sequence))
            said = f" {answer}</s>" if answer and answer.strip() else ""
            assert tokenizer.decode(tokens) == f"{prompt}Answer:{said}"
            assert tokenizer.decode(tokens[mask]) == said


@pytest.mark.parametrize("template", ["short", "chat"])
def test_earlier_answers_of_a_conversation_are_prompt(template: Any) -> None:
    history = (Message("user", "Which?"), Message("assistant", "this"))
    example = Example("Why?", response="because", history=history, rejected="so")
    tokenizer = tiny_tokenizer(chat=True)
    options = {"template": template, "max_tokens": 200, "train_on": "responses"}
    encoded, _ = encode([example], tokenizer, **options, pairs=True)
    for sequence, answer in enumerate(("because", "so")):
        tokens, mask = encoded.rows(sequence)
        assert tokenizer.decode(tokens[mask]).strip() == f"{answer}</s>"
    plain, _ = encode([example], tokenizer, **options)
    assert plain.targets[0] > encoded.rows(0)[1].sum(), "of instructions, every turn is learned"


def test_a_row_counts_both_answers_and_is_left_out_when_one_is_empty() -> None:
    encoded = encoded_pairs()
    alone = [encode([replace(e, rejected=None)], tiny_tokenizer(), template="short", max_tokens=120,
                    train_on="responses")[0] for e in (PAIRS[0], replace(PAIRS[0], response="bad"))]  # fmt: skip
    assert encoded.lengths[0] == sum(int(part.lengths[0]) for part in alone)
    assert encoded.targets[0] == sum(int(part.targets[0]) for part in alone)
    assert encoded.targets.tolist()[2] == 0
    assert encoded.longest == max(len(encoded.rows(place)[0]) for place in range(10))
    _, report = encode(PAIRS, tiny_tokenizer(), template="short", max_tokens=120, train_on="responses", pairs=True)
    assert (report.rows, report.untrainable, report.truncated) == (5, (2,), 0)


@settings(max_examples=30, deadline=None)
@given(prompt=st.integers(0, 90), chosen=st.integers(1, 60), rejected=st.integers(1, 60), room=st.integers(16, 80))
def test_a_cut_prompt_is_the_same_for_both_answers(prompt: int, chosen: int, rejected: int, room: int) -> None:
    example = Example("p" * prompt, response="c" * chosen, rejected="r" * rejected)
    encoded = encoded_pairs([example], room)
    (one, mask_one), (other, mask_other) = encoded.rows(0), encoded.rows(1)
    begins, begins_too = np.flatnonzero(mask_one)[0], np.flatnonzero(mask_other)[0]
    assert begins == begins_too
    assert one[:begins].tolist() == other[:begins].tolist()
    assert max(len(one), len(other)) <= room
    for mask, letters in ((mask_one, chosen), (mask_other, rejected)):
        answer = letters + 2  # a space before it, its end after it
        assert mask.sum() >= min(answer, room - room // 4), "a prompt gives way to the longer answer, whichever it is"


def test_taken_cached_and_chosen_rows(tmp_path: Path) -> None:
    encoded = encoded_pairs()
    some = encoded.take([3, 0])
    assert (len(some), some.pairs) == (2, True)
    for place, sequence in enumerate(encoded.sequences([3, 0])):
        assert some.rows(place)[0].tolist() == encoded.rows(int(sequence))[0].tolist()
    options = {"template": "short", "max_tokens": 120, "train_on": "responses", "digest": "d", "folder": tmp_path}
    made, _ = encode_cached(PAIRS, tiny_tokenizer(), **options, pairs=True)
    kept, report = encode_cached(PAIRS, tiny_tokenizer(), **options, pairs=True)
    assert kept.pairs
    assert report.untrainable == (2,)
    plain, _ = encode_cached(PAIRS, tiny_tokenizer(), **options)
    for mine in (made, kept):
        assert mine.tokens.tolist() == encoded.tokens.tolist()
        assert mine.offsets.tolist() == encoded.offsets.tolist()
        chosen = mine.chosen()
        assert (chosen.pairs, len(chosen)) == (False, 5)
        assert (chosen.tokens.tolist(), chosen.trainable.tolist()) == (plain.tokens.tolist(), plain.trainable.tolist())


def test_rows_with_one_answer_are_refused() -> None:
    with pytest.raises(UserError, match=r"data: expected rows with a chosen and a rejected answer .*1 of 2 rows"):
        encoded_pairs([PAIRS[0], Example("p", response="a")])


@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_a_batch_holds_chosen_answers_then_rejected_ones(batching: Any) -> None:
    encoded = encoded_pairs()
    [batch] = training_batches(
        encoded, [0, 1, 2, 3], batch_size=4, batching=batching, pad_id=2, seed=0, steps=1, epochs=None
    )
    order = batch.index[:3]
    assert sorted(order) == [0, 1, 3], "the row with an empty answer is in no batch"
    assert batch.index.tolist() == [*order, *(order + 5)]
    assert (batch.pairs, batch.units, batch.rows) == (True, 3, 6)
    masks = [encoded.rows(int(sequence))[1] for sequence in batch.index]
    assert batch.labels.tolist() == [int(mask.sum()) for mask in masks]
    wanted = [int(t) for s, mask in zip(batch.index, masks, strict=True) for t in encoded.rows(int(s))[0][mask]]
    assert batch.targets.tolist() == wanted


# --- the loss --------------------------------------------------------------------------------------


def tuned(family: str = "llama", lora: LoraConfig = LORA) -> Adapter:
    adapter = attach(tiny_model(family), lora, seed=0)
    fill(adapter.parameters)
    return adapter


def other_factors(adapter: Adapter) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(9)
    return {name: 0.2 * torch.randn(value.shape, generator=draw) for name, value in adapter.parameters.items()}


def one_batch(rows: tuple[int, ...] = (0, 1, 3, 4), batching: Any = "padded") -> Batch:
    return collate(encoded_pairs(), rows, batching=batching, pad_id=2)


def textbook_log_probs(model: Any, rows: tuple[int, ...]) -> torch.Tensor:
    """[2, P]: one sequence at a time, logits at every position, a loop over answer tokens."""
    encoded, sums = encoded_pairs(), []
    with torch.no_grad():
        for sequence in encoded.sequences(rows):
            tokens, mask = encoded.rows(int(sequence))
            logs = model(input_ids=torch.tensor(tokens.astype(np.int64))[None]).logits[0].double().log_softmax(-1)
            sums.append(sum(float(logs[place - 1, tokens[place]]) for place in np.flatnonzero(mask)))
    return torch.tensor(sums, dtype=torch.float64).view(2, -1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("start", [False, True], ids=["base", "start"])
@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_loss_and_metrics_are_the_textbook_s(family: str, start: bool, batching: Any) -> None:
    adapter, rows = tuned(family), (0, 1, 3, 4)
    reference = other_factors(adapter) if start else no_adapter(adapter)
    dpo = Dpo(beta=0.3, label_smoothing=0.1)
    policy = textbook_log_probs(adapter.model, rows)
    own = adapter.tensors()
    if start:
        adapter.load(reference)
        before = textbook_log_probs(adapter.model, rows)
        adapter.load(own)
    else:
        with adapter.disabled():
            before = textbook_log_probs(adapter.model, rows)
    rewards = 0.3 * (policy - before)
    margins = rewards[0] - rewards[1]
    losses = -0.9 * torch.log(torch.sigmoid(margins)) - 0.1 * torch.log(torch.sigmoid(-margins))
    loss = PreferenceLoss(dpo, adapter, reference)
    found = loss(adapter.model, one_batch(rows, batching))
    torch.testing.assert_close(found.detach().double(), losses.sum(), rtol=1e-4, atol=1e-4)
    told = {name: mean.value for name, mean in loss.metrics().items()}
    wanted = [(margins > 0).double(), (policy[0] > policy[1]).double(), margins, policy[0], policy[1]]
    for name, values in zip(PREFERENCE_METRICS, wanted, strict=True):
        assert told[name] == pytest.approx(float(values.mean()), rel=1e-4, abs=1e-4), name
    assert all(mean.count == len(rows) for mean in loss.metrics().values())
    assert all(torch.equal(value, own[name]) for name, value in adapter.tensors().items()), "the policy is back"


@settings(max_examples=50, deadline=None)
@given(
    numbers=st.lists(st.floats(-40, 0), min_size=8, max_size=8),
    beta=st.floats(0.01, 2),
    smoothing=st.floats(0, 0.49),
)
def test_equation_7_with_smoothing(numbers: list[float], beta: float, smoothing: float) -> None:
    policy, reference = torch.tensor(numbers, dtype=torch.float64).view(2, 4)
    losses, rewards = pair_losses(policy, reference, Dpo(beta=beta, label_smoothing=smoothing))
    for pair in range(2):
        chosen, rejected = (beta * float(policy[at] - reference[at]) for at in (pair, 2 + pair))
        assert (float(rewards[0, pair]), float(rewards[1, pair])) == pytest.approx((chosen, rejected))
        margin = chosen - rejected
        wanted = (1 - smoothing) * np.logaddexp(0, -margin) + smoothing * np.logaddexp(0, margin)
        assert float(losses[pair]) == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_two_equal_answers_cost_log_2_and_teach_nothing() -> None:
    adapter = tuned()
    encoded = encoded_pairs([Example("p", response="same", rejected="same")] * 2)
    loss = PreferenceLoss(Dpo(), adapter, no_adapter(adapter))
    total = loss(adapter.model, collate(encoded, [0, 1], batching="padded", pad_id=2))
    assert float(total.detach()) == pytest.approx(2 * np.log(2), rel=1e-6)
    total.backward()
    assert all(float(value.grad.abs().max()) < 1e-6 for value in adapter.parameters.values())
    told = loss.metrics()
    assert (told["reward_accuracy"].value, told["prefers_chosen"].value, told["reward_margin"].value) == (0, 0, 0)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reference", ["base", "start"])
def test_trl_agrees_on_losses_rewards_and_the_gradient_of_the_factors(
    reference: str, smoothing: float, tmp_path: Path
) -> None:
    """TRL's own loss leaves label smoothing out; of a single pair, its AOT is DPO with it."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    adapter = tuned()
    own, start = adapter.tensors(), other_factors(adapter)
    twin = peft_twin("llama", LORA, start)
    arguments = DPOConfig(
        output_dir=str(tmp_path), beta=0.3, loss_type="aot" if smoothing else "sigmoid", label_smoothing=smoothing,
        use_cpu=True, bf16=False, report_to="none",
        gradient_checkpointing=False, max_length=None,
    )  # fmt: skip
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    trainer = DPOTrainer(
        model=twin, ref_model=tiny_model("llama") if reference == "base" else None, args=arguments,
        train_dataset=Dataset.from_list([row]), processing_class=tiny_tokenizer(),
    )  # fmt: skip
    parameters = dict(twin.named_parameters())
    theirs = {name: parameters[f"base_model.model.{name}.default.weight"] for name in own}
    with torch.no_grad():
        for name, value in own.items():
            theirs[name].copy_(value)

    loss = PreferenceLoss(
        Dpo(beta=0.3, label_smoothing=smoothing), adapter, start if reference == "start" else no_adapter(adapter)
    )
    for rows in [(0,), (1,), (3,), *([] if smoothing else [(0, 1, 3, 4)])]:
        batch = one_batch(rows)
        width = batch.input_ids.shape[1]
        real = torch.arange(width)[None] < torch.tensor(batch.lengths)[:, None]
        answers = torch.zeros_like(batch.input_ids)
        answers.view(-1)[batch.label_index + 1] = 1
        inputs = {"input_ids": batch.input_ids, "attention_mask": real.long(), "completion_mask": answers}
        trainer._metrics["eval"].clear()
        twin.eval()
        twin.zero_grad()
        adapter.model.zero_grad()
        expected = trainer.compute_loss(twin, inputs)
        expected.backward()
        mine = loss.anew()
        found = mine(adapter.model, batch) / batch.units
        found.backward()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        for name, value in adapter.parameters.items():
            torch.testing.assert_close(value.grad, theirs[name].grad, rtol=1e-3, atol=1e-5)
            assert float(value.grad.abs().max()) > 1e-4, "there is something to compare"
        told = {name: mean.value for name, mean in mine.metrics().items()}
        names = ("rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
        wanted = [trainer._metrics["eval"][name][-1] for name in names]
        kept = [told[name] for name in ("reward_accuracy", "reward_margin", "chosen_log_prob", "rejected_log_prob")]
        assert kept == pytest.approx(wanted, rel=1e-4, abs=1e-4)


def test_prompt_tokens_carry_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head is asked for nothing but answers' tokens, and a prompt's targets do not exist."""
    adapter, batch = tuned(), one_batch()
    encoded = encoded_pairs()
    answers = sum(int(encoded.rows(int(sequence))[1].sum()) for sequence in batch.index)
    seen: list[int] = []
    real = head.linear_cross_entropy
    monkeypatch.setattr(
        head, "linear_cross_entropy", lambda states, *rest: seen.append(len(states)) or real(states, *rest)
    )
    PreferenceLoss(Dpo(), adapter, no_adapter(adapter))(adapter.model, batch)
    assert seen == [answers, answers], "reference and policy"


def test_a_row_s_reference_is_computed_once_and_without_dropout() -> None:
    adapter = tuned(lora=replace(LORA, dropout=0.5))
    start = other_factors(adapter)
    loss = PreferenceLoss(Dpo(), adapter, start)
    passes_made = []
    adapter.model.register_forward_pre_hook(lambda *_: passes_made.append(1))
    for layer in adapter.layers.values():
        layer.training = True
    batch = one_batch()
    first = float(loss(adapter.model, batch).detach())
    known = {sequence: float(value) for sequence, value in loss.known.items()}
    again = float(loss(adapter.model, batch).detach())
    assert len(passes_made) == 3
    assert first != again, "the policy has dropout"
    for layer in adapter.layers.values():
        assert layer.training
        layer.training = False
    adapter.load(start)
    plain = sequence_log_probs(adapter.model, batch).detach()
    assert known == pytest.approx(
        {int(index): float(value) for index, value in zip(batch.index, plain, strict=True)}, rel=1e-5
    )


def test_a_step_is_the_mean_over_all_its_pairs() -> None:
    """Two micro-batches of one and three pairs count by pairs, whatever the length of their answers."""
    from flocktune.training import mean_gradient

    adapter = tuned()
    loss = PreferenceLoss(Dpo(), adapter, no_adapter(adapter))
    mean_gradient(adapter.model, adapter.parameters, [one_batch((0,)), one_batch((1, 3, 4))], loss)
    parts = {name: value.grad.clone() for name, value in adapter.parameters.items()}
    adapter.model.zero_grad()
    (loss.anew()(adapter.model, one_batch()) / 4).backward()
    for name, value in adapter.parameters.items():
        torch.testing.assert_close(parts[name], value.grad, rtol=1e-3, atol=1e-6)


# --- halves ----------------------------------------------------------------------------------------

ROWS = {"a": [0, 1, 3], "b": [4, 0]}
LOCAL = LocalConfig(epochs=2, batch_size=2, lr=1e-2, loss=Dpo(beta=0.5))


def federate(clients: tuple[str, ...], reference: bool, rounds: int = 2) -> tuple[dict[str, torch.Tensor], ServerHalf]:
    adapter = tuned()
    start = adapter.tensors()
    preferences = Preferences(Dpo(beta=0.5), adapter, list(adapter.parameters))
    encoded = encoded_pairs()

    def data(client: str) -> ClientData:
        def batches(seed: int, steps: int | None, epochs: int | None) -> Iterator[Batch]:
            return training_batches(
                encoded, ROWS[client], batch_size=2, batching="padded", pad_id=2, seed=seed, steps=steps, epochs=epochs
            )

        loss = preferences.loss()
        return ClientData(len(ROWS[client]), 1, batches, loss=loss, told=loss.metrics)

    server = fedavg.server_half(AggregationConfig())
    server = with_reference(server) if reference else server
    half = with_its_reference(fedavg.client_half(adapter, data, LOCAL, "examples", rounds=rounds), preferences)
    state = run_rounds(
        server, InProcess(half), lambda number: Cohort(clients, len(clients), 1), server.init(start),
        rounds=rounds, kind="fedavg", seed=1,
    )  # fmt: skip
    return dict(server.result(state)), server


@pytest.mark.parametrize("reference", [False, True], ids=["base", "start"])
def test_one_client_is_local_training(reference: bool) -> None:
    """A plain loop over the same batches: AdamW, a clipped mean gradient, the reference from another model."""
    from flocktune.seeds import derive_seed

    federated, _ = federate(("a",), reference)
    adapter, second = tuned(), tuned()
    if not reference:
        second.load({name: value.cpu() for name, value in no_adapter(second).items()})
    for number in range(2):
        optimizer = torch.optim.AdamW(adapter.parameters.values(), lr=1e-2, weight_decay=0.0)
        order = derive_seed(derive_seed(1, number, "a"), "batches")
        batches = training_batches(
            encoded_pairs(), ROWS["a"], batch_size=2, batching="padded", pad_id=2, seed=order, steps=None, epochs=2
        )
        for batch in batches:
            with torch.no_grad():
                before = sequence_log_probs(second.model, batch)
            ratios = sequence_log_probs(adapter.model, batch) - before
            chosen, rejected = ratios.chunk(2)
            (-F.logsigmoid(0.5 * (chosen - rejected)).mean()).backward()
            torch.nn.utils.clip_grad_norm_(adapter.parameters.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    for name, value in adapter.parameters.items():
        torch.testing.assert_close(federated[name], value.detach(), rtol=1e-3, atol=1e-5)


def test_the_reference_goes_down_and_stays_and_never_comes_up() -> None:
    adapter = tuned()
    start = adapter.tensors()
    server = with_reference(fedavg.server_half(AggregationConfig()))
    state = server.init(start)
    moved = server.step(state, Update({name: torch.ones_like(value) for name, value in start.items()}, 1.0))
    message = server.message(moved, 1)
    assert {name: value.tolist() for name, value in group(message, "reference").items()} == {
        name: value.tolist() for name, value in start.items()
    }
    assert set(server.returned(message)) == set(server.result(moved)) == set(start)
    assert server.addressed(message, "a") is message
    name = next(iter(start))
    assert torch.equal(server.result(moved)[name], start[name] + 1)


# --- whole runs ------------------------------------------------------------------------------------

DPO = "local.loss={kind: dpo, beta: 0.5, reference: REFERENCE}"


def preference_rows(count: int, seed: int) -> list[dict[str, str]]:
    draw = np.random.default_rng(seed)
    words = ["red", "blue", "green", "small", "large", "nine", "seven"]
    rows = []
    for number in range(count):
        good, bad = draw.choice(words, 2, replace=False)
        category = ("one", "two")[number % 2]
        rows.append({"prompt": f"Say {number}", "chosen": f"{good} it is", "rejected": f"{bad}", "category": category})
    return rows


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation's world with pairs in place of instructions, and an adapter to start from."""
    folder = make_federated_world(tmp_path_factory.mktemp("pairs"))
    for number, (client, size) in enumerate(SIZES.items()):
        write_rows(folder / "owners" / f"{client}.jsonl", preference_rows(size, number))
    write_rows(folder / "test.jsonl", preference_rows(6, 7))
    execute(new_run(folder, folder / "first", "rounds=1"))  # on the chosen answers
    return folder


def new_run(world: Path, folder: Path, *overrides: str) -> Path:
    texts = [each.replace("FOLDER", str(world)) for each in overrides]
    create_run(load_recipe(world / "recipe.yaml", texts), folder)
    return folder


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


START = ("lora.start_from=FOLDER/first/adapter",)
VARIANTS = {
    "base": (DPO.replace("REFERENCE", "base"),),
    "start, packed, dropout, epochs": (
        DPO.replace("REFERENCE", "start"), *START, "data.batching=packed", "lora.dropout=0.2", "local.steps=null",
        "local.epochs=2",
    ),
    "compressed": (DPO.replace("REFERENCE", "start"), *START, "compression={format: int8}"),
    "FedBiOT, base": (DPO.replace("REFERENCE", "base"), *FEDBIOT),
    "FedBiOT, both ends, epochs": (
        DPO.replace("REFERENCE", "start"), *FEDBIOT, "emulator.placement=first_and_last", "emulator.adapter_layers=1",
        "local.steps=null", "local.epochs=2", "lora.start_from=FOLDER/both/adapter",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_two_sides_compute_what_one_process_does(apart: Path, tmp_path: Path, name: str) -> None:
    if "both ends" in name and not (apart / "both").exists():
        layers = ("emulator.placement=first_and_last", "emulator.adapter_layers=1", "rounds=1")
        execute(new_run(apart, apart / "both", *FEDBIOT, *layers))
    together = execute(new_run(apart, tmp_path / "together", *VARIANTS[name]))
    link = Direct({client: make_owner(apart, client, tmp_path / client).answer for client in SIZES})
    summary = run_apart(new_run(apart, tmp_path / "apart", *VARIANTS[name], "data.train=/nowhere/at/all"), link)
    assert summary["adapter_sha256"] == together["adapter_sha256"]
    assert summary["metrics"] == together["metrics"]
    for folder in (tmp_path / "apart", tmp_path / "together"):
        rounds = events(folder, "round")
        assert len(rounds) == 2
        assert all(event["failures"] == [] for event in rounds)
        assert all(set(PREFERENCE_METRICS) <= set(event) for event in rounds)
    if "start" in VARIANTS[name][0]:
        assert any("reference/" in parcel.blob[:20000].decode("latin-1") for _, parcel in link.sent)


def test_a_stopped_run_goes_on_to_the_same_bits_with_the_reference_it_began_with(apart: Path, tmp_path: Path) -> None:
    overrides = (DPO.replace("REFERENCE", "start"), *START, "rounds=3")
    whole = execute(new_run(apart, tmp_path / "whole", *overrides))
    stop = threading.Event()

    class Watcher:
        def on_event(self, event: Any) -> None:
            if event["event"] == "round":
                stop.set()

        def on_client(self, done: int, total: int, client: str) -> None: ...

    folder = new_run(apart, tmp_path / "cut", *overrides)
    with pytest.raises(Stopped):
        execute(folder, [Watcher()], stop)
    resident.forget_models()
    assert execute(folder)["adapter_sha256"] == whole["adapter_sha256"]


def test_a_run_learns_the_order_and_says_so(apart: Path, tmp_path: Path) -> None:
    """Where a rule decides which answer is better, reward accuracy on new pairs rises from nothing."""
    dpo = (DPO.replace("REFERENCE", "base"), "rounds=4", "local.steps=6", "local.lr=2e-2")
    base = execute(new_run(apart, tmp_path / "before", *dpo, "method=base"))["metrics"]["held_out"]["overall"]
    assert (base["reward_accuracy"], base["reward_margin"]) == (0.0, 0.0)
    assert base["loss"] == pytest.approx(np.log(2), rel=1e-6)
    summary = execute(new_run(apart, tmp_path / "after", *dpo))
    after = summary["metrics"]["held_out"]["overall"]
    assert after["rows"] == 6
    assert after["reward_accuracy"] > 0.8, "chosen answers are longer, and end alike"
    assert after["loss"] < 0.5 * base["loss"]
    assert "perplexity" not in after
    assert not (tmp_path / "after" / "answers.jsonl").exists()
    assert set(summary["metrics"]["held_out"]["categories"]) == {"one", "two"}
    losses = [event["train_loss"] for event in events(tmp_path / "after", "round")]
    assert losses[-1] < losses[0] < 1.0
    assert summary["client_cost"]["flops_per_step"] > 0


def test_each_client_s_own_pairs_are_evaluated_by_the_same_loss(apart: Path, tmp_path: Path) -> None:
    own = (DPO.replace("REFERENCE", "start"), *START, "evaluation.client_rows=3")
    more = ("personal={kind: ditto}", "local.correction={kind: scaffold}", "rounds=1")
    metrics = execute(new_run(apart, tmp_path / "own", *own, *more))["metrics"]
    base = execute(new_run(apart, tmp_path / "base", *own, "method=base"))["metrics"]
    assert base["clients"]["overall"]["loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert (
        metrics["clients_own"]["overall"]["loss"] != metrics["clients"]["overall"]["loss"] != pytest.approx(np.log(2))
    )


def test_the_estimate_counts_the_reference_that_goes_down(apart: Path, tmp_path: Path) -> None:
    settings = (DPO.replace("REFERENCE", "start"), *START, "rounds=1")
    folder = new_run(apart, tmp_path / "run", *settings)
    costs, summary = estimate(load_recipe(folder / "recipe.yaml")), execute(folder)
    headers = 3 * 2 * 4096
    assert costs.round_bytes_down == 2 * costs.round_bytes_up
    assert costs.round_bytes_down < summary["bytes_down"] < costs.round_bytes_down + headers


def test_private_clients_tune_on_preferences(apart: Path, tmp_path: Path) -> None:
    private = (
        "privacy={kind: user, clip_norm: 0.5, delta: 1.0e-3, noise_multiplier: 0.5}", "aggregation.weights=equal",
        "scheduling.selection={kind: poisson, fraction: 0.9}",
    )  # fmt: skip
    folder = new_run(apart, tmp_path / "run", DPO.replace("REFERENCE", "start"), *START, *private)
    summary = execute(folder)
    assert all(event["failures"] == [] for event in events(folder, "round"))
    assert summary["metrics"]["held_out"]["overall"]["loss"] > 0
    with pytest.raises(UserError, match="clipped one sequence at a time"):
        load_recipe(apart / "recipe.yaml", [DPO.replace("REFERENCE", "base"), "local.clip_norm=0",
                                            private[0].replace("user", "sample")])  # fmt: skip


def test_a_row_s_first_step_costs_a_second_forward_pass() -> None:
    adapter, batch = tuned(), one_batch()
    loss = PreferenceLoss(Dpo(), adapter, no_adapter(adapter))
    first, later = (measure_step(adapter.model, batch, loss) for _ in range(2))
    assert first.layer_forward_flops == 2 * later.layer_forward_flops > 0
    assert first.other_forward_flops > later.other_forward_flops
    assert first.backward_flops == later.backward_flops


def test_evaluation_is_exact_over_batches_and_the_model_is_as_before(apart: Path) -> None:
    fed = federation(load_recipe(apart / "recipe.yaml", [DPO.replace("REFERENCE", "base"),
                                                         f"data.train={apart}/owners"]))  # fmt: skip
    adapter, test = fed.base.adapter, fed.data.test
    fill(adapter.parameters)
    own = adapter.tensors()
    loss = PreferenceLoss(Dpo(beta=0.5), adapter, no_adapter(adapter))
    [batch] = [collate(test.encoded, range(6), batching="padded", pad_id=2)]
    expected = measure_preferences(loss.anew(), adapter.model, [batch])
    for size in (1, 4):
        found = evaluate(
            adapter.model, fed.base.tokenizer, test.examples, test.encoded, pad_id=2, template="short", max_tokens=96,
            settings=replace(fed.config.evaluation, batch_size=size, generate=True), preferences=loss,
        )  # fmt: skip
        for name, mean in found.overall.items():
            assert mean.count == 6
            assert mean.value == pytest.approx(expected[name].value, rel=1e-4, abs=1e-5), name
        assert not found.answers
    assert all(torch.equal(value, own[name]) for name, value in adapter.tensors().items())


def test_a_finished_run_is_evaluated_on_chosen_answers_and_a_split_is_read_back(apart: Path, tmp_path: Path) -> None:
    folder = new_run(apart, tmp_path / "run", DPO.replace("REFERENCE", "base"), "rounds=1", "evaluation.generate=true")
    execute(folder)
    overall = evaluate_on(open_result(folder), max_rows=2).as_dict()["overall"]
    assert overall["perplexity"] > 1
    assert overall["rows"] == 2
    rows = write_rows(tmp_path / "all.jsonl", preference_rows(20, 3))
    config = build_config(
        {"data": {"train": str(rows), "test_rows_per_category": 0}, "allocation": {"kind": "iid", "clients": 2}}
    )
    write_split(config, tmp_path / "split")
    again = read_examples(str(tmp_path / "split" / "clients"), Columns())
    assert {(row.instruction, row.response, row.rejected) for row in again} == {
        (row["prompt"], row["chosen"], row["rejected"]) for row in preference_rows(20, 3)
    }


def test_what_does_not_go_with_preference_tuning_is_refused(tmp_path: Path) -> None:
    def said(**changes: Any) -> str:
        with pytest.raises(UserError) as caught:
            build_config({"local": {"steps": 1, "loss": {"kind": "dpo"}}, **changes})
        return str(caught.value)

    assert "data.train_on: expected responses" in said(data={"train_on": "everything"})
    assert "data.columns.response: expected null" in said(data={"columns": {"response": "answer"}})
    start: dict[str, Any] = {"local": {"steps": 1, "loss": {"kind": "dpo", "reference": "start"}}}
    assert "local.loss.reference: expected base without lora.start_from" in said(**start)
    assert "label_smoothing" in said(local={"steps": 1, "loss": {"kind": "dpo", "label_smoothing": 0.5}})
    start["lora"] = {"start_from": "somewhere"}
    assert "comes without the adapter that the run started from" in said(**start, personal={"kind": "fine_tune"})
    config = build_config({"local": {"steps": 1, "loss": {"kind": "dpo"}}, "data": {"train": "embedded"}})
    with pytest.raises(UserError, match="rows with a chosen and a rejected answer"):
        allocate_clients(config)


def test_a_task_s_own_reference_is_used_and_hidden_from_the_half() -> None:
    adapter = tuned()
    start = other_factors(adapter)
    preferences = Preferences(Dpo(), adapter, list(adapter.parameters))
    seen: list[Any] = []

    def half(task: ClientTask, memory: Any) -> Any:
        seen.append((dict(task.tensors), preferences.loss().reference))
        return Update({}, 1.0), memory

    tensors = {**adapter.tensors(), **{f"reference/{name}": value for name, value in start.items()}}
    with_its_reference(half, preferences)(ClientTask(0, "a", "fedavg", tensors, 0, ""), {})
    [(received, reference)] = seen
    assert set(received) == set(adapter.parameters)
    assert all(torch.equal(reference[name], value) for name, value in start.items())
