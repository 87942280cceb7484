"""Memory over a long time: what is done again and again takes no more than what is done a few times."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kvlatent.healing import heal as healing
from kvlatent.healing.config import HealConfig

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads /proc")]


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def check_flat(sizes: list[int], *, within: float) -> None:
    """Check that the last fifth takes no more than the second."""
    fifth = len(sizes) // 5
    early, late = max(sizes[fifth : 2 * fifth]), max(sizes[-fifth:])
    print(
        f"{len(sizes)} times: {sizes[0] / 1e6:.1f} MB at first, then {early / 1e6:.1f} MB, {late / 1e6:.1f} MB at last"
    )
    assert late - early < within


def test_a_long_healing(
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """300 steps, half of them in each stage, with states saved and metrics written after every one."""
    sizes, report = list[int](), healing._Healing._report

    def counted(*arguments: Any, **options: Any) -> None:
        report(*arguments, **options)
        sizes.append(resident())

    monkeypatch.setattr(healing._Healing, "_report", counted)
    text = torch.randint(260, (600, 32), generator=torch.Generator().manual_seed(0))
    config = HealConfig(stage1_tokens=9600, stage2_tokens=9600, lora_rank=4, save_minutes=0.01)
    healing.heal(tiny_student("llama"), tiny_teacher("llama"), text, tmp_path, config)
    assert len(sizes) == 300
    check_flat(sizes[:150], within=10e6)
    check_flat(sizes[150:], within=10e6)


def test_a_thousand_generations(tiny_student: Callable[..., PreTrainedModel]) -> None:
    student, sizes = tiny_student("llama"), list[int]()
    prompts = [torch.randint(260, (1, length)) for length in range(1, 51)]
    for index in range(1000):
        student.generate(prompts[index % 50], max_new_tokens=4, do_sample=False)
        sizes.append(resident())
    check_flat(sizes, within=10e6)
