"""Files and folders that are whole or not there."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvlatent.errors import UserError


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Give a temporary sibling of `path` to write; if the block ends without an error, it takes the place of `path`."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def refuse_existing(path: Path) -> Path:
    """Return `path` if nothing is there yet.

    Raises:
        UserError: It exists.
    """
    if path.exists():
        raise UserError(f"{path} exists already: choose another --out, or remove it")
    return path


def check_disk(path: Path, needed_bytes: int) -> None:
    """Raise `UserError` unless `needed_bytes` fit where `path` will be; better before the work than after it."""
    place = next(parent for parent in path.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise UserError(f"{path} needs {needed_bytes / 1e6:,.0f} MB; {free / 1e6:,.0f} MB are free there")


@contextmanager
def new_folder(path: Path, *, needed_bytes: int = 0) -> Iterator[Path]:
    """Give a temporary sibling of `path` to write into; it becomes `path` when the block ends without an error.

    Raises:
        UserError: `path` exists, its parent can't be written, or `needed_bytes` don't fit on the disk.
    """
    with new_file(path, needed_bytes=needed_bytes) as partial:
        partial.mkdir()
        yield partial


@contextmanager
def new_file(path: Path, *, needed_bytes: int = 0) -> Iterator[Path]:
    """As `new_folder`, for one file: the block creates what it is given the name of."""
    refuse_existing(path)
    try:
        check_disk(path, needed_bytes)
        with replaced(path) as partial:
            yield partial
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror or error}") from None
