"""Healing in closed form: least squares for linear layers and for head maps, on what they should give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kvlatent.compress.linear_algebra import moment
from kvlatent.compress.maps import QKReduction
from kvlatent.kernels.segment import capped, softmax_beside
from kvlatent.model.attention import LatentAttention, side_by_side
from kvlatent.model.far_maps import FarMaps
from kvlatent.model.rope import rotate
from kvlatent.model.window import ALL_FAR, Near

_BLOCKS = 8
"""Rows of blocks that XᵀX is computed in; half of it follows by symmetry."""

_PARTS = 4
"""Parts that sampled queries are fitted in: causal attention gives nothing to half of the keys."""

_TINY = torch.finfo(torch.float32).tiny


class Ridge:
    """Normal equations of Y ≈ X·Wᵀ + b, summed over batches in float64, solved for W with a pull towards the old W."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear
        inputs, outputs, device = linear.in_features, linear.out_features, linear.weight.device
        # Only the blocks of xx on and above the diagonal are computed; what is below them stays zero.
        self.xx = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.xy = torch.zeros(inputs, outputs, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(
        self,
        x: Float[Tensor, "*batch inputs"],
        y: Float[Tensor, "*batch outputs"],
        *,
        size: Float[Tensor, "*batch 1"] | None = None,
    ) -> None:
        """Add inputs and wanted outputs of one batch; the products are taken in float32.

        Args:
            x: What the layer is given.
            y: What it should give.
            size: What errors are measured against at each position; None is the same for all.
        """
        x, y = x.flatten(0, -2).float(), y.flatten(0, -2).float()
        if self.linear.bias is not None:
            y = y - self.linear.bias.float()
        if size is not None:
            size = size.flatten(0, -2)
            x, y = x / size, y / size
        self.tokens += len(x)
        at = 0
        for rows in x.T.tensor_split(_BLOCKS):
            self.xx[at : at + len(rows), at:] += rows @ x[:, at:]
            at += len(rows)
        self.xy += x.T @ y

    @torch.no_grad()
    def solve(self, *, strength: float) -> None:
        """Move the layer's weights to argmin over W of ‖Y − XW − b‖² + λ‖W − W_old‖².

        λ = `strength` × the mean of ‖x‖² over tokens: it doesn't grow with the text, as XᵀX does, and for many inputs,
        among which an output is shared, it is as strong as for few.
        """
        damping = strength * self.xx.diagonal().sum() / self.tokens
        if damping == 0:  # the inputs are silent, as behind a gate that is zero: nothing to learn from
            return
        xx = self.xx + damping * torch.eye(len(self.xx), dtype=self.xx.dtype, device=self.xx.device)
        wanted = self.xy + damping * self.linear.weight.double().T
        factor = torch.linalg.cholesky(xx, upper=True)  # looks at the upper triangle only
        self.linear.weight.copy_(torch.cholesky_solve(wanted, factor, upper=True).T)


def larger(wanted: Float[Tensor, "*batch hidden"], given: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch 1"]:
    """Root mean square of the teacher's hidden state, `wanted`, or of the student's, whichever is larger.

    Errors are measured against it because the RMSNorm that follows divides by it. The student's counts too since a few
    positions are attention sinks, hundreds of times larger than the rest, and sometimes the student makes one where the
    teacher has none: measured against the teacher's alone, that position would outweigh all text, and the refit
    would take the true sinks away with it.
    """
    size = torch.stack((wanted, given)).float().square().mean(-1, keepdim=True).amax(0).sqrt()
    return torch.where(size > 0, size, torch.inf)  # where both are silent there is nothing to fit


@dataclass(frozen=True, kw_only=True)
class LogitSamples:
    """Queries and keys of some blocks before the maps, and the unreduced attention between them."""

    q: Float[Tensor, "batch q_heads rows head_dim"]
    k: Float[Tensor, "batch latents seq joined"]
    rows: Int[Tensor, "rows"]
    """Positions of the queries, the same in all blocks."""
    logits: Float[Tensor, "batch q_heads rows seq"]
    """What the maps should give, before a soft cap, which only makes errors smaller."""
    probs: Float[Tensor, "batch q_heads rows seq"]
    """Their softmax over visible keys, after a soft cap; zero elsewhere."""

    def parts(self) -> Iterator[LogitSamples]:
        """The same in a few parts, each with no keys behind the last that its queries give attention to."""
        size = -(-len(self.rows) // _PARTS)
        for start in range(0, len(self.rows), size):
            at = slice(start, start + size)
            met = self.probs[:, :, at].flatten(0, 2).any(0).nonzero()
            seq = int(met[-1]) + 1 if len(met) else 1
            yield LogitSamples(
                q=self.q[:, :, at], k=self.k[:, :, :seq], rows=self.rows[at], logits=self.logits[:, :, at, :seq],
                probs=self.probs[:, :, at, :seq],
            )  # fmt: skip


def probabilities(attention: LatentAttention, logits: Tensor, visible: Tensor) -> Tensor:
    """What an attention makes of its logits, (batch, q_heads, rows, seq)."""
    return softmax_beside(capped(logits, attention.cap).masked_fill(~visible, -torch.inf), attention.sinks)


@torch.no_grad()
def sample_logits(
    attention: LatentAttention,
    x: Tensor,
    kwargs: dict[str, Any],
    *,
    rows: Tensor,
    rotated: bool,
    heads_per_latent: int = 1,
    near: Near = ALL_FAR,
) -> LogitSamples:
    """Logits of an unreduced attention between the queries at `rows` and all keys, for `refit_logits`.

    Args:
        attention: The layer's attention, all dims kept.
        x: Normalised inputs, (batch, seq, hidden).
        kwargs: The layer's other arguments: position embeddings and mask.
        rows: Positions of the queries.
        rotated: Return queries and keys after RoPE, for maps that come after it; otherwise before.
        heads_per_latent: KV heads whose keys are returned side by side.
        near: Tokens whose logits don't count.
    """
    cos, sin = kwargs["position_embeddings"]
    q, k, _ = (t.float() for t in attention.queries_keys_values(x, cos, sin, kwargs.get("position_ids")))
    q, mask = q[:, :, rows], kwargs.get("attention_mask")
    if mask is None:
        visible = (torch.arange(k.shape[2], device=k.device) <= rows[:, None])[None, None]
    else:
        visible = mask[:, :, rows]
    grouped = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)
    logits = (grouped @ k.mT).mul_(attention.scale).unflatten(2, (-1, len(rows))).flatten(1, 2)
    probs = probabilities(attention, logits, visible)
    if near.window:
        probs = probs * near.far(rows, torch.arange(k.shape[2], device=k.device))
    if not rotated:
        q, k = attention.turned_back(q, cos[:, rows], sin[:, rows]), attention.turned_back(k, cos, sin)
    return LogitSamples(q=q, k=side_by_side(k, heads_per_latent), rows=rows, logits=logits, probs=probs)


def refit_logits(
    samples: list[LogitSamples],
    maps: QKReduction,
    *,
    turn: tuple[Float[Tensor, "heads seq pairs"], Float[Tensor, "heads seq pairs"]] | None,
    scale: float,
    strength: float,
    rounds: int = 3,
    iterations: int = 6,
) -> QKReduction:
    """Fit the maps of queries, then of keys, and again, to the unreduced logits, for any rotation that follows them.

    With the keys fixed the logits are linear in the queries' maps, and the other way round: alternating least squares.
    An error counts by the attention it meets, less its mean over a query's keys, which softmax doesn't see: to second
    order that is the KL between the attentions. Each half is solved by conjugate gradients, with a ridge that pulls
    towards where it started.

    Args:
        samples: Queries, keys and logits of calibration text.
        maps: Where to start.
        turn: cos and sin of the rotation after the maps, for each KV head or one for all; None where nothing follows.
        scale: Multiplier of the logits.
        strength: Ridge, in units of mean query energy × mean key energy.
        rounds: Times that queries and keys are each fitted.
        iterations: Conjugate-gradient steps of each fit.
    """
    samples = [part for whole in samples for part in whole.parts()]
    q_map, k_map = maps.q_map.float(), maps.k_map.float()
    kv_heads, group_size = len(k_map), len(q_map) // len(k_map)
    queries_per_head = sum(s.q.shape[0] * s.q.shape[2] for s in samples)

    def turned(x: Tensor, at: Tensor | slice, sign: float = 1.0) -> Tensor:
        if turn is None:
            return x
        cos, sin = (part[:, at].to(x) for part in turn)
        if len(cos) > 1:
            cos, sin = (part.repeat_interleave(x.shape[1] // len(cos), dim=0) for part in (cos, sin))
        return rotate(x, cos, sign * sin)

    def grouped(x: Tensor) -> Tensor:  # (batch, q_heads, rows, …) → (batch, kv_heads, group·rows, …)
        return x.unflatten(1, (kv_heads, group_size)).flatten(2, 3)

    def per_head(x: Tensor) -> Tensor:
        return x.unflatten(2, (group_size, -1)).flatten(1, 2)

    def of_keys(s: LogitSamples, x: Tensor) -> Tensor:
        return turned(s.k @ x, slice(s.k.shape[2]))

    # Of both fits: logits of a map, the adjoint of that, and the second moments of what the map takes and meets.
    def logits_of_queries(keys: list[Tensor], i: int, x: Tensor) -> Tensor:
        s = samples[i]
        return per_head(grouped(turned(s.q @ x, s.rows) * scale) @ keys[i].mT)

    def back_to_queries(keys: list[Tensor], i: int, error: Tensor) -> Tensor:
        s = samples[i]
        return moment(s.q, turned(per_head(grouped(error) @ keys[i]), s.rows, -1.0) * scale)

    def logits_of_keys(queries: list[Tensor], i: int, x: Tensor) -> Tensor:
        return per_head(queries[i] @ (of_keys(samples[i], x) * scale).mT)

    def back_to_keys(queries: list[Tensor], i: int, error: Tensor) -> Tensor:
        k = samples[i].k
        return moment(k, turned(grouped(error).mT @ queries[i], slice(k.shape[2]), -1.0) * scale)

    received = [grouped(s.probs).sum(2)[..., None] for s in samples]
    query_moment = _total(moment(s.q, s.q) for s in samples)
    key_moment = _total(moment(s.k, s.k * w) for s, w in zip(samples, received, strict=True))
    for _ in range(rounds):
        keys = [of_keys(s, k_map) for s in samples]
        met = _total(moment(k, k * w) for k, w in zip(keys, received, strict=True)) * scale**2
        met = (met / (group_size * queries_per_head)).repeat_interleave(group_size, dim=0)
        fit = partial(logits_of_queries, keys), partial(back_to_queries, keys)
        q_map = _conjugate_gradients(samples, q_map, *fit, query_moment, met, strength, iterations)
        queries = [grouped(turned(s.q @ q_map, s.rows)) for s in samples]
        met = _total(moment(q, q) for q in queries) * scale**2 / (group_size * queries_per_head)
        fit = partial(logits_of_keys, queries), partial(back_to_keys, queries)
        k_map = _conjugate_gradients(samples, k_map, *fit, key_moment, met, strength, iterations)
    return QKReduction(q_map=q_map.double(), k_map=k_map.double(), freq_index=maps.freq_index)


@torch.no_grad()
def far_bias(
    samples: list[LogitSamples], maps: FarMaps, *, scale: float, cap: float | None = None
) -> Float[Tensor, "q_heads 1"]:
    """What far logits lack on average, so that far tokens get as much attention as from the teacher.

    Softmax is convex: what keys lose makes the sum of its exponentials smaller, and noise makes it larger. A share g of
    attention that changes by g·(1 - g)·d when far logits change by d costs g·(1 - g)·d²/2 nats to second order, so
    queries count by that.

    Args:
        samples: Queries and keys after RoPE, with the attention of the unreduced layer to its far tokens.
        maps: Of the reduced layer.
        scale: Multiplier of the logits.
        cap: Their soft cap.
    """
    lacking = count = torch.zeros(len(maps.q), 1, dtype=torch.float64, device=maps.q.device)
    for s in samples:
        keys = maps.seen(s.k, s.k)[0].repeat_interleave(len(maps.q) // s.k.shape[1], dim=1)
        hidden = s.probs == 0
        whole, reduced = (
            capped(x, cap).masked_fill(hidden, -torch.inf).logsumexp(-1)
            for x in (s.logits, (s.q @ maps.q) @ keys.mT * scale)
        )
        given = s.probs.sum(-1)
        weight = (given * (1 - given)).clamp_min(0)
        lack = torch.where(weight > 0, whole - reduced, 0)  # a query that sees nothing far lacks nothing
        lacking = lacking + (weight * lack).double().sum((0, 2))[:, None]
        count = count + weight.double().sum((0, 2))[:, None]
    return lacking / count.clamp_min(_TINY)


def _conjugate_gradients(
    samples: list[LogitSamples],
    start: Tensor,
    forward: Callable[[int, Tensor], Tensor],
    adjoint: Callable[[int, Tensor], Tensor],
    left: Tensor,
    right: Tensor,
    strength: float,
    iterations: int,
) -> Tensor:
    """Lower the squared error of `forward(map)`, weighted by attention, plus the pull to `start`; all heads at once.

    The normal equations are about left ⊗ right, which is also how they are preconditioned.
    """

    def gradient(logits: Callable[[int], Tensor]) -> Tensor:
        total = torch.zeros_like(start)
        for i, s in enumerate(samples):
            error = logits(i)
            total += adjoint(i, error.sub_((s.probs * error).sum(-1, keepdim=True)).mul_(s.probs))
        return total

    def applied(x: Tensor) -> Tensor:
        return gradient(lambda i: forward(i, x)) + damping * x

    def mean_diagonal(x: Tensor) -> Tensor:
        mean = x.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        return torch.where(mean > _TINY, mean, 1.0)  # heads without energy have no gradient either, and stay

    def inverse(x: Tensor) -> Tensor:
        return torch.linalg.inv(x + 1e-3 * mean_diagonal(x) * torch.eye(x.shape[-1], device=x.device))

    damping = strength * mean_diagonal(left) * mean_diagonal(right)
    left, right = inverse(left), inverse(right)
    result = start
    residual = gradient(lambda i: samples[i].logits - forward(i, start))
    direction = step = left @ residual @ right
    size = (residual * step).sum((-2, -1), keepdim=True)
    for _ in range(iterations):
        image = applied(direction)
        length = size / (direction * image).sum((-2, -1), keepdim=True).clamp_min(_TINY)
        result, residual = result + length * direction, residual - length * image
        step = left @ residual @ right
        before, size = size, (residual * step).sum((-2, -1), keepdim=True)
        direction = step + size / before.clamp_min(_TINY) * direction
    return result


def _total(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(0)
