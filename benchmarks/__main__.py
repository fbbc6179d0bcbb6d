"""Choose benchmarks, run them, print Markdown: ``python -m benchmarks [NAME ...] [--quick] [--json FILE]``."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.paired import Options, Result

NAMES = (
    "start",
    "overhead",
    "lora_step",
    "stacked",
    "packing",
    "generation",
    "alternative",
    "aggregate",
    "client_cost",
    "gpu",
    "scale_out",
    "federation",
    "coordinator",
    "cross_device",
    "secure_aggregation",
)
"""A module each, with ``run(options)``: a result, or several by name."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the environment, a table a benchmark, and at the end all goals beside what was measured.

    Returns 1 when a benchmark failed, which ends none of the others. A goal that is missed is told, not an error.
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    unknown = [name for name in given.names if name not in NAMES]
    if unknown:
        parser.error(f"expected {', '.join(NAMES)}, got {', '.join(unknown)}")
    # Before torch is imported: OpenMP reads it once.
    os.environ["OMP_NUM_THREADS"] = os.environ["RAYON_NUM_THREADS"] = str(given.threads)
    import torch

    from benchmarks.paired import Options, environment, environment_line, say, table

    torch.set_num_threads(given.threads)
    options = Options(given.model, given.data, given.threads, given.quick)
    found = environment(options)
    print(environment_line(found), end="\n\n", flush=True)
    results: dict[str, Result] = {}
    failed: dict[str, str] = {}
    for name in given.names or NAMES:
        say(name)
        try:
            new = _run(name, options)
        except Exception as error:  # whatever it is, the others are still to be run
            traceback.print_exc()
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        for result in new.values():
            print(result.markdown(), end="\n\n", flush=True)
        results |= new
    print("\n".join(["### Goals", "", *table(("", "goal", "measured", ""), _summary(results, failed))]), flush=True)
    if given.json:
        tables = {name: {**dataclasses.asdict(result), "verdict": result.verdict} for name, result in results.items()}
        given.json.parent.mkdir(parents=True, exist_ok=True)
        page = json.dumps({"environment": found, "results": tables, "failed": failed}, indent=2)
        given.json.write_text(page + "\n", encoding="utf-8")
    return 1 if failed else 0


def _run(name: str, options: Options) -> dict[str, Result]:
    found = importlib.import_module(f"benchmarks.{name}").run(options)
    return {f"{name}: {part}": each for part, each in found.items()} if isinstance(found, Mapping) else {name: found}


def _summary(results: Mapping[str, Result], failed: Mapping[str, str]) -> list[tuple[str, ...]]:
    told = ((name, each.goal, each.measured, each.verdict) for name, each in results.items())
    return [*told, *((name, "", "", f"FAILED: {error}") for name, error in failed.items())]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)}; all when none is given")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes; the times mean nothing")
    parser.add_argument("--model", default="embedded", help="a model folder, a hub id, or embedded")
    parser.add_argument("--data", default="embedded", help="instructions: a file, a folder, a hub id, or embedded")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, for everything that is compared")
    parser.add_argument("--json", type=Path, help="also write the results here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
