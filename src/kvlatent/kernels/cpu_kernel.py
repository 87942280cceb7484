"""The CPU decode kernel as LLVM code, built for one pair of dims.

A head's row of d_qk or d_vo numbers is a list of explicit vectors, so every width works.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache
from itertools import product

from llvmlite import ir

from kvlatent.kernels.cpu_code import (
    BIT,
    BYTE,
    FAST,
    FLOAT,
    LONG,
    STORED,
    Writer,
    compiled,
    element_bytes,
    pieces_of,
)
from kvlatent.kernels.cpu_decode import MOST_KEYS

BLOCKS = MOST_KEYS, 32, 16
"""Keys whose logits are held at a time: the largest number that fits."""
BLOCK_BYTES = 12 * 1024
"""What a block's keys and values, and the keys of the next one, may take, to stay in the first cache."""
LANES = 16
"""Logits exponentiated at a time."""
KEYS = 4
"""Keys whose logits are computed together, as `_sums` adds them up."""
WIDE = 64
"""Dims of a key beyond which adding up is a small part of the work, and keys are taken one by one."""
REGISTERS = 12
"""Vectors of sums that are held at once."""
LOWEST = -1e30
"""A logit that nothing finite is below."""


@cache
def build(d_qk: int, d_vo: int, group_size: int, k: str, v: str) -> Callable[[Iterable[int], int], None]:
    """Return the kernel for these dims and dtypes: a function of the call's fields and of threads."""
    return compiled(Kernel(d_qk, d_vo, group_size, STORED[k], STORED[v]).module)


