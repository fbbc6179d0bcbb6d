"""The verb that looks at the installation itself."""

from __future__ import annotations

import json
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer

from flocktune.cli.common import app, console, escaped

if TYPE_CHECKING:
    from rich.table import Table

    from flocktune.doctor import Finding

_STYLES = {"ok": "green", "absent": "dim", "warning": "yellow", "problem": "bold red"}
_WORDS = {"absent": "-"}


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="The findings as one JSON object.")] = False) -> None:
    """What works here, what is missing, and what to do: versions, extras, devices, hub, disk. Exit code 1: broken."""
    from flocktune.doctor import as_json as in_json
    from flocktune.doctor import examine, is_broken

    findings = examine()
    if as_json:
        print(json.dumps(in_json(findings), indent=2))
    else:
        for part, found in groupby(findings, key=lambda finding: finding.part):
            console.print(f"[bold]{escaped(part)}[/]")
            console.print(_table(list(found)))
        console.print(_verdict(findings), highlight=False)
    raise typer.Exit(1 if is_broken(findings) else 0)


def _table(findings: list[Finding]) -> Table:
    """State, name, what was found; below it what to do."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True, width=8)
    table.add_column(no_wrap=True, width=15)
    table.add_column(overflow="fold")
    for finding in findings:
        state = Text(f" {_WORDS.get(finding.state, finding.state)}", style=_STYLES[finding.state])
        said = Text(finding.said)
        if finding.fix:
            said.append(f"\n{finding.fix}", style="dim")
        table.add_row(state, finding.name, said)
    return table


def _verdict(findings: list[Finding]) -> str:
    count = {state: sum(finding.state == state for finding in findings) for state in ("problem", "warning")}
    told = [f"{number} {name}{'' if number == 1 else 's'}" for name, number in count.items() if number]
    if not told:
        return "Nothing is broken."
    return f"{' and '.join(told)}: what to do stands beside {'it' if sum(count.values()) == 1 else 'each'}."
