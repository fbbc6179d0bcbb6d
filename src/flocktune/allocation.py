"""Client data allocation as a recipe asks for it: rows that are held out, and who holds which of the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flocktune.algorithms.local import ClientData, steps_per_round
from flocktune.algorithms.preferences import Preferences
from flocktune.algorithms.private_rows import PrivateRows
from flocktune.attacks import attackers, poisoned
from flocktune.config.privacy_rules import privacy_in_force
from flocktune.config.schema import RunConfig, SamplePrivacy
from flocktune.data.batching import training_batches
from flocktune.data.canaries import canaries
from flocktune.data.examples import rows_digest
from flocktune.data.heterogeneity import category_counts, heterogeneity
from flocktune.data.partition import Partition, allocate, hold_out
from flocktune.errors import Problem, UserError
from flocktune.privacy.noise import derive_key
from flocktune.resident import Instructions, load_instructions, with_more
from flocktune.seeds import derive_seed
from flocktune.training import next_token_loss


@dataclass(frozen=True, eq=False)
class ClientRows:
    """Client data allocation, done: who holds which rows of ``train``, and what is held out.

    ``validation``: rows that evaluations on the way are made on, where the recipe has any; else ``test`` serves.
    ``own_test``: rows of ``train`` that are a client's too, on which it does not train but is evaluated.
    ``attackers``: of a simulation; their rows are as they have them.
    """

    train: Instructions
    test: Instructions
    clients: Mapping[str, NDArray[np.int64]]
    unassigned: int
    own_test: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    attackers: tuple[str, ...] = ()
    validation: Instructions | None = None

    def describe(self) -> dict[str, Any]:
        """What a run tells about its data: counts and a digest, no text. Of owners' rows elsewhere nothing is known."""
        test = {**self._held_out(), "test_digest": rows_digest(self.test.examples)}
        if not self.train.examples:
            return {"clients": {}, "owners": list(self.clients), **test}
        categories = self.train.categories
        counts = category_counts(self.clients, categories)
        lengths = self.train.encoded.lengths
        return {
            "clients": {
                name: {
                    "rows": len(rows),
                    "tokens": int(lengths[rows].sum()),
                    "categories": {category: count for category, count in counts[name].items() if count},
                }
                for name, rows in self.clients.items()
            },
            "heterogeneity": asdict(heterogeneity(self.clients, categories)),
            **test,
            "untrainable_rows": len(self.train.report.untrainable),
            "truncated_rows": self.train.report.truncated,
            "unassigned_rows": self.unassigned,
            **({"attackers": list(self.attackers)} if self.attackers else {}),
        }

    def _held_out(self) -> dict[str, dict[str, int]]:
        parts = {"test": self.test, **({"validation": self.validation} if self.validation else {})}
        return {part: dict(sorted(Counter(rows.categories).items())) for part, rows in parts.items()}


def allocate_clients(config: RunConfig, load: Callable[..., Instructions] = load_instructions) -> ClientRows:
    """Hold out test rows and validation rows, then deal the others out. ``load`` reads them. Raises UserError."""
    data = config.data
    pairs = config.local.on_pairs
    train = load(data.train, data, config.model, pairs=pairs)
    usable = np.flatnonzero(train.encoded.targets > 0).tolist()
    if data.test is None:
        categories = train.categories
        kept, held = hold_out([categories[row] for row in usable], data.test_rows_per_category, config.seed)
        test = train.take([usable[row] for row in held])
        usable = [usable[row] for row in kept]
    else:
        test = load(data.test, replace(data, max_rows=None), config.model, pairs=pairs)
    validation = given_validation(config, test, load)
    if data.validation_rows_per_category:
        usable, held = hold_out_validation(config, usable, train.categories)
        validation = train.take(held)
    rows = np.array(usable, dtype=np.int64)
    partition: Partition = allocate(
        config.allocation,
        categories=[train.examples[row].category for row in usable],
        clients=[train.examples[row].client for row in usable],
        texts=lambda: [f"{train.examples[row].instruction} {train.examples[row].context}" for row in usable],
        seed=config.seed,
    )
    clients = {name: rows[part] for name, part in partition.clients.items()}
    clients, own_test = hold_out_own(clients, config.evaluation.client_rows, config.seed)
    guilty = attackers(config, list(clients))
    train = poisoned(config, train, clients, guilty)
    unassigned = len(partition.unassigned)
    return with_canaries(config, ClientRows(train, test, clients, unassigned, own_test, guilty, validation))


