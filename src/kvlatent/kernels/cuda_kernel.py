"""Triton kernels of decode attention: parts of a context, and their merge. Imported when first used; see `cuda_decode`.

A program reads the keys and values of one KV head once, for all query heads of its group: they are the rows of one
small matrix product. Dims that are no power of two are padded in registers, not in memory.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def places(table, steps, dim, WIDTH: tl.constexpr):
    """Byte of a dim of a row of codes, how far up in it, its bits as a mask, its step and what code 0 is."""
    inside = dim < WIDTH
    byte = tl.load(table + dim, mask=inside, other=0)
    up = tl.load(table + WIDTH + dim, mask=inside, other=0)
    bits = tl.load(table + 2 * WIDTH + dim, mask=inside, other=0)
    step = tl.load(steps + dim, mask=inside, other=0.0)
    least = tl.load(steps + WIDTH + dim, mask=inside, other=0.0)
    return byte, up, bits, step, least


@triton.jit
def sizes(rows, inside):
    """What rows of codes begin with: the upper bits of a float16 (`layout.SIZE_SHIFT`)."""
    bits = tl.load(rows, mask=inside, other=0).to(tl.int16) << 7
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit(do_not_specialize=["length", "part", "mask_row", "parts"])  # they change as a context grows
def attend(
    q,
    k,
    v,
    k_table,
    k_steps,
    v_table,
    v_steps,
    mask,
    out,
    best,
    total,
    length,
    part,
    scale,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    mask_row,
    kv_heads,
    parts,
    K_TOKEN: tl.constexpr,
    V_TOKEN: tl.constexpr,
    K_ALIGN: tl.constexpr,
    V_ALIGN: tl.constexpr,
    GROUP: tl.constexpr,
    D_QK: tl.constexpr,
    D_VO: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE_QK: tl.constexpr,
    WIDE_VO: tl.constexpr,
    BLOCK: tl.constexpr,
    SCAN: tl.constexpr,
    MASKED: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    CODED: tl.constexpr,
):
    """One part of one sequence's context for the query heads of one KV head.

    Writes the part's unnormalised output to `out` (batch × kv_heads, parts, GROUP, D_VO), the largest logit of every
    query head to `best` and the sum of its weights, relative to that, to `total`, both (batch × kv_heads, parts,
    GROUP), all float32, logits in powers of two. A part that is WHOLE, the only one, writes the final output;
    zeros where nothing was seen.
    """
    pair = tl.program_id(0).to(tl.int64)
    row, head = pair // kv_heads, pair % kv_heads
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, length)
    mask += row * mask_row
    if MASKED:  # read from the first key that is seen to the last: padding and unused capacity cost nothing
        first, last = end, begin
        for at in range(begin, end, SCAN):
            token = at + tl.arange(0, SCAN)
            seen = tl.load(mask + token, mask=token < end, other=0) != 0
            first = tl.minimum(first, tl.min(tl.where(seen, token, end), axis=0))
            last = tl.maximum(last, tl.max(tl.where(seen, token + 1, begin), axis=0))
        begin, end = first, last

    member = tl.arange(0, ROWS)
    qk, vo = tl.arange(0, WIDE_QK), tl.arange(0, WIDE_VO)
    queries = tl.load(
        q + row * q_row + (head * GROUP + member)[:, None] * q_head + qk[None, :],
        mask=(member < GROUP)[:, None] & (qk < D_QK)[None, :],
        other=0.0,
    )
    if CODED:
        k_byte, k_up, k_bits, k_step, k_least = places(k_table, k_steps, qk, D_QK)
        v_byte, v_up, v_bits, v_step, v_least = places(v_table, v_steps, vo, D_VO)
    else:
        queries = queries.to(k.dtype.element_ty)
    k += tl.multiple_of(row * k_row + head * k_head, K_ALIGN)
    v += tl.multiple_of(row * v_row + head * v_head, V_ALIGN)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    outputs = tl.zeros([ROWS, WIDE_VO], tl.float32)
    for at in range(begin, end, BLOCK):
        token = at + tl.arange(0, BLOCK)
        inside = token < end
        token = token.to(tl.int64)
        if CODED:
            codes = tl.load(k + token[None, :] * K_TOKEN + k_byte[:, None], mask=inside[None, :], other=0).to(tl.int32)
            numbers = ((codes >> k_up[:, None]) & k_bits[:, None]).to(tl.float32) * k_step[:, None] + k_least[:, None]
            keys = (numbers * sizes(k + token * K_TOKEN, inside)[None, :]).to(queries.dtype)
            codes = tl.load(v + token[:, None] * V_TOKEN + v_byte[None, :], mask=inside[:, None], other=0).to(tl.int32)
            numbers = ((codes >> v_up[None, :]) & v_bits[None, :]).to(tl.float32) * v_step[None, :] + v_least[None, :]
            values = (numbers * sizes(v + token * V_TOKEN, inside)[:, None]).to(queries.dtype)
        else:
            keys = tl.load(
                k + token[None, :] * K_TOKEN + qk[:, None], mask=inside[None, :] & (qk < D_QK)[:, None], other=0.0
            )
            values = tl.load(
                v + token[:, None] * V_TOKEN + vo[None, :], mask=inside[:, None] & (vo < D_VO)[None, :], other=0.0
            )
        if MASKED:
            inside &= tl.load(mask + token, mask=inside, other=0) != 0
        logits = tl.dot(queries, keys, input_precision=PRECISION) * scale
        logits = tl.where(inside[None, :], logits, float("-inf"))
        larger = tl.maximum(largest, tl.max(logits, axis=1))
        base = tl.where(larger == float("-inf"), 0.0, larger)  # nothing seen yet: -inf less -inf is no number
        p = tl.exp2(logits - base[:, None])
        fade = tl.exp2(largest - base)
        weight = weight * fade + tl.sum(p, axis=1)
        outputs = tl.dot(p.to(values.dtype), values, outputs * fade[:, None], input_precision=PRECISION)
        largest = larger

    at = (pair * parts + tl.program_id(1)) * GROUP + member
    if WHOLE:
        outputs = outputs / tl.where(weight == 0.0, 1.0, weight)[:, None]
    tl.store(best + at, largest, mask=member < GROUP)
    tl.store(total + at, weight, mask=member < GROUP)
    tl.store(
        out + at[:, None] * D_VO + vo[None, :],
        outputs.to(out.dtype.element_ty),
        mask=(member < GROUP)[:, None] & (vo < D_VO)[None, :],
    )


@triton.jit(do_not_specialize=["parts"])
def merge(
    partial,
    best,
    total,
    out,
    largest_at,
    weight_at,
    parts,
    GROUP: tl.constexpr,
    D_VO: tl.constexpr,
    WIDE_VO: tl.constexpr,
    MOST: tl.constexpr,
):
    """Merge the parts of one query head's context into `out` (batch × q_heads, D_VO); zeros where nothing was seen.

    The largest logit goes to `largest_at`, and the sum of the weights relative to it to `weight_at`.
    """
    query = tl.program_id(0).to(tl.int64)
    pair, member = query // GROUP, query % GROUP
    number, vo = tl.arange(0, MOST), tl.arange(0, WIDE_VO)
    at = (pair * parts + number) * GROUP + member
    largest = tl.load(best + at, mask=number < parts, other=float("-inf"))
    peak = tl.max(largest, axis=0)
    share = tl.exp2(largest - tl.where(peak == float("-inf"), 0.0, peak))
    weight = tl.sum(share * tl.load(total + at, mask=number < parts, other=0.0), axis=0)
    outputs = tl.load(
        partial + at[:, None] * D_VO + vo[None, :], mask=(number < parts)[:, None] & (vo < D_VO)[None, :], other=0.0
    )
    tl.store(largest_at + query, peak)
    tl.store(weight_at + query, weight)
    merged = tl.sum(outputs * share[:, None], axis=0) / tl.where(weight == 0.0, 1.0, weight)
    tl.store(out + query * D_VO + vo, merged.to(out.dtype.element_ty), mask=vo < D_VO)
