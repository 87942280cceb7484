"""The front of all kernels: attention with d_qk and d_vo independent, and the choice of how it is computed.

What a model calls is `latent_attention`; device, dtypes, mask and number of queries choose the path (`choose_path`).
`docs/kernels.md` says how the kernels behind it work, how they are tested, and how to extend them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from kvlatent.kernels import cpu_decode, cuda_decode
from kvlatent.kernels.codes import Codes
from kvlatent.kernels.segment import attend_segment, capped, joined_segments, sink_segment

READ_AT_ONCE = 1024
"""Tokens whose codes are read at a time where no kernel reads them: no buffer of the context's length may exist."""


def latent_attention(
    q: Float[Tensor, "batch q_heads q_len d_qk"],
    k: Float[Tensor, "batch key_heads kv_len d_qk"],
    v: Float[Tensor, "batch value_heads kv_len d_vo"],
    *,
    scale: float,
    cap: float | None = None,
    sinks: Float[Tensor, "q_heads"] | None = None,
    mask: Bool[Tensor, "mask_batch 1 q_len kv_len"] | Float[Tensor, "mask_batch 1 q_len kv_len"] | None = None,
) -> Float[Tensor, "batch q_heads q_len d_vo"]:
    """Attend causally with grouped heads (KV-Latent, arXiv:2507.11273, Eq. 1), d_qk and d_vo independent.

    Args:
        q: Rotated queries.
        k: Rotated keys, as cached; for several queries, their heads and those of the values need not be as many.
        v: Values, as cached.
        scale: Logit multiplier; the paper uses `d_qk ** -0.5`, our presets keep the teacher's `head_dim ** -0.5`.
        cap: Soft cap of the logits; none of `PATHS` knows one, so torch computes them.
        sinks: A learned logit of each head that shares its softmax and has no value.
        mask: True (or 0.0) where a query may look, False (or -inf) elsewhere. Without one, a single query sees all
            keys and several see the causal triangle.

    Returns:
        Per-head outputs before `o_proj`, in the dtype and device of `q`.

    Raises:
        ValueError: `q_heads` is not a multiple of `key_heads` and `value_heads`.
    """
    for x in (k, v):
        if q.shape[1] % x.shape[1]:
            raise ValueError(f"{q.shape[1]} query heads can't share {x.shape[1]} key/value heads evenly")
    if cap is not None or sinks is not None:
        return _as_segment(q, k, v, scale=scale, cap=cap, sinks=sinks, mask=mask)
    if torch.compiler.is_compiling() and own_kernel(q, k, v, mask) is not None:
        return _opaque(q, k, v, scale, mask)
    return PATHS[choose_path(q, k, v, mask)](q, k, v, scale=scale, mask=mask)


def choose_path(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str:
    """Name the path of `PATHS` that fits phase, device, dtypes, kind of mask, and whether gradients are wanted.

    | phase | device | when | path |
    |---|---|---|---|
    | decode (one query) | CPU | no gradients, float32, bfloat16 or float16 cache, boolean mask or none | `kernel` |
    | decode | CUDA | likewise | `triton` |
    | decode | any | otherwise, and where llvmlite or Triton is missing | `grouped` |
    | prefill, training, several queries | any | always | `flash` |
    """
    own = own_kernel(q, k, v, mask)
    if own is not None and own[1].available():
        return own[0]
    return "flash" if q.shape[2] > 1 else "grouped"


def own_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[str, Any] | None:
    """Path and module of the decode kernel that takes these tensors, whether it is available here or not."""
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if q.shape[2] > 1 or gradients or (mask is not None and mask.dtype != torch.bool):
        return None
    path, home = OWN_KERNELS.get(q.device.type, ("grouped", None))
    return (path, home) if home is not None and k.dtype in home.STORED and v.dtype in home.STORED else None


Part = tuple[
    Float[Tensor, "batch q_heads 1 d_vo"], Float[Tensor, "batch q_heads 1 1"], Float[Tensor, "batch q_heads 1 1"]
]
"""What a segment of a context gives a query: output (batch, q_heads, 1, d_vo), largest logit times
log2(e) and sum of the weights relative to it, both (batch, q_heads, 1, 1)."""


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | None,
    cap: float | None = None,
    codes: tuple[Codes, Codes] | None = None,
    means: tuple[Tensor, Tensor] | None = None,
) -> Part:
    """Attend with one query per sequence to one segment of its context; `merged` then joins the segments.

    Args:
        q: Rotated queries, (batch, q_heads, 1, d_qk).
        k: Keys of the segment, in any order, (batch, heads, tokens, d_qk).
        v: Values, likewise.
        scale: Logit multiplier.
        mask: True where a query may look; None is everywhere.
        cap: Soft cap of the logits; no kernel knows one, so torch computes them.
        codes: What rows of keys and values are, if not numbers.
        means: What was taken from all keys and values before they became codes, (heads, 1, d_qk) and (heads, 1, d_vo).
    """
    own = cap is None and (codes is not None or own_kernel(q, k, v, mask) is not None)
    if own and torch.compiler.is_compiling():
        groups = ([], []) if codes is None else ([n for pair in x.groups for n in pair] for x in codes)
        return _with_means(_opaque_segment(q, k, v, scale, mask, *groups), q, means, scale)
    if codes is not None:
        return _coded_segment(q, k, v, scale, mask, codes, means, cap)
    return _segment(q, k, v, scale, mask, cap)


