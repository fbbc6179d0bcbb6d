"""The recipe as frozen dataclasses. Each default stands once, with its unit, here or in the module of its part.

Choices are discriminated unions (``kind: ...``). Reading and checking live in :mod:`flocktune.config.load`; nothing
here reads a file. All parts are named here: the end of this file makes each of them refuse unknown keys.
"""

# ruff: noqa: F401

from __future__ import annotations

from dataclasses import dataclass, field, is_dataclass
from typing import Annotated, Literal, TypeAlias

from pydantic import ConfigDict, Field

from flocktune.config.compression import CompressionConfig
from flocktune.config.data import (
    Allocation,
    ByCategory,
    ClusterDirichlet,
    Columns,
    CustomTemplate,
    DataConfig,
    Dirichlet,
    Iid,
    Natural,
    QuantitySkew,
)
from flocktune.config.drift import Correction, FedDyn, Scaffold
from flocktune.config.engines import Engine, FlowerEngine, InProcessEngine, RayEngine
from flocktune.config.evaluation import EvaluationConfig
from flocktune.config.factors import ByClass, ByName, RankClass, Ranks, Rule
from flocktune.config.fedbiot import AlignmentConfig, EmulatorConfig
from flocktune.config.losses import Dpo, LocalLoss, NextToken
from flocktune.config.names import EMBEDDED, EMBEDDED_PREFERENCES, EMBEDDED_PUBLIC, FEDERATED
from flocktune.config.numbers import Count, Momentum, NonNegative, Positive, PositiveFloat
from flocktune.config.personal import Ditto, FineTune, Personal
from flocktune.config.privacy import AdaptiveClipping, Canaries, Privacy, SamplePrivacy, UserPrivacy
from flocktune.config.robustness import (
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
from flocktune.config.scheduling import (
    Availability,
    Buffered,
    BySize,
    Named,
    Poisson,
    RoundRobin,
    SchedulingConfig,
    Selection,
    Uniform,
)
from flocktune.config.secure_aggregation import SecureAggregationConfig
from flocktune.config.tasks import CodeConfig

# --- model ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelConfig:
    """The frozen base. ``path`` is a local folder, a hub id, or ``embedded``.

    ``gradient_checkpointing``: compute layers again in the backward pass instead of keeping what is in them, which
    changes no result; ``auto`` does so where a step would not fit into the memory of the device.
    """

    path: str = EMBEDDED
    dtype: Literal["float32", "bfloat16"] = "float32"
    quantization: Literal["none", "8bit", "4bit"] = "none"
    trust_remote_code: bool = False
    gradient_checkpointing: bool | Literal["auto"] = False


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


# --- the rest --------------------------------------------------------------------------------------


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
