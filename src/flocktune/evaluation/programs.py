"""Answers that are code, tried against tests: pass@k (Chen et al. 2021, arXiv 2107.03374).

From an answer to a program. Its code is what stands in its first fence of three backticks, or all of it. Code that
defines the entry point is taken whole, and so is all code of a row that names none; other code is the body that
continues the prompt (HumanEval): up to the first line that is not indented, its first line given four blanks where an
answer lost them. The prompt stands before it where it is Python, for its imports and helpers; then the tests, and a
call of ``check`` with the entry point.
"""

from __future__ import annotations

import ast
import math
import re

from flocktune.data.questions import Program

PASS_AT = (1, 10, 100)
"""The k of pass@k, as in the paper."""

_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
_INDENT = "    "


def pass_at(k: int, samples: int, correct: int) -> float:
    """The probability that one of ``k`` answers is right, unbiased, when ``correct`` of ``samples`` are:
    1 - C(n - c, k) / C(n, k). ``k`` is at most ``samples``."""
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def program(prompt: str, answer: str, tests: Program) -> str:
    """The Python to run for one answer."""
    code, name = _code(answer), tests.entry_point
    defined = not name or re.search(rf"^(?:async )?def {re.escape(name)}\b|^{re.escape(name)}\s*=", code, re.MULTILINE)
    if defined:
        parts = [prompt, code] if name and _is_python(prompt) else [code]
    else:
        parts = [prompt.rstrip("\n"), _body(code)]
    return "\n".join([*parts, "", tests.tests, *([f"check({name})"] if name else []), ""])


def _code(answer: str) -> str:
    fenced = _FENCE.search(answer)
    return fenced[1] if fenced else answer


def _body(code: str) -> str:
    """The indented lines that continue a function; what comes after them is something else."""
    lines = code.strip("\n").splitlines()
    if lines and not lines[0][:1].isspace():
        lines[0] = _INDENT + lines[0]
    end = next((place for place, line in enumerate(lines) if line.strip() and not line[0].isspace()), len(lines))
    return "\n".join(lines[:end])


def _is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
