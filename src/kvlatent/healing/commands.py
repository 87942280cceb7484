"""`heal`."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import PreTrainedModel

from kvlatent.data.blocks import TokenBlocks, check_held_out, load_blocks, save_blocks, separator_id, token_blocks
from kvlatent.data.positions import context_of
from kvlatent.data.sources import read_text
from kvlatent.errors import UserError
from kvlatent.files import check_disk, refuse_existing
from kvlatent.healing.config import HealConfig, Part
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
from kvlatent.model.spec import Origin


def healing_blocks(config: HealConfig, block_size: int, processes: int) -> int:
    """Blocks that both stages take, each stage rounded up to whole steps."""
    per_step = config.batch_size * config.accumulate * processes
    return sum(math.ceil(n / (per_step * block_size)) * per_step for n in (config.stage1_tokens, config.stage2_tokens))


def heal_folder(
    start: str,
    out: Path,
    *,
    text: Sequence[str],
    block_size: int,
    changes: dict[str, Any],
    teacher: str | None,
    resume: bool,
    cache: Path | None,
    top_k: int,
    separate_documents: bool,
    held_out: Sequence[str],
    held_out_tokens: int,
    track: Sequence[str],
    device: str,
    dtype: str,
    seed: int,
) -> dict[str, Any]:
    """Train a student towards its teacher and write the result to a new folder.

    Args:
        start: Folder of the student.
        out: The new folder.
        text: Training text.
        block_size: Tokens per block.
        changes: Fields of `HealConfig` that differ from the preset's defaults.
        teacher: Its teacher; None is the one that `start` was converted from.
        resume: Continue the interrupted healing of `out`.
        cache: Folder for the teacher's likeliest tokens, used in stage 2 instead of the teacher.
        top_k: How many of them.
        separate_documents: Keep documents in a block from seeing each other.
        held_out: Text to measure the perplexity of, every `eval_tokens` of the settings.
        held_out_tokens: Of that text.
        track: Trackers of accelerate, such as `tensorboard`, whose files go into `out`.
        device: Where to train; master weights are float32.
        dtype: Of the weights written; `auto` is that of `start`.
        seed: Of the order of the text and of LoRA's start.

    Raises:
        UserError: `out` exists, or the models, the text or the settings can't be used.
        KeyboardInterrupt: Interrupted; the state is in `work_folder(out)`.
    """
    refuse_existing(out)
    config = load_config(start)
    spec = spec_in(config)
    if spec is None:
        raise UserError(f"{start} is not a converted model; make one with `kvlatent convert`")
    name = teacher or record_of(start).get("teacher")
    if name is None:
        raise UserError(f"{start} has no record of its teacher; name it with --teacher")
    original = load_config(name)
    for field in ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads"):
        if getattr(config, field) != getattr(original, field):
            raise UserError(
                f"{name} is not the teacher of {start}: "
                f"its {field} is {getattr(original, field)}, not {getattr(config, field)}"
            )
    context = context_of(config, changes.get("context"))
    settings = heal_config(spec.preset, {**changes, "context": context}, seed)
    tokenizer = load_tokenizer(start)

    if not 0 < top_k <= config.vocab_size:
        raise UserError(f"top_k must be between 1 and the vocabulary's {config.vocab_size}; got {top_k}")

    @lru_cache(maxsize=1)
    def teacher_model() -> PreTrainedModel:
        host = "cpu" if settings.stream_layers else device
        return load_model(name, device=host, dtype=teacher_dtype(device))[0]

    group = processes(pick_device(device))
    tokens = healing_blocks(settings, block_size, group.num_processes) * block_size
    kept = out.with_name(f".{out.name}.text.safetensors")
    if group.is_main_process and not (resume and kept.is_file()):
        save_blocks(
            read_text(text, tokenizer, tokens=tokens, block_size=block_size, seed=seed, teacher=teacher_model), kept
        )
    try:
        group.wait_for_everyone()
        blocks = load_blocks(kept)
        if set(blocks.sources) != set(text) or blocks.ids.shape != (tokens // block_size, block_size):
            raise UserError(f"the healing of {out} was begun with other text; use the same, or start without --resume")
        watched = None
        if held_out:
            watched = token_blocks(held_out, tokenizer, block_size=block_size, tokens=held_out_tokens, seed=seed)
            check_held_out(blocks.fingerprints, watched)
            if len(watched.ids) < group.num_processes:
                raise UserError(f"held-out text needs a block for each of {group.num_processes} processes")
        result = heal_student(
            start, out, teacher=teacher_model(), blocks=blocks, settings=settings, resume=resume, device=device,
            dtype=stored_dtype(config, dtype), cache=None if cache is None else TeacherCache(cache, top_k),
            separator=separator_id(tokenizer) if separate_documents else None,
            held_out=None if watched is None else watched.ids, track=track,
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


def heal_config(preset: Origin, changes: dict[str, Any], seed: int) -> HealConfig:
    """The settings of a healing: the preset's, with `changes` where they aren't None.

    Raises:
        UserError: A number that can't be.
    """
    settings = HealConfig.for_preset(preset, seed=seed, **changes)
    for field in ("stage1_tokens", "stage2_tokens", "lora_rank"):
        if getattr(settings, field) < 0:
            raise UserError(f"{field} must not be negative; got {getattr(settings, field)}")
    for field in ("batch_size", "accumulate"):
        if getattr(settings, field) < 1:
            raise UserError(f"{field} must be at least 1; got {getattr(settings, field)}")
    if settings.temperature <= 0:
        raise UserError(f"temperature must be above 0; got {settings.temperature}")
    if (unknown := set(settings.train) - set(get_args(Part))) or not settings.train:
        raise UserError(f"train takes {', '.join(get_args(Part))}; got {', '.join(unknown) or 'nothing'}")
    if not 0 < settings.kl_weight < 1:
        raise UserError(f"kl_weight is the KL's share in mix, between 0 and 1; got {settings.kl_weight}")
    if settings.stage1_tokens + settings.stage2_tokens == 0:
        raise UserError("healing needs tokens for stage 1, stage 2 or both; got 0 and 0")
    return settings


def work_folder(out: Path) -> Path:
    """Where the healing that will become `out` keeps its metrics and its resumable state."""
    return out.with_name(f".{out.name}.healing")


def heal_student(
    start: str,
    out: Path,
    *,
    teacher: PreTrainedModel,
    blocks: TokenBlocks,
    settings: HealConfig,
    resume: bool,
    device: str,
    dtype: torch.dtype,
    cache: TeacherCache | None = None,
    separator: int | None = None,
    held_out: torch.Tensor | None = None,
    track: Sequence[str] = (),
) -> dict[str, Any]:
    """Train the student in folder `start` on ready blocks and write it to `out`.

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
