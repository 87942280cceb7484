"""Healing from folder to folder: a converted checkpoint and text become a healed checkpoint, with its record."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kvlatent.data.blocks import TokenBlocks, check_held_out, load_blocks, save_blocks, separator_id, token_blocks
from kvlatent.data.positions import context_of
from kvlatent.data.sources import read_text
from kvlatent.errors import UserError
from kvlatent.fields import given
from kvlatent.files import check_disk, refuse_existing
from kvlatent.healing.config import HealChanges, HealConfig, HealInputs, settings_for, work_folder
from kvlatent.healing.heal import heal
from kvlatent.healing.streaming import hidden_bytes
from kvlatent.healing.teacher_cache import BYTES as TOP_K_BYTES
from kvlatent.healing.teacher_cache import TeacherCache
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


def heal_checkpoint(
    start: str,
    out: Path,
    inputs: HealInputs,
    changes: HealChanges,
    *,
    resume: bool = False,
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
        device: Where to train; master weights are float32.
        dtype: Dtype of the weights written; `auto` is that of `start`.
        seed: Random seed of the order of the text and of LoRA's start.

    Raises:
        UserError: `out` exists, or the models, the text or the settings can't be used.
        KeyboardInterrupt: Interrupted; the state is in `work_folder(out)`.
    """
    refuse_existing(out)
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
    context = context_of(config, changes.context)
    settings = settings_for(spec.preset, changes, context=context, seed=seed)
    tokenizer = load_tokenizer(start)

    if not 0 < inputs.top_k <= config.vocab_size:
        raise UserError(f"top_k must be between 1 and the vocabulary's {config.vocab_size}; got {inputs.top_k}")

    @lru_cache(maxsize=1)
    def teacher_model() -> PreTrainedModel:
        host = "cpu" if settings.stream_layers else device
        return load_model(name, device=host, dtype=teacher_dtype(device))[0]

    group = processes(pick_device(device))
    block_size = inputs.block_size
    tokens = settings.blocks(block_size, group.num_processes) * block_size
    kept = out.with_name(f".{out.name}.text.safetensors")
    if group.is_main_process and not (resume and kept.is_file()):
        made = read_text(inputs.text, tokenizer, tokens=tokens, block_size=block_size, seed=seed, teacher=teacher_model)
        save_blocks(made, kept)
    try:
        group.wait_for_everyone()
        blocks = load_blocks(kept)
        if set(blocks.sources) != set(inputs.text) or blocks.ids.shape != (tokens // block_size, block_size):
            raise UserError(f"the healing of {out} was begun with other text; use the same, or start without --resume")
        watched = None
        if inputs.held_out:
            watched = token_blocks(
                inputs.held_out, tokenizer, block_size=block_size, tokens=inputs.held_out_tokens, seed=seed
            )
            check_held_out(blocks.fingerprints, watched)
            if len(watched.ids) < group.num_processes:
                raise UserError(f"held-out text needs a block for each of {group.num_processes} processes")
        result = heal_student(
            start, out, teacher=teacher_model(), blocks=blocks, settings=settings, asked=given(changes), resume=resume,
            device=device, dtype=stored_dtype(config, dtype),
            cache=None if inputs.teacher_cache is None else TeacherCache(inputs.teacher_cache, inputs.top_k),
            separator=separator_id(tokenizer) if inputs.separate_documents else None,
            held_out=None if watched is None else watched.ids, track=inputs.track,
        )  # fmt: skip
    except UserError:
        if group.is_main_process and not work_folder(out).exists():  # refused before there was anything to resume
            kept.unlink(missing_ok=True)
        raise
    if group.is_main_process:
        kept.unlink()
    return result


def teacher_dtype(device: str) -> str:
    """What a teacher is healed by in: bfloat16 where the hardware computes in it."""
    return "bfloat16" if multiplies_bfloat16(pick_device(device)) else "float32"


def heal_student(
    start: str,
    out: Path,
    *,
    teacher: PreTrainedModel,
    blocks: TokenBlocks,
    settings: HealConfig,
    asked: Mapping[str, Any],
    resume: bool,
    device: str,
    dtype: torch.dtype,
    cache: TeacherCache | None = None,
    separator: int | None = None,
    held_out: torch.Tensor | None = None,
    track: Sequence[str] = (),
) -> dict[str, Any]:
    """Train the student in folder `start` on ready blocks and write it to `out`.

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
        student, teacher, blocks.ids, work, settings, resume=resume, answers=blocks.answers, separator=separator,
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
        save_checkpoint(student.to(dtype), tokenizer, out, record=record, card=unmeasured_card(record, spec.to_dict()))
        shutil.copyfile(work / "metrics.jsonl", out / "metrics.jsonl")
        for extra in ("adapters", "tracked"):
            if (work / extra).is_dir():
                shutil.copytree(work / extra, out / extra)
    group.wait_for_everyone()
    if group.is_main_process:
        shutil.rmtree(work)
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
    trained = 0
    for layer in student.model.layers:
        trained += sum(p.numel() for p in layer.self_attn.parameters())
        trained += sum(sum(p.shape) for p in layer.mlp.parameters() if p.ndim == 2) * settings.lora_rank
    states = 2 * 3 * 4 * trained
    if not settings.stream_layers:
        return states
    return states + hidden_bytes(settings.stage1_tokens, student.config.hidden_size, teacher.dtype)
