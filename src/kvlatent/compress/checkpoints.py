"""Calibration and conversion of checkpoints on disk: what the commands and recipes call."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial, reduce
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from kvlatent.compress import budget as budgets
from kvlatent.compress.bits import as_codes
from kvlatent.compress.config import CalibrateConfig, ConvertConfig
from kvlatent.compress.convert import convert_as
from kvlatent.compress.methods import PRESETS
from kvlatent.compress.planning import Request, check_source, grouped_heads, method_of, near_of, requested
from kvlatent.compress.statistics import Statistics, calibrate, check_far_tokens
from kvlatent.compress.streamed import TEXT, Stream, file_mark, forget_finished, kept_statistics, work_folder
from kvlatent.data.blocks import TokenBlocks, batch_size_for, load_blocks, save_blocks
from kvlatent.data.positions import context_of
from kvlatent.data.sources import TEACHER_TEXT, read_text
from kvlatent.errors import UserError
from kvlatent.files import check_disk, discard, new_output
from kvlatent.model.card import unmeasured_card
from kvlatent.model.checkpoints import environment, load_model, record_of, save_checkpoint
from kvlatent.model.families import linear_layers
from kvlatent.model.graft import check_teacher, head_dim_of, heads_per_latent_of, spec_of
from kvlatent.model.loading import load_config, load_tokenizer, stored_dtype, teacher_name, weight_bytes
from kvlatent.model.offload import OffloadedLayers, open_offloaded
from kvlatent.model.sizes import whole_token_bytes
from kvlatent.model.window import ALL_FAR, Near

# --- calibrate -------------------------------------------------------------------------------------------------------


def calibrate_checkpoint(
    model: str, out: Path, asked: CalibrateConfig, *, device: str = "auto", dtype: str = "auto", seed: int = 0
) -> dict[str, Any]:
    """Calibrate a teacher on text and write its statistics to one file, together with those of other shards.

    Args:
        model: The teacher.
        out: The file to write.
        asked: The settings.
        device: Where to compute.
        dtype: Of the weights.
        seed: Of the order of the text.

    Raises:
        UserError: `out` exists, or the model, the text or a file can't be used, or there is nothing to write.
    """
    with new_output(out):
        if not (asked.text or asked.merge):
            raise UserError("nothing to calibrate on: give text (--text), or statistics to merge (--merge)")
        check_not_written(asked.text, asked.offload)
        config, tokenizer = load_config(model), load_tokenizer(model)
        check_teacher(config)
        context, grouped = context_of(config, asked.context), heads_per_latent_of(config, asked.heads_per_latent)
        near = near_of("best", PRESETS["best"].default, asked.window, asked.sinks)
        if asked.text:
            check_far_tokens(near, asked.block_size)
        shards = [load_statistics(path, config) for path in asked.merge]
        moments = 3 * config.num_attention_heads + 2 * config.num_key_value_heads
        if grouped > 1:
            moments += config.num_attention_heads * grouped**2 + config.num_key_value_heads * grouped
        check_disk(out, config.num_hidden_layers * moments * head_dim_of(config) ** 2 * 8)
        began = time.monotonic()

        @lru_cache(maxsize=1)
        def teacher() -> PreTrainedModel:
            return load_model(model, device=device, dtype=dtype)[0]

        if asked.text:
            blocks = read_text(
                asked.text, tokenizer, tokens=asked.tokens, block_size=asked.block_size, seed=seed,
                vocab_size=config.vocab_size, teacher=teacher,
            )  # fmt: skip
            about = {
                "model": teacher_name(model),
                "text": list(blocks.sources),
                "fingerprints": sorted(blocks.fingerprints),
                "record": environment(),
            }
            opened = open_offloaded(model, device=device, dtype=dtype) if asked.offload else (teacher(), None)
            settings: dict[str, Any] = {"context": context, "heads_per_latent": grouped, "near": near}
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
    near: Near = ALL_FAR,
    about: dict[str, Any],
    offloaded: OffloadedLayers | None = None,
) -> Statistics:
    """Statistics of the teacher on token blocks, and how much each layer matters."""
    statistics = calibrate(
        teacher, ids, batch_size=batch_size_for(ids.shape[1]), context=context, heads_per_latent=heads_per_latent,
        near=near, about=about, offloaded=offloaded,
    )  # fmt: skip
    statistics.probes = budgets.probe(teacher, statistics, budgets.probe_text(ids), offloaded=offloaded)
    return statistics


def load_statistics(path: Path, config: PreTrainedConfig) -> Statistics:
    """Read statistics of the model that `config` is of.

    Raises:
        UserError: There are none, or they are of another model.
    """
    statistics = Statistics.load(path)
    q, k, head_dim = *(statistics.first.sums[name] for name in ("q", "k")), head_dim_of(config)
    found = len(statistics.layers), len(q), len(k), q.shape[-1]
    without = tuple(index for index, layer in enumerate(statistics.layers) if not layer.sums)
    wanted = config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, head_dim
    if found != wanted or without != linear_layers(config):
        raise UserError(f"{path} holds statistics of another model ({statistics.about.get('model', 'unnamed')})")
    return statistics


# --- convert ---------------------------------------------------------------------------------------------------------


def convert_checkpoint(
    model: str, out: Path, asked: ConvertConfig, *, device: str = "auto", dtype: str = "auto", seed: int = 0
) -> dict[str, Any]:
    """Convert a teacher to a student and write it to a new folder, with the record that healing and evaluation read.

    Args:
        model: The teacher.
        out: The new folder.
        asked: The settings.
        device: Where to compute; always in float32.
        dtype: Of the weights written; `auto` is that of the teacher's checkpoint.
        seed: Of the order of the text.

    Raises:
        UserError: `out` exists, or the model, the dims, the text or the statistics can't be used.
    """
    forget_finished(out)
    with new_output(out):
        check_not_written(asked.text, asked.offload)
        config, tokenizer = load_config(model), load_tokenizer(model)
        check_teacher(config)
        statistics = None if asked.stats is None else load_statistics(asked.stats, config)
        target = target_of(config, asked, statistics)
        written = stored_dtype(config, dtype)

        @lru_cache(maxsize=1)
        def teacher() -> PreTrainedModel:
            return load_model(model, device=device, dtype="float32")[0]

        blocks, kept = None, work_folder(out) / TEXT
        if asked.offload and kept.is_file():  # of a killed conversion, if its settings are the same
            blocks = load_blocks(kept)
        elif asked.text:
            blocks = read_text(
                asked.text, tokenizer, tokens=asked.tokens, block_size=asked.block_size, seed=seed,
                vocab_size=config.vocab_size, teacher=teacher,
            )  # fmt: skip
        settings: dict[str, Any] = {"name": model, "blocks": blocks, "statistics": statistics, "dtype": written}
        if not asked.offload:
            return convert_loaded(teacher(), tokenizer, out, target, **settings)
        opened, layers = open_offloaded(model, device=device, dtype="float32")
        stream = Stream(layers, work_folder(out), written)
        stream.begin(
            {
                "settings": asked.to_dict(),
                "seed": seed,
                "dtype": str(written),
                "statistics": None if asked.stats is None else file_mark(asked.stats),
            }
        )
        try:
            if blocks is not None and not kept.is_file():
                save_blocks(blocks, kept)
            done = convert_loaded(opened, tokenizer, out, target, stream=stream, planning=stream.work, **settings)
        except UserError:
            if not stream.has_work():  # refused before there was anything to go on from
                discard(stream.work, of=out)
            raise
        discard(stream.work, of=out)
        return done


def check_not_written(text: Sequence[str], offload: bool) -> None:
    """Raise `UserError` for text that a teacher would write whose layers come one at a time."""
    if offload and TEACHER_TEXT in text:
        raise UserError("text from the teacher needs it in memory; sample it without --offload, or give other text")


@dataclass(frozen=True, kw_only=True)
class Target:
    """What `ConvertConfig` asks for, checked against the teacher's config."""

    asked: ConvertConfig
    request: Request
    """With all dims, where a budget is yet to be spent on the layers."""
    budgeted: bool
    """Whether dims, and bits, are what a budget pays for."""
    context: int
    """Positions that blocks are spread over."""

    @property
    def coded(self) -> bool:
        """Whether far tokens of the student become codes."""
        bits = self.asked.bits if self.budgeted else self.asked.bits or 16
        return as_codes(bits, self.request.near)


