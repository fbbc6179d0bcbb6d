"""The number that an answer ends with."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flocktune.evaluation.numbers import number_in, same_number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("The answer is 18.", "18"),
        ("She makes $1,200.50!", "2401/2"),
        ("#### 1,234,567", "1234567"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("$ -5", "-5"),
        ("€ 5,000", "5000"),
        ("it fell to −7 °C", "-7"),
        ("+3", "3"),
        ("10-3", "3"),
        ("10 - 3", "3"),
        ("(2)-3", "3"),
        ("x-7", "7"),
        ("5, -7", "-7"),
        ("16 - 3 - 4 = 9", "9"),
        ("- 5 apples", "5"),
        ("3/4 of it", "3/4"),
        ("-1/2", "-1/2"),
        ("1 1/2 cups", "3/2"),
        ("-1 1/2", "-3/2"),
        ("½", "1/2"),
        ("1½", "3/2"),
        ("2 ¾ hours", "11/4"),
        ("1⁄4", "1/4"),
        ("7/0", "0"),
        ("16/4=4", "4"),
        (".5", "1/2"),
        ("-.5", "-1/2"),
        ("1.5e3", "1500"),
        ("2E-2", "1/50"),
        ("1e999", "999"),
        ("50 %", "50"),
        ("1,2,3", "3"),
        ("1,234,5", "5"),
        ("12,34", "34"),
        ("1,000,000.25", "4000001/4"),
        ("007", "7"),
        ("٣", "3"),
        ("\\boxed{72}", "72"),
        ("eighteen", None),
        ("", None),
        ("1" * 101, None),
        ("7, then " + "1" * 5000, "7"),
        ("9 + 9\n#### 18\n\nInstruction: add 5", "18"),
        ("####\n18 eggs for 9 days", "18"),
        ("#### none\n#### 4 of 5", "4"),
        ("3 and 4 ####", "4"),
        ("#### 18 #### 19", "18"),
    ],
)
def test_the_number_that_a_text_ends_with(text: str, value: str | None) -> None:
    assert number_in(text) == (None if value is None else Fraction(value))


@pytest.mark.parametrize(
    ("answer", "same"),
    [("so 1200", True), ("$1,200.00", True), ("1.2e3", True), ("2400/2", True), ("-1200", False), ("1200.01", False),
     ("12 00", False), ("none", False)],
)  # fmt: skip
def test_numbers_match_by_value(answer: str, same: bool) -> None:
    assert same_number(answer, "She has <<600*2=1200>>1200.\n#### 1,200") is same


def test_without_a_number_nothing_matches() -> None:
    assert not same_number("none", "none")
    assert not same_number("0.33", "1/3")


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "${:,}", "#### {:,}", "= {}.", "it is {:,} now"]))
def test_any_whole_number_is_read_back(value: int, form: str) -> None:
    assert number_in(form.format(value)) == value


@given(st.text(max_size=60))
def test_no_text_is_too_strange(text: str) -> None:
    number_in(text)
