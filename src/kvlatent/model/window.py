"""Attention that meets the newest tokens whole and all others through latents, under one softmax.

A query at position t meets the tokens t - window + 1 … t, and the first `sinks` of its sequence, with the teacher's own
keys and values; every other one through the maps: q·q_map against k' = k·k_map, and v' = v·v_map, which `o_map` takes
back to head_dim. Logits of both kinds share one softmax, so a context of at most window + sinks tokens is the
teacher's to the last bit of rounding. Tokens are counted by column: the place in the sequence of the cache, padding
included, which distances don't see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from kvlatent.kernels import cpu_step
from kvlatent.kernels.attention import READ_AT_ONCE, merged, segment_attention, with_sinks
from kvlatent.kernels.segment import (
    ROWS,
    Joinable,
    attend_segment,
    joined_segments,
    merged_segments,
    nothing_seen,
    sink_segment,
    stacked_rows,
)
from kvlatent.model.far_maps import FarMaps, mapped


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


def to_heads(
    x: Float[Tensor, "batch latents seq latent"], back: Float[Tensor, "q_heads latent head_dim"]
) -> Float[Tensor, "batch q_heads seq head_dim"]:
    """What every query head meets of its latent."""
    by_latent = back.to(x.dtype).unflatten(0, (x.shape[1], -1)).transpose(1, 2)  # (latents, latent, group, head_dim)
    return (x @ by_latent.flatten(2)).unflatten(3, by_latent.shape[2:]).permute(0, 1, 3, 2, 4).flatten(1, 2)


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
    sinks_first: bool
    """Whether they are the first columns of all sequences."""


@dataclass(frozen=True, kw_only=True)
class Far:
    """Latents of a run of columns, or their codes."""

    k: Shaped[Tensor, "batch latents run latent"]
    v: Shaped[Tensor, "batch latents run latent_v"]
    start: int
    """The column of the first."""

    def blocks(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Columns as runs; codes are read so many at a time, so that no buffer of the context's length exists."""
        step = READ_AT_ONCE if self.k.dtype == torch.uint8 else max(1, end - start)
        for first in range(start, end, step):
            yield first, min(first + step, end)

    def columns(self, start: int, end: int, maps: FarMaps, unabsorbed: bool) -> tuple[Tensor, Tensor]:
        """Keys and values at some columns: latents, or those of the heads, (batch, q_heads, run, head_dim)."""
        k, v = maps.read(*(x[:, :, start - self.start : end - self.start] for x in (self.k, self.v)))
        if not unabsorbed:
            return k, v
        return to_heads(k, maps.q.mT), to_heads(v, maps.o)


class Segment(NamedTuple):
    """All that the only query of a decode step meets of one kind, in any order: numbers, or rows of codes."""

    k: Shaped[Tensor, "batch heads tokens dim"]
    v: Shaped[Tensor, "batch heads tokens dim_v"]
    mask: Bool[Tensor, "mask_batch 1 1 tokens"] | None
    """What of it is visible; None is all."""


NOWHERE = 1 << 62
"""The column of a sink that hasn't come yet; a power of two, since padding takes its value as a float."""


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


def gathered(x: Shaped[Tensor, "batch heads seq dim"], columns: Int[Tensor, "sink_batch found"]) -> Tensor:
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
    cap: float | None = None,
    learned_sinks: Float[Tensor, "q_heads"] | None = None,
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
        cap: Soft cap of the logits.
        learned_sinks: A logit of each head that shares its softmax and has no value.
        mask: True where a query may look, over all columns; None is the causal triangle.
        unabsorbed: Take latents back to the heads, instead of queries to the latents: less arithmetic for many queries.

    Returns:
        Per-head outputs before `o_proj`, in the dtype and device of `q`.
    """
    queries = q.shape[2]
    columns = whole.start + whole.k.shape[2]
    tokens = _Tokens(first=columns - queries, columns=columns, window=window, visible=mask)
    far_q = q if unabsorbed else q @ maps.q
    met = partial(far.columns, maps=maps, unabsorbed=unabsorbed)
    attend = partial(attend_segment, scale=scale, cap=cap)
    beyond = (_triangle if mask is None and whole.sinks_first else _beyond)(far_q, far, met, whole, tokens, attend)
    if beyond is not None and not unabsorbed:
        beyond = beyond[0] @ maps.o, beyond[1]
    if beyond is not None and maps.bias is not None:
        beyond = beyond[0], beyond[1] + maps.bias
    band = _band(q, whole, tokens, attend)
    without_value = None if learned_sinks is None else sink_segment(learned_sinks, band)
    parts = band, _sinks(q, whole, tokens, attend), beyond, without_value
    return joined_segments([part for part in parts if part is not None])


@dataclass(frozen=True, kw_only=True)
class _Tokens:
    """Which columns a block of queries, at the last columns, stands at and may look at."""

    first: int
    """Column of the first query."""
    columns: int
    window: int
    visible: Bool[Tensor, "mask_batch 1 seq columns"] | None

    def rows(self) -> Iterator[slice]:
        """Some queries at a time, since masks take as much memory as logits."""
        count = self.columns - self.first
        for start in range(0, count, ROWS):
            yield slice(start, min(start + ROWS, count))

    def of(self, rows: slice, like: Tensor) -> Int[Tensor, "rows 1"]:
        """The columns of some queries."""
        return torch.arange(self.first + rows.start, self.first + rows.stop, device=like.device)[:, None]


Attend = Callable[..., Joinable]
"""`attend_segment` with the layer's scale and cap."""


