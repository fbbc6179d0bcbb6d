"""An audit of a finished run: what its result gives away of the rows that clients trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from flocktune.allocation import ClientRows, allocate_clients
from flocktune.config.load import load_recipe
from flocktune.config.schema import RunConfig
from flocktune.data.batching import Indices
from flocktune.data.canaries import CATEGORY, canaries, others
from flocktune.data.encoding import Encoded, encode
from flocktune.errors import Problem, UserError
from flocktune.evaluation.memorisation import exposure, membership, row_losses
from flocktune.files import write_json
from flocktune.report.events import LOG_NAME, read_events
from flocktune.results import Tuned, find_run, open_result
from flocktune.seeds import derive_seed

RESULT = "memorisation.json"
"""In a run's folder."""


def memorisation(path: Path, method: str | None = None, *, max_rows: int = 1000, candidates: int = 511) -> Path:
    """Attack the run in ``path`` (of a comparison: ``method``'s) and write what came out to its folder.

    ``membership``: AUC of telling rows that were trained on from held-out ones, by their loss, and by how much the
    loss fell below the base model's. ``canaries``: exposure of each, under the result and under the base, among
    ``candidates`` other secrets. Rows are those of clients who took part and, as many of each category, held-out ones,
    at most ``max_rows`` of them. Raises UserError.
    """
    run = find_run(path, method)
    config = load_recipe(run / "recipe.yaml")
    if config.local.on_pairs:
        raise UserError(Problem("local.loss", "a loss on single answers, to be attacked", config.local.loss.kind))
    rows = allocate_clients(config)
    tuned = open_result(run)
    found: dict[str, Any] = {"run": config.name, "seed": config.seed}
    took_part = {
        name for event in read_events(run / LOG_NAME) if event["event"] == "round" for name in event["answered"]
    }
    found["membership"] = _membership(tuned, rows, took_part, max_rows)
    if config.canaries is not None:
        found["canaries"] = _exposures(tuned, config, candidates)
    write_json(run / RESULT, found)
    return run / RESULT


def _membership(tuned: Tuned, rows: ClientRows, took_part: set[str], max_rows: int) -> dict[str, Any]:
    categories = rows.train.categories
    mine = [row for name in sorted(took_part & set(rows.clients)) for row in rows.clients[name].tolist()]
    held_out = np.flatnonzero(rows.test.encoded.targets > 0).tolist()
    members, outsiders = matched(
        [row for row in _some(mine, len(mine), tuned.config.seed) if categories[row] != CATEGORY],
        _some(held_out, max_rows, tuned.config.seed).tolist(),
        categories,
        rows.test.categories,
    )
    for what, found in (("clients' rows that took part", members), ("held-out rows", outsiders)):
        if not len(found):
            raise UserError(Problem("memorisation", what, "none", "The attack tells the two apart, and needs both."))
    parts = [(rows.train.encoded, members), (rows.test.encoded, outsiders)]
    after = [_losses(tuned, encoded, chosen) for encoded, chosen in parts]
    with tuned.base.adapter.disabled():
        before = [_losses(tuned, encoded, chosen) for encoded, chosen in parts]
    return {
        "loss": membership(-after[0], -after[1]).as_dict(),
        "loss_below_base": membership(before[0] - after[0], before[1] - after[1]).as_dict(),
        "mean_loss": {"members": float(after[0].mean()), "outsiders": float(after[1].mean())},
    }


def _exposures(tuned: Tuned, config: RunConfig, candidates: int) -> dict[str, Any]:
    """Bits of every canary, under the result and under the base."""
    settings = config.canaries
    assert settings is not None
    secrets = canaries(settings, config.seed)
    found: dict[str, list[float]] = {"tuned": [], "base": []}
    for number, secret in enumerate(secrets):
        asked = [secret, *others(settings, config.seed, number, candidates)]
        data = config.data
        encoded, _ = encode(
            asked, tuned.base.tokenizer, template=data.template, max_tokens=data.max_tokens, train_on="responses"
        )
        losses = _losses(tuned, encoded, np.arange(len(asked)))
        found["tuned"].append(exposure(losses[0], losses[1:]))
        with tuned.base.adapter.disabled():
            losses = _losses(tuned, encoded, np.arange(len(asked)))
        found["base"].append(exposure(losses[0], losses[1:]))
    means = {f"mean_{name}": float(np.mean(bits)) for name, bits in found.items()}
    return {**found, **means, "most_bits": float(np.log2(candidates + 1))}


def matched(
    members: Sequence[int], outsiders: Sequence[int], mine: Sequence[str], theirs: Sequence[str]
) -> tuple[Indices, Indices]:
    """As many members as outsiders of every category, the first ones: else the attack would tell categories apart.

    ``mine`` and ``theirs`` are the categories of the rows that the indices mean.
    """
    room = Counter(theirs[row] for row in outsiders) & Counter(mine[row] for row in members)

    def taken(rows: Sequence[int], names: Sequence[str]) -> Indices:
        left, found = Counter(room), []
        for row in rows:
            if left[names[row]] > 0:
                left[names[row]] -= 1
                found.append(row)
        return np.array(found, np.int64)

    return taken(members, mine), taken(outsiders, theirs)


def _losses(tuned: Tuned, encoded: Encoded, chosen: Indices) -> Any:
    size = tuned.config.evaluation.batch_size
    return row_losses(tuned.base.model, encoded, chosen, batch_size=size, pad_id=tuned.base.pad_id)


def _some(rows: list[int], most: int, seed: int) -> Indices:
    """At most ``most`` of ``rows``, drawn by the seed."""
    return np.random.default_rng(derive_seed(seed, "memorisation")).permutation(np.array(rows, np.int64))[:most]


def leakage_table(found: dict[str, Any]) -> Table:
    """The audit for a terminal."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    attacks = {"loss": "membership, by loss", "loss_below_base": "membership, by loss below the base's"}
    for key, title in attacks.items():
        one = found["membership"][key]
        low, high = one["interval"]
        sizes = f"{one['members']:,} rows trained on, {one['outsiders']:,} held out"
        table.add_row(title, f"AUC {one['auc']:.3f}, 95 % interval {low:.3f} to {high:.3f} (0.5 is guessing); {sizes}")
    if known := found.get("canaries"):
        table.add_row(
            f"{len(known['tuned'])} canaries, exposure",
            f"{known['mean_tuned']:.2f} bits on average, at most {max(known['tuned']):.2f} of {known['most_bits']:.2f};"
            f" base model {known['mean_base']:.2f} (1.44: nothing is known)",
        )
    return table
