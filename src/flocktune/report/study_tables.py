"""A study as tables: for the terminal (80 columns are enough), as Markdown, and as CSV with one value a line."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from flocktune.report.study_claims import claim_lines, claims_grid, claims_note, on_dataset
from flocktune.report.study_rows import Column, Row, StudyResult, outcome_label, rows
from flocktune.report.summaries import (
    DECISIVE,
    METRIC_NAMES,
    SHARES,
    Summary,
    datasets,
    emulator_dataset,
    has_emulator,
    headline_metric,
    metric,
    number,
    plug_in_gap,
    travelled,
)
from flocktune.report.tables import NOTHING, format_bytes, format_gap, format_metric, format_seconds

_WIDTH = 80
_COSTS = ("bytes_up", "bytes_down", "bytes_emulator", "trainable_parameters", "training_seconds", "seconds",
          "client_seconds_per_step", "asked", "answered")  # fmt: skip


@dataclass(frozen=True)
class StudyGrid:
    """A study's table: its rows' names, and two groups of columns."""

    names: tuple[Column, ...]
    scores: tuple[Column, ...]
    costs: tuple[Column, ...]


def study_grid(result: StudyResult) -> StudyGrid:
    """Methods and settings x what was measured and what it cost. Columns that would be empty are left out."""
    found = rows(result)
    names = [_column("Method", found, lambda row: row.label)]
    if result.config.settings:
        names.append(_column("Setting", found, lambda row: row.setting))
    seeds = [str(len(row.by_seed)) for row in found]
    if set(seeds) - {str(len(result.config.seeds))}:  # some row is of fewer seeds than the title says
        names.append(Column("Seeds", "Seeds", tuple(seeds)))
    columns = [column for dataset in _datasets(found) for column in _scores(result, found, dataset)]
    return StudyGrid(tuple(names), tuple(columns), tuple(_costs(found)))


def terminal_tables(result: StudyResult) -> list[Table]:
    """The table in as many parts as 80 columns ask for; every part repeats the names of the rows."""
    grid = study_grid(result)
    parts: list[list[Column]] = []
    for columns in (grid.scores, grid.costs):
        part: list[Column] = []
        for column in columns:
            if part and _letters([*grid.names, *part, column]) > _WIDTH:
                parts.append(part)
                part = []
            part.append(column)
        parts += [part] if part else []
    tables = []
    for place, part in enumerate(parts):
        heading = study_title(result) if place == 0 else None
        table = Table(title=heading, title_justify="left", pad_edge=False, collapse_padding=True, box=box.SIMPLE_HEAD)
        for column in (*grid.names, *part):
            left = column in grid.names and column.heading != "Seeds"
            table.add_column(column.short, justify="left" if left else "right", no_wrap=not left)
        for texts in zip(*(column.cells for column in (*grid.names, *part)), strict=True):
            table.add_row(*texts)
        tables.append(table)
    return tables


def study_in_terminal(result: StudyResult) -> Group:
    """The tables, what a reader must know of them, and what may be said about the claims."""
    claims = [*claim_lines(result), claims_note(result)] if result.config.claims else []
    return Group(*terminal_tables(result), *map(Text, [*study_notes(result), *claims]))


def study_title(result: StudyResult) -> str:
    """What the numbers are: how many seeds they are of."""
    seeds = len(result.config.seeds)
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    return f"{result.config.name}: {spread}"


def study_notes(result: StudyResult) -> list[str]:
    """What a reader of the table must know: what is missing in it, and what its numbers are."""
    found, grid = rows(result), study_grid(result)
    headings = {column.heading for column in grid.costs}
    notes = [
        f"{outcome_label(outcome)} failed: {outcome.reason}" for outcome in result.outcomes if outcome.state == "failed"
    ]
    waiting = sum(outcome.state == "waiting" for outcome in result.outcomes)
    if waiting:
        notes.append(f"{waiting} of {len(result.outcomes)} cells have not been finished yet.")
    chosen = [choice for outcome in result.outcomes if (choice := (outcome.summary or {}).get("choice"))]
    if chosen:
        early = sum(bool(choice.get("stopped_early")) for choice in chosen)
        notes.append(
            f"The validation rows decided in {len(chosen)} of {len(result.outcomes)} cells; {early} ended before the"
            " last round. Which round is the result: summary.json of each."
        )
    if any(has_emulator({row.label: row.summary}, dataset) for row in found for dataset in _datasets(found)):
        notes.append(
            "AdapFu: the adapter plugged into the full model; AdapEmu: on the emulator; Gap: AdapFu - AdapEmu, of "
            "shares in points, paired by seed."
        )
    if "Up per client and round" in headings:
        notes.append(
            "Up and down: what one client sends and receives in one round; traffic: of all clients and rounds."
        )
    if "Training" in headings:
        notes.append("Training: time in rounds, of all clients; loading, saving and evaluating left out.")
    return notes


def study_markdown(result: StudyResult) -> str:
    """The whole study as Markdown; ends with a newline."""
    grid = study_grid(result)
    parts = [f"# {result.config.name}", f"{study_title(result)}."]
    parts.append(_markdown([*grid.names, *grid.scores, *grid.costs], left=2) if rows(result) else "Nothing yet.")
    parts += ["\n".join(f"- {_plain(note)}" for note in study_notes(result))] if study_notes(result) else []
    claims = claims_grid(result)
    if claims:
        parts += ["## Claims", _markdown(claims, left=1), claims_note(result)]
    parts.append("Figure: study.html. Every value: study.csv.")
    return "\n\n".join(parts) + "\n"


def study_csv(result: StudyResult) -> str:
    """One line for each method, setting, seed, data set, category and metric; costs have neither of the middle two."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("method", "setting", "seed", "dataset", "category", "metric", "value"))
    for outcome in result.outcomes:
        for line in _values(outcome.summary or {}):
            writer.writerow((outcome.method, outcome.setting, outcome.seed, *line))
    return out.getvalue()