def target_of(config: PreTrainedConfig, asked: ConvertConfig, statistics: Statistics | None = None) -> Target:
    """Check all settings of a conversion, once, before anything is loaded.

    Args:
        config: The teacher's.
        asked: The settings.
        statistics: Those that `asked` names.

    Raises:
        UserError: A request that can't be.
    """
    check_teacher(config)
    if (asked.d_qk is None) != (asked.d_vo is None):
        raise UserError("d_qk and d_vo go together; give both, or a budget")
    if (asked.d_qk is None) == (asked.budget is None):
        raise UserError("give either d_qk and d_vo or a budget, one and not both")
    budgeted, recipe, method = False, PRESETS[asked.preset], method_of(asked.preset, asked.qk)
    window, sinks = asked.window, asked.sinks
    if asked.d_qk is not None and asked.d_vo is not None:
        d_qk, d_vo = asked.d_qk, asked.d_vo
    elif asked.budget is not None and recipe.uniform:
        d_qk = d_vo = budgets.uniform_dims(config, asked.budget)
    else:
        assert asked.budget is not None
        window, sinks = near = near_of(asked.preset, method, asked.window, asked.sinks, statistics)
        grouped = grouped_heads(config, method, asked.heads_per_latent, statistics)
        budgets.check_budget(config, asked.budget, asked.bits, near, grouped)
        budgeted = True
        d_qk = d_vo = head_dim_of(config)
        if method.one_frequency_list:
            raise UserError(
                f"{method.name} has one frequency list, so every layer the same d_qk; give --d-qk and --d-vo"
            )
    request = requested(
        config, preset=asked.preset, qk=asked.qk, d_qk=d_qk, d_vo=d_vo, heads_per_latent=asked.heads_per_latent,
        window=window, sinks=sinks, statistics=statistics,
    )  # fmt: skip
    if not budgeted and asked.bits is not None and as_codes(asked.bits, request.near):
        layers, m, whole = range(config.num_hidden_layers), request.heads_per_latent, request.whole_layers
        k_codes, v_codes = (tuple(() if i in whole else ((m * d, asked.bits),) for i in layers) for d in (d_qk, d_vo))
        request = replace(request, k_codes=k_codes, v_codes=v_codes)
    if not recipe.calibrated and (asked.stats or asked.text):
        raise UserError(f"preset {asked.preset} is not calibrated; leave --text and --stats out")
    check_source(request, given=bool(asked.stats or asked.text))
    if asked.text:
        check_far_tokens(request.near, asked.block_size)
    if asked.stats and asked.text and not budgeted:
        raise UserError("give either text (--text) or statistics (--stats); both only for best with a --budget")
    return Target(asked=asked, request=request, budgeted=budgeted, context=context_of(config, asked.context))


