"""Outputs are whole or absent, and one process at a time writes them."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from kvlatent import files
from kvlatent.errors import UserError
from kvlatent.files import check_regular, new_file, new_folder, replaced, scratch_folder, sole_writer, sweep
from kvlatent.signals import Stopped, stopping

HOLD = """
import sys, time
from pathlib import Path
from kvlatent.files import new_folder, scratch_folder
with (scratch_folder() if sys.argv[1] == "scratch" else new_folder(Path(sys.argv[1]))) as folder:
    (folder / "half").write_text("half")
    print(folder, flush=True)
    time.sleep(600)
"""


def hold(what: str) -> "subprocess.Popen[str]":
    """A process that is in the middle of writing."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, what], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.folder = Path(process.stdout.readline().strip())  # type: ignore[attr-defined]
    return process


def kill(process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_second_writer_is_refused_and_told_who_writes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = hold(str(out))
    try:
        said = rf"is being written by process {process.pid} on .+ \(-c "
        with pytest.raises(UserError, match=said), new_folder(out):
            raise AssertionError("not reached")
        assert process.folder.exists()  # type: ignore[attr-defined]
    finally:
        kill(process)


def test_what_a_killed_writer_left_is_gone_after_the_next_start(tmp_path: Path) -> None:
    out = tmp_path / "out"
    kill(hold(str(out)))
    assert len(list(tmp_path.iterdir())) == 2
    with new_folder(out) as folder:
        (folder / "whole").write_text("whole")
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["out", "out/whole"]


def test_leftovers_below_a_folder_are_swept_and_what_is_written_stays(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    kill(hold(f"{tmp_path}/run/dead"))
    alive = hold(f"{tmp_path}/run/alive")
    (tmp_path / "run" / ".theirs.lock").write_text("")  # of another program
    try:
        sweep(tmp_path / "run")
        names = {path.name for path in (tmp_path / "run").iterdir()}
        assert names == {".theirs.lock", ".alive.kvlatent-lock", alive.folder.name}  # type: ignore[attr-defined]
    finally:
        kill(alive)


def test_scratch_folders_of_killed_processes_are_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    process = hold("scratch")
    with scratch_folder():
        assert process.folder.exists()  # type: ignore[attr-defined]
    kill(process)
    with scratch_folder() as mine:
        assert not process.folder.exists()  # type: ignore[attr-defined]
    assert not mine.exists()
    assert len(list(tmp_path.rglob("*"))) == 1


def test_nothing_is_overwritten_by_what_began_when_it_was_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"), new_file(tmp_path / "out") as partial:
        partial.write_text("mine")
        (tmp_path / "out").write_text("theirs")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out").read_text() == "theirs"


def test_temporaries_of_equal_process_ids_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert len({files._partial(tmp_path / "out") for _ in range(100)}) == 100


def test_many_who_wait_for_a_path_in_a_new_folder_all_get_their_turn(tmp_path: Path) -> None:
    """Locks and the folder, which is empty in between, come and go under those who wait."""
    path, inside, most = tmp_path / "new" / "output", 0, 0

    def write(_: int) -> None:
        nonlocal inside, most
        for _ in range(100):
            with sole_writer(path, wait=True):
                inside += 1
                most = max(most, inside)
                inside -= 1

    with ThreadPoolExecutor(4) as pool:
        assert len([*pool.map(write, range(4))]) == 4
    assert most == 1


def test_writers_that_replace_wait_for_each_other(tmp_path: Path) -> None:
    inside, most = 0, 0

    def write(text: str) -> None:
        nonlocal inside, most
        with replaced(tmp_path / "out") as partial:
            inside += 1
            most = max(most, inside)
            time.sleep(0.01)
            partial.write_text(text)
            inside -= 1

    threads = [threading.Thread(target=write, args=(str(number) * 100,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert len(set((tmp_path / "out").read_text())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
@pytest.mark.parametrize("kind", [new_file, replaced])
def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(kind: Any, error: Exception, tmp_path: Path) -> None:
    said = r"can't write .*/new/out: No space left"
    with pytest.raises(UserError, match=said), kind(tmp_path / "new" / "out") as part:
        part.write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_that_end_leave_nothing(number: signal.Signals, tmp_path: Path) -> None:
    with pytest.raises(Stopped) as stopped, stopping(), new_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("half")
        os.kill(os.getpid(), number)
        time.sleep(1)
    assert stopped.value.number == number
    assert list(tmp_path.iterdir()) == []


def test_the_same_thread_may_ask_twice(tmp_path: Path) -> None:
    with sole_writer(tmp_path / "out"), new_folder(tmp_path / "out") as folder:
        (folder / "whole").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_folders_that_are_there_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="exists already"), new_folder(Path(name)):
        raise AssertionError("not reached")
    with pytest.raises(UserError, match=r"can't write|exists already"), replaced(Path(name)) as partial:
        partial.write_text("a file can't take the place of a folder")


def test_pipes_and_devices_are_no_input(tmp_path: Path) -> None:
    (tmp_path / "run" / "evaluate").mkdir(parents=True)
    (tmp_path / "run" / "file").write_text("x")
    (tmp_path / "run" / "dangling").symlink_to("nowhere")
    check_regular(tmp_path / "run")
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        odd = tmp_path / "run" / "evaluate" / "teacher.json"
        make(odd)
        for path in (tmp_path / "run", odd):
            with pytest.raises(UserError, match=r"teacher.json is no regular file"):
                check_regular(path)
        odd.unlink()
