"""Who holds which rows: pure functions from categories, owners and a seed to index lists.

Sources: by_category follows the code of FedIT (arXiv 2305.05644), Dirichlet allocation
arXiv 1909.06335; both are drawn once, and clients that are short of ``min_rows`` are then helped by
those with the most, instead of drawing again until luck has it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar, assert_never

import numpy as np

from flocktune.config.schema import Allocation, ByCategory, ClusterDirichlet, Dirichlet, Iid, Natural, QuantitySkew
from flocktune.errors import Problem, UserError
from flocktune.seeds import derive_seed

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Partition:
    """Row indices of each client, ascending. Every row is in one client or in ``unassigned``."""

    clients: dict[str, list[int]]
    unassigned: list[int]


def hold_out(categories: Sequence[str], per_category: int, seed: int) -> tuple[list[int], list[int]]:
    """Split rows into (train, test), ascending: ``per_category`` of each category, at most half of it.

    What is drawn in one category does not depend on the others.
    """
    test: set[int] = set()
    for category, rows in _groups(categories).items():
        chosen = _generator(seed, "hold_out", category).permutation(rows)
        test.update(chosen[: min(per_category, len(rows) // 2)].tolist())
    return [row for row in range(len(categories)) if row not in test], sorted(test)


def allocate(
    allocation: Allocation,
    *,
    categories: Sequence[str],
    clients: Sequence[str | None],
    texts: Callable[[], Sequence[str]],
    seed: int,
) -> Partition:
    """Deal rows 0..len(categories)-1 out to clients.

    ``clients`` are the rows' own owners (for ``natural``); ``texts`` is called for clustering only.
    Raises UserError when there are fewer than clients x min_rows rows, or no owner is known.
    """
    if isinstance(allocation, Natural):
        return _natural(clients, allocation.min_rows)
    if len(clients) != len(categories):
        raise ValueError(f"{len(categories)} categories but {len(clients)} owners")
    count, rows = allocation.clients, len(categories)
    if rows < count * allocation.min_rows:
        raise UserError(
            Problem(
                "allocation",
                f"at least {count} clients x {allocation.min_rows} rows = {count * allocation.min_rows} training rows",
                f"{rows}",
                "Lower allocation.clients or allocation.min_rows, or give more rows.",
            )
        )
    match allocation:
        case Iid():
            parts = _split(_generator(seed, "iid").permutation(rows), np.full(count, 1 / count))
        case ByCategory():
            parts = _by_category(categories, count, allocation.categories_per_client, seed)
        case Dirichlet():
            parts = _dirichlet(categories, count, allocation.alpha, seed)
        case ClusterDirichlet():
            categories = text_clusters(texts(), allocation.clusters, seed)
            parts = _dirichlet(categories, count, allocation.alpha, seed)
        case QuantitySkew():
            random = _generator(seed, "quantity_skew")
            shares = random.dirichlet(np.full(count, allocation.alpha))
            parts = _split(random.permutation(rows), shares)
        case _:
            assert_never(allocation)
    help_short(parts, categories, allocation.min_rows)
    width = max(2, len(str(count)))
    return Partition({f"client-{at:0{width}d}": sorted(part) for at, part in enumerate(parts, start=1)}, [])


def text_clusters(texts: Sequence[str], clusters: int, seed: int) -> list[str]:
    """Name each text's cluster: TF-IDF, 64 latent dimensions, k-means. The same on every run.

    Never more clusters than different texts. Raises UserError when no text has a word.
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize
    from threadpoolctl import threadpool_limits

    state = derive_seed(seed, "clusters") % 2**32
    # One thread: the order of floating-point sums must not depend on the machine's load.
    with threadpool_limits(limits=1):
        try:
            features = TfidfVectorizer(max_features=8192, sublinear_tf=True).fit_transform(texts)
        except ValueError as error:
            raise UserError(Problem("allocation", "texts with words in them", str(error))) from None
        if min(features.shape) > 64:
            features = normalize(TruncatedSVD(64, random_state=state).fit_transform(features))
        number = min(clusters, len(set(texts)))
        labels = KMeans(number, n_init=3, random_state=state).fit_predict(features)
    width = len(str(clusters))
    return [f"cluster-{label + 1:0{width}d}" for label in labels]


