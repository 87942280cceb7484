"""Rows of codes as LLVM code: decode attention that reads them, and the writing of them, for every layout.

A layout is a table that a call passes, so that all layers of a model share a kernel. A row is read as vectors of eight
dims, each from two, four or eight bytes (`cpu_codes.Vectors`): the bits of a code are masked where they stand, so what
a vector holds are codes times a power of two, which queries and outputs make up for, as they do for the steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from llvmlite import ir

from kvlatent.kernels.cpu_code import BYTE, FAST, FLOAT, HALF, LONG, WIDEST, WORD, Writer, compiled
from kvlatent.kernels.cpu_kernel import BLOCKS, LANES, LOWEST, REGISTERS, Kernel
from kvlatent.kernels.layout import GREATEST_SIZE, LEAST_SIZE, SIZE_SHIFT

WORDS = 8, 4, 2
"""Bytes that a vector's dims are in; of less than eight, lanes hold several planes."""
OF_SIDE = ("mean", "width", "vectors", "eights", "fours", "bytes", "masks", "slots", "scales", "least")
"""What a call passes of keys and of values: the address of their mean, then `cpu_codes.Vectors.fields`."""
OF_HEAD = ("beside", "shift", "top", "weight", "sized", "shrink")
"""Of a query: its product with what codes 0 stand for, and with the mean key; the largest logit so far; the sums of
weights, and of these times the sizes of values; and what the last block made of all before it."""
LANES_OF_HEAD = 8
"""Numbers that `OF_HEAD` takes, up to a whole vector."""


@cache
def build_attention(group_size: int) -> Callable[[Any, int], None]:
    """Return the decode kernel for groups of so many query heads: a function of the call's fields and of threads."""
    return compiled(CodeKernel(group_size).module)


