"""`stride`: every r-th rotary pair at its own frequency, r = head_dim / d_qk: plain RoPE at d_qk.

KV-Latent (https://arxiv.org/abs/2507.11273), Eq. 5. Nothing is calibrated; what the other pairs carried
is lost.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvlatent.compress.maps import QKReduction, keep_pairs, stride_channels
from kvlatent.compress.method import Decision, Heads, Layer, Method


def check(head_dim: int, d_qk: int) -> None:
    """Refuse a d_qk that doesn't divide head_dim."""
    stride_channels(head_dim, d_qk, "d_qk")


def pairs_of(heads: Heads) -> Tensor:
    """Every r-th rotary pair."""
    return torch.arange(0, heads.head_dim // 2, heads.head_dim // heads.d_qk[0])


def plan(heads: Heads) -> Decision:
    """The pairs, and their own frequencies."""
    pairs = pairs_of(heads)
    return Decision(inv_freq=tuple(heads.inv_freq[j] for j in pairs), shared=pairs)


def reduce(layer: Layer, decision: Decision) -> QKReduction:
    """Keep the planned pairs in every head."""
    pairs: Tensor = decision.shared
    return keep_pairs(pairs.expand(layer.kv_heads, -1), layer.head_dim, group_size=layer.group_size)


STRIDE = Method(name="stride", check=check, plan=plan, reduce=reduce, calibrated=False, one_frequency_list=True)
