"""Clients trained at once are what they are one after another: each case here is trained in both ways."""

from __future__ import annotations

import contextlib
import gc
import itertools
import re
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flocktune import gathering
from flocktune.algorithms import fedavg, fedbiot
from flocktune.algorithms.local import ClientData, TimedBatches, training_only
from flocktune.algorithms.prefix import PrefixCache
from flocktune.config.engines import InProcessEngine
from flocktune.config.schema import EmulatorConfig, LocalConfig, LoraConfig
from flocktune.data.batching import Batch, training_batches
from flocktune.data.encoding import Encoded
from flocktune.engine.in_process import InProcess
from flocktune.errors import UserError
from flocktune.gathering import Together
from flocktune.models.layers import drop_layers, layer_stack, lora_within
from flocktune.models.lora import Adapter, attach
from flocktune.models.recompute import checkpoint_layers
from flocktune.models.row_attention import attend_by_rows
from flocktune.models.split import plan_split
from flocktune.models.stack import mixes_clients
from flocktune.stacked import NARROWEST, Job, Trained, _passes, fit_stacked
from flocktune.stacking import MOST, kept_bytes, together
from flocktune.training import NotFinite, fit, next_token_loss, product_penalty, proximal_penalty
from flocktune.types import ClientTask, Failure, Tensors, Update
from tiny_models import fill, tiny_model

LORA = LoraConfig(rank=3, alpha=6.0)
LOCAL = LocalConfig(epochs=2, batch_size=2, lr=1e-3, clip_norm=1.0)
MANY = 10**6
ROWS = {"a": (0, 1, 2), "b": (3, 4, 5, 6, 7), "c": (8, 9)}
"""Of lengths that differ: clients have 4, 6 and 2 steps in 2 epochs."""


def encoded(alike: bool = False) -> Encoded:
    """Ten rows of 5 to 14 random tokens, or of 9; their later part is trained on."""
    draw = np.random.default_rng(0)
    rows = [draw.integers(3, 259, size=9 if alike else 5 + number) for number in range(10)]
    masks = [np.arange(len(row)) >= 2 + number % 3 for number, row in enumerate(rows)]
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return Encoded(np.concatenate(rows).astype(np.int32), np.concatenate(masks), offsets)


