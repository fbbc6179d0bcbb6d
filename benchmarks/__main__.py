"""Choose benchmarks, run them, print Markdown: ``python -m benchmarks [NAME ...] [--quick] [--json FILE]``."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

NAMES = (
    "overhead",
    "alternative",
    "server_memory",
    "client_cost",
    "scale_out",
    "federation",
    "coordinator",
    "cross_device",
    "secure_aggregation",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the environment and one table a benchmark. Returns 0: a goal that is missed is told, not an error."""
    parser = _parser()
    given = parser.parse_args(arguments)
    unknown = [name for name in given.names if name not in NAMES]
    if unknown:
        parser.error(f"expected {', '.join(NAMES)}, got {', '.join(unknown)}")
    # Before torch is imported: OpenMP reads it once.
    os.environ["OMP_NUM_THREADS"] = os.environ["RAYON_NUM_THREADS"] = str(given.threads)
    import torch

    from benchmarks.paired import Options, environment, environment_line, say

    torch.set_num_threads(given.threads)
    options = Options(given.model, given.data, given.threads, given.quick)
    found = environment(options)
    print(environment_line(found), end="\n\n", flush=True)
    results = {}
    for name in given.names or NAMES:
        say(name)
        results[name] = importlib.import_module(f"benchmarks.{name}").run(options)
        print(results[name].markdown(), end="\n\n", flush=True)
    if given.json:
        tables = {name: dataclasses.asdict(result) for name, result in results.items()}
        given.json.write_text(json.dumps({"environment": found, "results": tables}, indent=2) + "\n", encoding="utf-8")
    return 0


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
