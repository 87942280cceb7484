"""Signals that ask a process to end, collected so that it can end in its own time."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

STOPS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interruptible(numbers: Iterable[signal.Signals] = STOPS) -> Iterator[list[signal.Signals]]:
    """Collect signals in a list, for the body of a `with`, instead of dying of them."""
    seen: list[signal.Signals] = []
    old = {n: signal.signal(n, lambda number, _frame: seen.append(signal.Signals(number))) for n in numbers}
    try:
        yield seen
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
