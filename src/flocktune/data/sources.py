"""Where rows come from: files, folders, saved data sets, the hub, the embedded world.

Local names come first: the hub is asked only for what looks like ``owner/name`` and is not a local
path. JSON and CSV are read here, line by line, so that an error can say which line it means.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from flocktune.assets import embedded_data, embedded_public
from flocktune.config.schema import EMBEDDED, EMBEDDED_PREFERENCES, EMBEDDED_PUBLIC, Columns
from flocktune.data.examples import Example, to_examples
from flocktune.data.preferences import preference_rows
from flocktune.errors import Problem, UserError, near, reason
from flocktune.files import sha256_path

Rows: TypeAlias = "Iterator[tuple[str, Mapping[str, Any] | Problem]]"
"""(where, row); a row that can not be read is a Problem."""

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.\[\]:%-]+)?")
SPLIT_FILE = re.compile(r"(train|test|validation|valid|val|dev|eval)([-_.].*)?")
"""How a file is called, without suffix, that holds a split and not a client's rows."""


def read_examples(source: str, columns: Columns, *, max_rows: int | None = None) -> list[Example]:
    """Read the rows of ``source``, at most ``max_rows`` of them.

    ``source``: ``embedded``, ``embedded-preferences`` or ``embedded-public``; a .json, .jsonl, .csv or .parquet
    file; a saved Hugging Face data set; a folder of files named by split, or of one file per client (then the file's
    name without suffix is ``Example.client``); a hub id ``owner/name``. A ``:split`` may follow the last
    three; it is ``train`` by default. Raises UserError for what is missing, empty, or malformed (file and line).
    """
    examples: list[Example] = []
    try:
        for rows, client in _tables(source):
            left = None if max_rows is None else max_rows - len(examples)
            examples += to_examples(islice(rows, left), columns, client=client)
    except OSError as error:
        raise UserError(Problem(source, "a readable file", reason(error))) from None
    if not examples:
        raise UserError(Problem(source, "at least one row", "none: it is empty"))
    return examples


def source_digest(source: str) -> str:
    """Hex SHA-256 of what ``source`` holds: a file's or folder's contents; a hub data set's id and version.

    Raises UserError when there is nothing.
    """
    path, split = locate(source)
    if path is not None:
        content = sha256_path(path)
        return content if split is None else hashlib.sha256(f"{content}:{split}".encode()).hexdigest()
    import datasets

    name, _, of_hub = source.partition(":")
    try:
        version = datasets.load_dataset_builder(name).hash
    except (OSError, ValueError) as error:
        raise UserError(_hub_problem(source, error)) from None
    return hashlib.sha256(f"{name}@{version}:{of_hub or 'train'}".encode()).hexdigest()


def locate(source: str) -> tuple[Path | None, str | None]:
    """The local path and split that ``source`` means; neither for a hub id. Raises UserError for neither."""
    if source in (EMBEDDED, EMBEDDED_PREFERENCES):
        return embedded_data(), None
    if source == EMBEDDED_PUBLIC:
        return embedded_public(), None
    if Path(source).exists():
        return Path(source), None
    stem, colon, split = source.rpartition(":")
    if colon and Path(stem).is_dir():
        return Path(stem), split
    if _HUB_ID.fullmatch(source) and Path(source).suffix not in SUFFIXES:
        return None, None
    raise UserError(
        Problem(
            source,
            f"a file ({', '.join(SUFFIXES)}), a folder, a hub id, {EMBEDDED!r}, {EMBEDDED_PREFERENCES!r},"
            f" or {EMBEDDED_PUBLIC!r}",
            "nothing there",
            near(Path(source)),
        )
    )


def _tables(source: str) -> Iterator[tuple[Rows, str | None]]:
    """The tables of rows that ``source`` consists of, each with the client that owns it, if one does."""
    path, split = locate(source)
    if source == EMBEDDED_PREFERENCES:
        yield _preferences_of(rows_of_file(embedded_data())), None
    elif path is None:
        yield _rows_of_hub(source), None
    elif path.is_file():
        yield rows_of_file(path), None
    elif _is_saved_dataset(path):
        yield _rows_of_saved(path, split), None
    else:
        yield from ((rows_of_file(file), client) for file, client in _files_of_folder(path, split))


def _preferences_of(rows: Rows) -> Rows:
    """The embedded rows, which are sound, with two answers each."""
    sound = [row for _, row in rows if isinstance(row, Mapping)]
    for number, row in enumerate(preference_rows(sound), start=1):
        yield f"{EMBEDDED_PREFERENCES}, row {number}", row


# --- files -----------------------------------------------------------------------------------------


