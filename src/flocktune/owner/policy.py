"""What an owner of data lets a coordinator ask for: a file on the owner's side, and the reasons to refuse a task."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, time
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from flocktune.config.load import parse_yaml
from flocktune.config.mistakes import explain
from flocktune.config.numbers import Positive, PositiveFloat
from flocktune.config.privacy import Privacy, SamplePrivacy
from flocktune.config.schema import Columns
from flocktune.config.secure_aggregation import CONSISTENCY, PHASES, UNMASK
from flocktune.errors import Problem, UserError
from flocktune.files import write_atomic

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Hours = Annotated[str, Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$")]

MB, GB = 2**20, 2**30
"""Bytes in the units of a policy."""

_FIX = "flocktune join writes one, with every setting explained, when there is none."


@dataclass(frozen=True)
class Policy:
    """What one owner allows in one federation; each default stands here, once. Sizes: MB is 2**20 bytes, GB 2**30.

    ``models``: SHA-256 of base models and emulators that may be trained; empty: those named on the command line.
    ``columns``: which columns of the own file are read; None: those with the usual names. ``max_rounds``: updates that
    may leave in one run, whose name is the coordinator's word; ``max_updates``: in all runs together.
    ``require``: what must protect an update beside TLS. ``max_epsilon``: of one row, over one run, where rows are
    hidden by the owner's own noise; recipes that hide none are refused when it is set.
    ``hours``: ``20:00-06:00``, local time, may go over midnight. ``max_minutes``: of one task. ``tensors``: globs of
    names that may leave. ``clip_norm``: an update is scaled down to this Euclidean norm before it leaves.
    ``min_rows``: fewer rows are not trained on, for an update of a few rows tells too much of each.
    """

    methods: Annotated[tuple[Literal["fedit", "fedbiot"], ...], Field(min_length=1)] = ("fedit", "fedbiot")
    models: tuple[Digest, ...] = ()
    columns: Columns | None = None
    max_rounds: Positive = 1000
    max_updates: Positive | None = None
    require: Literal["none", "differential_privacy", "secure_aggregation"] = "none"
    max_epsilon: PositiveFloat | None = None
    hours: Hours | None = None
    max_gpu_memory_gb: PositiveFloat | None = None
    max_threads: Positive | None = None
    max_minutes: PositiveFloat = 60.0
    max_rank: Positive = 256
    max_task_mb: Positive = 2048
    max_update_mb: Positive = 1024
    max_memory_mb: Positive = 4096
    tensors: Annotated[tuple[str, ...], Field(min_length=1)] = ("*.lora_A", "*.lora_B")
    clip_norm: PositiveFloat | None = None
    min_rows: Positive = 1

    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Asked:
    """What a task wants of an owner. ``allowed_digests``: models that the owner named; ``rows``: that would be used.

    ``round`` counts from 0; ``task_bytes`` is the size of the encoded task; ``columns``: those that the recipe names.
    ``secure``: whether the recipe has secure aggregation.
    """

    method: str
    model_digest: str
    allowed_digests: frozenset[str]
    rank: int
    round: int
    kind: str
    trust_remote_code: bool
    task_bytes: int
    rows: int
    columns: Columns = field(default_factory=Columns)
    privacy: Privacy | None = None
    secure: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        """What kinds of task its recipe has; with secure aggregation none that lets an update out as it is."""
        return PHASES if self.secure else (_KINDS[self.method],)


_ADAPTER: TypeAdapter[Policy] = TypeAdapter(Policy)
_KINDS = {"fedit": "fedavg", "fedbiot": "fedbiot"}
"""What kind of task each method sends."""

_MOST_DELTA = 1e-3
"""With a larger one even epsilon 0 allows that some rows are shown to everybody."""

_COMMENTED = """\
# What this owner of data allows. A task outside of it is refused, and the refusal is in the audit log.
# A change counts from the next task on.