def format_count(value: float | None, unit: str = "") -> str:
    """A large number with three digits: ``1.25 G``."""
    if value is None:
        return NOTHING
    for letter, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {letter}{unit}"
    return f"{value:.0f} {unit}".rstrip()


def _values(summary: Summary) -> Iterator[tuple[str, str, str, float]]:
    for dataset, tables in (summary.get("metrics") or {}).items():
        for category, values in [("overall", tables.get("overall") or {}), *(tables.get("categories") or {}).items()]:
            yield from ((dataset, category, name, v) for name, v in values.items() if number(v) is not None)
    costs = [(name, summary.get(name)) for name in _COSTS] + list((summary.get("client_cost") or {}).items())
    yield from (("", "", name, value) for name, value in costs if value is not None and number(value) is not None)


def _datasets(found: Sequence[Row]) -> list[str]:
    return datasets({f"{row.label}\n{row.setting}": row.summary for row in found})


def _scores(result: StudyResult, found: Sequence[Row], dataset: str) -> Iterator[Column]:
    """The metrics of one data set; headline and loss also on the emulator where there is one."""
    summaries = {f"{row.label}\n{row.setting}": row.summary for row in found}
    headline = headline_metric(summaries, dataset)
    claimed = {claim.metric for claim in result.config.claims if claim.dataset == dataset}
    wanted = {headline, "rouge_l", "prefers_chosen", "loss", "loss_std", "loss_worst_tenth", *claimed}
    wanted |= {"exact_match"} if headline not in DECISIVE else set()
    for name in METRIC_NAMES:
        if name not in wanted or not any(metric(row.summary, dataset, name) for row in found):
            continue
        unit = " %" if name in SHARES else ""
        heading = METRIC_NAMES[name] + unit + on_dataset(dataset)
        plain = [format_metric(name, metric(row.summary, dataset, name)) for row in found]
        if not (has_emulator(summaries, dataset) and name in (headline, "loss")):
            yield Column(heading, {"exact_match": f"Exact{unit}"}.get(name, heading), tuple(plain))
            continue
        emulated = [format_metric(name, metric(row.summary, emulator_dataset(dataset), name)) for row in found]
        gaps = [format_gap(name, plug_in_gap(row.summary, dataset, name)) for row in found]
        for what, texts in (("AdapFu", plain), ("AdapEmu", emulated), ("Gap", gaps)):
            short = f"{METRIC_NAMES[name]} {what}" if name == "loss" else f"{what}{'' if what == 'Gap' else unit}"
            yield Column(f"{heading} {what}", short, tuple(texts))


