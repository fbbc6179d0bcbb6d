"""What of an installation works here, what does not, and what to do about it. Nothing is installed, nothing is fetched.

Every examination stands alone: one that breaks is a finding, and the others go on. Heavy libraries are imported within
them, for a broken one is what a doctor is called for.
"""

from __future__ import annotations

import importlib.metadata as metadata
import json
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

State: TypeAlias = Literal["ok", "absent", "warning", "problem"]
"""``absent``: an extra that is not installed, which is nobody's fault."""

_LITTLE_BYTES, _NOTHING_BYTES = 2_000_000_000, 100_000_000
_NOT_FOR_USERS = ("dev", "docs")
"""Extras for work on flocktune itself."""
_ANEW = "Install anew, in flocktune's source: pip install --force-reinstall --no-deps ."


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. ``fix`` says what to do, where there is something."""

    part: str
    name: str
    state: State
    said: str
    fix: str = ""


def examine(runs: Path = Path("runs")) -> list[Finding]:
    """All findings, in the order in which a person reads them. ``runs``: where runs are written."""
    parts: dict[str, Callable[[], Iterator[Finding]]] = {
        "Versions": _versions,
        "Extras": _extras,
        "Devices": _devices,
        "Hub": _hub,
        "Disk": lambda: _disk(runs),
        "Embedded model": _embedded,
    }
    return [finding for part, look in parts.items() for finding in _soundly(part, look)]


def is_broken(findings: list[Finding]) -> bool:
    """Whether something must be mended before flocktune can be used."""
    return any(finding.state == "problem" for finding in findings)


def as_json(findings: list[Finding]) -> dict[str, Any]:
    """The findings as a JSON object, with how many there are of each state."""
    counts = {state: sum(finding.state == state for finding in findings) for state in ("ok", "warning", "problem")}
    return {"broken": is_broken(findings), "counts": counts, "findings": [asdict(finding) for finding in findings]}


def _soundly(part: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from look()
    except Exception as error:  # whatever a broken library throws
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        yield Finding(part, "examination", "problem", f"broke off: {why}", "Install anew what it names, by pip.")


# --- versions and extras ---------------------------------------------------------------------------------


def _versions() -> Iterator[Finding]:
    part = "Versions"
    flocktune = metadata.distribution("flocktune")
    python, wanted = platform.python_version(), flocktune.metadata["Requires-Python"] or ""
    yield Finding(part, "flocktune", "ok", flocktune.version)
    if _fits(python, wanted):
        yield Finding(part, "python", "ok", f"{python} (wanted: {wanted})")
    else:
        yield Finding(part, "python", "problem", f"{python} (wanted: {wanted})", "Install a newer Python.")
    for requirement in _requirements(""):
        yield _version(part, requirement, "pip install flocktune")


def _version(part: str, requirement: Any, install: str) -> Finding:
    wanted = str(requirement.specifier)
    try:
        found = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Finding(part, requirement.name, "problem", "not installed", f"{install}")
    if _fits(found, wanted):
        return Finding(part, requirement.name, "ok", f"{found} (wanted: {wanted})")
    fix = f"pip install '{requirement.name}{wanted}'"
    return Finding(part, requirement.name, "warning", f"{found}, which was not tried (wanted: {wanted})", fix)


def _extras() -> Iterator[Finding]:
    """From the package's metadata, which is what pip goes by."""
    for extra in metadata.distribution("flocktune").metadata.get_all("Provides-Extra") or []:
        if extra in _NOT_FOR_USERS:
            continue
        install = f"pip install 'flocktune[{extra}]'"
        found = [_version("Extras", requirement, install) for requirement in _requirements(extra)]
        missing = [each.name for each in found if each.state == "problem"]
        if missing:
            yield Finding("Extras", extra, "absent", f"not installed: {', '.join(missing)}", install)
            continue
        there = ", ".join(f"{each.name} {each.said.split()[0].rstrip(',')}" for each in found)
        yield Finding("Extras", extra, "ok", there or "nothing needed on this system")
        yield from (each for each in found if each.state == "warning")


def _requirements(extra: str) -> list[Any]:
    """What the package, or one of its extras, asks for on this system."""
    from packaging.requirements import Requirement

    texts = metadata.distribution("flocktune").requires or []
    parsed = [Requirement(text) for text in texts]
    if not extra:
        return [each for each in parsed if each.marker is None or each.marker.evaluate({"extra": ""})]
    markers = [(each, each.marker) for each in parsed if each.marker is not None]
    return [each for each, when in markers if when.evaluate({"extra": extra}) and not when.evaluate({"extra": ""})]


