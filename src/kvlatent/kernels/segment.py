"""Attention of several queries to one segment of their context, with its log-sum-exp, so that segments can be joined.

On CPUs it is PyTorch's flash attention, forward and backward; elsewhere plain products, whose logits are computed again
for gradients. Memory grows with the context, not with its square, as long as `mask` is given for few queries at a time.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ROWS = 128
"""Queries that are met at a time where logits are held."""

FLASH_DEVICES = {"cpu"}
"""Where PyTorch's flash attention gives its log-sum-exp by an operator that takes all masks."""

Joinable = tuple[Float[Tensor, "batch q_heads _rows d_v"], Float[Tensor, "batch q_heads _rows"]]
"""What a segment gives: mean values under its own softmax, and the log of what that softmax divides by."""


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """Soft-capped logits, cap·tanh(logits / cap); None caps nothing (Gemma 2, arXiv:2408.00118, Section 2)."""
    return logits if cap is None else torch.tanh(logits / cap) * cap


def computed_in(x: Tensor) -> torch.dtype:
    """What products with `x` are computed in: autocast's dtype where that is on, else its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def softmax_beside(
    logits: Float[Tensor, "batch q_heads rows tokens"], sinks: Float[Tensor, "q_heads"] | None
) -> Float[Tensor, "batch q_heads rows tokens"]:
    """Softmax beside each head's learned sink, a logit whose share goes to nothing (gpt-oss, arXiv:2508.10925)."""
    if sinks is None:
        return logits.softmax(-1)
    beside = sinks.to(logits.dtype)[:, None, None].expand(*logits.shape[:3], 1)
    return torch.cat((logits, beside), dim=-1).softmax(-1)[..., :-1]


def sink_segment(sinks: Float[Tensor, "q_heads"], like: Joinable) -> Joinable:
    """Learned sinks as a segment of one token each, whose values are zero."""
    out, normalizer = like
    return torch.zeros_like(out), sinks.to(normalizer.dtype)[:, None].expand_as(normalizer)


def attend_segment(
    q: Float[Tensor, "batch q_heads rows d_k"],
    k: Float[Tensor, "batch heads tokens d_k"],
    v: Float[Tensor, "batch heads tokens d_v"],
    *,
    scale: float,
    cap: float | None = None,
    visible: Bool[Tensor, "mask_batch 1 rows tokens"] | None = None,
    causal: bool = False,
) -> Joinable:
    """Attend to one segment, with gradients of both results; `joined_segments` then joins several.

    Args:
        q: Queries.
        k: Keys of the segment; their heads, and those of the values, divide the queries'.
        v: Values of the segment.
        scale: Multiplier of the logits.
        cap: Their soft cap, which flash attention doesn't know.
        visible: Where queries may look; None is everywhere. A query that sees nothing gets a log-sum-exp so low that
            the segment doesn't count.
        causal: As many queries as tokens, of which each sees its own and those before; without `visible`.
    """
    k, v = (_of_heads(x.to(q.dtype), q.shape[1]) for x in (k, v))
    bias = None if visible is None else _lowest_where(~visible, q.dtype)
    if q.device.type in FLASH_DEVICES and cap is None:
        width = max(k.shape[-1], v.shape[-1])  # flash attention takes one for all, and padding by nothing would copy
        wide = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
        out, normalizer = _Flash.apply(*wide, bias, causal, scale)
        return out[..., : v.shape[-1]], normalizer
    parts = []
    for start in range(0, q.shape[2], ROWS):
        rows = q[:, :, start : start + ROWS]
        met = start + rows.shape[2] if causal else k.shape[2]
        hidden = None if bias is None else bias[:, :, start : start + ROWS]
        if causal:
            hidden = _lowest_where(_later(rows.shape[2], met, q.device), q.dtype)
        run = partial(checkpoint, _plain, use_reentrant=False) if torch.is_grad_enabled() else _plain
        parts.append(run(rows, k[:, :, :met], v[:, :, :met], hidden, scale, cap))
    return stacked_rows(parts)


def stacked_rows(parts: list[Joinable]) -> Joinable:
    """What consecutive queries, some at a time, got from one segment."""
    outs, normalizers = zip(*parts, strict=True)
    return torch.cat(outs, dim=2), torch.cat(normalizers, dim=2)


def joined_segments(parts: list[Joinable]) -> Float[Tensor, "batch q_heads rows d_v"]:
    """The attention to all segments under one softmax, in the dtype of the first."""
    shares = torch.stack([normalizer for _, normalizer in parts]).softmax(0)[..., None]
    out = parts[0][0] * shares[0]
    for (other, _), share in zip(parts[1:], shares[1:], strict=True):
        out = out + other * share
    return out.to(parts[0][0].dtype)


def merged_segments(parts: list[Joinable]) -> Joinable:
    """Several segments as one."""
    if len(parts) == 1:
        return parts[0]
    return joined_segments(parts), torch.stack([normalizer for _, normalizer in parts]).logsumexp(0)


def nothing_seen(like: Joinable, rows: int) -> Joinable:
    """`like` with so many queries before its own that see nothing."""
    out, normalizer = like
    return F.pad(out, (0, 0, rows, 0)), F.pad(normalizer, (rows, 0), value=torch.finfo(normalizer.dtype).min)


def _of_heads(x: Tensor, heads: int) -> Tensor:
    """Keys or values for so many query heads; those that are as many already aren't copied."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _lowest_where(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """A bias of the logits that stands for minus infinity, so that padding, which sees nothing, gives numbers."""
    lowest = torch.finfo(dtype).min / 2
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, lowest)


def _later(rows: int, tokens: int, device: torch.device) -> Bool[Tensor, "1 1 rows tokens"]:
    """What the last rows of the causal triangle don't see."""
    return torch.ones(rows, tokens, dtype=torch.bool, device=device).triu(1 + tokens - rows)[None, None]


def _plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, cap: float | None) -> Joinable:
    logits = capped((q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * scale, cap)
    if bias is not None:
        logits = logits + bias
    normalizer = logits.logsumexp(-1)
    return (logits - normalizer[..., None]).exp().to(v.dtype) @ v, normalizer


class _Flash(torch.autograd.Function):
    """PyTorch's flash attention on CPUs, whose log-sum-exp also takes a gradient.

    A logit's gradient is p·(dO·v - dO·O + dL), with p its probability, O the output, L the log-sum-exp. The library's
    backward pass knows the first two terms; one more column, of ones in dO, of zeros in v and of -dL in O, adds the
    third.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, normalizer = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=bias, scale=scale
        )
        ctx.save_for_backward(q, k, v, bias, out, normalizer)
        ctx.causal, ctx.scale = causal, scale
        return out, normalizer

    @staticmethod
    def backward(ctx, d_out: Tensor, d_normalizer: Tensor) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        q, k, v, bias, out, normalizer = ctx.saved_tensors
        d_out = torch.cat((d_out, torch.ones_like(d_out[..., :1])), dim=-1)
        out = torch.cat((out, -d_normalizer[..., None].to(out.dtype)), dim=-1)
        wide = (F.pad(x, (0, 1)) for x in (q, k, v))
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_out, *wide, out, normalizer, 0.0, ctx.causal, attn_mask=bias, scale=ctx.scale
        )
        return *(x[..., :-1] for x in gradients), None, None, None
