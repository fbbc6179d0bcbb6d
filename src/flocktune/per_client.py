"""What is done client by client when a run is evaluated or ends: fine-tuning, evaluation, adapters as folders."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from flocktune.algorithms.personal import FINE_TUNE, own_adapters
from flocktune.assemble import Assembly, evaluation_loss
from flocktune.config.capabilities import personal_of
from flocktune.config.load import config_digest
from flocktune.config.personal import FineTune
from flocktune.evaluation.evaluate import category_loss, pair_means
from flocktune.evaluation.generate import evaluating
from flocktune.evaluation.spread import spread
from flocktune.interfaces import Engine, Memory
from flocktune.run_folder import write_adapter
from flocktune.seeds import derive_seed
from flocktune.types import ClientTask, Failure, Mean, Tensors

_LOG = logging.getLogger(__name__)

CLIENTS, OWN = "clients", "clients_own"
"""The names, in metrics, of each client's own held-out rows: with the common adapter, and with the client's own."""


def fine_tune(fed: Assembly, engine: Engine, result: Tensors) -> None:
    """Every client trains ``result`` on its own rows, when the recipe asks for it. The outcome is in its memory.

    A client that fails has no adapter of its own, and that is logged.
    """
    config = fed.config
    if not isinstance(personal_of(config), FineTune):
        return
    tasks = (
        ClientTask(
            fed.rounds,
            client,
            FINE_TUNE,
            result,
            derive_seed(config.seed, FINE_TUNE, client),
            config_digest(config),
            fed.model_digest,
        )
        for client in fed.data.clients
    )
    for reply in engine.run(tasks, len(fed.data.clients)):
        if isinstance(reply, Failure):
            _LOG.warning("%s has no adapter of its own: %s", reply.client, reply.reason)


def evaluations(fed: Assembly, result: Tensors, memories: Mapping[str, Memory]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, spread of losses over clients, and seconds) of the common adapter, and of clients' own if there are any.

    On each client's own held-out rows. A client without an adapter of its own is evaluated with the common one.
    """
    if not fed.data.own_test:
        return
    own = own_adapters(result, memories)
    for name, adapters in ((CLIENTS, {}), *([(OWN, own)] if own else [])):
        started = time.perf_counter()
        losses = _losses(fed, result, adapters)
        yield name, {**spread(losses), "categories": {}, "seconds": time.perf_counter() - started}


def _losses(fed: Assembly, result: Tensors, adapters: Mapping[str, Tensors]) -> dict[str, Mean]:
    """Client -> its loss with its adapter of ``adapters``, or with ``result``."""
    base, found = fed.base, {}
    batch_size = fed.config.evaluation.batch_size
    preferences = evaluation_loss(fed, base)
    loaded: Tensors | None = None
    with evaluating(base.model):
        for client, rows in fed.data.own_test.items():
            adapter = adapters.get(client, result)
            if adapter is not loaded:
                base.adapter.load(adapter)
                loaded = adapter
            what = (base.model, fed.data.train.encoded, rows.tolist())
            if preferences:
                told = pair_means(*what, preferences, batch_size=batch_size, pad_id=base.pad_id)
                found[client] = told["loss"]
            else:
                found[client] = category_loss(*what, batch_size=batch_size, pad_id=base.pad_id)
    return found


def keep_own(fed: Assembly, result: Tensors, memories: Mapping[str, Memory], folder: Path) -> int:
    """How many clients have an adapter of their own. They are written to ``folder``/CLIENT if the recipe says so."""
    own, settings = own_adapters(result, memories), personal_of(fed.config)
    if settings is not None and settings.keep:
        for client, adapter in own.items():
            write_adapter(folder / folder_name(client), adapter, fed.config, fed.base.model)
    return len(own)


def folder_name(client: str) -> str:
    """A client's name as that of a folder, whatever it is called in the data. Different names stay different."""
    name = quote(client, safe=" ")
    return "%2E" + name[1:] if name.startswith(".") else name
