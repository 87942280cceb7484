"""Conversion layer after layer on the student's own inputs: reduce heads, and repair in closed form what that cost."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from kvlatent.compress.fill import fill
from kvlatent.compress.maps import rescaled
from kvlatent.compress.planning import Plan, reductions
from kvlatent.compress.refit import LogitSamples, Ridge, larger, refit_logits
from kvlatent.compress.statistics import LayerStatistics, sample_logits
from kvlatent.data.positions import block_starts, positions_in_blocks
from kvlatent.model.attention import LatentAttention
from kvlatent.model.layers import input_and_output, input_of, layer_arguments
from kvlatent.model.rope import LatentRotaryEmbedding
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
    """cos and sin of all frequencies, (1, seq, pairs), as each KV head takes them: (1 or kv_heads, seq, pairs)."""
    if freq_index is None:
        return position_embeddings
    cos, sin = (x[0][:, freq_index.to(x.device)].transpose(0, 1) for x in position_embeddings)
    return cos, sin


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
    settings: dict[str, Any] = {
        "rope_scaling": spec.rope_scaling, "heads_per_latent": spec.heads_per_latent, "near": near,
    }  # fmt: skip
    batches = ids.split(batch_size)
    size = ids.shape[1]
    starts = block_starts(len(ids), size, context).to(device).split(batch_size)
    whole_arguments, teacher_arguments = (
        [layer_arguments(m, part, size) for part in starts] for m in (student, teacher)
    )
    rotary = LatentRotaryEmbedding(spec.inv_freq, spec.rope_scaling).to(device)
    rotations: list[tuple[Tensor, Tensor]] = [
        rotary(student.model.embed_tokens.weight, positions_in_blocks(part, size)) for part in starts
    ]
    from_start = rotations[0][0][:1], rotations[0][1][:1]
    generator = torch.Generator().manual_seed(0)
    of_block = min(size, -(-LOGIT_QUERIES // len(ids)))
    first = min(near.window, size - of_block)  # queries before it meet nothing far
    rows_of_batch = [
        (torch.randperm(size - first, generator=generator)[:of_block].sort().values + first).to(device) for _ in batches
    ]
    student_states = [student.model.embed_tokens(batch.to(device)).cpu() for batch in batches]
    teacher_states = list(student_states)
    for index, layer in enumerate(tqdm(student.model.layers, unit="layer", desc="convert")):
        whole, original = layer.self_attn, teacher.model.layers[index]
        arguments = [of_batch[index] for of_batch in whole_arguments]

        stats, samples = LayerStatistics(), list[LogitSamples]()
        for state, kwargs, rows in zip(student_states, arguments, rows_of_batch, strict=True):
            x = layer.input_layernorm(state.to(device))
            stats.update(whole, x, kwargs, **settings)
            if plan.refits_logits:
                rotated = spec.qk_map == "after_rope"
                samples.append(sample_logits(whole, x, kwargs, rows=rows, rotated=rotated, **settings))
        qk, vo = reductions(plan, index, whole, stats)
        if samples:
            turn = None if spec.qk_map == "after_rope" else turning(from_start, qk.freq_index)
            qk = rescaled(refit_logits(samples, qk, turn=turn, scale=spec.scale, strength=LOGIT_RIDGE))
        layer.self_attn = LatentAttention(student.config, index, whole, spec)
        fill(layer.self_attn, whole, qk, vo, stats)

        if near.window:  # W_O and the FFN stay the teacher's, as near tokens need them
            for b, state in enumerate(student_states):
                moved = {**arguments[b], "position_embeddings": rotations[b]}
                student_states[b] = layer(state.to(device), **moved).cpu()
            continue

        # W_O: with the student's head outputs, give the teacher's residual stream after attention.
        ridge, outputs = Ridge(layer.self_attn.o_proj), list[Tensor]()
        for b, kwargs in enumerate(arguments):
            run = partial(original, teacher_states[b].to(device), **teacher_arguments[b][index])
            after_attention, after_layer = input_and_output(original.post_attention_layernorm, run)
            teacher_states[b] = after_layer.cpu()
            state = student_states[b].to(device)
            attend = partial(layer.self_attn, layer.input_layernorm(state))
            heads = input_of(layer.self_attn.o_proj, partial(attend, **kwargs | {"position_embeddings": rotations[b]}))
            stream = state + layer.self_attn.o_proj(heads)
            ridge.add(heads, after_attention - state, size=larger(after_attention, stream))
            outputs.append(heads.cpu())
        ridge.solve(strength=RIDGE)

        # The FFN's down projection: give the teacher's residual stream after the layer.
        ridge, activations = Ridge(layer.mlp.down_proj), list[Tensor | None]()
        keep = ids.numel() * layer.mlp.down_proj.in_features * 4 <= KEEP_BYTES
        for b, heads in enumerate(outputs):
            state = student_states[b].to(device) + layer.self_attn.o_proj(heads.to(device))
            student_states[b] = state.cpu()
            x = input_of(layer.mlp.down_proj, partial(layer.mlp, layer.post_attention_layernorm(state)))
            after_layer = teacher_states[b].to(device)
            stream = state + layer.mlp.down_proj(x)
            ridge.add(x, after_layer - state, size=larger(after_layer, stream))
            activations.append(x.cpu() if keep else None)
        ridge.solve(strength=RIDGE)
        for b, (state, kept) in enumerate(zip(student_states, activations, strict=True)):
            state = state.to(device)
            if kept is None:
                out = layer.mlp(layer.post_attention_layernorm(state))
            else:
                out = layer.mlp.down_proj(kept.to(device))
            student_states[b] = (state + out).cpu()
    student.config.latent = spec.to_dict()
    student.model.rotary_emb = rotary
    return student
