"""A seeded run is the same again, and a killed one goes on as if nothing had happened."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from healed import config, metrics, run, same, without_speed
from torch import Tensor
from transformers import PreTrainedModel

from kvlatent.errors import UserError
from kvlatent.healing import heal as heal_module
from kvlatent.healing.stages import Stage


def test_two_seeded_runs_are_bitwise_equal_and_another_seed_is_not(
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    blocks: Tensor,
    tmp_path: Path,
) -> None:
    models = tiny_teacher, tiny_student
    first = run(*models, blocks, tmp_path / "a", config(seed=1))
    torch.rand(5)
    second = run(*models, blocks, tmp_path / "b", config(seed=1))
    assert same(first, second)
    assert without_speed(metrics(tmp_path / "a")) == without_speed(metrics(tmp_path / "b"))
    assert not same(first, run(*models, blocks, tmp_path / "c", config(seed=2)))


@pytest.mark.parametrize(
    ("number", "killed_at"), [(signal.SIGTERM, 1), (signal.SIGTERM, 3), (signal.SIGTERM, 4), (signal.SIGINT, 6)]
)
def test_interrupted_and_resumed_equals_uninterrupted(
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    blocks: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    killed_at: int,
    number: signal.Signals,
) -> None:
    models, handler = (tiny_teacher, tiny_student), signal.getsignal(number)
    whole = run(*models, blocks, tmp_path / "whole", config())
    steps = 0
    forward = Stage.forward

    def kill_once(self: Stage, **batch: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == killed_at + 1:
            os.kill(os.getpid(), number)
        return forward(self, **batch)

    monkeypatch.setattr(Stage, "forward", kill_once)
    with pytest.raises(KeyboardInterrupt):
        run(*models, blocks, tmp_path / "killed", config())
    assert signal.getsignal(number) == handler
    assert len(metrics(tmp_path / "killed")) == killed_at + 1
    resumed = run(*models, blocks, tmp_path / "killed", config(), resume=True)
    assert steps == 8
    assert same(resumed, whole)
    assert without_speed(metrics(tmp_path / "killed")) == without_speed(metrics(tmp_path / "whole"))


def test_a_run_that_dies_without_warning_resumes_from_its_last_save(
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    blocks: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = tiny_teacher, tiny_student
    whole = run(*models, blocks, tmp_path / "whole", config(save_minutes=0))
    save, saves = heal_module.save_state, []

    def die_while_saving(*args: Any) -> None:
        saves.append(args)
        if len(saves) == 3:
            (tmp_path / "killed" / "state.partial").mkdir(exist_ok=True)
            raise RuntimeError("power cut")
        save(*args)

    with monkeypatch.context() as patch:
        patch.setattr(heal_module, "save_state", die_while_saving)
        with pytest.raises(RuntimeError, match="power cut"):
            run(*models, blocks, tmp_path / "killed", config(save_minutes=0))
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"stage": 1, "step": 3, "los')  # cut off in the middle of a line
    resumed = run(*models, blocks, tmp_path / "killed", config(save_minutes=0), resume=True)
    assert same(resumed, whole)
    assert without_speed(metrics(tmp_path / "killed")) == without_speed(metrics(tmp_path / "whole"))


def test_resume_of_nothing_starts_and_a_new_start_forgets(
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    blocks: Tensor,
    tmp_path: Path,
) -> None:
    models = tiny_teacher, tiny_student
    first = run(*models, blocks, tmp_path / "work", config(), resume=True)
    assert len(metrics(tmp_path / "work")) == 8
    assert same(first, run(*models, blocks, tmp_path / "work", config()))
    assert len(metrics(tmp_path / "work")) == 8


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("state/trained.safetensors", lambda x: x[:-1] + bytes([x[-1] ^ 1]), "aren't those that were written"),
        ("state/trained.safetensors", lambda x: x[: len(x) // 2], "trained.safetensors"),
        ("state/progress.json", lambda _: b'{"stage": 3, "step": 0}', "how far"),
        ("state/progress.json", lambda _: b'{"stage": 1, "step": "0"}', "progress.json"),
        ("state/progress.json", lambda _: b"", "progress.json"),
        ("state/scaler.json", lambda _: b"{", "scaler.json"),
        ("metrics.jsonl", lambda _: b"{}\n", "metrics.jsonl"),
        ("heal.json", lambda _: b"[]", "heal.json"),
    ],
)
def test_a_damaged_state_is_refused(
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    blocks: Tensor,
    tmp_path: Path,
    name: str,
    change: Callable[[bytes], bytes],
    said: str,
) -> None:
    settings = config(stage1_tokens=32, stage2_tokens=32)
    run(tiny_teacher, tiny_student, blocks, tmp_path / "work", settings)
    file = tmp_path / "work" / name
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(UserError, match=rf"is damaged \(.*{said}.* --restart"):
        run(tiny_teacher, tiny_student, blocks, tmp_path / "work", settings, resume=True)


def test_resuming_with_a_student_converted_anew_is_refused(
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    blocks: Tensor,
    tmp_path: Path,
) -> None:
    def converted_anew(name: str) -> PreTrainedModel:
        student = tiny_student(name)
        student.model.layers[0].self_attn.v_proj.weight[3, 5] += 1e-3
        return student

    run(tiny_teacher, tiny_student, blocks, tmp_path / "work", config())
    with pytest.raises(UserError, match="the student has other weights"):
        run(tiny_teacher, converted_anew, blocks, tmp_path / "work", config(), resume=True)
