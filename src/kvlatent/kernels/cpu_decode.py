"""Decode attention on a CPU at the speed of its memory.

One query per sequence reads the whole cache once and does little with it, so its time is that of reading memory. Work
is split over sequences, key/value heads and the context; every part keeps its own maximum and sum, and the parts are
merged at the end (flash-decoding). It runs on the OpenMP threads that torch uses: a second pool would fight the first
one's waiting threads for the cores.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Iterable
from functools import cache

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from kvlatent.kernels.cpu_codes import vectors_of
from kvlatent.kernels.layout import Layout

STORED = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""Dtypes a cache may have here, by their names in the kernel."""
MOST_KEYS = 64
"""Keys that a kernel takes at a time, at most; parts of a context are multiples of it."""
LEAST_PART = 256
"""Keys below which a context isn't split any further."""
PARTS_PER_THREAD = 8
"""Parts of the work per thread, so that a late thread leaves little to wait for."""
SINGLE_THREAD_BYTES = 64 * 1024
"""Caches below which waking other threads costs more than they give."""


@cache
def available() -> bool:
    """Whether the kernel can be built here; KVLATENT_CPU_KERNEL=0 says no."""
    if os.environ.get("KVLATENT_CPU_KERNEL") == "0":
        return False
    try:
        import llvmlite  # noqa: F401

        ctypes.CDLL(None).GOMP_parallel  # noqa: B018
    except (ImportError, AttributeError, OSError, TypeError):  # no wheel; another OpenMP; Windows
        return False
    return True


def decode_attention(
    q: Float[Tensor, "batch q_heads 1 d_qk"],
    k: Float[Tensor, "batch kv_heads kv_len d_qk"],
    v: Float[Tensor, "batch kv_heads kv_len d_vo"],
    *,
    scale: float,
    mask: Bool[Tensor, "mask_batch 1 1 kv_len"] | None = None,
) -> Float[Tensor, "batch q_heads 1 d_vo"]:
    """Attend with one query per sequence; see `decode_segment`."""
    return attended(q, k, v, scale=scale, mask=mask)[0].to(q.dtype)


def decode_segment(
    q: Float[Tensor, "batch q_heads 1 d_qk"],
    k: Shaped[Tensor, "batch kv_heads kv_len k_row"],
    v: Shaped[Tensor, "batch kv_heads kv_len v_row"],
    *,
    scale: float,
    mask: Bool[Tensor, "mask_batch 1 1 kv_len"] | None = None,
    codes: tuple[Layout, Layout] | None = None,
    means: tuple[Tensor, Tensor] | None = None,
) -> tuple[
    Float[Tensor, "batch q_heads 1 d_vo"], Float[Tensor, "batch q_heads 1 1"], Float[Tensor, "batch q_heads 1 1"]
]:
    """Attend with one query per sequence, to all keys or to one segment of them.

    Logits, softmax and sums are float32 whatever the cache's dtype.

    Args:
        q: Rotated queries.
        k: Rotated keys on the CPU, a dtype of `STORED`, d_qk of them a row, or rows of codes; may be a view of a longer
            buffer.
        v: Values, likewise.
        scale: Logit multiplier.
        mask: True where a query may look, one row per sequence or for all. Blocks of keys that a sequence doesn't see
            aren't read. A query that sees nothing gets zeros.
        codes: What rows of keys and values are, if not numbers.
        means: What was taken from all keys and values before they became codes, (kv_heads, 1, d_qk) and likewise.

    Returns:
        The output; the largest logit, times log2(e); and the sum of the weights relative to that: by the last two,
        outputs over several segments can be merged. Both are float32.
    """
    out, sums = attended(q, k, v, scale=scale, mask=mask, codes=codes, means=means)
    largest, weight = sums.split(1, -1)
    return out if out.dtype == q.dtype else out.to(q.dtype), largest, weight


