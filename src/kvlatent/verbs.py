"""What the command line's verbs do, from names and folders to folders; every check that can be early comes early."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import lru_cache, reduce
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import initialization as init

from kvlatent import budget as budgets
from kvlatent.benchmark import benchmark, n_max_of
from kvlatent.calibrate import Statistics, calibrate
from kvlatent.checkpoints import (
    environment,
    load_model,
    locate,
    multiplies_bfloat16,
    pick_device,
    pick_dtype,
    processes,
    record_of,
    save_checkpoint,
)
from kvlatent.convert import QK_OF, SHARED_LIST, check_request, convert
from kvlatent.data import TokenBlocks, check_held_out, load_blocks, save_blocks, separator_id, token_blocks
from kvlatent.errors import UserError
from kvlatent.evaluate import Perplexity, compare, lm_eval_tasks, needle, perplexity
from kvlatent.export.engines import check_gguf, check_stock, diagnose, engine_names, routes
from kvlatent.export.gguf import FileType, export_gguf
from kvlatent.export.stock import export_stock
from kvlatent.families import family_of
from kvlatent.files import check_disk, new_folder, refuse_existing
from kvlatent.heal import heal
from kvlatent.modeling import check_teacher, dims_by_layer, graft, head_dim_of, spec_in, spec_of
from kvlatent.offload import OffloadedLayers, open_offloaded
from kvlatent.report.page import bench_page, write_report
from kvlatent.report.text import model_card
from kvlatent.sample import sample_from_teacher
from kvlatent.serve.launch import Engine, serve
from kvlatent.settings import HealConfig, Part
from kvlatent.spec import QK, LatentSpec, Preset, bytes_per_token
from kvlatent.streaming import hidden_bytes
from kvlatent.teacher_cache import BYTES as TOP_K_BYTES
from kvlatent.teacher_cache import TeacherCache

TEACHER_TEXT = "teacher"
"""The text source that stands for text sampled from the teacher."""
SHORTEST_SAMPLE = 128
"""Where little text is sampled, blocks are packed from texts of at least this many tokens."""
BATCH_SIZE = 4
"""Blocks per forward where nothing is trained."""
PLAN_TOKENS = 4096
"""A budget is planned on this much of the calibration text."""
PROBE_TOKENS = 512
"""How much layers matter is measured on this much text."""
NEEDLE_CONTEXT, NEEDLE_TRIALS = 1024, 20

# --- what a model is, without its weights ----------------------------------------------------------------------------


def load_config(model: str) -> PreTrainedConfig:
    """Read the config of a supported model.

    Raises:
        UserError: Nothing of that name, or not a supported architecture.
    """
    config: PreTrainedConfig = _loaded(model, AutoConfig)
    family_of(config)
    return config


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a model.

    Raises:
        UserError: There is none.
    """
    return _loaded(model, AutoTokenizer)


def _loaded(model: str, kind: Any) -> Any:
    source = locate(model)
    try:
        return kind.from_pretrained(source)
    except Exception as error:  # transformers and the hub raise many kinds
        raise UserError(f"can't load {model}: {' '.join(str(error).split())[:300]}") from None


def describe(model: str) -> dict[str, Any]:
    """Family, dims, layout, engines, size and cache bytes per token of a model, from its config alone."""
    config = load_config(model)
    spec = spec_in(config)
    with torch.device("meta"), init.no_init_weights():
        shape = AutoModelForCausalLM.from_config(config)
        shape.tie_weights()
    d_qk, d_vo = dims_by_layer(config)
    about: dict[str, Any] = {
        "model": model,
        "family": family_of(config).name,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "q_heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": head_dim_of(config),
        "d_qk": list(d_qk),
        "d_vo": list(d_vo),
        "layout": "stock" if spec is None else spec.layout,
        "frequencies": head_dim_of(config) // 2 if spec is None else len(spec.inv_freq),
        "parameters": shape.num_parameters(),
        "positions": config.max_position_embeddings,
        "engines": engine_names(config),
        "cache_bytes_per_token": {
            name: bytes_per_token(d_qk, d_vo, config.num_key_value_heads, size)
            for name, size in (("float32", 4), ("bfloat16", 2))
        },
    }
    if spec is not None:
        about |= {"preset": spec.preset, "teacher": record_of(model).get("teacher")}
    return about


