"""Whole runs with clients trained at once: what a recipe puts around training sees no difference but rounding."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from conftest import World, dolly_rows, write_rows
from flocktune import gathering
from flocktune.assemble import engine_of, federation
from flocktune.cli.estimated import estimate_table
from flocktune.config.engines import InProcessEngine
from flocktune.config.load import load_recipe
from flocktune.engine.in_process import InProcess
from flocktune.estimate import Estimate, estimate
from flocktune.privacy.noise import KEY_BYTES
from flocktune.run_folder import create_run
from flocktune.runs import SECRET, execute

QUICK = (
    "rounds=2", "evaluation.generate=false", "evaluation.every=0", "scheduling.selection.fraction=1.0",
    "local={steps: 2, batch_size: 2, lr: 0.2, optimizer: sgd}",
)  # fmt: skip
"""Steps in proportion to gradients: a difference of rounding stays one."""
BIOT = ("method=fedbiot", "emulator={adapter_layers: 1, drop: 0.0}", "alignment.public=PUBLIC",
        "alignment={first_steps: 2, steps: 1, batch_size: 2, fidelity_rows: 0, public: PUBLIC}")  # fmt: skip
MIXED = "ranks={kind: by_name, ranks: {client-01: 1}}"
TWICE = "local={epochs: 2, batch_size: 4, lr: 0.2, optimizer: sgd}"
RUNS: dict[str, tuple[tuple[str, ...], list[int]]] = {
    "FedIT, packed": (("data.batching=packed",), [4, 4]),
    "FedIT, in epochs, by tokens": ((TWICE, "aggregation.weights=tokens"), [4, 4]),
    "three of four, two at once": (("scheduling.selection.fraction=0.75", "engine.stack=2"), [2, 2]),
    "differing ranks": ((MIXED,), [4, 4]),
    "FFA-LoRA": (("aggregation.rule=ffa_lora",), [4, 4]),
    "RoLoRA": (("aggregation.rule=rolora",), [4, 4]),
    "FLoRA": (("aggregation.rule=flora", MIXED), [4, 4]),
    "FedEx-LoRA": (("aggregation.rule=fedex_lora",), [4, 4]),
    "FedSA-LoRA: each has a B of its own": (("aggregation.rule=fedsa_lora",), [4, 4]),
    "HetLoRA": (("aggregation.rule=hetlora", MIXED), [4, 4]),
    "proximal": (("local.proximal_mu=0.5",), [4, 4]),
    "SCAFFOLD and Ditto: two trainings a task": (
        ("local.correction={kind: scaffold}", "personal={kind: ditto, lambda_: 0.5, keep: true}"), [4, 4, 4, 4],
    ),
    "FedDyn and fine-tuning": (
        ("local.correction={kind: feddyn}", "personal={kind: fine_tune, steps: 2, keep: true}"), [4, 4, 4],
    ),
    "secure aggregation": (("secure_aggregation={min_clients: 2}", "aggregation.weights=equal"), [4, 4]),
    "compression, with error feedback": (("compression={format: float32, top_k: 0.5}",), [4, 4]),
    "an attack, and the median": (
        ("attack={kind: sign_flip, clients: [client-02], factor: 3.0}", "aggregation.robust={kind: median}"), [4, 4],
    ),
    "FedBiOT, each with a cache": ((*BIOT, TWICE), [4, 4]),
    "FedBiOT, packed, with SCAFFOLD": ((*BIOT, "data.batching=packed", "local.correction={kind: scaffold}"), [4, 4]),
    "DP-SGD, one after another": (
        ("privacy={kind: sample, clip_norm: 0.5, delta: 1.0e-3, noise_multiplier: 1.0}", "local.clip_norm=0",), [],
    ),
    "an 8-bit base": (("model.quantization=8bit",), [4, 4]),
    "centralised": (("method=centralised",), []),
}  # fmt: skip


THE_SAME = ("round", "selected", "answered", "failures", "bytes_down", "bytes_up")


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("public") / "public.jsonl", dolly_rows(12))


def run(world: World, out: Path, public: Path, *overrides: str) -> dict[str, Any]:
    overrides = tuple(each.replace("PUBLIC", str(public)) for each in overrides)
    create_run(load_recipe(world.recipe, [*QUICK, *overrides]), out)
    if "privacy" in str(overrides):
        (out / SECRET).write_bytes(bytes(range(KEY_BYTES)))  # noise is of the run's key
    return dict(execute(out))


def told(folder: Path) -> list[dict[str, Any]]:
    return [event for event in map(json.loads, (folder / "metrics.jsonl").open()) if event["event"] == "round"]


def factors(folder: Path) -> dict[str, torch.Tensor]:
    """Of the result, and of every client's own adapter."""
    found = sorted(folder.glob("adapter/*.safetensors")) + sorted(folder.glob("personal/*/*.safetensors"))
    return {f"{path.parent.name}/{name}": value for path in found for name, value in load_file(path).items()}


