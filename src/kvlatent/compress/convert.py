"""Teacher and wanted dims → student: reduce every layer's heads, in order, and repair in closed form what that cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from kvlatent.compress import reduce
from kvlatent.compress.refit import LogitSamples, Ridge, larger, refit_logits
from kvlatent.compress.statistics import LayerStatistics, Statistics, calibrate, sample_logits
from kvlatent.data.positions import block_starts, positions_in_blocks
from kvlatent.errors import UserError
from kvlatent.model.attention import LatentAttention
from kvlatent.model.families import family_of
from kvlatent.model.graft import check_teacher, graft, head_dim_of, heads_per_latent_of, identity_spec, set_spec
from kvlatent.model.layers import input_and_output, input_of, layer_arguments
from kvlatent.model.rope import LatentRotaryEmbedding, frequency_aware_exponents, inverse_frequencies
from kvlatent.model.spec import QK, LatentSpec, Preset, check_dims

QK_OF: dict[Preset, QK] = {"best": "project", "portable": "fold", "paper": "aware"}
"""How the presets reduce queries and keys."""
ALLOWED: dict[Preset, tuple[QK, ...]] = {
    "best": get_args(QK),
    "portable": ("stride", "aware", "matched", "pairs-model", "fold"),
    "paper": ("stride", "aware", "matched"),
}
"""`portable` keeps to one frequency list for the model, `paper` to what needs no calibration."""
SHARED_LIST = ALLOWED["portable"]
JOINING: tuple[QK, ...] = ("project", "fold")
"""Reductions of queries and keys that mix heads."""
DISTANCES = torch.logspace(0, 9, 64, base=2)
"""Tokens between query and key that rotations are judged at: 1 to 512, as many near as far."""
RIDGE = 3.0
"""Pull of refitted weights towards the old ones, in units of the inputs' mean squared norm."""
LOGIT_RIDGE = 0.03
"""Pull of refitted query and key maps towards where they started, in units of mean query × mean key energy."""
LOGIT_QUERIES = 1536
"""Queries of each layer that the maps are refitted on, spread over all blocks."""
KEEP_BYTES = 2**30
"""A layer's FFN activations are kept in host memory up to this size; beyond it they are computed twice."""


def convert(
    teacher: PreTrainedModel,
    *,
    preset: Preset = "best",
    qk: QK | None = None,
    d_qk: int | Sequence[int],
    d_vo: int | Sequence[int],
    heads_per_latent: int | None = None,
    statistics: Statistics | None = None,
    ids: Int[Tensor, "blocks block_size"] | None = None,
    batch_size: int = 4,
    context: int | None = None,
) -> PreTrainedModel:
    """Return a student with d_qk and d_vo dims per head; weights that conversion doesn't touch are the teacher's.

    `paper` needs nothing else. `best` and `portable` need either `statistics` of the teacher (one shot), or text:
    then layers are converted in order on the student's own inputs, maps of queries and keys are refitted on the logits,
    and W_O and the FFN's down projection so that each layer repairs what the earlier ones lost.

    Args:
        teacher: A stock model of a supported family; left as it is.
        preset: The recipe.
        qk: How queries and keys are reduced; None is what the preset does (`QK_OF`).
        d_qk: Query/key dims per head: one number, or one per layer (`best` only), as `budget.plan` gives them.
        d_vo: Value/output dims per head, likewise.
        heads_per_latent: KV heads that are reduced together and cached as one latent, for the same bytes; None is what
            the statistics are of or `heads_per_latent_of` says where keys are reduced by one of `JOINING`, else 1.
        statistics: From `calibrate`.
        ids: Calibration text as token blocks.
        batch_size: Blocks per forward.
        context: Positions that the blocks are spread over, if more than a block's.

    Raises:
        UserError: Dims the preset or the model doesn't allow, or neither statistics nor text where needed.
    """
    if heads_per_latent is None:
        joins = (qk or QK_OF[preset]) in JOINING
        together = heads_per_latent_of(teacher.config) if statistics is None else statistics.heads_per_latent
        heads_per_latent = together if joins else 1
    d_qk, d_vo = check_request(
        teacher.config, preset=preset, qk=qk, d_qk=d_qk, d_vo=d_vo, heads_per_latent=heads_per_latent
    )
    if preset != "paper" and statistics is None and ids is None:
        raise UserError(f"preset {preset} is calibrated: give text (--text) or statistics (--stats)")
    qk = qk or QK_OF[preset]
    if qk in ("fold", "pairs-model") and statistics is None:  # their list is chosen for the whole model
        assert ids is not None
        statistics = calibrate(
            teacher, ids, batch_size=batch_size, context=context, heads_per_latent=heads_per_latent, about={}
        )
    if statistics is not None and heads_per_latent not in (1, statistics.heads_per_latent):
        raise UserError(
            f"the statistics are of {statistics.heads_per_latent} KV heads per latent, not of {heads_per_latent}; "
            "calibrate with --heads-per-latent"
        )
    plan = plan_reduction(
        teacher, preset=preset, qk=qk, d_qk=d_qk, d_vo=d_vo, heads_per_latent=heads_per_latent, statistics=statistics
    )
    student = graft(teacher)
    if preset == "paper" or ids is None:
        whole = [layer.self_attn for layer in student.model.layers]
        set_spec(student, plan.spec)
        for index, layer in enumerate(student.model.layers):
            stats = None if statistics is None else statistics.layers[index]
            fill(layer.self_attn, whole[index], *reductions(plan, index, whole[index], stats))
        return student
    return _convert_in_order(student, teacher, plan, ids, batch_size, context)