def _teacher_name(model: str) -> str:
    """`model` such that it means the same from any working directory."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.exists() else model


def stored_dtype(config: PreTrainedConfig, dtype: str) -> torch.dtype:
    """The dtype that weights are written in: as asked, or as the model read has them."""
    return (config.dtype or torch.float32) if dtype == "auto" else pick_dtype(dtype, torch.device("cpu"))


# --- text ------------------------------------------------------------------------------------------------------------


def read_text(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    block_size: int,
    seed: int,
    teacher: Callable[[], PreTrainedModel] | None = None,
) -> TokenBlocks:
    """Token blocks of the sources in equal shares; `teacher` among them is text that `teacher()` writes.

    Named more than once, `teacher` has as many shares.

    Raises:
        UserError: As `data.token_blocks`.
    """
    others = [source for source in sources if source != TEACHER_TEXT]
    if teacher is None or len(others) == len(sources):
        return token_blocks(sources, tokenizer, block_size=block_size, tokens=tokens, seed=seed)
    shares = len(sources) - len(others)
    share = max(1, tokens * shares // len(sources) // block_size) * block_size
    length = block_size
    while length > SHORTEST_SAMPLE and length % 2 == 0 and share // length < 64:  # else few rows decode slowly
        length //= 2
    written = sample_from_teacher(teacher(), tokenizer, tokens=share, block_size=length, seed=seed)
    written = replace(written, ids=written.ids.view(-1, block_size))
    if not others:
        return written
    read = token_blocks(others, tokenizer, block_size=block_size, tokens=tokens - written.ids.numel(), seed=seed)
    ids = torch.cat((written.ids, read.ids))
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    answers = None
    if read.answers is not None:
        answers = torch.cat((torch.ones_like(written.ids, dtype=torch.bool), read.answers))[order]
    return TokenBlocks(
        ids=ids[order],
        answers=answers,
        bytes=written.bytes + read.bytes,
        sources=tuple(dict.fromkeys(sources)),
        fingerprints=written.fingerprints | read.fingerprints,
    )


# --- disk ------------------------------------------------------------------------------------------------------------


def _weight_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    return sum(p.numel() for p in model.parameters()) * dtype.itemsize


# --- calibrate, convert, heal ----------------------------------------------------------------------------------------


def calibrate_file(
    model: str,
    out: Path,
    *,
    text: Sequence[str],
    merge: Sequence[Path] = (),
    offload: bool = False,
    tokens: int,
    block_size: int,
    device: str,
    dtype: str,
    seed: int,
) -> dict[str, Any]:
    """Calibrate a teacher on text and write its statistics to one file, together with those of other shards.

    Args:
        model: The teacher.
        out: The file to write.
        text: Calibration text; may be none where `merge` names files.
        merge: Files of earlier calls on other text.
        offload: Keep the layers in their files and load one at a time.
        tokens: Of the text.
        block_size: Tokens per block.
        device: Where to compute.
        dtype: Of the weights.
        seed: Of the order of the text.

    Raises:
        UserError: `out` exists, or the model, the text or a file can't be used, or there is nothing to write.
    """
    refuse_existing(out)
    if not (text or merge):
        raise UserError("nothing to calibrate on: give text (--text), or statistics to merge (--merge)")
    config, tokenizer = load_config(model), load_tokenizer(model)
    check_teacher(config)
    shards = [_load_statistics(path, config) for path in merge]
    whole_heads = 3 * config.num_attention_heads + 2 * config.num_key_value_heads
    check_disk(out, config.num_hidden_layers * whole_heads * head_dim_of(config) ** 2 * 8)
    began = time.monotonic()

    @lru_cache(maxsize=1)
    def teacher() -> PreTrainedModel:
        return load_model(model, device=device, dtype=dtype)[0]

    if offload and TEACHER_TEXT in text:
        raise UserError("text from the teacher needs it in memory; sample it without --offload, or give other text")
    if text:
        blocks = read_text(text, tokenizer, tokens=tokens, block_size=block_size, seed=seed, teacher=teacher)
        about = {
            "model": _teacher_name(model),
            "text": list(blocks.sources),
            "fingerprints": sorted(blocks.fingerprints),
            "record": environment(),
        }
        opened = open_offloaded(model, device=device, dtype=dtype) if offload else (teacher(), None)
        shards.append(probed_statistics(opened[0], blocks.ids, about=about, offloaded=opened[1]))
    statistics = reduce(Statistics.merge, shards)
    statistics.save(out)
    told = {key: statistics.about.get(key) for key in ("tokens", "text")}
    return {"out": str(out), **told, "seconds": time.monotonic() - began}


def probed_statistics(
    teacher: PreTrainedModel,
    ids: Int[Tensor, "blocks block_size"],
    *,
    about: dict[str, Any],
    offloaded: OffloadedLayers | None = None,
) -> Statistics:
    """Statistics of the teacher on token blocks, and how much each layer matters, measured on the first few."""
    statistics = calibrate(teacher, ids, batch_size=BATCH_SIZE, about=about, offloaded=offloaded)
    first = ids[: max(1, PROBE_TOKENS // ids.shape[1])]
    statistics.probes = budgets.probe(teacher, statistics, first, offloaded=offloaded)
    return statistics


def plan_model(
    model: str,
    budget: float,
    out: Path,
    *,
    stats: Path | None,
    text: Sequence[str],
    tokens: int,
    block_size: int,
    device: str,
    dtype: str,
    seed: int,
) -> dict[str, Any]:
    """Say how a budget would be spent on a model's layers, and draw it; nothing is converted.

    Args:
        model: The teacher.
        budget: Share of the cache bytes kept.
        out: The figure to write; .png, .svg or .pdf.
        stats: A file of `calibrate_file`; without it, statistics are taken on text.
        text: Calibration text.
        tokens: Of the text.
        block_size: Tokens per block.
        device: Where to compute.
        dtype: Of the weights.
        seed: Of the order of the text.

    Raises:
        UserError: `out` exists, or the model, the budget, the text or the statistics can't be used.
    """
    refuse_existing(out)
    config, tokenizer = load_config(model), load_tokenizer(model)
    check_teacher(config)
    budgets.total_dims(config, budget)
    statistics = None if stats is None else _load_statistics(stats, config)
    teacher = load_model(model, device=device, dtype=dtype)[0]
    if statistics is None:
        blocks = read_text(text, tokenizer, tokens=tokens, block_size=block_size, seed=seed, teacher=lambda: teacher)
        statistics = probed_statistics(teacher, blocks.ids, about={})
    allocation = budgets.plan(teacher, statistics, budget)
    kv_heads, size = config.num_key_value_heads, stored_dtype(config, "auto").itemsize
    budgets.draw(allocation, out, title=f"{model}: {budget:.4g} of the cache", head_dim=head_dim_of(config))
    return {
        "model": model,
        "budget": budget,
        **asdict(allocation),
        "expected_loss": allocation.expected_loss,
        "cache_bytes_per_token": bytes_per_token(allocation.d_qk, allocation.d_vo, kv_heads, size),
        "teacher_cache_bytes_per_token": bytes_per_token(*dims_by_layer(config), kv_heads, size),
        "out": str(out),
    }


def convert_folder(
    model: str,
    out: Path,
    *,
    preset: Preset,
    qk: QK | None = None,
    d_qk: int | None,
    d_vo: int | None,
    budget: float | None = None,
    stats: Path | None,
    text: Sequence[str],
    tokens: int,
    block_size: int,
    device: str,
    dtype: str,
    seed: int,
) -> dict[str, Any]:
    """Convert a teacher to a student and write it to a new folder, with the record that healing and evaluation read.

    Args:
        model: The teacher.
        out: The new folder.
        preset: The recipe.
        qk: How queries and keys are reduced; None is what the preset does.
        d_qk: Query/key dims per head.
        d_vo: Value/output dims per head.
        budget: Instead of dims: the share of the cache bytes to keep. `best` spends it as `plan_model` shows.
        stats: A file of `calibrate_file`: instead of text or, with a budget, what it is spent by.
        text: Calibration text; `paper` takes neither.
        tokens: Of the text.
        block_size: Tokens per block.
        device: Where to compute; always in float32.
        dtype: Of the weights written; `auto` is that of the teacher's checkpoint.
        seed: Of the order of the text.

    Raises:
        UserError: `out` exists, or the model, the dims, the text or the statistics can't be used.
    """
    refuse_existing(out)
    config, tokenizer = load_config(model), load_tokenizer(model)
    dims = requested_dims(config, preset=preset, qk=qk, d_qk=d_qk, d_vo=d_vo, budget=budget)
    if preset == "paper" and (stats or text):
        raise UserError("preset paper is not calibrated; leave --text and --stats out")
    if preset != "paper" and not (stats or text):
        raise UserError(f"preset {preset} is calibrated: give text (--text) or statistics (--stats)")
    if preset != "paper" and stats and text and dims is not None:
        raise UserError("give either text (--text) or statistics (--stats); both only for best with a --budget")
    statistics = None if stats is None else _load_statistics(stats, config)

    @lru_cache(maxsize=1)
    def teacher() -> PreTrainedModel:
        return load_model(model, device=device, dtype="float32")[0]

    blocks = None
    if text:
        blocks = read_text(text, tokenizer, tokens=tokens, block_size=block_size, seed=seed, teacher=teacher)
    if dims is None:
        assert budget is not None
        dims = planned_dims(teacher(), budget, blocks=blocks, statistics=statistics)
        statistics = None if text else statistics
    return convert_loaded(
        teacher(), tokenizer, out, name=model, preset=preset, qk=qk, d_qk=dims[0], d_vo=dims[1],
        blocks=blocks, statistics=statistics, dtype=stored_dtype(config, dtype),
    )  # fmt: skip


def requested_dims(
    config: PreTrainedConfig,
    *,
    preset: Preset,
    qk: QK | None = None,
    d_qk: int | None,
    d_vo: int | None,
    budget: float | None,
) -> tuple[int, int] | None:
    """Dims of a request for a student; None if they differ by layer and `planned_dims` has to find them.

    Raises:
        UserError: A request that can't be.
    """
    if (d_qk is None) != (d_vo is None) or (d_qk is None) == (budget is None):
        raise UserError("give either d_qk and d_vo, or a budget")
    if budget is not None and preset == "best":
        check_teacher(config)
        budgets.total_dims(config, budget)
        if qk in SHARED_LIST:
            raise UserError(f"{qk} has one frequency list, so every layer the same d_qk; give --d-qk and --d-vo")
        return None
    if budget is not None:
        d_qk = d_vo = budgets.uniform_dims(config, budget)
    assert d_qk is not None and d_vo is not None
    check_request(config, preset=preset, qk=qk, d_qk=d_qk, d_vo=d_vo)
    return d_qk, d_vo


def planned_dims(
    teacher: PreTrainedModel, budget: float, *, blocks: TokenBlocks | None, statistics: Statistics | None
) -> tuple[Sequence[int], Sequence[int]]:
    """Dims layer by layer that spend a budget; without statistics they are taken on the first of the blocks."""
    if statistics is None:
        assert blocks is not None
        ids = blocks.ids[: max(1, PLAN_TOKENS // blocks.ids.shape[1])]
        statistics = probed_statistics(teacher, ids, about={})
    allocation = budgets.plan(teacher, statistics, budget)
    return allocation.d_qk, allocation.d_vo


def _load_statistics(path: Path, config: PreTrainedConfig) -> Statistics:
    statistics = Statistics.load(path)
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    head_dim = head_dim_of(config)
    fits = len(statistics.layers) == config.num_hidden_layers and all(
        layer.sums[name].shape == (count, head_dim, head_dim)
        for layer in statistics.layers
        for name, count in heads.items()
    )
    if not fits:
        raise UserError(f"{path} holds statistics of another model ({statistics.about.get('model', 'unnamed')})")
    return statistics


def convert_loaded(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    name: str,
    preset: Preset,
    qk: QK | None = None,
    d_qk: int | Sequence[int],
    d_vo: int | Sequence[int],
    blocks: TokenBlocks | None,
    statistics: Statistics | None,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Convert a teacher in memory and write the student to `out`; `name` is how to find the teacher again."""
    check_disk(out, _weight_bytes(teacher, dtype) + 50_000_000)
    began = time.monotonic()
    ids = None if blocks is None else blocks.ids
    student = convert(
        teacher, preset=preset, qk=qk, d_qk=d_qk, d_vo=d_vo, statistics=statistics, ids=ids, batch_size=BATCH_SIZE
    )
    step: dict[str, Any] = {"verb": "convert", "preset": preset, "qk": qk or QK_OF[preset], "d_qk": d_qk, "d_vo": d_vo}
    fingerprints: Sequence[str] = ()
    if blocks is not None:
        step |= {"text": list(blocks.sources), "tokens": blocks.ids.numel(), "block_size": blocks.ids.shape[1]}
        fingerprints = sorted(blocks.fingerprints)
    elif statistics is not None:
        step |= {key: statistics.about[key] for key in ("text", "tokens") if key in statistics.about}
        fingerprints = statistics.about.get("fingerprints", ())
    step["seconds"] = time.monotonic() - began
    record = {
        "teacher": _teacher_name(name),
        "preset": preset,
        "fingerprints": list(fingerprints),
        "steps": [step | {"record": environment()}],
    }
    spec = spec_of(student)
    assert spec is not None
    save_checkpoint(student.to(dtype), tokenizer, out, record=record, card=_card(record, spec))
    kv_heads = teacher.config.num_key_value_heads
    return {
        "out": str(out),
        "layout": spec.layout,
        **{key: value for key, value in step.items() if key != "verb"},
        "cache_bytes_per_token": spec.cache_bytes_per_token(kv_heads, dtype.itemsize),
        "teacher_cache_bytes_per_token": bytes_per_token(*dims_by_layer(teacher.config), kv_heads, dtype.itemsize),
    }


