"""The life of one run: it starts in a folder, can be killed at any instant, resumes, and ends with summary.json."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from flocktune.algorithms import fedbiot
from flocktune.assemble import Assembly, engine_of, federation
from flocktune.choosing import VALIDATION, Progress, choice, ends_early, progress
from flocktune.config.load import config_digest, load_recipe
from flocktune.config.privacy_rules import privacy_in_force
from flocktune.config.schema import FEDERATED
from flocktune.engine.buffered import in_order, run_buffered
from flocktune.engine.checkpoint import Checkpoint, checkpoint_of, forget_after, load_checkpoint, save_checkpoint
from flocktune.engine.rounds import Hooks, RoundRecord, run_rounds
from flocktune.federated import server_side
from flocktune.files import exclusive, read_json, write_atomic, write_json
from flocktune.gate import told
from flocktune.interfaces import Engine, State
from flocktune.looking import HELD_OUT, look_at_clients, look_at_rows
from flocktune.per_client import fine_tune, keep_own
from flocktune.privacy.noise import read_or_make_key
from flocktune.protection import secured
from flocktune.report.events import LOG_NAME, EventLog, read_events, truncate_after
from flocktune.run_events import round_event, spent, start_event, summarise
from flocktune.run_folder import logged, refuse_changes, remove_strays, show_bundle, write_adapter
from flocktune.standing import is_finished, told_ending
from flocktune.types import Tensors

BEST = "best"
"""Within a run's states: those of the best rounds so far, where the recipe keeps the best one."""

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
        log = _open_log(folder, checkpoint)
        with nullcontext(elsewhere.engine(fed)) if elsewhere else engine_of(config, fed, folder, secret) as engine:
            run = _Run(fed, folder, log, listeners, engine, {"load": time.perf_counter() - started})
            return run.to_end(checkpoint, stop or threading.Event())


def _open_log(folder: Path, checkpoint: Checkpoint | None) -> EventLog:
    """The log, as it was when the checkpoint was saved: what came after it is about to happen again."""
    path = folder / LOG_NAME
    if checkpoint is not None:
        first_alignment = checkpoint.rounds_done == 0  # the one that has a checkpoint of its own
        truncate_after(path, checkpoint.rounds_done - 1, with_alignment=first_alignment)
    else:
        path.unlink(missing_ok=True)
    return EventLog(path)


