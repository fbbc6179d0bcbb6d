"""Reads recipes: YAML plus ``key=value`` overrides -> a checked :class:`RunConfig`, or all problems at once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from flocktune.config import schema
from flocktune.config.capabilities import refused
from flocktune.config.engines import InProcessEngine
from flocktune.config.evaluation import evaluation_problems
from flocktune.config.factors import rank_problems
from flocktune.config.mistakes import explain
from flocktune.config.privacy_rules import privacy_problems
from flocktune.config.schema import RunConfig
from flocktune.config.task_rules import task_problems
from flocktune.errors import Problem, UserError, near, reason

NOT_PART_OF_THE_RESULT = ("name", "engine", "runtime", "checkpoint", "trackers", "compare")
"""Top-level keys that may change between a run and its resumption."""

_ADAPTER: TypeAdapter[RunConfig] = TypeAdapter(RunConfig)


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads ``1e-3`` as a number (YAML 1.2), which PyYAML takes for a string."""


class _Dumper(yaml.SafeDumper):
    """Writes text that :class:`_Loader` reads back: what it would take for a number is quoted."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check a recipe file. Raises UserError with every problem of the file and the overrides."""
    fix = "Write one with: flocktune init my-run.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        got = reason(error) if isinstance(error, OSError) else f"bytes that are no text ({error.reason})"
        meant = near(path) if isinstance(error, FileNotFoundError) else ""
        raise UserError(Problem(str(path), "a recipe (YAML text)", got, meant or fix)) from None
    if not text.strip():  # most likely a copy that failed: its defaults are not what was meant
        raise UserError(Problem(str(path), "a recipe (YAML text)", "an empty file", fix))
    return parse_recipe(text, overrides, where=str(path))


def parse_recipe(text: str, overrides: Sequence[str] = (), *, where: str = "recipe") -> RunConfig:
    """As :func:`load_recipe`, from text."""
    tree = parse_yaml(text, where)
    problems = [problem for override in overrides for problem in _override(tree, override)]
    return build_config(tree, problems)


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """YAML text as plain values, numbers such as ``1e-3`` among them. Raises UserError for what is no mapping."""
    try:
        tree = yaml.load(text, Loader=_Loader) or {}
    except yaml.YAMLError as error:
        raise UserError(_no_yaml(where, error)) from None
    if not isinstance(tree, dict):
        raise UserError(Problem(where, "a mapping of settings", f"a {type(tree).__name__}"))
    return tree


def _no_yaml(where: str, error: yaml.YAMLError) -> Problem:
    fix = "Look for brackets, quotes and indentation there."
    mark, said = getattr(error, "problem_mark", None), getattr(error, "problem", None) or "what can not be read"
    if mark is None:
        return Problem(where, "YAML", " ".join(str(error).split()), fix)
    return Problem(f"{where}:{mark.line + 1}", "YAML", f"a mistake in column {mark.column + 1} ({said})", fix)


def build_config(tree: Mapping[str, Any], problems: Sequence[Problem] = ()) -> RunConfig:
    """Check a tree of plain values and make a :class:`RunConfig` of it. Raises UserError with every problem."""
    engine = tree.get("engine")
    if isinstance(engine, str):  # "engine: ray" is short for its kind with every default
        tree = {**tree, "engine": {"kind": engine}}
    elif isinstance(engine, dict):  # settings alone are those of the default kind
        tree = {**tree, "engine": {"kind": InProcessEngine.kind, **engine}}
    try:
        text = json.dumps(tree)
    except (TypeError, ValueError) as error:
        raise UserError(*problems, Problem("recipe", "plain values with text keys", str(error))) from None
    try:
        config = _ADAPTER.validate_json(text, strict=True)
    except ValidationError as error:
        raise UserError(*problems, *explain(error.errors(include_url=False))) from None
    UserError.raise_all([*problems, *_cross_checks(config), *refused(config)])
    if config.method == "fedbiot":
        emulator, alignment = config.emulator or schema.EmulatorConfig(), config.alignment or schema.AlignmentConfig()
        config = dataclasses.replace(config, emulator=emulator, alignment=alignment)
    return config


def to_tree(config: Any) -> dict[str, Any]:
    """A recipe as plain values, with every default written out."""
    return json.loads(_ADAPTER.dump_json(config)) if isinstance(config, RunConfig) else dataclasses.asdict(config)


def dump_recipe(config: RunConfig) -> str:
    """The resolved recipe as YAML text that :func:`parse_recipe` reads back to the same value."""
    return yaml.dump(to_tree(config), Dumper=_Dumper, sort_keys=False)


def config_digest(config: RunConfig) -> str:
    """Hex SHA-256 of everything in the recipe that bears on the result. Travels with every task."""
    tree = {key: value for key, value in to_tree(config).items() if key not in NOT_PART_OF_THE_RESULT}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """``path: old -> new`` for every setting that bears on the result and differs between two trees."""
    flat_old, flat_new = dict(_flatten(old)), dict(_flatten(new))
    return [
        f"{key}: {flat_old.get(key, 'absent')} -> {flat_new.get(key, 'absent')}"
        for key in sorted(flat_old.keys() | flat_new.keys())
        if flat_old.get(key) != flat_new.get(key) and key.split(".")[0] not in NOT_PART_OF_THE_RESULT
    ]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _override(tree: dict[str, Any], text: str) -> Iterator[Problem]:
    """Apply one ``a.b.c=value`` to the tree; the value is read as YAML. Changing a ``kind`` drops its siblings."""
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        yield Problem(text, "an override key=value", "no '='", "Example: local.lr=1e-3")
        return
    try:
        parsed = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError:
        yield Problem(text, "a value in YAML", value)
        return
    *parents, leaf = path.strip().split(".")
    branch = tree
    for parent in parents:
        branch = branch.setdefault(parent, {})
        if not isinstance(branch, dict):
            yield Problem(text, f"a group of settings at {parent}", "a single value")
            return
    if leaf == "kind" and branch.get("kind") != parsed:
        branch.clear()  # the other kind's settings do not fit this one
    branch[leaf] = parsed