def _card(record: dict[str, Any], spec: LatentSpec) -> str:
    """The model card of a student that nothing was measured on yet."""
    steps = {step["verb"]: {k: v for k, v in step.items() if k not in ("verb", "record")} for step in record["steps"]}
    results = {
        "model": record["teacher"],
        "record": record["steps"][-1]["record"],
        "recipe": steps,
        "seconds": {verb: step["seconds"] for verb, step in steps.items()},
    }
    return model_card(results, spec.to_dict())


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
    settings = heal_config(spec.preset, changes, seed)
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


def heal_config(preset: Preset, changes: dict[str, Any], seed: int) -> HealConfig:
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
    check_disk(out, _weight_bytes(student, dtype) + _work_bytes(student, teacher, settings) + 50_000_000)
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
        save_checkpoint(student.to(dtype), tokenizer, out, record=record, card=_card(record, spec))
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


# --- evaluate, bench, generate ---------------------------------------------------------------------------------------


def evaluate_models(
    model: str,
    *,
    against: str | None,
    text: Sequence[str],
    tokens: int,
    block_size: int,
    with_needle: bool,
    tasks: Sequence[str],
    device: str,
    dtype: str,
    seed: int,
) -> dict[str, Any]:
    """Perplexity and bits per byte of a model on held-out text, a needle test and lm-eval tasks, beside another's.

    Raises:
        UserError: The text was used for calibration or training, nothing was asked for, or a model can't be used.
    """
    if not (text or with_needle or tasks):
        raise UserError("nothing to evaluate on: give --text, --needle or --tasks")
    names = [model] if against is None else [model, against]
    configs = [load_config(name) for name in names]
    tokenizer = load_tokenizer(model)
    if against is not None and load_tokenizer(against).get_vocab() != tokenizer.get_vocab():
        raise UserError(f"{model} and {against} have different tokenizers; perplexities can't be compared")
    blocks = None
    if text:
        blocks = read_text(text, tokenizer, tokens=tokens, block_size=block_size, seed=seed)
        for name in names:
            check_held_out(record_of(name).get("fingerprints", ()), blocks)
    context = min(NEEDLE_CONTEXT, *(config.max_position_embeddings for config in configs))
    scores: list[Perplexity] = []
    entries: list[dict[str, Any]] = []
    for name in names:
        loaded, _ = load_model(name, device=device, dtype=dtype)
        entry: dict[str, Any] = {"model": name}
        if blocks is not None:
            scores.append(perplexity(loaded, blocks.ids, text_bytes=blocks.bytes, batch_size=BATCH_SIZE))
            entry |= scores_of(scores[-1])
        if with_needle:
            entry["needle"] = needle(loaded, tokenizer, context=context, trials=NEEDLE_TRIALS, seed=seed)
        if tasks:
            found = lm_eval_tasks(loaded, tokenizer, tasks, limit=None, include_path=None)
            entry["tasks"] = {task: score.metrics for task, score in found.items()}
        entries.append(entry)
        del loaded
    result = entries[0]
    if blocks is not None:
        result |= {"text": list(blocks.sources), "tokens": blocks.ids.numel(), "bytes": blocks.bytes}
    if against is not None:
        result["against"] = entries[1]
        if scores:
            ratio = compare(scores[1], scores[0])
            result |= {"perplexity_ratio": ratio.perplexity_ratio, "perplexity_ratio_stderr": ratio.stderr}
    return result


