"""Healing from folder to folder: a converted checkpoint and text become a healed checkpoint, with its record."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from kvlatent.data.blocks import TokenBlocks, check_held_out, load_blocks, save_blocks, separator_id, token_blocks
from kvlatent.data.positions import context_of
from kvlatent.data.sources import read_text
from kvlatent.errors import UserError
from kvlatent.fields import given
from kvlatent.files import check_disk, check_regular, discard, refuse_existing, sole_writer
from kvlatent.healing.config import HealChanges, HealConfig, HealInputs, work_folder
from kvlatent.healing.heal import heal
from kvlatent.healing.state import has_state
from kvlatent.healing.streaming import hidden_bytes
from kvlatent.healing.teacher_cache import BYTES as TOP_K_BYTES
from kvlatent.healing.teacher_cache import TeacherCache
from kvlatent.kernels.cpu_linear import is_gated
from kvlatent.model.attention import attentions
from kvlatent.model.card import unmeasured_card
from kvlatent.model.checkpoints import (
    environment,
    load_model,
    multiplies_bfloat16,
    pick_device,
    processes,
    record_of,
    save_checkpoint,
)
from kvlatent.model.graft import spec_in, spec_of
from kvlatent.model.loading import load_config, load_tokenizer, stored_dtype, weight_bytes
from kvlatent.model.spec import Preset


def heal_checkpoint(
    start: str,
    out: Path,
    inputs: HealInputs,
    changes: HealChanges,
    *,
    resume: bool = False,
    restart: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
) -> dict[str, Any]:
    """Train a student towards its teacher and write the result to a new folder.

    Args:
        start: Folder of the student.
        out: The new folder.
        inputs: Text and teacher.
        changes: Settings that differ from those of the student's preset.
        resume: Continue the interrupted healing of `out`.
        restart: Forget the interrupted healing of `out`, and begin anew.
        device: Where to train; master weights are float32.
        dtype: Dtype of the weights written; `auto` is that of `start`.
        seed: Random seed of the order of the text and of LoRA's start.

    Raises:
        UserError: `out` exists, is being written or has an interrupted healing, or the models, the text or the
            settings can't be used.
        KeyboardInterrupt: Interrupted; the state is in `work_folder(out)`.
    """
    with ExitStack() as stack:
        if os.environ.get("RANK", "0") == "0":  # of several processes the first one writes
            stack.enter_context(_sole_healing(out, resume=resume, restart=restart))
        config = load_config(start)
        spec = spec_in(config)
        if spec is None:
            raise UserError(f"{start} is not a converted model; make one with `kvlatent convert`")
        name = inputs.teacher or record_of(start).get("teacher")
        if name is None:
            raise UserError(f"{start} has no record of its teacher; name it with --teacher")
        original = load_config(name)
        for field in ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads"):
            if getattr(config, field) != getattr(original, field):
                raise UserError(
                    f"{name} is not the teacher of {start}: "
                    f"its {field} is {getattr(original, field)}, not {getattr(config, field)}"
                )
        assert spec.preset != "none"
        settings = settings_for(spec.preset, changes, config, coded=bool(spec.k_codes), context=None, seed=seed)
        tokenizer = load_tokenizer(start)

        if not 0 < inputs.top_k <= config.vocab_size:
            raise UserError(f"top_k must be between 1 and the vocabulary's {config.vocab_size}; got {inputs.top_k}")

        @lru_cache(maxsize=1)
        def teacher_model() -> PreTrainedModel:
            host = "cpu" if settings.stream_layers else device
            return load_model(name, device=host, dtype=teacher_dtype(device))[0]

        group, block_size = processes(pick_device(device)), inputs.block_size
        tokens = settings.blocks(block_size, group.num_processes) * block_size
        kept = work_folder(out) / "text.safetensors"
        if group.is_main_process and not resume:
            discard(work_folder(out), of=out)
        if group.is_main_process and not kept.is_file():
            read = read_text(
                inputs.text, tokenizer, tokens=tokens, block_size=block_size, seed=seed, vocab_size=config.vocab_size,
                teacher=teacher_model,
            )  # fmt: skip
            save_blocks(read, kept)
        try:
            group.wait_for_everyone()
            blocks = load_blocks(kept)
            if set(blocks.sources) != set(inputs.text) or blocks.ids.shape != (tokens // block_size, block_size):
                raise UserError(
                    f"the healing of {out} was begun with other text; use the same, or --restart to begin anew"
                )
            watched = None
            if inputs.held_out:
                watched = token_blocks(
                    inputs.held_out, tokenizer, block_size=block_size, tokens=inputs.held_out_tokens, seed=seed,
                    vocab_size=config.vocab_size,
                )  # fmt: skip
                check_held_out(blocks.fingerprints, watched)
                if len(watched.ids) < group.num_processes:
                    raise UserError(f"held-out text needs a block for each of {group.num_processes} processes")
            return heal_student(
                start, out, teacher=teacher_model(), blocks=blocks, settings=settings, asked=given(changes),
                device=device, dtype=stored_dtype(config, dtype),
                cache=None if inputs.teacher_cache is None else TeacherCache(inputs.teacher_cache, inputs.top_k),
                separator=separator_id(tokenizer) if inputs.separate_documents else None,
                held_out=None if watched is None else watched.ids, track=inputs.track,
            )  # fmt: skip
        except UserError:
            if group.is_main_process and not has_state(work_folder(out)):  # refused before there was anything to resume
                discard(work_folder(out), of=out)
            raise


CODED_LEARNING_RATE = 2e-5
"""Peak learning rate of stage 2 for students whose far tokens are codes: they start nearer to the teacher than what
1e-4 disturbs (docs/log.md, 2026-11-28)."""


def settings_for(
    preset: Preset, changes: HealChanges, model: PreTrainedConfig, *, coded: bool, context: int | None, seed: int
) -> HealConfig:
    """The settings of a healing that somebody asked for: the preset's, with the changes that were given.

    Args:
        preset: The student's.
        changes: What is to be different.
        model: The config of the student or its teacher, which bounds the context and the rank.
        coded: Whether the student's far tokens are codes.
        context: Positions where the changes name none; None is all of the model's.
        seed: Random seed.

    Raises:
        UserError: A number that can't be, or no tokens at all.
    """
    asked = given(changes)
    asked |= {"context": context_of(model, asked.get("context", context)), "seed": seed}
    if coded:
        asked.setdefault("learning_rate", CODED_LEARNING_RATE)
    settings = HealConfig.for_preset(asked.pop("like", preset), **asked)
    if settings.lora_rank > (most := min(model.hidden_size, getattr(model, "intermediate_size", model.hidden_size))):
        raise UserError(f"lora_rank must be at most the {most} dims of the FFN; got {settings.lora_rank}")
    if settings.stage1_tokens + settings.stage2_tokens == 0:
        raise UserError("healing needs tokens for stage 1, stage 2 or both; got 0 and 0")
    return settings


@contextmanager
def _sole_healing(out: Path, *, resume: bool, restart: bool) -> Iterator[None]:
    """Be the only one that heals to `out`, and neither overwrite a healed model nor lose an unfinished one."""
    with sole_writer(out):
        forget_finished(out)
        refuse_existing(out)
        work = work_folder(out)
        check_regular(work)
        if resume and restart:
            raise UserError("--resume goes on and --restart begins anew; give one of them")
        if has_state(work) and not (resume or restart):
            raise UserError(f"{work} holds an unfinished healing of {out}: --resume goes on, --restart begins anew")
        yield


def teacher_dtype(device: str) -> str:
    """What a teacher is healed by in: bfloat16 where the hardware computes in it."""
    return "bfloat16" if multiplies_bfloat16(pick_device(device)) else "float32"


def forget_finished(out: Path) -> None:
    """Remove the work folder of a healing that is whole in `out`: a kill came before that was done."""
    work = work_folder(out)
    metrics, healed = work / "metrics.jsonl", out / "metrics.jsonl"
    if metrics.is_file() and healed.is_file() and metrics.read_bytes() == healed.read_bytes():
        discard(work, of=out)


def heal_student(
    start: str,
    out: Path,
    *,
    teacher: PreTrainedModel,
    blocks: TokenBlocks,
    settings: HealConfig,
    asked: Mapping[str, Any],
    device: str,
    dtype: torch.dtype,
    cache: TeacherCache | None = None,
    separator: int | None = None,
    held_out: torch.Tensor | None = None,
    track: Sequence[str] = (),
) -> dict[str, Any]:
    """Train the student in folder `start` on ready blocks and write it to `out`, from where `work_folder(out)` is.

    The record keeps the whole of `settings`, and under `asked` what of it was asked for.

    Raises:
        UserError: No disk space, or the training failed.
        KeyboardInterrupt: Interrupted; the state is in `work_folder(out)`.
    """
    place = pick_device(device)
    group, host = processes(place), "cpu" if settings.stream_layers else str(place)
    student, tokenizer = load_model(start, device=host, dtype="float32")
    check_disk(out, weight_bytes(student, dtype) + _work_bytes(student, teacher, settings) + 50_000_000)
    if cache is not None:
        check_disk(cache.folder, settings.stage2_tokens * cache.k * TOP_K_BYTES)
    began, work = time.monotonic(), work_folder(out)
    student = heal(
        student, teacher, blocks.ids, work, settings, resume=True, answers=blocks.answers, separator=separator,
        cache=cache, held_out=held_out, track=track, device=place,
    )  # fmt: skip
    record = record_of(start)
    step = {"verb": "heal", "text": list(blocks.sources), "block_size": blocks.ids.shape[1], **asdict(settings)}
    step |= {"asked": dict(asked)}
    step |= {"processes": group.num_processes, "seconds": time.monotonic() - began}
    record |= {
        "fingerprints": sorted(blocks.fingerprints.union(record.get("fingerprints", ()))),
        "steps": [*record.get("steps", ()), step | {"record": environment()}],
    }
    record.setdefault("teacher", teacher.config._name_or_path)
    spec = spec_of(student)
    assert spec is not None
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    if group.is_main_process:
        save_checkpoint(
            student.to(dtype), tokenizer, out, record=record, card=unmeasured_card(record, spec.to_dict()),
            copied=[work / name for name in ("metrics.jsonl", "adapters", "tracked")],
        )  # fmt: skip
    group.wait_for_everyone()
    if group.is_main_process:
        discard(work, of=out)
    losses = {stage: [line["loss"] for line in lines if line["stage"] == stage] for stage in (1, 2)}
    return {
        "out": str(out),
        "preset": spec.preset,
        "tokens": blocks.ids.numel(),
        "loss": {f"stage{stage}": {"first": x[0], "last": x[-1]} for stage, x in losses.items() if x},
        "seconds": step["seconds"],
    }


def _work_bytes(student: PreTrainedModel, teacher: PreTrainedModel, settings: HealConfig) -> int:
    """About what healing's work folder takes: two states and, if layers are streamed, their hidden states.

    A state is what trains and AdamW's two moments of it, in float32.
    """
    trained = sum(p.numel() for attention in attentions(student) for p in attention.parameters())
    for layer in student.model.layers:
        if is_gated(layer.mlp):
            trained += sum(sum(p.shape) for p in layer.mlp.parameters() if p.ndim == 2) * settings.lora_rank
    states = 2 * 3 * 4 * trained
    if not settings.stream_layers:
        return states
    return states + hidden_bytes(settings.stage1_tokens, student.config.hidden_size, teacher.dtype)
