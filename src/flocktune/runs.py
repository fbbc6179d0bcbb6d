"""The life of one run: it starts in a folder, can be killed at any instant, resumes, and ends with summary.json."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from flocktune.algorithms import fedbiot
from flocktune.assemble import Assembly, engine_of, evaluation_loss, federation
from flocktune.config.load import config_digest, load_recipe
from flocktune.config.privacy_rules import privacy_in_force
from flocktune.config.schema import FEDERATED
from flocktune.engine.buffered import at_work, run_buffered
from flocktune.engine.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from flocktune.engine.rounds import Hooks, RoundRecord, run_rounds
from flocktune.evaluation.evaluate import Evaluation, evaluate
from flocktune.federated import server_side
from flocktune.files import exclusive, read_json, write_atomic, write_json
from flocktune.gate import told
from flocktune.interfaces import Engine, State
from flocktune.per_client import evaluations, fine_tune, keep_own
from flocktune.privacy.noise import read_or_make_key
from flocktune.protection import secured
from flocktune.report.events import LOG_NAME, EventLog, read_events, truncate_after
from flocktune.resident import Base, Instructions
from flocktune.run_events import round_event, spent, start_event, summarise
from flocktune.run_folder import logged, refuse_changes, remove_strays, show_bundle, write_adapter
from flocktune.standing import is_finished, told_ending
from flocktune.types import Tensors

HELD_OUT, ON_EMULATOR, TRIGGERED = "held_out", "held_out_emulator", "triggered"
"""The names, in metrics, of the rows that no client trains on: with the adapter in the whole model (FedBiOT: AdapFu),
with FedBiOT's adapter on the emulator (AdapEmu), and with a backdoor's trigger in them, the target as the answer."""


SECRET = "secret.key"
"""In a run's folder, where its recipe has differential privacy: what its noise and its cohorts are made of. Whoever has
it can take the noise away."""


class Listener(Protocol):
    """Who watches a run: the live view, trackers."""

    def on_event(self, event: Mapping[str, Any]) -> None: ...

    def on_client(self, done: int, total: int, client: str) -> None: ...


class Stopped(Exception):
    """The run ended early on request, after saving. It can be resumed."""


@dataclass(frozen=True)
class Elsewhere:
    """The clients of a real federation, and what makes the engine that reaches them, once the run is assembled."""

    clients: Sequence[str]
    engine: Callable[[Assembly], Engine]


def execute(
    folder: Path,
    listeners: Sequence[Listener] = (),
    stop: threading.Event | None = None,
    elsewhere: Elsewhere | None = None,
) -> dict[str, Any]:
    """Run, or go on with, the run in ``folder`` to its end, and return its summary.

    ``elsewhere``: clients that are not in the recipe's data but in a federation.
    Raises UserError (also when recipe, data or base model are not those of the checkpoint), RoundFailed, and
    Stopped after ``stop`` was set: the round at hand is finished and saved first.
    """
    with exclusive(folder), logged(folder), told_ending(folder, Stopped):
        remove_strays(folder)
        if is_finished(folder):
            return read_json(folder / "summary.json")
        started = time.perf_counter()
        config = load_recipe(folder / "recipe.yaml")
        if config.runtime.threads:
            torch.set_num_threads(config.runtime.threads)
        bundle = folder / "emulator"
        checkpoint = load_checkpoint(folder / "state")
        secret = None
        if privacy_in_force(config):
            secret = read_or_make_key(folder / SECRET, may_make=checkpoint is None)
        if elsewhere:
            fed = server_side(config, elsewhere.clients, bundle, secret)
        else:
            fed = federation(config, bundle, secret=secret)
        if checkpoint is not None:
            refuse_changes(folder, checkpoint.identity, fed.identity)
        if fed.emulated:
            show_bundle(fed.emulated.bundle, bundle)
        log = _open_log(folder, checkpoint, fed.rounds)
        with nullcontext(elsewhere.engine(fed)) if elsewhere else engine_of(config, fed, folder, secret) as engine:
            run = _Run(fed, folder, log, listeners, engine, {"load": time.perf_counter() - started})
            return run.to_end(checkpoint, stop or threading.Event())


def _open_log(folder: Path, checkpoint: Checkpoint | None, rounds: int) -> EventLog:
    """The log, as it was when the checkpoint was saved: what came after it is about to happen again."""
    path = folder / LOG_NAME
    if checkpoint is not None:
        # Killed while finishing: the last evaluation is made again.
        finishing = checkpoint.rounds_done == rounds
        first_alignment = checkpoint.rounds_done == 0  # the one that has a checkpoint of its own
        truncate_after(path, checkpoint.rounds_done - 1, with_evaluation=not finishing, with_alignment=first_alignment)
    else:
        path.unlink(missing_ok=True)
    return EventLog(path)


@dataclass
class _Run:
    """One run on its way. All that matters is on the disk; this only holds what is needed to go on.

    ``carried_s``: seconds that are known only after a round's event was written; they go into the next one's.
    """

    fed: Assembly
    folder: Path
    log: EventLog
    listeners: Sequence[Listener]
    engine: Engine
    carried_s: dict[str, float]
    rounds_done: int = 0

    def to_end(self, checkpoint: Checkpoint | None, stop: threading.Event) -> dict[str, Any]:
        config, fed = self.fed.config, self.fed
        state = fed.server.init(fed.start)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if checkpoint is None:
            self._emit(start_event(fed))
        else:
            # In the order of a fresh state: a file's order is another, and sums over tensors round by their order.
            saved, self.rounds_done = checkpoint.state, checkpoint.rounds_done
            state = {name: saved[name] for name in state} | at_work(saved)
            self.engine.memories.update(checkpoint.memories)
            self._emit({"event": "resumed", "round": self.rounds_done})
            if self.rounds_done == 0:  # the first alignment is in this checkpoint, its time in no round's event yet
                done = [event["seconds"] for event in read_events(self.log.path) if event["event"] == "alignment"]
                self.carried_s["align"] = sum(done)
        buffered = config.scheduling.buffered if config.method in FEDERATED else None
        if buffered:
            loop = partial(run_buffered, fed.server, self.engine, list(fed.data.clients), buffered)
        else:
            loop = partial(run_rounds, fed.server, self.engine, fed.schedule, collect=fed.collect)
        state = loop(
            state,
            first_round=self.rounds_done,
            rounds=fed.rounds,
            kind=fed.kind,
            seed=config.seed,
            config_digest=config_digest(config),
            model_digest=fed.model_digest,
            transforms=fed.transforms,
            hooks=Hooks(
                on_prepared=self._on_prepared,
                on_reply=self._on_reply,
                on_round=self._on_round,
                should_stop=stop.is_set,
                diagnose=fed.diagnose,
                # Of a sum alone the error of averaging A and B apart can not be known.
                diagnose_clients=0 if secured(config) else config.aggregation.diagnose_clients,
            ),
        )
        if self.rounds_done < fed.rounds:
            raise Stopped(str(self.folder))
        return self._finish(state)

    def _emit(self, event: dict[str, Any]) -> None:
        event["time"] = time.time()
        self.log.append(event)
        for listener in self.listeners:
            listener.on_event(event)

    def _on_reply(self, done: int, total: int, client: str) -> None:
        for listener in self.listeners:
            listener.on_client(done, total, client)

    def _on_prepared(self, number: int, told: Mapping[str, Any], state: State) -> None:
        """Write what the server did before a round. The first alignment is long: it is saved at once."""
        self._emit({"event": "alignment", "round": number, **told})
        self.carried_s["align"] = told["seconds"]
        if number == 0:
            self._save(0, state)

    def _on_round(self, record: RoundRecord, state: State) -> None:
        """Write the event, evaluate if it is time, save. The event comes first: a resume drops what was not saved."""
        config, done = self.fed.config, record.round + 1
        event = {**round_event(record, self.carried_s), **spent(self.fed, done, record), **told(config.gate, state)}
        self._emit(event)
        every = config.evaluation.every
        if every and done % every == 0 and done < self.fed.rounds:
            self._evaluate(state, done, config.evaluation.max_rows)
            self._evaluate_clients(self.fed.server.result(state), done)
        started = time.perf_counter()
        kept_every = config.checkpoint.keep_adapters_every
        if kept_every and done % kept_every == 0:  # before the checkpoint: a resume does not come back to this round
            self._export(self.fed.server.result(state), self.folder / "adapters" / f"round-{done:05d}")
        self._save(done, state)
        self.rounds_done = done
        self.carried_s = {"save": time.perf_counter() - started}

    def _save(self, rounds_done: int, state: State) -> None:
        checkpoint = Checkpoint(rounds_done, state, self.engine.memories, self.fed.identity)
        save_checkpoint(self.folder / "state", checkpoint, keep=self.fed.config.checkpoint.keep)

    def _evaluate(self, state: State, rounds_done: int, max_rows: int | None) -> dict[str, Evaluation]:
        """The adapter in the whole model, and with FedBiOT on the emulator too."""
        fed = self.fed
        results: dict[str, Evaluation] = {}
        if not fed.data.test.examples:
            return results
        plugged = {HELD_OUT: (fed.base, fed.server.result(state), fed.data.test)}
        if fed.emulated:
            plugged[ON_EMULATOR] = (fed.emulated.base, fedbiot.emulator_result(state), fed.data.test)
        if fed.triggered and fed.triggered.examples:
            plugged[TRIGGERED] = (fed.base, fed.server.result(state), fed.triggered)
        for name, (base, adapter, rows) in plugged.items():
            started = time.perf_counter()
            results[name] = evaluate_adapter(fed, base, adapter, rows, max_rows)
            numbers = {"dataset": name, **results[name].as_dict(), "seconds": time.perf_counter() - started}
            self._emit({"event": "evaluation", "round": rounds_done, **numbers})
        return results

    def _evaluate_clients(self, result: Tensors, rounds_done: int) -> dict[str, Any]:
        """Client by client, on its own held-out rows."""
        found = {}
        for name, numbers in evaluations(self.fed, result, self.engine.memories):
            self._emit({"event": "evaluation", "round": rounds_done, "dataset": name, **numbers})
            found[name] = {"overall": numbers["overall"], "categories": {}}
        return found

    def _export(self, adapter: Tensors, folder: Path) -> None:
        write_adapter(folder, adapter, self.fed.config, self.fed.base.model)

    def _finish(self, state: State) -> dict[str, Any]:
        fed = self.fed
        results = self._evaluate(state, fed.rounds, None)
        if HELD_OUT in results and results[HELD_OUT].answers:
            lines = (json.dumps(answer.as_dict(), ensure_ascii=False) + "\n" for answer in results[HELD_OUT].answers)
            write_atomic(self.folder / "answers.jsonl", "".join(lines))
        adapter = fed.server.result(state)
        self._export(adapter, self.folder / "adapter")
        fine_tune(fed, self.engine, adapter)
        by_client = self._evaluate_clients(adapter, fed.rounds)
        own = keep_own(fed, adapter, self.engine.memories, self.folder / "personal")
        if fed.emulated:
            whole, model = fedbiot.emulator_result(state), fed.emulated.base.model
            write_adapter(
                self.folder / "emulator_adapter", whole, fed.config, model, str((self.folder / "emulator").resolve())
            )
        summary = summarise(fed, adapter, results, read_events(self.log.path))
        summary["metrics"] |= by_client
        if own:
            summary["clients_with_own_adapter"] = own
        self._emit({"event": "run_end", "summary": summary})
        write_json(self.folder / "summary.json", summary)
        return summary


def evaluate_adapter(
    fed: Assembly, base: Base, adapter: Tensors, rows: Instructions, max_rows: int | None = None
) -> Evaluation:
    """Evaluate ``adapter`` in ``base`` on ``rows``, as ``fed`` evaluates."""
    config = fed.config
    base.adapter.load(adapter)
    return evaluate(
        base.model,
        base.tokenizer,
        rows.examples,
        rows.encoded,
        settings=config.evaluation,
        template=config.data.template,
        max_tokens=config.data.max_tokens,
        pad_id=base.pad_id,
        max_rows=max_rows,
        preferences=evaluation_loss(fed, base),
    )
