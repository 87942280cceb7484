"""Files and folders that are whole or not there, each written by one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from kvlatent.errors import UserError

LEFTOVER = re.compile(r"\.(?P<name>.+)\.(kvlatent-lock|partial-[0-9a-f]{12})")
"""Names beside an output while it is written; those of a killed process wait there for the next writer."""

TRIES = 100
"""How often a folder is made anew that others remove, before what is in the way is told."""

_held: set[tuple[int, Path]] = set()
"""Outputs that a thread of this process is writing: it may ask again while it does."""


@contextmanager
def sole_writer(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep other processes from writing `path` until the block ends, and remove what killed ones have left of it.

    A lock file beside `path` says who writes. The kernel drops the lock with the process, so a dead one blocks nobody.
    Inside the block the same thread may ask for the same path again.

    Args:
        path: The output; its folder is made, and removed again if it stays empty.
        wait: Wait for another writer to end instead of refusing.

    Raises:
        UserError: Another process is writing it, or the folder can't be written.
    """
    path = Path(os.path.abspath(path))
    if not path.name:
        raise UserError(f"{path} exists already: choose another --out")
    key = threading.get_ident(), path
    if key in _held:
        yield
        return
    new_folders = [parent for parent in path.parents if not parent.exists()]
    lock = path.with_name(f".{path.name}.kvlatent-lock")
    file = None
    try:
        with writing(path):
            file = _acquire(lock, path, wait)
        _held.add(key)
        for partial in path.parent.glob(f".{glob.escape(path.name)}.partial-*"):
            if LEFTOVER.fullmatch(partial.name):
                _remove(partial)
        yield
    finally:
        _held.discard(key)
        if file is not None:
            lock.unlink(missing_ok=True)  # while it is held: who waits for it sees that it's gone, and makes a new one
            os.close(file)
        for folder in new_folders:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _acquire(lock: Path, path: Path, wait: bool) -> int:
    """The descriptor of a locked lock file that is still the one in the folder, which is made if need be."""
    while True:
        file = _opened(lock)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _is_still(lock, file):
                command = " ".join((Path(sys.argv[0]).name, *sys.argv[1:]))
                os.truncate(file, 0)
                os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()} ({command[:200]})".encode(), 0)
                return file
        except BlockingIOError:
            holder = os.pread(file, 1000, 0).decode(errors="replace") or "another process"
            os.close(file)
            raise UserError(f"{path} is being written by {holder}; wait for it, or choose another --out") from None
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _opened(lock: Path) -> int:
    """The descriptor of a lock file; other writers may end and remove the folder, while it is empty, at any time."""
    tries = 0
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            return os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        except (FileNotFoundError, FileExistsError):
            tries += 1
            if tries == TRIES:
                raise


def _is_still(lock: Path, file: int) -> bool:
    """Whether a path leads to an open file; whoever held it may remove it at any time."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(lock))
    except FileNotFoundError:
        return False


def sweep(folder: Path) -> None:
    """Remove what killed processes have left anywhere below a folder; what is being written stays."""
    for file in sorted(folder.rglob(".*")):
        if (leftover := LEFTOVER.fullmatch(file.name)) and file.exists():
            with contextlib.suppress(UserError), sole_writer(file.with_name(leftover["name"])):
                pass


def check_regular(path: Path) -> None:
    """Raise `UserError` if `path`, or anything below it, is neither file nor folder: pipes and devices never end."""
    for file in (path, *path.rglob("*")):
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise UserError(f"{file} is no regular file")


def differing_settings(kept: bytes, asked: Mapping[str, Any]) -> list[str]:
    """The names of settings that differ from those kept as JSON, in order.

    Raises:
        ValueError: What was kept is no JSON object.
    """
    try:
        before, now = json.loads(kept), json.loads(json.dumps(asked))  # tuples are lists there
        return sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    except (AttributeError, RecursionError) as error:
        raise ValueError(str(error)) from None


def begin_work(file: Path, settings: dict[str, Any], *, what: str) -> None:
    """Make the folder of a file with the settings of some work, or find in it what a killed one with the same has done.

    Args:
        file: Where the settings are, in a folder whose parent is there.
        settings: What JSON can hold.
        what: The work, as a message calls it.

    Raises:
        UserError: It is of other settings, or damaged, or can't be written.
    """
    work = file.parent
    with writing(work):
        work.mkdir(exist_ok=True)
        if not file.is_file():
            with replaced(file) as partial:
                partial.write_text(json.dumps(settings))
            return
        kept = file.read_bytes()
    try:
        differing = differing_settings(kept, settings)
    except ValueError as error:
        raise damaged_work(work, f"{file.name}: {error}", what=what) from None
    if differing:
        raise UserError(
            f"{work} holds an unfinished {what} that was begun with other settings ({', '.join(differing)}); use the "
            "same, or remove it to begin anew"
        )


def damaged_work(work: Path, why: str, *, what: str) -> UserError:
    """What to raise when a file of a work folder isn't as it was written."""
    return UserError(f"the {what} in {work} is damaged ({why}); remove it to begin anew")


