"""Teacher and wanted dims → student: reduce every layer's heads, in order, and repair in closed form what that cost."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from kvlatent import reduce
from kvlatent.attention import LatentAttention
from kvlatent.calibrate import (
    LayerStatistics,
    Statistics,
    calibrate,
    fit_batch,
    input_and_output,
    input_of,
    layer_arguments,
)
from kvlatent.errors import UserError
from kvlatent.families import family_of
from kvlatent.modeling import check_teacher, graft, head_dim_of, identity_spec, set_spec
from kvlatent.refit import Ridge
from kvlatent.rope import LatentRotaryEmbedding, frequency_aware_exponents, inverse_frequencies
from kvlatent.spec import LatentSpec, Preset, check_dims

RIDGE = 1.0
"""Pull of refitted weights towards the old ones, in units of the mean input energy."""
KEEP_BYTES = 2**30
"""A layer's FFN activations are kept in host memory up to this size; beyond it they are computed twice."""


def convert(
    teacher: PreTrainedModel,
    *,
    preset: Preset = "best",
    d_qk: int | Sequence[int],
    d_vo: int | Sequence[int],
    statistics: Statistics | None = None,
    ids: Int[Tensor, "blocks block_size"] | None = None,
    batch_size: int = 4,
) -> PreTrainedModel:
    """Return a student with d_qk and d_vo dims per head; weights that conversion doesn't touch are the teacher's.

    `paper` needs nothing else. `best` and `portable` need either `statistics` of the teacher (one shot), or text:
    then layers are converted in order on the student's own inputs, and W_O and the FFN's down projection are refitted
    so that each layer repairs what the earlier ones lost.

    Args:
        teacher: A stock model of a supported family; left as it is.
        preset: The recipe.
        d_qk: Query/key dims per head: one number, or one per layer (`best` only), as `budget.plan` gives them.
        d_vo: Value/output dims per head, likewise.
        statistics: From `calibrate`.
        ids: Calibration text as token blocks.
        batch_size: Blocks per forward.

    Raises:
        UserError: Dims the preset or the model doesn't allow, or neither statistics nor text where needed.
    """
    d_qk, d_vo = check_request(teacher.config, preset=preset, d_qk=d_qk, d_vo=d_vo)
    if preset != "paper" and statistics is None and ids is None:
        raise UserError(f"preset {preset} is calibrated: give text (--text) or statistics (--stats)")
    if preset == "portable" and statistics is None:
        assert ids is not None
        statistics = calibrate(teacher, ids, batch_size=batch_size, about={})
    spec, groups = plan_spec(teacher, preset=preset, d_qk=d_qk, d_vo=d_vo, statistics=statistics)
    student = graft(teacher)
    if preset == "paper" or ids is None:
        whole = [layer.self_attn for layer in student.model.layers]
        set_spec(student, spec)
        for index, layer in enumerate(student.model.layers):
            stats = None if statistics is None else statistics.layers[index]
            fill(layer.self_attn, whole[index], *reductions(spec, index, whole[index], stats, groups))
        return student
    return _convert_in_order(student, teacher, spec, groups, ids, batch_size)


