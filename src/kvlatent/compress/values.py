"""Values and the output projection: one reduction for all methods of queries and keys, and the paper's selection."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from kvlatent.compress.linear_algebra import orthonormal, root, root_and_inverse, tail
from kvlatent.compress.maps import VOReduction, own_part, select, stride_channels


def value_stride(head_dim: int, d_vo: int, *, kv_heads: int) -> VOReduction:
    """Every r-th channel of each KV head's values (KV-Latent, arXiv:2507.11273, Eq. 5)."""
    v_map = select(stride_channels(head_dim, d_vo, "d_vo").expand(kv_heads, -1), head_dim)
    return VOReduction(v_map=v_map, o_map=v_map.mT)


def value_output_svd(
    o_cov: Float[Tensor, "q_heads joined joined"],
    o_weight: Float[Tensor, "hidden inputs"],
    d_vo: int,
    *,
    kv_heads: int,
) -> VOReduction:
    """The rank-d_vo value subspace of each KV head with the least expected error of the layer's attention output.

    Whitened joint SVD over the group's query heads: C^½·[W_O,1 … W_O,G] ≈ U_r(…), C = E[o oᵀ] of the group's
    attention-weighted values. Exact when C or the stacked W_O has rank ≤ d_vo.

    Args:
        o_cov: Attention-weighted values per query head; where m KV heads share a latent, of all m side by side.
        o_weight: The stock output projection.
        d_vo: Dims kept, of a latent if heads share them.
        kv_heads: Heads of the stock model.
    """
    cov, w = outputs_by_latent(o_cov, o_weight, kv_heads)
    c_root, c_inverse = root_and_inverse(cov)
    u = torch.linalg.svd(c_root @ w, full_matrices=False).U[..., :d_vo]
    v_map, o_map = orthonormal(c_inverse @ u, c_root @ u)
    return VOReduction(v_map=v_map, o_map=o_map.mT)


def value_output_tail(o_cov: Tensor, o_weight: Tensor, *, kv_heads: int) -> Float[Tensor, "dims"]:
    """What `value_output_svd` leaves of the expected squared output, by dims kept, summed over KV heads."""
    cov, w = outputs_by_latent(o_cov, o_weight, kv_heads)
    return tail(torch.linalg.svdvals(root(cov) @ w))[:: o_cov.shape[0] * o_cov.shape[1] // o_weight.shape[1]]


def outputs_by_latent(o_cov: Tensor, o_weight: Tensor, kv_heads: int) -> tuple[Tensor, Tensor]:
    """C of each latent, and W_O of all its query heads, stacked, (latents, m·head_dim, heads·hidden)."""
    q_heads, width = o_cov.shape[:2]
    w = o_weight.detach().to(o_cov).T.unflatten(0, (q_heads, -1))  # (q_heads, head_dim, hidden)
    heads_per_latent = width // w.shape[1]
    latents = kv_heads // heads_per_latent
    parts = torch.nn.functional.one_hot(own_part(q_heads, kv_heads, heads_per_latent)).to(w)
    w = torch.einsum("hm,hdx->hmdx", parts, w).reshape(latents, -1, width, w.shape[-1]).transpose(1, 2).flatten(2)
    return o_cov.view(latents, -1, width, width).mean(1), w
