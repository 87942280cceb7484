"""`partial`: only the rotary pairs that need it go on rotating; all others are reduced together, unrotated, by SVD.

The idea is EliteKV's (https://arxiv.org/abs/2503.01586). A pair that stands still costs
E|logit|²·2(1 - cos(ω_j Δ)), averaged over distances Δ; any linear map commutes with its absent rotation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvlatent.compress.linear_algebra import joint_svd, pair_scores, singular_values
from kvlatent.compress.maps import QKReduction, pair_channels
from kvlatent.compress.method import DISTANCES, Decision, Heads, Layer, Method


def plan(heads: Heads) -> Decision:
    """Every KV head holds its own frequencies; those of slots that stand still are 0, the last entry."""
    return Decision(inv_freq=(*heads.inv_freq, 0.0), per_head_frequencies=True, shared=torch.tensor(heads.inv_freq))


def reduce(layer: Layer, decision: Decision) -> QKReduction:
    """Choose what goes on rotating by this layer's statistics."""
    scores = pair_scores(layer.moment("q"), layer.moment("k"))
    unrotated = layer.moment("q_unrotated"), layer.moment("k_unrotated")
    return partial_rope(*unrotated, scores, decision.shared, layer.d_qk, DISTANCES)


def partial_rope(
    q_cov: Tensor, k_cov: Tensor, scores: Tensor, inv_freq: Tensor, d_qk: int, distances: Tensor
) -> QKReduction:
    """Let only some rotary pairs of each KV head rotate, and reduce all others, unrotated, by joint SVD.

    The pairs that keep rotating are chosen greedily, and so is their number: the next one is that whose standing still
    would cost most, and of all numbers the one whose rest loses least, standing still and in its SVD together. Slots
    that don't rotate have the frequency 0, entry head_dim/2 of the list. Exact where the others have ω × distance → 0
    and rank ≤ their share of d_qk.

    Args:
        q_cov: Queries before RoPE, (q_heads, head_dim, head_dim).
        k_cov: Keys before RoPE, (kv_heads, head_dim, head_dim).
        scores: From `pair_scores`.
        inv_freq: The teacher's inverse frequencies, (head_dim/2,) in radians per token, without the 0.
        d_qk: Dims kept.
        distances: Tokens between query and key, any number of samples.
    """
    kv_heads, head_dim = k_cov.shape[:2]
    half, slots = head_dim // 2, d_qk // 2
    pooled = q_cov.view(kv_heads, -1, head_dim, head_dim).sum(1)
    blur = 2 * (1 - (inv_freq.double()[:, None] * distances.double()).cos()).mean(1) * scores  # (kv_heads, half)
    maps = torch.zeros(2, kv_heads, head_dim, d_qk, dtype=torch.float64)
    freq_index = torch.full((kv_heads, slots), half)
    for g in range(kv_heads):
        order = blur[g].argsort(descending=True)

        def others(turning: int, order: Tensor = order) -> Tensor:
            return pair_channels(order[turning:].sort().values[None], head_dim)[0]

        def loss(turning: int, g: int = g, order: Tensor = order) -> float:
            rest = others(turning, order)
            dropped = singular_values(pooled[g][rest][:, rest], k_cov[g][rest][:, rest])[d_qk - 2 * turning :]
            return float(dropped.square().sum() + blur[g][order[turning:]].sum())

        turning = min(range(slots + 1), key=loss) if slots < half else half
        kept, rest = order[:turning].sort().values, others(turning)
        freq_index[g, :turning] = kept
        at = torch.arange(slots)  # slot s is channels s and s + slots; those that turn come first
        still = torch.cat((at[turning:], at[turning:] + slots))
        rest_maps = joint_svd(pooled[g][rest][:, rest], k_cov[g][rest][:, rest], d_qk - 2 * turning)
        for whole, rest_map in zip(maps, rest_maps, strict=True):
            whole[g, kept, at[:turning]] = whole[g, kept + half, at[:turning] + slots] = 1.0
            whole[g, rest[:, None], still] = rest_map
    q_map = maps[0].repeat_interleave(len(q_cov) // kv_heads, dim=0)
    return QKReduction(q_map=q_map, k_map=maps[1], freq_index=freq_index)


PARTIAL = Method(name="partial", plan=plan, reduce=reduce)