def batches_of(client: str, local: LocalConfig, batching: str = "padded", alike: bool = False) -> list[Batch]:
    return list(
        training_batches(
            encoded(alike), ROWS[client], batch_size=local.batch_size, batching=batching, pad_id=2, seed=ord(client),
            steps=None if local.steps is None else local.steps * local.accumulate, epochs=local.epochs,
        )  # type: ignore[arg-type]
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is trained, and how. ``batching`` is the recipe's, ``packed`` how rows go through the model at once."""

    local: Mapping[str, Any] = field(default_factory=dict)
    family: str = "llama"
    lora: LoraConfig = LORA
    batching: str = "padded"
    packed: bool = False
    at_once: int = MANY
    alike: bool = False
    checkpointed: bool = False
    trained: Callable[[str], bool] = lambda name: True
    penalty: Callable[[Tensors], Any] | None = None
    adjust: Callable[[], Any] | None = None


class Shift:
    """What SCAFFOLD does to gradients, in place; it remembers their sum as they were."""

    def __init__(self) -> None:
        self.total = 0.0

    @torch.no_grad()
    def __call__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for number, parameter in enumerate(parameters.values()):
            assert parameter.grad is not None
            self.total += float(parameter.grad.sum())
            parameter.grad.add_(0.01 * (number + 1))


def beside(tensors: Tensors) -> Tensors:
    """Something to be held back to."""
    return {name: value - 0.1 for name, value in tensors.items()}


CASES = {
    "padded": Case(),
    "as many tokens each": Case(alike=True, local={"epochs": None, "steps": 2}),
    "packed rows": Case(batching="packed", packed=True),
    "padded rows, packed for a pass": Case(packed=True),
    "packed rows, padded for a pass": Case(batching="packed"),
    "accumulated": Case(local={"accumulate": 2}),
    "several passes": Case(at_once=30),
    "several passes, packed, accumulated": Case(at_once=20, packed=True, local={"accumulate": 2}),
    "clipped": Case(local={"clip_norm": 0.05}),
    "not clipped": Case(local={"clip_norm": 0.0}),
    "linear schedule with warm-up": Case(local={"schedule": "linear", "warmup_steps": 2}),
    "momentum and decay": Case(local={"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}),
    "adam with decay": Case(local={"weight_decay": 0.1}),
    "rsLoRA": Case(lora=replace(LORA, rslora=True)),
    "attention alone": Case(lora=replace(LORA, targets="attention")),
    "one of the modules that read alike": Case(lora=replace(LORA, targets=("k_proj", "down_proj"))),
    "biases": Case(family="qwen2"),
    "Conv1D": Case(family="gpt2"),
    "tied embeddings": Case(family="gemma"),
    "recomputed": Case(checkpointed=True),
    "dropout": Case(lora=replace(LORA, dropout=0.3)),
    "dropout, packed": Case(lora=replace(LORA, dropout=0.3), batching="packed", packed=True),
    "dropout, padded rows packed for a pass": Case(lora=replace(LORA, dropout=0.3), packed=True),
    "dropout, several passes, accumulated": Case(
        lora=replace(LORA, dropout=0.3), at_once=25, local={"accumulate": 2}
    ),
    "B alone": Case(trained=lambda name: name.endswith("lora_B")),
    "A alone": Case(trained=lambda name: name.endswith("lora_A")),
    "the upper layer alone": Case(trained=lambda name: "layers.1." in name),
    "proximal": Case(penalty=lambda start: proximal_penalty(beside(start), 0.5)),
    "proximal on products": Case(penalty=lambda start: product_penalty(beside(start), 0.5, 2.0)),
    "adjusted": Case(adjust=Shift),
    "B alone, adjusted, proximal": Case(
        trained=lambda name: name.endswith("lora_B"),
        adjust=Shift,
        penalty=lambda start: proximal_penalty(beside(start), 0.5),
    ),
}  # fmt: skip


def adapter_of(case: Case, dtype: torch.dtype = torch.float64) -> Adapter:
    """A tiny model with an adapter, both in ``dtype``; a base in bfloat16 has factors in float32."""
    model = tiny_model(case.family).to(dtype)
    adapter = attach(model, case.lora, seed=0)
    if dtype == torch.float64:
        model.double()
    if case.checkpointed:
        checkpoint_layers(model)
    return adapter


def jobs_of(case: Case, adapter: Adapter, clients: Sequence[str] = tuple(ROWS)) -> list[Job]:
    """One for each client: factors, rows, schedule and dropout of its own."""
    settings = replace(LOCAL, **case.local)
    common = fill(adapter.parameters)
    trained = tuple(filter(case.trained, adapter.parameters))
    jobs = []
    for number, client in enumerate(clients):
        own = {n: v + 0.01 * (number + 1) * torch.sin(v * 50 * (number + 1)) for n, v in common.items() if n in trained}
        adapter.put({**common, **own})
        start = adapter.snapshot()
        batches = batches_of(client, settings, case.batching, case.alike)
        jobs.append(
            Job(
                adapter, trained, start, batches, settings, len(batches) + 3, number, 7 + number,
                case.penalty({name: start.factors[name] for name in trained}) if case.penalty else None,
                case.adjust() if case.adjust else None,
            )
        )  # fmt: skip
    return jobs


def alone(job: Job) -> Trained:
    """The same by ``fit``."""
    adapter = job.adapter
    adapter.restore(job.start)
    with training_only(adapter, job.trained) as parameters:
        metrics = fit(
            adapter.model, parameters, job.batches, job.settings,
            total_steps=job.total_steps, first_step=job.first_step, seed=job.seed,
            penalty=job.penalty, adjust=job.adjust,
        )  # fmt: skip
    return Trained(adapter.tensors(job.trained), metrics)


def assert_alike(mine: Trained | Exception, theirs: Trained, within: float) -> None:
    """Every factor within this part of its largest value; what is told of them, too."""
    assert isinstance(mine, Trained), mine
    assert mine.tensors.keys() == theirs.tensors.keys()
    for name, value in theirs.tensors.items():
        assert mine.tensors[name].dtype == value.dtype
        assert mine.tensors[name].is_contiguous()
        difference = float((mine.tensors[name] - value).abs().max() / value.abs().max())
        assert difference <= within, f"{name}: {difference}"
    assert mine.metrics.keys() == theirs.metrics.keys()
    for name, mean in theirs.metrics.items():
        assert mine.metrics[name].count == mean.count
        assert mine.metrics[name].total == pytest.approx(mean.total, rel=1e-5), name


def moved(job: Job, trained: Trained) -> float:
    """The largest change of a factor."""
    return max(float((value - job.start.factors[name]).abs().max()) for name, value in trained.tensors.items())


# --- equal -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_exact_in_float64(name: str) -> None:
    """No rounding but float64's: whatever is done differently shows."""
    case = CASES[name]
    adapter = adapter_of(case)
    if case.packed:
        assert attend_by_rows(adapter.model)
    expected = [alone(job) for job in jobs_of(case, adapter)]
    jobs = jobs_of(case, adapter)
    adapter.put({name: torch.full_like(value, 9.0) for name, value in adapter.parameters.items()})  # of another client
    found = fit_stacked(jobs, packed=case.packed, tokens_at_once=case.at_once)
    for job, mine, theirs in zip(jobs, found, expected, strict=True):
        assert_alike(mine, theirs, within=1e-12)
        assert moved(job, theirs) > 1e-4


def test_with_a_float32_softmax_to_its_rounding() -> None:
    """Capped attention is transformers' own, whose softmax is float32 whatever the model is."""
    case = Case(family="gemma2")
    adapter = adapter_of(case)
    expected = [alone(job) for job in jobs_of(case, adapter)]
    for mine, theirs in zip(
        fit_stacked(jobs_of(case, adapter), packed=False, tokens_at_once=MANY), expected, strict=True
    ):
        assert_alike(mine, theirs, within=1e-4)  # Adam makes much of a gradient's last digits where it is near zero


STEADY = Case(local={"optimizer": "sgd", "lr": 0.05})
"""A step in proportion to the gradient: rounding stays rounding."""


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_to_rounding_in_what_models_are_trained_in(dtype: torch.dtype, within: float, packed: bool) -> None:
    case = replace(STEADY, packed=packed)
    adapter = adapter_of(case, dtype)
    assert attend_by_rows(adapter.model)
    assert next(iter(adapter.parameters.values())).dtype == torch.float32
    jobs = jobs_of(case, adapter)
    expected = [alone(job) for job in jobs]
    for job, mine, theirs in zip(jobs, fit_stacked(jobs, packed=packed, tokens_at_once=MANY), expected, strict=True):
        assert isinstance(mine, Trained)
        away = max(float((mine.tensors[name] - value).abs().max()) for name, value in theirs.tensors.items())
        assert away <= within * moved(job, theirs)
        assert mine.metrics["loss"].value == pytest.approx(theirs.metrics["loss"].value, rel=within)


def test_nothing_else_is_changed() -> None:
    adapter = adapter_of(Case())
    jobs = jobs_of(Case(), adapter)
    weights = {name: value.clone() for name, value in adapter.model.named_parameters() if "lora" not in name}
    state = torch.get_rng_state()
    fit_stacked(jobs, packed=False, tokens_at_once=MANY)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, dict(adapter.model.named_parameters())[name]) for name, value in weights.items())
    assert not any(module.training for module in adapter.model.modules())
    assert all(layer.beside.stack is None for layer in adapter.layers.values())
    assert not adapter.snapshot().differs(jobs[0].start, ()), "as the first client was given it"


def test_what_goes_together() -> None:
    adapter = adapter_of(Case())
    first, second, _ = jobs_of(Case(), adapter)
    assert first.goes_with(second)
    assert not first.goes_with(replace(second, settings=replace(LOCAL, lr=0.1)))
    assert not first.goes_with(replace(second, trained=second.trained[2:]))
    assert not first.goes_with(replace(second, prefix=object()))  # type: ignore[arg-type]
    lower = tuple(name for name in second.trained if "layers.1." in name)
    first, second = replace(first, trained=lower), replace(second, trained=lower)
    assert not first.goes_with(second), "their lower layers differ"
    assert first.goes_with(replace(second, start=first.start))
    side = {name: (torch.ones(1, 32), torch.ones(32, 1)) for name in list(adapter.layers)[:1]}
    assert not first.goes_with(replace(second, start=replace(first.start, sides=side)))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("most", [1, 20, 30, 60, MANY])
def test_a_pass_holds_no_more_than_it_may_and_little_padding(most: int, packed: bool) -> None:
    """But for a batch that alone has more."""
    parts = [(object(), batch) for client in ROWS for batch in batches_of(client, LOCAL)]
    passes = list(_passes(parts, packed, most))  # type: ignore[arg-type]
    assert sorted(id(part[0]) for some in passes for part in some) == sorted(id(client) for client, _ in parts)
    for some in passes:
        batches = [batch for _, batch in some]
        widths = [int(batch.lengths.max()) for batch in batches]
        padded = max(widths) * sum(batch.rows for batch in batches)
        assert len(some) == 1 or (sum(batch.tokens for batch in batches) if packed else padded) <= most
        assert packed or min(widths) >= NARROWEST * max(widths)
    assert (len(passes) == 1) == (packed and most == MANY)
    assert (len(passes) == len(parts)) == (most == 1)


# --- failures --------------------------------------------------------------------------------------


def broken(batches: Sequence[Batch], error: Exception) -> Any:
    yield batches[0]
    raise error


BREAKS: dict[str, tuple[Callable[[Job], Job], type[Exception], str]] = {
    "no rows": (lambda job: replace(job, batches=[]), UserError, "at least one batch to train on"),
    "rows that can not be read": (
        lambda job: replace(job, batches=broken(list(job.batches), OSError("the disk is gone"))),
        OSError,
        "the disk is gone",
    ),
    "a loss that is not a number": (
        lambda job: replace(job, start=replace(job.start, factors={
            name: value * float("nan") if "q_proj" in name else value for name, value in job.start.factors.items()
        })),
        NotFinite, "the loss became nan at step 1 (step 1 of 6 here)",
    ),
    "a penalty that does not fit": (
        lambda job: replace(job, penalty=proximal_penalty({}, 0.5)), KeyError, "lora_A",
    ),
}  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", BREAKS)
def test_one_that_fails_fails_alone(name: str, packed: bool) -> None:
    """For the reason that it has alone, and the others train on as if they were without it."""
    spoil, kind, reason = BREAKS[name]
    adapter = adapter_of(Case())
    assert attend_by_rows(adapter.model)
    first, bad, last = jobs_of(Case(), adapter)
    with pytest.raises(kind, match=re.escape(reason)) as theirs:
        alone(spoil(bad))
    expected = [alone(first), alone(last)]
    found = fit_stacked([first, spoil(bad), last], packed=packed, tokens_at_once=MANY)
    assert isinstance(found[1], Exception)
    assert (type(found[1]), str(found[1])) == (type(theirs.value), str(theirs.value))
    for mine, other in zip((found[0], found[2]), expected, strict=True):
        assert_alike(mine, other, within=1e-12)


class Breaks(nn.Module):
    """Too little memory, in the middle of modules that read alike."""

    def forward(self, x: Tensor) -> Tensor:
        raise MemoryError


@pytest.mark.parametrize("gathering", [None, Together(2, MANY, False)])
def test_a_forward_pass_that_broke_off_is_forgotten(gathering: Together | None) -> None:
    """Outputs that nobody came for hold its graph, and take the room of the client who comes next."""
    adapter = adapter_of(Case())
    adapter.model.model.layers[1].mlp.act_fn = Breaks()
    found = answers(client_half(adapter), fill(adapter.parameters), "ab", gathering)
    assert all(isinstance(reply, Failure) for reply in found)
    assert not any(layer.beside._outputs for layer in adapter.layers.values())


def test_what_a_client_held_is_let_go_of_when_it_has_failed() -> None:
    """A fault comes with its traceback, and that with all that the client's functions held, such as a cache."""
    held: list[weakref.ref[Tensor]] = []
    adapter = adapter_of(Case())
    [job] = jobs_of(Case(), adapter, "a")

    def fails() -> None:
        kept = torch.zeros(3)
        held.append(weakref.ref(kept))
        turn = gathering.gathered()
        assert turn is not None
        with contextlib.suppress(OSError):
            turn.train(replace(job, batches=broken(list(job.batches), OSError("the disk is gone"))))

    gc.disable()
    try:
        GATHERED.run([fails, fails])
        assert [ref() for ref in held] == [None, None]
    finally:
        gc.enable()


# --- FedBiOT ---------------------------------------------------------------------------------------


def emulator(dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> tuple[Adapter, Any]:
    """An emulator of four layers, of which the last two are trained."""
    settings = EmulatorConfig(adapter_layers=2, drop=0.34)
    small = tiny_model("llama", num_hidden_layers=5)
    plan = plan_split(5, settings, stack=layer_stack(small))
    drop_layers(small, plan)
    lora = lora_within(small, replace(LORA, dropout=dropout), plan.stack, range(len(plan.held)))
    adapter = attach(small.to(dtype), lora, seed=1)
    small.to(dtype)
    fill(adapter.parameters)
    return adapter, plan


def data_of(local: LocalConfig, batching: str = "padded") -> Callable[[str], ClientData]:
    def data(client: str) -> ClientData:
        if client not in ROWS:
            raise OSError(f"the rows of {client} are not to be found")
        return ClientData(len(ROWS[client]), 9, lambda seed, steps, epochs: batches_of(client, local, batching))

    return data


def answers(half: Any, message: Tensors, clients: Sequence[str], gathering: Together | None) -> list[Update | Failure]:
    engine = InProcess(half, together=gathering)
    tasks = (ClientTask(0, client, "a kind", message, 5 + ord(client), "", "digest") for client in clients)
    return list(engine.run(tasks, len(clients)))


def assert_same_answers(mine: Sequence[Update | Failure], theirs: Sequence[Update | Failure], within: float) -> None:
    """Changes, weights, what is told, and failures with their reasons; but for the time it took."""
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs, strict=True):
        if isinstance(other, Failure):
            assert one == other
            continue
        assert isinstance(one, Update), one
        assert (one.weight, one.clients) == (other.weight, other.clients)
        assert one.delta.keys() == other.delta.keys()
        for name, value in other.delta.items():
            assert float((one.delta[name] - value).abs().max()) <= within * float(value.abs().max()), name
        assert one.metrics.keys() == other.metrics.keys()
        for name in other.metrics.keys() - {"seconds", "data_seconds"}:
            assert one.metrics[name].count == other.metrics[name].count
            assert one.metrics[name].total == pytest.approx(other.metrics[name].total, rel=1e-5), name


@pytest.mark.parametrize("batching", ["padded", "packed"])
@pytest.mark.parametrize("cache", ["memory", "host", "disk", "none"])
def test_fedbiots_clients_each_with_a_cache(cache: str, batching: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    compute = PrefixCache.compute
    monkeypatch.setattr(
        PrefixCache, "compute", lambda self, rows, **how: seen.append(len(rows)) or compute(self, rows, **how)
    )
    adapter, plan = emulator(dropout=0.2)
    assert attend_by_rows(adapter.model)
    settings = EmulatorConfig(cache=cache, cache_mb=1)  # type: ignore[arg-type]
    message = fedbiot.joined(fedbiot.split_tensors(plan, adapter.tensors()))
    reference = beside(adapter.tensors())
    half = fedbiot.client_half(
        adapter, plan, "digest", data_of(LOCAL, batching), LOCAL, settings, "examples",
        rounds=1, penalty=product_penalty(reference, 0.1, 2.0), adjust=None,
    )  # fmt: skip
    theirs = answers(half, message, "abc", None)
    rows_alone = sum(seen)
    seen.clear()
    mine = answers(half, message, "abc", Together(3, 40, batching == "packed"))
    assert_same_answers(mine, theirs, within=1e-9)  # of a change, not of a factor
    assert sum(seen) == rows_alone == (20 if cache == "none" else 10), "each row once, where it is kept"


def test_clients_at_once_share_the_room_of_a_cache() -> None:
    adapter, plan = emulator()
    made = []

    def make() -> None:
        made.append(PrefixCache(adapter.model, plan.stack, plan.frozen, EmulatorConfig(cache_mb=6)).left)

    make()
    Together(3, MANY, False).run([make] * 3)
    assert made == [6 * 2**20, *[2 * 2**20] * 3]


# --- halves in a gathering -------------------------------------------------------------------------


def client_half(adapter: Adapter, local: LocalConfig = LOCAL, **changes: Any) -> Any:
    return fedavg.client_half(adapter, data_of(local), local, "examples", rounds=1, **changes)


def test_a_clients_half_that_fails_before_its_training_fails_alone() -> None:
    adapter = adapter_of(Case())
    message = fill(adapter.parameters)
    clients = ("a", "z", "b", "c")
    theirs = answers(client_half(adapter), message, clients, None)
    mine = answers(client_half(adapter), message, clients, Together(4, MANY, False))
    assert [type(reply) for reply in theirs] == [Update, Failure, Update, Update]
    assert "the rows of z are not to be found" in theirs[1].reason  # type: ignore[union-attr]
    assert_same_answers(mine, theirs, within=1e-9)


def test_those_trained_together_that_can_not_all_fail_for_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """As every one would alone: the round has its failures, and the run goes on."""

    def too_large(*_: Any, **__: Any) -> Any:
        raise MemoryError("as large as that")

    monkeypatch.setattr(gathering, "fit_stacked", too_large)
    adapter = adapter_of(Case())
    found = answers(client_half(adapter), fill(adapter.parameters), "abc", Together(3, MANY, False))
    assert found == [Failure(client, "MemoryError: as large as that") for client in "abc"]


def test_clients_of_two_methods_each_find_their_own_group() -> None:
    """Jobs that do not go together are trained one group after another."""
    adapter = adapter_of(Case())
    message = fill(adapter.parameters)
    plain, decayed = client_half(adapter), client_half(adapter, replace(LOCAL, weight_decay=0.5))

    def half(task: ClientTask, memory: Any) -> Any:
        return (plain if task.client in "ac" else decayed)(task, memory)

    theirs = answers(half, message, "abc", None)
    assert_same_answers(answers(half, message, "abc", Together(3, MANY, False)), theirs, within=1e-9)


def test_what_is_no_sum_of_token_losses_is_trained_alone_inside_a_gathering(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss of a method's own, such as DPO's."""
    stacked: list[int] = []
    fit_all = gathering.fit_stacked
    monkeypatch.setattr(gathering, "fit_stacked", lambda jobs, **how: stacked.append(len(jobs)) or fit_all(jobs, **how))
    adapter = adapter_of(Case())
    message = fill(adapter.parameters)

    def data(client: str) -> ClientData:
        mine = data_of(LOCAL)(client)
        return replace(mine, loss=lambda model, batch: 2 * next_token_loss(model, batch)) if client == "b" else mine

    own = fedavg.client_half(adapter, data, LOCAL, "examples", rounds=1)
    theirs = answers(own, message, "abc", None)
    mine = answers(own, message, "abc", Together(3, MANY, False))
    assert stacked == [2]
    assert_same_answers(mine, theirs, within=1e-9)
    assert torch.equal(mine[1].delta[next(iter(message))], theirs[1].delta[next(iter(message))])  # type: ignore[union-attr]


# --- threads with turns ----------------------------------------------------------------------------

GATHERED = Together(3, MANY, False)


def test_results_come_in_order_whatever_each_one_does() -> None:
    """Two trainings, one, none: and one at a time, in the order in which they were given."""
    adapter = adapter_of(Case())
    said: list[str] = []

    def work(name: str, job: Job, times: int) -> Callable[[], Any]:
        def run() -> Any:
            turn, found = gathering.gathered(), None
            said.append(f"{name} begins")
            for number in range(times):
                assert turn is not None
                found = turn.train(replace(job, batches=list(job.batches)))
                said.append(f"{name} trained {number + 1}")
            return name, found

        return run

    jobs = jobs_of(Case(), adapter)
    works = [work(name, job, times) for name, job, times in zip("abc", jobs, (2, 0, 1), strict=True)]
    found = GATHERED.run(works)
    assert [name for name, _ in found] == ["a", "b", "c"]
    assert [trained is None for _, trained in found] == [False, True, False]
    assert said == ["a begins", "b begins", "c begins", "a trained 1", "c trained 1", "a trained 2"]
    assert gathering.gathered() is None


def test_one_work_that_breaks_ends_all_and_leaves_no_thread() -> None:
    adapter = adapter_of(Case())
    job = jobs_of(Case(), adapter)[0]
    before, left, begun = threading.active_count(), [], []

    def waits() -> None:
        try:
            gathering.gathered().train(job)  # type: ignore[union-attr]
        except gathering.Abandoned:
            left.append("unwound")
            raise

    def breaks() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        GATHERED.run([waits, waits, breaks, lambda: begun.append("later")])
    assert left == ["unwound", "unwound"]
    assert not begun, "whoever had not begun does not begin"
    assert threading.active_count() == before


def test_an_interrupt_while_a_client_trains_alone_ends_it_at_its_next_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal reaches the main thread, and not a client's own."""
    before, begun, ended = threading.active_count(), [], []
    running = threading.Event()

    def trains() -> None:
        begun.append("training")
        for _ in TimedBatches(itertools.repeat(batches_of("a", LOCAL)[0], 10**6)):
            running.set()
        ended.append("training")

    def interrupted(turn: gathering.Turn[None]) -> None:
        turn.mine.release()
        running.wait()
        raise KeyboardInterrupt

    monkeypatch.setattr(gathering.Turn, "go_on", interrupted)
    with pytest.raises(KeyboardInterrupt):
        GATHERED.run([trains, trains])
    assert (begun, ended) == (["training"], [])
    assert threading.active_count() == before


def test_no_half_takes_the_end_of_a_round_for_a_fault_of_its_own() -> None:
    """Halves catch exceptions and go on, as Ditto's does; and ``answer`` makes failures of them."""
    assert not issubclass(gathering.Abandoned, Exception)


@pytest.mark.parametrize(("wanted", "groups"), [(9, [4, 3]), (3, [3, 1, 1, 1, 1]), (2, [2, 1, 1, 1, 1, 1])])
def test_no_more_clients_start_than_may_be_needed(wanted: int, groups: list[int]) -> None:
    """Nor does whoever asks on although there are enough start more than one client at a time."""
    asked: list[str] = []
    together = []

    class Seen(Together):
        def run(self, works: Any) -> Any:
            together.append(len(works))
            return super().run(works)

    def half(task: ClientTask, memory: Any) -> Any:
        asked.append(task.client)
        return Update({}, 1.0), memory

    tasks = (ClientTask(0, str(number), "a kind", {}, 0, "") for number in range(7))
    replies = InProcess(half, together=Seen(4, MANY, False)).run(tasks, wanted)
    for number, reply in enumerate(replies, start=1):
        assert isinstance(reply, Update)
        if number == wanted:
            assert len(asked) == wanted, "over-selection: enough have answered"
    assert together == groups


def test_failures_are_made_up_for_and_by_no_more_than_are_missing() -> None:
    together = []

    class Seen(Together):
        def run(self, works: Any) -> Any:
            together.append(len(works))
            return super().run(works)

    def half(task: ClientTask, memory: Any) -> Any:
        if task.client in "03":
            raise OSError("no")
        return Update({}, 1.0), {**memory, "seen": torch.ones(1)}

    engine = InProcess(half, together=Seen(8, MANY, False))
    tasks = (ClientTask(0, str(number), "a kind", {}, 0, "") for number in range(7))
    got = 0
    for reply in engine.run(tasks, 3):
        got += isinstance(reply, Update)
        if got == 3:
            break
    assert together == [3, 1, 1]
    assert sorted(engine.memories) == ["1", "2", "4"]


def test_clients_seconds_are_their_own_and_their_share_of_what_was_done_together() -> None:
    adapter = adapter_of(Case())
    message = fill(adapter.parameters)
    half = client_half(adapter)

    def slow(task: ClientTask, memory: Any) -> Any:
        time.sleep(0.2 if task.client == "b" else 0.0)
        return half(task, memory)

    started = time.perf_counter()
    replies = answers(slow, message, "abc", GATHERED)
    whole = time.perf_counter() - started
    seconds = [reply.metrics["seconds"].total for reply in replies if isinstance(reply, Update)]
    assert 0.9 * whole < sum(seconds) <= whole, "no second is counted twice, and none is lost"
    assert all(seconds)
    assert seconds[1] > 0.2
    assert seconds[2] < seconds[1]


# --- how many --------------------------------------------------------------------------------------


def test_the_width_follows_from_the_recipe_alone() -> None:
    adapter = adapter_of(Case(), torch.float32)
    names = list(adapter.parameters)
    of = {mb: together(InProcessEngine(stack_mb=mb), adapter, names) for mb in (2, 4)}
    small, large = of.values()
    assert small is not None
    assert large is not None
    values = sum(value.numel() for value in adapter.parameters.values())
    assert small.width == 2 * 2**19 // (4 * 7 * values)
    assert large.width in (2 * small.width, 2 * small.width + 1)
    assert large.tokens_at_once in (2 * small.tokens_at_once, 2 * small.tokens_at_once + 1)
    adapter.put({name: torch.randn_like(value) for name, value in adapter.parameters.items()})
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert together(InProcessEngine(stack_mb=2), adapter, names) == small
    assert torch.equal(torch.get_rng_state(), state)
    assert together(InProcessEngine(stack_mb=4096), adapter, names).width == MOST  # type: ignore[union-attr]
    assert together(InProcessEngine(stack=5), adapter, names).width == 5  # type: ignore[union-attr]
    assert together(InProcessEngine(stack=1), adapter, names) is None
    assert together(InProcessEngine(stack_mb=2), adapter, []) is None, "a base that nobody trains"


def test_one_at_a_time_where_no_more_fit() -> None:
    wide = attach(tiny_model("llama", hidden_size=256, intermediate_size=512), replace(LORA, rank=16), seed=0)
    assert together(InProcessEngine(stack_mb=1), wide, list(wide.parameters)) is None


def test_what_is_kept_for_a_token_is_what_one_more_keeps() -> None:
    """Fewer layers are kept for where the lower ones are not trained."""
    adapter = adapter_of(Case(), torch.float32)
    whole = kept_bytes(adapter, list(adapter.parameters))
    upper = kept_bytes(adapter, [name for name in adapter.parameters if "layers.1." in name])
    assert 0.4 * whole < upper < 0.7 * whole
    assert not any(parameter.grad is not None for parameter in adapter.parameters.values())


def test_layers_that_are_computed_again_with_dropout_are_trained_one_after_another() -> None:
    for dropout, recomputed, expected in ((0.1, True, True), (0.0, True, False), (0.1, False, False)):
        adapter = adapter_of(Case(lora=replace(LORA, dropout=dropout), checkpointed=recomputed), torch.float32)
        assert (together(InProcessEngine(), adapter, list(adapter.parameters)) is None) == expected


class Experts(nn.Module):
    """Tokens go to one of two experts, each a linear module that sees its own tokens alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))
        for number, expert in enumerate(self.experts):
            nn.init.normal_(expert.weight, std=0.1 * (number + 1))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        out = torch.zeros_like(flat)
        chosen = (flat[:, 0] > 0).long()
        for number, expert in enumerate(self.experts):
            mine = (chosen == number).nonzero().squeeze(1)
            out = out.index_add(0, mine, expert(flat[mine]))
        return out.view_as(x)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_mix_clients_where_they_have_an_adapter(family: str) -> None:
    """Attention's adapters see whole rows; an expert's would see some tokens of this client and some of that."""
    model = tiny_model(family)
    attention = attach(model, replace(LORA, targets="attention"), seed=0)
    assert not mixes_clients(attention)
    assert together(InProcessEngine(), attention, list(attention.parameters)) is not None
    attention.detach()
    for layer in model.model.layers:
        layer.mlp = Experts(32)
    experts = attach(model, replace(LORA, targets=("experts.0", "experts.1")), seed=0)
    before = experts.tensors()
    assert mixes_clients(experts)
    assert together(InProcessEngine(), experts, list(experts.parameters)) is None
    assert all(torch.equal(value, before[name]) for name, value in experts.tensors().items())
    assert all(layer.beside.stack is None for layer in experts.layers.values())


class Reordered(nn.Module):
    """All tokens, in an order of its own: as where they are sorted by their expert."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        return self.inner(flat.flip(0)).flip(0).view_as(x)


def test_tokens_in_another_order_mix_clients_without_a_word() -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp = Reordered(32)
    adapter = attach(model, replace(LORA, targets=("inner",)), seed=0)
    assert mixes_clients(adapter)
    model.to(torch.bfloat16)
    assert mixes_clients(adapter)


def test_rounding_of_other_kernels_mixes_no_clients_in_bfloat16() -> None:
    """On a GPU two rows are multiplied by other kernels than one: here, one output in five is one bit off."""
    model = tiny_model("llama").to(torch.bfloat16)
    adapter = attach(model, LORA, seed=0)
    chance = torch.Generator().manual_seed(0)

    def rounds(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        return torch.where(torch.rand(out.shape, generator=chance) < 0.2, out * (1 + 2**-7), out)

    for layer in adapter.layers.values():
        layer.register_forward_hook(rounds)
    assert not mixes_clients(adapter)


def test_clients_are_not_mixed_in_models_without_experts() -> None:
    for family in ("llama", "gpt2", "gemma2"):
        assert not mixes_clients(attach(tiny_model(family), LORA, seed=0))