def scores_of(score: Perplexity) -> dict[str, Any]:
    """What results say of a perplexity."""
    return {
        "perplexity": score.perplexity,
        "perplexity_stderr": score.perplexity_stderr,
        "bits_per_byte": score.bits_per_byte,
    }


def benchmark_models(
    model: str,
    *,
    against: str | None,
    contexts: Sequence[int],
    batches: Sequence[int],
    dtypes: Sequence[str],
    new_tokens: int,
    repeats: int,
    synthetic: bool,
    own: bool,
    memory: float | None,
    out: Path | None,
    device: str,
    seed: int,
) -> dict[str, Any]:
    """Cache bytes, TTFT, TPOT, throughput and roofline of a model, over a grid, in turns with another's.

    Returns:
        The first cell's row, the other model's under `against`, all cells under `rows`, and under `n_max` the longest
        contexts that fit in `memory` GiB.

    Raises:
        UserError: A size is out of range, a model can't be used, or `own` asks for a model that can't be grafted.
    """
    if model == against:
        raise UserError(f"--against must be another model; got {model} twice")
    if own and against is None:
        raise UserError("--own measures the model of --against on our path; give --against")
    if not (contexts and batches):
        raise UserError("give at least one --context and one --batch")
    if memory is not None and memory <= 0:
        raise UserError(f"--memory must be positive; got {memory}")
    names = [model] if against is None else [model, against]
    for name in names:
        load_config(name)
    rows: list[dict[str, Any]] = []
    n_max: list[dict[str, Any]] = []
    with new_folder(out) if out is not None else nullcontext() as folder:
        for dtype in dtypes:
            models = {name: load_model(name, device=device, dtype=dtype)[0] for name in names}
            if own and against is not None:
                models[f"{against} (our path)"] = graft(models[against], share=True)
            for batch in batches:
                for context in contexts:
                    sizes = {"context": context, "batch": batch, "new_tokens": new_tokens, "repeats": repeats}
                    rows += benchmark(models, **sizes, synthetic=synthetic, seed=seed)
                if memory is not None:
                    n_max += [
                        {"model": name, "batch": batch, **n_max_of(loaded, memory=int(memory * 2**30), batch=batch)}
                        for name, loaded in models.items()
                    ]
            del models
        result = rows[0] | ({} if against is None else {"against": rows[1]}) | {"rows": rows}
        if n_max:
            result |= {"memory_gib": memory, "n_max": n_max}
        if folder is not None:
            (folder / "bench.json").write_text(json.dumps(result, indent=2))
            (folder / "bench.html").write_text(bench_page(result))
            result |= {"out": str(out)}
    return result


