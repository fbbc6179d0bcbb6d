"""The site's generated pages: every key of a recipe, every command. A hook of mkdocs, so they are never old.

A key's meaning comes from where it is written already: the sentences of its dataclass's docstring that name it, else
the comment beside it in the recipe that ``flocktune init`` writes.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from importlib.resources import files as package_files
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

TEMPLATES = ("fedit.yaml", "fedbiot.yaml")

PLAIN = {
    "accountant": "How the budget is counted; `rdp` says a larger epsilon.",
    "adaptive": "Lets the clip norm follow the clients'; null keeps it.",
    "against": "With what the loss after a round is compared.",
    "base": "Run the untuned model too.",
    "batch_size": "Rows at once.",
    "beta1": "Decay of the mean of the steps.",
    "beta2": "Decay of the mean of their squares.",
    "byzantine": "How many attackers in a round it must bear with.",
    "cache_dtype": "Numbers of the cache: the model's own, or half as large.",
    "category": "A column.",
    "centralised": "Run all clients' rows in one place too.",
    "claims": "Differences that are claimed, each `{better: LABEL, than: LABEL, metric: loss}`; each is tested.",
    "classes": "Each with a `rank` and a `fraction` of the clients.",
    "client": "A column.",
    "clients": "How many clients, or which.",
    "clip_norm": "Bound of the gradient's Euclidean norm, 0 is off.",
    "clusters": "How many clusters of texts.",
    "columns": "Which column holds what.",
    "context": "A column.",
    "cpus_per_worker": "CPU cores that one worker takes.",
    "delta": "The probability with which the guarantee may fail; below one in the number of clients or rows.",
    "dropout": "Share of the adapter's inputs that is left out in a training step.",
    "dtype": "Numbers of the frozen base. Adapters are float32.",
    "engine": "Where clients run.",
    "fraction": "Share of the clients in a round.",
    "instruction": "A column.",
    "lambda_": "How much the own adapter is drawn to the common one, 0 is not at all.",
    "lr": "Learning rate.",
    "max_rows": "The most rows that are used; null is all.",
    "messages": "A column.",
    "method": "FedIT, FedBiOT, or a baseline: the untuned model, one client alone, all rows in one place.",
    "methods": "Label -> what it changes in the recipe.",
    "min_rows": "The fewest rows that a client may have.",
    "momentum": "Momentum of SGD.",
    "noise_multiplier": "The noise's standard deviation, in units of the clip norm.",
    "optimizer": "AdamW, or plain SGD with `momentum`.",
    "rank": "Rank of the factors: how much an adapter can hold.",
    "response": "A column.",
    "rounds": "How many rounds.",
    "schedule": "How the learning rate goes after the warm-up.",
    "seeds": "Every method runs once with each.",
    "settings": "Label -> what it changes for every method.",
    "staleness_exponent": "How fast old updates lose weight.",
    "train_on": "Which tokens have labels.",
    "trust_remote_code": "Run Python code that comes with a model. Refused in a federation and with FedBiOT.",
    "warmup_steps": "Optimiser steps in which the learning rate rises.",
    "weight_decay": "AdamW's, or SGD's.",
    "with_context": "The prompt of a row that has a context.",
    "without_context": "The prompt of a row that has none.",
}
"""Keys whose names say it where they stand in a recipe, and hardly in a table: what they are."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """mkdocs calls this once it has read docs/."""
    for path, content in (("reference/recipe.md", recipe_page()), ("reference/commands.md", commands_page())):
        files.append(File.generated(config, path, content=content))
    return files


def on_page_content(html: str, **_: object) -> str:
    """Docstrings' roles (``:func:``) are for Sphinx; here what they mark is code."""
    return re.sub(r":(?:func|mod|class|data|meth):(?=<code>)", "", html)


# --- recipes ---------------------------------------------------------------------------------------


def recipe_page() -> str:
    """Every key of a recipe and of a study file: type, default, meaning."""
    from flocktune.config.schema import RunConfig
    from flocktune.config.study import StudyConfig

    lines = [
        "# Every key of a recipe",
        "",
        "A recipe is a YAML file; every key is optional where a default is shown, and a key that does not exist is an",
        "error. `flocktune init my-run.yaml` writes a commented one. On the command line a key is `part.key=value`.",
        "Which features go together: [the table](../capabilities.md).",
        "",
        *_section("", RunConfig, _comments()),
        "## study file",
        "",
        "What `flocktune study FILE` reads: methods x settings x seeds.",
        "",
        *_table(StudyConfig, "", {}),
    ]
    return "\n".join(lines) + "\n"


