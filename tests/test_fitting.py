"""Gradient checkpointing by need: decided by what training takes and what the device has; no result changes."""

from dataclasses import replace
from pathlib import Path

import pytest

from conftest import World
from flocktune import api, footprint
from flocktune.cli.estimated import estimate_table
from flocktune.config.load import load_recipe
from flocktune.config.schema import RunConfig
from flocktune.estimate import estimate
from flocktune.federated import owners_side
from flocktune.fitting import fitted
from flocktune.models.recompute import is_checkpointed
from flocktune.report.events import LOG_NAME, read_events
from flocktune.resident import load_instructions

AUTO = "model.gradient_checkpointing=auto"
BIO = ("method=fedbiot", "emulator.adapter_layers=1", "emulator.drop=0", "alignment.first_steps=1", "alignment.steps=0")


def has(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """From now on devices have so many bytes."""
    monkeypatch.setattr(footprint, "device_memory_bytes", lambda device: size)


def recipe(world: World, *settings: str) -> RunConfig:
    return load_recipe(world.recipe, ("rounds=1", "evaluation.every=0", *settings))


def needs(config: RunConfig) -> int:
    """Bytes, as the estimate has them, with nothing computed again."""
    return estimate(replace(config, model=replace(config.model, gradient_checkpointing=False))).client_memory_bytes


def test_on_when_a_step_would_not_fit_and_only_then(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe(world, AUTO)
    rows = load_instructions(config.data.train, config.data, config.model).encoded
    needed = needs(config)
    for size, wanted in ((needed - 1, True), (needed, False)):
        has(monkeypatch, size)
        assert fitted(config, rows).model.gradient_checkpointing is wanted
        assert estimate(config).recompute is wanted
        for said in (True, False):
            plain = replace(config, model=replace(config.model, gradient_checkpointing=said))
            assert fitted(plain, rows) == plain
    has(monkeypatch, 0)
    assert fitted(config, rows.take([])).model.gradient_checkpointing is False, "nobody trains here"


def test_what_is_computed_again_needs_less(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, 0)
    costs = estimate(recipe(world, AUTO))
    assert costs.client_memory_bytes < needs(recipe(world))


@pytest.mark.parametrize("method", [(), BIO])
def test_it_changes_no_result_and_is_told(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: tuple[str, ...]
) -> None:
    public = (f"alignment.public={world.data}",) if method else ()
    config = recipe(world, *method, *public, AUTO)
    digests = []
    for size, told in ((0, True), (2**50, False)):
        has(monkeypatch, size)
        folder = tmp_path / str(told)
        digests.append(api.run(config, folder)["adapter_sha256"])
        assert read_events(folder / LOG_NAME)[0]["gradient_checkpointing"] is told
    assert digests[0] == digests[1]


def test_check_says_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for size, said in ((0, True), (2**50, False)):
        has(monkeypatch, size)
        table = estimate_table(estimate(recipe(world, AUTO)))
        cells = [str(cell) for column in table.columns for cell in column.cells]
        assert any("computed again" in cell for cell in cells) is said


def test_an_owner_decides_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from flocktune import federated

    loaded = []
    load = federated.load_base
    monkeypatch.setattr(federated, "load_base", lambda *args: loaded.append(load(*args)) or loaded[-1])
    for size in (0, 2**50):
        has(monkeypatch, size)
        owners_side(recipe(world, AUTO), "a", str(world.data))
    assert [is_checkpointed(base.model) for base in loaded] == [True, False]
