"""FedBiOT: both losses against the formulas, who trains what, what travels, and the whole run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import CATEGORIES, Said, World, dolly_rows, write_rows
from flocktune.algorithms import fedbiot
from flocktune.algorithms.alignment import Pair, alignment_loss, divergence, fidelity
from flocktune.algorithms.local import train_locally, training_only
from flocktune.algorithms.prefix import PrefixCache
from flocktune.allocation import client_data
from flocktune.assemble import federation
from flocktune.config.load import load_recipe
from flocktune.config.schema import AlignmentConfig, EmulatorConfig, LocalConfig, LoraConfig, RunConfig
from flocktune.data.batching import collate
from flocktune.data.encoding import Encoded
from flocktune.emulation import bundle_of
from flocktune.engine.ray_worker import pack, unpack
from flocktune.errors import UserError
from flocktune.experiment import plan
from flocktune.models.layers import drop_layers, layer_stack, lora_within
from flocktune.models.lora import attach
from flocktune.models.split import plan_split
from flocktune.tensors import digest, group
from flocktune.training import product_penalty
from flocktune.types import ClientTask, Tensors
from flocktune.wire import build_update, decode_tensors, encode_tensors, task_fields
from tiny_models import fill, tiny_model, tiny_tokenizer

LAYERS = 5
LORA = LoraConfig(rank=2, alpha=6.0, targets=("q_proj", "down_proj"))
Cli = Callable[..., Said]


def deep_model(seed: int = 0, **changes: object) -> torch.nn.Module:
    return tiny_model("llama", seed=seed, num_hidden_layers=LAYERS, **changes)


def make_pair(drop: float = 0.5, placement: str = "last", adapter_layers: int = 2, double: bool = False) -> Pair:
    """A full model and its emulator, every factor of both filled with random values, A the same in both."""
    full, small = deep_model(), deep_model()
    settings = EmulatorConfig(adapter_layers=adapter_layers, drop=drop, placement=placement)  # type: ignore[arg-type]
    plan = plan_split(LAYERS, settings, stack=layer_stack(full))
    drop_layers(small, plan)
    if double:
        full, small = full.double(), small.double()
    whole = attach(full, lora_within(full, LORA, plan.stack, plan.adapter), seed=1)
    emulator = attach(small, lora_within(small, LORA, plan.stack, range(len(plan.held))), seed=1)
    everything = fill(emulator.parameters)
    whole.load(plan.to_full(everything))
    return Pair(whole, emulator, plan)


def rows_of(*lengths: int) -> Encoded:
    """Rows of random tokens, every token but the first a target."""
    random = np.random.default_rng(0)
    trainable = np.concatenate([np.arange(length) > 0 for length in lengths])
    tokens = random.integers(3, 260, sum(lengths)).astype(np.int32)
    return Encoded(tokens, trainable, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


# --- the upper level's proximal term ---------------------------------------------------------------


def test_the_proximal_term_is_the_dense_distance_of_the_products() -> None:
    random = torch.Generator().manual_seed(0)

    def factors() -> dict[str, Tensor]:
        shapes = {"a.lora_A": (3, 7), "a.lora_B": (5, 3), "b.lora_A": (3, 4), "b.lora_B": (9, 3)}
        return {name: torch.randn(shape, generator=random, dtype=torch.float64) for name, shape in shapes.items()}

    now, then, scale, mu = factors(), factors(), 2.5, 0.3
    for value in now.values():
        value.requires_grad_()
    dense = torch.zeros((), dtype=torch.float64)
    for module in ("a", "b"):
        product, start = (part[f"{module}.lora_B"] @ part[f"{module}.lora_A"] for part in (now, then))
        dense = dense + 0.5 * mu * (scale * product - scale * start).square().sum()
    wanted = torch.autograd.grad(dense, list(now.values()))
    penalty = product_penalty(then, mu, scale)(now)
    assert penalty.item() == pytest.approx(dense.item(), rel=1e-12)
    for mine, theirs in zip(torch.autograd.grad(penalty, list(now.values())), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_the_proximal_term_is_exact_where_the_products_hardly_differ() -> None:
    """Large factors, a tiny change, float32: the difference of two large norms would be noise."""
    random = torch.Generator().manual_seed(0)
    then = {
        "m.lora_A": 50 * torch.randn(4, 64, generator=random),
        "m.lora_B": 50 * torch.randn(48, 4, generator=random),
    }
    now = {name: value + 1e-3 * torch.randn(value.shape, generator=random) for name, value in then.items()}
    product, start = (part["m.lora_B"].double() @ part["m.lora_A"].double() for part in (now, then))
    assert float(product_penalty(then, 1.0, 1.0)(now)) == pytest.approx(
        float(0.5 * (product - start).square().sum()), rel=1e-4
    )


# --- the lower level -------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["last", "first_and_last"])
def test_the_alignment_loss_is_the_formula(placement: str) -> None:
    """Against hidden states and logits of whole forward passes in float64, row by row, written from the formula."""
    pair = make_pair(placement=placement, adapter_layers=2 if placement == "last" else 1, double=True)
    settings = AlignmentConfig(kl_weight=0.7, layerwise_weight=0.3)
    rows = rows_of(5, 9, 3)
    batch = collate(rows, [0, 1, 2], batching="padded", pad_id=2)
    mine = alignment_loss(pair, settings)(pair.emulator.model, batch)

    def whole(model: torch.nn.Module) -> tuple[list[Tensor], Tensor]:
        """Per layer what goes into it, and log p, of all positions that have a next token."""
        into, logits = [], []
        for row in range(len(rows)):
            tokens = torch.from_numpy(rows.rows(row)[0].astype(np.int64))[None]
            out = model(input_ids=tokens, output_hidden_states=True, use_cache=False)
            into.append([state[0, :-1] for state in out.hidden_states])
            logits.append(out.logits[0, :-1])
        return [torch.cat(states) for states in zip(*into, strict=True)], torch.cat(logits).log_softmax(-1)

    (full, p), (small, q) = whole(pair.full.model), whole(pair.emulator.model)
    plan = pair.plan
    places = [(plan.held.index(layer), layer) for layer in (plan.top, *plan.kept[1:])]
    errors = [
        (small[own] - full[own_full]).square().mean() / full[own_full].square().mean() for own, own_full in places
    ]
    kl = (p.exp() * (p - q)).sum(-1).mean()
    loss = errors[0] + 0.7 * kl + (0.3 * sum(errors[1:]) / len(errors[1:]) if errors[1:] else 0.0)
    assert float(mine) / len(p) == pytest.approx(float(loss), rel=1e-6)
    measured = fidelity(pair, [batch])
    assert measured.kl.value == pytest.approx(float(kl), rel=1e-6)
    assert measured.hidden.value == pytest.approx(float(errors[0]), rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_divergence_in_pieces_is_the_divergence_at_once(family: str) -> None:
    """Value and gradient; Gemma 2 caps its logits after the head."""
    models = [tiny_model(family, seed=seed, num_hidden_layers=3) for seed in (0, 1)]
    plan = plan_split(3, EmulatorConfig(adapter_layers=1, drop=0.0), stack=layer_stack(models[0]))
    pair = Pair(*(attach(model, LORA, seed=0) for model in models), plan=plan)
    full_top, top = (torch.randn(7, 32, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    found = []
    for at_once in (2**24, 260 * 2, 1):
        mine = top.clone().requires_grad_()
        value = divergence(pair, full_top, mine, at_once)
        value.backward()
        found.append((value.detach(), mine.grad))
    for value, gradient in found[1:]:
        torch.testing.assert_close(value, found[0][0])
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-5, atol=1e-6)
    assert float(found[0][0]) > 0


def test_no_more_logits_than_asked_for_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from flocktune.algorithms import alignment

    pair, sizes = make_pair(), []
    real = alignment.head_logits

    def watched(*arguments: object) -> Tensor:
        logits = real(*arguments)  # type: ignore[arg-type]
        sizes.append(logits.numel())
        return logits

    monkeypatch.setattr(alignment, "head_logits", watched)
    top = torch.randn(11, 32, requires_grad=True)
    divergence(pair, torch.randn(11, 32), top, 4 * 260).backward()
    assert max(sizes) == 4 * 260
    assert len(sizes) == 12, "three pieces of two models, and again in the backward pass"


def test_a_full_emulator_is_the_full_model() -> None:
    pair = make_pair(drop=0.0)
    silent = {
        name: torch.zeros_like(value)
        for name, value in pair.emulator.tensors().items()
        if not pair.plan.in_adapter(name)
    }
    pair.emulator.load({**pair.emulator.tensors(), **silent})
    batch = collate(rows_of(6, 4), [0, 1], batching="padded", pad_id=2)
    measured = fidelity(pair, [batch])
    assert (measured.hidden.value, measured.kl.value) == (0.0, 0.0)


@pytest.mark.parametrize("batching", ["padded", "packed"])
@pytest.mark.parametrize("layerwise", [False, True])
def test_what_the_teacher_remembers_changes_nothing(batching: str, layerwise: bool) -> None:
    pair, rows = make_pair(double=True), rows_of(6, 9, 3)
    knows = pair.remembering(EmulatorConfig(cache_dtype="bfloat16"))
    loss, its_loss = (alignment_loss(one, AlignmentConfig(layerwise_weight=0.3 * layerwise)) for one in (pair, knows))
    below = watched(pair.full.model.get_submodule(f"{pair.plan.stack}.0"))
    for index in ([0, 1], [1, 2], [2, 0]):
        batch = collate(rows, index, batching=batching, pad_id=2)  # type: ignore[arg-type]
        expected = float(loss(pair.emulator.model, batch))
        assert float(its_loss(pair.emulator.model, batch)) == pytest.approx(expected, rel=1e-9)
        measured, expected_one = fidelity(knows, [batch]), fidelity(pair, [batch])
        assert measured.kl.value == pytest.approx(expected_one.kl.value, rel=1e-9)
    assert knows.below is not None
    assert knows.below.computed_rows == len(rows)
    assert len(below) == (6 + 2 + 3 * layerwise), "twice without memory; with it, for two batches that had new rows"


def test_with_adapters_at_the_bottom_the_teacher_remembers_nothing() -> None:
    pair = make_pair(placement="first_and_last", adapter_layers=1)
    assert pair.remembering(EmulatorConfig()) is pair


def test_each_data_set_is_remembered_by_itself_and_for_one_alignment() -> None:
    """The numbers of rows of two sets are the same; rows are not. The next round computes all again."""
    pair = make_pair()
    public, held_out = rows_of(6, 9, 7, 5), rows_of(4, 8, 3, 6, 2)
    sets = {name: collate(rows, range(4), batching="padded", pad_id=2) for name, rows in
            (("public", public), ("held_out", held_out))}  # fmt: skip
    given = replace(public_of(public), measured={name: lambda one=one: [one] for name, one in sets.items()})
    alignment = AlignmentConfig(first_steps=3, steps=3, lr=1e-2)
    server = fedbiot.server_half(pair, given, alignment, RunConfig().aggregation, seed=0)
    state = server.init(pair.emulator.tensors())
    seen = []
    for round in range(2):
        below = watched(pair.full.model.get_submodule(f"{pair.plan.stack}.0"))
        state, told = server.prepare(state, round)
        seen.append(len(below))
        for name, one in sets.items():
            assert told["fidelity"][name]["after"] == pytest.approx(fidelity(pair, [one]).kl.value, rel=1e-4)
    assert seen[0] == 2, "one pass for either set, before; steps and what is measured after them come from memory"
    assert seen[1] >= 2


def watched(module: torch.nn.Module) -> list[int]:
    """Grows with every forward pass of ``module``."""
    passes: list[int] = []
    module.register_forward_hook(lambda *_: passes.append(1))
    return passes


def public_of(rows: Encoded) -> fedbiot.PublicData:
    def batches(seed: int, steps: int) -> list[object]:
        order = np.random.default_rng(seed).integers(0, len(rows), (steps, 2))
        return [collate(rows, pair, batching="padded", pad_id=2) for pair in order]

    whole = collate(rows, range(len(rows)), batching="padded", pad_id=2)
    return fedbiot.PublicData(batches, {"public": lambda: [whole]})  # type: ignore[arg-type]


def make_server(pair: Pair, **changes: object) -> tuple[object, Tensors]:
    alignment = AlignmentConfig(**{"first_steps": 12, "steps": 3, "lr": 1e-2, **changes})  # type: ignore[arg-type]
    server = fedbiot.server_half(pair, public_of(rows_of(6, 9, 7, 5)), alignment, RunConfig().aggregation, seed=0)
    start = pair.emulator.tensors()
    return server, server.init(start)


def test_the_server_alone_trains_the_emulator_and_the_adapter_stays_meanwhile() -> None:
    pair = make_pair()
    server, state = make_server(pair)
    aligned, told = server.prepare(state, 0)
    assert all(torch.equal(group(state, "adapter")[name], value) for name, value in group(aligned, "adapter").items())
    assert not any(
        torch.equal(group(state, "emulator")[name], value) for name, value in group(aligned, "emulator").items()
    )
    assert told["steps"] == 12
    assert told["loss_last"] < 0.9 * told["loss_first"]
    assert told["fidelity"]["public"]["after"] < told["fidelity"]["public"]["before"]
    assert int(aligned["aligned"]) == 1
    again, nothing = server.prepare(aligned, 0)
    assert again is aligned, "what a checkpoint holds is not aligned once more"
    assert not nothing
    _, later = server.prepare(aligned, 1)
    assert later["steps"] == 3
    twice, _ = server.prepare(state, 0)
    assert digest(twice) == digest(aligned), "a round that was cut off is repeated to the bit"


def test_the_teacher_has_the_current_adapter() -> None:
    """With another A in the state, another target: the full model's adapter is set from the state, not left."""
    pair = make_pair()
    server, state = make_server(pair, first_steps=0)
    _, told = server.prepare(state, 0)
    other = {name: value + 0.3 if name.startswith("adapter/") else value for name, value in state.items()}
    _, other_told = server.prepare(other, 0)
    assert told["fidelity"] != other_told["fidelity"]
    expected = pair.plan.to_full(group(other, "adapter"))
    assert all(torch.equal(value, pair.full.tensors()[name]) for name, value in expected.items())


