"""Conversion layer after layer on the student's own inputs: reduce heads, and repair in closed form what that cost."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from kvlatent.compress.fill import fill
from kvlatent.compress.maps import rescaled
from kvlatent.compress.planning import Plan, reductions
from kvlatent.compress.refit import LogitSamples, Ridge, far_bias, larger, refit_logits
from kvlatent.compress.statistics import LayerStatistics, sample_logits
from kvlatent.data.positions import block_starts
from kvlatent.kernels.cpu_linear import is_gated
from kvlatent.model.attention import LatentAttention
from kvlatent.model.families import family_of
from kvlatent.model.layers import attention_input, embedded, input_and_output, input_of, layer_arguments
from kvlatent.model.rope import LatentRotaryEmbedding
from kvlatent.model.spec import LatentSpec
from kvlatent.model.window import Near

RIDGE = 3.0
"""Pull of refitted weights towards the old ones, in units of the inputs' mean squared norm."""
LOGIT_RIDGE = 0.03
"""Pull of refitted query and key maps towards where they started, in units of mean query × mean key energy."""
LOGIT_QUERIES = 1536
"""Queries of each layer that the maps are refitted on, spread over all blocks."""
KEEP_BYTES = 2**30
"""A layer's FFN activations are kept in host memory up to this size; beyond it they are computed twice."""


def turning(position_embeddings: tuple[Tensor, Tensor], freq_index: Tensor | None) -> tuple[Tensor, Tensor]:
    """cos and sin of all frequencies, (batch, seq, pairs), as each KV head takes them in the first block.

    They come out as (1 or kv_heads, seq, pairs).
    """
    cos, sin = (x[:1] for x in position_embeddings)
    if freq_index is None:
        return cos, sin
    cos, sin = (x[0][:, freq_index.to(x.device)].transpose(0, 1) for x in (cos, sin))
    return cos, sin


def refits_weights(config: PreTrainedConfig, spec: LatentSpec) -> bool:
    """Whether W_O and the FFN are refitted to the teacher's residual stream.

    They stay the teacher's where near tokens need them, and where a norm stands before that stream.
    """
    return not (spec.window or family_of(config).post_norm)


