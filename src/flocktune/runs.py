"""The life of one run: a folder that is started, can be killed at any instant, resumed, and ends with summary.json.

    RUN/recipe.yaml      the resolved recipe          RUN/state/        checkpoints
    RUN/metrics.jsonl    what happened, event by event RUN/adapter/     the result as a PEFT adapter
    RUN/answers.jsonl    answers to held-out rows      RUN/summary.json written last: the run is finished
"""

from __future__ import annotations

import json
import logging
import platform
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch

from flocktune.aggregation.lora import aggregation_error
from flocktune.algorithms import fedavg
from flocktune.assemble import Federation, federation
from flocktune.config.load import config_digest, differences, dump_recipe, load_recipe
from flocktune.config.schema import RunConfig
from flocktune.engine.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from flocktune.engine.in_process import InProcess
from flocktune.engine.rounds import Hooks, RoundRecord, run_rounds
from flocktune.errors import Problem, UserError
from flocktune.evaluation.evaluate import Evaluation, evaluate
from flocktune.files import exclusive, read_json, write_atomic, write_json
from flocktune.interfaces import State
from flocktune.models.lora import pairs
from flocktune.models.peft_io import export_peft
from flocktune.report.events import LOG_NAME, EventLog, read_events, truncate_after
from flocktune.tensors import add_scaled, digest
from flocktune.types import Tensors, Update

_LOG = logging.getLogger(__name__)

HELD_OUT = "held_out"
"""The name, in metrics, of the rows that no client trains on."""


EXPERIMENT = "experiment.json"
"""Its presence tells an experiment's folder, of several runs, from a run's."""


class Listener(Protocol):
    """Who watches a run: the live view, trackers."""

    def on_event(self, event: Mapping[str, Any]) -> None: ...

    def on_client(self, done: int, total: int, client: str) -> None: ...


class Stopped(Exception):
    """The run ended early on request, after saving. It can be resumed."""


