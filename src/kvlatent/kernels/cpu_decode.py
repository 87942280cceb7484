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
from functools import cache

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from kvlatent.kernels.cpu_codes import vectors_of
from kvlatent.kernels.layout import Layout

STORED = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""Dtypes a cache may have here, by their names in the kernel."""
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
    return decode_segment(q, k, v, scale=scale, mask=mask)[0]


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
    from kvlatent.kernels.cpu_kernel import BLOCKS, build

    batch, q_heads, _, d_qk = q.shape
    _, kv_heads, length, d_vo = v.shape
    group_size = q_heads // kv_heads
    if codes is None:
        run, layouts = build(d_qk, d_vo, group_size, STORED[k.dtype], STORED[v.dtype]), []
        scratch = group_size * (d_vo + 2)
    else:
        from kvlatent.kernels.cpu_codes_kernel import LANES_OF_HEAD, build_attention

        run, d_vo, vectors = build_attention(group_size), codes[1].width, [vectors_of(x) for x in codes]
        nothing = [torch.zeros(kv_heads, x.width) for x in codes] if means is None else ()
        held = [x.float().contiguous() for x in means or nothing]
        layouts = [number for x, mean in zip(vectors, held, strict=True) for number in (mean.data_ptr(), *x.fields)]
        keys, values = vectors
        scratch = group_size * (keys.lanes // 2 + values.lanes + LANES_OF_HEAD)
    rows = (q.float() * (scale * math.log2(math.e))).contiguous()
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    pairs = batch * kv_heads
    threads = torch.get_num_threads() if k.nbytes + v.nbytes >= SINGLE_THREAD_BYTES else 1
    parts = 1 if threads == 1 else max(1, min(length // LEAST_PART, -(-PARTS_PER_THREAD * threads // pairs)))
    part = -(-length // (parts * BLOCKS[0])) * BLOCKS[0]
    partial = torch.empty(pairs * parts * scratch)
    out, sums = torch.empty(batch, q_heads, 1, d_vo), torch.empty(batch, q_heads, 1, 2)
    mask_at = mask_stride = 0
    if mask is not None:
        mask = mask.contiguous()
        mask_at, mask_stride = mask.data_ptr(), 0 if len(mask) == 1 else length
    call = (
        rows.data_ptr(), k.data_ptr(), *k.stride()[:3], v.data_ptr(), *v.stride()[:3], mask_at, mask_stride, *layouts,
        kv_heads, length, parts, part, pairs * parts, partial.data_ptr(), out.data_ptr(), sums.data_ptr(), 0,
    )  # fmt: skip
    run((ctypes.c_int64 * len(call))(*call), threads)
    return out.to(q.dtype), sums.narrow(-1, 0, 1), sums.narrow(-1, 1, 1)
