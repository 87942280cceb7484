"""Decode attention on a CUDA device, in Triton: the cache is read once, by as many programs as the device can hold.

A single query per sequence gives few rows of work, so the context is split as well (flash-decoding): each part keeps
its own maximum and sum, and a second, small kernel merges them; a batch that fills the device isn't split. Triton comes
with the CUDA builds of torch.
"""

from __future__ import annotations

import math
from functools import cache
from importlib.util import find_spec

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from kvlatent.kernels.codes import Codes, places

STORED = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes a cache may have here."""
LEAST_PART = 128
"""Keys below which a context isn't split any further."""
MOST_PARTS = 64
"""Parts that the merging kernel holds at once; a power of two."""
PROGRAMS_PER_PROCESSOR = 2
"""Programs wanted per multiprocessor, so that one computes while another waits for memory."""
TILE_BYTES = 32 * 1024
"""Keys and values that a program holds at a time; more than one tile is under way."""


@cache
def available() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; 1 of a CPU, on which Triton's interpreter runs the kernel in tests."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def split(length: int, pairs: int, block: int, device: torch.device) -> tuple[int, int]:
    """Choose how a context is split.

    Args:
        length: Keys.
        pairs: Sequences times KV heads, which are apart anyway.
        block: Keys that a program takes at a time.
        device: Where.

    Returns:
        The number of parts, and keys per part, a multiple of `block`.
    """
    wanted = -(-PROGRAMS_PER_PROCESSOR * processors(device) // pairs)
    parts = max(1, min(wanted, MOST_PARTS, length // LEAST_PART))
    part = max(1, -(-length // (parts * block))) * block
    return max(1, -(-length // part)), part


def alignment(x: Tensor) -> int:
    """Numbers, a power of two up to 16, of which every row of `x` starts at a multiple: what may be read at once."""
    return math.gcd(16, *x.stride()[:3])


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


@cache
def tables(codes: Codes, device: torch.device) -> tuple[Tensor, Tensor]:
    """Byte, shift and mask of every dim of a row, (3, width) int32; its step and what code 0 is, (2, width) float32."""
    at = places(codes, device)
    return torch.stack([x.to(torch.int32) for x in (at.byte, at.up, at.mask)]), torch.stack(
        (at.step, at.step * at.middle)
    )


def decode_segment(
    q: Float[Tensor, "batch q_heads 1 d_qk"],
    k: Shaped[Tensor, "batch kv_heads kv_len k_row"],
    v: Shaped[Tensor, "batch kv_heads kv_len v_row"],
    *,
    scale: float,
    mask: Bool[Tensor, "mask_batch 1 1 kv_len"] | None = None,
    codes: tuple[Codes, Codes] | None = None,
) -> tuple[
    Float[Tensor, "batch q_heads 1 d_vo"], Float[Tensor, "batch q_heads 1 1"], Float[Tensor, "batch q_heads 1 1"]
]:
    """Attend with one query per sequence, to all keys or to one segment of them.

    Logits, softmax and sums are float32 whatever the cache's dtype.

    float32 caches are multiplied in float32, not TF32.

    Args:
        q: Rotated queries.
        k: Rotated keys, a dtype of `STORED`, d_qk of them a row, or rows of codes; may be a view of a longer buffer.
        v: Values, likewise.
        scale: Logit multiplier.
        mask: True where a query may look, one row per sequence or for all. What lies before the first key that a
            sequence sees, and behind the last, isn't read. A query that sees nothing gets zeros.
        codes: What rows of keys and values are, if not numbers.

    Returns:
        The output; the largest logit, times log2(e); and the sum of the weights relative to that: by the last two,
        outputs over several segments can be merged. Both are float32.
    """
    from triton import next_power_of_2

    from kvlatent.kernels.cuda_kernel import attend, merge

    batch, q_heads, _, d_qk = q.shape
    _, kv_heads, length, row = v.shape
    d_vo = row if codes is None else codes[1].width
    met = (q,) * 4 if codes is None else (x for code in codes for x in tables(code, q.device))
    kinds = (k.dtype, v.dtype) if codes is None else (q.dtype,)
    group_size, pairs = q_heads // kv_heads, batch * kv_heads
    wide_qk, wide_vo = (max(16, next_power_of_2(d)) for d in (d_qk, d_vo))  # the least a matrix unit takes
    held = TILE_BYTES // ((wide_qk + wide_vo) * kinds[0].itemsize)
    block = max(16, min(128, next_power_of_2(held + 1) // 2))
    parts, part = split(length, pairs, block, q.device)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    seen = q if mask is None else mask.contiguous().view(torch.uint8)
    out = torch.empty(batch, q_heads, 1, d_vo, dtype=q.dtype, device=q.device)
    partial, (largest, weight) = out, torch.empty(2, batch, q_heads, 1, 1, dtype=torch.float32, device=q.device)
    best, total = largest, weight
    if parts > 1:
        partial = torch.empty(pairs, parts, group_size, d_vo, dtype=torch.float32, device=q.device)
        best, total = torch.empty(2, pairs, parts, group_size, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        attend[pairs, parts](
            q, k, v, *met, seen, partial, best, total, length, part, scale * math.log2(math.e),
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], 0 if len(seen) == 1 else length, kv_heads, parts,
            K_TOKEN=k.stride(2), V_TOKEN=v.stride(2), K_ALIGN=alignment(k), V_ALIGN=alignment(v),
            GROUP=group_size, D_QK=d_qk, D_VO=d_vo, ROWS=max(16, next_power_of_2(group_size)), WIDE_QK=wide_qk,
            WIDE_VO=wide_vo, BLOCK=block, SCAN=1024, MASKED=mask is not None, WHOLE=parts == 1,
            PRECISION="ieee" if torch.float32 in kinds else "tf32", CODED=codes is not None, num_warps=4, num_stages=2,
        )  # fmt: skip
        if parts > 1:
            merge[(batch * q_heads,)](
                partial, best, total, out, largest, weight, parts,
                GROUP=group_size, D_VO=d_vo, WIDE_VO=wide_vo, MOST=MOST_PARTS, num_warps=4,
            )  # fmt: skip
    return out, largest, weight
