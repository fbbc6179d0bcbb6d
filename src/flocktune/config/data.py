"""Where instructions are, how they become tokens, and who holds which: settings of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from flocktune.config.names import EMBEDDED
from flocktune.config.numbers import Count, Positive, PositiveFloat


@dataclass(frozen=True)
class Columns:
    """Which column holds what; None means: found by the usual names (Dolly, Alpaca, chat, prompt/completion).

    ``chosen`` and ``rejected`` are the two answers of preference data: texts, or lists of messages. ``choices``: the
    answers to choose from; ``response`` is then the right one, or its number from 0, or its letter. ``test`` and
    ``entry_point``: the program that tries an answer which is code, and the function that it tries.
    """

    instruction: str | None = None
    context: str | None = None
    response: str | None = None
    messages: str | None = None
    category: str | None = None
    client: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    choices: str | None = None
    test: str | None = None
    entry_point: str | None = None


@dataclass(frozen=True)
class CustomTemplate:
    """A user's own prompt. ``{instruction}`` and ``{context}`` are filled in; the response follows at once."""

    with_context: str
    without_context: str


@dataclass(frozen=True)
class DataConfig:
    """Where the instructions are and how they become tokens.

    ``train``/``test``: a JSON, JSONL, CSV or Parquet file, a saved Hugging Face dataset folder, a folder
    of one file per client (allocation ``natural``), a hub id, ``embedded``, or ``embedded-preferences``. Without
    ``test``, ``test_rows_per_category`` rows of each category are held out of ``train`` first. Rows that evaluations on
    the way are made on, so that the test rows choose nothing: ``validation`` (as ``test``), or
    ``validation_rows_per_category`` of each category, held out of ``train`` next; by default there are none.
    ``max_tokens`` bounds prompt + response; the prompt is cut first, down to a quarter of it.
    """

    train: str = EMBEDDED
    test: str | None = None
    validation: str | None = None
    columns: Columns = field(default_factory=Columns)
    template: Literal["alpaca", "short", "chat"] | CustomTemplate = "alpaca"
    max_tokens: Annotated[int, Field(ge=8)] = 512
    train_on: Literal["responses", "everything"] = "responses"
    test_rows_per_category: Count = 10
    validation_rows_per_category: Count = 0
    max_rows: Positive | None = None
    batching: Literal["padded", "packed"] = "padded"


# --- client data allocation ------------------------------------------------------------------------


@dataclass(frozen=True)
class Iid:
    """Rows are dealt out at random, in equal amounts."""

    clients: Positive = 10
    min_rows: Count = 1
    kind: Literal["iid"] = "iid"


@dataclass(frozen=True)
class ByCategory:
    """Shepherd's split: rows sorted by category, cut into shards, ``categories_per_client`` shards each."""

    clients: Positive = 10
    categories_per_client: Positive = 2
    min_rows: Count = 1
    kind: Literal["by_category"] = "by_category"


@dataclass(frozen=True)
class Dirichlet:
    """Each category is spread over clients by Dirichlet(alpha): small alpha, few categories per client."""

    clients: Positive = 10
    alpha: PositiveFloat = 0.5
    min_rows: Count = 1
    kind: Literal["dirichlet"] = "dirichlet"


@dataclass(frozen=True)
class ClusterDirichlet:
    """Dirichlet over text clusters (TF-IDF + k-means), for data without a category."""

    clients: Positive = 10
    alpha: PositiveFloat = 0.5
    clusters: Positive = 8
    min_rows: Count = 1
    kind: Literal["cluster_dirichlet"] = "cluster_dirichlet"


@dataclass(frozen=True)
class QuantitySkew:
    """Same mix everywhere, very different amounts: sizes drawn from Dirichlet(alpha) over clients."""

    clients: Positive = 10
    alpha: PositiveFloat = 0.5
    min_rows: Count = 1
    kind: Literal["quantity_skew"] = "quantity_skew"


@dataclass(frozen=True)
class Natural:
    """The data's own owners: a client column (``data.columns.client``), or one file per client."""

    min_rows: Count = 1
    kind: Literal["natural"] = "natural"


Allocation: TypeAlias = Annotated[
    Iid | ByCategory | Dirichlet | ClusterDirichlet | QuantitySkew | Natural, Field(discriminator="kind")
]
