"""What a recipe with differential privacy must say, and what it may not: each rule is there for the guarantee."""

from __future__ import annotations

from collections.abc import Iterator

from flocktune.config.privacy import Privacy, SamplePrivacy, UserPrivacy
from flocktune.config.schema import FEDERATED, RunConfig
from flocktune.errors import Problem


def privacy_in_force(config: RunConfig) -> Privacy | None:
    """The recipe's differential privacy; baselines, with one client or none, have none."""
    return config.privacy if config.method in FEDERATED else None


def privacy_problems(config: RunConfig) -> Iterator[Problem]:
    """Every setting without which the guarantee would not hold."""
    match settings := privacy_in_force(config):
        case UserPrivacy():
            yield from _noise(settings)
            yield from _user(config)
        case SamplePrivacy():
            yield from _noise(settings)
            yield from _sample(config)


def _noise(settings: Privacy) -> Iterator[Problem]:
    if (settings.noise_multiplier is None) == (settings.epsilon is None):
        got = "neither" if settings.epsilon is None else "both"
        yield Problem("privacy", "exactly one of noise_multiplier and epsilon", got)
    if settings.epsilon is not None and settings.max_epsilon is not None:
        fix = "The noise is chosen so that all rounds together stay within privacy.epsilon."
        yield Problem("privacy.max_epsilon", "null with privacy.epsilon", str(settings.max_epsilon), fix)
    if settings.noise_multiplier == 0 and settings.max_epsilon is not None:
        fix = "Without noise epsilon is infinite after one step."
        yield Problem("privacy.max_epsilon", "null with noise_multiplier 0", str(settings.max_epsilon), fix)


def _user(config: RunConfig) -> Iterator[Problem]:
    selection = config.scheduling.selection
    if selection.kind != "poisson":
        fix = "Epsilon is computed for clients who take part independently: {kind: poisson, fraction: 0.1}."
        yield Problem("scheduling.selection", "kind poisson with privacy of kind user", selection.kind, fix)
    if config.aggregation.weights != "equal":
        fix = "A client that weighs more than others is hidden by the noise less."
        yield Problem("aggregation.weights", "equal with privacy of kind user", config.aggregation.weights, fix)
    if config.scheduling.over_select:
        fix = "Who is left out because others were faster was not left out independently of them."
        got = str(config.scheduling.over_select)
        yield Problem("scheduling.over_select", "0 with privacy of kind user", got, fix)


def _sample(config: RunConfig) -> Iterator[Problem]:
    if config.data.batching != "padded":
        fix = "The gradient of one row is needed, and packed rows lie in one."
        yield Problem("data.batching", "padded with privacy of kind sample", config.data.batching, fix)
    if config.local.clip_norm:
        fix = "Rows are clipped one by one, to privacy.clip_norm. Set local.clip_norm: 0."
        yield Problem("local.clip_norm", "0 with privacy of kind sample", str(config.local.clip_norm), fix)
    if config.lora.dropout:
        fix = "Row gradients are made of the factors' inputs, which dropout would change."
        yield Problem("lora.dropout", "0 with privacy of kind sample", str(config.lora.dropout), fix)
    if config.aggregation.weights == "tokens":
        fix = "A count of tokens tells of the rows. Use equal, or examples: how many rows a client has is not hidden."
        yield Problem("aggregation.weights", "equal or examples with privacy of kind sample", "tokens", fix)
