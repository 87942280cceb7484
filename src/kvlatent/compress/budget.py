"""One byte budget for the whole model, spent over its layers and over keys against values by measured loss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from kvlatent.compress.allocation import Allocation, by_layer, probe_dims, probes_of
from kvlatent.compress.bits import as_codes, bits_of_window, spend_bits, total_bits
from kvlatent.compress.fill import fill
from kvlatent.compress.methods.project import project_tail
from kvlatent.compress.planning import plan_reduction, reductions, requested
from kvlatent.compress.statistics import Statistics, calibrate
from kvlatent.compress.values import value_output_tail
from kvlatent.data.blocks import batch_size_for
from kvlatent.errors import UserError
from kvlatent.files import scratch_folder
from kvlatent.kernels.layout import BITS
from kvlatent.model.attention import LatentAttention, attention_of
from kvlatent.model.graft import graft, head_dim_of
from kvlatent.model.layers import embedded, layer_arguments, output_logits
from kvlatent.model.offload import OffloadedLayers, at_hand
from kvlatent.model.sizes import counted_context, layer_caches, left_whole, reduced_layers
from kvlatent.model.spec import near_bytes
from kvlatent.model.window import ALL_FAR, Near

PROBE_STRIDE = 4
"""Probes compare the next token's distributions at every so many positions: the head costs as much as many layers."""
PROBE_POSITIONS = 64
"""Their logits over the vocabulary are held for so many positions at a time."""
PLAN_TOKENS = 4096
"""Without statistics, a budget is spent by those of this much of the calibration text."""
PROBE_TOKENS = (2048, 4096)
"""How much layers matter is measured on an eighth of the text, within these limits; less is too few documents."""
PIECE = 1024
"""Both are taken evenly from all of the text, in pieces of this many tokens, read as if they began a context."""