def create_run(config: RunConfig, folder: Path, seeds: Sequence[int] = ()) -> None:
    """Make the folder of a run, or with ``seeds`` that of an experiment. The recipe is written last.

    Raises UserError when there is something in the folder already, or it can not be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise UserError(
                Problem(str(folder), "a new or empty run folder", "one with files in it",
                        f"Go on with it by: flocktune resume {folder}, or choose another with --out.")
            )
        if seeds:
            write_json(folder / EXPERIMENT, {"seeds": list(seeds)})
        write_atomic(folder / "recipe.yaml", dump_recipe(config))
    except OSError as error:
        raise UserError(Problem(str(folder), "a folder that can be written", str(error))) from None


def execute(folder: Path, listeners: Sequence[Listener] = (), stop: threading.Event | None = None) -> dict[str, Any]:
    """Run, or go on with, the run in ``folder`` to its end, and return its summary.

    Raises UserError (also when recipe, data or base model are not those of the checkpoint), RoundFailed, and
    Stopped after ``stop`` was set: the round at hand is finished and saved first.
    """
    with exclusive(folder):
        if is_finished(folder):
            return read_json(folder / "summary.json")
        started = time.perf_counter()
        config = load_recipe(folder / "recipe.yaml")
        if config.runtime.threads:
            torch.set_num_threads(config.runtime.threads)
        fed = federation(config)
        return _Run(fed, folder, listeners, stop or threading.Event(), time.perf_counter() - started).to_end()


def is_finished(folder: Path) -> bool:
    """Whether the run in ``folder`` has reached its end."""
    return (folder / "summary.json").exists()


@dataclass
class _Run:
    """One run on its way. All that matters is on the disk; this only holds what is needed to go on."""

    fed: Federation
    folder: Path
    listeners: Sequence[Listener]
    stop: threading.Event
    load_s: float
    carried_s: dict[str, float] = field(default_factory=dict)

    def to_end(self) -> dict[str, Any]:
        config, fed = self.fed.config, self.fed
        engine = InProcess(fed.client)
        checkpoint = load_checkpoint(self.folder / "state")
        state = fed.server.init(fed.start)
        if checkpoint is not None:
            self._check_identity(checkpoint)
            state = {name: checkpoint.state[name] for name in state}
            engine.memories.update(checkpoint.memories)
        done = self.rounds_done = checkpoint.rounds_done if checkpoint else 0
        self.engine = engine
        self._open_log(done, resumed=checkpoint is not None)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        hooks = Hooks(
            on_reply=lambda *tick: [listener.on_client(*tick) for listener in self.listeners] and None,
            on_round=self._on_round,
            should_stop=self.stop.is_set,
            diagnose=_diagnose,
            diagnose_clients=config.aggregation.diagnose_clients,
        )
        state = run_rounds(
            fed.server,
            engine,
            fed.schedule,
            state,
            first_round=done,
            rounds=fed.rounds,
            kind=fedavg.KIND,
            seed=config.seed,
            config_digest=config_digest(config),
            hooks=hooks,
        )
        if self.rounds_done < fed.rounds:
            raise Stopped(str(self.folder))
        return self._finish(fed.server.result(state))

    def _check_identity(self, checkpoint: Checkpoint) -> None:
        saved, mine = checkpoint.identity, self.fed.identity
        changed = [f"recipe, {line}" for line in differences(saved["recipe"], mine["recipe"])]
        changed += [
            f"{what}: {saved[key][:12]}... -> {mine[key][:12]}..."
            for key, what in (("data", "training data"), ("test", "test data"), ("model", "base model"))
            if saved[key] != mine[key]
        ]
        UserError.raise_all(
            Problem(str(self.folder), "what the checkpoint was made with", f"a change of {line}",
                    "Undo the change, or start a new run.")
            for line in changed
        )

    def _open_log(self, done: int, *, resumed: bool) -> None:
        path = self.folder / LOG_NAME
        if resumed:
            truncate_after(path, done - 1)
        elif path.exists():
            path.unlink()  # killed before the first checkpoint: the run starts again
        self.log = EventLog(path)
        self.carried_s = {"load": self.load_s}
        if resumed:
            self._emit({"event": "resumed", "round": done})
            return
        fed = self.fed
        self._emit(
            {
                "event": "run_start",
                "name": fed.config.name,
                "method": fed.config.method,
                "seed": fed.config.seed,
                "rounds": fed.rounds,
                **fed.data.describe(),
                "trainable_parameters": sum(value.numel() for value in fed.start.values()),
                "model": fed.config.model.path,
                "device": str(fed.base.device),
                "versions": versions(),
            }
        )

    def _emit(self, event: dict[str, Any]) -> None:
        event["time"] = time.time()
        self.log.append(event)
        for listener in self.listeners:
            listener.on_event(event)

    def _on_round(self, record: RoundRecord, state: State) -> None:
        """Evaluate if it is time, write the event, save. The event comes first: a resume drops what was not saved."""
        config, rounds_done = self.fed.config, record.round + 1
        seconds = {**record.seconds, **self.carried_s}
        self._emit(round_event(record, seconds))
        every = config.evaluation.every
        if every and rounds_done % every == 0 and rounds_done < self.fed.rounds:
            self._evaluate(self.fed.server.result(state), rounds_done, config.evaluation.max_rows)
        started = time.perf_counter()
        save_checkpoint(
            self.folder / "state",
            Checkpoint(rounds_done, state, self.engine.memories, self.fed.identity),
            keep=config.checkpoint.keep,
        )
        kept_every = config.checkpoint.keep_adapters_every
        if kept_every and rounds_done % kept_every == 0:
            self._export(self.fed.server.result(state), self.folder / "adapters" / f"round-{rounds_done:05d}")
        self.rounds_done = rounds_done
        # Known only now: it goes into the next round's event.
        self.carried_s = {"save": time.perf_counter() - started}

    def _evaluate(self, adapter: Tensors, rounds_done: int, max_rows: int | None) -> Evaluation | None:
        if not self.fed.data.test.examples:
            return None
        started = time.perf_counter()
        result = evaluate_adapter(self.fed, adapter, max_rows)
        self._emit(
            {
                "event": "evaluation",
                "round": rounds_done,
                "dataset": HELD_OUT,
                **result.as_dict(),
                "seconds": time.perf_counter() - started,
            }
        )
        return result

    def _export(self, adapter: Tensors, folder: Path) -> None:
        export_peft(adapter, self.fed.config.lora, self.fed.base.model, folder, self.fed.config.model.path)

    def _finish(self, adapter: Tensors) -> dict[str, Any]:
        result = self._evaluate(adapter, self.fed.rounds, None)
        if result is not None and result.answers:
            lines = (json.dumps(answer.as_dict(), ensure_ascii=False) + "\n" for answer in result.answers)
            write_atomic(self.folder / "answers.jsonl", "".join(lines))
        self._export(adapter, self.folder / "adapter")
        summary = self._summary(adapter, result)
        self._emit({"event": "run_end", "summary": summary})
        write_json(self.folder / "summary.json", summary)
        return summary

    def _summary(self, adapter: Tensors, result: Evaluation | None) -> dict[str, Any]:
        config, events = self.fed.config, read_events(self.folder / LOG_NAME)
        rounds = [event for event in events if event["event"] == "round"]
        only = {"client": self.fed.schedule(0).asked[0]} if config.method == "local" else {}
        return {
            "name": config.name,
            "method": config.method,
            **only,
            "seed": config.seed,
            "rounds": len(rounds),
            "metrics": {HELD_OUT: result.as_dict()} if result else {},
            "bytes_up": sum(event["bytes_up"] for event in rounds),
            "bytes_down": sum(event["bytes_down"] for event in rounds),
            "seconds": sum(sum(event["seconds"].values()) for event in rounds)
            + sum(event["seconds"] for event in events if event["event"] == "evaluation"),
            "peak_memory_bytes": peak_memory_bytes(),
            "trainable_parameters": sum(value.numel() for value in adapter.values()),
            "adapter_sha256": digest(adapter),
        }


def evaluate_adapter(fed: Federation, adapter: Tensors, max_rows: int | None = None) -> Evaluation:
    """Evaluate ``adapter`` on the held-out rows of ``fed``."""
    base, config = fed.base, fed.config
    base.adapter.load(adapter)
    return evaluate(
        base.model,
        base.tokenizer,
        fed.data.test.examples,
        fed.data.test.encoded,
        settings=config.evaluation,
        template=config.data.template,
        max_tokens=config.data.max_tokens,
        pad_id=base.pad_id,
        max_rows=max_rows,
    )


def round_event(record: RoundRecord, seconds: Mapping[str, float]) -> dict[str, Any]:
    """A round as the log tells it. Counts and means only: no data."""
    clients = {
        name: {
            "loss": client.metrics["loss"].value,
            "weight": client.weight,
            "tokens": client.metrics["tokens"].total,
            "seconds": client.metrics["seconds"].total,
        }
        for name, client in record.clients.items()
    }
    return {
        "event": "round",
        "round": record.round,
        "selected": list(record.selected),
        "answered": list(record.clients),
        "failures": [{"client": failure.client, "reason": failure.reason} for failure in record.failures],
        "train_loss": record.metrics["loss"].value,
        "clients": clients,
        "update_norm": record.update_norm,
        "aggregation_error": record.diagnostics.get("aggregation_error"),
        "bytes_down": record.bytes_down,
        "bytes_up": record.bytes_up,
        "tokens": record.metrics["tokens"].total,
        "seconds": dict(seconds),
    }


def _diagnose(message: Tensors, updates: Sequence[Update]) -> dict[str, float]:
    """The aggregation error of methods that average LoRA factors apart."""
    clients = [pairs(add_scaled(message, update.delta)) for update in updates]
    return {"aggregation_error": aggregation_error(clients, [update.weight for update in updates])}


def versions() -> dict[str, str]:
    """Versions of what bears on a result."""
    found = {"python": platform.python_version()}
    for name in ("flocktune", "torch", "transformers", "peft", "tokenizers", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def peak_memory_bytes() -> int:
    """The most memory this process has held so far, plus the most on the GPU."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return host + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)


@contextmanager
def stop_on_signals(say: Callable[[str], None]) -> Iterator[threading.Event]:
    """Ctrl-C (or SIGTERM) once: finish the round, save, stop. Twice: stop now; the last round's checkpoint stands."""
    stop = threading.Event()

    def handle(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        say("Stopping after this round. Press Ctrl-C again to stop now; nothing saved is lost.")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
