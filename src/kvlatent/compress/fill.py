"""Weights of a reduced attention: the unreduced ones under head maps."""

from __future__ import annotations

import torch

from kvlatent.compress.codes import coded, layer_axes
from kvlatent.compress.maps import QKReduction, VOReduction, own_part
from kvlatent.compress.statistics import LayerStatistics
from kvlatent.model.attention import LatentAttention


@torch.no_grad()
def fill(
    reduced: LatentAttention,
    whole: LatentAttention,
    qk: QKReduction,
    vo: VOReduction,
    statistics: LayerStatistics | None = None,
) -> LatentAttention:
    """Write into `reduced` the weights of the unreduced attention `whole` under the given maps.

    Where latents are codes, maps are made fit for them by the layer's `statistics`.
    """
    if reduced.codes is not None:
        assert statistics is not None
        found = layer_axes(statistics, qk, vo, whole.o_proj.weight, kv_heads=whole.kv_heads)
        k_codes, v_codes = reduced.codes
        qk, vo, means = coded(qk, vo, found, (k_codes.groups, v_codes.groups))
        for buffer, mean in zip((reduced.k_mean, reduced.v_mean), means, strict=True):
            assert buffer is not None
            buffer.copy_(mean)
    heads_and_maps = (
        (reduced.q_proj, whole.q_proj, qk.q_map if reduced.qk_map == "folded" else None),
        (reduced.k_proj, whole.k_proj, qk.k_map if reduced.qk_map == "folded" else None),
        (reduced.v_proj, whole.v_proj, vo.v_map if reduced.v_map is None else None),
    )
    for new, old, head_map in heads_and_maps:
        for name, parameter in new.named_parameters():
            value = getattr(old, name).double()
            if head_map is not None:  # (heads·head_dim, …) → (heads·d, …)
                by_head = value.unflatten(0, (len(head_map), -1))
                value = torch.einsum("hdc,hd...->hc...", head_map.to(value.device), by_head).flatten(0, 1)
            parameter.copy_(value)
    by_head = whole.o_proj.weight.double().unflatten(1, (whole.q_heads, -1))  # (hidden, q_heads, head_dim)
    heads, grouped = torch.arange(whole.q_heads), reduced.heads_per_latent
    o_map = vo.o_map.repeat_interleave(whole.q_heads // len(vo.o_map), dim=0).unflatten(2, (grouped, -1))
    o_map = o_map[heads, :, own_part(whole.q_heads, whole.kv_heads, grouped)]  # (q_heads, d_vo, head_dim)
    if reduced.o_map is None:
        reduced.o_proj.weight.copy_(torch.einsum("hcd,xhd->xhc", o_map.to(by_head.device), by_head).flatten(1))
    else:
        reduced.o_map.copy_(o_map)
        reduced.o_proj.weight.copy_(whole.o_proj.weight)
    if reduced.o_proj.bias is not None:
        reduced.o_proj.bias.copy_(whole.o_proj.bias)
    if reduced.g_proj is not None and whole.g_proj is not None:
        reduced.g_proj.load_state_dict(whole.g_proj.state_dict())
    if reduced.v_map is not None:
        reduced.v_map.copy_(vo.v_map)
    if reduced.q_map is not None and reduced.k_map is not None:
        reduced.q_map.copy_(qk.q_map)
        reduced.k_map.copy_(qk.k_map)
    if reduced.freq_index is not None:
        assert qk.freq_index is not None
        reduced.freq_index.copy_(qk.freq_index)
    return reduced