@torch.no_grad()
def convert_in_order(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    plan: Plan,
    ids: Tensor,
    batch_size: int,
    context: int | None,
) -> PreTrainedModel:
    """Reduce and refit layer after layer; `student` comes in unreduced and is changed in place.

    Hidden states of all tokens wait in host memory, twice (batch_size, block_size, hidden) per batch, one layer's head
    outputs and, up to `KEEP_BYTES`, its FFN activations.
    """
    device, spec = student.device, plan.spec
    near = Near(spec.window, spec.sinks)
    settings: dict[str, Any] = {"heads_per_latent": spec.heads_per_latent, "near": near}
    batches = ids.split(batch_size)
    size = ids.shape[1]
    starts = block_starts(len(ids), size, context).to(device).split(batch_size)
    whole_arguments, teacher_arguments = (
        [layer_arguments(m, part, size) for part in starts] for m in (student, teacher)
    )
    student.model.rotary_emb = LatentRotaryEmbedding.of(spec).to(device)
    reduced_arguments = [layer_arguments(student, part, size) for part in starts]
    generator = torch.Generator().manual_seed(0)
    of_block = min(size, -(-LOGIT_QUERIES // len(ids)))
    first = min(near.window, size - of_block)  # queries before it meet nothing far
    rows_of_batch = [
        (torch.randperm(size - first, generator=generator)[:of_block].sort().values + first).to(device) for _ in batches
    ]
    multiplier = getattr(student.config, "residual_multiplier", 1.0)  # of what a layer adds to its residual stream
    student_states = [embedded(student, batch).cpu() for batch in batches]
    teacher_states = list(student_states)
    for index, layer in enumerate(tqdm(student.model.layers, unit="layer", desc="convert")):
        whole, original = layer.self_attn, teacher.model.layers[index]
        arguments = [of_batch[index] for of_batch in whole_arguments]
        reduced = [
            a | {"position_embeddings": of_batch[index]["position_embeddings"]}
            for a, of_batch in zip(arguments, reduced_arguments, strict=True)
        ]

        if index not in spec.whole_layers:
            stats, samples = LayerStatistics(), list[LogitSamples]()
            for state, kwargs, rows in zip(student_states, arguments, rows_of_batch, strict=True):
                x = attention_input(layer, state.to(device), kwargs)
                stats.update(whole, x, kwargs, **settings)
                if plan.refits_logits:
                    rotated = spec.qk_map == "after_rope"
                    samples.append(sample_logits(whole, x, kwargs, rows=rows, rotated=rotated, **settings))
            qk, vo = reductions(plan, index, whole, stats)
            if samples:
                turn = None
                if spec.qk_map != "after_rope":
                    turn = turning(reduced[0]["position_embeddings"], qk.freq_index)
                qk = rescaled(refit_logits(samples, qk, turn=turn, scale=spec.scale, strength=LOGIT_RIDGE))
            layer.self_attn = LatentAttention(student.config, index, whole, spec)
            fill(layer.self_attn, whole, qk, vo, stats)
            if layer.self_attn.far_bias is not None:
                layer.self_attn.far_bias.copy_(far_bias(samples, layer.self_attn.far_maps(), scale=spec.scale))

        if not refits_weights(teacher.config, spec):
            for b, state in enumerate(student_states):
                student_states[b] = layer(state.to(device), **reduced[b]).cpu()
            continue

        # W_O: with the student's head outputs, give the teacher's residual stream after attention.
        ridge, outputs = Ridge(layer.self_attn.o_proj), list[Tensor]()
        for b, kwargs in enumerate(reduced):
            run = partial(original, teacher_states[b].to(device), **teacher_arguments[b][index])
            after_attention, after_layer = input_and_output(original.post_attention_layernorm, run)
            teacher_states[b] = after_layer.cpu()
            state = student_states[b].to(device)
            heads = input_of(layer.self_attn.o_proj, partial(layer, state, **kwargs))
            stream = state + layer.self_attn.o_proj(heads) * multiplier
            ridge.add(heads, (after_attention - state) / multiplier, size=larger(after_attention, stream))
            outputs.append(heads.cpu())
        ridge.solve(strength=RIDGE)
        for b, heads in enumerate(outputs):
            attended = layer.self_attn.o_proj(heads.to(device)) * multiplier
            student_states[b] = (student_states[b].to(device) + attended).cpu()
        _through_ffn(layer, student_states, teacher_states, multiplier)
    student.config.latent = spec.to_dict()
    return student


def _through_ffn(layer: Any, states: list[Tensor], wanted: list[Tensor], multiplier: float) -> None:
    """Take the student's residual stream through a layer's FFN, whose down projection is refitted.

    It then gives the teacher's residual stream after the layer. Experts stay the teacher's: which tokens an expert gets
    is the router's choice, and a few tokens each would determine little.

    Args:
        layer: The student's.
        states: Its residual stream after attention by batch; replaced by that after the layer.
        wanted: The teacher's after the layer.
        multiplier: Of what the layer adds to the stream.
    """
    device, norm, mlp = layer.self_attn.o_proj.weight.device, layer.post_attention_layernorm, layer.mlp
    kept: list[Tensor | None] = [None] * len(states)
    if is_gated(mlp):
        ridge = Ridge(mlp.down_proj)
        keep = sum(x.shape[0] * x.shape[1] for x in states) * mlp.down_proj.in_features * 4 <= KEEP_BYTES
        for b, state in enumerate(states):
            state, after_layer = state.to(device), wanted[b].to(device)
            x = input_of(mlp.down_proj, partial(mlp, norm(state)))
            stream = state + mlp.down_proj(x) * multiplier
            ridge.add(x, (after_layer - state) / multiplier, size=larger(after_layer, stream))
            kept[b] = x.cpu() if keep else None
        ridge.solve(strength=RIDGE)
    for b, (state, inner) in enumerate(zip(states, kept, strict=True)):
        state = state.to(device)
        out = mlp(norm(state)) if inner is None else mlp.down_proj(inner.to(device))
        states[b] = (state + out * multiplier).cpu()
