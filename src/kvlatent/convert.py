"""Teacher and wanted dims → student: reduce every layer's heads, in order, and repair in closed form what that cost."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import linear
from tqdm import tqdm
from transformers import PreTrainedModel

from kvlatent import reduce
from kvlatent.attention import LatentAttention
from kvlatent.calibrate import LayerStatistics, Statistics, calibrate, fit_batch, input_of, layer_arguments
from kvlatent.errors import UserError
from kvlatent.families import family_of
from kvlatent.modeling import graft, head_dim_of, identity_spec, set_spec
from kvlatent.refit import Ridge
from kvlatent.rope import LatentRotaryEmbedding, frequency_aware_exponents, inverse_frequencies
from kvlatent.spec import LatentSpec, Preset, check_dims

RIDGE = 0.3
"""Pull of refitted weights towards the old ones, in units of the mean input energy."""


def convert(
    teacher: PreTrainedModel,
    *,
    preset: Preset = "best",
    d_qk: int,
    d_vo: int,
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
        d_qk: Query/key dims per head.
        d_vo: Value/output dims per head.
        statistics: From `calibrate`.
        ids: Calibration text as token blocks.
        batch_size: Blocks per forward.

    Raises:
        UserError: Dims the preset or the model doesn't allow, or neither statistics nor text where needed.
    """
    layers = teacher.config.num_hidden_layers
    check_dims(head_dim_of(teacher.config), (d_qk,) * layers, (d_vo,) * layers)
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


def plan_spec(
    teacher: PreTrainedModel, *, preset: Preset, d_qk: int, d_vo: int, statistics: Statistics | None
) -> tuple[LatentSpec, list[tuple[int, int, int]]]:
    """The spec of a preset, and for `portable` the groups of rotary pairs behind its frequency list."""
    whole = identity_spec(teacher)
    layers, head_dim = len(whole.d_qk), whole.head_dim
    groups: list[tuple[int, int, int]] = []
    fields: dict[str, Any] = {}
    if preset == "best":
        fields = {"qk_map": "after_rope"} if d_qk < head_dim else {}
    else:
        # QK-norm needs all of head_dim, so there the reduction stays a step of its own.
        fields = {"qk_map": "before_rope" if family_of(teacher.config).qk_norm else "folded", "scale": d_qk**-0.5}
        if preset == "paper":
            reduce.stride_channels(head_dim, d_qk, "d_qk"), reduce.stride_channels(head_dim, d_vo, "d_vo")
            theta = teacher.config.rope_parameters["rope_theta"]
            exponents = frequency_aware_exponents(d_qk)
            fields["inv_freq"] = inverse_frequencies(exponents, d=d_qk, theta=theta)
        else:
            assert statistics is not None
            distances = torch.logspace(0, 9, 64, base=2)  # 1 to 512 tokens, as many near as far
            groups, fields["inv_freq"] = reduce.choose_groups(
                [layer.mean("q_unrotated") for layer in statistics.layers],
                [layer.mean("k_unrotated") for layer in statistics.layers],
                torch.tensor(whole.inv_freq),
                d_qk // 2,
                distances,
            )
    known = whole.to_dict() | {"preset": preset, "d_qk": [d_qk] * layers, "d_vo": [d_vo] * layers} | fields
    return LatentSpec.from_dict(known), groups


