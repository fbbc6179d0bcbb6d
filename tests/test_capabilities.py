"""Which features go together: what the table says is what a recipe meets, and what the document shows."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from flocktune.config.capabilities import FEATURES, REFUSED, document, reason
from flocktune.config.load import parse_recipe, to_tree
from flocktune.config.schema import RunConfig
from flocktune.errors import UserError

DOCUMENT = Path(__file__).parent.parent / "docs" / "capabilities.md"

RECIPE = "local: {steps: 10}"
"""What examples change: nothing but defaults."""

EXAMPLES = {name: feature.example for name, feature in FEATURES.items() if feature.example}


def test_the_document_says_what_the_table_says() -> None:
    made_by = "python -m flocktune.config.capabilities > docs/capabilities.md"
    assert DOCUMENT.read_text(encoding="utf-8") == document(), made_by


def test_the_document_lists_every_feature_and_every_reason() -> None:
    for feature in FEATURES.values():
        assert f"| {feature.title} | " in document()
    for pair, why in REFUSED.items():
        (line,) = [
            line
            for line in document().splitlines()
            if line.endswith(why) and all(f"**{FEATURES[name].title}**" in line for name in pair)
        ]
        assert line.startswith("- ")


@pytest.mark.parametrize("name", FEATURES)
def test_a_feature_has_a_setting_that_exists_and_an_example_that_asks_for_it(name: str) -> None:
    feature = FEATURES[name]
    assert not feature.used(RunConfig()), "defaults use nothing that anything else is refused for"
    assert feature.example, "an example that switches it on"
    config = parse_recipe(RECIPE, feature.example)
    assert feature.used(config)
    branch = to_tree(config)
    for part in feature.setting.split("."):
        assert part in branch, f"{feature.setting} is no key of a recipe"
        branch = branch[part]


@pytest.mark.parametrize("pair", REFUSED, ids="+".join)
def test_every_refused_pair_is_refused_with_its_reason(pair: tuple[str, str]) -> None:
    one, other = (FEATURES[name] for name in pair)
    with pytest.raises(UserError) as caught:
        parse_recipe(RECIPE, [*one.example, *other.example])
    assert REFUSED[pair] in str(caught.value)
    assert one.setting in str(caught.value)
    assert other.setting in str(caught.value)


def test_no_pair_is_in_the_table_twice() -> None:
    assert len({frozenset(pair) for pair in REFUSED}) == len(REFUSED)
    assert all(len(set(pair)) == 2 for pair in REFUSED)


def asked_for(name: str) -> set[str]:
    """All features that an example uses: preference tuning by the start as its reference, say."""
    config = parse_recipe(RECIPE, EXAMPLES[name])
    return {other for other, feature in FEATURES.items() if feature.used(config)}


def go_together(one: str, other: str) -> bool:
    """No pair of all that the two ask for is refused, and their examples do not say two things of one setting."""
    said, too = (dict(override.split("=", 1) for override in EXAMPLES[name]) for name in (one, other))
    agree = all(too.get(key, value) == value for key, value in said.items())
    return agree and not any(reason(*pair) for pair in combinations(asked_for(one) | asked_for(other), 2))


TOGETHER = [pair for pair in combinations(EXAMPLES, 2) if go_together(*pair)]


@pytest.mark.parametrize("pair", TOGETHER, ids="+".join)
def test_every_other_pair_makes_a_sound_recipe(pair: tuple[str, str]) -> None:
    config = parse_recipe(RECIPE, [override for name in pair for override in EXAMPLES[name]])
    assert all(FEATURES[name].used(config) for name in pair) or "baseline" in pair, "a baseline sets others aside"