class Kernel(Writer):
    """Writes one module: threads attend part by part, then one of them merges."""

    fields: tuple[str, ...] = (
        *("q", "k", "k_batch", "k_head", "k_token", "v", "v_batch", "v_head", "v_token", "mask", "mask_batch"),
        *("scale", "heads", "length", "parts", "part", "items", "partial", "out", "sums", "next"),
    )
    """Addresses, strides in elements, the logits' multiplier, and sizes."""

    def __init__(self, d_qk: int, d_vo: int, group_size: int, k_stored: ir.Type, v_stored: ir.Type) -> None:
        super().__init__()
        self.d_qk, self.d_vo, self.group_size = d_qk, d_vo, group_size
        self.k_stored, self.v_stored = k_stored, v_stored
        self.k_pieces, self.v_pieces = pieces_of(d_qk), pieces_of(d_vo)
        key, value = d_qk * element_bytes(k_stored), d_vo * element_bytes(v_stored)
        fitting = [block for block in BLOCKS if (2 * key + value) * block <= BLOCK_BYTES]
        self.block, self.ahead = (fitting[0], True) if fitting else (BLOCKS[0], False)
        self.keys = KEYS if d_qk <= WIDE else 1
        self.record = d_vo + 2  # of a query head's part: unnormalised outputs, maximum, sum
        self.write_worker(self._part)
        self.write_run(self._merge)

    def before_items(self) -> None:
        """Reserve memory for the weights of a block."""
        self.weights = self.b.alloca(FLOAT, self.group_size * self.block)
        self.weights.align = 64

    def _span(self, item: ir.Value, fields: dict[str, ir.Value]) -> tuple[ir.Value, ...]:
        """Of an item: its sequence and head as one number, both apart, and where its part begins and ends."""
        b = self.b
        pair = b.sdiv(item, fields["parts"])
        batch, head = b.sdiv(pair, fields["heads"]), b.srem(pair, fields["heads"])
        start = b.mul(b.srem(item, fields["parts"]), fields["part"])
        end = self._least(b.add(start, fields["part"]), fields["length"])
        return pair, batch, head, start, end

    def _part(self, item: ir.Value, fields: dict[str, ir.Value]) -> None:
        """One part of the context of one sequence and key/value head, all its query heads."""
        b = self.b
        pair, batch, head, start, end = self._span(item, fields)
        k_start = b.add(b.mul(batch, fields["k_batch"]), b.mul(head, fields["k_head"]))
        v_start = b.add(b.mul(batch, fields["v_batch"]), b.mul(head, fields["v_head"]))
        q_start = b.mul(pair, LONG(self.group_size * self.d_qk))
        partial = b.mul(item, LONG(self.group_size * self.record))
        outputs = [
            self._at(fields["partial"], b.add(partial, LONG(g * self.record)), FLOAT) for g in range(self.group_size)
        ]
        for output in outputs:
            for offset, lanes in self.v_pieces:
                self._store(self._splat(FLOAT(0.0), lanes), self._vector(output, offset, FLOAT, lanes))
            self._store(FLOAT(LOWEST), b.gep(output, [LONG(self.d_vo)]))
            self._store(FLOAT(0.0), b.gep(output, [LONG(self.d_vo + 1)]))
        q_rows = [self._at(fields["q"], b.add(q_start, LONG(g * self.d_qk)), FLOAT) for g in range(self.group_size)]
        with self._loop(start, end, self.block) as (first, _, _):
            count = self._least(b.sub(end, first), LONG(self.block))
            seen = self._seen(first, count, batch, fields)
            with b.if_then(seen):
                self._logits(first, count, q_rows, fields, k_start, v_start)
                self._hide(first, count, batch, fields)
                self._softmax(outputs)
                self._values(first, count, outputs, fields, k_start, v_start)

    def _mask_byte(self, key: ir.Value, batch: ir.Value, fields: dict[str, ir.Value]) -> ir.Value:
        return self.b.load(self._at(fields["mask"], self.b.add(self.b.mul(batch, fields["mask_batch"]), key), BYTE))

    def _seen(self, first: ir.Value, count: ir.Value, batch: ir.Value, fields: dict[str, ir.Value]) -> ir.Value:
        """Whether any key of the block may be looked at."""
        b = self.b
        masked = b.icmp_unsigned("!=", fields["mask"], LONG(0))
        before = b.block
        with b.if_then(masked):
            with self._loop(LONG(0), count, sums=[BYTE(0)]) as (j, (any_,), hand):
                hand([b.or_(any_, self._mask_byte(b.add(first, j), batch, fields))])
            found = b.icmp_unsigned("!=", any_, BYTE(0))
            inside = b.block
        seen = b.phi(BIT)
        seen.add_incoming(BIT(1), before)
        seen.add_incoming(found, inside)
        return seen

    def _logits(
        self,
        first: ir.Value,
        count: ir.Value,
        q_rows: list[ir.Value],
        fields: dict[str, ir.Value],
        k_start: ir.Value,
        v_start: ir.Value,
    ) -> None:
        """Logits of a block into `weights`, -inf behind its last key; its values are asked for meanwhile.

        Keys of few dims are taken several at a time: their sums are added up across lanes together, in half the steps.
        """
        b = self.b
        last = b.sub(fields["length"], LONG(1))
        at_once = max(1, REGISTERS // self.keys)
        scale = self._float(fields["scale"])
        for start in range(0, self.group_size, at_once):
            heads = range(self.group_size)[start : start + at_once]
            with self._loop(LONG(0), count, self.keys) as (j, _, _):
                keys, values = [], []
                for i in range(self.keys):
                    index = self._least(b.add(first, b.add(j, LONG(i))), last)
                    value = b.add(v_start, b.mul(index, fields["v_token"]))
                    values.append(self._at(fields["v"], value, self.v_stored))
                    key = b.add(k_start, b.mul(index, fields["k_token"]))
                    keys.append(self._at(fields["k"], key, self.k_stored))
                lines = [(value, line) for line in self._lines(self.d_vo, self.v_stored) for value in values]
                sums: dict[tuple[int, int], ir.Value] = {}
                for n, piece in enumerate(self.k_pieces):
                    if start == 0:  # a few lines at a time: the processor fetches some twenty at once
                        for value, line in lines[n :: len(self.k_pieces)]:
                            self._prefetch_line(value, line)
                    rows = [self._widened(self._read(key, [piece], self.k_stored)[0]) for key in keys]
                    for g in heads:
                        query = self._widened(self._read(q_rows[g], [piece], FLOAT)[0])
                        for i, row in enumerate(rows):
                            before = sums.get((g, i))
                            sums[g, i] = (
                                b.fmul(query, row, flags=FAST)
                                if before is None
                                else self._multiply_add(query, row, before)
                            )
                for g in heads:
                    place = b.gep(self.weights, [b.add(j, LONG(g * self.block))])
                    if self.keys == 1:
                        b.store(b.fmul(self._sum(sums[g, 0]), scale), place)
                    else:
                        logits = b.fmul(self._sums([sums[g, i] for i in range(KEYS)]), self._splat(scale, KEYS))
                        b.store(logits, self._vector(place, 0, FLOAT, KEYS), align=4 * KEYS)
        with self._loop(count, LONG(self.block)) as (j, _, _):
            for g in range(self.group_size):
                b.store(FLOAT(-math.inf), b.gep(self.weights, [b.add(j, LONG(g * self.block))]))

    def _sums(self, vectors: list[ir.Value]) -> ir.Value:
        """Sum over the lanes of each of four or eight vectors of eight, as one vector: neighbours are added twice."""
        b = self.b

        even = (0, 2, 8, 10, 4, 6, 12, 14)  # within the halves of a register, across which moving lanes is slow
        odd = [lane + 1 for lane in even]
        for _ in range(2):
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [b.fadd(self._picked(x, y, even), self._picked(x, y, odd), flags=FAST) for x, y in pairs]
        low = [lane + 8 * i for i in range(len(vectors)) for lane in range(4)]
        x, y = vectors[0], vectors[-1]
        return b.fadd(self._picked(x, y, low), self._picked(x, y, [lane + 4 for lane in low]), flags=FAST)

    def _hide(self, first: ir.Value, count: ir.Value, batch: ir.Value, fields: dict[str, ir.Value]) -> None:
        """Logits of keys that may not be looked at become -inf."""
        b = self.b
        masked = b.icmp_unsigned("!=", fields["mask"], LONG(0))
        with b.if_then(masked, likely=False), self._loop(LONG(0), count) as (j, _, _):
            hidden = b.icmp_unsigned("==", self._mask_byte(b.add(first, j), batch, fields), BYTE(0))
            with b.if_then(hidden):
                for g in range(self.group_size):
                    b.store(FLOAT(-math.inf), b.gep(self.weights, [b.add(j, LONG(g * self.block))]))

    def _softmax(self, outputs: list[ir.Value]) -> None:
        """Logits to weights relative to the part's maximum so far; what was summed before is brought down to it."""
        b = self.b
        for g, output in enumerate(outputs):
            places = [self._vector(self.weights, g * self.block + i, FLOAT, LANES) for i in range(0, self.block, LANES)]
            logits = [b.load(place, align=64) for place in places]
            top = logits[0]
            for vector in logits[1:]:
                top = self._call("maxnum", top, vector)
            top_at, sum_at = (b.gep(output, [LONG(self.d_vo + i)]) for i in (0, 1))
            before = b.load(top_at)
            highest = self._call("maxnum", self._call("vector.reduce.fmax", top, result=FLOAT), before)
            b.store(highest, top_at)
            total = self._splat(FLOAT(0.0), LANES)
            for place, vector in zip(places, logits, strict=True):
                weight = self._exp2(b.fsub(vector, self._splat(highest, LANES)))
                b.store(weight, place, align=64)
                total = b.fadd(total, weight, flags=FAST)
            shrink = self._exp2_of(b.fsub(before, highest))
            b.store(self._multiply_add(b.load(sum_at), shrink, self._sum(total)), sum_at)
            for (offset, lanes), values in zip(self.v_pieces, self._read(output, self.v_pieces, FLOAT), strict=True):
                smaller = b.fmul(values, self._splat(shrink, lanes), flags=FAST)
                self._store(smaller, self._vector(output, offset, FLOAT, lanes))

    def _values(
        self,
        first: ir.Value,
        count: ir.Value,
        outputs: list[ir.Value],
        fields: dict[str, ir.Value],
        k_start: ir.Value,
        v_start: ir.Value,
    ) -> None:
        """Add the weighted values of a block to all query heads, as many pieces of a row at once as registers hold.

        The next block's keys are asked for meanwhile, so that memory doesn't wait for arithmetic; of long rows the
        processor reads ahead by itself.
        """
        b = self.b
        at_once = max(1, REGISTERS // self.group_size)
        for i in range(0, len(self.v_pieces), at_once):
            pieces = self.v_pieces[i : i + at_once]
            sums = [vector for output in outputs for vector in self._read(output, pieces, FLOAT)]
            with self._loop(LONG(0), count, sums=sums) as (j, totals, hand):
                if i == 0 and self.ahead:
                    key = b.add(k_start, b.mul(b.add(b.add(first, j), LONG(self.block)), fields["k_token"]))
                    self._prefetch(self._at(fields["k"], key, self.k_stored), self.d_qk, self.k_stored)
                index = b.add(v_start, b.mul(b.add(first, j), fields["v_token"]))
                values = self._read(self._at(fields["v"], index, self.v_stored), pieces, self.v_stored)
                added: list[ir.Value] = []
                for g in range(self.group_size):
                    weight = b.load(b.gep(self.weights, [b.add(j, LONG(g * self.block))]))
                    for value in values:
                        total = totals[len(added)]
                        added.append(self._multiply_add(self._splat(weight, value.type.count), value, total))
                hand(added)
            for (output, (offset, lanes)), total in zip(product(outputs, pieces), totals, strict=True):
                self._store(total, self._vector(output, offset, FLOAT, lanes))

    def _merge(self) -> None:
        """Merge the parts of every query head by their maxima and sums, which are told as well."""
        b = self.b
        parts, partial, out = (self._field(name) for name in ("parts", "partial", "out"))
        zero = FLOAT(0.0)
        rows = b.mul(b.sdiv(self._field("items"), parts), LONG(self.group_size))
        with self._loop(LONG(0), rows) as (r, _, _):
            pair, g = b.sdiv(r, LONG(self.group_size)), b.srem(r, LONG(self.group_size))

            def record(part: ir.Value) -> ir.Value:
                index = b.add(b.mul(b.add(b.mul(pair, parts), part), LONG(self.group_size)), g)
                return self._at(partial, b.mul(index, LONG(self.record)), FLOAT)

            with self._loop(LONG(0), parts, sums=[FLOAT(LOWEST)]) as (part, (top,), hand):
                hand([self._call("maxnum", top, b.load(b.gep(record(part), [LONG(self.d_vo)])))])
            sums = [zero, *(self._splat(zero, lanes) for _, lanes in self.v_pieces)]
            with self._loop(LONG(0), parts, sums=sums) as (part, (weight, *totals), hand):
                place = record(part)
                share = self._exp2_of(b.fsub(b.load(b.gep(place, [LONG(self.d_vo)])), top))
                added = [self._multiply_add(b.load(b.gep(place, [LONG(self.d_vo + 1)])), share, weight)]
                for values, total in zip(self._read(place, self.v_pieces, FLOAT), totals, strict=True):
                    added.append(self._multiply_add(values, self._splat(share, values.type.count), total))
                hand(added)
            kept = self._at(self._field("sums"), b.mul(r, LONG(2)), FLOAT)
            b.store(top, kept)
            b.store(weight, b.gep(kept, [LONG(1)]))
            safe = b.select(b.fcmp_ordered(">", weight, zero), b.fdiv(FLOAT(1.0), weight), zero)
            place = self._at(out, b.mul(r, LONG(self.d_vo)), FLOAT)
            for (offset, lanes), total in zip(self.v_pieces, totals, strict=True):
                scaled = b.fmul(total, self._splat(safe, lanes), flags=FAST)
                self._store(scaled, self._vector(place, offset, FLOAT, lanes))