def check_request(
    config: PreTrainedConfig, *, preset: Preset, d_qk: int | Sequence[int], d_vo: int | Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the dims layer by layer; needs no weights, so it can come before loading them.

    Raises:
        UserError: A teacher or dims that can't be.
    """
    check_teacher(config)
    layers, head_dim = config.num_hidden_layers, head_dim_of(config)
    qk, vo = ((d,) * layers if isinstance(d, int) else tuple(d) for d in (d_qk, d_vo))
    check_dims(head_dim, qk, vo)
    if len(qk) != layers:
        raise UserError(f"d_qk and d_vo must name every one of {layers} layers; got {len(qk)} entries")
    if preset != "best" and len({*zip(qk, vo, strict=True)}) > 1:
        raise UserError(f"preset {preset} has the same dims in every layer; different ones need preset best")
    if preset == "paper":
        reduce.stride_channels(head_dim, qk[0], "d_qk")
        reduce.stride_channels(head_dim, vo[0], "d_vo")
        frequency_aware_exponents(qk[0])
    return qk, vo


def plan_spec(
    teacher: PreTrainedModel,
    *,
    preset: Preset,
    d_qk: tuple[int, ...],
    d_vo: tuple[int, ...],
    statistics: Statistics | None,
) -> tuple[LatentSpec, list[tuple[int, int, int]]]:
    """The spec of a preset, and for `portable` the groups of rotary pairs behind its frequency list."""
    whole = identity_spec(teacher)
    narrow = d_qk[0]  # of every layer, except under `best`
    groups: list[tuple[int, int, int]] = []
    fields: dict[str, Any] = {}
    if preset == "best":
        fields = {"qk_map": "after_rope"} if min(d_qk) < whole.head_dim else {}
    else:
        # QK-norm needs all of head_dim, so there the reduction stays a step of its own.
        fields = {"qk_map": "before_rope" if family_of(teacher.config).qk_norm else "folded", "scale": narrow**-0.5}
        if preset == "paper":
            fields["inv_freq"] = _paper_frequencies(teacher, narrow, whole.inv_freq)
        else:
            assert statistics is not None
            distances = torch.logspace(0, 9, 64, base=2)  # 1 to 512 tokens, as many near as far
            groups, fields["inv_freq"] = reduce.choose_groups(
                [layer.mean("q_unrotated") for layer in statistics.layers],
                [layer.mean("k_unrotated") for layer in statistics.layers],
                torch.tensor(whole.inv_freq),
                narrow // 2,
                distances,
            )
    known = whole.to_dict() | {"preset": preset, "d_qk": d_qk, "d_vo": d_vo} | fields
    return LatentSpec.from_dict(known), groups


def _paper_frequencies(teacher: PreTrainedModel, d_qk: int, ladder: tuple[float, ...]) -> tuple[float, ...]:
    """The paper's list (Eq. 11). Where the model scales its RoPE, the entries are looked up in its own ladder.

    Raises:
        UserError: RoPE is scaled and the list has entries between those of the ladder.
    """
    exponents, rope = frequency_aware_exponents(d_qk), teacher.config.rope_parameters
    if rope["rope_type"] == "default":
        return inverse_frequencies(exponents, d=d_qk, theta=rope["rope_theta"])
    places = [exponent * len(ladder) / d_qk for exponent in exponents]
    if not all(place.is_integer() for place in places):
        raise UserError(
            f"the paper's list for d_qk {d_qk} is undefined under this model's {rope['rope_type']} RoPE scaling: "
            f"take a d_qk that divides {len(ladder)}, or another preset"
        )
    return tuple(ladder[int(place)] for place in places)


def reductions(
    spec: LatentSpec,
    index: int,
    whole: LatentAttention,
    stats: LayerStatistics | None,
    groups: list[tuple[int, int, int]],
) -> tuple[reduce.QKReduction, reduce.VOReduction]:
    """The head reductions of layer `index` that the spec's preset asks for."""
    d_qk, d_vo, head_dim = spec.d_qk[index], spec.d_vo[index], spec.head_dim
    kv_heads = whole.kv_heads
    if spec.preset == "paper":
        channels = reduce.stride_channels(head_dim, d_qk, "d_qk").expand(kv_heads, -1)
        values = reduce.select(reduce.stride_channels(head_dim, d_vo, "d_vo").expand(kv_heads, -1), head_dim)
        qk = reduce.keep_channels(channels, head_dim, group_size=whole.group_size)
        return qk, reduce.VOReduction(v_map=values, o_map=values.mT)
    assert stats is not None
    vo = reduce.value_output_svd(stats.mean("o"), whole.o_proj.weight, d_vo, kv_heads=kv_heads)
    if spec.preset == "portable":
        qk = reduce.fold(stats.mean("q_unrotated"), stats.mean("k_unrotated"), groups)
        to_scale = head_dim**-0.5 / spec.scale  # the teacher's logit scale, folded into the queries
        return reduce.QKReduction(q_map=qk.q_map * to_scale, k_map=qk.k_map), vo
    if spec.qk_map == "folded":  # full d_qk: only the identity can go before RoPE and change nothing
        every = torch.arange(head_dim).expand(kv_heads, -1)
        return reduce.keep_channels(every, head_dim, group_size=whole.group_size), vo
    return reduce.project(stats.mean("q"), stats.mean("k"), d_qk), vo


@torch.no_grad()
def fill(
    reduced: LatentAttention, whole: LatentAttention, qk: reduce.QKReduction, vo: reduce.VOReduction
) -> LatentAttention:
    """Write into `reduced` the weights of the unreduced attention `whole` under the given maps."""
    heads_and_maps = (
        (reduced.q_proj, whole.q_proj, qk.q_map if reduced.qk_map == "folded" else None),
        (reduced.k_proj, whole.k_proj, qk.k_map if reduced.qk_map == "folded" else None),
        (reduced.v_proj, whole.v_proj, vo.v_map),
    )
    for new, old, head_map in heads_and_maps:
        for name, parameter in new.named_parameters():
            value = getattr(old, name).double()
            if head_map is not None:  # (heads·head_dim, …) → (heads·d, …)
                by_head = value.unflatten(0, (len(head_map), -1))
                value = torch.einsum("hdc,hd...->hc...", head_map.to(value.device), by_head).flatten(0, 1)
            parameter.copy_(value)
    o_map = vo.o_map.repeat_interleave(whole.group_size, dim=0)
    by_head = whole.o_proj.weight.double().unflatten(1, (whole.q_heads, -1))  # (hidden, q_heads, head_dim)
    reduced.o_proj.weight.copy_(torch.einsum("hcd,xhd->xhc", o_map.to(by_head.device), by_head).flatten(1))
    if reduced.o_proj.bias is not None:
        reduced.o_proj.bias.copy_(whole.o_proj.bias)
    if reduced.q_map is not None and reduced.k_map is not None:
        reduced.q_map.copy_(qk.q_map)
        reduced.k_map.copy_(qk.k_map)
    if reduced.freq_index is not None:
        assert qk.freq_index is not None
        reduced.freq_index.copy_(qk.freq_index)
    return reduced


@torch.no_grad()
def _convert_in_order(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    spec: LatentSpec,
    groups: list[tuple[int, int, int]],
    ids: Tensor,
    batch_size: int,
) -> PreTrainedModel:
    """Reduce and refit layer after layer; `student` comes in unreduced and is changed in place.

    Hidden states of all tokens wait in host memory, twice (batch_size, block_size, hidden) per batch, one layer's head
    outputs and, up to `KEEP_BYTES`, its FFN activations.
    """
    device = student.device
    batches = ids.split(batch_size)
    whole_arguments, teacher_arguments = layer_arguments(student, ids), layer_arguments(teacher, ids)
    rotary = LatentRotaryEmbedding(spec.inv_freq, spec.rope_scaling).to(device)
    position_embeddings = rotary(student.model.embed_tokens.weight, torch.arange(ids.shape[1], device=device)[None])
    student_states = [student.model.embed_tokens(batch.to(device)).cpu() for batch in batches]
    teacher_states = list(student_states)
    for index, layer in enumerate(tqdm(student.model.layers, unit="layer", desc="convert")):
        whole, original = layer.self_attn, teacher.model.layers[index]
        arguments = [fit_batch(whole_arguments[index], len(batch)) for batch in batches]

        stats = LayerStatistics()
        for state, kwargs in zip(student_states, arguments, strict=True):
            x = layer.input_layernorm(state.to(device))
            stats.update(whole, x, kwargs, rope_scaling=spec.rope_scaling)
        layer.self_attn = LatentAttention(student.config, index, whole, spec)
        fill(layer.self_attn, whole, *reductions(spec, index, whole, stats, groups))

        # W_O: with the student's head outputs, give the teacher's residual stream after attention.
        ridge, outputs = Ridge(layer.self_attn.o_proj), list[Tensor]()
        for b, kwargs in enumerate(arguments):
            layer_input = teacher_states[b].to(device)
            run = partial(original, layer_input, **fit_batch(teacher_arguments[index], len(layer_input)))
            after_attention, after_layer = input_and_output(original.post_attention_layernorm, run)
            teacher_states[b] = after_layer.cpu()
            state = student_states[b].to(device)
            attend = partial(layer.self_attn, layer.input_layernorm(state))
            kwargs["position_embeddings"] = position_embeddings
            heads = input_of(layer.self_attn.o_proj, partial(attend, **kwargs))
            ridge.add(heads, after_attention - state, size=after_attention)
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
            ridge.add(x, after_layer - state, size=after_layer)
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
