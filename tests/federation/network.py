"""Owners' machines as network namespaces on one bridge, each with a cable of its own; clocks and disks that are theirs.

Needs root, iproute2, and gcc for the clocks.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

COORDINATOR = "10.213.7.1"
_BRIDGE = "ftbridge"

CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

static long skew_s(void) {
    const char *text = getenv("SKEW_S");
    return text ? atol(text) : 0;
}

int clock_gettime(clockid_t id, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(id, now);
    if (!failed && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) now->tv_sec += skew_s();
    return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
"""
"""A process that has this preloaded, and those it starts, take the time to be SKEW_S seconds later than it is."""


def wrong_clock(folder: Path) -> Path:
    """Compile it; the file to preload."""
    source, library = folder / "clock.c", folder / "clock.so"
    source.write_text(CLOCK)
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-w", "-o", library, source, "-ldl"], check=True)
    return library


@dataclass(frozen=True)
class Network:
    """A cable for each name. ``COORDINATOR`` is this machine's address on it."""

    names: Sequence[str]

    def inside(self, name: str) -> tuple[str, ...]:
        """A command's beginning, for what is to run on this machine."""
        return ("ip", "netns", "exec", f"ft-{name}")

    def plug(self, name: str, *, up: bool) -> None:
        """The cable in, or out: nobody is told, packets are lost."""
        _ip("link", "set", f"ft-{name}", "up" if up else "down")

    def slow(self, name: str, *, kilobits: int) -> None:
        """So much a second towards the machine; 0 is as it was."""
        shape = ["tbf", "rate", f"{kilobits}kbit", "burst", "4kb", "latency", "400ms"]
        action = ["add", "dev", f"ft-{name}", "root", *shape] if kilobits else ["del", "dev", f"ft-{name}", "root"]
        subprocess.run(["tc", "qdisc", *action], check=True)


@contextmanager
def network(names: Sequence[str]) -> Iterator[Network]:
    """Lay the cables, and take all of it away at the end."""
    _clear(names)
    try:
        _ip("link", "add", "name", _BRIDGE, "type", "bridge")
        _ip("addr", "add", f"{COORDINATOR}/24", "dev", _BRIDGE)
        _ip("link", "set", _BRIDGE, "up")
        for place, name in enumerate(names, start=2):
            space = f"ft-{name}"
            _ip("netns", "add", space)
            _ip("link", "add", space, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", space, "master", _BRIDGE, "up")
            _ip("-n", space, "addr", "add", f"{COORDINATOR.rpartition('.')[0]}.{place}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                _ip("-n", space, "link", "set", device, "up")
        yield Network(names)
    finally:
        _clear(names)


@dataclass(frozen=True)
class Disk:
    """A small disk of its own at ``place``."""

    place: Path

    def fill(self) -> None:
        """Not a byte is free afterwards."""
        with (self.place / ".filler").open("wb", buffering=0) as file:
            for size in (1 << 16, 1 << 12, 1):
                try:
                    while file.write(bytes(size)) == size:
                        pass
                except OSError:
                    continue

    def empty(self) -> None:
        (self.place / ".filler").unlink(missing_ok=True)


@contextmanager
def disk(place: Path, megabytes: int) -> Iterator[Disk]:
    """A disk at ``place``, a folder, as long as the block lasts."""
    place.mkdir(exist_ok=True, mode=0o700)
    mode = f"size={megabytes}m,mode=700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", mode, "tmpfs", place], check=True)
    try:
        yield Disk(place)
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def may_be_had() -> str:
    """What is missing for all of this, or nothing."""
    missing = [] if os.geteuid() == 0 else ["root"]
    for program in ("ip", "tc", "gcc", "nginx"):
        if subprocess.run(["which", program], capture_output=True).returncode:
            missing.append(program)
    return ", ".join(missing)


def _clear(names: Sequence[str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "del", f"ft-{name}"], capture_output=True)
    subprocess.run(["ip", "link", "del", _BRIDGE], capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
