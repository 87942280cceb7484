"""What a budget would be spent on, shown before anything is converted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from kvlatent.compress import budget as budgets
from kvlatent.compress.bits import as_codes, bits_of_window
from kvlatent.compress.checkpoints import load_statistics
from kvlatent.compress.config import PlanConfig
from kvlatent.compress.methods import PRESETS
from kvlatent.compress.planning import grouped_heads, near_of
from kvlatent.compress.statistics import check_far_tokens
from kvlatent.data.sources import read_text
from kvlatent.errors import UserError, needs
from kvlatent.fields import Fit
from kvlatent.files import new_output
from kvlatent.kernels.layout import BITS, Layout
from kvlatent.model.card import window_text
from kvlatent.model.checkpoints import load_model
from kvlatent.model.graft import check_teacher, head_dim_of
from kvlatent.model.loading import bare_model, is_bare, load_config, load_tokenizer, stored_dtype, told_dtype
from kvlatent.model.sizes import (
    cache_parts,
    contexts_told,
    counted_context,
    layer_caches,
    left_whole,
    most_tokens,
    whole_token_bytes,
)
from kvlatent.model.spec import near_bytes
from kvlatent.model.window import Near


def plan_checkpoint(
    model: str, out: Path, asked: PlanConfig, *, device: str = "auto", dtype: str = "auto", seed: int = 0
) -> dict[str, Any]:
    """Say how a budget would be spent on a model's layers, and draw it; nothing is converted.

    Of a config without weights only the bytes are said, and nothing is drawn.

    Args:
        model: The teacher.
        out: The figure to write; .png, .svg or .pdf.
        asked: The settings.
        device: Where to compute; in float32, as conversion does.
        dtype: Of the student whose cache bytes are told; `auto` is that of the teacher's checkpoint.
        seed: Of the order of the text.

    Raises:
        UserError: `out` exists, or the model, the budget, the text or the statistics can't be used.
    """
    if is_bare(model):
        return _bytes_alone(model, asked, dtype=dtype)
    with needs("report"):
        from kvlatent.compress.figure import check_ending, draw

    check_ending(out)
    with new_output(out):
        config, tokenizer = load_config(model), load_tokenizer(model)
        check_teacher(config)
        statistics = None if asked.stats is None else load_statistics(asked.stats, config)
        grouped = grouped_heads(config, PRESETS["best"].default, asked.heads_per_latent, statistics)
        near = near_of("best", PRESETS["best"].default, asked.window, asked.sinks, statistics)
        budgets.check_budget(config, asked.budget, asked.bits, near, grouped)
        if statistics is None:
            check_far_tokens(near, asked.block_size)
        teacher = load_model(model, device=device, dtype="float32")[0]
        if statistics is None:
            blocks = read_text(
                asked.text, tokenizer, tokens=asked.tokens, block_size=asked.block_size, seed=seed,
                vocab_size=config.vocab_size, teacher=lambda: teacher,
            )  # fmt: skip
            statistics = budgets.planning_statistics(teacher, blocks.ids, heads_per_latent=grouped, near=near)
        allocation = budgets.plan(teacher, statistics, asked.budget, bits=asked.bits)
        size = stored_dtype(config, dtype).itemsize
        title = f"{model}: {asked.budget:.4g} of the cache"
        if near.window:
            title += f" of {counted_context(config):,} tokens, {window_text(*near, allocation.window_bits)}"
        draw(allocation, out, title=title, head_dim=head_dim_of(config))
        of_token = allocation.token_bytes(config.num_key_value_heads, grouped, size)
        told = _bytes_told(
            config, near, allocation.window_bits, of_token, asked.fit, element_size=size, grouped=grouped, model=model
        )
        return {
            "model": model,
            "budget": asked.budget,
            **asdict(allocation),
            "k_bits": allocation.bits[0],
            "v_bits": allocation.bits[1],
            "expected_loss": allocation.expected_loss,
            **told,
            "out": str(out),
        }


def _bytes_alone(model: str, asked: PlanConfig, *, dtype: str) -> dict[str, Any]:
    """What a budget pays for of a config without weights: bytes, and no word on what is lost."""
    if asked.stats is not None:
        raise UserError(f"{model} is a config alone, and statistics say nothing without the weights; leave --stats out")
    config, method = load_config(model), PRESETS["best"].default
    check_teacher(config)
    grouped = grouped_heads(config, method, asked.heads_per_latent)
    near = near_of("best", method, asked.window, asked.sinks)
    budgets.check_budget(config, asked.budget, asked.bits, near, grouped)
    near_bits = bits_of_window(config, asked.budget, asked.bits, near)
    size = told_dtype(config, dtype).itemsize
    share = budgets.far_share(config, asked.budget, near, near_bits)
    number = size
    if as_codes(asked.bits, near):  # which are as long in every dtype, and no longer than all dims make them
        number, width = 2, grouped * head_dim_of(config)
        share = min(share, Layout(((width, asked.bits or max(BITS)),)).row_bytes / (2 * width))
    of_token = [(share * layer.whole / 2,) * 2 for layer in layer_caches(config, number)]
    told = _bytes_told(config, near, near_bits, of_token, asked.fit, element_size=size, grouped=grouped, model=model)
    for row in told["cache"]:
        del row["keys"], row["values"]  # it is the weights that say how these share it
    return {"model": model, "budget": asked.budget, "whole_layers": left_whole(config), **told, "out": None}


def _bytes_told(
    config: PreTrainedConfig, near: Near, near_bits: int, of_token: Sequence[tuple[float, float]], fit: Fit, *,
    element_size: int, grouped: int, model: str,
) -> dict[str, Any]:  # fmt: skip
    """Bytes of a student's cache beside the teacher's, at contexts, and the longest contexts that fit beside weights.

    Args:
        config: The teacher's.
        near: Tokens met whole.
        near_bits: Bits of their numbers.
        of_token: Bytes of a far token's key and value, by layer.
        fit: Which contexts, and what memory.
        element_size: Bytes per number.
        grouped: KV heads per latent.
        model: The teacher's name.
    """
    context, whole = counted_context(config), left_whole(config)
    teacher = layer_caches(config, element_size)
    of_near = near_bytes(head_dim_of(config), near_bits, config.num_key_value_heads, element_size)
    student = [
        layer if index in whole else layer._replace(near=near, whole=of_near, far=far)
        for index, (layer, far) in enumerate(zip(teacher, of_token, strict=True))
    ]
    contexts = fit.context or contexts_told(config)
    told: dict[str, Any] = {
        "window": near.window,
        "sinks": near.sinks,
        "window_bits": near_bits,
        "context": context,
        "cache_bytes_per_token": round(sum(sum(layer.far) for layer in student)),
        "teacher_cache_bytes_per_token": whole_token_bytes(config, element_size),
        "cache_bytes": cache_parts(student, context)["bytes"],
        "teacher_cache_bytes": cache_parts(teacher, context)["bytes"],
        "window_bytes": sum(layer.held(context)[0] * layer.whole for layer in student),
        "whole_layers_bytes": cache_parts([student[index] for index in whole], context)["bytes"] if whole else 0,
        "cache": [cache_parts(student, tokens) for tokens in contexts],
        "teacher_cache": [cache_parts(teacher, tokens) for tokens in contexts],
    }
    if fit.memory is not None:
        weights = bare_model(config, model).num_parameters() * element_size
        maps = _most_map_numbers(config, grouped) * (len(student) - len(whole)) * element_size
        told |= {"memory_gib": fit.memory, "weight_bytes": weights, "student_weight_bytes": weights + maps}
        told["n_max"] = [
            {"batch": batch} | {
                name: most_tokens(layers, memory=int(fit.memory * 2**30) - taken, batch=batch, grows=grows)
                for name, layers, taken, grows in (
                    ("context", student, weights + maps, True), ("teacher_context", teacher, weights, False)
                )
            }
            for batch in fit.batch
        ]  # fmt: skip
    return told


def _most_map_numbers(config: PreTrainedConfig, grouped: int) -> int:
    """Numbers in one layer's maps to latents and back, were all dims kept: the most that a student adds."""
    head_dim = head_dim_of(config)
    heads = config.num_attention_heads + config.num_key_value_heads
    return int(2 * heads * head_dim * grouped * head_dim)