def _section(path: str, part: type, comments: dict[str, str]) -> Iterator[str]:
    """A part of a recipe and, below it, its parts."""
    kinds = _kinds(part)
    title = f"{path}, kind: {' or '.join(kinds)}" if kinds else path
    yield from (f"## {title or 'the top level'}", "", *_about(part), *_table(part, path, comments))
    hints = get_type_hints(part, include_extras=True)
    for key in fields(part):
        for inner in _parts(hints[key.name]):
            yield from _section(f"{path}.{key.name}".lstrip("."), inner, comments)


def _kinds(part: type) -> tuple[str, ...]:
    hint = get_type_hints(part, include_extras=True).get("kind")
    return get_args(hint) if hint else ()


def _parts(hint: Any) -> list[type]:
    """The dataclasses that a value of this type may be, or is made of."""
    if is_dataclass(hint):
        return [hint] if isinstance(hint, type) else []
    arguments = get_args(hint)[:1] if get_origin(hint) is Annotated else get_args(hint)
    found = [part for argument in arguments for part in _parts(argument)]
    return list(dict.fromkeys(found))


def _about(part: type) -> list[str]:
    """The sentences of a docstring that are about the part as a whole."""
    general = [text for names, text in _said(part) if not names]
    return [_plain(" ".join(general)), ""] if general else []


def _table(part: type, path: str, comments: dict[str, str]) -> Iterator[str]:
    hints = get_type_hints(part, include_extras=True)
    rows = [key for key in fields(part) if key.name != "kind"]
    if not rows:
        return
    yield from ("| key | what it is | default | meaning |", "|---|---|---|---|")
    for key in rows:
        dotted = f"{path}.{key.name}".lstrip(".")
        hint = hints[key.name]
        cells = (f"`{dotted}`", kind_of(hint), _default(key), meaning(part, key, hint, dotted, comments))
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


def meaning(part: type, key: Field[Any], hint: Any, dotted: str, comments: dict[str, str]) -> str:
    """What the docstring says of a key, else its comment in the commented recipe, else what its own part says first."""
    said = "; ".join(text for names, text in _said(part) if key.name in names).replace(".; ", ". ")
    comment = comments.get(dotted, "")
    if {word.strip() for word in comment.split("|")} <= {str(value) for value in _choices(hint)}:
        comment = ""  # only what the type says already
    text = re.sub(rf"^``{key.name}``: ", "", said) or comment
    inner = _parts(hint)
    if not text and inner:
        text = " ".join(text for names, text in _said(inner[0])[:1] if not names) if len(inner) == 1 else ""
    return _plain(text or PLAIN.get(key.name, ""))


def _choices(hint: Any) -> Iterator[Any]:
    if get_origin(hint) is Literal:
        yield from get_args(hint)
    for argument in get_args(hint):
        yield from _choices(argument)


def _said(part: type) -> list[tuple[set[str], str]]:
    """The docstring's sentences, each with the keys it is about; one that names none goes on about those before."""
    keys = {key.name for key in fields(part)}
    found: list[tuple[set[str], str]] = []
    for paragraph in (inspect.getdoc(part) or "").split("\n\n"):
        about: set[str] = set()
        for sentence in re.split(r"(?<=\.)\s+(?=[A-Z`0-9])|;\s+(?=``)", " ".join(paragraph.split())):
            about = keys & set(re.findall(r"``([a-z_0-9]+)``", sentence)) or about
            found.append((about, sentence))
    return found


