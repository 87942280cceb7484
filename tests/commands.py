"""Commands on the fixture `folder`, and texts of few words."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from kvlatent import cli

WORDS = ["river", "stone", "bread", "lamp", "morning", "harbour", "seven", "quiet", "under", "between", "carries"]


def write_text(path: Path, *, seed: int, words: int = 600) -> Path:
    rng = random.Random(seed)
    path.write_text(" ".join(rng.choice(WORDS) for _ in range(words)))
    return path


def convert(root: Path, *changes: str) -> list[str]:
    text = ["--text", f"{root}/train.txt", "--tokens", "512", "--block-size", "32", "--window", "0"]
    dims = [] if "--budget" in changes else ["--d-qk", "8", "--d-vo", "8"]
    return ["convert", f"{root}/teacher", *text, *dims, *changes]


def healed(root: Path, *changes: str) -> list[str]:
    tokens = ["--stage1-tokens", "128", "--stage2-tokens", "128", "--block-size", "32", "--lora-rank", "2"]
    return ["heal", f"{root}/student", "--text", f"{root}/train.txt", *tokens, *changes]


def answer(capsys: pytest.CaptureFixture[str], argv: list[str]) -> Any:
    """Run in process and read stdout, all of it, as JSON."""
    capsys.readouterr()
    assert cli.main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def check_refused(argv: list[str], said: str, root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = sorted(root.rglob("*"))
    capfd.readouterr()
    assert cli.main([*argv, "--json"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    lines = [line for line in err.split("\r")[-1].splitlines() if not line.startswith("unpacking")]  # that is progress
    assert len(lines) == 1, err
    assert lines[0].startswith("kvlatent: ")
    assert said in lines[0]
    assert sorted(root.rglob("*")) == before
