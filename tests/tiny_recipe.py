"""Recipes as data: a small one, written to a file or changed in one place."""

import json
from pathlib import Path
from typing import Any


def tiny(folder: Path) -> dict[str, Any]:
    """A recipe of two healed students on the fixture `folder`."""
    heal = {"stage1_tokens": 128, "stage2_tokens": 128, "lora_rank": 2, "batch_size": 2}
    return {
        "title": "Tiny",
        "model": f"{folder}/teacher",
        "block_size": 32,
        "calibration": {"text": [f"{folder}/train.txt"], "tokens": 512},
        "training": {"text": [f"{folder}/train.txt"]},
        "held_out": {"text": [f"{folder}/other.txt"], "tokens": 256},
        "students": [
            {"budget": 0.5, "window": 0, "heal": heal},
            {"preset": "paper", "d_qk": 8, "d_vo": 8, "heal": heal},
        ],
        "bench": {"context": 16, "batch": 1, "new_tokens": 2},
        "generate": {"prompts": ["river stone", "bread"], "max_new_tokens": 4},
    }


def write(recipe: dict[str, Any], path: Path) -> Path:
    path.write_text(json.dumps(recipe))  # which is YAML
    return path


def changed(recipe: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    copy = json.loads(json.dumps(recipe))
    *parents, last = path.split(".")
    inner = copy
    for key in parents:
        inner = inner[int(key) if key.isdigit() else key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return copy
