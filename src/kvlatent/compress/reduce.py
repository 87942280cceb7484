"""Head reductions: every one is a pair of per-head linear maps from head_dim to d_qk (queries, keys) or d_vo (values).

Covariances are second moments E[x xᵀ] in float64, (heads, head_dim, head_dim). Channels are in the half-split layout:
rotary pair j is (j, j + head_dim/2), read as the complex number x_j + i·x_{j + head_dim/2}.
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
    """Entries of the ladder, when every KV head has its own."""


@dataclass(frozen=True, kw_only=True)
class VOReduction:
    """Maps for values and for the output projection of one layer: v' = v·v_map, W_O' = o_map·W_O.

    Where m KV heads share a latent: (latents, m·head_dim, m·d_vo) and (latents, m·d_vo, m·head_dim).
    """

    v_map: Float[Tensor, "latents joined kept"]
    o_map: Float[Tensor, "latents kept joined"]


def stride_channels(head_dim: int, d: int, name: str) -> Int[Tensor, "d"]:
    """Every (head_dim/d)-th channel (Eq. 5).

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


def keep_channels(
    channels: Int[Tensor, "kv_heads d_qk"],
    head_dim: int,
    *,
    group_size: int,
    freq_index: Int[Tensor, "kv_heads pairs"] | None = None,
) -> QKReduction:
    """Keep `channels` of each KV head's keys, and the same ones of the queries of its group."""
    k_map = select(channels, head_dim)
    return QKReduction(q_map=k_map.repeat_interleave(group_size, dim=0), k_map=k_map, freq_index=freq_index)