def merged(
    near: Part, far: Part, far_bias: Float[Tensor, "q_heads 1"] | None = None
) -> Float[Tensor, "batch q_heads 1 d_vo"]:
    """The attention over two segments under one softmax, from what each gave alone; the bias is of far logits."""
    (out, top, weight), (far_out, far_top, far_weight) = near, far
    odds = (far_top - top) * math.log(2) + (far_weight / weight).log()
    odds = odds if far_bias is None else odds + far_bias[:, None]
    share = torch.sigmoid(odds).nan_to_num(0.0)  # of nothing, 0
    return torch.lerp(out.to(share.dtype), far_out.to(share.dtype), share).to(out.dtype)


def merged_parts(parts: Sequence[Part]) -> Part:
    """What several segments would give as one."""
    top = torch.stack([largest for _, largest, _ in parts]).amax(0)
    finite = top.clamp_min(torch.finfo(torch.float32).min)
    shares = [weight * torch.exp2(largest - finite) for _, largest, weight in parts]
    total = torch.stack(shares).sum(0)
    least = total.clamp_min(torch.finfo(torch.float32).tiny)
    out = torch.stack([part * (share / least) for (part, _, _), share in zip(parts, shares, strict=True)]).sum(0)
    return out.to(parts[0][0].dtype), top, total


def with_sinks(part: Part, sinks: Float[Tensor, "q_heads"] | None) -> Part:
    """A segment and the learned sinks as one."""
    if sinks is None:
        return part
    out, largest, weight = part
    top = (sinks.to(largest.dtype) * math.log2(math.e))[:, None, None].expand_as(largest)
    return merged_parts([part, (torch.zeros_like(out), top, torch.ones_like(weight))])


def _segment(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, cap: float | None = None) -> Part:
    own = own_kernel(q, k, v, mask) if cap is None else None
    if own is not None and own[1].available():
        return own[1].decode_segment(q, k, v, scale=scale, mask=mask)
    batch, q_heads, _, d_qk = q.shape
    logits = (q.view(batch, k.shape[1], -1, d_qk) @ k.mT).to(torch.promote_types(q.dtype, torch.float32))
    logits = capped(logits * scale, cap) * math.log2(math.e)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    if k.shape[2] == 0:
        logits = logits.new_full((*logits.shape[:3], 1), -torch.inf)
        v = v.new_zeros(*v.shape[:2], 1, v.shape[3])
    largest = logits.amax(-1, keepdim=True)
    weights = torch.exp2(logits - largest.clamp_min(torch.finfo(torch.float32).min))
    weight = weights.sum(-1, keepdim=True)
    out = (weights / weight.clamp_min(torch.finfo(torch.float32).tiny)).to(v.dtype) @ v
    return tuple(x.view(batch, q_heads, 1, -1) for x in (out, largest, weight))  # type: ignore[return-value]


def _coded_segment(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None,
    codes: tuple[Codes, Codes],
    means: tuple[Tensor, Tensor] | None = None,
    cap: float | None = None,
) -> Part:
    """Read by a kernel as they are, or as numbers of a few tokens at a time."""
    own = own_kernel(q, q, q, mask) if cap is None else None
    if own is not None and own[1].available():
        if own[1] is cpu_decode:
            return cpu_decode.decode_segment(q, k, v, scale=scale, mask=mask, codes=codes, means=means)
        return _with_means(own[1].decode_segment(q, k, v, scale=scale, mask=mask, codes=codes), q, means, scale)
    parts = []
    for start in range(0, max(1, k.shape[2]), READ_AT_ONCE):
        keys, values = (
            x.decode(rows[:, :, start : start + READ_AT_ONCE], q.dtype) for x, rows in zip(codes, (k, v), strict=True)
        )
        if cap is not None and means is not None:  # a cap is of whole logits
            keys, values = keys + means[0], values + means[1]
        seen = None if mask is None else mask[..., start : start + READ_AT_ONCE]
        parts.append(_segment(q, keys, values, scale, seen, cap))
    return _with_means(merged_parts(parts), q, None if cap is not None else means, scale)


