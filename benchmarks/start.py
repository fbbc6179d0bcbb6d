"""How long it takes to begin: ``flocktune --help``, and the first training step of a run.

Every measurement is a fresh process, from its start on, in turns with what can not be saved: Python itself, and
importing torch and transformers' Llama. Modules are compiled beforehand, as after any first use. The first step is the
end of the first client's round of one step, by the run's own log: with the tokens kept from an earlier run, and, as on
the very first run, with none. Processor seconds are beside the wall's: on a busy machine they say more.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.paired import Options, Result, Spread, interleaved, ratio, timed

HELP_GOAL_S, STEP_GOAL_S = 0.4, 8.0
PYTHON, HELP, LLAMA = "python -c pass", "flocktune --help", "importing torch and Llama"
KEPT, NOTHING = "first step, tokens kept", "first step, nothing kept"
PATIENCE_S = 300.0


def run(options: Options) -> Result:
    """Fresh processes in turns."""
    turns = 1 if options.quick else 7
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        recipe = place / "recipe.json"
        recipe.write_text(json.dumps(one_step(options)), encoding="utf-8")
        measures: dict[str, Callable[[int], float]] = {
            PYTHON: lambda turn: timed(lambda: _python(["-c", "pass"])),
            HELP: lambda turn: timed(lambda: _python(["-m", "flocktune", "--help"])),
            LLAMA: lambda turn: timed(
                lambda: _python(["-c", "import torch; from transformers import LlamaForCausalLM"])
            ),
            KEPT: lambda turn: first_step(recipe, place / f"kept-{turn}", place / "tokens"),
            NOTHING: lambda turn: first_step(recipe, place / f"nothing-{turn}", place / f"no-tokens-{turn}"),
        }
        processor: dict[str, list[float]] = {name: [] for name in measures}
        counted = {name: _counting(measure, processor[name]) for name, measure in measures.items()}
        seconds = interleaved(counted, turns, warm_up=0 if options.quick else 1)
    return _result(options, seconds, {name: Spread.of(spent[-turns:]) for name, spent in processor.items()})


def _counting(measure: Callable[[int], float], spent: list[float]) -> Callable[[int], float]:
    """``measure``, which starts processes one at a time; ``spent`` gets their processor seconds, call by call."""

    def counted(turn: int) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = measure(turn)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        return seconds

    return counted


def one_step(options: Options) -> Mapping[str, object]:
    """The default recipe but for this: one round, one client, one step."""
    return {
        "name": "start",
        "rounds": 1,
        "model": {"path": options.model},
        "data": {"train": options.data},
        "scheduling": {"selection": {"kind": "uniform", "fraction": 0.01}},
        "local": {"steps": 1},
        "runtime": {"device": "cpu", "threads": options.threads},
    }


def first_step(recipe: Path, out: Path, tokens: Path) -> float:
    """Seconds from the process's start to the end of its first round. It is killed then."""
    started = time.time()
    command = [sys.executable, "-m", "flocktune", "run", str(recipe), "--out", str(out), "--quiet"]
    with subprocess.Popen(
        command, env=_environment(tokens), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            while time.time() - started < PATIENCE_S:
                for line in _lines(out / "metrics.jsonl"):
                    event = json.loads(line)
                    if event["event"] == "round":
                        return float(event["time"]) - started
                if process.poll() is not None:
                    raise RuntimeError(f"the run ended before its first round: {process.communicate()[1][-2000:]}")
                time.sleep(0.02)
            raise RuntimeError(f"no round within {PATIENCE_S:g} s")
        finally:
            process.kill()


def _lines(path: Path) -> Sequence[str]:
    """What is written in whole lines."""
    return path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []


def _python(arguments: Sequence[str]) -> None:
    subprocess.run([sys.executable, *arguments], env=_environment(), check=True, stdout=subprocess.DEVNULL)


def _environment(tokens: Path | None = None) -> dict[str, str]:
    """As a user has it: what Python compiled is kept."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    paths = os.pathsep.join(path for path in sys.path if path)
    return {**kept, "PYTHONPATH": paths, **({"FLOCKTUNE_CACHE": str(tokens)} if tokens else {})}


def _result(options: Options, seconds: Mapping[str, Sequence[float]], processor: Mapping[str, Spread]) -> Result:
    spreads = {name: Spread.of(spent) for name, spent in seconds.items()}
    floors = {HELP: PYTHON, KEPT: LLAMA, NOTHING: LLAMA}
    more = {name: ratio(seconds[name], seconds[floor]) for name, floor in floors.items()}
    help_s, step_s = spreads[HELP].median, spreads[NOTHING].median
    return Result(
        title="Start: help, and the first training step",
        goal=f"help in less than {HELP_GOAL_S:g} s, the first step in less than {STEP_GOAL_S:g} s",
        met=None if options.quick else help_s < HELP_GOAL_S and step_s < STEP_GOAL_S,
        header=("", "seconds: median (min to max)", "processor seconds", "times its floor, turn by turn"),
        rows=[
            (name, str(spread), str(processor[name]), str(more[name]) if name in more else "")
            for name, spread in spreads.items()
        ],
        notes=(f"{len(seconds[HELP])} turns of fresh processes after one more; modules compiled, files in memory.",),
        values={
            "seconds": seconds,
            "processor": {name: spread.median for name, spread in processor.items()},
            "times_floor": {name: spread.median for name, spread in more.items()},
        },
        measured=f"{help_s:.2f} s; {step_s:.2f} s with nothing kept, {spreads[KEPT].median:.2f} s with the tokens kept",
        floor=f"Python itself {spreads[PYTHON].median:.2f} s; importing the libraries {spreads[LLAMA].median:.2f} s",
    )