def generate_text(
    model: str, prompt: str, *, max_new_tokens: int, chat: bool, device: str, dtype: str, seed: int
) -> dict[str, Any]:
    """Let a model continue a prompt greedily.

    Raises:
        UserError: The prompt is empty, the model can't be used, or it has no chat template where one is asked for.
    """
    if not prompt:
        raise UserError("the prompt is empty; give at least a word")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
    load_config(model)
    loaded, tokenizer = load_model(model, device=device, dtype=dtype)
    if chat and not tokenizer.chat_template:
        raise UserError(f"{model} has no chat template; leave --chat out")
    torch.manual_seed(seed)
    began = time.monotonic()
    completion, new_tokens = complete(loaded, tokenizer, prompt, max_new_tokens, chat=chat)
    seconds = time.monotonic() - began
    return {"model": model, "prompt": prompt, "completion": completion, "new_tokens": new_tokens, "seconds": seconds}


def serve_model(
    model: str, *, host: str, port: int, engine: Literal["auto"] | Engine, context: int | None, dtype: str, seed: int
) -> dict[str, Any]:
    """Serve a model to OpenAI clients until interrupted.

    Raises:
        UserError: The model can't be used or has fewer positions than `context`, the engine is not installed, can't run
            the model or failed, or the port is in use.
    """
    config = load_config(model)
    load_tokenizer(model)
    positions = config.max_position_embeddings
    if context is not None and not 1 <= context <= positions:
        raise UserError(f"the model has {positions} positions, so context is 1 to {positions} tokens; got {context}")
    name = Path(model).expanduser().resolve().name if Path(model).expanduser().exists() else model
    return serve(
        locate(model), name=name, host=host, port=port, engine=engine, dtype=dtype, context=context, seed=seed,
        announce=lambda line: print(f"{line}; stop with ^C", file=sys.stderr, flush=True),
    )  # fmt: skip