def _with_means(part: Part, q: Tensor, means: tuple[Tensor, Tensor] | None, scale: float) -> Part:
    """What codes leave out: a query's product with the mean key in all logits, the mean value in the output."""
    if means is None:
        return part
    out, largest, weight = part
    by_latent = q.unflatten(1, (means[0].shape[0], -1)).flatten(2, 3)  # (batch, latents, group, latent)
    beside = (by_latent @ means[0].mT).view_as(largest)
    largest = largest + beside.to(largest.dtype) * (scale * math.log2(math.e))
    out = (out.reshape(*by_latent.shape[:3], -1) + means[1]).view_as(out)
    return out, largest, weight


@torch.library.custom_op(
    "kvlatent::decode_segment",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, float scale, Tensor? mask, int[] k_groups, int[] v_groups) "
    "-> (Tensor, Tensor, Tensor)",
)
def _opaque_segment(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, k_groups: list[int], v_groups: list[int]
) -> Part:
    """A segment's decode kernel as one node of a graph that torch.compile makes; groups are dims and bits in turns."""
    codes = _codes_of(k_groups, v_groups)
    part = _segment(q, k, v, scale, mask) if codes is None else _coded_segment(q, k, v, scale, mask, codes)
    out, largest, weight = part
    return out, largest.clone(), weight.clone()  # kernels give both in one tensor, which a node must not


def _codes_of(k_groups: list[int], v_groups: list[int]) -> tuple[Codes, Codes] | None:
    keys, values = (Codes(tuple(zip(x[::2], x[1::2], strict=True))) for x in (k_groups, v_groups))
    return (keys, values) if k_groups else None


@_opaque_segment.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, k_groups: list[int], v_groups: list[int]
) -> Part:
    one = q.new_empty(*q.shape[:3], 1, dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(*q.shape[:3], sum(v_groups[::2]) or v.shape[-1]), one, torch.empty_like(one)


@torch.library.custom_op(
    "kvlatent::decode_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, float scale, Tensor? mask) -> Tensor",
)
def _opaque(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """A decode kernel as one node of a graph that torch.compile makes; it can't look inside."""
    return PATHS[choose_path(q, k, v, mask)](q, k, v, scale=scale, mask=mask)


@_opaque.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[-1])


def _as_segment(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, cap: float | None, sinks: Tensor | None, mask: Tensor | None
) -> Tensor:
    """What no fused attention computes: all of the context as one segment, beside which sinks are another."""
    visible = mask if mask is None or mask.dtype == torch.bool else mask == 0
    if q.shape[2] == 1:
        return with_sinks(segment_attention(q, k, v, scale=scale, mask=visible, cap=cap), sinks)[0]
    if mask is None:
        k, v = k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
    part = attend_segment(q, k, v, scale=scale, cap=cap, visible=visible, causal=mask is None)
    return part[0] if sinks is None else joined_segments([part, sink_segment(sinks, part)])


def _grouped(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None) -> Tensor:
    """One query: read the cache once per KV head instead of repeating it per query head."""
    batch, q_heads, _, d_qk = q.shape
    grouped = q.view(batch, k.shape[1], -1, d_qk)
    logits = (grouped @ k.transpose(-1, -2)).float() * scale  # (batch, kv_heads, group, kv_len)
    if mask is not None:
        logits = torch.where(mask, logits, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return (logits.softmax(-1).to(v.dtype) @ v).view(batch, q_heads, 1, -1)


def _flash(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None) -> Tensor:
    """PyTorch's flash attention, which wants equal dims: zeros change nothing."""
    d_qk, d_vo = q.shape[-1], v.shape[-1]
    if mask is None:  # of a longer buffer, no query sees what is behind the last one
        k, v = k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) if q.shape[1] > x.shape[1] else x for x in (k, v))
    width = max(d_qk, d_vo)
    if q.device.type == "cuda":
        width = -(-width // 8) * 8  # other widths fall to a path that holds all logits
    q, k, v = (F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out[..., :d_vo]


OWN_KERNELS: dict[str, tuple[str, Any]] = {"cpu": ("kernel", cpu_decode), "cuda": ("triton", cuda_decode)}
"""Path of the decode kernel by device, and its module."""
PATHS = {
    "kernel": cpu_decode.decode_attention,
    "triton": cuda_decode.decode_attention,
    "grouped": _grouped,
    "flash": _flash,
}
"""Ways to compute the same attention."""