def step_of(head_dim: int) -> int:
    """Dims are spent in steps of a sixteenth of head_dim (8 of 128): even, and wide enough for kernels' loads."""
    return max(2, head_dim // 16)


def far_share(config: PreTrainedConfig, budget: float, near: Near, window_bits: int = 16) -> float:
    """The share of far tokens' bytes that remains of a budget when what stays whole is paid for: layers, and tokens.

    Args:
        config: The teacher's.
        budget: Share of the cache bytes that is kept of a sequence of `counted_context` tokens.
        near: Tokens met whole.
        window_bits: Bits of their numbers.

    Raises:
        UserError: The budget is not a share, what stays whole alone costs more, or there is nothing far.
    """
    _check_share(budget)
    tokens, layers, whole = counted_context(config), layer_caches(config, 1), left_whole(config)
    teacher = sum(layer.held(tokens)[1] for layer in layers)
    reduced = [layer._replace(near=near).held(tokens) for i, layer in enumerate(layers) if i not in whole]
    of_layers, of_window, far = (
        sum(layers[i].held(tokens)[1] for i in whole), *(sum(part) for part in zip(*reduced, strict=True))
    )  # fmt: skip
    sliding = None if whole else layers[0].sliding
    if sliding is not None and near.window >= sliding - 1:
        raise UserError(
            f"all layers have a sliding window of {sliding} tokens, so nothing is far beside a window of "
            f"{near.window}; give a shorter --window"
        )
    heads, dim = config.num_key_value_heads, head_dim_of(config)
    paid = of_layers + of_window * near_bytes(dim, window_bits, heads, 2) / near_bytes(dim, 16, heads, 2)
    if paid and paid >= budget * teacher:
        parts = [f"a window of {near.window} tokens and {near.sinks} sinks"] if near.window else []
        if slide := [layers[i].sliding for i in whole if layers[i].sliding]:
            parts.insert(0, f"{len(slide)} layers that stay whole, since they slide over {slide[0]} tokens,")
        raise UserError(
            f"{' and '.join(parts)} alone take{'' if whole else 's'} {paid / teacher:.3g} of the cache of {tokens} "
            f"tokens; give a larger budget than {budget}{', or a shorter --window' if near.window else ''}"
        )
    return budget if not paid else (budget * teacher - paid) / far


def total_dims(config: PreTrainedConfig, budget: float, near: Near = ALL_FAR) -> int:
    """d_qk + d_vo of all reduced layers that a share of the cache bytes pays for; KV heads of a layer cost the same.

    Raises:
        UserError: The budget is not a share, or leaves less than a step per layer for keys and for values.
    """
    share = far_share(config, budget, near)
    head_dim, layers = head_dim_of(config), len(reduced_layers(config))
    step = step_of(head_dim)
    total = int(share * 2 * head_dim * layers + 1e-9) // step * step
    if total < 2 * step * layers:
        larger = f"at least {step / head_dim:g}" if share == budget else "a larger one"
        raise UserError(f"budget {budget} leaves less than {step} of {head_dim} dims; give {larger}")
    return total


def uniform_dims(config: PreTrainedConfig, budget: float) -> int:
    """The even number of dims per head, d_qk and d_vo alike, nearest below `budget` × head_dim.

    Args:
        config: The teacher's.
        budget: Share of the cache bytes kept.

    Raises:
        UserError: The budget is not a share, or leaves less than one rotary pair.
    """
    _check_share(budget)
    head_dim = head_dim_of(config)
    dims = int(budget * head_dim + 1e-9) // 2 * 2
    if dims < 2:
        raise UserError(f"budget {budget} leaves no rotary pair of head_dim {head_dim}; give at least {2 / head_dim:g}")
    return dims


def _check_share(budget: float) -> None:
    if not 0 < budget <= 1:
        raise UserError(f"budget is the share of the cache bytes that is kept, above 0 and at most 1; got {budget}")


def plan(
    teacher: PreTrainedModel,
    statistics: Statistics,
    budget: float,
    *,
    bits: int | None = None,
    offloaded: OffloadedLayers | None = None,
) -> Allocation:
    """Spend `budget`, a share of the cache bytes, where the teacher's statistics expect it to save the most loss.

    Args:
        teacher: A stock model of a supported family.
        statistics: From `calibrate`, with losses from `probe`.
        budget: Share of the bytes of a 16-bit cache, tokens met whole included.
        bits: Of every number of a far token: 8, 4, 2 or 1, or 16, which spends it on dims alone; None mixes bits
            where the statistics are for a window, and is 16 elsewhere.
        offloaded: From `offload.open_offloaded`, with its teacher.

    Raises:
        UserError: The budget can't be, or the statistics were never probed.
    """
    near = statistics.near
    if not as_codes(bits, near):
        return spend(teacher, statistics, total_dims(teacher.config, budget, near), offloaded=offloaded)
    of_near = bits_of_window(teacher.config, budget, bits, near)
    share = far_share(teacher.config, budget, near, of_near)
    choices = BITS if bits is None else (bits,)
    return replace(spend_bits(teacher, statistics, share, choices=choices, offloaded=offloaded), window_bits=of_near)


def check_budget(config: PreTrainedConfig, budget: float, bits: int | None, near: Near, heads_per_latent: int) -> None:
    """Raise `UserError` for a budget that `plan` couldn't spend."""
    if as_codes(bits, near):
        share = far_share(config, budget, near, bits_of_window(config, budget, bits, near))
        total_bits(config, heads_per_latent, share, BITS if bits is None else (bits,))
    else:
        total_dims(config, budget, near)


def spend(
    teacher: PreTrainedModel, statistics: Statistics, total: int, *, offloaded: OffloadedLayers | None = None
) -> Allocation:
    """Share dims among layers, keys and values, for the least expected loss; `left_whole` layers have all of theirs.

    Layers and keys against values differ; KV heads of one layer can't, since a cache tensor
    (batch, kv_heads, seq, d) has one width.

    Args:
        teacher: A stock model of a supported family.
        statistics: From `calibrate`, with losses from `probe`.
        total: d_qk + d_vo of all reduced layers, from `total_dims`.
        offloaded: From `offload.open_offloaded`, with its teacher.

    Raises:
        UserError: The statistics were never probed.
    """
    config = teacher.config
    step, every, kept = step_of(head_dim_of(config)), range(config.num_hidden_layers), reduced_layers(config)
    curves, layers = loss_curves(teacher, statistics, offloaded)[:, kept], len(kept)  # (2, layers, head_dim + 1)
    steps = curves.flatten(0, 1)[:, ::step]
    spent = allocate(steps, total // step, floor=1)
    dims = [step * n for n in spent]
    losses = [float(curve[n]) for curve, n in zip(steps, spent, strict=True)]
    each, between = divmod(total / (2 * layers), 1)
    alike = torch.lerp(curves[..., int(each)], curves[..., min(int(each) + 1, curves.shape[-1] - 1)], between)
    d_qk, d_vo = (by_layer(kept, x, every, head_dim_of(config)) for x in (dims[:layers], dims[layers:]))
    qk_loss, vo_loss = (by_layer(kept, x, every, 0.0) for x in (losses[:layers], losses[layers:]))
    others = {"the same dims in every layer": float(alike.sum())}
    return Allocation(
        d_qk=d_qk, d_vo=d_vo, qk_loss=qk_loss, vo_loss=vo_loss, alternatives=others, whole_layers=left_whole(config)
    )


def planning_statistics(
    teacher: PreTrainedModel,
    ids: Int[Tensor, "blocks block_size"],
    *,
    heads_per_latent: int | None = None,
    near: Near = ALL_FAR,
    offloaded: OffloadedLayers | None = None,
) -> Statistics:
    """What a budget is spent by where there are no statistics yet: those of some of the calibration text."""
    pieces, size = _pieces(ids, PLAN_TOKENS), batch_size_for(PIECE)
    statistics = calibrate(
        teacher, pieces, batch_size=size, heads_per_latent=heads_per_latent, near=near, about={}, offloaded=offloaded
    )
    statistics.probes = probe(teacher, statistics, probe_text(ids), offloaded=offloaded)
    return statistics


def probe_text(ids: Int[Tensor, "blocks block_size"]) -> Int[Tensor, "pieces piece_size"]:
    """What of a calibration text the layers are probed on."""
    least, most = PROBE_TOKENS
    return _pieces(ids, min(max(ids.numel() // 8, least), most))


def _pieces(ids: Int[Tensor, "blocks block_size"], tokens: int) -> Int[Tensor, "pieces piece_size"]:
    """So many tokens of a text, or less."""
    size = min(PIECE, ids.shape[1])
    pieces = ids.unfold(1, size, size).flatten(0, 1)
    return pieces[:: math.ceil(len(pieces) * size / tokens)]


def loss_curves(
    teacher: PreTrainedModel, statistics: Statistics, offloaded: OffloadedLayers | None = None
) -> Float[Tensor, "2 layers dims"]:
    """Expected loss in nats per token by dims kept, for each layer's keys [0] and values [1].

    Probes say how much is lost at half the dims, the tail of singular values how the loss falls around that.
    """
    tails = []
    for index, (layer, stats) in enumerate(zip(teacher.model.layers, statistics.layers, strict=True)):
        if not stats.sums:
            tails.append(torch.zeros(2, head_dim_of(teacher.config) + 1, dtype=torch.float64))
            continue
        with at_hand(offloaded, layer, index, "self_attn.o_proj"):
            o_weight = layer.self_attn.o_proj.weight.detach().cpu()
        kv_heads = teacher.config.num_key_value_heads
        k, o = (stats.mean(name, heads_per_latent=statistics.heads_per_latent).cpu() for name in ("k", "o"))
        qk = project_tail(stats.mean("q").cpu(), k)
        tails.append(torch.stack((qk, value_output_tail(o, o_weight, kv_heads=kv_heads))))
    curves = torch.stack(tails, dim=1)
    probes = probes_of(statistics)
    # A layer of so low a rank that nothing is lost at half its dims has no tail there, only rounding.
    least = (1e-6 * curves[..., 0]).clamp_min(torch.finfo(torch.float64).tiny)
    scale = probes / torch.maximum(curves[..., probe_dims(curves.shape[-1] - 1)], least)
    return curves * scale[..., None]


@torch.no_grad()
def probe(
    teacher: PreTrainedModel,
    statistics: Statistics,
    ids: Int[Tensor, "blocks block_size"],
    *,
    offloaded: OffloadedLayers | None = None,
) -> Float[Tensor, "2 layers"]:
    """KL from the teacher, in nats per token, when one layer alone has narrow keys [0] or narrow values [1].

    Every probe goes through the layers behind its own: layers² forwards of one layer on `ids`. All probes advance
    together, so each layer's weights are used once. Layers that a budget leaves whole are not probed, and cost 0.

    Args:
        teacher: A stock model of a supported family.
        statistics: What the probes' reductions are derived from.
        ids: Token blocks.
        offloaded: From `offload.open_offloaded`, with its teacher.
    """
    student, kept = graft(teacher, share=True), reduced_layers(teacher.config)
    head_dim, layers = head_dim_of(teacher.config), student.model.layers
    narrow = probe_dims(head_dim)
    plans = [
        plan_reduction(
            teacher,
            requested(
                teacher.config,
                preset="best",
                qk="project",
                d_qk=d_qk,
                d_vo=d_vo,
                heads_per_latent=statistics.heads_per_latent,
                window=statistics.near.window,
                sinks=statistics.near.sinks,
            ),
        )
        for d_qk, d_vo in ((narrow, head_dim), (head_dim, narrow))
    ]
    state = embedded(student, ids)
    arguments = layer_arguments(student, torch.zeros(len(ids), dtype=torch.long), ids.shape[1])

    def log_probs(hidden: Tensor) -> Tensor:
        return output_logits(student, student.model.norm(hidden)).log_softmax(-1)

    with _room(2 * len(kept), state, offloaded) as probes:
        begun = 0
        for index, kwargs in enumerate(tqdm(arguments, unit="layer", desc="probe")):
            layer, stats = layers[index], statistics.layers[index]
            attention = attention_of(layer)
            with at_hand(offloaded, layer, index):
                for hidden in probes[:begun]:
                    hidden.copy_(layer(hidden.to(state.device), **kwargs))
                unchanged = layer(state, **kwargs)
                for plan in plans if index in kept else ():
                    reduced = LatentAttention(student.config, index, attention, plan.spec)
                    layer.self_attn = fill(reduced, attention, *reductions(plan, index, attention, stats))
                    probes[begun].copy_(layer(state, **kwargs))
                    begun += 1
                state = unchanged
                if attention is not None:
                    layer.self_attn = attention
        at = torch.arange((ids.shape[1] - 1) % PROBE_STRIDE, ids.shape[1], PROBE_STRIDE)
        compared = torch.cartesian_prod(torch.arange(len(ids)), at)
        losses = torch.zeros(len(probes), dtype=torch.float64)
        for block, position in (part.unbind(1) for part in compared.split(PROBE_POSITIONS)):
            wanted = log_probs(state[block, position])
            narrowed = (x[block, position].to(state.device) for x in probes)
            losses += torch.stack(
                [F.kl_div(log_probs(x), wanted, reduction="sum", log_target=True) for x in narrowed]
            ).cpu()
    mean = losses / len(compared)
    found = torch.zeros(2, len(layers), dtype=torch.float64)
    found[:, kept] = mean.view(-1, 2).T
    return found.clamp_min(0)  # below it by rounding, where nothing is lost


@contextmanager
def _room(count: int, like: Tensor, offloaded: OffloadedLayers | None) -> Iterator[list[Tensor]]:
    """Room for so many hidden states, which together weigh as much as a model: on disk, where that is too."""
    if offloaded is None:
        yield list(like.new_empty(count, *like.shape))
        return
    with scratch_folder() as folder:
        size = count * like.numel()
        mapped = torch.from_file(str(folder / "probes.bin"), shared=True, size=size, dtype=like.dtype)
        yield list(mapped.view(count, *like.shape))


def allocate(curves: Float[Tensor, "items options"], total: int, *, floor: int) -> list[int]:
    """Give every item a number of units, `total` in all, for the least sum of losses.

    Exact, by dynamic programming over items; curves needn't be convex.

    Args:
        curves: Loss of each item by the number of units it gets, 0 to options - 1.
        total: Units to spend, all of them.
        floor: Units that each item gets at least.

    Raises:
        UserError: `total` can't be spent exactly.
    """
    items, most = curves.shape[0], curves.shape[1] - 1
    if not items * floor <= total <= items * most:
        raise UserError(f"{total} units can't be shared among {items} items of {floor} to {most} units each")
    best = torch.full((total + 1,), torch.inf, dtype=torch.float64)
    best[0] = 0.0
    choices: list[Tensor] = []
    for curve in curves.double():
        options = torch.full((most + 1, total + 1), torch.inf, dtype=torch.float64)
        for units in range(floor, min(most, total) + 1):
            options[units, units:] = best[: total + 1 - units] + curve[units]
        best, choice = options.min(0)
        choices.append(choice)
    spent: list[int] = []
    for choice in reversed(choices):
        spent.append(int(choice[total - sum(spent)]))
    return spent[::-1]