def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int, *, chat: bool = False
) -> tuple[str, int]:
    """Return the greedy continuation as text, and its number of tokens."""
    if chat:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    ids, mask = inputs["input_ids"].to(model.device), inputs["attention_mask"].to(model.device)
    plain = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}  # the last three only when sampling
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    output = model.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=pad, **plain)
    new = output[0, ids.shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True), len(new)


def report_runs(runs: Sequence[Path], out: Path | None) -> dict[str, Any]:
    """Write one page about run folders, into the first of them unless `out` says where."""
    if not runs:
        raise UserError("no run folder given; expected at least one folder with results.json")
    return {"out": str(write_report(runs, out or runs[0] / "report.html")), "runs": [str(run) for run in runs]}


# --- engines ---------------------------------------------------------------------------------------------------------


def export_model(
    model: str, out: Path, *, to: str, file_type: FileType | None, device: str, dtype: str, seed: int
) -> dict[str, Any]:
    """Write a model in a form that engines without kvlatent read.

    Args:
        model: A converted model; for gguf also a stock one.
        out: The new folder (stock) or file (gguf).
        to: `stock` or `gguf`.
        file_type: Of a GGUF file's matrices; None is `f16`.
        device: Ignored; nothing is computed.
        dtype: Of the weights read, and for stock written; `auto` is the checkpoint's.
        seed: Ignored; nothing is random.

    Raises:
        UserError: `out` exists, the form can't hold the model, or the model can't be used.
    """
    if to == "vllm":
        raise UserError(
            "vLLM needs no export: with kvlatent beside it, it serves the folder as it is (kvlatent serve); "
            "for a vLLM without kvlatent take --to stock"
        )
    refuse_existing(out)
    config = load_config(model)
    if to == "stock" and file_type is not None:
        raise UserError("--type is for --to gguf; the dtype of a stock checkpoint is set with --dtype")
    (check_stock if to == "stock" else check_gguf)(config)
    kind = stored_dtype(config, dtype)
    loaded, tokenizer = load_model(model, device="cpu", dtype=str(kind).removeprefix("torch."))
    route = next(route for route in routes(config) if route.form == to)
    if to == "gguf":
        file_type = file_type or "f16"
        export_gguf(loaded, tokenizer, out, file_type=file_type)
    else:
        record = {"teacher": None} | record_of(model)
        step = {"verb": "export", "to": to, "record": environment()}
        export_stock(loaded, tokenizer, out, record=record | {"steps": [*record.get("steps", ()), step]})
    whole = (head_dim_of(config),) * config.num_hidden_layers
    sizes = config.num_key_value_heads, kind.itemsize if to == "stock" else 2  # llama.cpp caches float16
    return {
        "out": str(out),
        "to": to,
        **({"type": file_type} if to == "gguf" else {}),
        "cache_bytes_per_token": route.cache_bytes_per_token(*sizes),
        "student_cache_bytes_per_token": bytes_per_token(*dims_by_layer(config), *sizes),
        "teacher_cache_bytes_per_token": bytes_per_token(whole, whole, *sizes),
        "note": route.note,
    }


def diagnose_model(model: str) -> dict[str, Any]:
    """Which engines run a model, here and elsewhere, with what cache, and why not."""
    return {"model": model, "engines": diagnose(load_config(model))}
