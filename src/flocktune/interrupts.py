"""Ctrl-C once, and twice."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


@contextmanager
def stop_on_signals(
    say: Callable[[str], None],
    text: str = "Stopping after this round. Press Ctrl-C again to stop now; nothing saved is lost.",
) -> Iterator[threading.Event]:
    """Ctrl-C (or SIGTERM) once: finish the round, save, stop. Twice: stop now; the last round's checkpoint stands.

    ``text`` is said at the first.
    """
    stop = threading.Event()

    def handle(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        with suppress(RuntimeError):  # the signal came in the middle of a print: the exit code tells the same
            say(text)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
