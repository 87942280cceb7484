"""Signals that ask a process to end: as an exception, or collected so that it can end in its own time."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def stopping(numbers: Iterable[signal.Signals] = STOPS) -> Iterator[None]:
    """Raise `Stopped` where the body of a `with` is when a signal comes, so that everything in it is cleaned up.

    Signals that whoever started the process has it ignore, as `nohup` does, stay ignored.
    """

    def stop(number: int, _frame: FrameType | None) -> None:
        raise Stopped(number)

    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return
    old = {n: signal.signal(n, stop) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def interruptible(numbers: Iterable[signal.Signals] = STOPS) -> Iterator[list[signal.Signals]]:
    """Collect signals in a list, for the body of a `with`, instead of dying of them."""
    seen: list[signal.Signals] = []
    old = {
        n: signal.signal(n, lambda number, _frame: seen.append(signal.Signals(number)))
        for n in numbers
        if signal.getsignal(n) is not signal.SIG_IGN
    }
    try:
        yield seen
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