def reductions(
    spec: LatentSpec,
    index: int,
    whole: LatentAttention,
    stats: LayerStatistics | None,
    groups: list[tuple[int, int, int]],
) -> tuple[reduce.QKReduction, reduce.VOReduction]:
    """The head reductions of layer `index` that the spec's preset asks for."""
    d_qk, d_vo, head_dim = spec.d_qk[index], spec.d_vo[index], spec.head_dim
    kv_heads, q_heads = whole.kv_heads, whole.q_heads
    if spec.preset == "paper":
        channels = reduce.stride_channels(head_dim, d_qk, "d_qk").expand(kv_heads, -1)
        kept = reduce.select(channels, head_dim)
        values = reduce.select(reduce.stride_channels(head_dim, d_vo, "d_vo").expand(kv_heads, -1), head_dim)
        qk = reduce.QKReduction(q_map=kept.repeat_interleave(q_heads // kv_heads, dim=0), k_map=kept)
        return qk, reduce.VOReduction(v_map=values, o_map=values.mT)
    assert stats is not None
    vo = reduce.value_output_svd(stats.mean("o"), whole.o_proj.weight, d_vo, kv_heads=kv_heads)
    if spec.preset == "portable":
        qk = reduce.fold(stats.mean("q_unrotated"), stats.mean("k_unrotated"), groups)
        to_scale = head_dim**-0.5 / spec.scale  # the teacher's logit scale, folded into the queries
        return reduce.QKReduction(q_map=qk.q_map * to_scale, k_map=qk.k_map), vo
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
    """Reduce and refit layer after layer; `student` comes in unreduced and is changed in place."""
    device, scaling = student.device, spec.rope_scaling
    batches = ids.split(batch_size)
    whole_arguments = layer_arguments(student, ids)
    teacher_arguments = layer_arguments(teacher, ids)
    cos_sin = LatentRotaryEmbedding(spec.inv_freq, scaling).to(device)
    positions = torch.arange(ids.shape[1], device=device)[None]
    student_hidden = [student.model.embed_tokens(batch.to(device)).cpu() for batch in batches]
    teacher_hidden = [x.clone() for x in student_hidden]
    for index, layer in enumerate(tqdm(student.model.layers, unit="layer", desc="convert")):
        stats, whole, original = LayerStatistics(), layer.self_attn, teacher.model.layers[index]
        for hidden in student_hidden:
            kwargs = fit_batch(whole_arguments[index], len(hidden))
            stats.update(whole, layer.input_layernorm(hidden.to(device)), kwargs, rope_scaling=scaling)
        layer.self_attn = LatentAttention(student.config, index, whole, spec)
        fill(layer.self_attn, whole, *reductions(spec, index, whole, stats, groups))

        # W_O: give the teacher's residual stream after attention, from the student's head outputs.
        ridge, middle = Ridge(), []
        for b, hidden in enumerate(student_hidden):
            kwargs = fit_batch(teacher_arguments[index], len(hidden))
            incoming = teacher_hidden[b].to(device)
            attended: list[Tensor] = []
            handle = original.post_attention_layernorm.register_forward_pre_hook(lambda _m, a, s=attended: s.append(a[0]))
            teacher_hidden[b] = original(incoming, **kwargs).cpu()
            handle.remove()
            middle.append(attended[0].cpu())
        heads = []
        for b, hidden in enumerate(student_hidden):
            hidden = hidden.to(device)
            kwargs = fit_batch(whole_arguments[index], len(hidden))
            kwargs["position_embeddings"] = cos_sin(hidden, positions)
            x = input_of(layer.self_attn.o_proj, lambda: layer.self_attn(layer.input_layernorm(hidden), **kwargs))  # noqa: B023
            ridge.add(x, middle[b].to(device) - hidden - (0 if layer.self_attn.o_proj.bias is None else layer.self_attn.o_proj.bias))
            heads.append(x.cpu())
        ridge.solve(layer.self_attn.o_proj, strength=RIDGE)

        # The FFN's down projection: give the teacher's residual stream after the layer.
        ridge, activations = Ridge(), []
        for b, hidden in enumerate(student_hidden):
            student_hidden[b] = hidden + layer.self_attn.o_proj(heads[b].to(device)).cpu()
            normed = layer.post_attention_layernorm(student_hidden[b].to(device))
            x = layer.mlp.act_fn(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed)
            ridge.add(x, (teacher_hidden[b] - student_hidden[b]).to(device))
            activations.append(x.cpu())
        ridge.solve(layer.mlp.down_proj, strength=RIDGE)
        for b, x in enumerate(activations):
            student_hidden[b] += linear(x.to(device), layer.mlp.down_proj.weight).cpu()
    student.config.latent = spec.to_dict()
    student.model.rotary_emb = cos_sin
    return student
