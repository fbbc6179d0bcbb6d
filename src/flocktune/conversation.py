"""One or two results that answer the same instructions, for a chat in the terminal and for the playground.

Results on one base share it in memory: before each answer adapters are switched off or swapped.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from flocktune.data.examples import Message
from flocktune.errors import Problem, UserError
from flocktune.models.lora import Adapter
from flocktune.models.peft_io import CONFIG_FILE
from flocktune.results import Tuned, answer_stream, open_result

BASE = "base"
"""What ``--against`` calls the model without its adapter."""


@dataclass(frozen=True, eq=False)
class Side:
    """Who answers: a result, or (``plain``) its base without the adapter."""

    name: str
    tuned: Tuned
    plain: bool = False
    sharing: tuple[Adapter, ...] = ()
    """Other adapters of the same model, of which one is attached at a time."""


@dataclass(frozen=True)
class Settings:
    """How answers are drawn. ``temperature`` 0 is greedy; ``seed`` decides every draw."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0


def open_sides(
    result: Path,
    against: str | None = None,
    *,
    method: str | None = None,
    base_model: str | None = None,
    emulator: bool = False,
) -> tuple[Side, ...]:
    """The result, and what it is set beside: ``base``, another run's folder or adapter's; None is nothing.

    ``emulator``: FedBiOT's adapter on the emulator; its base is then the emulator without it. Raises UserError.
    """
    tuned = open_result(result, method, base_model, emulator=emulator)
    first = Side(_name(result, method, emulator), tuned)
    if against is None:
        return (first,)
    if against == BASE:
        return first, Side("emulator alone" if emulator else "base model", tuned, plain=True)
    other = Path(against)
    if not (other / "recipe.yaml").exists() and not (other / CONFIG_FILE).exists():
        raise UserError(Problem("--against", f"{BASE!r}, a run's folder or an adapter's", repr(against)))
    rival = open_result(other, None, base_model, beside=tuned)
    second = Side(_name(other, None), rival)
    if second.name == first.name:  # the same name in two places
        first, second = replace(first, name=str(result)), replace(second, name=str(other))
    if rival.base.model is not tuned.base.model:
        return first, second
    return replace(first, sharing=(rival.base.adapter,)), replace(second, sharing=(tuned.base.adapter,))


def answer(
    side: Side, instruction: str, context: str, settings: Settings, before: Sequence[Message] = ()
) -> Generator[str, None, None]:
    """One side's answer, piece by piece; ``before``: earlier turns that it follows, of user and assistant in turn.

    Sides take turns: an answer is read to its end, or closed, before another's. Raises UserError when the prompt's
    template is none for conversations.
    """
    adapter = side.tuned.base.adapter
    for other in side.sharing:
        other.detach()
    adapter.reattach()
    with adapter.disabled() if side.plain else nullcontext():
        yield from answer_stream(
            side.tuned,
            instruction,
            context,
            settings.max_new_tokens,
            settings.temperature,
            settings.seed,
            history=tuple(before),
        )


def _name(path: Path, method: str | None, emulator: bool = False) -> str:
    return path.resolve().name + (f" ({method})" if method else "") + (" on the emulator" if emulator else "")
