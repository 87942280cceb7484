"""`calibrate`, `plan` and `convert`."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache, reduce
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from kvlatent.compress import budget as budgets
from kvlatent.compress.convert import JOINING, QK_OF, SHARED_LIST, check_request, convert
from kvlatent.compress.statistics import Statistics, calibrate
from kvlatent.data.blocks import TokenBlocks, batch_size_for
from kvlatent.data.positions import context_of
from kvlatent.data.sources import TEACHER_TEXT, read_text
from kvlatent.errors import UserError
from kvlatent.files import check_disk, refuse_existing
from kvlatent.model.card import unmeasured_card
from kvlatent.model.checkpoints import environment, load_model, save_checkpoint
from kvlatent.model.graft import check_teacher, dims_by_layer, head_dim_of, heads_per_latent_of, spec_of
from kvlatent.model.loading import load_config, load_tokenizer, stored_dtype, teacher_name, weight_bytes
from kvlatent.model.offload import OffloadedLayers, open_offloaded
from kvlatent.model.spec import QK, Preset, bytes_per_token

Dims = tuple[int | Sequence[int], int | Sequence[int]]
"""d_qk and d_vo: one number each, or one per layer."""
PLAN_TOKENS = 4096
"""A budget is planned on statistics of this much of the calibration text."""
PROBE_TOKENS = (2048, 4096)
"""How much layers matter is measured on an eighth of the text, within these limits; less is too few documents."""
PIECE = 512
"""Both are taken evenly from all of the text, in pieces of this many tokens, read as if they began a context."""


def calibrate_file(
    model: str,
    out: Path,
    *,
    text: Sequence[str],
    merge: Sequence[Path] = (),
    offload: bool = False,
    tokens: int,
    block_size: int,
    context: int | None,
    heads_per_latent: int | None = None,
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
        context: Positions that the blocks are spread over; None is all that the model has.
        heads_per_latent: KV heads that may be reduced together; None is `modeling.heads_per_latent_of`.
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
    context, together = context_of(config, context), heads_per_latent_of(config, heads_per_latent)
    shards = [_load_statistics(path, config) for path in merge]
    moments = 3 * config.num_attention_heads + 2 * config.num_key_value_heads
    if together > 1:
        moments += config.num_attention_heads * together**2 + config.num_key_value_heads * together
    check_disk(out, config.num_hidden_layers * moments * head_dim_of(config) ** 2 * 8)
    began = time.monotonic()

    @lru_cache(maxsize=1)
    def teacher() -> PreTrainedModel:
        return load_model(model, device=device, dtype=dtype)[0]

    if offload and TEACHER_TEXT in text:
        raise UserError("text from the teacher needs it in memory; sample it without --offload, or give other text")
    if text:
        blocks = read_text(text, tokenizer, tokens=tokens, block_size=block_size, seed=seed, teacher=teacher)
        about = {
            "model": teacher_name(model),
            "text": list(blocks.sources),
            "fingerprints": sorted(blocks.fingerprints),
            "record": environment(),
        }
        opened = open_offloaded(model, device=device, dtype=dtype) if offload else (teacher(), None)
        settings: dict[str, Any] = {"context": context, "heads_per_latent": together}
        shards.append(probed_statistics(opened[0], blocks.ids, about=about, offloaded=opened[1], **settings))
    statistics = reduce(Statistics.merge, shards)
    statistics.save(out)
    told = {key: statistics.about.get(key) for key in ("tokens", "text")}
    return {"out": str(out), **told, "seconds": time.monotonic() - began}


def probed_statistics(
    teacher: PreTrainedModel,
    ids: Int[Tensor, "blocks block_size"],
    *,
    context: int | None,
    heads_per_latent: int | None = None,
    about: dict[str, Any],
    offloaded: OffloadedLayers | None = None,
) -> Statistics:
    """Statistics of the teacher on token blocks, and how much each layer matters."""
    statistics = calibrate(
        teacher, ids, batch_size=batch_size_for(ids.shape[1]), context=context, heads_per_latent=heads_per_latent,
        about=about, offloaded=offloaded,
    )  # fmt: skip
    statistics.probes = budgets.probe(teacher, statistics, _probe_text(ids), offloaded=offloaded)
    return statistics


def _probe_text(ids: Int[Tensor, "blocks block_size"]) -> Int[Tensor, "pieces piece_size"]:
    """What of a calibration text the layers are probed on."""
    least, most = PROBE_TOKENS
    return _pieces(ids, min(max(ids.numel() // 8, least), most))


def _pieces(ids: Int[Tensor, "blocks block_size"], tokens: int) -> Int[Tensor, "pieces piece_size"]:
    """So many tokens of a text, or less."""
    size = min(PIECE, ids.shape[1])
    pieces = ids.unfold(1, size, size).flatten(0, 1)
    return pieces[:: math.ceil(len(pieces) * size / tokens)]


def plan_model(
    model: str,
    budget: float,
    out: Path,
    *,
    heads_per_latent: int | None = None,
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
        heads_per_latent: KV heads that are reduced together, where there are no statistics to say so.
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
        statistics = probed_statistics(teacher, blocks.ids, context=None, heads_per_latent=heads_per_latent, about={})
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
    heads_per_latent: int | None = None,
    stats: Path | None,
    text: Sequence[str],
    tokens: int,
    block_size: int,
    context: int | None,
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
        heads_per_latent: KV heads that are reduced together; None is what the preset does.
        stats: A file of `calibrate_file`: instead of text or, with a budget, what it is spent by.
        text: Calibration text; `paper` takes neither.
        tokens: Of the text.
        block_size: Tokens per block.
        context: Positions that the blocks are spread over; None is all that the model has.
        device: Where to compute; always in float32.
        dtype: Of the weights written; `auto` is that of the teacher's checkpoint.
        seed: Of the order of the text.

    Raises:
        UserError: `out` exists, or the model, the dims, the text or the statistics can't be used.
    """
    refuse_existing(out)
    config, tokenizer = load_config(model), load_tokenizer(model)
    dims = requested_dims(
        config, preset=preset, qk=qk, d_qk=d_qk, d_vo=d_vo, heads_per_latent=heads_per_latent, budget=budget
    )
    context = context_of(config, context)
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
    if (qk or QK_OF[preset]) not in JOINING:
        heads_per_latent = 1  # what None stands for there
    if dims is None:
        assert budget is not None
        dims = planned_dims(teacher(), budget, heads_per_latent=heads_per_latent, blocks=blocks, statistics=statistics)
        statistics = None if text else statistics
    return convert_loaded(
        teacher(), tokenizer, out, name=model, preset=preset, qk=qk, d_qk=dims[0], d_vo=dims[1],
        heads_per_latent=heads_per_latent, blocks=blocks, context=context, statistics=statistics,
        dtype=stored_dtype(config, dtype),
    )  # fmt: skip


