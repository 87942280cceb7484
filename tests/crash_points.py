"""A command killed before each of its file events: its output is whole or absent, and running it again mends the rest.

File events are what Python says of opening for writing, renaming, making and removing (`sys.addaudithook`), below one
folder. A kill leaves what is on disk by then, so one run is enough: before each event the folder is copied, and each
copy is what a command killed there finds when it is run again. Commands run in processes forked from one that has
imported everything, so each takes little more than its work.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tqdm import tqdm

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(
    ["kvlatent.cli", "kvlatent.cli.recipe", "kvlatent.evaluation.evaluate", "kvlatent.serving.launch"]
)


def run(argv: list[str], root: Path, *, copies: Path | None = None) -> tuple[int, str]:
    """Run a command; returns its exit code and the end of what it said.

    Args:
        argv: Of `kvlatent`.
        root: The folder whose events count.
        copies: Where to copy it to before each event, under the event's number, from 1.
    """
    said = root.with_name(root.name + ".log")
    process = FORK.Process(target=_child, args=(argv, root, said, copies))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode, said.read_text(errors="replace")[-1500:]


def _child(argv: list[str], root: Path, said: Path, copies: Path | None) -> None:
    for number in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), number)
    import torch

    from kvlatent import cli
    from kvlatent.evaluation import bench

    torch.set_num_threads(1)
    patch.object(bench, "copy_bandwidth", partial(bench.copy_bandwidth, megabytes=1)).start()  # a third of a run's time
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen, copies
        if copies is not None and _changes(event, arguments, str(root)):
            seen += 1
            folder, copies = copies, None  # of copying nothing is told
            shutil.copytree(root, folder / str(seen), symlinks=True)
            copies = folder

    sys.addaudithook(watch)
    code = cli.main(argv)
    copies = None
    sys.stdout.flush()
    os._exit(code)


def _changes(event: str, arguments: tuple[Any, ...], root: str) -> bool:
    """Whether an audit event changes something below `root`."""
    if event == "open":
        path, _, flags = arguments
        folder = -1
        if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return False
    elif event in ("os.remove", "os.rmdir", "os.mkdir", "os.rename", "os.link", "os.truncate"):
        path, folder = arguments[0], arguments[-1] if event in ("os.remove", "os.rmdir") else -1
    else:
        return False
    if isinstance(path, int):
        return False
    path = os.fsdecode(path)
    if folder not in (-1, None):
        path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
    return os.path.abspath(path).startswith(root)


def marks(out: Path) -> dict[str, str]:
    """What of an output must be the same every time: the names of its files, and the tensors in them."""
    files = [out] if out.is_file() else sorted(file for file in out.rglob("*") if file.is_file())
    tensors = (".safetensors", ".gguf")
    return {
        str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() if file.suffix in tensors else ""
        for file in files
    }


def check(
    argv: Callable[[Path], list[str]],
    out: str,
    root: Path,
    *,
    again: Iterable[str] = (),
    grows: bool = False,
    points: Callable[[int], Iterable[int]] = lambda count: range(1, count + 1),
) -> int:
    """Check what a command killed before its file events leaves, each time; returns how many times.

    Args:
        argv: The command that writes into a folder.
        out: The name of its output there.
        root: A new folder to work in.
        again: Arguments to go on with, after a kill.
        grows: The output is a folder that steps fill one after the other, so it may be there in part.
        points: Which events of how many.
    """
    copies = root.with_name(root.name + ".copies")
    code, said = run(argv(root), root, copies=copies)
    assert code == 0, said
    whole, count = marks(root / out), len(list(copies.iterdir()))
    assert [path.name for path in root.iterdir()] == [out]
    chosen = sorted(set(points(count)))
    for at in tqdm(chosen, desc="file events"):
        shutil.rmtree(root)
        (copies / str(at)).rename(root)
        left = f"event {at} of {count}, left: {[str(path.relative_to(root)) for path in root.rglob('*')]}"
        there = (root / out).exists()
        assert grows or not there or marks(root / out) == whole, left
        code, said = run([*argv(root), *again], root)
        if there and not grows:
            assert code == 2 and "exists already" in said, f"{left}\n{said}"
        else:
            assert code == 0, f"{left}\n{said}"
        assert marks(root / out) == whole, left
        assert [path.name for path in root.iterdir()] == [out], left
    return len(chosen)


def recipe(teacher: Path, train: Path, other: Path) -> str:
    """A recipe of two tiny students, one of them healed."""
    heal = {"stage1_tokens": 64, "stage2_tokens": 64, "lora_rank": 2, "batch_size": 2}
    return json.dumps(
        {
            "title": "Tiny",
            "model": str(teacher),
            "block_size": 32,
            "calibration": {"text": [str(train)], "tokens": 128},
            "training": {"text": [str(train)]},
            "held_out": {"text": [str(other)], "tokens": 128},
            "students": [
                {"preset": "portable", "d_qk": 8, "d_vo": 8, "heal": heal},
                {"preset": "paper", "d_qk": 8, "d_vo": 8},
            ],
            "bench": {"context": 16, "batch": 1, "new_tokens": 2},
            "generate": {"prompts": ["river"], "max_new_tokens": 2},
        }
    )
