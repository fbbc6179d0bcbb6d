"""One recipe as the two sides of a real federation: the server's, without clients' rows, and one owner's, with its own.

In one process :mod:`assemble` builds both. Apart, they compute the same, bit for bit: an owner's file is what a folder
of one file per client (allocation ``natural``) holds for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flocktune.algorithms import factors, fedavg, fedbiot
from flocktune.algorithms.preferences import with_its_reference
from flocktune.allocation import ClientRows, check_rows, client_data, given_validation
from flocktune.assemble import Assembly, federation, refuse_leaks
from flocktune.config.schema import BySize, CompareConfig, Natural, RunConfig
from flocktune.data.encoding import Encoded, EncodingReport
from flocktune.emulation import load_emulator
from flocktune.errors import Problem, UserError
from flocktune.files import read_json, sha256_bytes
from flocktune.fitting import fitted
from flocktune.interfaces import ClientHalf
from flocktune.models.bundle import MANIFEST, Bundle
from flocktune.models.factors import fresh
from flocktune.protection import around_server
from flocktune.resident import Instructions, load_base, load_instructions
from flocktune.sides import adapter_client, emulator_client, preferences_of
from flocktune.types import ClientTask, Tensors

KINDS = {"fedit": fedavg.KIND, "fedbiot": fedbiot.KIND}
"""The kind of task that each method gives its clients."""


def refuse_unfederated(config: RunConfig, clients: Sequence[str]) -> None:
    """Raise UserError for a recipe that needs more of owners than they give, such as the sizes of their files."""
    problems = []
    if config.method not in KINDS:
        problems.append(Problem("method", "fedit or fedbiot in a federation", config.method))
    if not isinstance(config.allocation, Natural):
        fix = "Owners hold what they hold: allocation={kind: natural}"
        problems.append(Problem("allocation.kind", "natural in a federation", config.allocation.kind, fix))
    elif config.allocation.min_rows > 1:
        fix = "Each owner says it in the own policy: min_rows."
        problems.append(Problem("allocation.min_rows", "1 in a federation", str(config.allocation.min_rows), fix))
    if config.model.trust_remote_code:
        fix = "Owners run no code that is not in their own flocktune."
        problems.append(Problem("model.trust_remote_code", "false in a federation", "true", fix))
    if config.data.test is None and config.data.test_rows_per_category:
        fix = "Set data.test to rows of your own, or data.test_rows_per_category=0 for a run without evaluation."
        got = f"{config.data.test_rows_per_category} rows of each category of owners' data"
        problems.append(Problem("data.test_rows_per_category", "0 in a federation", got, fix))
    if config.data.validation_rows_per_category:
        fix = "Set data.validation to rows of your own."
        got = f"{config.data.validation_rows_per_category} rows of each category of owners' data"
        problems.append(Problem("data.validation_rows_per_category", "0 in a federation", got, fix))
    if isinstance(config.scheduling.selection, BySize):
        fix = "Owners' sizes are not known here: scheduling.selection.kind=uniform"
        problems.append(Problem("scheduling.selection", "not by_size in a federation", "by_size", fix))
    if config.canaries is not None:
        fix = "Nobody's rows are added to here. Look for them where the data may be: flocktune run"
        problems.append(Problem("canaries", "none in a federation", "some", fix))
    if config.attack is not None:
        fix = "Attacks are simulated where all rows are yours: flocktune run"
        problems.append(Problem("attack", "none in a federation", config.attack.kind, fix))
    if config.compare != CompareConfig():
        fix = "Baselines need all rows in one place. Run them where they may be: flocktune run"
        problems.append(Problem("compare", "no baselines in a federation", "some", fix))
    if config.local.correction is not None:
        fix = "An update that is lost on its way leaves what its owner keeps ahead of the server: local.correction=null"
        problems.append(Problem("local.correction", "none in a federation", config.local.correction.kind, fix))
    if config.personal is not None:
        fix = "Owners have no way yet to their own adapter: personal=null"
        problems.append(Problem("personal", "none in a federation", config.personal.kind, fix))
    if config.evaluation.client_rows:
        fix = "Owners' rows are not here to be evaluated on: evaluation.client_rows=0"
        problems.append(Problem("evaluation.client_rows", "0 in a federation", str(config.evaluation.client_rows), fix))
    if not clients:
        fix = "Enrol owners: flocktune federation enrol"
        problems.append(Problem("federation", "at least one enrolled client", "none", fix))
    UserError.raise_all(problems)


def server_side(
    config: RunConfig, clients: Sequence[str], own_bundle: Path | None = None, secret: bytes | None = None
) -> Assembly:
    """All that the server needs of a recipe for clients who are elsewhere. Raises UserError.

    ``secret``: the run's key; differential privacy of clients can not run without.
    """
    refuse_unfederated(config, clients)
    nobodys = _no_rows(sha256_bytes("\n".join(sorted(clients)).encode()))
    test = nobodys
    if config.data.test is not None:
        test = load_instructions(
            config.data.test, replace(config.data, max_rows=None), config.model, pairs=config.local.on_pairs
        )
    rows = {name: np.zeros(0, np.int64) for name in sorted(clients)}
    data = ClientRows(nobodys, test, rows, 0, validation=given_validation(config, test))
    return federation(config, own_bundle, data, secret)


def _no_rows(digest: str) -> Instructions:
    encoded = Encoded(np.zeros(0, np.int32), np.zeros(0, np.bool_), np.zeros(1, np.int64))
    return Instructions([], encoded, EncodingReport(0, (), 0, 0, 0), digest)


@dataclass(frozen=True, eq=False)
class OwnersSide:
    """One owner's half of a run, without what the recipe puts around it: the owner's own bounds come before that.

    ``expected``: a task, without its tensors -> the names and shapes that these have. ``optional``: those that may be
    there or not, their dtype and shape, with None for any size. ``data``: a digest of the rows that were read.
    """

    half: ClientHalf
    expected: Callable[[ClientTask], Tensors]
    optional: Mapping[str, tuple[str, Sequence[int | None]]]
    rows: int
    data: str = ""


def owners_side(
    config: RunConfig, client: str, data: str, emulator: Bundle | None = None, secret: bytes | None = None
) -> OwnersSide:
    """What one owner needs of a recipe: its own file and a base model, or with FedBiOT the emulator alone.

    ``config`` is the server's recipe with the owner's own paths for the model and device. Models and tokens stay in
    memory between calls. ``secret``: the owner's own key, of which noise is made that hides its rows. Raises UserError.
    """
    if emulator is not None:
        refuse_code(emulator.folder)
        config = replace(config, model=replace(config.model, path=str(emulator.folder)))
    own = replace(config, data=replace(config.data, train=data, test=None, validation=None))
    train = load_instructions(data, own.data, own.model, pairs=own.local.on_pairs)
    rows = np.flatnonzero(train.encoded.targets > 0)
    if not len(rows):
        raise UserError(Problem(data, "rows to learn from", f"{len(train.examples)} rows, none with an answer"))
    mine = ClientRows(train, _no_rows(""), {client: rows}, 0)
    if emulator is None:
        base = load_base(fitted(own, train.encoded).model, own.lora, own.runtime.device)
        preferences = preferences_of(own, base.adapter)
        batches = client_data(own, base.pad_id, mine, secret, preferences)
        sharing, whole = factors.sharing_of(own), fresh(base.adapter.parameters, 0)
        half = adapter_client(own, base.adapter, batches, own.local, rounds=own.rounds)
        half = with_its_reference(half, preferences)
        server = factors.around_server(sharing, whole, fedavg.server_half(own.aggregation))
        optional = factors.optional(sharing, whole, client)
    else:
        emulated = load_emulator(fitted(own, train.encoded, emulator), emulator)
        base = emulated.base
        half = emulator_client(own, emulated, mine, secret)
        server, whole, optional = fedbiot.message_half(emulator.plan), base.adapter.tensors(), {}
    check_rows([train], base.model)
    refuse_leaks(own, base)
    server = around_server(own, server)
    start = server.init(whole)

    def expected(task: ClientTask) -> Tensors:
        """What the recipe's own server half sends: names and shapes are those of its first state."""
        return server.addressed(server.message(start, task.round), client)

    return OwnersSide(half, expected, optional, len(rows), train.digest)


