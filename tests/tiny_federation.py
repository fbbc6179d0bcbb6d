"""A federation without a network: owners in this process behind a link in memory, every parcel as text and bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from conftest import CATEGORIES, dolly_rows, write_rows
from flocktune.audit import AuditLog
from flocktune.config.load import build_config, config_digest, load_recipe, to_tree
from flocktune.engine.parcels import TASK, Lost, Parcel, from_text, to_text
from flocktune.federation.serving import Roster, _engine
from flocktune.models.bundle import Bundle, read_bundle
from flocktune.owner.home import POLICY
from flocktune.owner.policy import write_policy
from flocktune.owner.tasks import Owner
from flocktune.run_folder import create_run
from flocktune.runs import Elsewhere, execute
from tiny_models import tiny_model, tiny_tokenizer

SIZES = {"alice": 7, "bob": 11, "carol": 16}
RUN = "run-of-the-tests"

SETTINGS = """
name: apart
rounds: 2
model: {path: FOLDER/model}
lora: {rank: 2, alpha: 4.0, targets: [q_proj, down_proj]}
data: {train: FOLDER/owners, test: FOLDER/test.jsonl, template: short, max_tokens: 96, test_rows_per_category: 0}
allocation: {kind: natural}
local: {steps: 2, batch_size: 4, lr: 1.0e-2}
evaluation: {generate: false}
engine: {stack: 1}  # the bits of clients by themselves
runtime: {device: cpu, threads: 1}
"""
FEDBIOT = (
    "method=fedbiot",
    "emulator={adapter_layers: 2, drop: 0.34}",
    "alignment={public: FOLDER/public.jsonl, first_steps: 3, steps: 1, batch_size: 4, fidelity_rows: 4}",
    "local.proximal_mu=0.01",
    "local.proximal_on=products",
)


def make_federated_world(folder: Path) -> Path:
    """Write a model of five layers, one file of rows per client, test and public rows, and a recipe to ``folder``."""
    tiny_model("llama", num_hidden_layers=5).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "owners").mkdir()
    rows = dolly_rows(sum(SIZES.values()) + 6)
    for client, size in SIZES.items():
        write_rows(folder / "owners" / f"{client}.jsonl", [rows.pop() for _ in range(size)])
    write_rows(folder / "test.jsonl", rows)
    public = [{"instruction": f"Say {i}", "input": "", "output": f"{CATEGORIES[i % 3]} {i}"} for i in range(24)]
    write_rows(folder / "public.jsonl", public)
    (folder / "recipe.yaml").write_text(SETTINGS.replace("FOLDER", str(folder)))
    return folder


def make_owner(world: Path, client: str, home: Path, **changes: Any) -> Owner:
    """An owner with the default policy and the world's base model."""
    home.mkdir(parents=True, exist_ok=True)
    if not (home / POLICY).exists():
        write_policy(home / POLICY)
    data = str(world / "owners" / f"{client}.jsonl")
    return Owner(**{"client": client, "home": home, "data": data, "model": str(world / "model"), **changes})


@dataclass
class Direct:
    """A link to owners in this process. ``sent`` keeps what went down, ``came`` what came up, in order."""

    answer: Mapping[str, Callable[[Parcel], Parcel]]
    sent: list[tuple[str, Parcel]] = field(default_factory=list)
    came: list[tuple[str, Parcel]] = field(default_factory=list)

    def connected(self) -> set[str]:
        return set(self.answer)

    def send(self, parcels: Mapping[str, Parcel], lifetime_s: float) -> Mapping[str, str]:
        numbers = {}
        for client, parcel in parcels.items():
            self.sent.append((client, over_the_wire(parcel)))
            numbers[client] = str(len(self.sent) - 1)
        return numbers

    def receive(self, asked: Mapping[str, str], limit_bytes: int) -> Iterator[tuple[str, Parcel | Lost]]:
        for client in sorted(asked, reverse=True):  # not the order of the tasks
            _, parcel = self.sent[int(asked[client])]
            reply = over_the_wire(self.answer[client](parcel))
            self.came.append((client, reply))
            yield client, reply


def over_the_wire(parcel: Parcel) -> Parcel:
    """As the other side gets it."""
    return from_text(to_text(parcel), bytes(parcel.blob))


def new_run(world: Path, folder: Path, *overrides: str) -> Path:
    """A run's folder that was not begun."""
    create_run(
        load_recipe(world / "recipe.yaml", [each.replace("FOLDER", str(world)) for each in overrides]),
        folder,
    )
    return folder


def run_apart(folder: Path, link: Direct, clients: tuple[str, ...] = tuple(SIZES), **options: Any) -> dict[str, Any]:
    """Run ``folder`` with clients behind ``link``, as the coordinator's process does; the summary."""
    roster = Roster(RUN, clients, str(folder))
    audit = AuditLog(folder / "audit.jsonl")
    return execute(folder, elsewhere=Elsewhere(clients, _engine(link, roster, audit)), **options)


_NUMBERS = count()


def new_nonce() -> str:
    """One that was not used before."""
    return f"nonce-{next(_NUMBERS)}"


@dataclass(frozen=True)
class Scene:
    """A world, and what a coordinator's first round sends to bob: FedIT's tensors, FedBiOT's, and its emulator."""

    world: Path
    first: Parcel
    biot: Parcel
    emulator: Bundle

    def task(self, *overrides: str, first: Parcel | None = None, **changes: Any) -> Parcel:
        """A sound task of another recipe; ``changes`` are made to parcel and task alike."""
        parcel = first or self.first
        config = load_recipe(self.world / "recipe.yaml", [*overrides])
        return self.of_tree(to_tree(config), parcel, **changes)

    def of_tree(self, tree: Mapping[str, Any], parcel: Parcel | None = None, **changes: Any) -> Parcel:
        parcel = parcel or self.first
        fields = copy.deepcopy(dict(parcel.fields))
        fields["nonce"] = new_nonce()
        fields["recipe"] = dict(tree)
        fields["task"]["config_digest"] = config_digest(build_config(tree))
        for key, value in changes.items():
            if key in fields:
                fields[key] = value
            if key in fields["task"]:
                fields["task"][key] = value
        return Parcel(TASK, fields, parcel.blob)

    def biot_task(self, *overrides: str, **changes: Any) -> Parcel:
        settings = [each.replace("FOLDER", str(self.world)) for each in FEDBIOT]
        return self.task(*settings, *overrides, first=self.biot, **changes)


def make_scene(folder: Path) -> Scene:
    """Record one run of each method with bob alone."""
    world = make_federated_world(folder)
    sent = []
    for name, overrides in (("fedit", ()), ("fedbiot", FEDBIOT)):
        link = Direct({"bob": make_owner(world, "bob", folder / f"home-{name}").answer})
        run_apart(new_run(world, folder / name, *overrides), link, ("bob",))
        sent.append(link.sent[0][1])
    return Scene(world, *sent, read_bundle(folder / "fedbiot" / "emulator"))