def test_emulator_and_adapter_go_down_and_the_adapter_comes_up() -> None:
    pair = make_pair()
    server, state = make_server(pair)
    message = server.message(state, 0)
    assert {name.split("/")[0] for name in message} == {"emulator", "adapter"}
    assert set(server.returned(message)) == {name for name in pair.emulator.parameters if pair.plan.in_adapter(name)}
    assert set(server.result(state)) == set(pair.full.parameters)


# --- the client ------------------------------------------------------------------------------------


def make_task(pair: Pair, digest: str = "d" * 64) -> ClientTask:
    parts = fedbiot.split_tensors(pair.plan, pair.emulator.tensors())
    tensors = {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}
    return ClientTask(0, "one", fedbiot.KIND, tensors, 7, "", digest)


def client_rows(batching: str) -> Callable[[str], object]:
    """Seven rows in batches of three; the same row meets others in every epoch."""
    rows = rows_of(5, 9, 4, 7, 6, 8, 5)
    config = replace(
        RunConfig(), local=LocalConfig(epochs=3, batch_size=3), data=replace(RunConfig().data, batching=batching)
    )  # type: ignore[type-var]

    held = SimpleNamespace(train=SimpleNamespace(encoded=rows), clients={"one": np.arange(7)})
    return client_data(config, 2, held)  # type: ignore[arg-type]


