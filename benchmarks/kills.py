"""Commands killed at random times, or started twice at once on one output: what is left each time.

    python benchmarks/kills.py kills --commands heal convert calibrate gguf stock run --times 50
    python benchmarks/kills.py pairs --times 50

`kills` ends a command by SIGKILL at a random time, then runs it again: the output was whole or not there, what the
second run makes is equal to that of a command which nobody killed, bit by bit, and nothing else is beside it. `pairs`
starts two different commands (another seed or text) on one output within a few hundredths of a second of each other:
the output is equal to that of one of the two, bit by bit, and the other is refused in one line.

Prints a line for each command; exit code 1 if something else has happened.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import tiny


def argv_of(name: str, root: Path, out: Path, other: bool = False) -> list[str]:
    """A command that writes `out`, or another one that writes something else there."""
    text = f"{root}/{'other' if other else 'train'}.txt"
    calibration = ["--text", text, *tiny.CALIBRATION]
    commands = {
        "heal": tiny.healing(root, str(out)) + (["--seed", "1"] if other else []),
        "convert": ["convert", f"{root}/teacher", *calibration, *tiny.DIMS, *tiny.NEAR, "--out", str(out)],
        "calibrate": ["calibrate", f"{root}/teacher", *calibration, *tiny.NEAR, "--out", str(out)],
        "gguf": ["export", f"{root}/{'teacher' if other else 'portable'}", "--to", "gguf", "--out", str(out)],
        "stock": ["export", f"{root}/portable", "--to", "stock", "--dtype", "bfloat16" if other else "float32",
                  "--out", str(out)],
        "run": ["run", f"{root}/tiny.yaml", "--seed", "1" if other else "0", "--out", str(out)],
    }  # fmt: skip
    return [*commands[name], "--device", "cpu"]


class Scene:
    """A folder to write into, and what the command makes there when nobody disturbs it."""

    def __init__(self, name: str, root: Path, folder: Path) -> None:
        self.name, self.root, self.folder = name, root, folder
        self.work = folder / "outputs"
        self.out = self.work / ("out.gguf" if name == "gguf" else "out")
        self.seconds = 0.0

    def clear(self) -> None:
        """Begin with nothing there."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)

    def argv(self, other: bool = False) -> list[str]:
        """The command, or the other one."""
        return argv_of(self.name, self.root, self.out, other)

    def whole(self, other: bool = False) -> dict[str, str]:
        """What the undisturbed command makes."""
        self.clear()
        ended = tiny.command(self.argv(other), self.work)
        assert ended.code == 0, ended
        self.seconds = max(self.seconds, ended.seconds)
        return tiny.marks(self.out)

    def beside(self) -> list[str]:
        """What is there apart from the output."""
        temporary = [str(path) for path in Path(f"{self.work}.tmp").rglob("*") if path.is_file()]
        return [path.name for path in self.work.rglob("*") if self._surplus(path)] + temporary

    def _surplus(self, path: Path) -> bool:
        return (path.parent == self.work and path != self.out) or "partial" in path.name or path.name.endswith("-lock")


def difference(found: dict[str, str], *wanted: dict[str, str]) -> str:
    """What differs between an output and the nearest of those wanted; empty where it equals one."""
    differing = [sorted(name for name in {*found, *one} if found.get(name) != one.get(name)) for one in wanted]
    return min((", ".join(names) for names in differing), key=len)


def kills(scene: Scene, times: int, rng: random.Random) -> tuple[Counter[str], list[str]]:
    """Kill a command so often."""
    counts, faults, whole = Counter[str](), list[str](), scene.whole()
    steps = scene.name == "run"  # whose output is a folder that fills step by step
    for number in range(times):
        scene.clear()
        began, at = time.monotonic(), rng.random() * scene.seconds
        process = tiny.start_command(scene.argv(), scene.work)
        time.sleep(at)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
        first = tiny.wait(process, scene.work, began)
        there = scene.out.exists()
        counts["killed" if first.code == 137 else "ended before"] += 1
        counts["whole" if there and not steps else "in part" if there else "absent"] += 1
        place = f"{scene.name} {number}, killed after {at:.3f} s: "
        if there and not steps and (wrong := difference(tiny.marks(scene.out), whole)):
            faults.append(f"{place}{wrong} differ in what was left")
        again = scene.argv() + (["--resume"] if scene.name == "heal" else [])
        second = tiny.command(again, scene.work)
        exists = there and not steps and second.code == 2 and "exists already" in second.said
        if second.code and not exists:
            faults.append(f"{place}again: exit {second.code}: {second.said.strip()[-300:]}")
        elif wrong := difference(tiny.marks(scene.out), whole):
            faults.append(f"{place}{wrong} differ after running again")
        if beside := scene.beside():
            faults.append(f"{place}left: {', '.join(beside)}")
    return counts, faults


def pairs(scene: Scene, times: int, rng: random.Random) -> tuple[Counter[str], list[str]]:
    """Start two commands at once on one output, so often."""
    counts, faults, wanted = Counter[str](), list[str](), (scene.whole(), scene.whole(other=True))
    assert difference(*wanted), "two commands that make the same tell nothing"
    for number in range(times):
        scene.clear()
        began, folders, processes = time.monotonic(), [scene.folder / "one", scene.folder / "two"], []
        for other in rng.sample([False, True], 2):
            folders[other].mkdir(exist_ok=True)
            processes.append((tiny.start_command(scene.argv(other), folders[other]), folders[other]))
            time.sleep(rng.choice([0, 0, rng.random() * 0.1, rng.random() * scene.seconds]))
        ended = [tiny.wait(process, folder, began) for process, folder in processes]
        codes = sorted(one.code for one in ended)
        refusals = [line for one in ended if one.code == 2 for line in one.said.splitlines() if "kvlatent: " in line]
        why = "written" if any("is being written by" in line for line in refusals) else "there"
        counts["both" if codes == [0, 0] else f"one, the other refused: {why}"] += 1
        place = f"{scene.name} {number}: "
        if codes != [0, 2] or len(refusals) != 1:
            faults.append(f"{place}exit {codes}: {' | '.join(one.said.strip()[-200:] for one in ended)}")
        if scene.out.exists() and (wrong := difference(tiny.marks(scene.out), *wanted)):
            faults.append(f"{place}{wrong} are of neither")
        if beside := scene.beside():
            faults.append(f"{place}left: {', '.join(beside)}")
    return counts, faults


def main() -> int:
    """Disturb, compare, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["kills", "pairs"])
    names = ["heal", "convert", "calibrate", "gguf", "stock", "run"]
    parser.add_argument("--commands", nargs="+", default=names, choices=names)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    bad = False
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        root = Path(folder, "in")
        root.mkdir()
        tiny.inputs(root)
        for name in asked.commands:
            scene = Scene(name, root, Path(folder))
            disturb = kills if asked.mode == "kills" else pairs
            counts, faults = disturb(scene, asked.times, random.Random(asked.seed))
            told = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
            print(
                f"{name}: {asked.times} {asked.mode}: {told}; {len(faults)} faults",
                *faults[:10],
                sep="\n  ",
                flush=True,
            )
            bad |= bool(faults)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
