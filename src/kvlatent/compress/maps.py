"""Head maps: a reduction is a pair of per-head linear maps from head_dim to d_qk (queries, keys) or d_vo (values).

Channels are in the half-split layout: rotary pair j is (j, j + head_dim/2), read as x_j + i·x_{j + head_dim/2}.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvlatent.errors import UserError


@dataclass(frozen=True, kw_only=True)
class QKReduction:
    """Maps for queries and keys of one layer, and the frequencies that their pairs rotate by.

    Where m KV heads share a latent, k_map is (latents, m·head_dim, m·d_qk) and q_map (q_heads, head_dim, m·d_qk).
    """

    q_map: Float[Tensor, "q_heads head_dim kept"]
    k_map: Float[Tensor, "latents joined kept"]
    freq_index: Int[Tensor, "kv_heads pairs"] | None = None
    """Entries of the spec's inverse frequencies, when every KV head has its own."""


@dataclass(frozen=True, kw_only=True)
class VOReduction:
    """Maps for values and for the output projection of one layer: v' = v·v_map, W_O' = o_map·W_O.

    Where m KV heads share a latent: (latents, m·head_dim, m·d_vo) and (latents, m·d_vo, m·head_dim).
    """

    v_map: Float[Tensor, "latents joined kept"]
    o_map: Float[Tensor, "latents kept joined"]


def stride_channels(head_dim: int, d: int, name: str) -> Int[Tensor, "d"]:
    """Every (head_dim/d)-th channel (KV-Latent, arXiv:2507.11273, Eq. 5).

    Raises:
        UserError: `d` does not divide `head_dim`.
    """
    if head_dim % d:
        raise UserError(f"the paper keeps every r-th channel, so {name} must divide head_dim {head_dim}; got {d}")
    return torch.arange(0, head_dim, head_dim // d)


def select(channels: Int[Tensor, "heads d"], head_dim: int) -> Float[Tensor, "heads head_dim d"]:
    """The map that keeps `channels` of each head."""
    return torch.nn.functional.one_hot(channels, head_dim).double().transpose(1, 2)


def pair_channels(pairs: Int[Tensor, "heads pairs"], head_dim: int) -> Int[Tensor, "heads d_qk"]:
    """Both channels of each rotary pair, first halves before second halves."""
    return torch.cat((pairs, pairs + head_dim // 2), dim=-1)


def keep_pairs(
    pairs: Int[Tensor, "kv_heads pairs"], head_dim: int, *, group_size: int, per_head_frequencies: bool = False
) -> QKReduction:
    """Keep rotary pairs of each KV head's keys, and the same ones of the queries of its group.

    Args:
        pairs: The pairs of each KV head.
        head_dim: Dims per head before.
        group_size: Query heads per KV head.
        per_head_frequencies: Every KV head keeps its pairs' own frequencies; otherwise the model has one list.
    """
    k_map = select(pair_channels(pairs, head_dim), head_dim)
    q_map = k_map.repeat_interleave(group_size, dim=0)
    return QKReduction(q_map=q_map, k_map=k_map, freq_index=pairs if per_head_frequencies else None)


def own_part(q_heads: int, kv_heads: int, heads_per_latent: int) -> Int[Tensor, "q_heads"]:
    """Which of the heads side by side in a latent is each query head's own."""
    return torch.arange(kv_heads).repeat_interleave(q_heads // kv_heads) % heads_per_latent


def by_frequency(head_dim: int, heads: int) -> Int[Tensor, "channels"]:
    """Channels of heads side by side as those of one head whose pairs are in order of frequency, head by head."""
    half = head_dim // 2
    return torch.arange(heads * head_dim).view(heads, 2, half).permute(1, 2, 0).flatten()


def rescaled(maps: QKReduction) -> QKReduction:
    """The same logits with unit columns in the keys' maps, pair by pair, so that what is cached stays of their size."""
    size = maps.k_map.square().sum(1).unflatten(-1, (2, -1)).mean(1).sqrt().clamp_min(1e-12).repeat(1, 2)[:, None]
    group_size = len(maps.q_map) // len(maps.k_map)
    return replace(maps, q_map=maps.q_map * size.repeat_interleave(group_size, dim=0), k_map=maps.k_map / size)