def train(pair: Pair, loss: object, batching: str = "padded", local: LocalConfig | None = None) -> Tensors:
    task = make_task(pair)
    adapter = group(task.tensors, "adapter")
    before = pair.emulator.tensors()
    local = local or LocalConfig(epochs=3, batch_size=3, lr=1e-2)
    update = train_locally(
        pair.emulator, adapter, task, client_rows(batching)("one"), local, "equal", rounds=1, loss=loss
    )  # type: ignore[arg-type]
    pair.emulator.load(before)
    return update.delta


@pytest.mark.parametrize("batching", ["padded", "packed"])
@pytest.mark.parametrize(
    "settings",
    [
        EmulatorConfig(),
        EmulatorConfig(cache="disk"),
        EmulatorConfig(cache="none"),
        EmulatorConfig(placement="first_and_last", adapter_layers=1),
    ],
    ids=["memory", "disk", "none", "first_and_last"],
)
def test_a_cached_step_is_a_full_step(batching: str, settings: EmulatorConfig) -> None:
    """Three epochs with and without the cache; only the order of sums inside a matrix product may differ."""
    from flocktune.training import next_token_loss

    pair = make_pair(placement=settings.placement, adapter_layers=settings.adapter_layers)
    plain = train(pair, next_token_loss, batching)
    prefix = PrefixCache(pair.emulator.model, pair.plan.stack, pair.plan.frozen, settings)
    cached = train(pair, prefix.loss, batching)
    for name, value in plain.items():
        torch.testing.assert_close(cached[name], value, rtol=1e-4, atol=1e-6)
    never = settings.cache == "none" or pair.plan.frozen == 0  # below the first layer there is nothing to keep
    assert prefix.computed_rows == (21 if never else 7), "each row once, or each time"


