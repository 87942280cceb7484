"""Conversion layer after layer on the student's own inputs: reduce heads, and repair in closed form what that cost."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from kvlatent.compress.fill import fill
from kvlatent.compress.maps import rescaled
from kvlatent.compress.planning import Plan, reductions
from kvlatent.compress.refit import LogitSamples, Ridge, far_bias, larger, refit_logits, sample_logits
from kvlatent.compress.statistics import LayerStatistics
from kvlatent.compress.streamed import Stream, hidden_states, layers_done, visited
from kvlatent.data.positions import block_starts
from kvlatent.kernels.cpu_linear import is_gated
from kvlatent.model.attention import LatentAttention, attention_of
from kvlatent.model.families import family_of, linear_layers
from kvlatent.model.hidden_states import HiddenStates
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

    They stay the teacher's where near tokens need them, where a norm stands before that stream, where both join it at
    once, and beside layers of linear attention.
    """
    family = family_of(config)
    return not (spec.window or family.post_norm or family.parallel or linear_layers(config))


@torch.no_grad()
def convert_in_order(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    plan: Plan,
    ids: Tensor,
    batch_size: int,
    context: int | None,
    stream: Stream | None = None,
) -> PreTrainedModel:
    """Reduce and refit layer after layer; `student` comes in unreduced and is changed in place.

    Hidden states of all tokens wait in host memory, (batch_size, block_size, hidden) per batch; where weights are
    refitted, the teacher's too, one layer's head outputs and, up to `KEEP_BYTES`, its FFN activations. With a `stream`
    they wait on disk, and so do both models' layers.
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
    student.model.rotary_emb = LatentRotaryEmbedding.of(spec, student.config).to(device)
    reduced_arguments = [layer_arguments(student, part, size) for part in starts]
    generator = torch.Generator().manual_seed(0)
    of_block = min(size, -(-LOGIT_QUERIES // len(ids)))
    first = min(near.window, size - of_block)  # queries before it meet nothing far
    rows_of_batch = [
        (torch.randperm(size - first, generator=generator)[:of_block].sort().values + first).to(device) for _ in batches
    ]
    multiplier = getattr(student.config, "residual_multiplier", 1.0)  # of what a layer adds to its residual stream
    refits = refits_weights(teacher.config, spec)
    done = layers_done(stream, len(student.model.layers))
    shapes, dtype = [(len(batch), size, student.config.hidden_size) for batch in batches], student.dtype
    states, wanted = (
        hidden_states(stream, name, (embedded(student, batch) for batch in of), shapes, dtype, begun=done > 0)
        for name, of in (("student", batches), ("teacher", batches if refits else ()))
    )
    for index, layer in enumerate(tqdm(student.model.layers, unit="layer", desc="convert")):
        if index < done:
            continue
        original = teacher.model.layers[index]
        arguments = [of_batch[index] for of_batch in whole_arguments]
        reduced = [
            a | {"position_embeddings": of_batch[index]["position_embeddings"]}
            for a, of_batch in zip(arguments, reduced_arguments, strict=True)
        ]
        with visited(stream, layer, index), visited(stream, original, index) if refits else nullcontext():
            if index not in spec.whole_layers and attention_of(layer) is not None:
                whole, stats, samples = layer.self_attn, LayerStatistics(), list[LogitSamples]()
                for b, (kwargs, rows) in enumerate(zip(arguments, rows_of_batch, strict=True)):
                    x = attention_input(layer, states.before(index, b).to(device), kwargs)
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
                    lacks = far_bias(samples, layer.self_attn.far_maps(), scale=spec.scale, cap=whole.cap)
                    layer.self_attn.far_bias.copy_(lacks)
            if refits:
                wanted_arguments = [of_batch[index] for of_batch in teacher_arguments]
                repair(index, layer, original, states, wanted, reduced, wanted_arguments, multiplier)
            else:
                for b, kwargs in enumerate(reduced):
                    states.keep(index, b, layer(states.before(index, b).to(device), **kwargs))
            if stream is not None:
                stream.keep(index, layer)
    student.config.latent = spec.to_dict()
    return student


def repair(
    index: int,
    layer: Any,
    original: Any,
    states: HiddenStates,
    wanted: HiddenStates,
    arguments: list[dict[str, Any]],
    wanted_arguments: list[dict[str, Any]],
    multiplier: float,
) -> None:
    """Take both residual streams through layer `index`, whose W_O and down projection are refitted.

    W_O then gives, with the student's head outputs, the teacher's residual stream after attention.

    Args:
        index: Of the layer.
        layer: The student's.
        original: The teacher's.
        states: The student's residual stream.
        wanted: The teacher's.
        arguments: What the student's layer gets beside them, by batch.
        wanted_arguments: Likewise the teacher's.
        multiplier: Of what the layer adds to the stream.
    """
    o_proj = layer.self_attn.o_proj
    device = o_proj.weight.device
    ridge, outputs = Ridge(o_proj), list[Tensor]()
    for b, kwargs in enumerate(arguments):
        run = partial(original, wanted.before(index, b).to(device), **wanted_arguments[b])
        after_attention, after_layer = input_and_output(original.post_attention_layernorm, run)
        wanted.keep(index, b, after_layer)
        state = states.before(index, b).to(device)
        heads = input_of(o_proj, partial(layer, state, **kwargs))
        attended = state + o_proj(heads) * multiplier
        ridge.add(heads, (after_attention - state) / multiplier, size=larger(after_attention, attended))
        outputs.append(heads.cpu())
    ridge.solve(strength=RIDGE)
    for b, heads in enumerate(outputs):
        states.keep(index, b, states.before(index, b).to(device) + o_proj(heads.to(device)) * multiplier)
    _through_ffn(index, layer, states, wanted, len(arguments), multiplier)


def _through_ffn(
    index: int, layer: Any, states: HiddenStates, wanted: HiddenStates, batches: int, multiplier: float
) -> None:
    """Take the student's residual stream after attention through a layer's FFN, whose down projection is refitted.

    It then gives the teacher's residual stream after the layer. Experts stay the teacher's: which tokens an expert gets
    is the router's choice, and a few tokens each would determine little.
    """
    device, norm, mlp = layer.self_attn.o_proj.weight.device, layer.post_attention_layernorm, layer.mlp
    attended = [states.before(index + 1, b) for b in range(batches)]
    kept: list[Tensor | None] = [None] * batches
    if is_gated(mlp):
        ridge = Ridge(mlp.down_proj)
        keep = sum(x.shape[0] * x.shape[1] for x in attended) * mlp.down_proj.in_features * 4 <= KEEP_BYTES
        for b, state in enumerate(attended):
            state, after_layer = state.to(device), wanted.before(index + 1, b).to(device)
            x = input_of(mlp.down_proj, partial(mlp, norm(state)))
            stream = state + mlp.down_proj(x) * multiplier
            ridge.add(x, (after_layer - state) / multiplier, size=larger(after_layer, stream))
            kept[b] = x.cpu() if keep else None
        ridge.solve(strength=RIDGE)
    for b, (state, inner) in enumerate(zip(attended, kept, strict=True)):
        state = state.to(device)
        out = mlp(norm(state)) if inner is None else mlp.down_proj(inner.to(device))
        out = out[0] if isinstance(out, tuple) else out  # beside which some give what their router said
        states.keep(index, b, state + out * multiplier)