def _band(q: Tensor, whole: Whole, tokens: _Tokens, attend: Attend) -> Joinable:
    """The newest tokens of every query, itself included."""
    parts = []
    for rows in tokens.rows():
        low, high = max(whole.start, tokens.first + rows.start - tokens.window + 1), tokens.first + rows.stop
        at, run = tokens.of(rows, q), torch.arange(low, high, device=q.device)
        seen = ((at >= run) & (at - run < tokens.window))[None, None]
        if tokens.visible is not None:
            seen = seen & tokens.visible[:, :, rows, low:high]
        k, v = (x[:, :, low - whole.start : high - whole.start] for x in (whole.k, whole.v))
        parts.append(attend(q[:, :, rows], k, v, visible=seen))
    return stacked_rows(parts)


def _sinks(q: Tensor, whole: Whole, tokens: _Tokens, attend: Attend) -> Joinable | None:
    """The first tokens, where they have left the window."""
    if whole.sink_k.shape[2] == 0 or tokens.columns <= tokens.window:
        return None
    at = tokens.of(slice(0, tokens.columns - tokens.first), q)
    columns = whole.sink_columns
    seen = (at - columns[:, None, None] >= tokens.window) & (columns < tokens.columns)[:, None, None]
    if tokens.visible is not None:
        seen = seen & at_columns(tokens.visible, columns)
    return attend(q, whole.sink_k, whole.sink_v, visible=seen)


Met = Callable[[int, int], tuple[Tensor, Tensor]]
"""Keys and values of far tokens by the columns at which they begin and end."""


def _triangle(q: Tensor, far: Far, met: Met, whole: Whole, tokens: _Tokens, attend: Attend) -> Joinable | None:
    """What has left the window and is no sink, without a mask."""
    start, end = max(far.start, whole.sink_k.shape[2]), tokens.columns - tokens.window
    if start >= end:
        return None
    before = end - start - q.shape[2]  # what every query sees, or, below zero, how many queries see nothing
    if before < 0:
        return nothing_seen(attend(q[:, :, -before:], *met(start, end), causal=True), -before)
    newest = attend(q, *met(start + before, end), causal=True)
    oldest = [attend(q, *met(*run)) for run in far.blocks(start, start + before)]
    return merged_segments([*oldest, newest])


def _beyond(q: Tensor, far: Far, met: Met, whole: Whole, tokens: _Tokens, attend: Attend) -> Joinable | None:
    """What has left the window and is no sink, under a mask."""
    flags = torch.zeros(len(whole.sink_columns), tokens.columns + 1, dtype=torch.bool, device=q.device)
    flags = flags.scatter_(1, whole.sink_columns, True)[:, None, None]
    parts, skipped = [], 0
    for rows in tokens.rows():
        end = tokens.first + rows.stop - tokens.window
        if end <= far.start:  # the first queries have nothing that is far
            skipped = rows.stop
            continue
        at, blocks = tokens.of(rows, q), []
        for low, high in far.blocks(far.start, end):
            seen = (at - torch.arange(low, high, device=q.device) >= tokens.window) & ~flags[..., low:high]
            if tokens.visible is not None:
                seen = seen & tokens.visible[:, :, rows, low:high]
            blocks.append(attend(q[:, :, rows], *met(low, high), visible=seen))
        parts.append(merged_segments(blocks))
    return nothing_seen(stacked_rows(parts), skipped) if parts else None


def decode(
    q: Float[Tensor, "batch q_heads 1 head_dim"],
    near: Segment,
    far: Segment,
    maps: FarMaps,
    *,
    scale: float,
    cap: float | None = None,
    learned_sinks: Float[Tensor, "q_heads"] | None = None,
) -> Float[Tensor, "batch q_heads 1 head_dim"]:
    """Attend with one query per sequence to what is whole and what is not, both in any order."""
    means = None if maps.k_mean is None or maps.v_mean is None else (maps.k_mean, maps.v_mean)
    softmax: dict[str, Any] = {"codes": maps.codes, "means": means, "scale": scale}
    near_codes = None if maps.near_codes is None else (maps.near_codes, maps.near_codes)
    numbers = (near.k, near.v) if near_codes is None else ()
    if cap is None and learned_sinks is None and far.k.shape[2] and cpu_step.fits(q, maps.q, maps.o, *numbers):
        return cpu_step.attend(q, near, far, (maps.q, maps.o), bias=maps.bias, near_codes=near_codes, **softmax)
    whole = segment_attention(q, near.k, near.v, scale=scale, mask=near.mask, cap=cap, codes=near_codes)
    whole = with_sinks(whole, learned_sinks)
    if far.k.shape[2] == 0:
        return whole[0]
    out, largest, weight = segment_attention(mapped(q, maps.q), far.k, far.v, mask=far.mask, cap=cap, **softmax)
    return merged(whole, (mapped(out, maps.o), largest, weight), maps.bias)
