"""Client data allocation as files: what ``flocktune split`` writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.table import Table

from flocktune.allocation import hold_out_validation
from flocktune.config.schema import RunConfig
from flocktune.data.examples import Example
from flocktune.data.heterogeneity import category_counts, heterogeneity
from flocktune.data.partition import allocate, hold_out
from flocktune.data.sources import SPLIT_FILE, read_examples
from flocktune.errors import Problem, UserError
from flocktune.files import write_atomic, write_json
from flocktune.report.html import write_holdings

TEST_FILE, VALIDATION_FILE = "test.jsonl", "validation.jsonl"


def write_split(config: RunConfig, folder: Path) -> Table:
    """Write one JSONL file per client below ``folder/clients``, test.jsonl, split.json and who-holds-what.html.

    And validation.jsonl, where the recipe holds rows out for it. ``folder/clients`` is itself a data source for
    allocation ``natural``. Returns a table of who holds what. Raises UserError; an existing split is never overwritten.
    """
    examples = read_examples(config.data.train, config.data.columns, max_rows=config.data.max_rows)
    kept, held = hold_out([example.category for example in examples], config.data.test_rows_per_category, config.seed)
    kept, validation = hold_out_validation(config, kept, [example.category for example in examples])
    categories = [examples[row].category for row in kept]
    partition = allocate(
        config.allocation,
        categories=categories,
        clients=[examples[row].client for row in kept],
        texts=lambda: [f"{examples[row].instruction} {examples[row].context}" for row in kept],
        seed=config.seed,
    )
    parts = folder / "clients"
    try:
        parts.mkdir(parents=True, exist_ok=True)
        if any(parts.iterdir()):
            raise UserError(
                Problem(str(parts), "a new or empty folder", "one with files in it", "Choose another: --to")
            )
        for client, rows in partition.clients.items():
            _write_rows(parts / f"{file_stem(client)}.jsonl", [examples[kept[row]] for row in rows], client)
        _write_rows(folder / TEST_FILE, [examples[row] for row in held])
        if validation:
            _write_rows(folder / VALIDATION_FILE, [examples[row] for row in validation])
        measured = heterogeneity(partition.clients, categories)
        counts = category_counts(partition.clients, categories)
        write_json(
            folder / "split.json",
            {"clients": counts, "heterogeneity": asdict(measured), "unassigned": len(partition.unassigned)},
        )
        write_holdings(folder / "who-holds-what.html", counts, asdict(measured))
    except OSError as error:
        raise UserError(Problem(str(folder), "a folder that can be written", str(error))) from None
    title = f"{len(counts)} clients in {parts}, {len(held) + len(validation)} rows held out"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("client", no_wrap=True)
    table.add_column("rows", justify="right")
    table.add_column("categories, most first")
    for client, held_by in counts.items():
        most = sorted((name for name, count in held_by.items() if count), key=lambda name: -held_by[name])
        table.add_row(client, f"{sum(held_by.values()):,}", ", ".join(f"{name} {held_by[name]}" for name in most))
    return table


def file_stem(client: str) -> str:
    """A file's name for a client: its own, unless that would lead elsewhere or be read as a split's (train, test).

    Different clients get different names.
    """
    name = client.replace("%", "%25").replace("/", "%2F")
    return f"%{name}" if SPLIT_FILE.fullmatch(name) else name


def _write_rows(path: Path, examples: Sequence[Example], client: str | None = None) -> None:
    owner = {} if client in (None, path.stem) else {"client": client}
    lines = (json.dumps({**_row(example), **owner}, ensure_ascii=False) + "\n" for example in examples)
    write_atomic(path, "".join(lines))


def _row(example: Example) -> dict[str, object]:
    """A row that is read back to the same example."""
    row: dict[str, object]
    if example.history:
        turns = [{"role": turn.role, "content": turn.content} for turn in example.history]
        turns.append({"role": "user", "content": example.instruction})
        if example.rejected is not None:
            row = {"prompt": turns, "chosen": example.response, "rejected": example.rejected}
        elif example.response:
            row = {"messages": [*turns, {"role": "assistant", "content": example.response}]}
        else:
            row = {"messages": turns}
    elif example.rejected is not None:
        row = {"instruction": example.instruction, "context": example.context}
        row |= {"chosen": example.response, "rejected": example.rejected}
    else:
        row = {"instruction": example.instruction, "context": example.context, "response": example.response}
    row["category"] = example.category
    return row if example.check is None else {**row, "check": dict(example.check)}
