"""How much attention the newest queries pay to what a layer's cache holds.

Queries are projected anew from what the attention module is given, of the newest tokens alone; attention maps exist for
a few of them at a time. Stock models are grafted for that, so no family is special, and share all weights.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from kvlatent.compose.layers import EvictingLayer, EvictingWindowLayer
from kvlatent.kernels.attention import READ_AT_ONCE
from kvlatent.kernels.segment import ROWS, capped, softmax_beside
from kvlatent.model.attention import LatentAttention
from kvlatent.model.families import family_of
from kvlatent.model.graft import graft, spec_of
from kvlatent.model.stock_weights import rotary_order
from kvlatent.model.window import at_columns

Received = Float[Tensor, "batch heads group slots"]
"""Attention that slots receive from each query head, those that share a head of the cache side by side."""


class Observer:
    """Gives the queries of a model's layers, and their attention to a cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Look into a student, or graft a stock model.

        Raises:
            UserError: The architecture is not supported.
        """
        self.stock = spec_of(model) is None
        self.model = graft(model, share=True) if self.stock else model
        spec = spec_of(self.model)
        assert spec is not None
        rotated, interleaved = (
            2 * sum(frequency != 0 for frequency in spec.inv_freq),
            family_of(model.config).interleaved,
        )
        self.moved = self.stock and (interleaved or rotated < spec.head_dim)
        self.order = rotary_order(spec.head_dim, rotated, interleaved=interleaved).argsort().to(model.device)

    def attention(self, index: int) -> LatentAttention:
        """The attention module of a layer."""
        module: LatentAttention = self.model.model.layers[index].self_attn
        return module

    def queries(self, index: int, hidden: Tensor, kwargs: dict[str, Any], count: int, *, ahead: int = 0) -> Tensor:
        """Rotated queries of the newest tokens, as they meet what is cached, (batch, q_heads, count, dim).

        Args:
            index: The layer's.
            hidden: What its attention was given, (batch, seq, hidden).
            kwargs: Its other arguments.
            count: How many queries.
            ahead: From how many positions further on they ask.
        """
        newest, position_ids = hidden[:, -count:], kwargs["position_ids"][:, -count:] + ahead
        if self.stock or ahead:
            cos, sin = self.model.model.rotary_emb(newest, position_ids)
        else:
            cos, sin = (x[:, -count:] for x in kwargs["position_embeddings"])
        queries = self.attention(index).queries_keys_values(newest, cos, sin, position_ids)[0]
        return queries[..., self.order] if self.moved else queries

    def received(
        self,
        index: int,
        layer: EvictingLayer | EvictingWindowLayer,
        queries: Float[Tensor, "batch q_heads count dim"],
        weights: Float[Tensor, "batch count"],
        mask: Bool[Tensor, "mask_batch 1 count columns"] | None,
    ) -> Received:
        """Weighted sum over queries of the attention that a layer's slots receive, in float32.

        Where tokens near the queries are held whole beside the slots, they take their part of the attention; a token
        that has left the window counts as its latent, for the queries too that had it in their windows.

        Args:
            index: The layer's.
            layer: After it has taken in the tokens of these queries, its newest.
            queries: As `queries` gives them.
            weights: Of queries.
            mask: Where they may look, over the layer's columns; None is the causal triangle.
        """
        total = None
        for start in range(0, queries.shape[2], ROWS):
            rows = slice(start, start + ROWS)
            seen = causal(layer.columns, queries.shape[2], rows, queries.device) if mask is None else mask[:, :, rows]
            paid = self._attention(index, layer, queries[:, :, rows], seen)
            part = (paid * weights[:, None, rows, None]).sum(2)
            total = part if total is None else total + part
        assert total is not None
        return total.unflatten(1, (self._heads(layer), -1))

    @staticmethod
    def _heads(layer: EvictingLayer | EvictingWindowLayer) -> int:
        """Heads of the slots."""
        held = layer.far.parts[0].whole if isinstance(layer, EvictingWindowLayer) else layer.keys
        assert held is not None
        return held.shape[1]

    def _attention(
        self, index: int, layer: EvictingLayer | EvictingWindowLayer, q: Tensor, seen: Tensor
    ) -> Float[Tensor, "batch q_heads rows slots"]:
        attention = self.attention(index)
        if isinstance(layer, EvictingLayer):
            assert layer.keys is not None
            logits = _logits(attention, q, layer.keys, seen)
            return softmax_beside(logits, attention.sinks).nan_to_num(0.0)
        maps, first = attention.far_maps().of(q.dtype), layer.latents_from
        far_seen = seen[..., first : first + layer.slots]
        if (valid := layer.valid()) is not None:
            far_seen = far_seen & valid[:, None, None]
        far_q, rows = q @ maps.q, layer.far.held()[0]
        parts = [rows.split(READ_AT_ONCE, dim=2), far_seen.split(READ_AT_ONCE, dim=-1)]
        far = torch.cat([_logits(attention, far_q, maps.read_keys(k), see) for k, see in zip(*parts, strict=True)], -1)
        if maps.bias is not None:
            far = far + maps.bias[:, None]
        near = [x.logsumexp(-1) for x in self._near(attention, layer, q, seen, maps.met(layer.whole[0]))]
        if attention.sinks is not None:
            near.append(attention.sinks.to(far.dtype)[:, None].expand_as(near[0]))
        whole = torch.stack([far.logsumexp(-1), *near]).logsumexp(0)
        return (far - whole[..., None]).exp().nan_to_num(0.0)

    @staticmethod
    def _near(
        attention: LatentAttention, layer: EvictingWindowLayer, q: Tensor, seen: Tensor, keys: Tensor
    ) -> list[Tensor]:
        """Logits of the tokens that are held whole: those in the window, and the sinks that have left it."""
        start = max(0, layer.length - layer.window)
        ring = torch.arange(start, layer.length, device=q.device)
        parts = [_logits(attention, q, keys[:, :, ring % layer.window], seen[..., ring])]
        columns = layer.sink_columns()
        if columns.shape[1] and start:
            sinks = at_columns(seen, columns) & (columns < start)[:, None, None]
            parts.append(_logits(attention, q, keys[:, :, layer.window :], sinks))
        return parts


def causal(columns: int, queries: int, rows: slice, device: torch.device) -> Bool[Tensor, "1 1 rows columns"]:
    """Where some of the queries, which stand at the last columns, may look."""
    at = torch.arange(columns - queries, columns, device=device)[rows]
    return (at[:, None] >= torch.arange(columns, device=device))[None, None]


def grouped_logits(attention: LatentAttention, q: Tensor, k: Tensor) -> Float[Tensor, "batch q_heads rows tokens"]:
    """Logits of grouped heads in float32; keys are not repeated."""
    grouped = q.unflatten(1, (k.shape[1], -1))
    return capped((grouped @ k.to(q.dtype).mT[:, :, None]).flatten(1, 2).float() * attention.scale, attention.cap)


def _logits(
    attention: LatentAttention, q: Tensor, k: Tensor, seen: Tensor
) -> Float[Tensor, "batch q_heads rows tokens"]:
    """The same, -inf where a query may not look."""
    return grouped_logits(attention, q, k).masked_fill(~seen, -torch.inf)
