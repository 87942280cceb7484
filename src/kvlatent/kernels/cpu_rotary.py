"""RoPE of a decode step on a CPU, and the maps after it: one call instead of a dozen small operations per layer."""

from __future__ import annotations

import ctypes

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvlatent.kernels.cpu_decode import STORED, available

SEVERAL_THREADS = 2**18
"""Multiplications from which waking other threads pays."""


def fits(x: Tensor, reduction: Tensor | None) -> bool:
    """Whether `rotate_one` can compute this: one position on a CPU, without gradients or a trace."""
    return (
        x.shape[2] == 1
        and x.device.type == "cpu"
        and x.dtype in STORED
        and not (torch.is_grad_enabled() and (x.requires_grad or (reduction is not None and reduction.requires_grad)))
        and not torch.compiler.is_compiling()
        and type(x) is Tensor
        and available()
    )


def rotate_one(
    x: Float[Tensor, "batch heads 1 dim"],
    cos: Float[Tensor, "#batch 1 pairs"],
    sin: Float[Tensor, "#batch 1 pairs"],
    *,
    freq_index: Int[Tensor, "kv_heads half"] | None = None,
    reduction: Float[Tensor, "heads dim d_qk"] | None = None,
) -> Float[Tensor, "batch heads 1 d_qk"]:
    """Rotate the pairs (j, j + dim / 2) of every head, then multiply by its map.

    Args:
        x: Queries or keys of one position per sequence.
        cos: Cosines of the ladder.
        sin: Sines, likewise.
        freq_index: Which entries of the ladder each group of heads rotates by; all of them in order without it.
        reduction: One map per head.
    """
    from kvlatent.kernels.cpu_rotary_kernel import Kernel, build

    batch, heads, _, width = x.shape
    pairs = cos.shape[-1]
    numbers = x.float().contiguous()
    cos, sin = (part.float().contiguous() for part in (cos, sin))
    maps = None if reduction is None else reduction.float().contiguous()
    d_qk = width if maps is None else maps.shape[-1]
    out = torch.empty(batch, heads, 1, d_qk)
    frequencies, group = 0, 1
    if freq_index is not None:
        freq_index = freq_index.contiguous()
        frequencies, group = freq_index.data_ptr(), heads // len(freq_index)
    call = (ctypes.c_int64 * len(Kernel.fields))(
        numbers.data_ptr(), cos.data_ptr(), sin.data_ptr(), frequencies, 0 if maps is None else maps.data_ptr(),
        out.data_ptr(), batch, group, pairs if len(cos) > 1 else 0, heads, 0,
    )  # fmt: skip
    work = 0 if maps is None else batch * maps.numel()
    run = build(width, None if maps is None else d_qk, freq_index is not None)
    run(call, torch.get_num_threads() if work >= SEVERAL_THREADS else 1)
    return out.to(x.dtype)