methods: [fedit, fedbiot]        # which methods may run; fedit trains on the base model, fedbiot on an emulator
models: []                       # SHA-256 of base models and emulators that may be trained;
                                 # empty: only what was named on the command line. flocktune join --check shows digests
columns: null                    # which columns of your file are read: {instruction: findings, response: impression},
                                 # say; null: those with the usual names. A recipe that names others is refused
max_rounds: 1000                 # updates that may leave in one run
max_updates: null                # updates that may leave in all, over all runs: the coordinator names the runs;
                                 # null is any number
require: none                    # what must protect an update: none, differential_privacy, secure_aggregation
max_epsilon: null                # the most that a run may tell of one row, by noise that is made here; null is any
hours: null                      # when tasks are done, local time, such as "20:00-06:00"; null is always

max_gpu_memory_gb: null          # GPU memory that a task may use; null is all of it
max_threads: null                # CPU threads that a task may use; null is torch's own choice
max_minutes: 60.0                # one task, then it is stopped
max_rank: 256                    # rank of the adapter that is trained
max_task_mb: 2048                # size of a task that is read
max_update_mb: 1024              # size of an update that may leave
max_memory_mb: 4096              # size of what is kept here between the rounds of one run, if its method keeps any

tensors: ["*.lora_A", "*.lora_B"] # names of tensors that may leave; * stands for anything
clip_norm: null                  # an update is scaled down to this Euclidean norm before it leaves; null is as it is
min_rows: 1                      # fewer rows are not trained on: an update of a few rows tells too much of each
"""


def write_policy(path: Path) -> None:
    """Write the commented default policy to ``path``, mode 0600. Raises UserError; never overwrites."""
    if path.exists():
        raise UserError(Problem(str(path), "a path that is free", "a file", "Change the policy that is there."))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, _COMMENTED, mode=0o600)
    except OSError as error:
        raise UserError(Problem(str(path), "a path that can be written", str(error))) from None


def load_policy(path: Path) -> Policy:
    """Read and check a policy file. Raises UserError with every problem; nothing is taken for a default then."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        got = "nothing there" if isinstance(error, FileNotFoundError) else str(error)
        raise UserError(Problem(str(path), "a policy (YAML text)", got, _FIX)) from None
    if not text.strip():  # most likely a copy that failed: defaults would allow what its owner forbade
        raise UserError(Problem(str(path), "a policy (YAML text)", "an empty file", _FIX))
    try:
        policy = _ADAPTER.validate_json(json.dumps(parse_yaml(text, str(path))), strict=True)
    except ValidationError as error:
        problems = explain(error.errors(include_url=False), [key.name for key in fields(Policy)])
        raise UserError(*problems) from None
    except (TypeError, ValueError) as error:  # a YAML date, say
        raise UserError(Problem(str(path), "plain values with text keys", str(error))) from None
    if policy.hours is not None and len(set(policy.hours.split("-"))) == 1:
        raise UserError(Problem("hours", "two different times", policy.hours, "Use null for always."))
    return policy


def refusals(policy: Policy, asked: Asked, now: datetime, rounds_taken: int, updates_taken: int) -> list[str]:
    """Every reason to refuse a task, each a sentence; none when it may be done.

    ``now`` is the owner's local time; before this, ``rounds_taken`` updates left in this run, ``updates_taken`` in all.
    """
    return [str(problem) for problem in _problems(policy, asked, now, rounds_taken, updates_taken)]


def protections(asked: Asked) -> frozenset[str]:
    """What protects the update of a task, of the values of ``require``.

    Differential privacy counts where the owner itself makes the noise, for its rows. That of clients is the
    coordinator's to make, and an owner who requires protection does not take its word.
    """
    own = {"differential_privacy"} if _most_epsilon(asked.privacy) < math.inf else set()
    secure = {"secure_aggregation"} if asked.secure else set()
    return frozenset({"none", *own, *secure})