@dataclass
class _Run:
    """One run on its way. All that matters is on the disk; this only holds what is needed to go on.

    ``carried_s``: seconds that are known only after a round's event was written; they go into the next one's.
    ``looks``: the evaluations so far, which decide what the recipe lets them decide.
    """

    fed: Assembly
    folder: Path
    log: EventLog
    listeners: Sequence[Listener]
    engine: Engine
    carried_s: dict[str, float]
    rounds_done: int = 0
    looks: list[Mapping[str, Any]] = field(default_factory=list)

    def to_end(self, checkpoint: Checkpoint | None, stop: threading.Event) -> dict[str, Any]:
        config, fed = self.fed.config, self.fed
        state = fed.server.init(fed.start)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if checkpoint is None:
            self._emit(start_event(fed))
        else:
            state, self.rounds_done = in_order(checkpoint.state, state), checkpoint.rounds_done
            self.engine.memories.update(checkpoint.memories)
            self.looks = [event for event in read_events(self.log.path) if event["event"] == "evaluation"]
            self._emit({"event": "resumed", "round": self.rounds_done})
            if self.rounds_done == 0:  # the first alignment is in this checkpoint, its time in no round's event yet
                done = [event["seconds"] for event in read_events(self.log.path) if event["event"] == "alignment"]
                self.carried_s["align"] = sum(done)
        forget_after(self.folder / "state" / BEST, self.rounds_done)
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
                should_stop=lambda: stop.is_set() or self._over,
                diagnose=fed.diagnose,
                # Of a sum alone the error of averaging A and B apart can not be known.
                diagnose_clients=0 if secured(config) else config.aggregation.diagnose_clients,
            ),
        )
        if not self._over:
            raise Stopped(str(self.folder))
        return self._finish(state)

    @property
    def _over(self) -> bool:
        """Whether no round is left, or none is worth its cost."""
        return self.rounds_done >= self.fed.rounds or ends_early(self.fed.config.evaluation, self.progress)

    @property
    def progress(self) -> Progress:
        return progress(self.fed.config.evaluation, self.looks)

    def _emit(self, event: dict[str, Any]) -> None:
        event["time"] = time.time()
        self.log.append(event)
        if event["event"] == "evaluation":
            self.looks.append(event)
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
            self._save(0, state, self.folder / "state")

    def _on_round(self, record: RoundRecord, state: State) -> None:
        """Write the event, evaluate if it is time, save. The event comes first: a resume drops what was not saved."""
        config, done = self.fed.config, record.round + 1
        event = {**round_event(record, self.carried_s), **spent(self.fed, done, record), **told(config.gate, state)}
        self._emit(event)
        self._look(state, done)
        started = time.perf_counter()
        kept_every = config.checkpoint.keep_adapters_every
        if kept_every and done % kept_every == 0:  # before the checkpoint: a resume does not come back to this round
            self._export(self.fed.server.result(state), self.folder / "adapters" / f"round-{done:05d}")
        self._save(done, state, self.folder / "state")
        self.rounds_done = done
        self.carried_s = {"save": time.perf_counter() - started}

    def _look(self, state: State, done: int) -> None:
        """Evaluate on the way, if it is time; on validation rows after the last round too, for it may be the best."""
        config, fed, emit = self.fed.config.evaluation, self.fed, self._emit
        last = done == fed.rounds
        if not config.every or (done % config.every and not last):
            return
        if fed.data.validation:
            look_at_rows(fed, emit, VALIDATION, fed.data.validation, state, done, final=False)
            now = self.progress
            if config.keep_best and now.best == done:
                self._save(done, state, self.folder / "state" / BEST)
            last = last or ends_early(config, now)
        elif not last:
            look_at_rows(fed, emit, HELD_OUT, fed.data.test, state, done, final=False)
        if not last:  # clients' own rows are looked at when the run ends
            look_at_clients(fed, emit, fed.server.result(state), self.engine.memories, done, final=False)

    def _save(self, rounds_done: int, state: State, folder: Path) -> None:
        checkpoint = Checkpoint(rounds_done, state, self.engine.memories, self.fed.identity)
        save_checkpoint(folder, checkpoint, keep=self.fed.config.checkpoint.keep)

    def _export(self, adapter: Tensors, folder: Path) -> None:
        write_adapter(folder, adapter, self.fed.config, self.fed.base.model)

    def _chosen(self, state: State) -> tuple[State, int, dict[str, Any]]:
        """(state, rounds done in it, what was decided) of the round that is the result; ``state`` is the last one's."""
        settings, done = self.fed.config.evaluation, self.rounds_done
        if not settings.chooses or not done:  # base has no rounds to choose from
            return state, done, {}
        chosen = choice(settings, self.progress, done, self.fed.rounds)
        if chosen["round"] != done:
            self._export(self.fed.server.result(state), self.folder / "adapters" / f"round-{done:05d}")
            best = checkpoint_of(self.folder / "state" / BEST, chosen["round"])
            state, done = in_order(best.state, state), best.rounds_done
            self.engine.memories.clear()
            self.engine.memories.update(best.memories)
        self._emit({"event": "choice", **chosen})
        return state, done, chosen

    def _validated(self, state: State, done: int) -> dict[str, Any]:
        """What the validation rows said of the result: in the log already, but for a run without rounds."""
        rows = self.fed.data.validation
        if rows and not self.rounds_done:
            found = look_at_rows(self.fed, self._emit, VALIDATION, rows, state, done, final=True)
            return {name: evaluation.as_dict() for name, evaluation in found.items()}
        return {
            event["dataset"]: {"overall": event["overall"], "categories": event["categories"]}
            for event in self.looks
            if event["round"] == done and event["dataset"].startswith(VALIDATION)
        }

    def _finish(self, state: State) -> dict[str, Any]:
        fed = self.fed
        state, done, chosen = self._chosen(state)
        results = look_at_rows(fed, self._emit, HELD_OUT, fed.data.test, state, done, final=True)
        if HELD_OUT in results and results[HELD_OUT].answers:
            lines = (json.dumps(answer.as_dict(), ensure_ascii=False) + "\n" for answer in results[HELD_OUT].answers)
            write_atomic(self.folder / "answers.jsonl", "".join(lines))
        adapter = fed.server.result(state)
        self._export(adapter, self.folder / "adapter")
        fine_tune(fed, self.engine, adapter)
        by_client = look_at_clients(fed, self._emit, adapter, self.engine.memories, done, final=True)
        own = keep_own(fed, adapter, self.engine.memories, self.folder / "personal")
        if fed.emulated:
            whole, model = fedbiot.emulator_result(state), fed.emulated.base.model
            write_adapter(
                self.folder / "emulator_adapter", whole, fed.config, model, str((self.folder / "emulator").resolve())
            )
        summary = summarise(fed, adapter, results, read_events(self.log.path))
        summary["metrics"] |= by_client | self._validated(state, done)
        if chosen:
            summary["choice"] = chosen
        if own:
            summary["clients_with_own_adapter"] = own
        self._emit({"event": "run_end", "summary": summary})
        write_json(self.folder / "summary.json", summary)
        return summary
