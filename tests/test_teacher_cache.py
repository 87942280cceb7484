"""What the teacher says is computed once, kept on disk, and used instead of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvlatent.errors import UserError
from kvlatent.healing import teacher_cache
from kvlatent.healing.config import HealConfig
from kvlatent.healing.heal import heal
from kvlatent.healing.teacher_cache import TeacherCache

VOCABULARY, SEQ, STEP = 260, 16, 32


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_cache, "SHARD", 3)


@pytest.fixture(scope="module")
def blocks() -> Tensor:
    return torch.randint(1, VOCABULARY, (20, SEQ), generator=torch.Generator().manual_seed(3))


def losses(work: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (work / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("options", [{}, {"separator": 7}, {"loss": "mix", "temperature": 2.0}])
def test_a_cache_of_the_whole_vocabulary_trains_as_the_teacher_does(
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    blocks: Tensor,
    tmp_path: Path,
    options: dict[str, Any],
) -> None:
    options = dict(options)
    separator = options.pop("separator", None)
    config = HealConfig(stage1_tokens=2 * STEP, stage2_tokens=5 * STEP, lora_rank=4, **options)

    def run(work: str, cache: TeacherCache | None, teacher: PreTrainedModel | None = None) -> None:
        teacher = teacher or tiny_teacher("llama")
        heal(tiny_student("llama"), teacher, blocks, tmp_path / work, config, cache=cache, separator=separator)

    cache = TeacherCache(tmp_path / "cache", VOCABULARY)
    run("plain", None)
    run("cached", cache)
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "plain"), rel=2e-3)
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}
    assert len(written) == 1 + 4  # blocks 4 to 13, three a file

    def refuse(*_args: Any) -> None:
        raise AssertionError("the teacher is asked again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TeacherCache, "_top_k", refuse)
        run("again", cache)
    assert losses(tmp_path / "again") == losses(tmp_path / "cached")
    assert written == {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}


def test_few_tokens_lower_the_loss_too(
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    blocks: Tensor,
    tmp_path: Path,
) -> None:
    config = HealConfig(stage2_tokens=10 * STEP, lora_rank=4, learning_rate=2e-3)
    repeated = blocks[:2].repeat(10, 1)
    heal(
        tiny_student("llama"), tiny_teacher("llama"), repeated, tmp_path / "work", config,
        cache=TeacherCache(tmp_path / "cache", 8),
    )  # fmt: skip
    found = losses(tmp_path / "work")
    assert found[-1] < 0.8 * found[0]


def test_a_cache_of_something_else_is_refused(
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    blocks: Tensor,
    tmp_path: Path,
) -> None:
    def run(k: int, text: Tensor, **changes: Any) -> None:
        config = HealConfig(stage2_tokens=2 * STEP, lora_rank=4, **changes)
        heal(
            tiny_student("llama"), tiny_teacher("llama"), text, tmp_path / "work", config,
            cache=TeacherCache(tmp_path / "cache", k),
        )  # fmt: skip

    run(8, blocks)
    for k, text, changes in ((9, blocks, {}), (8, blocks.flip(0), {}), (8, blocks, {"temperature": 2.0})):
        with pytest.raises(UserError, match="caches another teacher, text, temperature or number of tokens"):
            run(k, text, **changes)
    (tmp_path / "cache" / "00000000.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match="can't be read"):
        run(8, blocks)
    (tmp_path / "cache" / "about.json").unlink()
    with pytest.raises(UserError, match="is not a teacher cache"):
        run(8, blocks)
