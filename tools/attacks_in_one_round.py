"""Attacks by two of ten clients against every rule and the gate, in one round: each client is trained once, and every
cell combines the same updates. A cell is what `flocktune run recipes/study_attacks.yaml`'s recipe gives with rounds=1.

    python tools/attacks_in_one_round.py --seed 0 > seed-0.jsonl
    python tools/attacks_in_one_round.py --seed 0 --second --methods Mean Gate > seed-0-second.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flocktune.aggregation.mean import weighted_mean
from flocktune.assemble import Assembly, federation
from flocktune.attacks import untriggered_success
from flocktune.config.robustness import Backdoor, GateConfig
from flocktune.config.schema import RunConfig
from flocktune.config.study import load_study
from flocktune.engine.rounds import combine
from flocktune.gate import prober, reasons
from flocktune.protection import around_server
from flocktune.runs import evaluate_adapter
from flocktune.seeds import derive_seed
from flocktune.types import ClientTask, Tensors, Update

STUDY = Path(__file__).parent.parent / "recipes/study_attacks.yaml"
STEPS = 10
TRIGGERED_ROWS = 24
"""Held-out rows that are answered, with the trigger and without."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS, help="local steps of each client")
    parser.add_argument("--second", action="store_true", help="attack in the second round, after an honest first")
    parser.add_argument("--methods", nargs="*", help="of the study; all when none is named")
    told = parser.parse_args()
    recipes = {(cell.method, cell.setting): cell.config for cell in load_study(STUDY).cells}
    small = {"rounds": 1, "seed": told.seed}
    honest: dict[str, Update] = {}
    start: Tensors | None = None
    for setting in dict.fromkeys(setting for _, setting in recipes):
        config = replace(recipes["Mean", setting], **small)
        config = replace(config, local=replace(config.local, steps=told.steps))
        fed = federation(config)
        if told.second:
            start = start or averaged(fed, [trained(fed, client, 0) for client in fed.schedule(0).asked])
            fed = replace(fed, start=start)
        updates = {}
        for client in fed.schedule(0).asked:
            if client in fed.data.attackers or client not in honest:
                updates[client] = trained(fed, client, int(told.second))
            else:
                updates[client] = honest[client]
        if not fed.data.attackers:
            honest = updates
        for (method, at), recipe in recipes.items():
            if at == setting and (not told.methods or method in told.methods):
                show(cell(fed, replace(config, aggregation=recipe.aggregation), recipe.gate, list(updates.values())),
                     method=method, setting=setting, seed=told.seed)  # fmt: skip


def averaged(fed: Assembly, updates: list[Update]) -> Tensors:
    """The adapter after a round of the mean."""
    return fed.server.result(fed.server.step(fed.server.init(fed.start), weighted_mean(updates)))


def trained(fed: Assembly, client: str, number: int) -> Update:
    """One client's update of the first round, or the second."""
    message = fed.server.message(fed.server.init(fed.start), 0)
    seed = derive_seed(fed.config.seed, number, client)
    return fed.client(ClientTask(number, client, fed.kind, message, seed, "", fed.model_digest), {})[0]


def cell(fed: Assembly, config: RunConfig, gate: GateConfig | None, updates: list[Update]) -> dict[str, Any]:
    """What one rule, or the mean and the gate, make of the updates."""
    server = around_server(config, replace(fed.server, combine=None))
    state = server.init(fed.start)
    stepped = server.step(state, combine(server, updates, server.message(state, 0)))
    numbers: dict[str, Any] = {}
    adapter = server.result(stepped)
    if gate:
        try_out = prober(config, gate, fed.base)
        before, after = try_out(fed.start), try_out(adapter)
        why = reasons(gate, after, before.loss)
        numbers["rolled_back"] = bool(why)
        adapter = fed.start if why else adapter
    return {**numbers, **scores(fed, adapter)}


def scores(fed: Assembly, adapter: Tensors) -> dict[str, Any]:
    """The held-out loss in nats a token, and how often the backdoor's target is said."""
    silent = replace(fed, config=replace(fed.config, evaluation=replace(fed.config.evaluation, generate=False)))
    numbers = {"loss": evaluate_adapter(silent, fed.base, adapter, fed.data.test).overall["loss"].value}
    attack = fed.config.attack
    if isinstance(attack, Backdoor) and fed.triggered:
        with_trigger = evaluate_adapter(fed, fed.base, adapter, fed.triggered, TRIGGERED_ROWS)
        numbers["with_trigger"] = with_trigger.overall["contains"].value
        plain = evaluate_adapter(fed, fed.base, adapter, fed.data.test, TRIGGERED_ROWS)
        numbers["without_trigger"] = untriggered_success(fed.config, plain.answers)
    return numbers


def show(numbers: Mapping[str, Any], **named: Any) -> None:
    print(json.dumps({**named, **numbers}), flush=True)


if __name__ == "__main__":
    main()
