"""The recipe as frozen dataclasses. Each default stands here, once, with its unit.

Choices are discriminated unions (``kind: ...``). Reading and checking live in
:mod:`flocktune.config.load`; nothing here reads a file.
"""

from __future__ import annotations

from dataclasses import dataclass, field, is_dataclass
from typing import Annotated, Literal, TypeAlias

from pydantic import ConfigDict, Field

from flocktune.config.compression import CompressionConfig
from flocktune.config.drift import Correction, FedDyn, Scaffold  # noqa: F401 - kinds of this recipe
from flocktune.config.engines import Engine, InProcessEngine
from flocktune.config.factors import ByClass, ByName, RankClass, Ranks, Rule  # noqa: F401 - kinds of this recipe
from flocktune.config.losses import Dpo, LocalLoss, NextToken
from flocktune.config.numbers import Count, Fraction, Momentum, NonNegative, Positive, PositiveFloat
from flocktune.config.personal import Ditto, FineTune, Personal  # noqa: F401
from flocktune.config.privacy import (  # noqa: F401 - every part of a recipe is named here: see the end of the file
    AdaptiveClipping,
    Canaries,
    Privacy,
    SamplePrivacy,
    UserPrivacy,
)
from flocktune.config.robustness import (  # noqa: F401 - kinds of this recipe
    AlignmentAttack,
    Attack,
    Backdoor,
    CoordinateMedian,
    GateCanaries,
    GateConfig,
    GeometricMedian,
    Krum,
    LabelFlip,
    MultiKrum,
    NormBound,
    Refusals,
    Robust,
    TrimmedMean,
    UpdateAttack,
)
from flocktune.config.secure_aggregation import SecureAggregationConfig

EMBEDDED = "embedded"
"""Names the model and the data that come with the package."""

EMBEDDED_PUBLIC = "embedded-public"
"""Names the public data that comes with the package: for the server, no row of it is in the embedded data."""

EMBEDDED_PREFERENCES = "embedded-preferences"
"""Names the embedded data with a wrong answer beside each right one (:mod:`flocktune.data.preferences`)."""

FEDERATED = ("fedit", "fedbiot")
"""The methods in which clients learn together; the others are baselines with one client, or none."""


