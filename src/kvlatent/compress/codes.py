"""Maps that make latents fit to be codes, and what dims and their bits cost.

In the axes of a layer's joint SVD every dim adds its own part to the expected squared error of the logits, or of the
attention's output: all of its energy if it is dropped, and otherwise noise, the share of its spread that its bits leave
(reverse water-filling; Cover and Thomas, Elements of Information Theory, 10.3.3). Noise reaches tokens one by one: it
counts with the attention a token gets for keys, and with that attention's square for values, which are averaged.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kvlatent.compress.linear_algebra import root_and_inverse
from kvlatent.compress.maps import QKReduction, VOReduction
from kvlatent.compress.statistics import LayerStatistics
from kvlatent.compress.values import outputs_by_latent
from kvlatent.kernels.layout import Groups

SILENT = 1e-30
"""A layer whose latents are no larger than this has none, such as one that slides over less than the window."""


@dataclass(frozen=True, kw_only=True)
class Axes:
    """Dims of a layer's keys or values in which errors add up, the largest energy first."""

    to: Float[Tensor, "latents dims dims"]
    """From the dims of the maps they are of."""
    back: Float[Tensor, "latents dims dims"]
    """What undoes it on the other side: to·backᵀ = 1."""
    mean: Float[Tensor, "latents 1 dims"]
    dropped: Float[Tensor, "dims"]
    """What is lost of the squared logits or outputs without each dim, over all latents."""
    spread: Float[Tensor, "latents dims"]
    """Variance of single tokens, weighted as their noise counts."""

    @property
    def noise(self) -> Float[Tensor, "dims"]:
        """What noise as large as the tokens themselves would cost in each dim, over all latents."""
        return self.spread.sum(0)


def axes(metric: Tensor, energy: Tensor, single: Tensor) -> Axes:
    """The axes in which errors of cached vectors x, which cost xᵀ·metric·x, and their energy are diagonal.

    Args:
        metric: (latents, dims, dims).
        energy: Second moment of what is lost with dims, likewise.
        single: Of single tokens with a constant 1, (latents, dims + 1, dims + 1).
    """
    root, inverse = root_and_inverse(metric)
    values, vectors = torch.linalg.eigh(root @ energy @ root)
    vectors = vectors.flip(-1)
    to, back = root @ vectors, inverse @ vectors
    weight = single[:, -1:, -1:].clamp_min(torch.finfo(single.dtype).tiny)
    mean = single[:, -1:, :-1] / weight
    covariance = single[:, :-1, :-1] - mean.mT @ mean * weight
    spread = (to * (covariance @ to)).sum(1).clamp_min(0)
    return Axes(to=to, back=back, mean=mean @ to, dropped=values.flip(-1).clamp_min(0).sum(0), spread=spread)


class LayerAxes(NamedTuple):
    """Those of one layer."""

    keys: Axes
    values: Axes


def layer_axes(
    statistics: LayerStatistics, qk: QKReduction, vo: VOReduction, o_weight: Tensor, *, kv_heads: int
) -> LayerAxes:
    """The axes of what maps after RoPE cache of a layer.

    Args:
        statistics: Of the layer.
        qk: Maps of queries and keys.
        vo: Maps of values and outputs.
        o_weight: The stock output projection.
        kv_heads: Heads of the stock model.
    """
    m = kv_heads // len(qk.k_map)
    heads = (qk.q_map.mT @ statistics.mean("q") @ qk.q_map).unflatten(0, (len(qk.k_map), -1)).sum(1)
    keys = axes(heads, _under(qk.k_map, statistics.mean("k", heads_per_latent=m)), _single(qk.k_map, statistics, "k"))
    cov, w = outputs_by_latent(statistics.mean("o", heads_per_latent=m), o_weight, kv_heads)
    outputs = vo.o_map @ w
    values = axes(outputs @ outputs.mT, _under(vo.v_map, cov), _single(vo.v_map, statistics, "v"))
    return LayerAxes(keys, values)


def _under(maps: Tensor, moment: Tensor) -> Tensor:
    return maps.mT @ moment @ maps


def _single(maps: Tensor, statistics: LayerStatistics, name: str) -> Tensor:
    wide = torch.stack([torch.block_diag(x, x.new_ones(1, 1)) for x in maps])
    queries = len(statistics.sums["q"]) // len(maps)  # other moments are means over the query heads of a latent
    return _under(wide, statistics.mean(f"{name}_single")) / queries


def coded(
    qk: QKReduction, vo: VOReduction, found: LayerAxes, groups: tuple[Groups, Groups]
) -> tuple[QKReduction, VOReduction, tuple[Tensor, Tensor]]:
    """Maps to latents that are fit to be codes, and the means of these, (latents, 1, dims) for keys and for values."""
    (k_to, k_back, k_mean), (v_to, v_back, v_mean) = (_fitted(x, y) for x, y in zip(found, groups, strict=True))
    q_back = k_back.repeat_interleave(len(qk.q_map) // len(k_back), dim=0)
    qk = replace(qk, q_map=qk.q_map @ q_back, k_map=qk.k_map @ k_to)
    return qk, VOReduction(v_map=vo.v_map @ v_to, o_map=v_back.mT @ vo.o_map), (k_mean, v_mean)


def _fitted(found: Axes, groups: Groups) -> tuple[Tensor, Tensor, Tensor]:
    """Axes scaled to equal size and rotated within groups of equal bits, and the means in them."""
    dims = sum(n for n, _ in groups)
    kept = found.noise[:dims].argsort(descending=True)  # the largest get most bits
    sizes = found.spread[:, None, kept].sqrt()
    largest = sizes.amax()
    sizes = sizes.clamp_min(1e-6 * largest if largest > SILENT else 1.0)
    generator = torch.Generator().manual_seed(0)
    turns = [torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0] for n, _ in groups]
    turn = torch.block_diag(*turns).to(sizes)
    to, back = found.to[..., kept] / sizes @ turn, found.back[..., kept] * sizes @ turn
    return to, back, found.mean[..., kept] / sizes @ turn