def both(
    world: World,
    out: Path,
    public: Path,
    overrides: tuple[str, ...],
    groups: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Path, Path]:
    """The folders of a run with clients at once, so many in each training, and of the one without."""
    run(world, out / "alone", public, *overrides, "engine.stack=1")
    together: list[int] = []
    fit = gathering.fit_stacked
    monkeypatch.setattr(gathering, "fit_stacked", lambda jobs, **how: together.append(len(jobs)) or fit(jobs, **how))
    run(world, out / "stacked", public, *overrides)
    assert together == groups
    for one, other in zip(told(out / "stacked"), told(out / "alone"), strict=True):
        assert {key: one[key] for key in THE_SAME} == {key: other[key] for key in THE_SAME}
        assert one["clients"].keys() == other["clients"].keys()
        for client, metrics in other["clients"].items():
            mine = one["clients"][client]
            assert [mine[name] for name in ("weight", "tokens", "steps")] == [
                metrics[name] for name in ("weight", "tokens", "steps")
            ]
            loss = metrics["loss"]  # None where nobody may know it
            assert mine["loss"] == (None if loss is None else pytest.approx(loss, rel=1e-4))
    return out / "stacked", out / "alone"


@pytest.mark.parametrize("name", RUNS)
def test_a_run_with_clients_at_once_is_the_run_one_after_another(
    world: World, public: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, theirs = map(factors, both(world, tmp_path, public, *RUNS[name], monkeypatch))
    assert mine.keys() == theirs.keys()
    for factor, value in theirs.items():
        torch.testing.assert_close(
            mine[factor], value, rtol=1e-3, atol=1e-5, msg=lambda text, at=factor: f"{at}: {text}"
        )


def test_clients_whose_updates_are_hidden_by_noise(
    world: World, public: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The noise follows from every bit of the sum, and is another one: what is told before it is not."""
    privacy = (
        "privacy={kind: user, clip_norm: 0.5, delta: 1.0e-3, noise_multiplier: 0.5}",
        "aggregation.weights=equal",
        "scheduling.selection={kind: poisson, fraction: 1.0}",
        "rounds=1",
    )
    both(world, tmp_path, public, privacy, [4], monkeypatch)


@pytest.mark.parametrize(
    ("overrides", "at_once"),
    [
        ((), 4),
        (("engine.stack=3",), 3),
        (("engine.stack=1",), 1),
        (("engine=ray",), 1),
        (("scheduling.selection.fraction=0.5",), 2),
        (("scheduling.buffered={size: 2, concurrency: 3}",), 1),
        (("lora.dropout=0.1", "model.gradient_checkpointing=true"), 1),
        (("privacy={kind: sample, clip_norm: 0.5, delta: 1.0e-3, noise_multiplier: 1.0}", "local.clip_norm=0"), 1),
        (("engine.stack_mb=1", "lora={rank: 16, targets: all-linear}"), 1),
        (("engine.stack_mb=1", "lora={rank: 8, targets: all-linear}"), 2),
    ],
)
def test_check_says_how_many_are_trained_at_once(
    world: World, overrides: tuple[str, ...], at_once: int, tmp_path: Path
) -> None:
    """As many as a run does train at once, and what they may take together."""
    config = load_recipe(world.recipe, [*QUICK, *overrides])
    costs = estimate(config)
    assert costs.at_once == at_once
    [said] = [row for row in costs_table(costs) if "a round" in row and "clients" in row]
    assert (f"{at_once} trained at once" in said) == (at_once > 1)
    more = costs.memory_bytes - costs.client_memory_bytes
    assert (more > 0) == (at_once > 1 and "engine.stack_mb=1" not in overrides)
    assert more < 2048 * 2**20
    fed = federation(config, secret=bytes(KEY_BYTES))
    if isinstance(config.engine, InProcessEngine):
        with engine_of(config, fed, tmp_path, bytes(KEY_BYTES)) as engine:
            assert isinstance(engine, InProcess)
            assert at_once == (min(costs.cohort, engine.together.width) if engine.together else 1)


def costs_table(costs: Estimate) -> list[str]:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(estimate_table(costs))
    return console.export_text().splitlines()