def help_short(parts: list[list[int]], categories: Sequence[str], min_rows: int) -> None:
    """Move rows, in place, from the largest clients to those with fewer than ``min_rows``.

    A client is given rows of a category it already holds where the donor has any, else of the donor's
    largest category; so no one's categories multiply. Needs len(parts) * min_rows rows in all.
    """
    for receiver in sorted(range(len(parts)), key=lambda client: (len(parts[client]), client)):
        while (need := min_rows - len(parts[receiver])) > 0:
            donor = max(range(len(parts)), key=lambda client: (len(parts[client]), -client))
            held = {categories[row] for row in parts[receiver]}
            offered = _groups([categories[row] for row in parts[donor]])
            category = max(offered, key=lambda name: (name in held, len(offered[name]), name))
            moved = offered[category][: min(need, len(parts[donor]) - min_rows)]
            parts[receiver] += [parts[donor][at] for at in moved]
            gone = set(moved)
            parts[donor] = [row for at, row in enumerate(parts[donor]) if at not in gone]


def _natural(clients: Sequence[str | None], min_rows: int) -> Partition:
    """Rows stay with their owners; a client short of ``min_rows`` is left out, as nobody may give it rows."""
    owned = _groups(clients)
    unowned = owned.pop(None, [])
    if not owned:
        raise UserError(
            Problem("allocation.kind", "rows that name their client, for 'natural'", "rows without one",
                    "Name the column in data.columns.client, or give a folder with one file per client.")
        )  # fmt: skip
    kept = {client: owned[client] for client in sorted(owned, key=str) if len(owned[client]) >= min_rows}
    if not kept:
        largest = max(len(rows) for rows in owned.values())
        raise UserError(
            Problem("allocation.min_rows", f"a client with at least {min_rows} rows", f"at most {largest} rows each")
        )
    left = [row for client, rows in owned.items() if client not in kept for row in rows]
    return Partition({str(client): rows for client, rows in kept.items()}, sorted(unowned + left))


def _by_category(categories: Sequence[str], clients: int, per_client: int, seed: int) -> list[list[int]]:
    """Sort by category, cut into clients x per_client shards, shuffle the shards, deal them out."""
    random = _generator(seed, "by_category")
    shuffled = random.permutation(len(categories))
    ordered = np.array(sorted(shuffled.tolist(), key=lambda row: categories[row]), np.int64)
    shards = np.array_split(ordered, clients * per_client)
    dealt = random.permutation(len(shards)).reshape(clients, per_client)
    return [[row for shard in own for row in shards[shard].tolist()] for own in dealt]


def _dirichlet(categories: Sequence[str], clients: int, alpha: float, seed: int) -> list[list[int]]:
    """Each category's rows over all clients in shares drawn from Dirichlet(alpha)."""
    parts: list[list[int]] = [[] for _ in range(clients)]
    for category, rows in _groups(categories).items():
        random = _generator(seed, "dirichlet", category)
        shares = random.dirichlet(np.full(clients, alpha))
        for part, piece in zip(parts, _split(random.permutation(rows), shares), strict=True):
            part += piece
    return parts


def _split(rows: np.ndarray, shares: np.ndarray) -> list[list[int]]:
    """Cut ``rows`` in proportion to ``shares`` (which sum to 1); every row lands in one part."""
    cuts = np.rint(np.cumsum(shares)[:-1] * len(rows)).astype(int)
    return [part.tolist() for part in np.split(rows, cuts)]


def _groups(keys: Sequence[Key]) -> dict[Key, list[int]]:
    """Indices by key, in order of first appearance."""
    groups: dict[Key, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        groups[key].append(index)
    return dict(groups)


def _generator(seed: int, *purpose: str) -> np.random.Generator:
    return np.random.default_rng(derive_seed(seed, *purpose))