def test_a_bounded_cache_gives_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_pair()
    results = {}
    for rows_that_fit in (0, 3, 7):
        prefix = PrefixCache(pair.emulator.model, pair.plan.stack, pair.plan.frozen, EmulatorConfig())
        prefix.left = rows_that_fit * 9 * 32 * 4
        results[rows_that_fit] = train(pair, prefix.loss)
        used = sum(states().numel() * 4 for states in prefix.kept.values())
        assert used <= rows_that_fit * 9 * 32 * 4
        assert len(prefix.kept) >= rows_that_fit
    for fewer in (0, 3):
        for name, value in results[7].items():
            torch.testing.assert_close(results[fewer][name], value, rtol=1e-4, atol=1e-6)


def test_a_bfloat16_cache_rounds_every_state_kept_or_not() -> None:
    """A result may depend on the type of the cache, never on how much of it fits."""
    pair = make_pair()
    results = []
    for keep in (True, False):
        settings = EmulatorConfig(cache_dtype="bfloat16")
        prefix = PrefixCache(pair.emulator.model, pair.plan.stack, pair.plan.frozen, settings, keep=keep)
        results.append(train(pair, prefix.loss))
        assert {states().dtype for states in prefix.kept.values()} == ({torch.bfloat16} if keep else set())
    exact = train(pair, PrefixCache(pair.emulator.model, pair.plan.stack, pair.plan.frozen, EmulatorConfig()).loss)
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=2e-3, atol=1e-5)
    assert digest(results[0]) != digest(exact)


def make_client(pair: Pair, local: LocalConfig, digest: str = "d" * 64) -> object:
    return fedbiot.client_half(
        pair.emulator,
        pair.plan,
        digest,
        client_rows("padded"),
        local,
        EmulatorConfig(),
        "examples",
        rounds=1,  # type: ignore[arg-type]
    )


