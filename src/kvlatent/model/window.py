"""Attention that meets the newest tokens whole and all others through latents, under one softmax.

A query at position t meets the tokens t - window + 1 … t, and the first `sinks` of its sequence, with the teacher's own
keys and values; every other one through the maps: q·q_map against k' = k·k_map, and v' = v·v_map, which `o_map` takes
back to head_dim. Logits of both kinds share one softmax, so a context of at most window + sinks tokens is the
teacher's to the last bit of rounding. Tokens are counted by column: the place in the sequence of the cache, padding
included, which distances don't see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kvlatent.kernels.attention import merged, segment_attention

ROWS = 128
"""Queries that meet their keys at a time: memory grows with the context, not with its square."""


class Near(NamedTuple):
    """Tokens that are met whole; without any, all are far."""

    window: int = 0
    """Newest tokens, the query's own included."""
    sinks: int = 0
    """First tokens of a sequence."""

    def far(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Whether a query at each of `rows` meets each of `columns` through latents, (rows, columns)."""
        return (rows[:, None] - columns >= self.window) & (columns >= self.sinks)


ALL_FAR = Near()
"""No window: every token goes through latents."""


class FarMaps(NamedTuple):
    """How one layer's far tokens are reduced: all maps after RoPE."""

    q: Float[Tensor, "q_heads head_dim latent"]
    k: Float[Tensor, "latents joined latent"]
    v: Float[Tensor, "latents joined latent_v"]
    o: Float[Tensor, "q_heads latent_v head_dim"]

    def of(self, dtype: torch.dtype) -> FarMaps:
        """The same in another dtype."""
        return FarMaps(q=self.q.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype), o=self.o.to(dtype))

    def reduced(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of whole keys and values, (batch, kv_heads, seq, head_dim) → (batch, latents, seq, latent)."""
        return joined(k, len(self.k)) @ self.k, joined(v, len(self.v)) @ self.v


def joined(x: Float[Tensor, "batch heads seq dim"], latents: int) -> Float[Tensor, "batch latents seq joined"]:
    """Keys or values of the heads that share a latent, side by side."""
    if x.shape[1] == latents:
        return x
    return x.unflatten(1, (latents, -1)).transpose(2, 3).flatten(3)


@dataclass(frozen=True, kw_only=True)
class Whole:
    """Keys and values as the teacher has them: a run of columns, and the sinks."""

    k: Float[Tensor, "batch kv_heads run head_dim"]
    v: Float[Tensor, "batch kv_heads run head_dim"]
    start: int
    """The column of the first."""
    sink_k: Float[Tensor, "batch kv_heads sinks head_dim"]
    sink_v: Float[Tensor, "batch kv_heads sinks head_dim"]
    sink_columns: Int[Tensor, "sink_batch sinks"]
    """Where the sinks of each sequence stand; the number of all columns stands for none."""


@dataclass(frozen=True, kw_only=True)
class Far:
    """Latents of a run of columns."""

    k: Float[Tensor, "batch latents run latent"]
    v: Float[Tensor, "batch latents run latent_v"]
    start: int
    """The column of the first."""


class Segment(NamedTuple):
    """All that the only query of a decode step meets of one kind, in any order."""

    k: Float[Tensor, "batch heads tokens dim"]
    v: Float[Tensor, "batch heads tokens dim_v"]
    mask: Bool[Tensor, "mask_batch 1 1 tokens"] | None
    """What of it is visible; None is all."""


NOWHERE = torch.iinfo(torch.long).max
"""The column of a sink that hasn't come yet."""


def next_sinks(
    known: Int[Tensor, "known_batch sinks"], own: Bool[Tensor, "own_batch new"], start: int | Tensor
) -> Int[Tensor, "sink_batch sinks"]:
    """Columns of the sinks of each sequence, `NOWHERE` for those to come, after new tokens at the columns from `start`.

    Args:
        known: The same before them.
        own: Whether each new token is part of its sequence, rather than padding.
        start: The column of the first.
    """
    batch, sinks = max(len(known), len(own)), known.shape[1]
    index = own.cumsum(-1) - 1 + (known < NOWHERE).sum(-1, keepdim=True)
    index = torch.where(own & (index < sinks), index, sinks)  # what is no sink goes to a place that is cut off
    columns = torch.arange(own.shape[1], device=own.device) + start
    places = F.pad(known, (0, 1), value=NOWHERE).expand(batch, -1)
    return places.scatter(1, index.expand(batch, -1), columns.expand(batch, -1))[:, :sinks]


def sinks_of(
    k: Tensor, v: Tensor, mask: Bool[Tensor, "mask_batch 1 seq seq"] | None, sinks: int
) -> tuple[Tensor, Tensor, Int[Tensor, "sink_batch found"]]:
    """Keys, values and columns of the first tokens of every sequence, or of every document packed into it.

    A document begins at a token that sees itself alone.
    """
    seq = k.shape[2]
    if mask is None:
        columns = torch.arange(min(sinks, seq), device=k.device)[None]
        return k[:, :, :sinks], v[:, :, :sinks], columns
    seen = mask[:, 0]
    own = seen.diagonal(dim1=1, dim2=2)
    count = own.cumsum(-1)
    before = torch.where(own & (seen.sum(-1) == 1), count - 1, 0).cummax(-1).values  # tokens of earlier documents
    is_sink = own & (count - before <= sinks)
    columns = torch.where(is_sink, torch.arange(seq, device=k.device), seq).sort(-1).values
    columns = columns[:, : int(is_sink.sum(-1).max())]
    return gathered(k, columns), gathered(v, columns), columns


def gathered(x: Float[Tensor, "batch heads seq dim"], columns: Int[Tensor, "sink_batch found"]) -> Tensor:
    """Rows of `x` at each sequence's columns; what lies outside gives any row."""
    index = columns.clamp(0, x.shape[2] - 1)[:, None, :, None].expand(x.shape[0], x.shape[1], -1, x.shape[3])
    return x.gather(2, index)


def at_columns(mask: Bool[Tensor, "mask_batch 1 rows seq"], columns: Int[Tensor, "sink_batch found"]) -> Tensor:
    """What rows of a mask say of each sequence's columns; those that lie outside give anything."""
    batch = max(len(mask), len(columns))
    index = columns.clamp(0, mask.shape[-1] - 1)[:, None, None].expand(batch, 1, mask.shape[2], -1)
    return mask.expand(batch, -1, -1, -1).gather(3, index)


def windowed_attention(
    q: Float[Tensor, "batch q_heads seq head_dim"],
    whole: Whole,
    far: Far,
    maps: FarMaps,
    *,
    window: int,
    scale: float,
    mask: Bool[Tensor, "mask_batch 1 seq columns"] | None,
    unabsorbed: bool = False,
) -> Float[Tensor, "batch q_heads seq head_dim"]:
    """Attend causally with several queries, which stand at the last columns.

    Args:
        q: Rotated queries, whole.
        whole: Keys and values of a run that ends at the last column and begins at or before the first query's window.
        far: Latents from some column to at least the last that has left the last query's window.
        maps: Of the layer.
        window: Newest tokens that a query meets whole, itself included.
        scale: Logit multiplier.
        mask: True where a query may look, over all columns; None is the causal triangle.
        unabsorbed: Take latents back to the heads, instead of queries to the latents: less arithmetic for many queries.


    Returns:
        Per-head outputs before `o_proj`, in the dtype and device of `q`.
    """
    queries = q.shape[2]
    columns = whole.start + whole.k.shape[2]
    first_query = columns - queries
    flags = torch.zeros(len(whole.sink_columns), columns + 1, dtype=torch.bool, device=q.device)
    flags = flags.scatter_(1, whole.sink_columns, True)[:, None, None, :columns]
    if unabsorbed:  # (batch, q_heads, run, head_dim)
        by_head = len(maps.q) // far.k.shape[1]
        far_k = far.k.repeat_interleave(by_head, dim=1) @ maps.q.mT
        far_v = far.v.repeat_interleave(by_head, dim=1) @ maps.o
    else:
        far_k, far_v = far.k, far.v

    def part(rows: Tensor, *held: Tensor, start: int, end: int) -> Tensor:
        """Queries from `start` to `end`; `held` are arguments, so that recomputing knows what gradients go to."""
        k, v, sink_k, sink_v, far_k, far_v, q_map, o_map = held
        at = torch.arange(first_query + start, first_query + end, device=q.device)[:, None]
        visible = None if mask is None else mask[:, :, start:end]
        low, high = max(whole.start, first_query + start - window + 1), first_query + end
        last = max(far.start, high - window)
        band, beyond = (torch.arange(*run, device=q.device) for run in ((low, high), (far.start, last)))
        inside, outside = slice(low - whole.start, high - whole.start), slice(0, last - far.start)
        seen = [(at >= band) & (at - band < window), (at - beyond >= window) & ~flags[..., far.start : last]]
        if visible is not None:
            seen = [
                x & visible[..., run] for x, run in zip(seen, (slice(low, high), slice(far.start, last)), strict=True)
            ]
        left = (at - whole.sink_columns[:, None, None] >= window) & (whole.sink_columns < columns)[:, None, None]
        if visible is not None:
            left = left & at_columns(visible, whole.sink_columns)
        logits = [
            _logits(rows, k[:, :, inside]).masked_fill_(~seen[0], _LOWEST),
            _logits(rows, sink_k).masked_fill_(~left, _LOWEST),
            _logits(rows if unabsorbed else rows @ q_map, far_k[:, :, outside]).masked_fill_(~seen[1], _LOWEST),
        ]
        with torch.no_grad():  # what all logits are less by changes nothing
            top = torch.stack([x.amax(-1, keepdim=True) for x in logits if x.shape[-1]]).amax(0)
        weights = [(x - top).exp_() for x in logits]
        total = torch.stack([x.sum(-1, keepdim=True) for x in weights]).sum(0)
        near, sink, through = (
            _weighted(x.to(q.dtype), held)
            for x, held in zip(weights, (v[:, :, inside], sink_v, far_v[:, :, outside]), strict=True)
        )
        out = near + sink + (through if unabsorbed else through @ o_map)
        return (out / total).to(q.dtype)

    held = (whole.k, whole.v, whole.sink_k, whole.sink_v, far_k, far_v, maps.q, maps.o)
    parts = []
    for start in range(0, queries, ROWS):
        end = min(start + ROWS, queries)
        rows = q[:, :, start:end] * scale
        if torch.is_grad_enabled() and queries > ROWS:
            parts.append(checkpoint(part, rows, *held, start=start, end=end, use_reentrant=False))
        else:
            parts.append(part(rows, *held, start=start, end=end))
    return torch.cat(parts, dim=2)


_LOWEST = torch.finfo(torch.float32).min
"""Stands for minus infinity, so that padding, which sees nothing, gives numbers."""


def _logits(
    q: Float[Tensor, "batch q_heads rows dim"], k: Float[Tensor, "batch heads tokens dim"]
) -> Float[Tensor, "batch q_heads rows tokens"]:
    """Products of queries and keys of their group, unscaled, in float32 or better."""
    grouped = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)
    exact = torch.promote_types(q.dtype, torch.float32)
    return (grouped @ k.mT).to(exact).unflatten(2, (-1, q.shape[2])).flatten(1, 2)


def _weighted(
    probs: Float[Tensor, "batch q_heads rows tokens"], v: Float[Tensor, "batch heads tokens dim"]
) -> Float[Tensor, "batch q_heads rows dim"]:
    grouped = probs.unflatten(1, (v.shape[1], -1)).flatten(2, 3)
    return (grouped @ v).unflatten(2, (-1, probs.shape[2])).flatten(1, 2)


def decode(
    q: Float[Tensor, "batch q_heads 1 head_dim"], near: Segment, far: Segment, maps: FarMaps, *, scale: float
) -> Float[Tensor, "batch q_heads 1 head_dim"]:
    """Attend with one query per sequence to what is whole and what is not, both in any order."""
    whole = segment_attention(q, near.k, near.v, scale=scale, mask=near.mask)
    if far.k.shape[2] == 0:
        return whole[0]
    out, largest, weight = segment_attention(q @ maps.q, far.k, far.v, scale=scale, mask=far.mask)
    return merged([whole, (out @ maps.o, largest, weight)])