def bundle_tensors(bundle: Bundle) -> Tensors:
    """The files of an emulator as tensors of bytes, to be sent."""
    files = [bundle.folder / MANIFEST, *(path for path in sorted(bundle.folder.iterdir()) if path.name != MANIFEST)]
    return {path.name: torch.from_numpy(np.fromfile(path, np.uint8)) for path in files if path.is_file()}


def write_bundle_tensors(tensors: Tensors, folder: Path) -> None:
    """The inverse of :func:`bundle_tensors`, into a new folder.

    Raises UserError for files other than those that the manifest lists: the digest would not know of them.
    """
    listed = _listed(tensors.get(MANIFEST))
    for name, value in tensors.items():
        plain = name == Path(name).name and not name.startswith(".")
        if not plain or value.dtype != torch.uint8 or value.dim() != 1 or name not in listed:
            raise _not_to_be_used("files that its manifest lists", f"{name[:100]!r}")
    folder.mkdir(parents=True)
    for name, value in tensors.items():
        value.numpy().tofile(folder / name)


def _listed(manifest: torch.Tensor | None) -> set[str]:
    try:
        return {MANIFEST, *json.loads((torch.empty(0) if manifest is None else manifest).numpy().tobytes())["files"]}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _not_to_be_used(f"a manifest, {MANIFEST}", "none that can be read") from None


CODE = ("auto_map", "attn_implementation", "experts_implementation", "kernel_config", "use_kernels")
"""Settings of a config.json by which transformers runs what is not its own, such as a kernel of the hub."""

CODE_FILES = ("adapter_config.json", "custom_generate", "*.py")
"""What transformers takes from other places, or runs."""


def refuse_code(folder: Path) -> None:
    """Raise UserError for a model folder of another's that wants more than its own weights and transformers' code."""
    for pattern in CODE_FILES:
        if any(folder.glob(pattern)):
            raise _not_to_be_used(f"an emulator without {pattern}", "one with it")
    for path in sorted(folder.glob("*config.json")):
        found = sorted(set(_keys(read_json(path))) & {*CODE, *(f"_{key}" for key in CODE)})
        if found:
            raise _not_to_be_used(f"a {path.name} without {found[0]}", "one with it")


def _keys(tree: Any) -> Iterator[str]:
    """All keys, at any depth."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield str(key)
        yield from _keys(value)


def _not_to_be_used(expected: str, got: str) -> UserError:
    return UserError(Problem("emulator", expected, got, "Do not use this emulator."))
