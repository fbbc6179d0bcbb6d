"""Everything that an owner can know before joining: ``flocktune join --check``."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flocktune.config.schema import Columns, DataConfig, ModelConfig
from flocktune.engine.parcels import shown
from flocktune.environment import available_memory_bytes
from flocktune.errors import FlocktuneError, UserError
from flocktune.owner.policy import GB, MB, Policy, allowed_models, columns_read, load_policy
from flocktune.owner.reach import Finding, check_coordinator, check_network

if TYPE_CHECKING:
    from rich.table import Table

_LEAST_DISK_BYTES = GB
"""For the log, the tokens and what a client keeps of a round."""


@dataclass(frozen=True)
class Place:
    """What is to be checked. ``ca``: PEM text; ``home``: the owner's folder for this federation.

    ``model`` and ``emulator`` are a base model's folder and an emulator's bundle, as far as they are here. ``policy``
    need not exist: the defaults hold then. ``enrolled`` tries the key at the coordinator and raises FlocktuneError or
    OSError when it is refused; None leaves that open.
    """

    host: str
    port: int
    ca: str
    home: Path
    key: Path
    data: str
    policy: Path
    model: str | None = None
    emulator: Path | None = None
    enrolled: Callable[[], None] | None = None


def readiness(place: Place) -> list[Finding]:
    """Look at everything; nothing raises, and one finding does not hide another."""
    policy, of_policy = _policy(place.policy)
    network = check_network(place.host, place.port)
    if network.ok:
        coordinator = check_coordinator(place.host, place.port, place.ca)
    else:
        names = ("certificate", "gate", "clock")
        coordinator = [Finding(name, None, "not known without a connection") for name in names]
    enrolled = check_enrolled(place.enrolled if network.ok else None)
    models = check_models(place.model, place.emulator, policy)
    folder = str(place.emulator) if place.emulator is not None else place.model
    data = check_data(place.data, columns_read(policy), folder, policy)
    room = check_room(place.home, folder, policy)
    return [network, *coordinator, check_key(place.key), enrolled, of_policy, data, *models, *room]


def is_ready(findings: Sequence[Finding]) -> bool:
    """Whether nothing is known to be wrong."""
    return all(finding.ok is not False for finding in findings)


def readiness_table(findings: Sequence[Finding]) -> Table:
    """The findings for a terminal of 80 columns; a digest of 64 letters stays on one line.

    A coordinator, or what stands between, has a part in what is said: only printable characters are shown.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for width in (2, 11):
        table.add_column(no_wrap=True, min_width=width)
    table.add_column(overflow="fold")
    marks = {True: ("ok", "green"), False: ("no", "bold red"), None: ("? ", "yellow")}
    for finding in findings:
        mark, style = marks[finding.ok]
        said = Text("\n".join(map(shown, finding.said.splitlines())))
        if finding.fix:
            said.append(f"\n{finding.fix}", style="dim" if finding.ok else "bold")
        table.add_row(Text(mark, style=style), Text(finding.name), said)
    return table


def check_key(path: Path) -> Finding:
    """The owner's private key: there, a file, and readable by its owner alone."""
    try:
        found = path.stat()
    except OSError as error:
        return Finding("key", False, f"no key at {path} ({error.strerror})", "Make one, and enrol it once more.")
    mode = stat.S_IMODE(found.st_mode)
    if not stat.S_ISREG(found.st_mode):
        return Finding("key", False, f"{path} is not a file", "Make a key, and enrol it once more.")
    if mode & 0o077:
        return Finding("key", False, f"others may read {path} (mode {mode:04o})", f"chmod 600 {path}")
    return Finding("key", True, f"{path}, for its owner alone")


def check_enrolled(attempt: Callable[[], None] | None) -> Finding:
    """Whether the coordinator knows the key, when there is a way to try."""
    if attempt is None:
        return Finding("enrolled", None, "not tried")
    try:
        attempt()
    except (FlocktuneError, OSError) as error:
        return Finding("enrolled", False, str(error), "Ask the coordinator to enrol this key.")
    return Finding("enrolled", True, "the coordinator knows this key")