def test_a_client_changes_the_adapter_and_nothing_else() -> None:
    pair = make_pair()
    task = make_task(pair)
    update, _ = make_client(pair, LocalConfig(steps=3, batch_size=3, lr=1e-2))(task, {})  # type: ignore[operator]
    assert set(update.delta) == set(group(task.tensors, "adapter"))
    assert all(bool(value.any()) for value in update.delta.values())
    now = pair.emulator.tensors()
    assert all(torch.equal(now[name], value) for name, value in group(task.tensors, "emulator").items())
    assert all(parameter.requires_grad for parameter in pair.emulator.parameters.values()), "as it was before"


def test_the_proximal_term_holds_the_adapter_back() -> None:
    pair = make_pair()
    sizes = []
    for mu in (0.0, 10.0):
        local = LocalConfig(steps=6, batch_size=3, lr=1e-2, proximal_mu=mu, proximal_on="products")
        update, _ = make_client(pair, local)(make_task(pair), {})  # type: ignore[operator]
        start = group(make_task(pair).tensors, "adapter")
        moved = {name: value + update.delta[name] for name, value in start.items()}
        sizes.append(float(product_penalty(start, 1.0, 1.0)(moved)))
    assert sizes[1] < 0.5 * sizes[0]


def test_a_task_for_another_emulator_is_refused() -> None:
    pair = make_pair()
    with pytest.raises(UserError, match=r"emulator: expected the one of this run, eeee.*got another one, dddd"):
        make_client(pair, LocalConfig(steps=1))(make_task(pair, "e" * 64), {})  # type: ignore[operator]


def test_no_gradient_reaches_below_the_adapter() -> None:
    pair = make_pair()
    names = [name for name in pair.emulator.parameters if pair.plan.in_adapter(name)]
    prefix = PrefixCache(pair.emulator.model, pair.plan.stack, pair.plan.frozen, EmulatorConfig())
    batch = collate(rows_of(5, 6), [0, 1], batching="padded", pad_id=2)
    with training_only(pair.emulator, names):
        assert not prefix.states(batch).requires_grad
        prefix.loss(pair.emulator.model, batch).backward()
    assert {name for name, value in pair.emulator.parameters.items() if value.grad is not None} == set(names)


# --- the whole run ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world whose model has five layers, with public rows of its own."""
    folder = tmp_path_factory.mktemp("deep")
    deep_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    data = write_rows(folder / "data.jsonl", dolly_rows(48))
    public = [{"instruction": f"Say {i}", "input": "", "output": f"{CATEGORIES[i % 3]} {i}"} for i in range(24)]
    write_rows(folder / "public.jsonl", public)
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"""
name: bio
method: fedbiot
rounds: 2
model: {{path: {folder / "model"}}}
lora: {{rank: 2, alpha: 4.0, targets: [q_proj, down_proj]}}
data: {{train: {data}, template: short, max_tokens: 96, test_rows_per_category: 2}}
allocation: {{kind: iid, clients: 3}}
local: {{steps: 2, batch_size: 4, lr: 1.0e-2, proximal_mu: 0.01, proximal_on: products}}
emulator: {{adapter_layers: 2, drop: 0.34}}
alignment: {{public: {folder / "public.jsonl"}, first_steps: 4, steps: 1, batch_size: 4, fidelity_rows: 4}}
evaluation: {{every: 1, max_new_tokens: 2, max_rows: 3}}
runtime: {{device: cpu, threads: 1}}
""")
    return World(folder, folder / "model", data, recipe)


@pytest.fixture(scope="module")
def finished(deep: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from flocktune import api

    folder = tmp_path_factory.mktemp("finished") / "run"
    api.run(load_recipe(deep.recipe), folder)
    return folder


def test_a_run_leaves_the_bundle_both_adapters_and_both_results(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"emulator", "adapter", "emulator_adapter", "summary.json"} <= names
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary["metrics"]) == {"held_out", "held_out_emulator"}
    manifest = json.loads((finished / "emulator" / "emulator.json").read_text())
    assert manifest["split"] == {"layers": 5, "adapter": [3, 4], "kept": [0, 2], "stack": "model.layers"}
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    assert summary["bytes_emulator"] == 3 * size, "once to each of three clients"
    events = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    told = [event for event in events if event["event"] == "alignment"]
    assert [(event["round"], event["steps"]) for event in told] == [(0, 4), (1, 1)]
    assert all(set(event["fidelity"]) == {"public", "held_out"} for event in told)
    assert all("align" in event["seconds"] for event in events if event["event"] == "round")
    start = next(event for event in events if event["event"] == "run_start")
    assert start["emulator"]["dropped"] == [1]