def convert_loaded(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    target: Target,
    *,
    name: str,
    blocks: TokenBlocks | None,
    statistics: Statistics | None = None,
    dtype: torch.dtype,
    stream: Stream | None = None,
    planning: Path | None = None,
) -> dict[str, Any]:
    """Convert a teacher in memory and write the student to `out`.

    Args:
        teacher: The teacher, in float32.
        tokenizer: Its tokenizer.
        out: The new folder.
        target: From `target_of`.
        name: How to find the teacher again.
        blocks: Calibration text.
        statistics: Instead of text or, with a budget, what it is spent by.
        dtype: Of the weights written.
        stream: Where the teacher's layers are, if they aren't in memory.
        planning: Folder that keeps what a budget is spent by, for a later conversion on the same text.
    """
    check_disk(out, weight_bytes(teacher, dtype) + 50_000_000)
    offloaded = None if stream is None else stream.layers
    request = target.request
    if target.budgeted:
        spent_by = statistics
        if spent_by is None:
            assert blocks is not None
            near, grouped = request.near, request.heads_per_latent
            measure = partial(
                budgets.planning_statistics, teacher, blocks.ids, heads_per_latent=grouped, near=near,
                offloaded=offloaded,
            )  # fmt: skip
            spent_by = kept_statistics(planning, f"planning-{near.window}-{near.sinks}-{grouped}", measure)
        assert target.asked.budget is not None
        allocation = budgets.plan(teacher, spent_by, target.asked.budget, bits=target.asked.bits, offloaded=offloaded)
        request = replace(request, **allocation.reduction)
    began = time.monotonic()
    if blocks is None:
        student = convert_as(request, teacher, statistics=statistics, share=True, stream=stream)
    else:
        student = convert_as(
            request, teacher, ids=blocks.ids, batch_size=batch_size_for(blocks.ids.shape[1]), context=target.context,
            share=True, stream=stream,
        )  # fmt: skip
    spec = spec_of(student)
    assert spec is not None
    by_layer = target.budgeted
    step: dict[str, Any] = {
        "verb": "convert",
        "preset": request.preset,
        "qk": request.method.name,
        "d_qk": list(request.d_qk) if by_layer else request.d_qk[0],
        "d_vo": list(request.d_vo) if by_layer else request.d_vo[0],
        "heads_per_latent": request.heads_per_latent,
        "window": request.near.window,
        "sinks": request.near.sinks,
        **({"whole_layers": list(request.whole_layers)} if request.whole_layers else {}),
    }
    fingerprints: Sequence[str] = ()
    if blocks is not None:
        step |= {"text": list(blocks.sources), "tokens": blocks.ids.numel(), "block_size": blocks.ids.shape[1]}
        step |= {"context": target.context}
        fingerprints = sorted(blocks.fingerprints)
    elif statistics is not None:
        step |= {key: statistics.about[key] for key in ("text", "tokens") if key in statistics.about}
        fingerprints = statistics.about.get("fingerprints", ())
    step["seconds"] = time.monotonic() - began
    record = {
        "teacher": teacher_name(name),
        "preset": request.preset,
        "fingerprints": sorted({*fingerprints, *record_of(name).get("fingerprints", ())}),  # the teacher may be ours
        "steps": [step | {"config": target.asked.to_dict(), "record": environment()}],
    }
    shards: Sequence[Path] = ()
    if stream is None:
        student = student.to("cpu", dtype)  # beside the teacher there may be no room for it
    else:
        student.config.dtype, shards = dtype, stream.shards(student)
    card = unmeasured_card(record, spec.to_dict())
    save_checkpoint(student, tokenizer, out, record=record, card=card, shards=shards)
    kv_heads = teacher.config.num_key_value_heads
    return {
        "out": str(out),
        "layout": spec.layout,
        **{key: value for key, value in step.items() if key != "verb"},
        "cache_bytes_per_token": spec.cache_bytes_per_token(kv_heads, dtype.itemsize),
        "teacher_cache_bytes_per_token": whole_token_bytes(teacher.config, dtype.itemsize),
    }
