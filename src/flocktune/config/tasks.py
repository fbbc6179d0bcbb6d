"""What decides whether an answer is right: a setting of a recipe."""

from __future__ import annotations

from typing import Literal, TypeAlias

TaskName: TypeAlias = Literal["text", "number", "choice"]
"""``text``: likeness to the reference. ``number``: the number that an answer ends with. ``choice``: the most likely of
given choices."""

TASKS: tuple[TaskName, ...] = ("text", "number", "choice")
