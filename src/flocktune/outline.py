"""A recipe before its model and data are here: what is known of them stands in, so that it can be checked and counted.

Rows that are not here are as many as is known, without texts, and rows that can not be encoded are as long as
``data.max_tokens`` lets them be: what is counted of them is an upper bound.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from flocktune.config.schema import DataConfig, ModelConfig, RunConfig
from flocktune.data import known as known_data
from flocktune.data.encoding import Encoded, EncodingReport
from flocktune.data.sources import read_examples
from flocktune.errors import Problem, UserError
from flocktune.models import known as known_models
from flocktune.models.known import hub_answers
from flocktune.resident import Instructions, load_instructions


def outlined_instructions(source: str, data: DataConfig, model: ModelConfig, *, pairs: bool = False) -> Instructions:
    """As :func:`load_instructions`; what stands in where the rows, or the model's tokenizer, are not here.

    Raises UserError.
    """
    known = known_data.stand_in(source)
    if known is None and known_models.stand_in(model.path) is None:
        return load_instructions(source, data, model, pairs=pairs)
    if known is None:
        examples = read_examples(source, data.columns, max_rows=data.max_rows)
    else:
        examples = known.examples(data.columns)[: data.max_rows]
    encoded = _longest(len(examples), data.max_tokens, pairs)
    report = EncodingReport(len(examples), (), 0, len(encoded.tokens), len(encoded.tokens))
    return Instructions(examples, encoded, report, digest="")


def _longest(rows: int, max_tokens: int, pairs: bool) -> Encoded:
    """So many rows of ``max_tokens`` tokens each, all of them targets, in no memory to speak of."""
    sequences = 2 if pairs else 1
    total = rows * sequences * max_tokens
    tokens = np.broadcast_to(np.zeros(1, np.int32), total)
    trainable = np.broadcast_to(np.ones(1, np.bool_), total)
    encoded = Encoded(tokens, trainable, np.arange(rows * sequences + 1, dtype=np.int64) * max_tokens, pairs)
    each = np.full(rows, sequences * max_tokens, np.int64)
    vars(encoded).update(lengths=each, targets=each)  # else they are summed up from as many numbers as there are tokens
    return encoded


def assumptions(config: RunConfig) -> list[str]:
    """What stands in for what is not here: a text each, and the command that gets it on a line of its own."""
    said = []
    if known_models.stand_in(config.model.path):
        said.append(
            f"{config.model.path} is not on this machine: its shapes are known, weights and tokenizer were not looked "
            f"at. Get it:\n  {known_models.fetching(config.model.path)}"
        )
    for where, source in _sources(config).items():
        if known := known_data.stand_in(source):
            about = "about " if known.about else ""
            said.append(
                f"{source} ({where}) is not on this machine: it is known to have {about}{known.rows:,} rows. "
                f"Get it:\n  {known_data.fetching(source)}"
            )
    if said:
        said.append("Tokens and memory are upper bounds, of rows as long as data.max_tokens lets them be.")
    return said


def refuse_unreachable(config: RunConfig, *, but_known: bool = False) -> None:
    """Raise UserError naming everything that is not here and can not be fetched now, and how to get it.

    ``but_known``: not that for which something stands in.
    """
    problems = list(_absent(config, but_known))
    if any(on_hub for _, on_hub in problems) and hub_answers():
        problems = [one for one in problems if not one[1]]
    UserError.raise_all(problem for problem, _ in problems)


def _absent(config: RunConfig, but_known: bool) -> Iterator[tuple[Problem, bool]]:
    """What is not on this machine, and whether the hub has it."""
    path = config.model.path
    if known_models.to_be_fetched(path) and not (but_known and known_models.stand_in(path)):
        fix = f"Where there is a network: {known_models.fetching(path)}; then model.path=FOLDER."
        yield Problem("model.path", f"{path} on this machine, or a network", "neither", fix), True
    for where, source in _sources(config).items():
        if known_data.to_be_fetched(source) and not (but_known and known_data.stand_in(source)):
            on_hub = known_data.is_on_hub(source)
            then = f"; then {where}=FOLDER, or the file in it" if on_hub else ""
            fix = f"Where there is a network: {known_data.fetching(source)}{then}."
            wanted = f"{source} on this machine, or a network" if on_hub else f"the file {source}"
            yield Problem(where, wanted, "neither" if on_hub else "nothing there", fix), on_hub


def _sources(config: RunConfig) -> dict[str, str]:
    """Where a recipe names data that a run needs."""
    named = {"data.train": config.data.train, "data.test": config.data.test}
    if config.method == "fedbiot" and config.alignment is not None:
        named["alignment.public"] = config.alignment.public
    return {where: source for where, source in named.items() if source is not None}
