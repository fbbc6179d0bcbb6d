"""The only place that turns a recipe into objects: base model, data, clients, server, engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, assert_never

import numpy as np
import torch

from flocktune.algorithms import drift, factors, fedavg, fedbiot
from flocktune.algorithms.personal import with_fine_tuning
from flocktune.algorithms.preferences import PreferenceLoss, no_adapter, with_its_reference
from flocktune.algorithms.rules import diagnose
from flocktune.allocation import ClientRows, allocate_clients, check_rows, client_data
from flocktune.attacks import bad_rows, triggered
from flocktune.cohorts import EVERYONE, centralised_steps, scheduler
from flocktune.config.capabilities import personal_of
from flocktune.config.engines import FlowerEngine, InProcessEngine, RayEngine
from flocktune.config.factors import ByName
from flocktune.config.load import dump_recipe, parse_recipe, to_tree
from flocktune.config.personal import FineTune
from flocktune.config.privacy_rules import privacy_in_force
from flocktune.config.schema import (
    Dpo,
    RunConfig,
    SamplePrivacy,
)
from flocktune.data.batching import packing_leak
from flocktune.data.examples import rows_digest
from flocktune.emulation import (
    Emulated,
    alignment_settings,
    bundle_of,
    emulator_settings,
    load_emulator,
    pair_of,
    public_data,
    public_rows,
)
from flocktune.engine.in_process import InProcess
from flocktune.engine.ray_cluster import HalfSource, on_ray
from flocktune.engine.rounds import Collect
from flocktune.errors import Problem, UserError
from flocktune.evaluation.generate import prompt_room
from flocktune.evaluation.tasks import refuse_rows
from flocktune.fitting import fitted
from flocktune.gate import behind_gate, gate_digest
from flocktune.interfaces import ClientHalf, Engine, ServerHalf, Transform
from flocktune.models.bundle import read_bundle
from flocktune.models.load import load_skeleton
from flocktune.privacy.clients import ClientPrivacy
from flocktune.protection import (
    around_server,
    client_privacy,
    collect_of,
    returned_of,
    transforms_of,
)
from flocktune.resident import Base, Instructions, base_digest, load_base, load_instructions
from flocktune.scheduling import Cohort
from flocktune.sides import adapter_client, clients_side, corrected, emulator_client, preferences_of, trained_names
from flocktune.stacking import one_after_another, together
from flocktune.starting import starting_adapter, starting_emulator
from flocktune.types import ClientTask, Expected, Tensors, Update


@dataclass(frozen=True, eq=False)
class Assembly:
    """Everything a run needs. ``identity``: recipe, data and models, for a safe resume.

    ``base`` is what the result plugs into; ``model_digest`` names the model that clients must hold: the base itself, or
    with FedBiOT the emulator. ``triggered``: the held-out rows with a backdoor's trigger in them, when there is one to
    look for.
    """

    config: RunConfig
    base: Base
    data: ClientRows
    rounds: int
    kind: str
    start: Tensors
    server: ServerHalf
    client: ClientHalf
    schedule: Callable[[int], Cohort]
    model_digest: str
    identity: Mapping[str, Any]
    emulated: Emulated | None = None
    transforms: Sequence[Transform] = ()
    privacy: ClientPrivacy | None = None
    triggered: Instructions | None = None

    @property
    def diagnose(self) -> Callable[[Tensors, Sequence[Update]], Mapping[str, float]]:
        """What a round tells of its rule, of what went out and what came back."""
        return drift.diagnosed(diagnose(factors.sharing_of(self.config), self.server))

    def travels(self, task: ClientTask) -> Expected:
        """Names and shapes of what comes back over the wire for ``task``."""
        return returned_of(self.config, self.server, task)

    @property
    def collect(self) -> Collect:
        """How a round's replies are had."""
        return collect_of(self.config, self.server)


