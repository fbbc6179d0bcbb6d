"""Errors a person can act on: what was expected, what was got, where, what to do."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flocktune.types import Failure


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    ``where`` is a recipe path (``local.lr``) or a file and line; ``fix`` says what to do.
    """

    where: str
    expected: str
    got: str
    fix: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: expected {self.expected}, got {self.got}"
        return f"{text.removesuffix('.')}. {self.fix}" if self.fix else text


def reason(error: OSError) -> str:
    """Why a file could not be read or written, in words, without the number and the path that Python puts around it."""
    words = {
        errno.EACCES: "no permission",
        errno.EPERM: "no permission",
        errno.ENOENT: "nothing there",
        errno.ENOSPC: "no room left on the disk",
        errno.EDQUOT: "no room left in your share of the disk",
        errno.EFBIG: "a file too large for the disk, or for this shell's limit (ulimit -f)",
        errno.EROFS: "a disk that can only be read",
        errno.EISDIR: "a folder",
        errno.ENOTDIR: "a file where a folder should be",
    }
    return words.get(error.errno or 0, error.strerror or str(error))


def near(path: Path) -> str:
    """``Did you mean ...?`` for the entry of the same folder whose name is like that of ``path``, else nothing."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    found = difflib.get_close_matches(path.name, [name for name in names if name != path.name], n=1, cutoff=0.7)
    return f"Did you mean {path.with_name(found[0])}?" if found else ""


class FlocktuneError(Exception):
    """Base of all errors that flocktune raises on purpose."""


class UserError(FlocktuneError):
    """A mistake in what the user gave. The command line shows it and exits with code 2."""

    def __init__(self, *problems: Problem | str) -> None:
        self.problems: Sequence[Problem | str] = problems
        super().__init__("\n".join(str(problem) for problem in problems))

    @classmethod
    def raise_all(cls, problems: Iterable[Problem | str]) -> None:
        """Raise one error that names every problem; do nothing when there is none."""
        found = tuple(problems)
        if found:
            raise cls(*found)


class UpdateRefused(FlocktuneError):
    """A client's update that must not touch the state (names, shapes, dtypes, NaN, weight)."""


class TooFewUpdates(FlocktuneError):
    """A rule of aggregation that means nothing for so few updates; ``setting`` is what asks for ``needed``."""

    def __init__(self, needed: int, setting: str) -> None:
        self.needed, self.setting = needed, setting
        super().__init__(f"{setting}: needs at least {needed} updates in a round")


class GateShut(FlocktuneError):
    """So many rounds in a row were rolled back that the run ends. The state is that before them."""


REASONS_SHOWN = 50
"""Of a round's clients in a message; ``RoundFailed.failures`` has them all."""


class RoundFailed(FlocktuneError):
    """Fewer clients answered than the quorum. Names every reason; the state is unchanged.

    ``round`` counts from 0, as everywhere in the code; the message counts from 1, as people do.
    """

    def __init__(
        self, round: int, needed: int, answered: int, failures: Sequence[Failure], setting: str = "scheduling.quorum"
    ) -> None:
        self.failures = tuple(failures)
        reasons = "".join(f"\n  {failure.client}: {failure.reason}" for failure in self.failures[:REASONS_SHOWN])
        if len(self.failures) > REASONS_SHOWN:
            reasons += f"\n  and {len(self.failures) - REASONS_SHOWN} more"
        clients = "1 client" if needed == 1 else f"{needed} clients"
        super().__init__(
            f"round {round + 1}: expected updates of at least {clients}, got {answered}.{reasons}\n"
            f"Mend the clients and resume the run, or lower {setting}."
        )