def check_request(
    config: PreTrainedConfig,
    *,
    preset: Preset,
    qk: QK | None = None,
    d_qk: int | Sequence[int],
    d_vo: int | Sequence[int],
    heads_per_latent: int = 1,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the dims layer by layer; needs no weights, so it can come before loading them.

    Raises:
        UserError: A teacher or dims that can't be.
    """
    check_teacher(config)
    layers, head_dim = config.num_hidden_layers, head_dim_of(config)
    keys, values = ((d,) * layers if isinstance(d, int) else tuple(d) for d in (d_qk, d_vo))
    check_dims(head_dim, keys, values)
    if len(keys) != layers:
        raise UserError(f"d_qk and d_vo must name every one of {layers} layers; got {len(keys)} entries")
    if preset != "best" and len({*zip(keys, values, strict=True)}) > 1:
        raise UserError(f"preset {preset} has the same dims in every layer; different ones need preset best")
    method = qk or QK_OF[preset]
    if method not in ALLOWED[preset]:
        raise UserError(f"preset {preset} can't reduce queries and keys by {method}; {', '.join(ALLOWED[preset])} can")
    if heads_per_latent_of(config, heads_per_latent) > 1 and method not in JOINING:
        raise UserError(f"heads share latents with {' and '.join(JOINING)} only; {method} keeps heads apart")
    if method in SHARED_LIST and len(set(keys)) > 1:
        raise UserError(f"{method} has one frequency list, so every layer the same d_qk; got {sorted(set(keys))}")
    if method in ("stride", "aware"):
        reduce.stride_channels(head_dim, keys[0], "d_qk")
    if method in ("aware", "matched"):
        frequency_aware_exponents(keys[0])
    if method == "matched" and head_dim % (2 * keys[0]):
        raise UserError(f"no pairs own the paper's list unless 2·d_qk divides head_dim {head_dim}; got d_qk {keys[0]}")
    if preset == "paper":
        reduce.stride_channels(head_dim, values[0], "d_vo")
    return keys, values


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is decided for the whole model before its layers are reduced one by one."""

    spec: LatentSpec
    qk: QK
    pairs: Int[Tensor, "pairs"] | None = None
    """The rotary pairs that all heads keep."""
    groups: tuple[tuple[int, int, int], ...] = ()
    """Groups of pairs that are folded, as `reduce.fold` takes them."""

    @property
    def refits_logits(self) -> bool:
        """Whether queries and keys lose something that refitting their maps can give back."""
        return min(self.spec.d_qk) < self.spec.head_dim and self.spec.preset != "paper"


def plan_reduction(
    teacher: PreTrainedModel,
    *,
    preset: Preset,
    qk: QK,
    d_qk: tuple[int, ...],
    d_vo: tuple[int, ...],
    heads_per_latent: int = 1,
    statistics: Statistics | None,
) -> Plan:
    """The spec of a request, and what all layers share: pairs or groups of pairs behind one frequency list."""
    whole = identity_spec(teacher)
    ladder, half, pairs, groups = whole.inv_freq, whole.head_dim // 2, None, list[tuple[int, int, int]]()
    # QK-norm needs all of head_dim, so there the reduction stays a step of its own.
    fields: dict[str, Any] = {"qk_map": "before_rope" if family_of(teacher.config).qk_norm else "folded"}
    if qk in ("stride", "aware"):
        pairs = torch.arange(0, half, whole.head_dim // d_qk[0])
    elif qk == "matched":
        pairs = torch.tensor(frequency_aware_exponents(d_qk[0])) * whole.head_dim // (2 * d_qk[0])
    elif qk == "pairs-model":
        assert statistics is not None
        scores = sum(reduce.pair_scores(x.mean("q"), x.mean("k")).sum(0) for x in statistics.layers)
        assert isinstance(scores, Tensor)
        pairs = scores.topk(d_qk[0] // 2).indices.sort().values
    if qk == "project" or (preset == "best" and min(d_qk) == whole.head_dim):
        after = min(d_qk) < whole.head_dim or heads_per_latent > 1
        fields["qk_map"] = "after_rope" if after else "folded"
    elif qk == "fold":
        assert statistics is not None
        groups, fields["inv_freq"] = reduce.choose_groups(
            [layer.mean("q_unrotated") for layer in statistics.layers],
            [layer.mean("k_unrotated", heads_per_latent=heads_per_latent) for layer in statistics.layers],
            torch.tensor(ladder),
            heads_per_latent * d_qk[0] // 2,
            DISTANCES,
        )
    elif qk == "aware":
        fields["inv_freq"] = _paper_frequencies(teacher, d_qk[0], ladder)
    elif pairs is not None:
        fields["inv_freq"] = [ladder[j] for j in pairs]
    else:
        fields |= {"per_head_frequencies": True, "inv_freq": [*ladder, *([0.0] if qk == "partial" else [])]}
    if preset != "best":
        fields["scale"] = (heads_per_latent * d_qk[0]) ** -0.5
    dims = {"d_qk": d_qk, "d_vo": d_vo, "heads_per_latent": heads_per_latent}
    spec = whole.to_dict() | {"preset": preset} | dims | fields
    return Plan(spec=LatentSpec.from_dict(spec), qk=qk, pairs=pairs, groups=tuple(groups))


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
    plan: Plan, index: int, whole: LatentAttention, stats: LayerStatistics | None
) -> tuple[reduce.QKReduction, reduce.VOReduction]:
    """The head reductions of layer `index` under a plan."""
    spec, kv_heads = plan.spec, whole.kv_heads
    d_qk, d_vo, head_dim = spec.d_qk[index], spec.d_vo[index] * spec.heads_per_latent, spec.head_dim
    if spec.preset == "paper":
        values = reduce.select(reduce.stride_channels(head_dim, d_vo, "d_vo").expand(kv_heads, -1), head_dim)
        vo = reduce.VOReduction(v_map=values, o_map=values.mT)
    else:
        assert stats is not None
        o = stats.mean("o", heads_per_latent=spec.heads_per_latent)
        vo = reduce.value_output_svd(o, whole.o_proj.weight, d_vo, kv_heads=kv_heads)
    qk = _qk_reduction(plan, whole, stats, d_qk)
    if spec.preset != "paper":  # the teacher's logit scale, folded into the queries
        qk = replace(qk, q_map=qk.q_map * (head_dim**-0.5 / spec.scale))
    return qk, vo


def _qk_reduction(plan: Plan, whole: LatentAttention, stats: LayerStatistics | None, d_qk: int) -> reduce.QKReduction:
    spec, head_dim = plan.spec, plan.spec.head_dim
    pairs = plan.pairs
    if spec.preset == "best" and spec.qk_map == "folded" and min(spec.d_qk) == head_dim:
        pairs = torch.arange(head_dim // 2)  # full d_qk: the identity
    if pairs is not None:
        channels = reduce.pair_channels(pairs.expand(whole.kv_heads, -1), head_dim)
        return reduce.keep_channels(channels, head_dim, group_size=whole.group_size)
    assert stats is not None
    q, k = stats.mean("q"), stats.mean("k", heads_per_latent=spec.heads_per_latent)
    if plan.qk == "project":
        return reduce.project(q, k, d_qk * spec.heads_per_latent)
    if plan.qk == "fold":
        k = stats.mean("k_unrotated", heads_per_latent=spec.heads_per_latent)
        return reduce.fold(stats.mean("q_unrotated"), k, list(plan.groups))
    if plan.qk == "partial":
        ladder, scores = torch.tensor(spec.inv_freq[:-1]), reduce.pair_scores(q, k)
        return reduce.partial_rope(
            stats.mean("q_unrotated"), stats.mean("k_unrotated"), scores, ladder, d_qk, DISTANCES
        )
    return reduce.keep_pairs(q, k, d_qk, shared=plan.qk == "pairs-layer")


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
    by_head = whole.o_proj.weight.double().unflatten(1, (whole.q_heads, -1))  # (hidden, q_heads, head_dim)
    heads, together = torch.arange(whole.q_heads), reduced.heads_per_latent
    o_map = vo.o_map.repeat_interleave(whole.q_heads // len(vo.o_map), dim=0).unflatten(2, (together, -1))
    o_map = o_map[heads, :, reduce.own_part(whole.q_heads, whole.kv_heads, together)]  # (q_heads, d_vo, head_dim)
    if reduced.o_map is None:
        reduced.o_proj.weight.copy_(torch.einsum("hcd,xhd->xhc", o_map.to(by_head.device), by_head).flatten(1))
    else:
        reduced.o_map.copy_(o_map)
        reduced.o_proj.weight.copy_(whole.o_proj.weight)
    if reduced.o_proj.bias is not None:
        reduced.o_proj.bias.copy_(whole.o_proj.bias)
    if reduced.q_map is not None and reduced.k_map is not None:
        reduced.q_map.copy_(qk.q_map)
        reduced.k_map.copy_(qk.k_map)
    if reduced.freq_index is not None:
        assert qk.freq_index is not None
        reduced.freq_index.copy_(qk.freq_index)
    return reduced


def turning(position_embeddings: tuple[Tensor, Tensor], freq_index: Tensor | None) -> tuple[Tensor, Tensor]:
    """cos and sin of the ladder, (1, seq, pairs), as each KV head takes them: (1 or kv_heads, seq, pairs)."""
    if freq_index is None:
        return position_embeddings
    cos, sin = (x[0][:, freq_index.to(x.device)].transpose(0, 1) for x in position_embeddings)
    return cos, sin


@torch.no_grad()
def _convert_in_order(
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
    rows_of_batch = [torch.randperm(size, generator=generator)[:of_block].sort().values.to(device) for _ in batches]
    student_states = [student.model.embed_tokens(batch.to(device)).cpu() for batch in batches]
    teacher_states = list(student_states)
    for index, layer in enumerate(tqdm(student.model.layers, unit="layer", desc="convert")):
        whole, original = layer.self_attn, teacher.model.layers[index]
        arguments = [of_batch[index] for of_batch in whole_arguments]

        stats, samples = LayerStatistics(), list[LogitSamples]()
        for state, kwargs, rows in zip(student_states, arguments, rows_of_batch, strict=True):
            x = layer.input_layernorm(state.to(device))
            settings: dict[str, Any] = {"rope_scaling": spec.rope_scaling, "heads_per_latent": spec.heads_per_latent}
            stats.update(whole, x, kwargs, **settings)
            if plan.refits_logits:
                rotated = spec.qk_map == "after_rope"
                samples.append(sample_logits(whole, x, kwargs, rows=rows, rotated=rotated, **settings))
        qk, vo = reductions(plan, index, whole, stats)
        if samples:
            turn = None if spec.qk_map == "after_rope" else turning(from_start, qk.freq_index)
            qk = reduce.rescaled(refit_logits(samples, qk, turn=turn, scale=spec.scale, strength=LOGIT_RIDGE))
        layer.self_attn = LatentAttention(student.config, index, whole, spec)
        fill(layer.self_attn, whole, qk, vo)

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
