"""Second moments and the low-rank factorizations that reductions are made of, in float64.

Moments are E[x xᵀ], (heads, dim, dim). What calibration text never excites has no energy: where rank is left after all
that has, factorizations spend it there, on the identity, so that nothing is lost that there was room for.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

FLOOR = 1e-9
"""Directions with less than this share of the largest energy count as having none."""


def moment(x: Tensor, y: Tensor | None = None) -> Float[Tensor, "heads x_dim y_dim"]:
    """Sum over batch and tokens of x yᵀ (or x xᵀ): (batch, heads, seq, dim) → (heads, dim, dim)."""
    return torch.einsum("bhsd,bhse->hde", x, x if y is None else y)


def pair_energy(cov: Tensor) -> Float[Tensor, "heads pairs"]:
    """E‖x_j‖² of each rotary pair, (heads, head_dim/2)."""
    first, second = cov.diagonal(dim1=-2, dim2=-1).chunk(2, dim=-1)
    return first + second


def pair_scores(q_cov: Tensor, k_cov: Tensor) -> Float[Tensor, "kv_heads pairs"]:
    """Logit energy of each rotary pair, Σ_{i in g} E‖q_ij‖² · E‖k_gj‖² (A³, arXiv:2505.12942, for the criterion)."""
    q_energy = pair_energy(q_cov)
    return q_energy.view(len(k_cov), -1, q_energy.shape[-1]).sum(1) * pair_energy(k_cov)


def pooled_queries(q_cov: Tensor, k_cov: Tensor) -> Float[Tensor, "latents joined joined"]:
    """Second moments of all queries that meet the keys of a latent, each in the part of its own KV head."""
    latents, width = k_cov.shape[:2]
    head_dim = q_cov.shape[1]
    by_head = q_cov.view(latents, width // head_dim, -1, head_dim, head_dim).sum(2)
    return torch.stack([torch.block_diag(*heads) for heads in by_head])


def complex_covariance(cov: Float[Tensor, "heads head_dim head_dim"]) -> Tensor:
    """E[z zᴴ] of the rotary pairs read as complex numbers, (heads, head_dim/2, head_dim/2) complex128."""
    half = cov.shape[-1] // 2
    xx, xy, yx, yy = cov[:, :half, :half], cov[:, :half, half:], cov[:, half:, :half], cov[:, half:, half:]
    return torch.complex((xx + yy).double(), (yx - xy).double())


def real_map(a: Tensor) -> Tensor:
    """The real (head_dim, d) form of z' = aᴴz for complex `a` (heads, half, slots)."""
    return torch.cat((torch.cat((a.real, -a.imag), dim=-1), torch.cat((a.imag, a.real), dim=-1)), dim=-2)


def root(cov: Tensor) -> Tensor:
    """Hermitian square root; directions without energy are zero."""
    values, vectors, floor = _eigen(cov)
    sizes = torch.where(values > floor, values.clamp_min(0).sqrt(), 0.0)
    return (vectors * sizes[..., None, :]) @ vectors.mH


def root_and_inverse(cov: Tensor) -> tuple[Tensor, Tensor]:
    """Hermitian square root and its inverse; directions without energy get the least that counts, so both exist."""
    values, vectors, floor = _eigen(cov)
    values = torch.where(values > floor, values, torch.where(floor > 0, floor, 1.0))
    return tuple((vectors * x[..., None, :]) @ vectors.mH for x in (values.sqrt(), values.rsqrt()))  # type: ignore[return-value]


def _eigen(cov: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues, eigenvectors, and the energy up to which a direction counts as silent; 0 where all are."""
    values, vectors = torch.linalg.eigh(cov)
    floor = values[..., -1:].clamp_min(torch.finfo(torch.float64).tiny) * FLOOR
    return values, vectors, torch.where(values[..., -1:] > 0, floor, 0.0)


def singular_values(q_cov: Tensor, k_cov: Tensor) -> Tensor:
    """Singular values of C_q^½ C_k^½: the root mean squares of what each direction gives to the logits."""
    return torch.linalg.svdvals(root(q_cov) @ root(k_cov))


def joint_svd(q_cov: Tensor, k_cov: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Maps (heads, dim, rank) for queries and keys that keep the best rank-`rank` part of E|qᴴk|².

    With C_q^½ C_k^½ = UΣVᴴ they are C_k^½ V for queries and C_k^-½ V for keys; at full rank their product is the
    identity.
    """
    k_root, k_inverse = root_and_inverse(k_cov)
    v = torch.linalg.svd(root_and_inverse(q_cov)[0] @ k_root).Vh.mH[..., :rank]
    k_map, q_map = orthonormal(k_inverse @ v, k_root @ v)
    return q_map, k_map


def orthonormal(cached: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The same product of two maps (heads, dim, rank), with orthonormal columns in the first.

    So what is cached stays a projection of the teacher's keys or values, of their size, and training steps that suit
    the teacher's weights suit the student's.
    """
    q, r = torch.linalg.qr(cached)
    return q, other @ r.mH


def tail(singular_values: Float[Tensor, "heads dims"]) -> Tensor:
    """Σ of the squares beyond the first r, over heads, for r = 0 … dim: (heads, dim) → (dim + 1,)."""
    energy = singular_values.square().sum(0)
    return torch.cat((energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)))
