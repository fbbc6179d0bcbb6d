"""Mistakes in how a command was typed, in the voice of all other errors: where, what was expected, what to do."""

from __future__ import annotations

import difflib
import re

import click

from flocktune.errors import Problem


def in_our_voice(error: click.ClickException) -> Problem | str:
    """What click found wrong with a command."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "flocktune"
    see = f"See: {command} --help"
    match error:
        case click.NoSuchOption():
            known = [name for option in context.command.params for name in option.opts] if context else []
            return Problem(
                error.option_name, f"an option of {command}", "an unknown one", _near(error.option_name, known) or see
            )
        case click.MissingParameter():
            name = _name(error.param) if error.param else str(error.param_hint or "an argument")
            return Problem(command, name, "nothing", see)
        case click.BadParameter():
            name = _name(error.param) if error.param else str(error.param_hint or "value")
            for pattern, expected in _VALUES.items():
                if found := re.fullmatch(pattern, error.message):
                    return Problem(name, expected.format(*found.groups()), found[1], see)
            return f"{name}: {_small(error.message)}. {see}"
        case click.UsageError() if error.message.startswith("No such command"):
            typed = error.message.split("'")[1]
            group = context.command if context else None
            known = list(group.commands) if isinstance(group, click.Group) else []
            return Problem(typed, f"a command of {command}", "an unknown one", _near(typed, known) or see)
    return f"{command}: {_small(error.format_message())}. {see}"


_VALUES = {
    r"(.+) is not in the range x>=(.+?)\.?": "at least {1}",
    r"(.+) is not in the range (.+?)\.?": "a number x with {1}",
    r"('.*') is not a valid integer(?: range)?\.?": "a whole number",
    r"('.*') is not a valid float(?: range)?\.?": "a number",
}
"""What click says of a value -> what was expected; the first group is what was got."""


def _name(param: click.Parameter) -> str:
    """As the help has it: an option with its dashes, an argument in capitals."""
    return param.opts[0] if param.param_type_name == "option" else (param.metavar or str(param.name)).upper()


def _near(typed: str, known: list[str]) -> str:
    near = difflib.get_close_matches(typed, known, n=1, cutoff=0.5)
    return f"Did you mean {near[0]}?" if near else ""


def _small(message: str) -> str:
    """As a part of a sentence."""
    return (message[:1].lower() + message[1:]).rstrip(".")