# --- model ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelConfig:
    """The frozen base. ``path`` is a local folder, a hub id, or ``embedded``."""

    path: str = EMBEDDED
    dtype: Literal["float32", "bfloat16"] = "float32"
    quantization: Literal["none", "8bit", "4bit"] = "none"
    trust_remote_code: bool = False
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class LoraConfig:
    """LoRA (arXiv 2106.09685): W + scale * B A, scale = alpha / rank (rsLoRA: alpha / sqrt(rank)).

    ``targets``: ``attention`` (query, key, value and output projections), ``all-linear`` (every linear
    layer but the head), or a list of module name endings. ``start_from``: a PEFT adapter folder.
    """

    rank: Positive = 8
    alpha: PositiveFloat = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rslora: bool = False
    targets: Literal["attention", "all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    start_from: str | None = None


# --- data ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """Which column holds what; None means: found by the usual names (Dolly, Alpaca, chat, prompt/completion).

    ``chosen`` and ``rejected`` are the two answers of preference data: texts, or lists of messages.
    """

    instruction: str | None = None
    context: str | None = None
    response: str | None = None
    messages: str | None = None
    category: str | None = None
    client: str | None = None
    chosen: str | None = None
    rejected: str | None = None


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
    ``test``, ``test_rows_per_category`` rows of each category are held out of ``train`` first.
    ``max_tokens`` bounds prompt + response; the prompt is cut first, down to a quarter of it.
    """

    train: str = EMBEDDED
    test: str | None = None
    columns: Columns = field(default_factory=Columns)
    template: Literal["alpaca", "short", "chat"] | CustomTemplate = "alpaca"
    max_tokens: Annotated[int, Field(ge=8)] = 512
    train_on: Literal["responses", "everything"] = "responses"
    test_rows_per_category: Count = 10
    max_rows: Positive | None = None
    batching: Literal["padded", "packed"] = "padded"


# --- client data allocation -----------------------------------------------------------------------


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


# --- scheduling ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Uniform:
    """A random cohort of ``fraction`` of the clients, without replacement."""

    fraction: Fraction = 1.0
    kind: Literal["uniform"] = "uniform"


@dataclass(frozen=True)
class BySize:
    """As uniform, but a client is drawn with probability in proportion to its rows."""

    fraction: Fraction = 0.5
    kind: Literal["by_size"] = "by_size"


@dataclass(frozen=True)
class RoundRobin:
    """Cohorts go around a list of clients that is shuffled once."""

    fraction: Fraction = 0.5
    kind: Literal["round_robin"] = "round_robin"


@dataclass(frozen=True)
class Availability:
    """Uniform among the clients that are there: ``trace`` is a JSON file, client -> list of 0/1 by round, repeating."""

    trace: str
    fraction: Fraction = 0.5
    kind: Literal["availability"] = "availability"


@dataclass(frozen=True)
class Named:
    """Always these clients."""

    clients: Annotated[tuple[str, ...], Field(min_length=1)]
    kind: Literal["named"] = "named"


@dataclass(frozen=True)
class Poisson:
    """Every client takes part with probability ``fraction``, independently of the others: a cohort may be empty.

    With differential privacy of kind ``user`` the draw is secret, else it follows from the seed.
    """

    fraction: Fraction = 0.1
    kind: Literal["poisson"] = "poisson"


Selection: TypeAlias = Annotated[
    Uniform | BySize | RoundRobin | Availability | Named | Poisson, Field(discriminator="kind")
]


@dataclass(frozen=True)
class Buffered:
    """FedBuff (arXiv 2106.06639): clients work at their own pace, and a round is over when ``size`` have given updates.

    ``concurrency``: clients at work at once, each drawn among those that are not. An update that was begun ``s`` rounds
    ago counts ``(1 + s) ** -staleness_exponent`` times its weight; with ``s`` above ``max_staleness`` it is left out.
    """

    size: Positive
    concurrency: Positive
    staleness_exponent: NonNegative = 0.5
    max_staleness: Count | None = None


@dataclass(frozen=True)
class SchedulingConfig:
    """Who takes part in a round.

    The cohort is ``max(1, floor(fraction * clients + 0.5))`` clients. ``over_select`` more (a fraction
    of the cohort, rounded up) are asked, and the first ``cohort`` usable updates in task order count.
    ``quorum``: the fraction of the cohort (rounded up) that must answer, else the round fails. ``buffered``: rounds
    without cohort and quorum; methods with one client at a time ignore it.
    """

    selection: Selection = field(default_factory=Uniform)
    over_select: NonNegative = 0.0
    quorum: Fraction = 0.5
    buffered: Buffered | None = None


# --- local training --------------------------------------------------------------------------------


@dataclass(frozen=True)
class LocalConfig:
    """One client's training in one round. Exactly one of ``steps`` (optimiser steps) and ``epochs`` is set.

    ``loss``: instruction or preference tuning. ``batch_size``: rows, of preference data pairs, a micro-batch;
    ``accumulate``: micro-batches a step. ``clip_norm``: bound of the gradient's Euclidean norm, 0 is off.
    ``schedule_over``: whether the learning rate's schedule restarts in every round or runs once over all rounds.
    ``proximal_mu``: FedProx (arXiv 1812.06127), 0 is off; its distance is that of the factors A and B, or (FedBiOT) of
    their products ``scale * B A``: ``proximal_on``. ``correction`` of client drift: SCAFFOLD or FedDyn, None is off;
    baselines ignore it.
    """

    steps: Positive | None = None
    epochs: Positive | None = None
    batch_size: Positive = 8
    accumulate: Positive = 1
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: PositiveFloat = 1e-3
    weight_decay: NonNegative = 0.0
    momentum: Momentum = 0.0
    clip_norm: NonNegative = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Count = 0
    schedule_over: Literal["round", "run"] = "round"
    proximal_mu: NonNegative = 0.0
    proximal_on: Literal["factors", "products"] = "factors"
    correction: Correction | None = None
    loss: LocalLoss = field(default_factory=NextToken)

    @property
    def on_pairs(self) -> bool:
        """Whether a row is a pair of answers."""
        return isinstance(self.loss, Dpo)


# --- aggregation -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ServerSgd:
    """w <- w + lr * mean update; with ``momentum``, FedAvgM (arXiv 1909.06335)."""

    lr: PositiveFloat = 1.0
    momentum: Momentum = 0.0
    kind: Literal["sgd"] = "sgd"


@dataclass(frozen=True)
class ServerAdaptive:
    """FedAdam, FedYogi, FedAdagrad (arXiv 2003.00295, algorithm 2): no bias correction, ``tau`` is the adaptivity."""

    kind: Literal["adam", "yogi", "adagrad"]
    lr: PositiveFloat = 0.01
    beta1: Momentum = 0.9
    beta2: Momentum = 0.99
    tau: PositiveFloat = 1e-3


ServerOptimizer: TypeAlias = Annotated[ServerSgd | ServerAdaptive, Field(discriminator="kind")]


@dataclass(frozen=True)
class AggregationConfig:
    """How updates become the next adapter.

    ``rule``: what is trained, what travels, and how updates are combined (:mod:`flocktune.algorithms.factors`).
    ``weights``: what a client counts by. ``diagnose_clients``: over how many updates of a round the
    aggregation error is measured (memory is held for so many; 0 is off). ``robust``: a rule in place of the
    weighted mean, which counts every client once whatever it weighs, and holds a cohort's updates in memory.
    """

    rule: Rule = "fedit"
    weights: Literal["examples", "tokens", "equal"] = "examples"
    server_optimizer: ServerOptimizer = field(default_factory=ServerSgd)
    diagnose_clients: Count = 10
    robust: Robust | None = None


# --- FedBiOT ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EmulatorConfig:
    """What clients get instead of the full model (arXiv 2406.17706, section 3.2): some layers, and never the others.

    ``path``: a bundle made by ``flocktune compress``; None makes one of ``model`` when the run starts, by the next four
    settings. ``adapter_layers`` are tuned: the last ones, or (Offsite-Tuning) as many at either end. Of the others the
    fraction ``drop`` is left out: in even steps, or those that change hidden states of the public rows the least.
    ``cache``: where a client keeps the emulator's output for its rows within a round, at most ``cache_mb`` megabytes.
    """

    path: str | None = None
    adapter_layers: Positive = 2
    drop: Annotated[float, Field(ge=0, lt=1)] = 0.5
    placement: Literal["last", "first_and_last"] = "last"
    choice: Literal["uniform", "importance"] = "uniform"
    quantization: Literal["none", "8bit", "4bit"] = "none"
    cache: Literal["memory", "disk", "none"] = "memory"
    cache_mb: Positive = 1024
    cache_dtype: Literal["model", "bfloat16"] = "model"


@dataclass(frozen=True)
class AlignmentConfig:
    """How the server distils the full model into the emulator's LoRA, on public data (arXiv 2406.17706, equation 7).

    ``public``: as ``data.train``. ``first_steps`` before round 1, ``steps`` before every later round (0 is never).
    ``kl_weight``: lambda of the Kullback-Leibler term. ``layerwise_weight``: weight of the hidden states after every
    other kept layer, 0 is off. ``fidelity_rows``: rows on which the divergence is measured, 0 is off.
    """

    public: str = EMBEDDED_PUBLIC
    columns: Columns = field(default_factory=Columns)
    max_rows: Positive | None = None
    first_steps: Count = 200
    steps: Count = 10
    batch_size: Positive = 8
    lr: PositiveFloat = 1e-3
    clip_norm: NonNegative = 1.0
    kl_weight: NonNegative = 1.0
    layerwise_weight: NonNegative = 0.0
    fidelity_rows: Count = 64


# --- the rest --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvaluationConfig:
    """When and how the global adapter is evaluated on the held-out rows.

    ``every``: rounds between evaluations, 0 is at the end only. ``generate``: also write answers
    (greedily) and score them; ``max_new_tokens`` bounds one. ``max_rows``: rows evaluated while
    training; the last evaluation takes all. ``client_rows``: rows of each client that it does not train on (it keeps
    at least one that it does), on which the adapter and the client's own are evaluated, client by client; 0 is off.
    """

    every: Count = 0
    generate: bool = True
    max_new_tokens: Positive = 64
    batch_size: Positive = 32
    max_rows: Positive | None = None
    client_rows: Count = 0


@dataclass(frozen=True)
class CompareConfig:
    """The baselines that are run beside the method, as settings of the same code.

    ``local``: how many clients (drawn by the seed), or which, train alone. ``fedit``: FedIT on the full model, the
    upper bound of FedBiOT.
    """

    base: bool = False
    local: Count | tuple[str, ...] = 0
    centralised: bool = False
    fedit: bool = False


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept of a run.

    ``keep``: how many of the newest states. ``keep_adapters_every``: rounds between adapters that are kept for good,
    0 is never.
    """

    keep: Annotated[int, Field(ge=2)] = 2
    keep_adapters_every: Count = 0


@dataclass(frozen=True)
class RuntimeConfig:
    """Where it runs. ``threads``: CPU threads for torch, 0 leaves torch's own choice."""

    device: str = "auto"
    threads: Count = 0


@dataclass(frozen=True)
class RunConfig:
    """A whole recipe. ``name`` is also that of the run's folder.

    ``emulator`` and ``alignment`` are of method ``fedbiot``, which fills them with their defaults; others ignore them.
    ``compression``: null sends updates in float32; methods in which clients do not learn together ignore it.
    ``personal``: an adapter for each client beside the common one; baselines ignore it.
    ``privacy``: differential privacy of clients (``user``) or of rows (``sample``); baselines ignore it.
    ``secure_aggregation``: see there; None is off, and methods with one client at a time ignore it.
    ``gate``: what a round must pass to count; ``attack``: clients that attack, in a simulation. Baselines ignore both,
    but a backdoor is looked for in them as well.
    ``ranks``: None gives every client ``lora.rank``, which is the largest; the LoRA scale is that of ``lora.rank`` for
    all, so that factors of any rank mean the same change. Baselines ignore it, and ``aggregation.rule``.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    method: Literal["fedit", "fedbiot", "base", "local", "centralised"] = "fedit"
    seed: Count = 0
    rounds: Count = 10
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    ranks: Ranks | None = None
    data: DataConfig = field(default_factory=DataConfig)
    allocation: Allocation = field(default_factory=Iid)
    scheduling: SchedulingConfig = field(default_factory=SchedulingConfig)
    local: LocalConfig = field(default_factory=lambda: LocalConfig(steps=10))
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    privacy: Privacy | None = None
    canaries: Canaries | None = None
    gate: GateConfig | None = None
    attack: Attack | None = None
    emulator: EmulatorConfig | None = None
    alignment: AlignmentConfig | None = None
    compression: CompressionConfig | None = None
    personal: Personal | None = None
    secure_aggregation: SecureAggregationConfig | None = None
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    engine: Engine = field(default_factory=InProcessEngine)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()


for _part in [value for value in globals().values() if isinstance(value, type) and is_dataclass(value)]:
    # A key that no field has is a mistake, in every part of a recipe.
    _part.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]
