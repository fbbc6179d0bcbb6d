"""The number that an answer ends with, and whether it is the right one.

The rule. In a reference and in an answer alike: the first number after the first ``####`` that a number follows, which
is how GSM8K marks its result; without one, the last number of the text. Two numbers match when their values are equal,
exactly: ``1,200``, ``$1200.00`` and ``1.2e3`` do, ``0.33`` and ``1/3`` do not.

A number is digits with a decimal point or without, commas between groups of three, a sign, an exponent of one or two
digits; a fraction ``3/4`` and a mixed number ``1 1/2`` are one number, and so are the signs ``¾`` and ``1½``. Currency
signs stand before, between or after without a meaning, and so does a per cent sign: ``50 %`` is 50. A minus directly
after a digit, a letter or a closing bracket is an operation, no sign: the last number of ``10-3`` is 3. Commas are not
decimal points: ``1,5`` is two numbers. Numbers in words are none.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

MARK = "####"

_DIGITS = r"\d{1,3}(?:,\d{3})+(?![\d,]*\d)|\d+"
_UNSIGNED = rf"(?:(?:{_DIGITS})(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{{1,2}}(?!\w))?"
_FRACTION = r"(?:\d+ )?\d+/0*[1-9]\d*(?![\d/])"
_NUMBER = re.compile(
    rf"(?<![\d.])(?P<sign>(?<![\w)\]])[-+])?(?:[$€£¥₹] ?)?(?P<inner>(?<=[$€£¥₹ ])[-+])?"
    rf"(?P<value>{_FRACTION}|{_UNSIGNED})",
    re.ASCII,
)
_LONGEST = 100
"""Digits of a number that is still taken for one; what loops writes more."""


def number_in(text: str) -> Fraction | None:
    """The number that ``text`` ends with, by the rule above; None when there is none."""
    for part in text.split(MARK)[1:]:
        if found := _numbers(part):
            return found[0]
    found = _numbers(text)
    return found[-1] if found else None


def same_number(answer: str, reference: str) -> bool:
    """Whether both texts end with the same number. False when either has none."""
    wanted = number_in(reference)
    return wanted is not None and number_in(answer) == wanted


def _numbers(text: str) -> list[Fraction]:
    """All numbers of a text, in order."""
    return [_value(found) for found in _NUMBER.finditer(_plain(text)) if len(found["value"]) <= _LONGEST]


def _value(found: re.Match[str]) -> Fraction:
    whole, _, fraction = found["value"].replace(",", "").rpartition(" ")
    value = Fraction(fraction) + (Fraction(whole) if whole else 0)
    return -value if "-" in (found["sign"], found["inner"]) else value


def _plain(text: str) -> str:
    """ASCII digits and signs: ``−`` is a minus, ``½`` is `` 1/2``, other digits are read as what they mean."""
    letters = []
    for letter in text.replace("\N{MINUS SIGN}", "-").replace("\N{FRACTION SLASH}", "/"):
        if letter.isascii():
            letters.append(letter)
        elif unicodedata.category(letter) == "Nd":
            letters.append(str(unicodedata.decimal(letter)))
        elif "<fraction>" in unicodedata.decomposition(letter):
            spelled = unicodedata.normalize("NFKC", letter).replace("\N{FRACTION SLASH}", "/")
            letters.append(f" {spelled}" if letters and letters[-1].isdigit() else spelled)
        else:
            letters.append(letter)
    return "".join(letters)
