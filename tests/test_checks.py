"""The rule language of flocktune.data.checks, rule by rule."""

import pytest

from flocktune.data.checks import passes

RHYME = {"contains": ["Tom", "goat"], "ends_with": ["coat"], "min_words": 4, "max_words": 8}


@pytest.mark.parametrize(
    ("answer", "check", "verdict"),
    [
        ("baker", {"one_of": ["baker"]}, True),
        ("  Baker. ", {"one_of": ["baker"]}, True),
        ("driving  nails", {"one_of": ["driving nails"]}, True),
        ("the baker", {"one_of": ["baker"]}, False),
        ("", {"one_of": ["baker"]}, False),
        ("fig, Plum.", {"list_of": ["plum", "fig", "pear"], "count": 2}, True),
        ("fig, fig", {"list_of": ["plum", "fig", "pear"], "count": 2}, False),
        ("fig, plum, pear", {"list_of": ["plum", "fig", "pear"], "count": 2}, False),
        ("fig, saw", {"list_of": ["plum", "fig", "pear"], "count": 2}, False),
        ("fig, ", {"list_of": ["plum", "fig", "pear"], "count": 2}, False),
        ("job: smith; name: Tom.", {"fields": {"name": "Tom", "job": "smith"}}, True),
        ("name: Tom", {"fields": {"name": "Tom", "job": "smith"}}, False),
        ("name: Tom; job: baker", {"fields": {"name": "Tom", "job": "smith"}}, False),
        ("name: Tom; job: smith; job: smith", {"fields": {"name": "Tom", "job": "smith"}}, False),
        ("Tom saw a goat in a coat.", RHYME, True),
        ("Tom saw a goat in a boat.", RHYME, False),
        ("Tomas saw a goat in a coat.", RHYME, False),
        ("Tom goat coat.", RHYME, False),
        ("Tom saw a goat and then another goat in a coat.", RHYME, False),
        ("", {"contains": ["Tom"]}, False),
        ("A long walk with Tom", {"contains": ["long walk"]}, True),
    ],
)
def test_verdicts(answer, check, verdict):
    assert passes(answer, check) is verdict


@pytest.mark.parametrize(
    ("check", "message"),
    [
        ({}, "exactly one of"),
        ({"regex": "x"}, "exactly one of"),
        ({"one_of": ["a"], "fields": {"a": "b"}}, "exactly one of"),
        ({"one_of": "baker"}, "non-empty list"),
        ({"one_of": []}, "non-empty list"),
        ({"one_of": [""]}, "non-empty strings"),
        ({"one_of": ["a"], "max_words": 3}, "unknown keys"),
        ({"list_of": ["a"]}, "missing keys"),
        ({"list_of": ["a"], "count": 2}, "allows only 1"),
        ({"list_of": ["a"], "count": True}, "whole number"),
        ({"fields": {}}, "non-empty object"),
        ({"fields": {"a": 1}}, "must hold strings"),
        ({"contains": ["a"], "min_words": 5, "max_words": 2}, "above max_words"),
        ({"contains": ["a"], "max_words": "2"}, "whole number"),
    ],
)
def test_malformed_checks_are_named(check, message):
    with pytest.raises(ValueError, match=message):
        passes("anything", check)
