"""How a converted checkpoint's heads fit vLLM's cache: the widths its kernels want and what they cost.

Imports no vLLM, so that it can be asked where there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from kvlatent.errors import UserError
from kvlatent.model.spec import LatentSpec, bytes_per_token

Backend = Literal["CPU_ATTN", "EQUAL", "DIFFKV"]
"""vLLM's attention on the CPU; a GPU's backends with keys and values of one size; those with a size for each."""
CPU_HEAD_SIZES = (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Sizes that vLLM's CPU kernels are compiled for."""


def check_windowless(spec: LatentSpec) -> None:
    """Raise `UserError` for a student with what the plugin doesn't know: a window of whole tokens, or whole layers.

    In vLLM a layer has one cache, not two.
    """
    if spec.whole_layers:
        raise UserError(
            f"kvlatent's plugin for vLLM reduces every layer, and this student leaves {len(spec.whole_layers)} whole; "
            "it runs on transformers with kvlatent, and a model converted with --d-qk, --d-vo and --window 0 runs here"
        )
    if spec.window:
        raise UserError(
            f"vLLM has one cache per layer, and this student needs two: its newest {spec.window} tokens whole, the "
            "others as latents; it runs on transformers with kvlatent, and a model converted with --window 0 runs here"
        )


def cache_widths(spec: LatentSpec, backend: Backend, *, fp8: bool = False) -> tuple[tuple[int, int], ...]:
    """Dims of keys and values as vLLM caches them, per layer; at least the spec's d_qk and d_vo.

    Of a head, or of a latent that heads share: vLLM knows that as one KV head.

    CPU kernels come in fixed sizes, the same for keys and values, those of an fp8 cache in multiples of 32 alone; GPU
    kernels in multiples of 8, those for two sizes with one size of values for the whole model, keys of 32 and values of
    16 at least.

    Raises:
        UserError: Heads are wider than any that the backend has.
    """
    keys, values = spec.latent_dims
    if backend == "CPU_ATTN":
        return tuple((_cpu_size(max(dims), fp8),) * 2 for dims in zip(keys, values, strict=True))
    if backend == "EQUAL":
        return tuple((_eights(max(dims)),) * 2 for dims in zip(keys, values, strict=True))
    widest = max(16, _eights(max(values)))
    return tuple((max(32, _eights(d_qk)), widest) for d_qk in keys)


def heads_of_keys(spec: LatentSpec, kv_heads: int) -> int:
    """Heads that W_K projects to, and W_V with it in vLLM's one matrix: latents, if the reduction is inside it."""
    return kv_heads // spec.heads_per_latent if spec.qk_map == "folded" else kv_heads


def values_per_head(spec: LatentSpec, width: int) -> int:
    """Rows of W_V for each of `heads_of_keys`, for latents of `width` values; what is over is cut off."""
    return width if spec.qk_map == "folded" else -(-width // spec.heads_per_latent)


def gpu_backend(spec: LatentSpec) -> Backend:
    """The kind of GPU backend that caches fewer bytes: one d_vo for all layers can cost more than two sizes save."""
    one, two = (sum(map(sum, cache_widths(spec, backend))) for backend in ("EQUAL", "DIFFKV"))
    return "EQUAL" if one <= two else "DIFFKV"


def cpu_head_sizes(*, fp8: bool) -> tuple[int, ...]:
    """Sizes that vLLM's CPU kernels have for a cache in the model's dtype, or in fp8."""
    return tuple(size for size in CPU_HEAD_SIZES if not (fp8 and size % 32))


def _cpu_size(d: int, fp8: bool) -> int:
    fitting = [size for size in cpu_head_sizes(fp8=fp8) if size >= d]
    if not fitting:
        raise UserError(f"vLLM's CPU attention takes heads of at most {CPU_HEAD_SIZES[-1]} dims; the model has {d}")
    return fitting[0]


def _eights(d: int) -> int:
    return -(-d // 8) * 8


def cache_bytes_per_token(
    spec: LatentSpec, backend: Backend, *, kv_heads: int, element_size: int, fp8: bool = False
) -> tuple[int, int]:
    """Bytes that one token adds to vLLM's cache, all layers together, and how many of them are padding.

    Args:
        spec: The checkpoint's spec.
        backend: Where it runs.
        kv_heads: Heads of the teacher.
        element_size: Bytes of a number in the model's dtype.
        fp8: Whether they are cached in one byte instead.
    """
    element_size = 1 if fp8 else element_size
    keys, values = zip(*cache_widths(spec, backend, fp8=fp8), strict=True)
    whole = bytes_per_token(keys, values, kv_heads // spec.heads_per_latent, element_size)
    return whole, whole - spec.cache_bytes_per_token(kv_heads, element_size)


def pad_heads(name: str, weight: Tensor, spec: LatentSpec, widths: Sequence[tuple[int, int]]) -> Tensor:
    """Widen an attention weight with zeros, so that its heads come out as wide as the cache wants them.

    Args:
        name: The weight's name in the checkpoint; others than those of `self_attn` are returned as they are.
        weight: The weight, heads in order.
        spec: The checkpoint's spec.
        widths: Of keys and values per layer, from `cache_widths`.
    """
    path = name.split(".")
    if "self_attn" not in path:
        return weight
    layer, part = int(path[path.index("self_attn") - 1]), path[path.index("self_attn") + 1]
    d_qk, d_vo = (dims[layer] for dims in spec.latent_dims)
    wider_keys, wider_values = widths[layer][0] - d_qk, widths[layer][1] - d_vo
    if part in ("q_map", "k_map"):  # (heads, head_dim, d_qk)
        return F.pad(weight, (0, wider_keys))
    if part in ("q_proj", "k_proj") and spec.qk_map == "folded":
        return _pad_rows(weight, d_qk, wider_keys)
    if part == "v_proj":
        rows = values_per_head(spec, widths[layer][1]) * heads_of_keys(spec, spec.heads_per_latent)
        return _pad_rows(weight, d_vo, rows - d_vo)
    if part == "o_map":  # (heads, d_vo, head_dim)
        return F.pad(weight, (0, 0, 0, wider_values))
    if part == "o_proj" and path[-1] == "weight" and not spec.output_map[layer]:
        return _pad_rows(weight.T, d_vo, wider_values).T.contiguous()
    return weight


def _pad_rows(weight: Tensor, d: int, zeros: int) -> Tensor:
    """(heads·d, …) → (heads·(d + zeros), …)."""
    by_head = weight.unflatten(0, (-1, d))
    return F.pad(by_head, (0, 0) * (by_head.dim() - 2) + (0, zeros)).flatten(0, 1)
