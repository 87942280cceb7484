"""Layers trained one after the other end up as trained all at once, also when the run is killed in between."""

import copy
import gc
import json
import os
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvlatent.healing import streaming
from kvlatent.healing.config import HealConfig
from kvlatent.healing.heal import heal

SEQ = 16
STEP = 2 * SEQ


@pytest.fixture(scope="module")
def blocks() -> Tensor:
    return torch.randint(1, 260, (32, SEQ), generator=torch.Generator().manual_seed(3))


def config(**changes: Any) -> HealConfig:
    known = {"stage1_tokens": 5 * STEP, "stage2_tokens": 0, "lora_rank": 4, "lora_alpha": 8, "learning_rate": 1e-3}
    return HealConfig(**(known | changes))


def metrics(work: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_s", "peak_memory_bytes")} for line in lines]


def close(first: PreTrainedModel, second: PreTrainedModel, tolerance: float = 0.0) -> None:
    wanted = second.state_dict()
    for name, value in first.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clip": 1e-3},
        {"clip": None, "stage1_loss": "mse", "train": ("attention", "maps", "norms")},
        {"accumulate": 2, "batch_size": 1, "checkpointing": True},
        {"stage2_tokens": 3 * STEP, "train": ("attention", "norms")},
    ],
    ids=["plain", "clipped", "as in the paper", "accumulated", "two stages"],
)
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_streamed_layers_learn_what_all_layers_at_once_learn(
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    blocks: Tensor,
    tmp_path: Path,
    name: str,
    changes: dict[str, Any],
) -> None:
    at_once, streamed = (
        heal(
            tiny_student(name), tiny_teacher(name), blocks, tmp_path / str(stream),
            config(stream_layers=stream, **changes),
        )
        for stream in (False, True)
    )  # fmt: skip
    close(streamed, at_once)  # to the last bit
    lines, wanted = metrics(tmp_path / "True"), metrics(tmp_path / "False")
    for line, other in zip(lines, wanted, strict=True):
        assert line.pop("layer_loss", []) == pytest.approx(other.pop("layer_loss", []), rel=1e-5)
        assert line == pytest.approx(other, rel=1e-5)
    assert not list((tmp_path / "True").glob("hidden-*"))


@pytest.mark.parametrize(("name", "rank"), [("qwen3_5_text", 4), ("qwen3_5_text", 0), ("qwen3_5_moe_text", 4)])
def test_layers_of_linear_attention_are_streamed_whether_they_train_or_not(
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    blocks: Tensor,
    tmp_path: Path,
    name: str,
    rank: int,
) -> None:
    at_once, streamed = (
        heal(
            tiny_student(name), tiny_teacher(name), blocks, tmp_path / str(stream),
            config(stream_layers=stream, lora_rank=rank),
        )
        for stream in (False, True)
    )  # fmt: skip
    close(streamed, at_once)


@pytest.mark.parametrize("answers_and_documents", [False, True])
def test_streamed_layers_heed_what_counts(
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    blocks: Tensor,
    tmp_path: Path,
    answers_and_documents: bool,
) -> None:
    options: dict[str, Any] = {}
    if answers_and_documents:
        answers = torch.rand(blocks.shape, generator=torch.Generator().manual_seed(0)) < 0.4
        answers[:4] = False  # nothing counts in the first two steps
        options = {"answers": answers, "separator": int(blocks[0, 7])}
    models = [
        heal(
            tiny_student("qwen3"), tiny_teacher("qwen3"), blocks, tmp_path / str(stream),
            config(stream_layers=stream), **options,
        )
        for stream in (False, True)
    ]  # fmt: skip
    close(*models)


@pytest.mark.parametrize("killed_at", [1, 3, 5, 7, 9, 11])
def test_interrupted_and_resumed_streaming_equals_uninterrupted(
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    blocks: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    killed_at: int,
) -> None:
    settings = config(stream_layers=True, stage2_tokens=3 * STEP)

    def run(work: str, *, resume: bool = False) -> PreTrainedModel:
        return heal(tiny_student("llama"), tiny_teacher("llama"), blocks, tmp_path / work, settings, resume=resume)

    whole = run("whole")
    steps, optimizer_step = 0, torch.optim.AdamW.step

    def kill_once(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == killed_at + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return optimizer_step(*args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", kill_once)
    with pytest.raises(KeyboardInterrupt):
        run("killed")
    assert 0 < steps < 13
    close(run("killed", resume=True), whole)
    assert steps == 2 * 5 + 3
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")


def test_a_streamed_run_that_dies_resumes_from_its_last_save(
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    blocks: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = config(stream_layers=True, save_minutes=0)

    def run(work: str, *, resume: bool = False) -> PreTrainedModel:
        return heal(tiny_student("llama"), tiny_teacher("llama"), blocks, tmp_path / work, settings, resume=resume)

    whole = run("whole")
    save, saves = streaming.save_state, 0

    def die(*args: Any) -> None:
        nonlocal saves
        saves += 1
        if saves == 9:  # two steps into the second layer, whose output file holds the first one's input
            raise RuntimeError("power cut")
        save(*args)

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "save_state", die)
        with pytest.raises(RuntimeError, match="power cut"):
            run("killed")
    close(run("killed", resume=True), whole)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")


def test_only_one_layer_of_each_model_is_copied_to_the_device_at_a_time(
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    blocks: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alive: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
    most = 0

    def count(module: torch.nn.Module) -> torch.nn.Module:
        nonlocal most
        copied = copy.deepcopy(module)
        alive.add(copied)
        gc.collect()
        most = max(most, len(alive))
        return copied

    teacher, student = tiny_teacher("llama"), tiny_student("llama")
    monkeypatch.setattr(streaming, "copy", SimpleNamespace(deepcopy=count))
    heal(student, teacher, blocks, tmp_path / "work", config(stream_layers=True))
    assert most == 2
