"""Commands killed before their file events; every event of every command in the slow test, some in the other."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import crash_points
import pytest
from commands import write_text
from transformers import PreTrainedModel, PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """A teacher, a student of it, two texts and a recipe."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, model in {"teacher": tiny_teacher("llama"), "student": tiny_student("llama", "portable", 8, 8)}.items():
        model.save_pretrained(folder / name)
        byte_tokenizer.save_pretrained(folder / name)
    for seed, name in enumerate(("train.txt", "other.txt")):
        write_text(folder / name, seed=seed, words=200)
    (folder / "tiny.yaml").write_text(
        crash_points.recipe(folder / "teacher", folder / "train.txt", folder / "other.txt")
    )
    return folder


def command(name: str, folder: Path) -> tuple[Callable[[Path], list[str]], str, dict[str, Any]]:
    """How to run a command into a folder, its output there, and what else `check` is to know."""
    text = ["--text", f"{folder}/train.txt", "--block-size", "32"]
    calibration, dims = [*text, "--tokens", "128", "--window", "8"], ["--d-qk", "8", "--d-vo", "8"]
    healing = ["heal", f"{folder}/student", "--teacher", f"{folder}/teacher", *text, "--stage1-tokens", "64"]
    healing += ["--stage2-tokens", "64", "--lora-rank", "2"]
    export, keeping = ["export", f"{folder}/student", "--to"], ["--adapters", "save", "--stream-layers"]
    judged = ["eval", f"{folder}/student", "--against", f"{folder}/teacher", "--text", f"{folder}/other.txt"]
    judged += ["--block-size", "32"]
    commands: dict[str, tuple[list[str], str, dict[str, Any]]] = {
        "calibrate": (["calibrate", f"{folder}/teacher", *calibration], "stats", {}),
        "convert": (["convert", f"{folder}/teacher", *calibration, *dims], "student", {}),
        "convert, one layer at a time": (
            ["convert", f"{folder}/teacher", *calibration, "--budget", "0.9", "--offload"],
            "student",
            {},
        ),
        "heal": (healing, "healed", {"again": ["--resume"]}),
        "heal, streamed": ([*healing, *keeping], "healed", {"again": ["--resume"]}),
        "eval": ([*judged, "--tokens", "64", "--joined", "--diagnose"], "scores", {}),
        "export stock": ([*export, "stock"], "stock", {}),
        "export gguf": ([*export, "gguf"], "model.gguf", {}),
        "run": (["run", f"{folder}/tiny.yaml"], "run", {"grows": True}),
    }
    argv, out, options = commands[name]
    return lambda root: [*argv, "--out", f"{root}/{out}", "--device", "cpu"], out, options


def some(count: int) -> Iterable[int]:
    """The first event, one in the middle, and those around the commit."""
    return (at for at in (1, count // 2, count - 5, count - 2, count) if at > 0)


@pytest.mark.parametrize("name", ["eval", "export gguf", "heal", "convert, one layer at a time"])
def test_a_kill_at_some_file_events_loses_nothing(name: str, folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    argv, out, options = command(name, folder)
    assert crash_points.check(argv, out, root, points=some, **options) >= 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("calibrate", "convert", "convert, one layer at a time", "eval", "heal", "heal, streamed"),
        *("export stock", "export gguf", "run"),
    ],
)
def test_a_kill_at_any_file_event_loses_nothing(name: str, folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    argv, out, options = command(name, folder)
    print(name, crash_points.check(argv, out, root, **options), "file events")