def federation(
    config: RunConfig, own_bundle: Path | None = None, data: ClientRows | None = None, secret: bytes | None = None
) -> Assembly:
    """Build everything a run needs from its recipe. Raises UserError.

    ``own_bundle``: where FedBiOT's run keeps its emulator; it is used when it is there, and made otherwise. ``data``:
    in place of what the recipe allocates. ``secret``: the run's key; differential privacy can not run without.
    The baselines are settings: ``base`` runs no round, ``local`` always selects one client, ``centralised`` has one
    client with all rows that takes as many steps a round as a whole cohort.
    """
    data = data or allocate_clients(config)
    if config.method == "fedbiot":
        return _fedbiot(config, data, own_bundle, secret)
    base = load_base(fitted(config, data.train.encoded).model, config.lora, config.runtime.device)
    local = config.local
    refuse_ranks(config, list(data.clients))
    if config.method == "centralised":
        local = replace(local, steps=centralised_steps(config, data.clients), epochs=None)
        data = replace(data, clients={EVERYONE: np.sort(np.concatenate(list(data.clients.values())))})
    refuse_leaks(config, base)
    check_context(config, data, base.model)
    rounds = 0 if config.method == "base" else config.rounds
    preferences = preferences_of(config, base.adapter)
    clients = client_data(config, base.pad_id, data, secret, preferences)
    sharing, start = factors.sharing_of(config), starting_adapter(config, base.adapter)
    identity = identity_of(config, data)
    half = adapter_client(config, base.adapter, clients, local, rounds=rounds)
    client = clients_side(config, data, with_its_reference(half, preferences))
    personal = personal_of(config)
    if isinstance(personal, FineTune):  # around all: what it makes does not travel
        client = with_fine_tuning(client, personal, base.adapter, clients, local)
    privacy = client_privacy(config, len(data.clients))
    server = factors.around_server(sharing, start, fedavg.server_half(config.aggregation))
    server = corrected(config, server, clients, data)
    return Assembly(
        config,
        base,
        data,
        privacy.affordable_or_refused() if privacy else rounds,
        fedavg.KIND,
        start,
        around_server(config, behind_gate(config, base, server), len(data.clients), secret),
        client,
        scheduler(config, data.clients, secret),
        identity["model"],
        identity,
        transforms=transforms_of(config),
        privacy=privacy,
        triggered=triggered(config, data.test),
    )


def _fedbiot(config: RunConfig, data: ClientRows, own_bundle: Path | None, secret: bytes | None) -> Assembly:
    """Both sides of FedBiOT in one process; the client's side is :func:`emulator_client`, as it is anywhere else."""
    check_context(config, data, load_skeleton(config.model))  # before rows are run through it to choose its layers
    bundle = bundle_of(config, own_bundle)
    emulated = load_emulator(fitted(config, data.train.encoded, bundle, aligns=True), bundle)
    base, pair = pair_of(config, emulated)
    refuse_leaks(config, emulated.base)
    public = public_data(config, base, data.test)
    digest = emulated.bundle.digest
    privacy = client_privacy(config, len(data.clients))
    server = fedbiot.server_half(
        pair,
        public,
        alignment_settings(config),
        config.aggregation,
        seed=config.seed,
        cache=emulator_settings(config),
    )
    server = corrected(config, server, client_data(config, emulated.base.pad_id, data), data)
    return Assembly(
        config,
        base,
        data,
        privacy.affordable_or_refused() if privacy else config.rounds,
        fedbiot.KIND,
        starting_emulator(config, pair),
        around_server(config, behind_gate(config, base, server), len(data.clients), secret),
        clients_side(config, data, emulator_client(config, emulated, data, secret)),
        scheduler(config, data.clients, secret),
        digest,
        {**identity_of(config, data), "public": public_rows(config).digest, "emulator": digest},
        emulated,
        transforms_of(config),
        privacy,
        triggered(config, data.test),
    )


def evaluation_loss(fed: Assembly, base: Base) -> PreferenceLoss | None:
    """The loss of held-out preference rows in ``base``, the model or the emulator; None for instructions."""
    dpo, emulated = fed.config.local.loss, fed.emulated
    if not isinstance(dpo, Dpo):
        return None
    on_emulator = emulated is not None and base is emulated.base
    if dpo.reference == "base":
        names = trained_names(base.adapter, emulated if on_emulator else None)
        return PreferenceLoss(dpo, base.adapter, no_adapter(base.adapter, names))
    if emulated is None:
        return PreferenceLoss(dpo, base.adapter, fed.start)
    start = {name: fed.start[name] for name in trained_names(emulated.base.adapter, emulated)}
    return PreferenceLoss(dpo, base.adapter, start if on_emulator else emulated.bundle.plan.to_full(start))