def test_the_adapter_plugs_into_the_full_model_by_peft(finished: Path, deep: World) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    from flocktune.results import open_result

    ids = torch.arange(3, 20)[None]
    settings = json.loads((finished / "adapter" / "adapter_config.json").read_text())
    assert settings["layers_to_transform"] == [3, 4]
    for adapter, base, emulator in (("adapter", deep.model, False), ("emulator_adapter", finished / "emulator", True)):
        plugged = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), finished / adapter).eval()
        mine = open_result(finished, emulator=emulator).base.model
        with torch.no_grad():
            torch.testing.assert_close(plugged(input_ids=ids).logits, mine(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_without_compression_alignment_and_proximal_term_it_is_fedit_on_the_last_layers(
    deep: World, tmp_path: Path
) -> None:
    from flocktune import api

    biot = ("emulator.drop=0.0", "alignment.first_steps=0", "alignment.steps=0")
    targets = [f"layers.{layer}.{module}" for layer in (3, 4) for module in ("self_attn.q_proj", "mlp.down_proj")]
    quick = ("evaluation.generate=false", "evaluation.every=0", "local.proximal_mu=0.0", "engine.stack=1")
    mine = api.run(load_recipe(deep.recipe, [*biot, *quick]), tmp_path / "fedbiot")
    theirs = api.run(load_recipe(deep.recipe, ["method=fedit", f"lora.targets={targets}", *quick]), tmp_path / "fedit")
    assert mine["adapter_sha256"] == theirs["adapter_sha256"]
    assert mine["metrics"]["held_out"] == mine["metrics"]["held_out_emulator"], "and the gap is zero"


BASELINES = {
    "FedOT": [
        "emulator.placement=first_and_last",
        "emulator.adapter_layers=1",
        "alignment.steps=0",
        "local.proximal_mu=0.0",
    ],
    "Offsite-Tuning": [
        "emulator.placement=first_and_last",
        "emulator.adapter_layers=1",
        "alignment.steps=0",
        "allocation.clients=1",
    ],
    "FedOT, last layers": ["alignment.steps=0", "local.proximal_mu=0.0"],
    "layer-wise distillation": ["alignment.layerwise_weight=0.5"],
    "by importance": ["emulator.choice=importance"],
    "packed, disk, tokens": [
        "data.batching=packed",
        "emulator.cache=disk",
        "local={epochs: 2, batch_size: 4, lr: 0.01}",
    ],
}


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_are_settings(deep: World, tmp_path: Path, name: str) -> None:
    from flocktune import api

    quick = ["rounds=1", "evaluation.generate=false", "evaluation.every=0"]
    summary = api.run(load_recipe(deep.recipe, [*BASELINES[name], *quick]), tmp_path / "run")
    assert summary["metrics"]["held_out"]["overall"]["loss"] > 0
    layers = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())["layers_to_transform"]
    assert layers == ([0, 4] if "first_and_last" in BASELINES[name][0] else [3, 4])


CLIENT = """
import json, sys
from pathlib import Path
from flocktune.allocation import allocate_clients
from flocktune.sides import emulator_client
from flocktune.config.load import load_recipe
from flocktune.emulation import load_emulator
from flocktune.models.bundle import copy_bundle, receive_bundle
from flocktune.engine.ray_worker import pack, unpack
from flocktune.wire import build_task, update_fields

task = build_task(*unpack(Path(sys.argv[1]).read_bytes()))
store = Path(sys.argv[2])
bundle = receive_bundle(task.model_digest, lambda to: copy_bundle(store, to), Path(sys.argv[4]))
config = load_recipe(Path(sys.argv[3]), [f"model.path={bundle.folder}"])
update, _ = emulator_client(config, load_emulator(config, bundle), allocate_clients(config))(task, {})
sys.stdout.buffer.write(pack(update_fields(update), update.delta))
"""


def test_a_client_process_needs_no_full_model(deep: World, finished: Path, tmp_path: Path) -> None:
    """The whole way of a client, in a process for which the full model's folder does not exist, over the wire."""
    fed = federation(load_recipe(deep.recipe))
    state, _ = fed.server.prepare(fed.server.init(fed.start), 0)
    message = fed.server.message(state, 0)
    task = ClientTask(0, "client-02", fed.kind, message, 5, "", fed.model_digest)
    expected, _ = fed.client(task, {})
    blob = encode_tensors(message)
    allowed = {
        f"{part}/{name}"
        for part, names in fedbiot.split_tensors(fed.emulated.bundle.plan, fed.start).items()
        for name in names
    }  # type: ignore[union-attr]
    assert set(decode_tensors(blob)) == allowed, "factors of E and A go down, no weight of any model"
    factors = sum(value.numel() * 4 for value in fed.start.values())
    assert factors < len(blob) < factors + 4096, "and nothing else but names"
    (tmp_path / "task").write_bytes(pack(task_fields(task), message))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(deep.recipe.read_text().replace(str(deep.model), str(tmp_path / "nowhere")))
    away = deep.model.rename(deep.folder / "hidden")
    try:
        arguments = [tmp_path / "task", finished / "emulator", recipe, tmp_path / "cache"]
        done = subprocess.run([sys.executable, "-c", CLIENT, *map(str, arguments)], capture_output=True, timeout=120)
    finally:
        away.rename(deep.model)
    assert done.returncode == 0, done.stderr.decode()
    metrics = {name: mean for name, mean in expected.metrics.items() if name != "data_seconds"}
    update = build_update(*unpack(done.stdout))
    assert digest(update.delta) == digest(expected.delta)
    assert {name: update.metrics[name] for name in metrics} == metrics
    assert set(update.delta) == {
        name for name in fed.emulated.base.adapter.parameters if fed.emulated.bundle.plan.in_adapter(name)
    }  # type: ignore[union-attr]


# --- mistakes and accidents ------------------------------------------------------------------------


MISTAKES = {
    "more adapter layers than layers": (
        ["emulator.adapter_layers=6"],
        "emulator.adapter_layers: expected fewer than the model's 5 layers",
    ),
    "nothing kept": (["emulator.drop=0.9"], "emulator.drop: expected a fraction that leaves one of 3 layers"),
    "everything dropped": (["emulator.drop=1.0"], "emulator.drop: expected less than 1"),
    "public data missing": (["alignment.public=/none.jsonl"], "alignment.public: "),
    "no bundle": (["emulator.path=/nowhere"], "/nowhere: expected an emulator bundle"),
}


@pytest.mark.parametrize("verb", ["check", "run"])
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_has_one_message(deep: World, cli: Cli, tmp_path: Path, verb: str, name: str) -> None:
    overrides, message = MISTAKES[name]
    said = cli(verb, deep.recipe, *overrides, *(["--out", tmp_path / "run"] if verb == "run" else []))
    assert said.code == 2
    assert message in said.err
    assert said.err.count("error:") == 1
    assert "Traceback" not in said.all
    assert not (tmp_path / "run").exists()


def test_a_quantised_emulator_needs_a_gpu_and_says_so(deep: World, cli: Cli, tmp_path: Path) -> None:
    said = cli("run", deep.recipe, "emulator.quantization=4bit", "--out", tmp_path / "run")
    assert said.code == 2
    assert "emulator.quantization: expected none on cpu, got 4bit" in said.err


def test_a_damaged_bundle_is_named(deep: World, finished: Path, cli: Cli, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(finished / "emulator", bundle)
    weights = bundle / "model.safetensors"
    blob = bytearray(weights.read_bytes())
    blob[-1] ^= 1
    weights.write_bytes(blob)
    said = cli("run", deep.recipe, f"emulator.path={bundle}", "--out", tmp_path / "run")
    assert said.code == 2
    assert f"{weights}: expected sha256" in said.err
    assert said.err.count("error:") == 1


def test_the_emulator_of_another_model_is_refused(deep: World, finished: Path, cli: Cli, tmp_path: Path) -> None:
    deep_model(seed=3).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    overrides = (f"model.path={tmp_path / 'other'}", f"emulator.path={finished / 'emulator'}")
    said = cli("run", deep.recipe, *overrides, "--out", tmp_path / "run")
    assert said.code == 2
    assert "emulator.path: expected the emulator of" in said.err


def test_a_given_bundle_is_used_as_it_is(deep: World, finished: Path, tmp_path: Path) -> None:
    from flocktune import api

    again = api.run(
        load_recipe(deep.recipe, [f"emulator.path={finished / 'emulator'}", "emulator.drop=0.0"]), tmp_path / "run"
    )
    assert again["adapter_sha256"] == json.loads((finished / "summary.json").read_text())["adapter_sha256"]


def test_compress_eval_and_export(deep: World, finished: Path, cli: Cli, tmp_path: Path) -> None:
    said = cli("compress", deep.model, "--adapter-layers", 2, "--drop", 0.34, "--to", tmp_path / "emulator")
    assert said.code == 0, said.all
    assert "4 of 5 layers" in said.out
    assert all(len(line) <= 80 for line in said.out.splitlines()[1:])
    assert (tmp_path / "emulator/model.safetensors").read_bytes() == (
        finished / "emulator/model.safetensors"
    ).read_bytes()
    assert cli("compress", deep.model, "--to", tmp_path / "emulator").code == 2
    summary = json.loads((finished / "summary.json").read_text())
    for name, dataset in (("full", "held_out"), ("emulator", "held_out_emulator")):
        said = cli("eval", finished, "--as", name, "--json", tmp_path / f"{name}.json")
        assert said.code == 0, said.all
        assert json.loads((tmp_path / f"{name}.json").read_text()) == {"task": "text", **summary["metrics"][dataset]}
    assert cli("eval", finished, "--as", "other").code == 2
    assert cli("export", finished, "--to", tmp_path / "peft").code == 0
    assert (tmp_path / "peft/adapter_model.safetensors").read_bytes() == (
        finished / "adapter/adapter_model.safetensors"
    ).read_bytes()
    assert cli("export", finished, "--merged", "--to", tmp_path / "merged").code == 0
    assert cli("eval", tmp_path / "peft", "--data", deep.data, "--max-rows", 2).code == 0


def test_check_says_what_a_client_gets(deep: World, finished: Path, cli: Cli) -> None:
    said = cli("check", deep.recipe)
    assert said.code == 0, said.all
    assert "4 of 5 layers" in said.out
    events = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    start = next(event for event in events if event["event"] == "run_start")
    assert f"{start['trainable_parameters']:,} parameters" in said.out


def test_as_emulator_needs_an_emulator(world: World, cli: Cli, tmp_path: Path) -> None:
    assert cli("run", world.recipe, "rounds=0", "evaluation.generate=false", "--out", tmp_path / "run").code == 0
    said = cli("eval", tmp_path / "run", "--as", "emulator")
    assert said.code == 2
    assert "--as: expected full" in said.err


def test_an_alignment_that_diverges_names_its_own_settings(deep: World, cli: Cli, tmp_path: Path) -> None:
    said = cli("run", deep.recipe, "alignment.lr=1e12", "alignment.clip_norm=0", "--out", tmp_path / "run")
    assert said.code == 1
    assert "alignment before round 1: " in said.err
    assert "Lower alignment.lr" in said.err
    assert "local.lr" not in said.err


@pytest.mark.parametrize("verb", ["check", "run"])
def test_public_rows_must_fit_the_model_too(cli: Cli, tmp_path: Path, verb: str) -> None:
    short = deep_model(max_position_embeddings=64)
    short.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"instruction": f"Say {i}", "response": "yes"} for i in range(24)]
    write_rows(tmp_path / "data.jsonl", rows)
    write_rows(tmp_path / "public.jsonl", [{"instruction": "long " * 40, "response": "yes"}])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""