def _fits(version: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    return SpecifierSet(wanted).contains(Version(version), prereleases=True)


# --- the machine -----------------------------------------------------------------------------------------


def _devices() -> Iterator[Finding]:
    import torch

    from flocktune.environment import available_memory_bytes

    part = "Devices"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding(part, "cpu", "ok", f"{cores} cores, torch uses {torch.get_num_threads()}; {_bfloat16()}")
    free = available_memory_bytes()
    few = free < 1_000_000_000
    fix = "Even the embedded model wants half a gigabyte: end other programs." if few else ""
    yield Finding(part, "memory", "warning" if few else "ok", f"{_size(free)} available", fix)
    if torch.cuda.is_available():
        for place in range(torch.cuda.device_count()):
            yield _gpu(part, place)
    elif driver := _driver():
        fix = "This torch is built without CUDA, or for a newer driver: https://pytorch.org/get-started/locally"
        yield Finding(part, "gpu", "warning", f"a driver ({driver}), but torch sees no GPU", fix)
    else:
        yield Finding(part, "gpu", "ok", "none: runtime.device auto means the CPU")


def _gpu(part: str, place: int) -> Finding:
    import torch

    facts = torch.cuda.get_device_properties(place)
    free, _ = torch.cuda.mem_get_info(place)
    bfloat16 = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16"
    said = f"{facts.name}, {_size(free)} of {_size(facts.total_memory)} free, {bfloat16}, CUDA {torch.version.cuda}"
    driver = _driver()
    return Finding(part, f"cuda:{place}", "ok", f"{said}, driver {driver}" if driver else said)


def _driver() -> str:
    """NVIDIA's, as the kernel tells it; empty without one."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return ""
    return next((word for word in words if word[:1].isdigit() and "." in word), "")


def _bfloat16() -> str:
    """Whether products of bfloat16 are done in hardware: where they are not, they are slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "bfloat16 in hardware: unknown"
    has = next((name for name in ("amx_bf16", "avx512_bf16", "bf16") if name in flags), "")
    return f"bfloat16 in hardware ({has})" if has else "no bfloat16 in hardware: float32 is faster"


def _hub() -> Iterator[Finding]:
    """By the environment alone: the hub is not asked."""
    offline = any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in _OFFLINE)
    if offline:
        said = "offline: a hub id is looked up in the cache alone"
        yield Finding("Hub", "access", "ok", said, "To fetch models, unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE.")
    else:
        said = "used only when a recipe names a hub id; not asked now"
        yield Finding("Hub", "access", "ok", said, "To rule it out: export HF_HUB_OFFLINE=1")


_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def _disk(runs: Path) -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    from flocktune.data.encoding import default_cache_folder

    places = {
        "runs": (runs, "Choose another folder for runs: --out"),
        "temporary": (Path(tempfile.gettempdir()), "Set TMPDIR to a folder that can be written."),
        "tokens": (default_cache_folder(), "Set FLOCKTUNE_CACHE to a folder that can be written."),
        "hub cache": (Path(HF_HUB_CACHE), "Set HF_HOME to a folder that can be written."),
    }
    for name, (place, fix) in places.items():
        yield _place(name, place, fix)


def _place(name: str, place: Path, fix: str) -> Finding:
    from flocktune.errors import reason

    existing = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            free = shutil.disk_usage(existing).free
    except OSError as error:
        serious = name in ("runs", "temporary")
        return Finding("Disk", name, "problem" if serious else "warning", f"{place}: {reason(error)}", fix)
    said = f"{_size(free)} free in {place.absolute()}"
    if free < _NOTHING_BYTES:
        return Finding("Disk", name, "problem", said, "Make room: nothing can be saved.")
    if free < _LITTLE_BYTES:
        return Finding("Disk", name, "warning", said, "Make room: models and checkpoints are gigabytes.")
    return Finding("Disk", name, "ok", said)


# --- does it compute? ------------------------------------------------------------------------------------


def _embedded() -> Iterator[Finding]:
    from flocktune.assets import embedded_manifest
    from flocktune.files import sha256_file

    part = "Embedded model"
    folder = embedded_manifest().parent
    wanted = json.loads(embedded_manifest().read_text(encoding="utf-8"))["files"]
    damaged = [
        name
        for name, made in wanted.items()
        if not (folder / name).is_file() or sha256_file(folder / name) != made["sha256"]
    ]
    if damaged:
        yield Finding(part, "files", "problem", f"missing or damaged: {', '.join(damaged)}", _ANEW)
        return
    yield Finding(part, "files", "ok", f"{len(wanted)} files as they were made (sha256)")
    yield _forward(part)


def _forward(part: str) -> Finding:
    """One step through the model, as a run takes thousands."""
    import torch

    from flocktune.config.schema import LoraConfig, ModelConfig
    from flocktune.resident import load_base

    started = time.perf_counter()
    base = load_base(ModelConfig(), LoraConfig(), "auto")
    loaded = time.perf_counter()
    tokens = torch.tensor([base.tokenizer.encode("Name three fruits.")], device=base.device)
    with torch.no_grad():
        logits = base.model(input_ids=tokens).logits
    if not math.isfinite(float(logits.float().sum())):
        fix = "Another build of torch, or another device: runtime.device=cpu"
        return Finding(part, "forward pass", "problem", f"no finite numbers on {base.device}", fix)
    took = f"loaded in {loaded - started:.1f} s, {tokens.shape[1]} tokens in {time.perf_counter() - loaded:.2f} s"
    return Finding(part, "forward pass", "ok", f"{took}, on {base.device}")


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