def _cross_checks(config: RunConfig) -> Iterator[Problem]:
    """What no single field can say."""
    local = config.local
    if (local.steps is None) == (local.epochs is None):
        got = "neither" if local.steps is None else f"steps {local.steps} and epochs {local.epochs}"
        yield Problem("local", "exactly one of steps and epochs", got)
    if config.method == "fedbiot" and config.model.trust_remote_code:
        fix = "An emulator must load with transformers alone."
        yield Problem("model.trust_remote_code", "false with method fedbiot", "true", fix)
    selection = config.scheduling.selection
    if config.method == "local" and not (isinstance(selection, schema.Named) and len(selection.clients) == 1):
        yield Problem(
            "scheduling.selection",
            "one named client with method local",
            selection.kind,
            "For example: {kind: named, clients: [client-01]}.",
        )
    if isinstance(selection, schema.Named) and len(set(selection.clients)) < len(selection.clients):
        twice = next(name for name in selection.clients if selection.clients.count(name) > 1)
        yield Problem("scheduling.selection.clients", "every client once", f"{twice!r} more than once")
    yield from _preference_checks(config)
    yield from task_problems(config)
    if local.optimizer == "adamw" and local.momentum:
        yield Problem("local.momentum", "0 with optimizer adamw", f"{local.momentum}", "Use optimizer: sgd.")
    yield from _pattern_checks(config)
    secure = config.secure_aggregation
    if secure and config.aggregation.weights != "equal" and secure.max_weight is None:
        fix = "Clients mask their values times weight / max_weight, and must all know that bound. Or weights: equal."
        got = f"none with aggregation.weights {config.aggregation.weights}"
        yield Problem("secure_aggregation.max_weight", "the largest weight that counts", got, fix)
    if secure and secure.range < 0.5 and isinstance(config.privacy, schema.UserPrivacy) and config.privacy.adaptive:
        fix = "Whether a client's update was within the norm is an element of 1/2 or -1/2."
        yield Problem("secure_aggregation.range", "at least 0.5 with adaptive clipping", f"{secure.range:g}", fix)
    yield from rank_problems(config.ranks, config.lora.rank)
    yield from evaluation_problems(config.evaluation, config.data, on_pairs=local.on_pairs)
    if config.method in schema.FEDERATED and config.scheduling.buffered is not None:
        yield from _buffered_checks(config, config.scheduling.buffered)
    yield from privacy_problems(config)


def _preference_checks(config: RunConfig) -> Iterator[Problem]:
    """What preference tuning needs of data and adapter."""
    loss, columns = config.local.loss, config.data.columns
    if not isinstance(loss, schema.Dpo):
        return
    if config.data.train_on != "responses":
        fix = "A prompt is the same for both answers, so it can not say which one is better."
        yield Problem("data.train_on", "responses with local.loss dpo", config.data.train_on, fix)
    for name in ("response", "messages"):
        if getattr(columns, name) is not None:
            fix = "Name the two answers in data.columns.chosen and data.columns.rejected."
            yield Problem(f"data.columns.{name}", "null with local.loss dpo", repr(getattr(columns, name)), fix)
    if loss.reference == "start" and config.lora.start_from is None:
        fix = "Name an adapter in lora.start_from, or set local.loss.reference=base: a fresh adapter is the base."
        yield Problem("local.loss.reference", "base without lora.start_from", "start", fix)


def _pattern_checks(config: RunConfig) -> Iterator[Problem]:
    """Regular expressions that are none."""
    canaries = config.gate.canaries if config.gate else None
    for place, pattern in enumerate(canaries.must_not if canaries else ()):
        try:
            re.compile(pattern)
        except re.error as error:
            where = f"gate.canaries.must_not.{place}"
            yield Problem(where, "a regular expression", repr(pattern), f"{error}.")


def _buffered_checks(config: RunConfig, buffered: schema.Buffered) -> Iterator[Problem]:
    """What has no meaning without cohorts."""
    selection, clients = config.scheduling.selection, getattr(config.allocation, "clients", None)
    if not isinstance(selection, schema.Uniform):
        fix = "Whoever is not at work may be drawn."
        yield Problem("scheduling.selection", "kind uniform with scheduling.buffered", selection.kind, fix)
    elif selection.fraction != 1:
        fix = "How many work at once is scheduling.buffered.concurrency."
        got = str(selection.fraction)
        yield Problem("scheduling.selection.fraction", "1.0 with scheduling.buffered", got, fix)
    if config.scheduling.over_select:
        fix = "No update waits for others, so none is asked for in reserve."
        got = str(config.scheduling.over_select)
        yield Problem("scheduling.over_select", "0 with scheduling.buffered", got, fix)
    if clients is not None:
        yield from too_few_clients(buffered, clients, "allocation.clients")


def too_few_clients(buffered: schema.Buffered, clients: int, of: str) -> Iterator[Problem]:
    """Settings that so many clients can not fill; ``of`` says where their number is from."""
    counts = {
        "size": (buffered.size, "The updates of a round are of different clients."),
        "concurrency": (buffered.concurrency, "A client does one task at a time."),
    }
    for name, (count, fix) in counts.items():
        if count > clients:
            yield Problem(f"scheduling.buffered.{name}", f"at most the {clients} clients of {of}", str(count), fix)