def requested_dims(
    config: PreTrainedConfig,
    *,
    preset: Preset,
    qk: QK | None = None,
    d_qk: int | None,
    d_vo: int | None,
    heads_per_latent: int | None = None,
    budget: float | None,
) -> Dims | None:
    """Dims of a request for a student; None if they differ by layer and `planned_dims` has to find them.

    Raises:
        UserError: A request that can't be.
    """
    if (d_qk is None) != (d_vo is None):
        raise UserError("d_qk and d_vo go together; give both, or a budget")
    if (d_qk is None) == (budget is None):
        raise UserError("give either d_qk and d_vo or a budget, one and not both")
    if budget is not None and preset == "best":
        check_teacher(config)
        budgets.total_dims(config, budget)
        if qk in SHARED_LIST:
            raise UserError(f"{qk} has one frequency list, so every layer the same d_qk; give --d-qk and --d-vo")
        whole = head_dim_of(config)
        check_request(config, preset=preset, qk=qk, d_qk=whole, d_vo=whole, heads_per_latent=heads_per_latent or 1)
        return None
    if budget is not None:
        d_qk = d_vo = budgets.uniform_dims(config, budget)
    assert d_qk is not None and d_vo is not None
    check_request(config, preset=preset, qk=qk, d_qk=d_qk, d_vo=d_vo, heads_per_latent=heads_per_latent or 1)
    return d_qk, d_vo


def planned_dims(
    teacher: PreTrainedModel,
    budget: float,
    *,
    heads_per_latent: int | None = None,
    blocks: TokenBlocks | None,
    statistics: Statistics | None,
) -> Dims:
    """Dims layer by layer that spend a budget; without statistics they are taken on pieces of the blocks."""
    if statistics is None:
        assert blocks is not None
        size = batch_size_for(PIECE)
        statistics = calibrate(
            teacher, _pieces(blocks.ids, PLAN_TOKENS), batch_size=size, heads_per_latent=heads_per_latent, about={}
        )
        statistics.probes = budgets.probe(teacher, statistics, _probe_text(blocks.ids))
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
    heads_per_latent: int | None = None,
    blocks: TokenBlocks | None,
    context: int,
    statistics: Statistics | None,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Convert a teacher in memory and write the student to `out`; `name` is how to find the teacher again."""
    check_disk(out, weight_bytes(teacher, dtype) + 50_000_000)
    began = time.monotonic()
    text: dict[str, Any] = {}
    if blocks is not None:
        text = {"ids": blocks.ids, "batch_size": batch_size_for(blocks.ids.shape[1]), "context": context}
    student = convert(
        teacher, preset=preset, qk=qk, d_qk=d_qk, d_vo=d_vo, heads_per_latent=heads_per_latent, statistics=statistics,
        **text,
    )  # fmt: skip
    spec = spec_of(student)
    assert spec is not None
    step: dict[str, Any] = {"verb": "convert", "preset": preset, "qk": qk or QK_OF[preset], "d_qk": d_qk, "d_vo": d_vo}
    step |= {"heads_per_latent": spec.heads_per_latent}
    fingerprints: Sequence[str] = ()
    if blocks is not None:
        step |= {"text": list(blocks.sources), "tokens": blocks.ids.numel(), "block_size": blocks.ids.shape[1]}
        step |= {"context": context}
        fingerprints = sorted(blocks.fingerprints)
    elif statistics is not None:
        step |= {key: statistics.about[key] for key in ("text", "tokens") if key in statistics.about}
        fingerprints = statistics.about.get("fingerprints", ())
    step["seconds"] = time.monotonic() - began
    record = {
        "teacher": teacher_name(name),
        "preset": preset,
        "fingerprints": list(fingerprints),
        "steps": [step | {"record": environment()}],
    }
    save_checkpoint(student.to(dtype), tokenizer, out, record=record, card=unmeasured_card(record, spec.to_dict()))
    kv_heads = teacher.config.num_key_value_heads
    return {
        "out": str(out),
        "layout": spec.layout,
        **{key: value for key, value in step.items() if key != "verb"},
        "cache_bytes_per_token": spec.cache_bytes_per_token(kv_heads, dtype.itemsize),
        "teacher_cache_bytes_per_token": bytes_per_token(*dims_by_layer(teacher.config), kv_heads, dtype.itemsize),
    }