method: fedbiot
model: {{path: {tmp_path / "model"}}}
lora: {{rank: 2}}
data: {{train: {tmp_path / "data.jsonl"}, template: short, max_tokens: 96}}
allocation: {{kind: iid, clients: 2}}
emulator: {{drop: 0.34, choice: importance}}
alignment: {{public: {tmp_path / "public.jsonl"}}}
evaluation: {{max_new_tokens: 2}}
""")
    said = cli(verb, recipe, *(["--out", tmp_path / "run"] if verb == "run" else []))
    assert said.code == 2
    assert "data.max_tokens: expected at most the 64 tokens of the model's context" in said.err


def test_a_resumed_run_takes_its_own_bundle_when_the_cache_is_gone(
    deep: World, finished: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flocktune import emulation

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "summary.json").unlink()
    monkeypatch.setenv("FLOCKTUNE_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(emulation, "compress", None)  # it must not be needed
    assert cli("resume", run).code == 0
    before, after = (json.loads((folder / "summary.json").read_text()) for folder in (finished, run))
    assert after["adapter_sha256"] == before["adapter_sha256"]


def test_a_damaged_note_in_the_cache_costs_a_compression_and_nothing_else(
    deep: World, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOCKTUNE_CACHE", str(tmp_path / "cache"))
    config = load_recipe(deep.recipe)
    first = bundle_of(config)
    [note] = (tmp_path / "cache" / "emulators").glob("made-*.json")
    for damage in ("{}", "[", json.dumps({"digest": "0" * 64})):
        note.write_text(damage)
        assert bundle_of(config).digest == first.digest
    assert json.loads(note.read_text()) == {"digest": first.digest}
    assert not list((tmp_path / "cache" / "emulators").glob(".*.tmp"))


def test_another_bundle_in_a_runs_folder_is_not_evaluated(
    deep: World, finished: Path, cli: Cli, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "emulator")
    said = cli("eval", run, "--as", "emulator")
    assert said.code == 2
    assert "this run's emulator" in said.err
    assert cli("compress", deep.model, "--drop", 0.67, "--to", run / "emulator").code == 0
    said = cli("eval", run, "--as", "emulator")
    assert said.code == 2
    assert "emulator: expected the one of this run" in said.err
    said = cli("eval", finished / "adapter", "--as", "emulator")
    assert said.code == 2
    assert "--as emulator: expected a run's folder" in said.err


def test_half_a_bundle_of_a_killed_run_is_cleared_away(deep: World, finished: Path, cli: Cli, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "summary.json").unlink()
    (run / "emulator").rename(run / ".emulator.tmp")
    assert cli("resume", run).code == 0
    assert (run / "emulator" / "emulator.json").exists()
    assert not (run / ".emulator.tmp").exists()


def test_baselines_on_the_full_model_take_neither_proximal_term_nor_half_an_adapter(deep: World) -> None:
    overrides = ["compare={base: true, local: 1, fedit: true, centralised: true}", "lora.start_from=/some/adapter"]
    runs = plan(load_recipe(deep.recipe, overrides), ["client-01"])
    assert list(runs) == ["base", "local_1", "fedbiot", "fedit", "centralised"]
    assert runs["fedbiot"].local.proximal_mu == 0.01
    assert runs["fedbiot"].lora.start_from == "/some/adapter"
    for name in ("base", "local_1", "fedit", "centralised"):
        assert (runs[name].local.proximal_mu, runs[name].lora.start_from) == (0.0, None)
