"""One budget of bits over layers, keys and values, and dims: reverse water-filling on what each dim costs."""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from kvlatent.compress.allocation import Allocation, by_layer, probe_dims, probes_of
from kvlatent.compress.codes import LayerAxes, layer_axes
from kvlatent.compress.planning import plan_reduction, reductions, requested
from kvlatent.compress.statistics import Statistics
from kvlatent.errors import UserError
from kvlatent.kernels.layout import BITS, DISTORTION, SIZE_BYTES, Groups, Layout
from kvlatent.model.graft import graft, head_dim_of
from kvlatent.model.offload import OffloadedLayers, at_hand
from kvlatent.model.sizes import counted_context, left_whole, reduced_layers
from kvlatent.model.window import Near

CHUNKS = 16, 8
"""Dims of a latent get their bits so many at a time, the most that leaves eight chunks if any does; codes of 8 dims
fill bytes whatever their bits, and kernels like them wide."""

WINDOW_SHARE = 0.15
"""The share of a budget above which the window beside codes has 8 bits: they lose nothing that could be measured, but a
context of no more than the window isn't the teacher's to the last bit any longer, and below it they win next to nothing
(an eighth, of which 16 bits of a window of 128 take 0.13: 92.3 and 92.6 % of far gain)."""


def as_codes(bits: int | None, near: Near) -> bool:
    """Whether far tokens become codes.

    Raises:
        UserError: Bits that can't be, or codes without a window of whole tokens.
    """
    if bits not in (None, 16, *BITS):
        raise UserError(f"bits are 16, {', '.join(map(str, reversed(BITS)))}; got {bits}")
    if bits not in (None, 16) and not near.window:
        raise UserError(f"far tokens become codes of {bits} bits beside a window of whole ones; give a --window")
    return bits != 16 and near.window > 0


def bits_of_window(config: PreTrainedConfig, budget: float, bits: int | None, near: Near) -> int:
    """Bits of the numbers of tokens met whole: 8 beside codes where 16 would take much of the budget, else 16.

    Args:
        config: The teacher's.
        budget: Share of the cache bytes that is kept of a sequence of `counted_context` tokens.
        bits: Asked for far tokens.
        near: Tokens met whole.
    """
    return 8 if as_codes(bits, near) and sum(near) > WINDOW_SHARE * budget * counted_context(config) else 16


