"""Decode attention that reads rows of codes, as LLVM code for every layout.

A layout is a table that a call passes, so that all layers of a model share a kernel. A row is read as vectors of
sixteen dims, each from two to sixteen bytes (`cpu_codes.Vectors`), and codes are multiplied as what they are, integers:
queries and, block by block, weights are rounded to 32,767 steps of their largest, and neighbouring products added up,
with twice the dims in a register than as floats. What that rounding does is a hundredth of what 8 bits do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache

from llvmlite import ir

from kvlatent.kernels import cpu_code
from kvlatent.kernels.cpu_code import BYTE, FAST, FLOAT, HALF, LONG, WIDEST, WORD, Writer, compiled
from kvlatent.kernels.cpu_codes import LANES as DIMS
from kvlatent.kernels.cpu_codes import WORDS
from kvlatent.kernels.cpu_encode_kernel import number_of
from kvlatent.kernels.cpu_kernel import BLOCKS, LANES, LOWEST, REGISTERS, Kernel

MOST = 32767.0
"""The largest number of 16 bits."""
ENDS = [f"ends{word}" for word in WORDS]
OF_SIDE = ("mean", "width", *ENDS, "bytes", "masks", "lifts", "slots", "scales", "least")
"""What a call passes of keys and of values: the address of their mean, then `cpu_codes.Vectors.fields`."""
OF_HEAD = ("beside", "shift", "unit", "top", "weight", "sized", "shrink", "step")
"""Of a query: its product with what codes 0 stand for, and with the mean key; what 1 stands for in it; the largest
logit so far; the sums of weights, and of these times the sizes of values; what the last block made of all before it,
and what 1 stands for in its weights."""
LANES_OF_HEAD = len(OF_HEAD)
INTERLEAVED = (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15)
"""Lanes of two vectors that become pairs of neighbours in one, as registers interleave them."""
IN_ORDER = [sum(INTERLEAVED, ()).index(lane) for lane in range(DIMS)]
"""Where their sums are then."""


@cache
def build_attention(group_size: int) -> Callable[[Iterable[int], int], None]:
    """Return the decode kernel for groups of so many query heads: a function of the call's fields and of threads."""
    return compiled(CodeKernel(group_size).module)


