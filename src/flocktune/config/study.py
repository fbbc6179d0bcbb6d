"""A study: methods x settings x seeds, as one YAML file, and the recipe of every cell of that grid.

    name: fedit-table
    recipe: demo.yaml                 # a path relative to this file, or the settings themselves
    seeds: [0, 1, 2]
    methods:                          # label -> what it changes in the recipe
      Base: {method: base}
      FedIT: {method: fedit}
      Alone: {method: local, scheduling.selection: {kind: named, clients: [client-01]}}
    settings:                         # optional: label -> what it changes for every method
      rank 4: {lora.rank: 4}
      rank 8: {lora.rank: 8}
    once: [Base]                      # optional: methods that the settings do not bear on; each runs once a seed
    claims:                           # optional: differences that are claimed
      - {better: FedIT, than: Base, metric: checked}

A change is ``dotted.key: value``; a value that is a mapping takes the place of that part. Where several change the
same key, a setting goes over its method, and the command line over both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from flocktune.config.load import parse_recipe, parse_yaml
from flocktune.config.mistakes import explain
from flocktune.config.schema import CompareConfig, Count, RunConfig
from flocktune.errors import Problem, UserError, reason

EVERY_SETTING = "all"
"""In place of a setting's label: for a method of ``once``, and for all of them in a study without settings."""

_OF_THE_STUDY = {"name": "name", "seed": "seeds", "compare": "methods"}
"""Settings that no cell may change, and the part of the study file that stands for each."""


@dataclass(frozen=True)
class Claim:
    """That one method is better than another in a metric, in every setting that both were run in."""

    better: str
    than: str
    metric: Literal[
        "checked",
        "number_match",
        "choice",
        "choice_per_token",
        "choice_per_byte",
        "pass_at_1",
        "pass_at_10",
        "pass_at_100",
        "rouge_l",
        "exact_match",
        "contains",
        "reward_accuracy",
        "prefers_chosen",
        "loss",
        "perplexity",
        "loss_std",
        "loss_worst_tenth",
    ]
    dataset: str = "held_out"


@dataclass(frozen=True)
class StudyConfig:
    """A study file. ``recipe``: a path relative to the file, or the settings. ``name`` is also that of the folder.

    ``once``: methods that the settings are not applied to. They run once a seed and stand in for every setting.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    recipe: str | dict[str, Any]
    methods: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    seeds: Annotated[tuple[Count, ...], Field(min_length=1)] = (0,)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    once: tuple[str, ...] = ()
    claims: tuple[Claim, ...] = ()


_PARTS: tuple[Any, ...] = (Claim, StudyConfig)
for _part in _PARTS:
    # A key that no field has is a mistake, as in a recipe.
    _part.__pydantic_config__ = ConfigDict(extra="forbid")

_ADAPTER: TypeAdapter[StudyConfig] = TypeAdapter(StudyConfig)
_KEYS = [key.name for part in _PARTS for key in fields(part)]


@dataclass(frozen=True)
class Cell:
    """One run of a study. ``place``: its folder within the study's; ``setting`` is a label, or EVERY_SETTING."""

    method: str
    setting: str
    config: RunConfig
    place: str

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def label(self) -> str:
        """How the cell is called on paper."""
        parts = [self.method, *([self.setting] if self.setting != EVERY_SETTING else []), f"seed {self.seed}"]
        return ", ".join(parts)


@dataclass(frozen=True)
class Study:
    """A study whose every cell was checked; cells in the order of the file: methods, settings, seeds."""

    config: StudyConfig
    cells: tuple[Cell, ...]


def load_study(path: Path, overrides: Sequence[str] = (), seeds: Sequence[int] | None = None) -> Study:
    """Read a study file, apply ``overrides`` (``key=value``) to every cell, and check every cell's recipe.

    ``seeds`` take the place of the file's. Raises UserError with every problem of the file and of all its cells.
    """
    config = _parse(_read(path, str(path), "Its parts are shown in recipes/study_fedit.yaml."), str(path))
    config = replace(config, seeds=tuple(seeds)) if seeds is not None else config
    problems = [*_labels(config), *_references(config), *_reserved(config, overrides)]
    try:
        recipe = _recipe_text(config, path)
    except UserError as error:
        raise UserError(*problems, *error.problems) from None
    recipes, wrong = _resolve(config, recipe, overrides)
    UserError.raise_all([*problems, *wrong])
    return Study(config, tuple(_cells(config, recipes)))


def _read(path: Path, where: str, fix: str) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        got = f"{reason(error)} ({path})" if isinstance(error, OSError) else str(error)
        raise UserError(Problem(where, "a YAML file", got, fix)) from None
    if not text.strip():
        raise UserError(Problem(where, "a YAML file", "an empty file", fix))
    return text


def _parse(text: str, where: str) -> StudyConfig:
    try:
        return _ADAPTER.validate_json(json.dumps(parse_yaml(text, where)), strict=True)
    except ValidationError as error:
        raise UserError(*explain(error.errors(include_url=False), _KEYS)) from None
    except TypeError as error:  # a YAML date, say
        raise UserError(Problem(where, "plain values with text keys", str(error))) from None


def _recipe_text(config: StudyConfig, path: Path) -> str:
    if isinstance(config.recipe, str):
        return _read(path.parent / config.recipe, "recipe", "The path is relative to the study file.")
    return json.dumps(config.recipe, ensure_ascii=False)  # JSON is YAML