def _plain(text: str) -> str:
    """From the docstrings' markup to Markdown."""
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`").replace("None", "null")


def _default(key: Field[Any]) -> str:
    value = key.default
    if key.default_factory is not MISSING:
        value = key.default_factory()
        if is_dataclass(value):
            chosen = getattr(value, "kind", None)
            return f"`{{kind: {chosen}}}`" if chosen else "see below"
    if value is MISSING:
        return "needed"
    if isinstance(value, tuple) and len(value) > 4:
        return f"{len(value)} of them"
    return f"`{yaml.safe_dump(list(value) if isinstance(value, tuple) else value).strip().removesuffix('...').strip()}`"


def kind_of(hint: Any) -> str:
    """A type in words, with its bounds."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return ", ".join([kind_of(arguments[0]), *(bound for extra in arguments[1:] for bound in _bounds(extra))])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        parts = dict.fromkeys(kind_of(argument) for argument in arguments)
        return " or ".join(parts)
    if origin is tuple:
        return f"list of: {kind_of(arguments[0])}"
    if is_dataclass(hint):
        kinds = _kinds(hint)
        return ", ".join(f"`{kind}`" for kind in kinds) if kinds else "a part of its own"
    if origin is not None:
        return f"map of {kind_of(arguments[0])} to {kind_of(arguments[1])}"
    words = {
        int: "whole number",
        float: "number",
        bool: "yes or no",
        str: "text",
        type(None): "`null`",
        Any: "anything",
    }
    return words[hint]


WORDS = {int: "whole number", float: "number", bool: "yes or no", str: "text", type(None): "`null`", Any: "anything"}


def _bounds(extra: Any) -> Iterator[str]:
    for constraint in getattr(extra, "metadata", ()):
        for sign, words in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below")):
            if (bound := getattr(constraint, sign, None)) is not None:
                yield f"{words} {bound}"
        if lengths := getattr(constraint, "min_length", None):
            yield f"at least {lengths} of them"
        if pattern := getattr(constraint, "pattern", None):
            yield f"`{pattern}`"


def _comments() -> dict[str, str]:
    """Dotted key -> the comment beside it in the recipes that ``flocktune init`` writes."""
    found: dict[str, str] = {}
    for name in TEMPLATES:
        part = full = ""
        text = (package_files("flocktune") / "config" / "templates" / name).read_text(encoding="utf-8")
        for line in text.splitlines():
            if more := re.match(r"\s{8,}#\s{2,}(.*)", line):
                found[full] = f"{found[full]} {more[1]}"
            if not (match := re.match(r"( *)(\w+):([^#]*)(?:# ?(.*))?$", line)):
                continue
            indent, key, value, comment = match.groups()
            if not indent:
                part = "" if value.strip() else f"{key}."
            full = (part if indent else "") + key
            found[full] = found.get(full) or (comment or "").strip()
    return {key: comment for key, comment in found.items() if comment}


# --- commands --------------------------------------------------------------------------------------


def commands_page() -> str:
    """Every command with its arguments and options, as ``--help`` has them."""
    from flocktune.cli import app

    root: Any = typer.main.get_command(app)
    lines = [
        "# Every command",
        "",
        "As `flocktune COMMAND --help` says it. A mistake ends with one clear message and exit code 2, work that",
        "failed with 1, Ctrl-C with 130. `key=value` are [settings of the recipe](recipe.md) to change.",
        "",
        *_commands("flocktune", root),
    ]
    return "\n".join(lines) + "\n"


def _commands(name: str, command: Any) -> Iterator[str]:
    for verb, inner in getattr(command, "commands", {}).items():
        if not inner.hidden:
            yield from _commands(f"{name} {verb}", inner)
    if not hasattr(command, "commands"):
        yield from (f"## {name}", "", _cell(command.help or ""), "")
        yield from _usage(name, command)


def _usage(name: str, command: Any) -> Iterator[str]:
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    shown = " ".join(_argument(parameter) for parameter in arguments)
    yield from ("```text", f"{name} {shown}{' [OPTIONS]' if options else ''}".replace("  ", " "), "```", "")
    if not arguments and not options:
        return
    yield from ("| argument or option | default | meaning |", "|---|---|---|")
    for parameter in arguments:
        yield f"| `{_argument(parameter)}` | {_shown_default(parameter)} | {_cell(parameter.help or '')} |"
    for parameter in options:
        flags = ", ".join(f"`{flag}`" for flag in (*parameter.opts, *parameter.secondary_opts))
        yield f"| {flags} | {_shown_default(parameter)} | {_cell(parameter.help or '')} |"
    yield ""


def _argument(parameter: Any) -> str:
    name = (parameter.metavar or parameter.name).upper()
    several = "..." if parameter.nargs != 1 else ""
    return f"{name}{several}" if parameter.required else f"[{name}{several}]"


def _shown_default(parameter: Any) -> str:
    value = parameter.default
    if parameter.required:
        return "needed"
    if value is None or callable(value) or (parameter.param_type_name == "option" and parameter.is_flag) or value == "":
        return ""
    return f"`{value}`" if isinstance(value, (str, int, float)) or hasattr(value, "parts") else ""


def _cell(text: str) -> str:
    """One line, with nothing in it that a table or HTML would take for its own."""
    text = re.sub(r"\[/?(?:bold|dim|green|red|yellow|cyan)\]", "", " ".join(text.split()))
    return text.replace("|", "\\|").replace("<", "&lt;")
