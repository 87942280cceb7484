"""`fold`: neighboring rotary pairs merged into fewer, behind one list for the model; what preset portable takes.

Ours. Maps that treat a pair as one complex number commute with a rotation common to the pairs they mix (RoFormer,
https://arxiv.org/abs/2104.09864, Eq. 12, for the complex form). The teacher's frequencies are split into groups of
neighbors by dynamic programming over all heads and layers, and every group is reduced, per latent, by the complex joint
SVD of queries and keys before RoPE. Exact as frequency difference × distance → 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvlatent.compress.linear_algebra import (
    complex_covariance,
    joint_svd,
    pair_energy,
    pooled_queries,
    real_map,
    singular_values,
)
from kvlatent.compress.maps import QKReduction, by_frequency
from kvlatent.compress.method import DISTANCES, Decision, Heads, Layer, Method

Group = tuple[int, int, int]
"""First pair, pairs, slots, as `by_frequency` orders pairs."""


def plan(heads: Heads) -> Decision:
    """Groups of neighbors, and the mean frequency of each, for the whole model."""
    assert heads.statistics is not None
    layers, heads_per_latent = heads.statistics.layers, heads.heads_per_latent
    groups, inv_freq = choose_groups(
        [layer.mean("q_unrotated") for layer in layers],
        [layer.mean("k_unrotated", heads_per_latent=heads_per_latent) for layer in layers],
        torch.tensor(heads.inv_freq),
        heads_per_latent * heads.d_qk[0] // 2,
        DISTANCES,
    )
    return Decision(inv_freq=inv_freq, shared=groups)


def reduce(layer: Layer, decision: Decision) -> QKReduction:
    """Fold this layer's pairs in the planned groups."""
    return fold(layer.moment("q_unrotated"), layer.moment("k_unrotated"), decision.shared)


def fold(q_cov: Tensor, k_cov: Tensor, groups: list[Group]) -> QKReduction:
    """Merge neighboring rotary pairs into fewer, per head, for a frequency list that all heads share.

    Within a group of near frequencies the reduction is the complex joint SVD of queries and keys before RoPE. Heads
    that share a latent have every frequency m times, so pairs of one frequency are mixed across heads without any loss
    by rotation.

    Args:
        q_cov: Queries before RoPE, (q_heads, head_dim, head_dim).
        k_cov: Keys before RoPE, (kv_heads, head_dim, head_dim), or (latents, m·head_dim, m·head_dim).
        groups: In order; their slots add up to d_qk / 2, of a latent if heads share them.
    """
    latents, width = k_cov.shape[:2]
    head_dim = q_cov.shape[1]
    order = by_frequency(head_dim, width // head_dim)
    q_complex, k_complex = (complex_covariance(x[:, order][:, :, order]) for x in (pooled_queries(q_cov, k_cov), k_cov))
    slots = sum(rank for _, _, rank in groups)
    maps = torch.zeros(2, latents, width // 2, slots, dtype=torch.complex128)
    at = 0
    for first, size, rank in groups:
        inside = slice(first, first + size)
        q_part, k_part = joint_svd(q_complex[:, inside, inside], k_complex[:, inside, inside], rank)
        maps[0, :, inside, at : at + rank], maps[1, :, inside, at : at + rank] = q_part, k_part
        at += rank
    q_map, k_map = (real_map(x)[:, order.argsort()] for x in maps)
    q_map = q_map.unflatten(1, (-1, head_dim)).flatten(0, 1)  # (kv_heads, head_dim, d_qk)
    return QKReduction(q_map=q_map.repeat_interleave(len(q_cov) // len(q_map), dim=0), k_map=k_map)


def choose_groups(
    q_covs: list[Tensor], k_covs: list[Tensor], inv_freq: Tensor, slots: int, distances: Tensor
) -> tuple[list[Group], tuple[float, ...]]:
    """Split the teacher's frequencies into groups of neighbors and share `slots` among them, for the least logit error.

    A group's error is what its complex SVD drops plus what its pairs lose by rotating at the group's mean frequency,
    E‖q_j‖²·E‖k_j‖²·2(1 - cos((ω_j - ω)Δ)) averaged over distances Δ. Dynamic programming over all heads and layers.

    Args:
        q_covs: Per layer, queries before RoPE.
        k_covs: Per layer, keys before RoPE, or those of heads side by side: then every pair counts once per head.
        inv_freq: The teacher's inverse frequencies, (head_dim/2,) in radians per token.
        slots: d_qk / 2, of a latent if heads share them.
        distances: Tokens between query and key, any number of samples.

    Returns:
        Groups as `fold` takes them, and the frequency of each slot.
    """
    head_dim, heads = 2 * len(inv_freq), k_covs[0].shape[1] // (2 * len(inv_freq))
    order, half = by_frequency(head_dim, heads), heads * len(inv_freq)
    inv_freq = inv_freq.repeat_interleave(heads)
    if slots == half:  # nothing to merge, whatever the statistics say of pairs that calibration never excited
        return [(j, 1, 1) for j in range(half)], tuple(inv_freq.tolist())
    q = torch.cat([pooled_queries(*covs) for covs in zip(q_covs, k_covs, strict=True)])
    q, k = (x[:, order][:, :, order] for x in (q, torch.cat(k_covs)))
    energy = (pair_energy(q) * pair_energy(k)).sum(0).clamp_min(1e-300)  # (half,) over all heads; dead pairs too
    q, k = complex_covariance(q), complex_covariance(k)
    widest = heads * max(2, -(-2 * half // slots) + 1)
    cost: dict[Group, float] = {}
    center: dict[tuple[int, int], float] = {}
    for first in range(half):
        for size in range(1, min(widest, half - first) + 1):
            inside = slice(first, first + size)
            weight = energy[inside] / energy[inside].sum()
            omega = float((weight * inv_freq[inside].double().log()).sum().exp())
            center[first, size] = omega
            drift = (inv_freq[inside].double() - omega)[:, None] * distances.double()
            blur = float((energy[inside, None] * 2 * (1 - drift.cos())).mean(1).sum())
            dropped = singular_values(q[:, inside, inside], k[:, inside, inside]).square().sum(0)  # (size,)
            for rank in range(min(size, slots) + 1):
                cost[first, size, rank] = float(dropped[rank:].sum()) + (blur if rank else 0.0)
    best: dict[tuple[int, int], tuple[float, list[Group]]] = {(0, 0): (0.0, [])}
    for end in range(1, half + 1):
        for used in range(slots + 1):
            options = [
                (best[end - size, used - rank][0] + cost[end - size, size, rank], size, rank)
                for size in range(1, min(widest, end) + 1)
                for rank in range(min(size, used) + 1)
                if (end - size, used - rank) in best
            ]
            if options:
                total, size, rank = min(options)
                best[end, used] = (total, [*best[end - size, used - rank][1], (end - size, size, rank)])
    groups = [group for group in best[half, slots][1] if group[2]]
    return groups, tuple(center[first, size] for first, size, rank in groups for _ in range(rank))


FOLD = Method(name="fold", plan=plan, reduce=reduce, needs_statistics=True, one_frequency_list=True, groups_heads=True)
