"""What tests of healing share."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvlatent.healing.config import HealConfig
from kvlatent.healing.heal import heal

SEQ = 16
STEP = 2 * SEQ
"""Tokens of a step of two blocks."""


def config(**changes: Any) -> HealConfig:
    known = {"stage1_tokens": 4 * STEP, "stage2_tokens": 4 * STEP, "lora_rank": 4, "lora_alpha": 8, "warmup": 0.0}
    return HealConfig(**(known | changes))


def metrics(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]


def without_speed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if key not in ("tokens_per_s", "peak_memory_bytes")}
        for line in lines
    ]


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def run(
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    blocks: Tensor,
    work: Path,
    settings: HealConfig,
    **options: Any,
) -> dict[str, Tensor]:
    return weights(heal(tiny_student("llama"), tiny_teacher("llama"), blocks, work, settings, **options))