def _costs(found: Sequence[Row]) -> Iterator[Column]:
    """Means over seeds; a column only where some row has it."""

    def per(row: Row, bytes_name: str, count_name: str) -> float | None:
        totals = [travelled(row.kind, summary, bytes_name) for summary in row.by_seed.values()]
        counts = [number(summary.get(count_name)) for summary in row.by_seed.values()]
        return _mean([total / count for total, count in zip(totals, counts, strict=True) if total and count])

    def traffic(row: Row) -> float | None:
        both = [[travelled(row.kind, s, name) for name in ("bytes_up", "bytes_down")] for s in row.by_seed.values()]
        return _mean([sum(part or 0.0 for part in parts) for parts in both if any(parts)])

    def trained(row: Row, name: str) -> float | None:
        return _mean([value for s in row.by_seed.values() if s.get("rounds") and (value := number(s.get(name)))])

    def client(row: Row, name: str) -> float | None:
        values = [number((summary.get("client_cost") or {}).get(name)) for summary in row.by_seed.values()]
        return _mean([value for value in values if value is not None])

    def emulator(row: Row) -> float | None:
        return _mean([value for s in row.by_seed.values() if (value := number(s.get("bytes_emulator")))])

    columns = [
        ("Up per client and round", "Up", lambda row: format_bytes(per(row, "bytes_up", "answered"))),
        ("Down per client and round", "Down", lambda row: format_bytes(per(row, "bytes_down", "asked"))),
        ("Traffic in all", "Traffic", lambda row: format_bytes(traffic(row))),
        ("Emulator", "Emulator", lambda row: format_bytes(emulator(row))),
        ("Training", "Training", lambda row: format_seconds(trained(row, "training_seconds"))),
        ("Trained parameters", "Trained", lambda row: format_count(trained(row, "trainable_parameters"))),
        ("FLOPs a step", "FLOPs/step", lambda row: format_count(client(row, "flops_per_step"))),
        ("Seconds a step", "s/step", lambda row: format_seconds(trained(row, "client_seconds_per_step"))),
        ("Activations", "Activations", lambda row: format_bytes(client(row, "activation_bytes"))),
    ]
    for heading, short, cell in columns:
        column = Column(heading, short, tuple(cell(row) for row in found))
        if any(text != NOTHING for text in column.cells):
            yield column


def _column(heading: str, found: Sequence[Row], cell: Callable[[Row], str]) -> Column:
    return Column(heading, heading, tuple(cell(row) for row in found))


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _letters(columns: Sequence[Column]) -> int:
    return sum(max(len(column.short), *map(len, column.cells)) + 2 for column in columns)


def _markdown(columns: Sequence[Column], left: int) -> str:
    texts = [[_plain(text) for text in (column.heading, *column.cells)] for column in columns]
    widths = [max(3, *map(len, column)) for column in texts]
    sides = [(place < left and columns[place].heading != "Seeds") or columns[place].heading.startswith("What")
             for place in range(len(columns))]  # fmt: skip
    heading, *lines = zip(*texts, strict=True)
    rule = ["-" * width if side else "-" * (width - 1) + ":" for width, side in zip(widths, sides, strict=True)]

    def padded(line: Sequence[str]) -> list[str]:
        return [t.ljust(w) if side else t.rjust(w) for t, w, side in zip(line, widths, sides, strict=True)]

    return "\n".join("| " + " | ".join(line) + " |" for line in (padded(heading), rule, *map(padded, lines)))


def _plain(text: str) -> str:
    return " ".join(text.replace("|", r"\|").split())