def _most_epsilon(privacy: Privacy | None) -> float:
    """What a run may tell of one row by the owner's own noise; infinite where nothing bounds it."""
    if not isinstance(privacy, SamplePrivacy) or privacy.delta > _MOST_DELTA:
        return math.inf
    return privacy.epsilon or privacy.max_epsilon or math.inf


def within_hours(hours: str, now: time) -> bool:
    """Whether ``now`` lies in ``20:00-06:00``; the start belongs to it, the end does not."""
    start, end = (time.fromisoformat(text) for text in hours.split("-"))
    return start <= now < end if start < end else now >= start or now < end


def columns_read(policy: Policy) -> Columns:
    """Which columns of the owner's file are read, whatever a recipe says."""
    return policy.columns or Columns()


def allowed_models(policy: Policy, named: frozenset[str]) -> frozenset[str]:
    """Digests that may be trained: the policy's when it has any, else those that the owner named."""
    return frozenset(policy.models) or named


def _problems(policy: Policy, asked: Asked, now: datetime, rounds_taken: int, updates_taken: int) -> Iterator[Problem]:
    if asked.trust_remote_code:
        yield _problem("trust_remote_code", "false: no code comes from a coordinator", "true")
    if asked.method not in policy.methods:
        yield _problem("methods", f"one of {', '.join(policy.methods)}", repr(asked.method))
    elif asked.kind not in asked.kinds:
        yield _problem("methods", f"a task of kind {asked.kinds[0]!r} for {asked.method}", repr(asked.kind))
    if asked.model_digest not in allowed_models(policy, asked.allowed_digests):
        whose = "listed here" if policy.models else "named on the command line"
        yield _problem("models", f"a model that is {whose}", f"digest {asked.model_digest[:12] or 'none'}...")
    if asked.columns not in (Columns(), columns_read(policy)):
        yield _problem("columns", _said(columns_read(policy)), f"a recipe that reads {_said(asked.columns)}")
    if policy.require not in protections(asked):
        what = policy.require.replace("_", " ")
        yield _problem("require", f"an update that is protected by {what}", "a recipe without it")
    if policy.max_epsilon is not None and not _most_epsilon(asked.privacy) <= policy.max_epsilon:
        got = f"one with {_most_epsilon(asked.privacy):g}"
        yield _problem("max_epsilon", f"a recipe that tells of a row at most epsilon {policy.max_epsilon:g}", got)
    if policy.hours is not None and not within_hours(policy.hours, now.time()):
        yield _problem("hours", policy.hours, f"{now:%H:%M}")
    finishing = asked.secure and asked.kind in (CONSISTENCY, UNMASK)  # the update of this round is among those taken
    if rounds_taken >= policy.max_rounds and not finishing:
        yield _problem(
            "max_rounds", f"at most {policy.max_rounds} updates of one run", f"one more after {rounds_taken}"
        )
    if policy.max_updates is not None and updates_taken >= policy.max_updates and not finishing:
        got = f"one more after {updates_taken}"
        yield _problem("max_updates", f"at most {policy.max_updates} updates in all", got)
    if asked.round < 0:
        yield _problem("max_rounds", "a round from 0 on", str(asked.round))
    if not 1 <= asked.rank <= policy.max_rank:
        yield _problem("max_rank", f"a rank from 1 to {policy.max_rank}", str(asked.rank))
    if asked.task_bytes > policy.max_task_mb * MB:
        yield _problem("max_task_mb", f"a task of at most {policy.max_task_mb} MB", f"{asked.task_bytes / MB:.1f} MB")
    if asked.rows < policy.min_rows:
        yield _problem("min_rows", f"at least {policy.min_rows} rows to train on", str(asked.rows))


def _said(columns: Columns) -> str:
    named = {key: value for key, value in asdict(columns).items() if value is not None}
    return ", ".join(f"{key} from {value[:60]!r}" for key, value in named.items()) or "columns with the usual names"


def _problem(setting: str, expected: Any, got: str) -> Problem:
    return Problem(f"policy: {setting}", expected, got)
