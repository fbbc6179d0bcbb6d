"""Data sets whose size is known without their rows, so that a recipe is checked before they are fetched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from flocktune.assets import known_data_file
from flocktune.config.schema import Columns
from flocktune.data.examples import EVERYTHING, Example
from flocktune.data.sources import locate
from flocktune.errors import UserError
from flocktune.files import read_json


@dataclass(frozen=True)
class KnownData:
    """A data set by its ``names``: hub ids, and what its file is called. ``categories``: rows of each, if it has any.

    ``get``: the command that fetches it, ``{path}`` where to; None for the hub's own. ``about``: counts are rough.
    """

    names: tuple[str, ...]
    rows: int
    categories: Mapping[str, int]
    get: str | None
    about: bool

    def examples(self, columns: Columns) -> list[Example]:
        """As many rows as there are, without texts, each of its category, and of its owner if a category is one."""
        kinds = self.categories or {EVERYTHING: self.rows}
        return [
            Example("", category=kind, client=kind if columns.client and self.categories else None)
            for kind, count in kinds.items()
            for _ in range(count)
        ]


@cache
def known_data() -> Mapping[str, KnownData]:
    """Name, in lower case -> what is known of it."""
    found: dict[str, KnownData] = {}
    for told in read_json(known_data_file()):
        names, get, about = tuple(told["names"]), told.get("get"), told.get("about", False)
        known = KnownData(names, told["rows"], told.get("categories", {}), get, about)
        found |= {name.lower(): known for name in names}
    return found


def to_be_fetched(source: str) -> bool:
    """Whether ``source`` is on the hub and not on this machine yet, or a file that is not here and known."""
    try:
        path, _ = locate(source)
    except UserError:
        return Path(source).name.lower() in known_data()
    return path is None and not _in_cache(source.partition(":")[0])


def is_on_hub(source: str) -> bool:
    """Whether ``source`` is a hub id: it looks like one, and nothing here has its name."""
    try:
        return locate(source)[0] is None
    except UserError:
        return False


def stand_in(source: str) -> KnownData | None:
    """What is known of a data set that is still to be fetched; None for one that is here, or that nobody wrote down."""
    if not to_be_fetched(source):
        return None
    return known_data().get(source.partition(":")[0].lower()) or known_data().get(Path(source).name.lower())


def fetching(source: str) -> str:
    """The command that fetches ``source``."""
    known = stand_in(source)
    if known and known.get:
        return known.get.format(path=source)
    return f"hf download --repo-type dataset {source.partition(':')[0]} --local-dir FOLDER"


def _in_cache(hub_id: str) -> bool:
    """Whether the library has prepared this data set before; its folders' names differ in case and in underscores."""
    from datasets import config

    def plain(name: str) -> str:
        return name.lower().replace("_", "").replace("-", "").replace("/", "")

    folder = Path(config.HF_DATASETS_CACHE)
    return folder.is_dir() and any(plain(one.name) == plain(hub_id) for one in folder.iterdir() if one.is_dir())