def keep_pairs(q_cov: Tensor, k_cov: Tensor, d_qk: int, *, shared: bool = False) -> QKReduction:
    """Keep the rotary pairs that carry the most logit energy, at their original frequencies.

    Args:
        q_cov: (q_heads, head_dim, head_dim).
        k_cov: (kv_heads, head_dim, head_dim).
        d_qk: Dims kept.
        shared: All heads keep the same pairs, those with the largest sum of scores; otherwise each KV head its own.
    """
    kv_heads, head_dim = k_cov.shape[:2]
    scores = pair_scores(q_cov, k_cov)
    if shared:
        scores = scores.sum(0, keepdim=True).expand(kv_heads, -1)
    pairs = scores.topk(d_qk // 2, dim=-1).indices.sort(-1).values
    return keep_channels(
        pair_channels(pairs, head_dim), head_dim, group_size=q_cov.shape[0] // kv_heads, freq_index=pairs
    )


def pair_scores(q_cov: Tensor, k_cov: Tensor) -> Float[Tensor, "kv_heads pairs"]:
    """Logit energy of each rotary pair, Σ_{i in g} E‖q_ij‖² · E‖k_gj‖² (A³, arXiv:2505.12942, for the criterion)."""
    q_energy = _pair_energy(q_cov)
    return q_energy.view(len(k_cov), -1, q_energy.shape[-1]).sum(1) * _pair_energy(k_cov)


def partial_rope(
    q_cov: Tensor, k_cov: Tensor, scores: Tensor, inv_freq: Tensor, d_qk: int, distances: Tensor
) -> QKReduction:
    """Let only some rotary pairs of each KV head rotate, and reduce all others, unrotated, by joint SVD.

    The pairs that keep rotating are chosen greedily (EliteKV, for the idea), and so is their number: the next one is
    that whose standing still would cost most, E|logit|²·2(1 - cos(ω_j Δ)) averaged over distances Δ, and of all numbers
    the one whose rest loses least, standing still and in its SVD together. Slots that don't rotate have the frequency
    0, entry head_dim/2 of the ladder. Exact where the others have ω × distance → 0 and rank ≤ their share of d_qk.

    Args:
        q_cov: Queries before RoPE, (q_heads, head_dim, head_dim).
        k_cov: Keys before RoPE, (kv_heads, head_dim, head_dim).
        scores: From `pair_scores`.
        inv_freq: The ladder, (head_dim/2,) in radians per token, without the 0.
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
            tail = _singular_values(pooled[g][rest][:, rest], k_cov[g][rest][:, rest])[d_qk - 2 * turning :]
            return float(tail.square().sum() + blur[g][order[turning:]].sum())

        turning = min(range(slots + 1), key=loss)
        kept, rest = order[:turning].sort().values, others(turning)
        freq_index[g, :turning] = kept
        at = torch.arange(slots)  # slot s is channels s and s + slots; those that turn come first
        still = torch.cat((at[turning:], at[turning:] + slots))
        rest_maps = _joint_svd(pooled[g][rest][:, rest], k_cov[g][rest][:, rest], d_qk - 2 * turning)
        for whole, rest_map in zip(maps, rest_maps, strict=True):
            whole[g, kept, at[:turning]] = whole[g, kept + half, at[:turning] + slots] = 1.0
            whole[g, rest[:, None], still] = rest_map
    q_map = maps[0].repeat_interleave(len(q_cov) // kv_heads, dim=0)
    return QKReduction(q_map=q_map, k_map=maps[1], freq_index=freq_index)


def project(q_cov: Tensor, k_cov: Tensor, d_qk: int) -> QKReduction:
    """The rank-d_qk maps after RoPE with the least expected squared error of the logits.

    With C_q^½ C_k^½ = UΣVᵀ, up to a change of basis: k' = Vᵀ C_k^-½ k and q' = Vᵀ C_k^½ q. Keys are
    centred by the caller: softmax ignores what all keys share. Heads that share a latent are one head of m·head_dim, of
    which every query meets its own part only.

    Args:
        q_cov: Rotated queries, (q_heads, head_dim, head_dim); a group's heads are pooled.
        k_cov: Rotated keys, (kv_heads, head_dim, head_dim), or (latents, m·head_dim, m·head_dim).
        d_qk: Dims kept, of a latent if heads share them.
    """
    q_map, k_map = _joint_svd(_pooled_queries(q_cov, k_cov), k_cov, d_qk)
    q_map = q_map.unflatten(1, (-1, q_cov.shape[1])).flatten(0, 1)  # (kv_heads, head_dim, d_qk)
    return QKReduction(q_map=q_map.repeat_interleave(len(q_cov) // len(q_map), dim=0), k_map=k_map)


def _pooled_queries(q_cov: Tensor, k_cov: Tensor) -> Float[Tensor, "latents joined joined"]:
    """Second moments of all queries that meet the keys of a latent, each in the part of its own KV head."""
    latents, width = k_cov.shape[:2]
    head_dim = q_cov.shape[1]
    by_head = q_cov.view(latents, width // head_dim, -1, head_dim, head_dim).sum(2)
    return torch.stack([torch.block_diag(*heads) for heads in by_head])


def fold(q_cov: Tensor, k_cov: Tensor, groups: list[tuple[int, int, int]]) -> QKReduction:
    """Merge neighbouring rotary pairs into fewer, per head, for a frequency list that all heads share.

    Maps that treat a pair as one complex number commute with a rotation common to the pairs they mix, so within a
    group of near frequencies the reduction is the complex joint SVD of queries and keys before RoPE. It is exact as
    frequency difference × distance → 0. Heads that share a latent have every frequency m times, so pairs of one
    frequency are mixed across heads without any loss by rotation.

    Args:
        q_cov: Queries before RoPE, (q_heads, head_dim, head_dim).
        k_cov: Keys before RoPE, (kv_heads, head_dim, head_dim), or (latents, m·head_dim, m·head_dim).
        groups: (first pair, pairs, slots) of each group, in order, as `by_frequency` has them; the slots add up to
            d_qk / 2, of a latent if heads share them.
    """
    latents, width = k_cov.shape[:2]
    head_dim = q_cov.shape[1]
    order = by_frequency(head_dim, width // head_dim)
    q_complex, k_complex = (
        complex_covariance(x[:, order][:, :, order]) for x in (_pooled_queries(q_cov, k_cov), k_cov)
    )
    slots = sum(rank for _, _, rank in groups)
    maps = torch.zeros(2, latents, width // 2, slots, dtype=torch.complex128)
    at = 0
    for first, size, rank in groups:
        inside = slice(first, first + size)
        q_part, k_part = _joint_svd(q_complex[:, inside, inside], k_complex[:, inside, inside], rank)
        maps[0, :, inside, at : at + rank], maps[1, :, inside, at : at + rank] = q_part, k_part
        at += rank
    q_map, k_map = (_real_map(x)[:, order.argsort()] for x in maps)
    q_map = q_map.unflatten(1, (-1, head_dim)).flatten(0, 1)  # (kv_heads, head_dim, d_qk)
    return QKReduction(q_map=q_map.repeat_interleave(len(q_cov) // len(q_map), dim=0), k_map=k_map)


def by_frequency(head_dim: int, heads: int) -> Int[Tensor, "channels"]:
    """Channels of heads side by side as those of one head whose pairs are in order of frequency, head by head."""
    half = head_dim // 2
    return torch.arange(heads * head_dim).view(heads, 2, half).permute(1, 2, 0).flatten()


def choose_groups(
    q_covs: list[Tensor], k_covs: list[Tensor], inv_freq: Tensor, slots: int, distances: Tensor
) -> tuple[list[tuple[int, int, int]], tuple[float, ...]]:
    """Split the ladder into groups of neighbours and share `slots` among them, for the least total logit error.

    A group's error is what its complex SVD drops plus what its pairs lose by rotating at the group's mean frequency,
    E‖q_j‖²·E‖k_j‖²·2(1 - cos((ω_j - ω)Δ)) averaged over distances Δ. Dynamic programming over all heads and layers.

    Args:
        q_covs: Per layer, queries before RoPE.
        k_covs: Per layer, keys before RoPE, or those of heads side by side: then every pair counts once per head.
        inv_freq: The ladder, (head_dim/2,) in radians per token.
        slots: d_qk / 2, of a latent if heads share them.
        distances: Tokens between query and key, any number of samples.

    Returns:
        Groups as `fold` takes them, and the frequency of each slot.
    """
    head_dim, heads = 2 * len(inv_freq), k_covs[0].shape[1] // (2 * len(inv_freq))
    order, half = by_frequency(head_dim, heads), heads * len(inv_freq)
    inv_freq = inv_freq.repeat_interleave(heads)
    q = torch.cat([_pooled_queries(*covs) for covs in zip(q_covs, k_covs, strict=True)])
    q, k = (x[:, order][:, :, order] for x in (q, torch.cat(k_covs)))
    energy = (_pair_energy(q) * _pair_energy(k)).sum(0).clamp_min(1e-300)  # (half,) over all heads; dead pairs too
    q, k = complex_covariance(q), complex_covariance(k)
    widest = heads * max(2, -(-2 * half // slots) + 1)
    cost: dict[tuple[int, int, int], float] = {}
    centre: dict[tuple[int, int], float] = {}
    for first in range(half):
        for size in range(1, min(widest, half - first) + 1):
            inside = slice(first, first + size)
            weight = energy[inside] / energy[inside].sum()
            omega = float((weight * inv_freq[inside].double().log()).sum().exp())
            centre[first, size] = omega
            drift = (inv_freq[inside].double() - omega)[:, None] * distances.double()
            blur = float((energy[inside, None] * 2 * (1 - drift.cos())).mean(1).sum())
            tail = _singular_values(q[:, inside, inside], k[:, inside, inside]).square().sum(0)  # (size,)
            for rank in range(min(size, slots) + 1):
                cost[first, size, rank] = float(tail[rank:].sum()) + (blur if rank else 0.0)
    best: dict[tuple[int, int], tuple[float, list[tuple[int, int, int]]]] = {(0, 0): (0.0, [])}
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
    return groups, tuple(centre[first, size] for first, size, rank in groups for _ in range(rank))


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
    inverse, root, w = _output_factors(o_cov, o_weight, kv_heads)
    u = torch.linalg.svd(root @ w, full_matrices=False).U[..., :d_vo]
    v_map, o_map = _orthonormal(inverse @ u, root @ u)
    return VOReduction(v_map=v_map, o_map=o_map.mT)


def _output_factors(o_cov: Tensor, o_weight: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """C^-½, C^½ and W_O of all query heads of a latent, stacked, (latents, m·head_dim, heads·hidden)."""
    q_heads, width = o_cov.shape[:2]
    w = o_weight.double().T.unflatten(0, (q_heads, -1))  # (q_heads, head_dim, hidden)
    heads_per_latent = width // w.shape[1]
    latents = kv_heads // heads_per_latent
    parts = torch.nn.functional.one_hot(own_part(q_heads, kv_heads, heads_per_latent)).to(w)
    w = torch.einsum("hm,hdx->hmdx", parts, w).reshape(latents, -1, width, w.shape[-1]).transpose(1, 2).flatten(2)
    root, inverse = _roots(o_cov.view(latents, -1, width, width).mean(1))
    return inverse, root, w


def own_part(q_heads: int, kv_heads: int, heads_per_latent: int) -> Int[Tensor, "q_heads"]:
    """Which of the heads side by side in a latent is each query head's own."""
    return torch.arange(kv_heads).repeat_interleave(q_heads // kv_heads) % heads_per_latent


def rescaled(maps: QKReduction) -> QKReduction:
    """The same logits with unit columns in the keys' maps, pair by pair, so that what is cached stays of their size."""
    size = maps.k_map.square().sum(1).unflatten(-1, (2, -1)).mean(1).sqrt().clamp_min(1e-12).repeat(1, 2)[:, None]
    group_size = len(maps.q_map) // len(maps.k_map)
    return replace(maps, q_map=maps.q_map * size.repeat_interleave(group_size, dim=0), k_map=maps.k_map / size)


def project_tail(q_cov: Tensor, k_cov: Tensor) -> Float[Tensor, "dims"]:
    """What `project` leaves of the expected squared logits, by dims kept (0 to head_dim), summed over KV heads.

    Args:
        q_cov: Rotated queries, (q_heads, head_dim, head_dim).
        k_cov: Rotated keys, (kv_heads, head_dim, head_dim), or by latent: then a dim kept per head is m of the latent.
    """
    tail = _tail(_singular_values(_pooled_queries(q_cov, k_cov), k_cov))
    return tail[:: k_cov.shape[1] // q_cov.shape[1]]


def value_output_tail(o_cov: Tensor, o_weight: Tensor, *, kv_heads: int) -> Float[Tensor, "dims"]:
    """What `value_output_svd` leaves of the expected squared output, by dims kept, summed over KV heads."""
    root, w = _output_factors(o_cov, o_weight, kv_heads)[1:]
    return _tail(torch.linalg.svdvals(root @ w))[:: o_cov.shape[0] * o_cov.shape[1] // o_weight.shape[1]]


def _tail(singular_values: Tensor) -> Tensor:
    """Σ of the squares beyond the first r, over heads, for r = 0 … dim: (heads, dim) → (dim + 1,)."""
    energy = singular_values.square().sum(0)
    return torch.cat((energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)))


def complex_covariance(cov: Float[Tensor, "heads head_dim head_dim"]) -> Tensor:
    """E[z zᴴ] of the rotary pairs read as complex numbers, (heads, head_dim/2, head_dim/2) complex128."""
    half = cov.shape[-1] // 2
    xx, xy, yx, yy = cov[:, :half, :half], cov[:, :half, half:], cov[:, half:, :half], cov[:, half:, half:]
    return torch.complex((xx + yy).double(), (yx - xy).double())


def _pair_energy(cov: Tensor) -> Tensor:
    """E‖x_j‖² of each rotary pair, (heads, head_dim/2)."""
    first, second = cov.diagonal(dim1=-2, dim2=-1).chunk(2, dim=-1)
    return first + second


def _real_map(a: Tensor) -> Tensor:
    """The real (head_dim, d) form of z' = aᴴz for complex `a` (heads, half, slots)."""
    return torch.cat((torch.cat((a.real, -a.imag), dim=-1), torch.cat((a.imag, a.real), dim=-1)), dim=-2)


def _roots(cov: Tensor) -> tuple[Tensor, Tensor]:
    """Hermitian square root and its pseudo-inverse; directions without energy are left out."""
    values, vectors = torch.linalg.eigh(cov)
    floor = values[..., -1:].clamp_min(torch.finfo(torch.float64).tiny) * 1e-9
    alive = values > floor
    root = torch.where(alive, values.clamp_min(0).sqrt(), 0.0)
    inverse = torch.where(alive, values.clamp_min(floor).rsqrt(), 0.0)
    return (vectors * root[..., None, :]) @ vectors.mH, (vectors * inverse[..., None, :]) @ vectors.mH


def _singular_values(q_cov: Tensor, k_cov: Tensor) -> Tensor:
    return torch.linalg.svdvals(_roots(q_cov)[0] @ _roots(k_cov)[0])


def _joint_svd(q_cov: Tensor, k_cov: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Maps (heads, dim, rank) for queries and keys that keep the best rank-`rank` part of E|qᴴk|²."""
    k_root, k_inverse = _roots(k_cov)
    v = torch.linalg.svd(_roots(q_cov)[0] @ k_root).Vh.mH[..., :rank]
    k_map, q_map = _orthonormal(k_inverse @ v, k_root @ v)
    return q_map, k_map


def _orthonormal(cached: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The same product of two maps (heads, dim, rank), with orthonormal columns in the first.

    So what is cached stays a projection of the teacher's keys or values, of their size, and training steps that suit
    the teacher's weights suit the student's.
    """
    q, r = torch.linalg.qr(cached)
    return q, other @ r.mH