def hold_out_validation(
    config: RunConfig, rows: Sequence[int], categories: Sequence[str]
) -> tuple[list[int], list[int]]:
    """(rows to train on, rows that choose) of ``rows``, those that are no test rows; ``categories`` are of all rows."""
    of_each, seed = config.data.validation_rows_per_category, derive_seed(config.seed, "validation")
    kept, held = hold_out([categories[row] for row in rows], of_each, seed)
    return [rows[row] for row in kept], [rows[row] for row in held]


def given_validation(
    config: RunConfig, test: Instructions, load: Callable[..., Instructions] = load_instructions
) -> Instructions | None:
    """The rows of ``data.validation``, when the recipe names some. Raises UserError, also for rows of ``test``."""
    data = config.data
    if data.validation is None:
        return None
    rows = load(data.validation, replace(data, max_rows=None), config.model, pairs=config.local.on_pairs)
    asked = {(one.history, one.instruction, one.context) for one in test.examples if one.instruction}
    both = sum((one.history, one.instruction, one.context) in asked for one in rows.examples)
    if both:
        got = f"{both} of {len(rows.examples)} that are"
        raise UserError(Problem("data.validation", "rows that are not in the test set", got, "Keep the two apart."))
    return rows


def with_canaries(config: RunConfig, rows: ClientRows) -> ClientRows:
    """``rows``, and the recipe's canaries among one client's. Raises UserError for a client that is not there."""
    settings = config.canaries
    if settings is None:
        return rows
    client = next(iter(rows.clients)) if settings.client is None else settings.client
    if client not in rows.clients:
        names = ", ".join(list(rows.clients)[:20])
        raise UserError(Problem("canaries.client", f"one of {names}", repr(client)))
    secrets = canaries(settings, config.seed) * settings.repeats
    train = with_more(rows.train, secrets, config.data, config.model)
    mine = np.concatenate([rows.clients[client], np.arange(len(rows.train.encoded), len(train.encoded))])
    return replace(rows, train=train, clients={**rows.clients, client: mine})


def hold_out_own(
    clients: Mapping[str, NDArray[np.int64]], count: int, seed: int
) -> tuple[dict[str, NDArray[np.int64]], dict[str, NDArray[np.int64]]]:
    """(rows to train on, rows held out) of each client, ascending: ``count`` held out, but one at least is trained on.

    A client that has one row alone is not among those that are evaluated. What is drawn of one client does not depend
    on the others.
    """
    kept, held = dict(clients), {}
    for name, rows in clients.items():
        wanted = min(count, len(rows) - 1)
        if wanted > 0:
            order = np.random.default_rng(derive_seed(seed, "own_test", name)).permutation(rows)
            held[name], kept[name] = np.sort(order[:wanted]), np.sort(order[wanted:])
    return kept, held


def client_data(
    config: RunConfig,
    pad_id: int,
    data: ClientRows,
    secret: bytes | None = None,
    preferences: Preferences | None = None,
) -> Callable[[str], ClientData]:
    """Each client's own rows, as batches, and what is minimised on them; asked anew for every task.

    ``secret``: of which the keys of clients' own noise are made, where the recipe hides rows; without one it can not.
    """
    encoded = data.train.encoded
    settings, local = privacy_in_force(config), config.local

    def private(client: str) -> PrivateRows | None:
        if not isinstance(settings, SamplePrivacy):
            return None
        rows = data.clients[client]
        return PrivateRows(
            settings,
            encoded,
            rows.tolist(),
            pad_id,
            batch=local.batch_size * local.accumulate,
            steps=steps_per_round(local, len(rows)),
            rounds=config.rounds,
            key=derive_key(secret, "client", client) if secret else None,
        )

    def of(client: str) -> ClientData:
        rows = data.clients[client]
        loss = preferences.loss() if preferences else None
        return ClientData(
            len(rows),
            int(encoded.targets[rows].sum()),
            lambda seed, steps, epochs: training_batches(
                encoded,
                rows,
                batch_size=config.local.batch_size,
                batching=config.data.batching,
                pad_id=pad_id,
                seed=seed,
                steps=steps,
                epochs=epochs,
            ),
            private(client),
            loss or next_token_loss,
            loss.metrics if loss else dict,
        )

    return of


def check_rows(parts: Sequence[Instructions], model: Any) -> None:
    """Raise UserError when a row has more tokens than the model has positions."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(rows.encoded.longest for rows in parts)
    if positions is not None and longest > positions:
        raise UserError(
            Problem(
                "data.max_tokens",
                f"at most the {positions} tokens of the model's context",
                f"a row of {longest}",
                f"Set data.max_tokens to {positions} or less.",
            )
        )