@contextmanager
def engine_of(config: RunConfig, fed: Assembly, folder: Path, secret: bytes | None = None) -> Iterator[Engine]:
    """Where the tasks of the run in ``folder`` are done, as long as the block lasts. Raises UserError."""
    match config.engine:
        case InProcessEngine():
            clients = fed.emulated.base if fed.emulated else fed.base
            names = trained_names(clients.adapter, fed.emulated)
            gathering = None if one_after_another(config) else together(config.engine, clients.adapter, names)
            yield InProcess(fed.client, together=gathering)
        case RayEngine():
            own_bundle = str(folder.resolve() / "emulator") if fed.emulated else None
            clients_own = secret.hex() if secret and isinstance(privacy_in_force(config), SamplePrivacy) else None
            source = HalfSource("flocktune.assemble:client_half_of", (dump_recipe(config), own_bundle, clients_own))
            with on_ray(config.engine, source, config.runtime.threads) as engine:
                yield engine
        case FlowerEngine():
            fix = "Start the run with: flocktune federation run DIR RECIPE"
            raise UserError(Problem("engine", "in_process or ray, for a run on this machine", "flower", fix))
        case unreachable:
            assert_never(unreachable)


def client_half_of(recipe_text: str, own_bundle: str | None = None, secret_hex: str | None = None) -> ClientHalf:
    """The client half alone, in another process than its run's. Raises UserError.

    ``own_bundle``: the folder of FedBiOT's emulator; where it is, the full model is not opened and need not exist.
    ``secret_hex``: the run's key, where clients make noise of their own.
    """
    config = parse_recipe(recipe_text)
    secret = bytes.fromhex(secret_hex) if secret_hex else None
    folder = Path(own_bundle) if own_bundle else None
    if folder is None or not folder.exists():
        return federation(config, folder, secret=secret).client
    bundle = read_bundle(folder)
    rows = allocate_clients(replace(config, model=replace(config.model, path=str(folder))))
    emulated = load_emulator(fitted(config, rows.train.encoded, bundle), bundle)
    return clients_side(config, rows, emulator_client(config, emulated, rows, secret))


def identity_of(config: RunConfig, data: ClientRows) -> dict[str, Any]:
    """What a checkpoint remembers: a resume with another recipe, other data or another base model is refused."""
    return {
        "recipe": to_tree(config),
        "data": data.train.digest,
        "test": data.test.digest,
        **({"validation": data.validation.digest} if data.validation else {}),
        "model": base_digest(config.model),
        **({"gate": digest} if (digest := gate_digest(config)) else {}),
        **({"attack": rows_digest(rows)} if (rows := bad_rows(config)) else {}),
    }


def refuse_ranks(config: RunConfig, clients: Sequence[str]) -> None:
    """Raise UserError for ranks of clients that there are not."""
    named = config.ranks.ranks if isinstance(config.ranks, ByName) else {}
    unknown = sorted(set(named) - set(clients))
    if unknown:
        raise UserError(Problem("ranks.ranks", f"clients of this run, such as {clients[0]}", ", ".join(unknown)))


def check_context(
    config: RunConfig, data: ClientRows, model: Any, load: Callable[..., Instructions] = load_instructions
) -> None:
    """Raise UserError when a row, or an answer with its prompt, has more tokens than the model has positions."""
    held_out = [data.test, *([data.validation] if data.validation else [])]
    check_rows([data.train, *held_out, *([public_rows(config, load)] if config.method == "fedbiot" else [])], model)
    if config.evaluation.generate and any(rows.examples for rows in held_out):
        prompt_room(model, config.evaluation.max_new_tokens)
    for rows in held_out:
        if rows.digest:  # what stands in for rows that are not here has none, and no answers
            refuse_rows(rows.examples, config.evaluation)


def refuse_leaks(config: RunConfig, base: Base) -> None:
    """Raise UserError when rows are packed and see each other in this model: it would learn from the wrong text."""
    if config.data.batching != "packed":
        return

    @torch.no_grad()
    def logits(input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        placed = {"input_ids": input_ids.to(base.device), "position_ids": position_ids.to(base.device)}
        return base.model(**placed, use_cache=False).logits

    if packing_leak(logits, base.model.config.get_text_config().vocab_size) > 1e-3:
        raise UserError(
            Problem(
                "data.batching",
                "padded, for this model",
                "packed, but packed rows see each other in it",
                "It does not tell rows apart by restarting position ids. Set data.batching: padded.",
            )
        )