def check_data(source: str, columns: Columns, model: str | None, policy: Policy) -> Finding:
    """Read the rows, and with ``model``'s tokenizer count those that have anything to learn from."""
    from flocktune.data.encoding import encode
    from flocktune.data.sources import read_examples
    from flocktune.models.load import load_tokenizer

    try:
        examples = read_examples(source, columns)
    except UserError as error:
        return Finding("data", False, str(error))
    rows, said = len(examples), f"{len(examples):,} rows"
    if model is not None:
        usual = DataConfig(train=source, columns=columns)
        try:
            _, report = encode(
                examples,
                load_tokenizer(ModelConfig(path=model)),
                template=usual.template,
                max_tokens=usual.max_tokens,
                train_on=usual.train_on,
            )
        except UserError as error:
            return Finding("data", False, f"{said}; {error}")
        rows = report.rows - len(report.untrainable)
        said += f", {rows:,} with something to learn from (at {usual.max_tokens} tokens a row)"
    if rows < policy.min_rows:
        return Finding("data", False, f"{said}; the policy wants {policy.min_rows:,}", "Add rows, or lower min_rows.")
    return Finding("data", True, said)


def check_models(model: str | None, emulator: Path | None, policy: Policy) -> list[Finding]:
    """The digests of what is here, and whether the policy allows them."""
    from flocktune.models.bundle import read_bundle
    from flocktune.models.load import model_digest

    findings = []
    if model is not None:
        findings.append(_digest("model", lambda: model_digest(ModelConfig(path=model)), policy))
    if emulator is not None:
        findings.append(_digest("emulator", lambda: read_bundle(emulator).digest, policy))
    unnamed = "none was named: the embedded one, or with FedBiOT the emulator that comes with the first task"
    return findings or [Finding("model", None, unnamed)]


def check_room(home: Path, model: str | None, policy: Policy) -> list[Finding]:
    """Disk, memory and GPU memory, against the weights of ``model`` when it is here."""
    import torch

    try:
        parameters = None if model is None else _parameters(model)
    except UserError as error:
        said = f"the model's size is not known: {error}"
        return [_disk(home, None), Finding("memory", None, said)]
    findings = [_disk(home, parameters), _against("memory", available_memory_bytes(), parameters)]
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]
        limit = policy.max_gpu_memory_gb
        findings.append(_against("GPU memory", free if limit is None else min(free, int(limit * GB)), parameters))
    return findings


def _policy(path: Path) -> tuple[Policy, Finding]:
    if not path.exists():
        return Policy(), Finding("policy", True, f"the defaults: there is no {path}")
    try:
        policy = load_policy(path)
    except UserError as error:
        return Policy(), Finding("policy", False, str(error), f"Mend {path}; until then every task is refused.")
    if policy.require == "secure_aggregation":
        return policy, Finding("policy", True, f"{path}; a recipe without secure aggregation will be refused")
    if policy.require != "none":
        what = policy.require.replace("_", " ")
        return policy, Finding("policy", False, f"it requires {what}, which flocktune does not have yet: "
                               "every task will be refused", f"Set require: none in {path}, or wait.")  # fmt: skip
    return policy, Finding("policy", True, str(path))


def _digest(name: str, compute: Callable[[], str], policy: Policy) -> Finding:
    try:
        digest = compute()
    except UserError as error:
        return Finding(name, False, str(error))
    if digest in allowed_models(policy, frozenset({digest})):
        return Finding(name, True, digest)
    return Finding(
        name, False, f"{digest}\nis not among the policy's models", "Add the digest to models, if it is meant."
    )


def _parameters(model: str) -> int:
    from flocktune.models.load import describe

    return describe(ModelConfig(path=model)).parameters


def _disk(home: Path, parameters: int | None) -> Finding:
    """A copy of an emulator may be kept in the home, in float32 at most."""
    there = next(folder for folder in (home.absolute(), *home.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    wanted = _LEAST_DISK_BYTES + 4 * (parameters or 0)
    fix = "" if free >= wanted else "Make room, or take a home on another disk."
    return Finding("disk", free >= wanted, f"{_size(free)} free at {there}; {_size(wanted)} wanted", fix)


def _against(name: str, free: int, parameters: int | None) -> Finding:
    """Weights in float32 must fit with a quarter to spare; where only bfloat16's do, the recipe decides."""
    if parameters is None:
        return Finding(name, None, f"{_size(free)} free; how much a task needs is not known without a model")
    half, whole = 2 * parameters, 4 * parameters
    said = f"{_size(free)} free; the weights need {_size(whole)} in float32, {_size(half)} in bfloat16"
    if free >= 1.25 * whole:
        return Finding(name, True, said)
    if free >= 1.25 * half:
        return Finding(name, None, f"{said}: enough for recipes in bfloat16 only")
    return Finding(name, False, said, "Close other programs, or take a machine with more.")


def _size(count: int) -> str:
    return f"{count / GB:.1f} GB" if count >= GB else f"{count / MB:.0f} MB"
