"""Which features of a recipe go together. One table: ``check`` refuses by it, and docs/capabilities.md shows it.

A feature is something that a recipe asks for; a pair that is not in :data:`REFUSED` works. After a change:

    python -m flocktune.config.capabilities > docs/capabilities.md
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from flocktune.config.drift import Correction, FedDyn, Scaffold
from flocktune.config.factors import NOT_A_MEAN, OTHER_RULES, SIDED, Rule
from flocktune.config.personal import Ditto, FineTune, Personal
from flocktune.config.privacy_rules import privacy_in_force
from flocktune.config.schema import FEDERATED, Dpo, RunConfig, SamplePrivacy, ServerSgd, UserPrivacy
from flocktune.errors import Problem


def correction_of(config: RunConfig) -> Correction | None:
    """The correction of drift that takes place: none in a baseline."""
    return config.local.correction if config.method in FEDERATED else None


def personal_of(config: RunConfig) -> Personal | None:
    """The personalisation that takes place: none in a baseline."""
    return config.personal if config.method in FEDERATED else None


@dataclass(frozen=True)
class Feature:
    """``setting``: the key of a recipe that asks for it. ``used``: whether a recipe does.

    ``example``: overrides by which a recipe of nothing but defaults does.
    """

    title: str
    setting: str
    used: Callable[[RunConfig], bool]
    example: tuple[str, ...] = ()


def _of_rule(rule: Rule) -> Feature:
    return Feature(
        f"the rule {rule}",
        "aggregation.rule",
        lambda config: config.aggregation.rule == rule and config.method in FEDERATED,
        (f"aggregation.rule={rule}",),
    )


FEATURES: Mapping[str, Feature] = {
    "baseline": Feature(
        "base, local, centralised", "method", lambda config: config.method not in FEDERATED, ("method=centralised",)
    ),
    "fedbiot": Feature("FedBiOT", "method", lambda config: config.method == "fedbiot", ("method=fedbiot",)),
    "dpo": Feature(
        "preference tuning (DPO)", "local.loss", lambda config: config.local.on_pairs, ("local.loss={kind: dpo}",)
    ),
    "reference": Feature(
        "the start as DPO's reference",
        "local.loss.reference",
        lambda config: isinstance(config.local.loss, Dpo) and config.local.loss.reference == "start",
        ("lora.start_from=ADAPTER", "local.loss={kind: dpo, reference: start}"),
    ),
    **{rule: _of_rule(rule) for rule in OTHER_RULES},
    "ranks": Feature(
        "differing ranks",
        "ranks",
        lambda config: config.ranks is not None and config.method in FEDERATED,
        ("ranks={kind: by_class, classes: [{rank: 2, fraction: 1.0}]}",),
    ),
    "product_penalty": Feature(
        "a proximal term on products",
        "local.proximal_on",
        lambda config: config.local.proximal_mu > 0 and config.local.proximal_on == "products",
        ("local.proximal_mu=0.1", "local.proximal_on=products"),
    ),
    "remembering": Feature(
        "lossy updates with error feedback",
        "compression.error_feedback",
        lambda config: (
            config.compression is not None
            and config.compression.lossy
            and config.compression.error_feedback
            and config.method in FEDERATED
        ),
        ("compression={format: int8}",),
    ),
    "buffered": Feature(
        "buffered rounds",
        "scheduling.buffered",
        lambda config: config.scheduling.buffered is not None and config.method in FEDERATED,
        ("scheduling.buffered={size: 2, concurrency: 3}",),
    ),
    "compression": Feature(
        "compressed updates",
        "compression",
        lambda config: config.compression is not None and config.method in FEDERATED,
        ("compression={format: float32}",),
    ),
    "server_optimizer": Feature(
        "a server optimiser",
        "aggregation.server_optimizer",
        lambda config: config.aggregation.server_optimizer != ServerSgd(),
        ("aggregation.server_optimizer={kind: adam}",),
    ),
    "forgetful": Feature(
        "lossy updates without error feedback",
        "compression.error_feedback",
        lambda config: (
            config.compression is not None and config.compression.lossy and not config.compression.error_feedback
        ),
        ("compression={format: int8, error_feedback: false}",),
    ),
    "scaffold": Feature(
        "SCAFFOLD",
        "local.correction",
        lambda config: isinstance(correction_of(config), Scaffold),
        ("local.correction={kind: scaffold}",),
    ),
    "feddyn": Feature(
        "FedDyn",
        "local.correction",
        lambda config: isinstance(correction_of(config), FedDyn),
        ("local.correction={kind: feddyn}",),
    ),
    "ditto": Feature(
        "Ditto", "personal", lambda config: isinstance(personal_of(config), Ditto), ("personal={kind: ditto}",)
    ),
    "fine_tune": Feature(
        "personal fine-tuning",
        "personal",
        lambda config: isinstance(personal_of(config), FineTune),
        ("personal={kind: fine_tune}",),
    ),
    "user_privacy": Feature(
        "differential privacy of clients",
        "privacy",
        lambda config: isinstance(privacy_in_force(config), UserPrivacy),
        (
            "privacy={kind: user, clip_norm: 1.0, delta: 1.0e-5, noise_multiplier: 1.0}",
            "scheduling.selection={kind: poisson, fraction: 0.5}",
            "aggregation.weights=equal",
        ),
    ),
    "sample_privacy": Feature(
        "differential privacy of rows",
        "privacy",
        lambda config: isinstance(privacy_in_force(config), SamplePrivacy),
        ("privacy={kind: sample, clip_norm: 1.0, delta: 1.0e-5, noise_multiplier: 1.0}", "local.clip_norm=0"),
    ),
    "secure_aggregation": Feature(
        "secure aggregation",
        "secure_aggregation",
        lambda config: config.secure_aggregation is not None and config.method in FEDERATED,
        ("secure_aggregation={min_clients: 2}", "aggregation.weights=equal"),
    ),
    "robust": Feature(
        "robust aggregation",
        "aggregation.robust",
        lambda config: config.aggregation.robust is not None and config.method in FEDERATED,
        ("aggregation.robust={kind: median}",),
    ),
    "attack_on_rows": Feature(
        "an attack on rows",
        "attack",
        lambda config: config.attack is not None and config.attack.kind in ("label_flip", "backdoor", "alignment"),
        ("attack={kind: label_flip}",),
    ),
    "canaries": Feature("canaries", "canaries", lambda config: config.canaries is not None, ("canaries={count: 2}",)),
    "gate": Feature(
        "a gate",
        "gate",
        lambda config: config.gate is not None and config.method in FEDERATED,
        ("gate={probe: embedded-public}",),
    ),
}
"""Every feature that does not go with some other, by a short name."""

_STALE = "An update that was begun rounds ago corrects for a server that is no longer there."
_LOST = "What never arrives of an update puts the server's correction and the clients' apart, for good."
_ALL_MEANS = "The server's correction has to be the mean of the clients', which a robust rule does not keep."
_NO_WAY_BACK = "A round that is rolled back stays in the clients' corrections, which no longer fit the server's."

_NO_FULL_MODEL = "A personal adapter is worth what it is in the full model, which FedBiOT's clients do not have."
_WHO_CAME = "The server's correction depends on how many clients came, which noise on their mean does not hide."
_UNCOUNTED = "A personal adapter is trained on the rows in steps that the rows' budget does not count."
_BOTH_WHOLE = "A correction is of both factors of one rank, the same in every round."
_WHOLE_START = "The reference is the adapter that a run starts from, of which these clients do not receive the whole."
_NEAR = "Ditto keeps its own adapter near the whole common one, which clients do not receive."


def _each(features: Sequence[str], **reasons: str) -> dict[tuple[str, str], str]:
    """Every one of ``features`` with every name of ``reasons``."""
    return {(one, other): why for other, why in reasons.items() for one in features}


REFUSED: Mapping[tuple[str, str], str] = {
    ("fedbiot", "ditto"): _NO_FULL_MODEL,
    ("fedbiot", "fine_tune"): _NO_FULL_MODEL,
    ("reference", "fine_tune"): "The result that is fine-tuned comes without the adapter that the run started from.",
    ("buffered", "scaffold"): _STALE,
    ("buffered", "feddyn"): _STALE,
    ("forgetful", "scaffold"): _LOST,
    ("forgetful", "feddyn"): _LOST,
    ("server_optimizer", "feddyn"): "FedDyn's server makes a step of its own, in place of any other.",
    ("buffered", "user_privacy"): "Epsilon is for clients who are drawn anew in every round, not for those who come.",
    ("scaffold", "user_privacy"): _WHO_CAME,
    ("feddyn", "user_privacy"): _WHO_CAME,
    ("ditto", "sample_privacy"): _UNCOUNTED,
    ("fine_tune", "sample_privacy"): _UNCOUNTED,
    ("dpo", "sample_privacy"): "A pair is two sequences, and gradients are clipped one sequence at a time.",
    ("reference", "sample_privacy"): "A pair is two sequences, and gradients are clipped one sequence at a time.",
    ("buffered", "secure_aggregation"): "Masks cancel among clients who begin and end a round together.",
    ("compression", "secure_aggregation"): "Masks make every value 32 random bits: nothing is left to be compressed.",
    ("remembering", "secure_aggregation"): "Masks make every value 32 random bits: nothing is left to be compressed.",
    ("ranks", "secure_aggregation"): "Masks cancel in a sum of updates of one shape.",
    ("forgetful", "secure_aggregation"): "Masks make every value 32 random bits: nothing is left to be compressed.",
    ("buffered", "robust"): "Updates of one buffer are changes of different adapters, so distances between them tell of"
    " their age too.",
    ("robust", "scaffold"): _ALL_MEANS,
    ("robust", "feddyn"): _ALL_MEANS,
    ("gate", "scaffold"): _NO_WAY_BACK,
    ("gate", "feddyn"): _NO_WAY_BACK,
    ("dpo", "canaries"): "A canary is a secret in a row's one answer, and a preference row has two.",
    ("dpo", "attack_on_rows"): "These attacks change a row's one answer, and a preference row has two.",
    ("robust", "user_privacy"): "The noise hides a client in a mean of clipped updates, not in what a rule picks.",
    ("robust", "secure_aggregation"): "What nobody sees one by one can not be compared: only a sum leaves the clients.",
    ("fedbiot", "ranks"): "FedBiOT's clients all train the emulator's adapter layers at lora.rank.",
    ("rolora", "buffered"): "Updates begun in a round of the other factor have no mean with a round's own.",
    ("ranks", "buffered"): "A buffer averages updates of one shape.",
    ("ranks", "scaffold"): _BOTH_WHOLE,
    ("ranks", "feddyn"): _BOTH_WHOLE,
    ("ranks", "ditto"): _NEAR,
    ("ranks", "user_privacy"): "Noise is for a mean of updates of one shape.",
    ("ranks", "sample_privacy"): "Noise on every gradient fills the rows that a lower rank leaves at zero.",
    ("ranks", "fine_tune"): "The result is of the largest rank, which not every client can train.",
    **_each(OTHER_RULES, fedbiot="FedBiOT's clients average the adapter layers' factors; other rules are for FedIT."),
    ("ranks", "robust"): "Robust rules compare updates of one shape.",
    ("fedsa_lora", "gate"): "Of the server's result alone nothing can be judged: B is with the clients.",
    **_each(OTHER_RULES, robust="A robust rule combines updates itself, and compares products of both factors."),
    ("ranks", "reference"): _WHOLE_START,
    **_each(SIDED, dpo="The reference is the base, and these rules put a side adapter beside it."),
    **_each(OTHER_RULES, reference=_WHOLE_START),
    **_each(OTHER_RULES, scaffold=_BOTH_WHOLE, feddyn=_BOTH_WHOLE, ditto=_NEAR),
    **_each(
        NOT_A_MEAN,
        server_optimizer="A server optimiser moves by a mean of changes, and these rules have none.",
        buffered="A buffer is averaged as it fills, and these rules need all updates of one message.",
        secure_aggregation="The server learns one sum of all updates, and these rules need each of them.",
        user_privacy="Noise is for a mean of clipped updates, and these rules have none.",
    ),
    **_each(
        ("ffa_lora", "rolora"), product_penalty="The term is of changes of both factors, and these rules train one."
    ),
    **_each(
        ("flora", "flexlora"), remembering="What was not sent was a change of other factors than the next round's."
    ),
}
"""Two features, in any order -> why they can not go together."""


def reason(one: str, other: str) -> str | None:
    """Why two features can not go together; None when they do."""
    return REFUSED.get((one, other)) or REFUSED.get((other, one))


def refused(config: RunConfig) -> Iterator[Problem]:
    """A problem for each pair of features that this recipe asks for and that can not go together."""
    used = [name for name, feature in FEATURES.items() if feature.used(config)]
    for one, other in combinations(used, 2):
        if why := reason(one, other):
            expected = f"{FEATURES[one].title} ({FEATURES[one].setting}) without {FEATURES[other].title}"
            yield Problem(FEATURES[other].setting, expected, "both", why)


def document() -> str:
    """docs/capabilities.md."""
    lines = [
        "# What goes together",
        "",
        "Made from `src/flocktune/config/capabilities.py`, the table by which `flocktune check` refuses a recipe.",
        "What is not refused here works. Two choices of one setting exclude each other, and are not listed.",
        "",
        "| feature | a recipe asks for it by | does not go with |",
        "|---|---|---|",
    ]
    for name, feature in FEATURES.items():
        against = ", ".join(other.title for key, other in FEATURES.items() if reason(name, key)) or "–"
        asked = "<br>".join(f"`{override}`" for override in feature.example) or f"`{feature.setting}`"
        lines.append(f"| {feature.title} | {asked} | {against} |")
    if REFUSED:
        lines += ["", "## Why not", ""]
    for one, other in combinations(FEATURES, 2):
        if why := reason(one, other):
            lines.append(f"- **{FEATURES[one].title}** with **{FEATURES[other].title}**: {why}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(document())