def rows_of_file(path: Path) -> Rows:
    """The rows of one file as they stand, whatever their columns. Raises UserError for a file that is none of these."""
    match path.suffix.lower():
        case ".jsonl":
            return _rows_of_json_lines(path)
        case ".json":
            return _rows_of_json(path)
        case ".csv":
            return _rows_of_csv(path)
        case ".parquet":
            return _rows_of_parquet(path)
    raise UserError(Problem(str(path), f"a file that ends in {', '.join(SUFFIXES)}", f"{path.suffix or 'no suffix'}"))


def _lines(path: Path) -> Iterator[str]:
    """Lines as text. Raises UserError naming the line that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode()
            except UnicodeDecodeError as error:
                raise UserError(
                    Problem(f"{path}:{number}", "UTF-8 text", f"other bytes ({error.reason})", "Is it a text file?")
                ) from None


def _rows_of_json_lines(path: Path) -> Rows:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            yield where, Problem(where, "one JSON object on the line", str(error))
        else:
            yield where, row if isinstance(row, dict) else Problem(where, "a JSON object", type(row).__name__)


def _rows_of_json(path: Path) -> Rows:
    """A JSON list of objects, or JSON lines in a file that ends in .json."""
    first = next((line for line in _lines(path) if line.strip()), "")
    if not first.lstrip().startswith("["):
        yield from _rows_of_json_lines(path)
        return
    try:
        rows = json.loads("".join(_lines(path)))
    except json.JSONDecodeError as error:
        raise UserError(Problem(f"{path}:{error.lineno}", "a JSON list of objects", error.msg)) from None
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        yield where, row if isinstance(row, dict) else Problem(where, "a JSON object", type(row).__name__)


def _rows_of_csv(path: Path) -> Rows:
    reader = csv.reader(_lines(path), strict=True)
    line = 1
    try:
        header = next(reader, [])
        line = reader.line_num + 1
        for fields in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if len(fields) == len(header):
                yield where, dict(zip(header, fields, strict=True))
            elif fields:
                yield where, Problem(where, f"{len(header)} fields, as in the header", f"{len(fields)}")
    except csv.Error as error:
        raise UserError(Problem(f"{path}:{line}", "a CSV row", str(error), "JSON lines hold any text.")) from None


def _rows_of_parquet(path: Path) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        number = 0
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except pa.ArrowException as error:
        raise UserError(Problem(str(path), "a Parquet file", str(error))) from None


# --- folders and data sets -------------------------------------------------------------------------


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _files_of_folder(path: Path, split: str | None) -> list[tuple[Path, str | None]]:
    """(file, client) of a folder: the files of one split, or every file as one client."""
    candidates = [path, path / "data"] if (path / "data").is_dir() else [path]
    files = [file for folder in candidates for file in sorted(folder.iterdir()) if file.suffix.lower() in SUFFIXES]
    splits = {file: match[1] for file in files if (match := SPLIT_FILE.fullmatch(file.stem))}
    if not files:
        raise UserError(Problem(str(path), f"a folder with files that end in {', '.join(SUFFIXES)}", "none"))
    if splits and len(splits) < len(files):
        other = next(file.name for file in files if file not in splits)
        raise UserError(
            Problem(str(path), "files named by split (train, test), or one file per client", f"a mix ({other})",
                    "Name one file, or move the others away.")
        )  # fmt: skip
    if not splits and split is None:
        return [(file, file.stem) for file in files]
    wanted = split or ("train" if "train" in splits.values() else next(iter(splits.values())))
    chosen: list[tuple[Path, str | None]] = [(file, None) for file, name in splits.items() if name == wanted]
    if not chosen:
        raise UserError(_no_split(str(path), wanted, sorted(set(splits.values()))))
    return chosen


def _rows_of_saved(path: Path, split: str | None) -> Rows:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(Problem(str(path), "a data set saved by save_to_disk", str(error))) from None
    if isinstance(loaded, datasets.DatasetDict):
        wanted = split or ("train" if "train" in loaded else next(iter(loaded), "train"))
        if wanted not in loaded:
            raise UserError(_no_split(str(path), wanted, list(loaded)))
        loaded = loaded[wanted]
    elif split is not None:
        raise UserError(_no_split(str(path), split, []))
    for number, row in enumerate(loaded, start=1):
        yield f"{path}, row {number}", row


def _rows_of_hub(source: str) -> Rows:
    import datasets

    name, _, split = source.partition(":")
    try:
        loaded = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError) as error:
        raise UserError(_hub_problem(source, error)) from None
    for number, row in enumerate(loaded, start=1):
        yield f"{source}, row {number}", row


def _no_split(where: str, wanted: str, splits: list[str]) -> Problem:
    return Problem(where, f"a split {wanted!r}", f"splits {', '.join(splits)}" if splits else "data without splits")


def _hub_problem(source: str, error: Exception) -> Problem:
    return Problem(source, "a data set on the hub (there is no local file of this name)", str(error).split("\n")[0])
