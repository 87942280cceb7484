"""`project`: the joint SVD of rotated queries and keys, by maps that come after RoPE; what preset best takes.

Eckart-Young for the expected squared error of the logits: with C_q^½ C_k^½ = UΣVᵀ, up to a change of basis,
k' = Vᵀ C_k^-½ k and q' = Vᵀ C_k^½ q; A³ (https://arxiv.org/abs/2505.12942) has the same factors before RoPE. Keys count
with the attention they get, centered on each query's mean key: softmax ignores what all keys share. All head_dim dims
rotate before they are reduced, so only our attention runs it.
"""

from __future__ import annotations

from torch import Tensor

from kvlatent.compress.linear_algebra import joint_svd, pooled_queries, singular_values, tail
from kvlatent.compress.maps import QKReduction
from kvlatent.compress.method import Decision, Heads, Layer, Method


def plan(heads: Heads) -> Decision:
    """All of the teacher's pairs rotate, and maps come after."""
    return Decision(inv_freq=heads.inv_freq, qk_map="after_rope")


def reduce(layer: Layer, _decision: Decision) -> QKReduction:
    """Project this layer's rotated queries and keys."""
    return project(layer.moment("q"), layer.moment("k"), layer.latent_dims)


def project(q_cov: Tensor, k_cov: Tensor, d_qk: int) -> QKReduction:
    """The rank-d_qk maps after RoPE with the least expected squared error of the logits.

    Heads that share a latent are one head of m·head_dim, of which every query meets its own part only.

    Args:
        q_cov: Rotated queries, (q_heads, head_dim, head_dim); a group's heads are pooled.
        k_cov: Rotated keys, (kv_heads, head_dim, head_dim), or (latents, m·head_dim, m·head_dim).
        d_qk: Dims kept, of a latent if heads share them.
    """
    q_map, k_map = joint_svd(pooled_queries(q_cov, k_cov), k_cov, d_qk)
    q_map = q_map.unflatten(1, (-1, q_cov.shape[1])).flatten(0, 1)  # (kv_heads, head_dim, d_qk)
    return QKReduction(q_map=q_map.repeat_interleave(len(q_cov) // len(q_map), dim=0), k_map=k_map)


def project_tail(q_cov: Tensor, k_cov: Tensor) -> Tensor:
    """What `project` leaves of the expected squared logits, by dims kept (0 to head_dim), summed over KV heads.

    Args:
        q_cov: Rotated queries, (q_heads, head_dim, head_dim).
        k_cov: Rotated keys, (kv_heads, head_dim, head_dim), or by latent: then a dim kept per head is m of the latent.
    """
    dropped = tail(singular_values(pooled_queries(q_cov, k_cov), k_cov))
    return dropped[:: k_cov.shape[1] // q_cov.shape[1]]


PROJECT = Method(name="project", plan=plan, reduce=reduce, groups_heads=True, takes_window=True)