class CodeKernel(Kernel):
    """Writes one module: threads attend part by part, then one of them merges.

    An item's scratch memory: queries and outputs as [vector][head][lane], then the numbers of `OF_HEAD`.
    """

    fields = (
        *("q", "k", "k_batch", "k_head", "k_token", "v", "v_batch", "v_head", "v_token", "mask", "mask_batch"),
        *(f"{side}_{name}" for side in "kv" for name in OF_SIDE),
        *("scale", "heads", "length", "parts", "part", "items", "scratch", "out", "sums", "next"),
    )
    """Addresses, strides in bytes, the logits' multiplier, and sizes."""

    def __init__(self, group_size: int) -> None:
        Writer.__init__(self)
        self.group_size, self.block = group_size, BLOCKS[0]
        self.write_worker(self._part)
        self.write_run(self._merge)

    def before_items(self) -> None:
        """Reserve memory for the weights of a block, as floats and rounded, and for the sizes of its rows."""
        super().before_items()
        self.rounded = self.b.alloca(HALF, self.group_size * self.block)
        self.sizes = {side: self.b.alloca(FLOAT, self.block) for side in "kv"}
        for memory in (self.rounded, *self.sizes.values()):
            memory.align = 64

    # --- an item's scratch memory

    def _scratch_parts(self, field: Callable[[str], ir.Value]) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Floats that queries, which have 16 bits, outputs and the numbers of heads take."""
        b, dims = self.b, DIMS * self.group_size
        queries = b.mul(field(f"k_{ENDS[-1]}"), LONG(dims // 2))
        return queries, b.mul(field(f"v_{ENDS[-1]}"), LONG(dims)), LONG(LANES_OF_HEAD * self.group_size)

    def _scratch(self, item: ir.Value, field: Callable[[str], ir.Value]) -> dict[str, ir.Value]:
        """Pointers to the queries, the outputs and the numbers of heads of an item."""
        b = self.b
        queries, outputs, heads = self._scratch_parts(field)
        size = b.add(b.add(queries, outputs), heads)
        start = self._at(field("scratch"), b.mul(item, size), FLOAT)
        behind = b.gep(start, [queries])
        found = {"queries": b.bitcast(start, HALF.as_pointer()), "outputs": behind}
        for i, name in enumerate(OF_HEAD):
            found[name] = b.gep(behind, [b.add(outputs, LONG(i * self.group_size))])
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
        """Queries in the order of a row's vectors, times the steps of its codes, rounded; outputs that hold nothing."""
        b, group_size = self.b, LONG(self.group_size)
        queries, outputs, _ = self._scratch_parts(fields.__getitem__)
        start = b.bitcast(scratch["queries"], FLOAT.as_pointer())
        with self._loop(LONG(0), b.add(queries, outputs), WIDEST) as (i, _, _):
            self._store(self._splat(FLOAT(0.0), WIDEST), self._eight(b.gep(start, [i])))
        with self._loop(LONG(0), group_size) as (g, _, _):
            row = b.mul(b.add(b.mul(pair, group_size), g), fields["k_width"])
            query = self._at(fields["q"], row, FLOAT)
            head = b.srem(pair, fields["heads"])
            mean = self._at(fields["k_mean"], b.mul(head, fields["k_width"]), FLOAT)

            def scaled(dim: ir.Value, query: ir.Value = query) -> ir.Value:
                return b.fmul(b.load(b.gep(query, [dim])), self._float(fields["scale"]))

            def in_steps(dim: ir.Value) -> ir.Value:
                return b.fmul(scaled(dim), b.load(self._at(fields["k_scales"], dim, FLOAT)))

            with self._loop(LONG(0), fields["k_width"], sums=[FLOAT(0.0)] * 2) as (dim, (largest, shift), hand):
                times_mean = self._multiply_add(scaled(dim), b.load(b.gep(mean, [dim])), shift)
                hand([self._call("maxnum", self._call("fabs", in_steps(dim)), largest), times_mean])
            unit, up = self._rounding(largest)
            with self._loop(LONG(0), fields["k_width"], sums=[FLOAT(0.0)]) as (dim, (beside,), hand):
                whole = self._call("rint", b.fmul(in_steps(dim), up))
                place = b.gep(scratch["queries"], [self._slot(dim, g, "k", fields)])
                b.store(b.trunc(b.fptosi(whole, WORD), HALF), place)
                hand([self._multiply_add(whole, b.load(self._at(fields["k_least"], dim, FLOAT)), beside)])
            for name, value in {
                "beside": b.fmul(beside, unit),
                "shift": shift,
                "unit": unit,
                "top": FLOAT(LOWEST),
                "weight": FLOAT(0.0),
                "sized": FLOAT(0.0),
            }.items():
                b.store(value, b.gep(scratch[name], [g]))

    def _rounding(self, largest: ir.Value) -> tuple[ir.Value, ir.Value]:
        """What 1 stands for where the largest number becomes `MOST`, and what numbers are multiplied by."""
        b = self.b
        some = b.fcmp_ordered(">", largest, FLOAT(0.0))
        return b.fmul(largest, FLOAT(1 / MOST)), b.select(some, b.fdiv(FLOAT(MOST), largest), FLOAT(0.0))

    def _slot(self, dim: ir.Value, g: ir.Value, side: str, fields: dict[str, ir.Value]) -> ir.Value:
        """Where a dim of a head is among [vector][head][lane]."""
        b = self.b
        slot = b.sext(b.load(self._at(fields[f"{side}_slots"], dim, WORD)), LONG)
        vector, lane = b.sdiv(slot, LONG(DIMS)), b.srem(slot, LONG(DIMS))
        return b.add(b.mul(b.add(b.mul(vector, LONG(self.group_size)), g), LONG(DIMS)), lane)

    def _eight(self, pointer: ir.Value) -> ir.Value:
        """A pointer to a vector that begins where a number is."""
        return self._vector(pointer, 0, FLOAT, WIDEST)

    def _ranges(self, side: str, fields: dict[str, ir.Value]) -> list[tuple[int, ir.Value, ir.Value]]:
        """Bytes of a word, and the vectors that are read from such: the first, and the one behind the last."""
        ends = [LONG(0), *(fields[f"{side}_{name}"] for name in ENDS)]
        return list(zip(WORDS, ends[:-1], ends[1:], strict=True))

    def _place(self, vector: ir.Value, side: str, fields: dict[str, ir.Value]) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Where a vector's bytes begin in a row, the bits that are its own, and what lifts them."""
        b, first = self.b, self.b.mul(vector, LONG(DIMS))
        byte = b.sext(b.load(self._at(fields[f"{side}_bytes"], vector, WORD)), LONG)
        tables = (self._at(fields[f"{side}_{name}"], first, HALF) for name in ("masks", "lifts"))
        masks, lifts = (b.load(self._vector(table, 0, HALF, DIMS), align=2) for table in tables)
        return byte, masks, lifts

    def _codes(self, place: ir.Value, masks: ir.Value, lifts: ir.Value, word: int) -> ir.Value:
        """Codes from the `word` bytes at a place, lifted, as integers of 16 bits."""
        b, lanes = self.b, ir.VectorType(BYTE, DIMS)
        if word == DIMS:
            codes = b.load(b.bitcast(place, lanes.as_pointer()), align=1)
        else:
            one = b.load(b.bitcast(place, ir.IntType(8 * word).as_pointer()), align=1)
            codes = b.bitcast(self._splat(one, DIMS // word), lanes)
        return b.mul(b.and_(b.zext(codes, ir.VectorType(HALF, DIMS)), masks), lifts)

    def _add_pairs(self, x: ir.Value, y: ir.Value, total: ir.Value) -> ir.Value:
        """Products of integers of 16 bits, those of neighbours added up, to a total of 32 bits."""
        b = self.b
        if not cpu_code.has("avx2"):
            wide = ir.VectorType(WORD, DIMS)
            products = b.mul(b.sext(x, wide), b.sext(y, wide))
            even, odd = (self._picked(products, products, range(i, DIMS, 2)) for i in (0, 1))
            return b.add(total, b.add(even, odd))
        name = "llvm.x86.avx2.pmadd.wd"  # with VNNI, LLVM makes one instruction of this and the addition
        function = self.module.globals.get(name) or ir.Function(
            self.module, ir.FunctionType(total.type, [x.type, y.type]), name
        )
        return b.add(total, b.call(function, [x, y]))

    def _size(self, row: ir.Value) -> ir.Value:
        """What a row begins with."""
        return number_of(self.b, self.b.load(row))

    def _head_ranges(self, vectors: int) -> list[range]:
        """Query heads, as many at a time as registers hold so many vectors of sums of."""
        registers = 2 * REGISTERS if cpu_code.has("avx512vl") else REGISTERS
        at_once = max(1, registers // vectors)
        return [range(self.group_size)[i : i + at_once] for i in range(0, self.group_size, at_once)]

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
        none = ir.Constant(ir.VectorType(WORD, WIDEST), None)
        with self._loop(LONG(0), count) as (j, _, _):
            key = b.gep(keys, [b.mul(j, fields["k_token"])])
            value = b.gep(values, [b.mul(j, fields["v_token"])])
            soon = b.gep(keys, [b.mul(b.add(j, LONG(self.block)), fields["k_token"])])
            self._prefetch_line(soon, 0)
            for side, row in (("k", key), ("v", value)):
                b.store(self._size(row), b.gep(self.sizes[side], [j]))
            for heads in self._head_ranges(1):
                sums: list[ir.Value] = [none] * len(heads)
                for word, first, last in self._ranges("k", fields):
                    with self._loop(first, last, sums=sums) as (vector, totals, hand):
                        byte, masks, lifts = self._place(vector, "k", fields)
                        codes = self._codes(b.gep(key, [byte]), masks, lifts, word)
                        queries = b.gep(scratch["queries"], [b.mul(vector, LONG(DIMS * self.group_size))])
                        hand([
                            self._add_pairs(b.load(self._vector(queries, DIMS * g, HALF, DIMS), align=4), codes, total)
                            for g, total in zip(heads, totals, strict=True)
                        ])  # fmt: skip
                    sums = totals
                floats = [b.sitofp(x, ir.VectorType(FLOAT, WIDEST)) for x in sums]
                for g, logit in zip(heads, self._totals(floats), strict=True):
                    b.store(logit, b.gep(self.weights, [b.add(j, LONG(g * self.block))]))
        with self._loop(LONG(0), LONG(self.group_size)) as (g, _, _):
            unit, beside = (self._splat(b.load(b.gep(scratch[name], [g])), LANES) for name in ("unit", "beside"))
            for i in range(0, self.block, LANES):
                place = self._vector(b.gep(self.weights, [b.mul(g, LONG(self.block))]), i, FLOAT, LANES)
                logits = self._multiply_add(b.load(place, align=64), unit, beside)
                sizes = b.load(self._vector(self.sizes["k"], i, FLOAT, LANES), align=64)
                b.store(b.fmul(logits, sizes, flags=FAST), place, align=64)
        with self._loop(count, LONG(self.block)) as (j, _, _):
            b.store(FLOAT(0.0), b.gep(self.sizes["v"], [j]))
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
        """Logits to weights relative to the part's maximum so far; times the sizes of values, rounded."""
        b = self.b
        at = range(0, self.block, LANES)
        sizes = [b.load(self._vector(self.sizes["v"], i, FLOAT, LANES), align=64) for i in at]
        with self._loop(LONG(0), LONG(self.group_size)) as (g, _, _):
            logits_at, rounded = (b.gep(x, [b.mul(g, LONG(self.block))]) for x in (self.weights, self.rounded))
            logits = [b.load(self._vector(logits_at, i, FLOAT, LANES), align=64) for i in at]
            of_head = {name: b.gep(scratch[name], [g]) for name in OF_HEAD}
            before = b.load(of_head["top"])
            highest = self._call("maxnum", self._largest(logits), before)
            b.store(highest, of_head["top"])
            weights = [self._exp2(b.fsub(vector, self._splat(highest, LANES))) for vector in logits]
            products = [b.fmul(weight, size, flags=FAST) for weight, size in zip(weights, sizes, strict=True)]
            step, up = self._rounding(self._largest(products))
            total = sized = self._splat(FLOAT(0.0), LANES)
            for i, weight, product in zip(at, weights, products, strict=True):
                whole = self._call("rint", b.fmul(product, self._splat(up, LANES), flags=FAST))
                short = b.trunc(b.fptosi(whole, ir.VectorType(WORD, LANES)), ir.VectorType(HALF, LANES))
                b.store(short, self._vector(rounded, i, HALF, LANES), align=32)
                total, sized = b.fadd(total, weight, flags=FAST), b.fadd(sized, whole, flags=FAST)
            shrink = self._exp2_of(b.fsub(before, highest))
            b.store(shrink, of_head["shrink"])
            b.store(step, of_head["step"])
            for name, new in (("weight", self._sum(total)), ("sized", b.fmul(self._sum(sized), step))):
                b.store(self._multiply_add(b.load(of_head[name]), shrink, new), of_head[name])

    def _largest(self, vectors: Sequence[ir.Value]) -> ir.Value:
        """Of all lanes of all vectors."""
        top = vectors[0]
        for vector in vectors[1:]:
            top = self._call("maxnum", top, vector)
        return self._call("vector.reduce.fmax", top, result=FLOAT)

    def _block_values(
        self, values: ir.Value, count: ir.Value, scratch: dict[str, ir.Value], fields: dict[str, ir.Value]
    ) -> None:
        """Bring outputs down to the new maximum, and add the weighted values of a block, two tokens at a time."""
        b = self.b
        none = ir.Constant(ir.VectorType(WORD, WIDEST), None)
        last = b.sub(count, LONG(1))
        for word, start, end in self._ranges("v", fields):
            with self._loop(start, end) as (vector, _, _):
                byte, masks, lifts = self._place(vector, "v", fields)
                column = b.gep(values, [byte])
                outputs = b.gep(scratch["outputs"], [b.mul(vector, LONG(DIMS * self.group_size))])
                for heads in self._head_ranges(len(INTERLEAVED)):
                    sums = [none] * (len(INTERLEAVED) * len(heads))
                    with self._loop(LONG(0), count, 2, sums=sums) as (j, totals, hand):
                        one, other = (
                            self._codes(b.gep(column, [b.mul(token, fields["v_token"])]), masks, lifts, word)
                            for token in (j, self._least(b.add(j, LONG(1)), last))  # behind the last, weights are zero
                        )
                        pairs = [
                            self._picked(one, other, [lane + DIMS * i for lane in lanes for i in (0, 1)])
                            for lanes in INTERLEAVED
                        ]
                        added: list[ir.Value] = []
                        for g in heads:
                            place = b.gep(self.rounded, [b.add(j, LONG(g * self.block))])
                            weights = self._splat(b.load(b.bitcast(place, WORD.as_pointer()), align=4), WIDEST)
                            weights = b.bitcast(weights, ir.VectorType(HALF, DIMS))
                            added += [
                                self._add_pairs(pair, weights, totals[len(added) + i]) for i, pair in enumerate(pairs)
                            ]
                        hand(added)
                    floats = [b.sitofp(total, ir.VectorType(FLOAT, WIDEST)) for total in totals]
                    for g, x, y in zip(heads, floats[::2], floats[1::2], strict=True):
                        shrink, step = (
                            self._splat(b.load(b.gep(scratch[name], [LONG(g)])), WIDEST) for name in ("shrink", "step")
                        )
                        for i in range(0, DIMS, WIDEST):
                            new = b.fmul(self._picked(x, y, IN_ORDER[i : i + WIDEST]), step, flags=FAST)
                            place = self._vector(outputs, DIMS * g + i, FLOAT, WIDEST)
                            self._store(self._multiply_add(b.load(place, align=4), shrink, new), place)

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
                return found | {"outputs": b.gep(found["outputs"], [b.mul(g, LONG(DIMS))])}

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
            with self._loop(LONG(0), b.mul(fields[f"v_{ENDS[-1]}"], LONG(DIMS)), WIDEST) as (lane, _, _):
                vector, within = b.sdiv(lane, LONG(DIMS)), b.srem(lane, LONG(DIMS))
                at = b.add(b.mul(vector, LONG(DIMS * self.group_size)), within)
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
                number = b.fmul(self._multiply_add(sized, least, number), scale)
                b.store(self._multiply_add(number, safe, b.load(b.gep(mean, [dim]))), b.gep(out, [dim]))
