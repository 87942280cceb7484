"""Stock weights in the one form that our modules take: projections apart, rotary pairs half a head apart.

Some families store projections of one input as one matrix, rotate pairs of neighbouring dims, or the first dims of a
head only. Queries and keys keep their products under any order of dims that both share, so the pairs (j, j + d/2) can
be had by reordering rows, and dims that stand still are pairs of frequency 0.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedConfig

from kvlatent.model.families import family_of


def unfused(weights: dict[str, Tensor], config: PreTrainedConfig, *, head_dim: int, rotated: int) -> dict[str, Tensor]:
    """Take a stock model's state dict apart into parameters as a graft names and orders them.

    Args:
        weights: By stock name.
        config: The teacher's.
        head_dim: Dims per head.
        rotated: The first so many of them are rotated.
    """
    split, family = dict[str, Tensor](), family_of(config)
    heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
    for name, value in weights.items():
        stem, _, kind = name.rpartition(".")
        if stem.endswith("self_attn.qkv_proj"):
            stem, names, parts = stem.removesuffix("qkv_proj"), "qkv", value.split([n * head_dim for n in heads])
            split |= {f"{stem}{x}_proj.{kind}": part for x, part in zip(names, parts, strict=True)}
        elif stem.endswith("mlp.gate_up_proj"):
            gate, up = value.chunk(2)
            stem = stem.removesuffix("gate_up_proj")
            split |= {f"{stem}gate_proj.{kind}": gate, f"{stem}up_proj.{kind}": up}
        elif family.gated and stem.endswith("self_attn.q_proj"):  # by head, queries before gates
            queries, gates = value.unflatten(0, (-1, 2, head_dim)).transpose(0, 1).flatten(1, 2)
            split |= {name: queries, f"{stem.removesuffix('q_proj')}g_proj.{kind}": gates}
        else:
            split[name] = value
    if family.interleaved or rotated < head_dim:
        order = rotary_order(head_dim, rotated, interleaved=family.interleaved)
        for name, value in split.items():
            of = name.split(".")[-2]
            if of in ("q_proj", "k_proj"):
                split[name] = value.unflatten(0, (-1, head_dim))[:, order.to(value.device)].flatten(0, 1)
            elif of in ("q_norm", "k_norm"):  # of one head, of each, or of all
                split[name] = value.reshape(-1, head_dim)[:, order.to(value.device)].view_as(value)
    return split


def rotary_order(head_dim: int, rotated: int, *, interleaved: bool) -> Int[Tensor, "head_dim"]:
    """The stock dims of a head in the order that makes its rotary pairs (j, j + head_dim/2), those that turn first.

    Args:
        head_dim: Dims per head.
        rotated: The first so many are rotated.
        interleaved: Pairs are neighbours; otherwise half of `rotated` apart.
    """
    pairs = torch.arange(rotated).view(-1, 2).T if interleaved else torch.arange(rotated).view(2, -1)
    still = torch.arange(rotated, head_dim).view(2, -1)
    return torch.cat((pairs, still), dim=1).flatten()


def split_ffn(mlp: nn.Module) -> Any:
    """A stock FFN; of one with gate and up projection in one matrix, the parts that it would have, weights unset."""
    fused = getattr(mlp, "gate_up_proj", None)
    if not isinstance(fused, nn.Linear):
        return mlp
    inputs, width, biased = fused.in_features, fused.out_features // 2, fused.bias is not None
    where: dict[str, Any] = {"device": fused.weight.device, "dtype": fused.weight.dtype}
    gate, up = (nn.Linear(inputs, width, bias=biased, **where) for _ in range(2))
    return SimpleNamespace(gate_proj=gate, up_proj=up, down_proj=mlp.down_proj, act_fn=mlp.activation_fn)
