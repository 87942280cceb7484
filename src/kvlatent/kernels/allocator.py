"""A faster setting of glibc's memory allocator for computing on a CPU."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4
"""Parameters of mallopt(3)."""
KEEP = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_TOP_PAD: 2**28}
"""Take large blocks from the heap too, never give any back, and grow it in large steps."""
DEFAULT = {M_MMAP_MAX: 65536, M_TRIM_THRESHOLD: 128 * 1024, M_TOP_PAD: 128 * 1024, M_MMAP_THRESHOLD: 128 * 1024}
"""As mallopt(3) documents them."""


_kept = False  # whether a `with` further out has set it


@contextmanager
def freed_memory_kept() -> Iterator[bool]:
    """Let the process keep freed memory for its next allocations, for the body of a `with`.

    By default glibc returns every large tensor to the system when it is freed, and the next one of that size is
    faulted in page by page, which can take as long as computing it. Whoever sets MALLOC_… or GLIBC_TUNABLES in the
    environment has decided already: then nothing is changed, nor where the C library isn't glibc, nor by a `with`
    inside another.

    Yields:
        Whether it was set.
    """
    global _kept
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if _kept or chosen or platform.libc_ver()[0] != "glibc":
        yield _kept
        return
    libc = ctypes.CDLL(None)
    _set(libc, KEEP)
    _kept = True
    try:
        yield True
    finally:
        _kept = False
        _set(libc, DEFAULT)
        libc.malloc_trim(0)


def _set(libc: ctypes.CDLL, options: dict[int, int]) -> None:
    for parameter, value in options.items():
        libc.mallopt(ctypes.c_int(parameter), ctypes.c_int(value))
