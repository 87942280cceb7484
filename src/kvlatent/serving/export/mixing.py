"""Keys in a basis that blocks of few bits hold well, for llama.cpp's caches in q8_0 and q4_0.

Those share one scale among 32 dims of a token, which a few large dims spoil. llama.cpp spreads them by a Hadamard
rotation, but only in heads of a multiple of 64 dims (b11434, `src/llama-kv-cache.cpp`, 321 to 356). Keys of other
widths can be spread ahead of RoPE, at no cost: it turns pairs of one frequency alike, so a complex map among these
passes it, and its inverse in the queries gives the same logits.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvlatent.compress.linear_algebra import root, root_and_inverse

ROTATED = 64
"""llama.cpp rotates heads of a multiple of so many dims itself."""


def mixed_pairs(
    pairs: Float[Tensor, "heads 2 pairs *inputs"], maps: Float[Tensor, "latents pairs pairs"]
) -> Float[Tensor, "heads 2 pairs *inputs"]:
    """Rows of W_Q or W_K (or biases) with their rotary pairs, as complex numbers, mixed by the map of their latent."""
    z = torch.complex(pairs[:, 0].double(), pairs[:, 1].double()).unflatten(0, (len(maps), -1))
    z = torch.einsum("lab,lhb...->lha...", maps, z).flatten(0, 1)
    return torch.stack((z.real, z.imag), dim=1).to(pairs.dtype)


def key_mixing(layer: Any, inv_freq: Tensor, latents: int) -> dict[str, Tensor]:
    """Maps of each latent's keys and queries, as `mixed_pairs` takes them: k' = Mk and q' = M⁻ᴴq, so q'ᴴk' = qᴴk.

    Among the pairs of a frequency M scales keys and queries to one covariance, which is diagonal, and a Fourier
    transform spreads that evenly. What the layer is given is taken for white but for its norm's weights, so nothing
    has to be run.

    Args:
        layer: A decoder layer with W_Q and W_K as they are exported.
        inv_freq: Of every pair, (pairs,).
        latents: KV heads of the student.
    """
    given, pairs = layer.input_layernorm.weight.detach().double(), len(inv_freq)

    def rows(projection: nn.Linear) -> Tensor:  # (latents, heads, pairs, hidden), with a bias as one more input
        x = projection.weight.detach().double() * given
        x = x if projection.bias is None else torch.cat((x, projection.bias.detach().double()[:, None]), dim=1)
        return torch.complex(*x.unflatten(0, (latents, -1, 2, pairs)).unbind(2))

    q, k = rows(layer.self_attn.q_proj), rows(layer.self_attn.k_proj)
    maps = torch.zeros(2, latents, pairs, pairs, dtype=torch.complex128)
    for frequency in inv_freq.unique():
        at = (inv_freq == frequency).nonzero()[:, 0]
        q_cov, k_cov = (torch.einsum("lhax,lhbx->lab", x[:, :, at], x[:, :, at].conj()) for x in (q, k))
        k_root, k_inverse = root_and_inverse(k_cov)
        _, size, v = torch.linalg.svd(root(q_cov) @ k_root)
        size = size.clamp_min(1e-6 * float(size.max()) or 1.0).sqrt()
        spread = torch.fft.fft(torch.eye(len(at), dtype=torch.complex128), norm="ortho")
        inside = (slice(None), at[:, None], at)
        maps[0][inside] = spread @ (size[:, :, None] * (v @ k_inverse))
        maps[1][inside] = spread @ ((v @ k_root) / size[:, :, None])
    return {"k_proj": maps[0], "q_proj": maps[1]}