def slug(label: str) -> str:
    """A label as the name of a folder: ``beta 0.2`` -> ``beta-0-2``."""
    return re.sub(r"\W+", "-", label.lower()).strip("-")


def _labels(config: StudyConfig) -> Iterator[Problem]:
    for part, labels in (("methods", config.methods), ("settings", config.settings)):
        by_slug: dict[str, list[str]] = {}
        for label in labels:
            by_slug.setdefault(slug(label), []).append(label)
            if not label.isprintable() or len(label) > 60 or not slug(label):
                got = json.dumps(label)
                yield Problem(part, "labels of up to 60 characters, a letter or digit among them", got)
        for same in by_slug.values():
            if len(same) > 1 and slug(same[0]):
                got = " and ".join(map(json.dumps, same))
                yield Problem(part, "labels that differ in a letter or digit, for they name folders", got)
    if EVERY_SETTING in map(slug, config.settings):
        yield Problem(
            "settings", f"labels other than {EVERY_SETTING}, which names what holds in all of them", EVERY_SETTING
        )
    if len(set(config.seeds)) < len(config.seeds):
        yield Problem("seeds", "different numbers", ", ".join(map(str, config.seeds)))


def _references(config: StudyConfig) -> Iterator[Problem]:
    known = f"one of the methods {', '.join(config.methods)}"
    named = [(f"once.{place}", label) for place, label in enumerate(config.once)]
    for place, claim in enumerate(config.claims):
        named += [(f"claims.{place}.better", claim.better), (f"claims.{place}.than", claim.than)]
        if claim.better == claim.than:
            yield Problem(f"claims.{place}", "two different methods", json.dumps(claim.better))
    yield from (Problem(where, known, json.dumps(label)) for where, label in named if label not in config.methods)


def _reserved(config: StudyConfig, overrides: Sequence[str]) -> Iterator[Problem]:
    """A cell's seed and name are the study's, and a cell has no baselines of its own."""
    changes = [
        (f"{part}.{label}.{key}", key)
        for part, table in (("methods", config.methods), ("settings", config.settings))
        for label, change in table.items()
        for key in change
    ]
    for where, key in [*changes, *((text, text.partition("=")[0].strip()) for text in overrides)]:
        part = key.split(".")[0]
        if part in _OF_THE_STUDY:
            yield Problem(
                where, "a setting of a single run", f"{part}", f"Use {_OF_THE_STUDY[part]} of the study file."
            )


def _resolve(
    config: StudyConfig, recipe: str, overrides: Sequence[str]
) -> tuple[dict[tuple[str, str], RunConfig], list[Problem]]:
    """The recipe of every (method, setting), and what is wrong with them, each thing told once."""
    recipes: dict[tuple[str, str], RunConfig] = {}
    wrong: dict[Problem, list[tuple[str, str]]] = {}
    for method, setting in _grid(config):
        changes = [*_as_overrides(config.methods[method]), *_as_overrides(config.settings.get(setting, {}))]
        resolved = _try(recipe, [*changes, *overrides])
        if isinstance(resolved, RunConfig):
            recipes[method, setting] = resolved
            continue
        for problem in resolved:
            wrong.setdefault(problem, []).append((method, setting))
    plain = _try(recipe, overrides) if wrong else ()
    everywhere = () if isinstance(plain, RunConfig) else plain
    told = [
        replace(problem, where=f"{place}.{problem.where}")
        for problem, found in wrong.items()
        for place in (["recipe"] if problem in everywhere else _where(config, found))
    ]
    return recipes, told


def _try(recipe: str, overrides: Sequence[str]) -> RunConfig | tuple[Problem, ...]:
    try:
        return parse_recipe(recipe, overrides)
    except UserError as error:
        return tuple(problem for problem in error.problems if isinstance(problem, Problem))


def _where(config: StudyConfig, found: Sequence[tuple[str, str]]) -> Iterator[str]:
    """The parts of the study file that a problem of these (method, setting) comes from, as paths.

    A method that is wrong in all of several settings, a setting that is wrong with all methods, else both names.
    """
    grid, left = list(_grid(config)), list(found)
    for method in config.methods:
        whole = [cell for cell in grid if cell[0] == method]
        if set(whole) <= set(left) and (len(whole) > 1 or whole[0][1] == EVERY_SETTING):
            yield f"methods.{method}"
            left = [cell for cell in left if cell[0] != method]
    for setting in config.settings:
        whole = [cell for cell in grid if cell[1] == setting]
        if whole and set(whole) <= set(left):
            yield f"settings.{setting}"
            left = [cell for cell in left if cell[1] != setting]
    for method in dict.fromkeys(method for method, _ in left):
        settings = ", ".join(setting for other, setting in left if other == method)
        yield f"methods.{method} (with {settings})"


def _grid(config: StudyConfig) -> Iterator[tuple[str, str]]:
    for method in config.methods:
        several = config.settings and method not in config.once
        yield from ((method, setting) for setting in (config.settings if several else [EVERY_SETTING]))


def _as_overrides(change: Mapping[str, Any]) -> Iterable[str]:
    return (f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in change.items())


def _cells(config: StudyConfig, recipes: Mapping[tuple[str, str], RunConfig]) -> Iterator[Cell]:
    for (method, setting), recipe in recipes.items():
        for seed in config.seeds:
            run = replace(recipe, name=config.name, seed=seed, compare=CompareConfig())
            yield Cell(method, setting, run, f"{slug(method)}/{slug(setting)}/seed-{seed}")