def attended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | None,
    codes: tuple[Layout, Layout] | None = None,
    means: tuple[Tensor, Tensor] | None = None,
) -> tuple[Float[Tensor, "batch q_heads 1 d_vo"], Float[Tensor, "batch q_heads 1 2"]]:
    """What `decode_segment` gives, in float32, the largest logit beside the sum of weights."""
    batch, q_heads = q.shape[:2]
    rows = q.float().contiguous()
    out = torch.empty(batch, q_heads, 1, v.shape[3] if codes is None else codes[1].width)
    sums = torch.empty(batch, q_heads, 1, 2)
    attend_at(rows.data_ptr(), q_heads, k, v, scale, mask, codes, means, out.data_ptr(), sums.data_ptr())
    return out, sums


def attend_at(
    q: int,
    q_heads: int,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None,
    codes: tuple[Layout, Layout] | None,
    means: tuple[Tensor, Tensor] | None,
    out: int,
    sums: int,
) -> None:
    """`attended`, with queries and results at these addresses, contiguous and float32."""
    (batch, kv_heads, length, d_qk), d_vo = k.shape, v.shape[3]
    group_size = q_heads // kv_heads
    if codes is None:
        run, scratch = _of_numbers(d_qk, d_vo, group_size, k.dtype, v.dtype)
        layouts: tuple[int, ...] = ()
    else:
        run, scratch, (of_keys, of_values) = _of_codes(*codes, group_size)
        held = [x.float().contiguous() for x in means or (torch.zeros(kv_heads, x.width) for x in codes)]
        layouts = held[0].data_ptr(), *of_keys, held[1].data_ptr(), *of_values
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    pairs = batch * kv_heads
    threads = torch.get_num_threads()
    threads = threads if threads > 1 and k.nbytes + v.nbytes >= SINGLE_THREAD_BYTES else 1
    parts = 1 if threads == 1 else max(1, min(length // LEAST_PART, -(-PARTS_PER_THREAD * threads // pairs)))
    part = -(-length // (parts * MOST_KEYS)) * MOST_KEYS
    partial = torch.empty(pairs * parts * scratch)
    mask_at = mask_stride = 0
    if mask is not None:
        mask = mask.contiguous()
        mask_at, mask_stride = mask.data_ptr(), 0 if len(mask) == 1 else length
    call = (
        q, k.data_ptr(), *k.stride()[:3], v.data_ptr(), *v.stride()[:3], mask_at, mask_stride, *layouts,
        _multiplier(scale), kv_heads, length, parts, part, pairs * parts, partial.data_ptr(), out, sums, 0,
    )  # fmt: skip
    run(call, threads)


@cache
def _of_numbers(
    d_qk: int, d_vo: int, group_size: int, k: torch.dtype, v: torch.dtype
) -> tuple[Callable[[Iterable[int], int], None], int]:
    """The kernel for rows of numbers, and how many numbers of scratch memory an item of its work takes."""
    from kvlatent.kernels.cpu_kernel import build

    return build(d_qk, d_vo, group_size, STORED[k], STORED[v]), group_size * (d_vo + 2)


@cache
def _of_codes(
    keys: Layout, values: Layout, group_size: int
) -> tuple[Callable[[Iterable[int], int], None], int, list[tuple[int, ...]]]:
    """The same for rows of codes, and what a call passes of both layouts."""
    from kvlatent.kernels.cpu_codes_kernel import LANES_OF_HEAD, build_attention

    vectors = [vectors_of(x) for x in (keys, values)]
    scratch = group_size * (vectors[0].lanes // 2 + vectors[1].lanes + LANES_OF_HEAD)
    return build_attention(group_size), scratch, [x.fields for x in vectors]


@cache
def _multiplier(scale: float) -> int:
    """A logit multiplier as a kernel, whose exponentials are powers of two, is given it."""
    from kvlatent.kernels.cpu_code import float_field

    return float_field(scale * math.log2(math.e))