def spend_bits(
    teacher: PreTrainedModel,
    statistics: Statistics,
    share: float,
    *,
    choices: Sequence[int] = BITS,
    offloaded: OffloadedLayers | None = None,
) -> Allocation:
    """Share the bits of far tokens among layers, keys and values, and dims.

    A dim that is dropped has no bits, so this is a choice of dims as well. Layers that `left_whole` names keep all of
    theirs, as numbers.

    Args:
        teacher: A stock model of a supported family.
        statistics: From `calibrate`, with losses from `probe`.
        share: Of the 16-bit cache of far tokens.
        choices: Bits that a dim may have.
        offloaded: From `offload.open_offloaded`, with its teacher.

    Raises:
        UserError: The share is too small, or the statistics were never probed.
    """
    config, m = teacher.config, statistics.heads_per_latent
    every, kept = range(config.num_hidden_layers), reduced_layers(config)
    found = full_axes(teacher, statistics, offloaded)
    narrow = probe_dims(head_dim_of(config)) * m
    dropped = torch.stack([torch.stack([side.dropped for side in layer]) for layer in found], dim=1)
    tails = dropped[..., narrow:].sum(-1)
    weights = probes_of(statistics)[:, kept].to(dropped) / tails.clamp_min(1e-6 * dropped.sum(-1))
    total = total_bits(config, m, share, choices)
    groups, losses = share_bits(found, weights, total, choices=choices)
    others: dict[str, float] = {}
    for bits in (16, *reversed(BITS)):
        if (bits,) == tuple(choices):
            continue
        with contextlib.suppress(UserError):  # what the share doesn't pay for is no alternative
            paid = total_bits(config, m, share, (bits,))
            others[f"dims of {bits} bits"] = float(share_bits(found, weights, paid, choices=(bits,))[1].sum())
    d_qk, d_vo = ([-(-Layout(layer[side]).width // m) for layer in groups] for side in (0, 1))
    head_dim = head_dim_of(config)
    return Allocation(
        d_qk=by_layer(kept, [d + d % 2 for d in d_qk], every, head_dim),
        d_vo=by_layer(kept, d_vo, every, head_dim),
        qk_loss=by_layer(kept, losses[0].tolist(), every, 0.0),
        vo_loss=by_layer(kept, losses[1].tolist(), every, 0.0),
        alternatives=others,
        k_codes=by_layer(kept, [layer[0] for layer in groups], every, ()),
        v_codes=by_layer(kept, [layer[1] for layer in groups], every, ()),
        whole_layers=left_whole(config),
    )


def total_bits(config: PreTrainedConfig, heads_per_latent: int, share: float, choices: Sequence[int]) -> float:
    """Bits of one far token of all reduced layers that a share of its 16-bit cache pays for, sizes of rows paid.

    Raises:
        UserError: They are less than every layer needs.
    """
    width = heads_per_latent * head_dim_of(config)
    rows = 2 * len(reduced_layers(config)) * (config.num_key_value_heads // heads_per_latent)
    size = 8 * SIZE_BYTES if min(choices) < 16 else 0  # numbers need none
    least = (min(choices) * chunk_of(width) + size) / (16 * width)
    if share < least:
        raise UserError(f"{share:.3g} of the bytes of far tokens is too little for all layers; they take {least:.3g}")
    return rows * (share * 16 * width - size)


def full_axes(
    teacher: PreTrainedModel, statistics: Statistics, offloaded: OffloadedLayers | None = None
) -> list[LayerAxes]:
    """The axes of every reduced layer at full width."""
    config = teacher.config
    whole = (head_dim_of(config),) * config.num_hidden_layers
    m = statistics.heads_per_latent
    plan = plan_reduction(
        teacher,
        requested(config, preset="best", qk="project", d_qk=whole, d_vo=whole, heads_per_latent=m,
                  window=statistics.near.window, sinks=statistics.near.sinks),
    )  # fmt: skip
    layers = graft(teacher, share=True).model.layers
    found = []
    for index in reduced_layers(config):
        attention, stats = layers[index].self_attn, statistics.layers[index]
        with at_hand(offloaded, layers[index], index, "self_attn.o_proj"):
            maps = reductions(plan, index, attention, stats)
            found.append(layer_axes(stats, *maps, attention.o_proj.weight, kv_heads=config.num_key_value_heads))
    return found


def chunk_of(dims: int) -> int:
    """Dims of a latent that get their bits together."""
    return next((chunk for chunk in CHUNKS if chunk * 8 <= dims), min(CHUNKS[-1], dims))


def share_bits(
    found: Sequence[LayerAxes],
    weights: Float[Tensor, "2 layers"],
    total: float,
    *,
    choices: Sequence[int] = BITS,
) -> tuple[list[tuple[Groups, Groups]], Float[Tensor, "2 layers"]]:
    """Give dims their bits where each saves the most of the expected loss, until the total is spent.

    Args:
        found: Axes of every layer at full width.
        weights: What a unit of each layer's error costs, keys [0] and values [1], in nats per token.
        total: Bits of one token of all latents of all layers.
        choices: Bits that a dim may have.

    Returns:
        The groups of every layer, and the expected losses, (2, layers), in nats per token.
    """
    chunk = chunk_of(len(found[0].keys.dropped))
    latents = len(found[0].keys.to)
    curves: dict[tuple[int, int, int], dict[int, float]] = {}
    dims: dict[tuple[int, int, int], int] = {}
    for index, layer in enumerate(found):
        for side, x in enumerate(layer):
            weight = float(weights[side, index])
            dropped, noise = (y.split(chunk) for y in (x.dropped, x.noise))
            for at, (lost, noisy) in enumerate(zip(dropped, noise, strict=True)):
                losses = {b: weight * float(noisy.sum()) * DISTORTION[b] for b in choices}
                curves[index, side, at] = {0: weight * float(lost.sum())} | losses
                dims[index, side, at] = len(lost)
    spent = dict.fromkeys(curves, 0)
    heap: list[tuple[float, tuple[int, int, int], int]] = []

    def cost(key: tuple[int, int, int], bits: int) -> int:
        return (bits - spent[key]) * dims[key] * latents

    def offer(key: tuple[int, int, int]) -> None:
        """The step up that saves the most per bit, of those that can be paid."""
        now, losses = spent[key], curves[key]
        paid = [b for b in choices if b > now and cost(key, b) <= left]
        steps = [((losses[now] - losses[b]) / ((b - now) * dims[key]), b) for b in paid]
        if steps:
            gain, bits = max(steps)
            heapq.heappush(heap, (-gain, key, bits))

    left = total
    for key in curves:
        if key[2] == 0:  # of every layer, something
            spent[key] = min(choices)
            left -= spent[key] * dims[key] * latents
    for key in curves:
        offer(key)
    while heap:
        gain, key, bits = heapq.heappop(heap)
        if gain < 0:
            if cost(key, bits) <= left:
                left -= cost(key, bits)
                spent[key] = bits
            offer(key)
    loss = torch.zeros_like(weights)
    for (index, side, at), bits in spent.items():
        loss[side, index] += curves[index, side, at][bits]

    def grouped(index: int, side: int) -> Groups:
        """Runs of equal bits, most first; what has none comes last and is left out."""
        chunks = [(spent[key], dims[key]) for key in curves if key[:2] == (index, side)]
        most_first = sorted({bits for bits, _ in chunks if bits}, reverse=True)
        return tuple((sum(n for b, n in chunks if b == bits), bits) for bits in most_first)

    return [(grouped(index, 0), grouped(index, 1)) for index in range(len(found))], loss