def at_home(path: str | Path) -> Path:
    """A path with `~` replaced; unlike `Path.expanduser`, it stays as it is where there is no home directory."""
    return Path(os.path.expanduser(path))


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Give a temporary sibling of `path` to write; if the block ends without an error, it takes the place of `path`.

    Raises:
        UserError: It can't be written.
    """
    with sole_writer(path, wait=True), writing(path):
        partial = _partial(path)
        try:
            yield partial
            partial.replace(path)
        except BaseException:
            _remove(partial)
            raise


@contextmanager
def new_file(path: Path, *, needed_bytes: int = 0) -> Iterator[Path]:
    """As `replaced`, for a path where nothing is yet: nothing there is ever overwritten.

    Raises:
        UserError: `path` exists, is being written, can't be written, or `needed_bytes` don't fit on the disk.
    """
    with new_output(path), writing(path):
        check_disk(path, needed_bytes)
        partial = _partial(path)
        try:
            yield partial
            refuse_existing(path)  # of somebody who asks for no lock
            partial.rename(path)
        except BaseException:
            _remove(partial)
            raise


@contextmanager
def new_folder(path: Path, *, needed_bytes: int = 0) -> Iterator[Path]:
    """As `new_file`, for a folder that the block fills."""
    with new_file(path, needed_bytes=needed_bytes) as partial:
        partial.mkdir()
        yield partial


@contextmanager
def new_output(path: Path) -> Iterator[None]:
    """Be the only writer of a path where nothing is yet, from the start of the work on.

    Raises:
        UserError: `path` exists, or another process is writing it.
    """
    with sole_writer(path):
        refuse_existing(path)
        yield


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Give a temporary folder; one that a killed process has left is removed by the next call."""
    root = Path(tempfile.gettempdir(), f"kvlatent-{os.getuid()}")
    with writing(root):
        root.mkdir(mode=0o700, exist_ok=True)
        if root.is_symlink() or root.stat().st_uid != os.getuid():
            raise UserError(f"{root} belongs to another user; set TMPDIR to a folder of your own")
    sweep(root)
    path = root / secrets.token_hex(6)
    with sole_writer(path):
        partial = _partial(path)
        try:
            partial.mkdir()
            yield partial
        finally:
            _remove(partial)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong while writing into one line.

    Raises:
        UserError: The disk is full, the folder read-only, …
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror or error}") from None
    except SafetensorError as error:  # which it raises where other libraries raise OSError
        raise UserError(f"can't write {path}: {error}") from None


def refuse_existing(path: Path) -> Path:
    """Return `path` if nothing is there yet; if it is, remove what a killed writer has left beside it.

    Raises:
        UserError: It exists.
    """
    if os.path.lexists(path):
        with contextlib.suppress(UserError), sole_writer(path):
            pass
        raise UserError(f"{path} exists already: choose another --out, or remove it")
    return path


def check_disk(path: Path, needed_bytes: int) -> None:
    """Raise `UserError` unless `needed_bytes` fit where `path` will be; better before the work than after it."""
    place = next(parent for parent in path.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise UserError(f"{path} needs {needed_bytes / 1e6:,.0f} MB; {free / 1e6:,.0f} MB are free there")


def discard(path: Path, *, of: Path) -> None:
    """Remove what the output `of` no longer needs; of a kill meanwhile the next writer of `of` removes the rest."""
    if path.exists():
        partial = _partial(of)
        path.rename(partial)
        _remove(partial)


def _partial(path: Path) -> Path:
    """A sibling to write first; its name is random, because process ids are equal in different containers."""
    path = Path(os.path.abspath(path))  # "." has no name
    return path.with_name(f".{path.name}.partial-{secrets.token_hex(6)}")


def _remove(path: Path) -> None:
    """Remove a file or a folder, whichever is there, as far as that is possible."""
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