class CodeKernel(Kernel):
    """Writes one module: threads attend part by part, then one of them merges.

    An item's scratch memory: queries and outputs as [vector][head][lane], then the four numbers of `OF_HEAD`.
    """

    fields = (
        *("q", "k", "k_batch", "k_head", "k_token", "v", "v_batch", "v_head", "v_token", "mask", "mask_batch"),
        *(f"{side}_{name}" for side in "kv" for name in OF_SIDE),
        *("heads", "length", "parts", "part", "items", "scratch", "out", "sums", "next"),
    )
    """Addresses, strides in bytes, and sizes."""

    def __init__(self, group_size: int) -> None:
        Writer.__init__(self)
        self.group_size, self.block = group_size, BLOCKS[0]
        self.write_worker(self._part)
        self.write_run(self._merge)

    def before_items(self) -> None:
        """Reserve memory for the weights of a block and the sizes of its values."""
        super().before_items()
        self.sizes = self.b.alloca(FLOAT, self.block)
        self.sizes.align = 64

    # --- an item's scratch memory

    def _scratch_size(self, field: Callable[[str], ir.Value]) -> ir.Value:
        lanes = self.b.mul(self.b.add(field("k_vectors"), field("v_vectors")), LONG(WIDEST))
        return self.b.mul(self.b.add(lanes, LONG(LANES_OF_HEAD)), LONG(self.group_size))

    def _scratch(self, item: ir.Value, field: Callable[[str], ir.Value]) -> dict[str, ir.Value]:
        """Pointers to the queries, the outputs and the numbers of heads of an item."""
        b = self.b
        start = self._at(field("scratch"), b.mul(item, self._scratch_size(field)), FLOAT)
        outputs = b.gep(start, [b.mul(field("k_vectors"), LONG(WIDEST * self.group_size))])
        heads = b.gep(outputs, [b.mul(field("v_vectors"), LONG(WIDEST * self.group_size))])
        found = {"queries": start, "outputs": outputs}
        for i, name in enumerate(OF_HEAD):
            found[name] = b.gep(heads, [LONG(i * self.group_size)])
        return found

    # --- attention

    def _part(self, item: ir.Value, fields: dict[str, ir.Value]) -> None:
        """One part of the context of one sequence and latent, all its query heads."""
        b = self.b
        pair, batch, head, start, end = self._span(item, fields)
        rows = []
        for side in "kv":
            first = b.add(b.mul(batch, fields[f"{side}_batch"]), b.mul(head, fields[f"{side}_head"]))
            rows.append(self._at(fields[side], first, BYTE))
        scratch = self._scratch(item, fields.__getitem__)
        self._prepare(pair, scratch, fields)
        with self._loop(start, end, self.block) as (first, _, _):
            count = self._least(b.sub(end, first), LONG(self.block))
            seen = self._seen(first, count, batch, fields)
            with b.if_then(seen):
                keys, values = (
                    b.gep(row, [b.mul(first, fields[f"{side}_token"])]) for row, side in zip(rows, "kv", strict=True)
                )
                self._block_logits(keys, values, count, scratch, fields)
                self._hide(first, count, batch, fields)
                self._block_weights(scratch)
                self._block_values(values, count, scratch, fields)

    def _prepare(self, pair: ir.Value, scratch: dict[str, ir.Value], fields: dict[str, ir.Value]) -> None:
        """Queries in the order of a row's vectors, times the steps of its codes; outputs that hold nothing yet."""
        b, group_size = self.b, LONG(self.group_size)
        numbers = b.mul(b.add(fields["k_vectors"], fields["v_vectors"]), LONG(WIDEST * self.group_size))
        with self._loop(LONG(0), numbers, WIDEST) as (i, _, _):  # outputs lie behind queries
            self._store(self._splat(FLOAT(0.0), WIDEST), self._eight(b.gep(scratch["queries"], [i])))
        with self._loop(LONG(0), group_size) as (g, _, _):
            row = b.mul(b.add(b.mul(pair, group_size), g), fields["k_width"])
            query = self._at(fields["q"], row, FLOAT)
            head = b.srem(pair, fields["heads"])
            mean = self._at(fields["k_mean"], b.mul(head, fields["k_width"]), FLOAT)
            with self._loop(LONG(0), fields["k_width"], sums=[FLOAT(0.0)] * 2) as (dim, (beside, shift), hand):
                number = b.load(b.gep(query, [dim]))
                place = b.gep(scratch["queries"], [self._slot(dim, g, "k", fields)])
                b.store(b.fmul(number, b.load(self._at(fields["k_scales"], dim, FLOAT))), place)
                least = b.load(self._at(fields["k_least"], dim, FLOAT))
                hand([
                    self._multiply_add(number, other, total)
                    for other, total in ((least, beside), (b.load(b.gep(mean, [dim])), shift))
                ])  # fmt: skip
            for name, value in {
                "beside": beside,
                "shift": shift,
                "top": FLOAT(LOWEST),
                "weight": FLOAT(0.0),
                "sized": FLOAT(0.0),
            }.items():
                b.store(value, b.gep(scratch[name], [g]))

    def _slot(self, dim: ir.Value, g: ir.Value, side: str, fields: dict[str, ir.Value]) -> ir.Value:
        """Where a dim of a head is among [vector][head][lane]."""
        b = self.b
        slot = b.sext(b.load(self._at(fields[f"{side}_slots"], dim, WORD)), LONG)
        vector, lane = b.ashr(slot, LONG(3)), b.and_(slot, LONG(WIDEST - 1))
        return b.add(b.mul(b.add(b.mul(vector, LONG(self.group_size)), g), LONG(WIDEST)), lane)

    def _eight(self, pointer: ir.Value) -> ir.Value:
        """A pointer to a vector that begins where a number is."""
        return self._vector(pointer, 0, FLOAT, WIDEST)

    def _ranges(self, side: str, fields: dict[str, ir.Value]) -> list[tuple[int, ir.Value, ir.Value]]:
        """Bytes of a word, and the vectors that are read from such: the first, and the one behind the last."""
        ends = [LONG(0), *(fields[f"{side}_{name}"] for name in ("eights", "fours", "vectors"))]
        return list(zip(WORDS, ends[:-1], ends[1:], strict=True))

    def _place(self, vector: ir.Value, side: str, fields: dict[str, ir.Value]) -> tuple[ir.Value, ir.Value]:
        """Where a vector's bytes begin in a row, and the bits that are its own."""
        b = self.b
        byte = b.sext(b.load(self._at(fields[f"{side}_bytes"], vector, WORD)), LONG)
        masks = self._at(fields[f"{side}_masks"], b.mul(vector, LONG(WIDEST)), WORD)
        return byte, b.load(self._vector(masks, 0, WORD, WIDEST), align=4)

    def _numbers(self, place: ir.Value, mask: ir.Value, word: int) -> ir.Value:
        """Codes from the `word` bytes at a place, each times a power of two."""
        b, lanes = self.b, ir.VectorType(BYTE, WIDEST)
        if word == WIDEST:
            codes = b.load(b.bitcast(place, lanes.as_pointer()), align=1)
        else:
            one = b.load(b.bitcast(place, ir.IntType(8 * word).as_pointer()), align=1)
            codes = b.bitcast(self._splat(one, WIDEST // word), lanes)
        words = ir.VectorType(WORD, WIDEST)
        return b.sitofp(b.and_(b.zext(codes, words), mask), ir.VectorType(FLOAT, WIDEST))

    def _size(self, row: ir.Value) -> ir.Value:
        """What a row begins with."""
        return _number_of(self.b, self.b.load(row))

    def _head_ranges(self) -> list[range]:
        """Query heads, as many at a time as registers hold sums of."""
        return [range(self.group_size)[i : i + REGISTERS] for i in range(0, self.group_size, REGISTERS)]

    def _block_logits(
        self,
        keys: ir.Value,
        values: ir.Value,
        count: ir.Value,
        scratch: dict[str, ir.Value],
        fields: dict[str, ir.Value],
    ) -> None:
        """Logits of a block into `weights`, -inf behind its last key, and the sizes of its values, zero there."""
        b = self.b
        with self._loop(LONG(0), count) as (j, _, _):
            key = b.gep(keys, [b.mul(j, fields["k_token"])])
            value = b.gep(values, [b.mul(j, fields["v_token"])])
            soon = b.gep(keys, [b.mul(b.add(j, LONG(self.block)), fields["k_token"])])
            self._prefetch_line(soon, 0)
            b.store(self._size(value), b.gep(self.sizes, [j]))
            size = self._size(key)
            for heads in self._head_ranges():
                sums: list[ir.Value] = [self._splat(FLOAT(0.0), WIDEST)] * len(heads)
                for word, first, last in self._ranges("k", fields):
                    with self._loop(first, last, sums=sums) as (vector, totals, hand):
                        byte, mask = self._place(vector, "k", fields)
                        numbers = self._numbers(b.gep(key, [byte]), mask, word)
                        queries = b.gep(scratch["queries"], [b.mul(vector, LONG(WIDEST * self.group_size))])
                        hand([
                            self._multiply_add(
                                b.load(self._vector(queries, WIDEST * g, FLOAT, WIDEST), align=4), numbers, total
                            )
                            for g, total in zip(heads, totals, strict=True)
                        ])  # fmt: skip
                    sums = totals
                for g, logit in zip(heads, self._totals(sums), strict=True):
                    beside = b.load(b.gep(scratch["beside"], [LONG(g)]))
                    logit = b.fmul(b.fadd(logit, beside, flags=FAST), size, flags=FAST)
                    b.store(logit, b.gep(self.weights, [b.add(j, LONG(g * self.block))]))
        with self._loop(count, LONG(self.block)) as (j, _, _):
            b.store(FLOAT(0.0), b.gep(self.sizes, [j]))
            for g in range(self.group_size):
                b.store(FLOAT(-math.inf), b.gep(self.weights, [b.add(j, LONG(g * self.block))]))

    def _totals(self, vectors: Sequence[ir.Value]) -> list[ir.Value]:
        """Sums over the lanes of each vector; of several they are added up together."""
        totals: list[ir.Value] = []
        while len(totals) < len(vectors):
            some = list(vectors[len(totals) : len(totals) + 8])
            if len(some) < 3:
                totals.append(self._sum(some[0]))
                continue
            together = 4 if len(some) < 6 else 8
            added = self._sums([*some, *[some[-1]] * (together - len(some))][:together])
            totals += [self.b.extract_element(added, WORD(i)) for i in range(min(together, len(some)))]
        return totals

    def _block_weights(self, scratch: dict[str, ir.Value]) -> None:
        """Logits to weights relative to the part's maximum so far, times the sizes of values."""
        b = self.b
        at = range(0, self.block, LANES)
        sizes = [b.load(self._vector(self.sizes, i, FLOAT, LANES), align=64) for i in at]
        with self._loop(LONG(0), LONG(self.group_size)) as (g, _, _):
            weights = b.gep(self.weights, [b.mul(g, LONG(self.block))])
            places = [self._vector(weights, i, FLOAT, LANES) for i in at]
            logits = [b.load(place, align=64) for place in places]
            top = logits[0]
            for vector in logits[1:]:
                top = self._call("maxnum", top, vector)
            of_head = {name: b.gep(pointer, [g]) for name, pointer in scratch.items()}
            before = b.load(of_head["top"])
            highest = self._call("maxnum", self._call("vector.reduce.fmax", top, result=FLOAT), before)
            b.store(highest, of_head["top"])
            total = sized = self._splat(FLOAT(0.0), LANES)
            for place, vector, size in zip(places, logits, sizes, strict=True):
                weight = self._exp2(b.fsub(vector, self._splat(highest, LANES)))
                times_size = b.fmul(weight, size, flags=FAST)
                b.store(times_size, place, align=64)
                total, sized = b.fadd(total, weight, flags=FAST), b.fadd(sized, times_size, flags=FAST)
            shrink = self._exp2_of(b.fsub(before, highest))
            b.store(shrink, of_head["shrink"])
            for name, vector in (("weight", total), ("sized", sized)):
                b.store(self._multiply_add(b.load(of_head[name]), shrink, self._sum(vector)), of_head[name])

    def _block_values(
        self, values: ir.Value, count: ir.Value, scratch: dict[str, ir.Value], fields: dict[str, ir.Value]
    ) -> None:
        """Bring outputs down to the new maximum, and add the weighted values of a block."""
        b = self.b
        for word, first, last in self._ranges("v", fields):
            with self._loop(first, last) as (vector, _, _):
                byte, mask = self._place(vector, "v", fields)
                column = b.gep(values, [byte])
                outputs = b.gep(scratch["outputs"], [b.mul(vector, LONG(WIDEST * self.group_size))])
                for heads in self._head_ranges():
                    places = [self._vector(outputs, WIDEST * g, FLOAT, WIDEST) for g in heads]
                    sums = []
                    for g, place in zip(heads, places, strict=True):
                        shrink = self._splat(b.load(b.gep(scratch["shrink"], [LONG(g)])), WIDEST)
                        sums.append(b.fmul(b.load(place, align=4), shrink, flags=FAST))
                    with self._loop(LONG(0), count, sums=sums) as (j, totals, hand):
                        numbers = self._numbers(b.gep(column, [b.mul(j, fields["v_token"])]), mask, word)
                        added = []
                        for g, total in zip(heads, totals, strict=True):
                            weight = b.load(b.gep(self.weights, [b.add(j, LONG(g * self.block))]))
                            added.append(self._multiply_add(self._splat(weight, WIDEST), numbers, total))
                        hand(added)
                    for place, total in zip(places, totals, strict=True):
                        self._store(total, place)

    def _merge(self) -> None:
        """Merge the parts of every query head by their maxima and sums, which are told as well."""
        b = self.b
        fields = {name: self._field(name) for name in self.fields}
        parts, zero = fields["parts"], FLOAT(0.0)
        rows = b.mul(b.sdiv(fields["items"], parts), LONG(self.group_size))
        with self._loop(LONG(0), rows) as (r, _, _):
            pair, g = b.sdiv(r, LONG(self.group_size)), b.srem(r, LONG(self.group_size))

            def of_part(part: ir.Value) -> dict[str, ir.Value]:
                found = self._scratch(b.add(b.mul(pair, parts), part), fields.__getitem__)
                found |= {name: b.gep(found[name], [g]) for name in OF_HEAD}
                return found | {"outputs": b.gep(found["outputs"], [b.mul(g, LONG(WIDEST))])}

            with self._loop(LONG(0), parts, sums=[FLOAT(LOWEST)]) as (part, (top,), hand):
                hand([self._call("maxnum", top, b.load(of_part(part)["top"]))])
            with self._loop(LONG(0), parts, sums=[zero, zero]) as (part, (weight, sized), hand):
                found = of_part(part)
                share = self._exp2_of(b.fsub(b.load(found["top"]), top))
                b.store(share, found["shrink"])
                hand([
                    self._multiply_add(b.load(found[name]), share, total)
                    for name, total in (("weight", weight), ("sized", sized))
                ])  # fmt: skip
            merged = of_part(LONG(0))["outputs"]
            with self._loop(LONG(0), fields["v_vectors"]) as (vector, _, _):
                at = b.mul(vector, LONG(WIDEST * self.group_size))
                none = self._splat(zero, WIDEST)
                with self._loop(LONG(0), parts, sums=[none]) as (part, (total,), hand):
                    found = of_part(part)
                    values = b.load(self._eight(b.gep(found["outputs"], [at])), align=4)
                    hand([self._multiply_add(values, self._splat(b.load(found["shrink"]), WIDEST), total)])
                self._store(total, self._eight(b.gep(merged, [at])))
            kept = self._at(fields["sums"], b.mul(r, LONG(2)), FLOAT)
            b.store(b.fadd(top, b.load(of_part(LONG(0))["shift"])), kept)
            b.store(weight, b.gep(kept, [LONG(1)]))
            safe = b.select(b.fcmp_ordered(">", weight, zero), b.fdiv(FLOAT(1.0), weight), zero)
            out = self._at(fields["out"], b.mul(r, fields["v_width"]), FLOAT)
            mean = self._at(fields["v_mean"], b.mul(b.srem(pair, fields["heads"]), fields["v_width"]), FLOAT)
            with self._loop(LONG(0), fields["v_width"]) as (dim, _, _):
                number = b.load(b.gep(merged, [self._slot(dim, LONG(0), "v", fields)]))
                scale, least = (b.load(self._at(fields[f"v_{name}"], dim, FLOAT)) for name in ("scales", "least"))
                number = self._multiply_add(number, scale, b.fmul(sized, least))
                b.store(self._multiply_add(number, safe, b.load(b.gep(mean, [dim]))), b.gep(out, [dim]))


def _number_of(b: ir.IRBuilder, size: ir.Value) -> ir.Value:
    """A row's size, as the byte has it, as a float."""
    bits = b.shl(b.zext(size, HALF), HALF(SIZE_SHIFT))
    return b.fpext(b.bitcast(bits, ir.HalfType()), FLOAT)


@cache
def build_encoder() -> Callable[[Any, int], None]:
    """Return the kernel that writes rows: a function of the call's fields and of threads."""
    return compiled(Encoder().module)


class Encoder(Writer):
    """Writes one module: an item is a row. Every step is that of `Codes.encode`, so that rows are the same."""

    fields = (
        *("x", "norms", "rows", "width", "row_bytes", "root", "bytes", "ups", "most", "steps", "middles"),
        *("items", "next"),
    )
    """Addresses and sizes; those behind `row_bytes` are of `codes.Places`."""

    def __init__(self) -> None:
        super().__init__()
        self.write_worker(self._row)
        self.write_run()

    def _row(self, item: ir.Value, fields: dict[str, ir.Value]) -> None:
        b = self.b

        def number(name: str, index: ir.Value) -> ir.Value:
            return b.load(self._at(fields[name], index, FLOAT))

        row = self._at(fields["rows"], b.mul(item, fields["row_bytes"]), BYTE)
        numbers = b.mul(item, fields["width"])
        with self._loop(LONG(0), fields["row_bytes"]) as (i, _, _):
            b.store(BYTE(0), b.gep(row, [i]))
        size = b.fmul(number("norms", item), number("root", LONG(0)))
        size = self._call("minnum", self._call("maxnum", size, FLOAT(LEAST_SIZE)), FLOAT(GREATEST_SIZE))
        bits = b.bitcast(b.fptrunc(size, ir.HalfType()), HALF)
        nearest = b.trunc(b.lshr(b.add(bits, HALF(1 << SIZE_SHIFT - 1)), HALF(SIZE_SHIFT)), BYTE)
        b.store(nearest, row)
        size = _number_of(b, nearest)
        with self._loop(LONG(0), fields["width"]) as (dim, _, _):
            step = b.fmul(size, number("steps", dim))
            interval = b.fsub(b.fdiv(number("x", b.add(numbers, dim)), step), number("middles", dim))
            code = self._call("floor", b.fadd(interval, FLOAT(0.5)))
            code = self._call("minnum", self._call("maxnum", code, FLOAT(0.0)), number("most", dim))
            up = b.load(self._at(fields["ups"], dim, WORD))
            place = b.gep(row, [b.load(self._at(fields["bytes"], dim, LONG))])
            bits = b.trunc(b.shl(b.fptosi(code, WORD), up), BYTE)
            b.store(b.or_(b.load(place), bits), place)
