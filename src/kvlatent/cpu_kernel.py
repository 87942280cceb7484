"""The CPU decode kernel as LLVM code: written with llvmlite, built for the CPU at hand on first use, in milliseconds.

Vectors are explicit: a head's row of d_qk or d_vo numbers is a list of them, so nothing is left to a vectoriser, every
width works, and no compiler is needed on the user's machine.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import product
from typing import Any

from llvmlite import binding, ir

BLOCK = 64
"""Keys whose logits are held at a time; the keys and values of a block stay in the first caches."""
LANES = 16
"""Logits exponentiated at a time."""
WIDEST = 8
"""Lanes of a vector: one AVX2 register of float32; elsewhere LLVM takes two registers, or half of one."""
REGISTERS = 12
"""Vectors of sums over values that are held at once."""
LINE = 64
"""Bytes of a cache line."""
LOWEST = -1e30
"""A logit that nothing finite is below."""
FIELDS = (
    *("q", "k", "k_batch", "k_head", "k_token", "v", "v_batch", "v_head", "v_token", "mask", "mask_batch"),
    *("heads", "length", "parts", "part", "items", "partial", "out", "next"),
)
"""What a call passes, 64 bits each: addresses, strides in elements, sizes, and the counter the threads share."""

BIT, BYTE, HALF, WORD, LONG, FLOAT = (*map(ir.IntType, (1, 8, 16, 32, 64)), ir.FloatType())
STORED = {"float32": FLOAT, "float16": ir.HalfType(), "bfloat16": HALF}
FAST = ("reassoc", "contract", "nsz", "arcp")

_engines: list[Any] = []  # compiled code lives as long as its engine


@cache
def build(d_qk: int, d_vo: int, group_size: int, k_dtype: str, v_dtype: str) -> Callable[[Any, int], None]:
    """Return the kernel for these dims and dtypes: a function of the call's fields and the number of threads."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    features = binding.get_host_cpu_features().flatten()
    target = binding.Target.from_default_triple()
    machine = target.create_target_machine(cpu=binding.get_host_cpu_name(), features=features, opt=3, jit=True)
    code = _Kernel(d_qk, d_vo, group_size, STORED[k_dtype], STORED[v_dtype]).module
    code.triple, code.data_layout = machine.triple, str(machine.target_data)
    module = binding.parse_assembly(str(code))
    module.verify()
    passes = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=1))
    passes.getModulePassManager().run(module, passes)
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    _engines.append(engine)
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int32)(engine.get_function_address("decode"))


def _pieces(width: int) -> list[tuple[int, int]]:
    """A row as vectors: (offset, lanes), lanes a power of two."""
    pieces, offset, lanes = [], 0, WIDEST
    while offset < width:
        while lanes > width - offset:
            lanes //= 2
        pieces.append((offset, lanes))
        offset += lanes
    return pieces


class _Kernel:
    """Writes one module: `work`, which every thread runs until no part is left, and `decode`, which merges."""

    def __init__(self, d_qk: int, d_vo: int, group_size: int, k_stored: ir.Type, v_stored: ir.Type) -> None:
        self.d_qk, self.d_vo, self.group_size = d_qk, d_vo, group_size
        self.k_stored, self.v_stored = k_stored, v_stored
        self.k_pieces, self.v_pieces = _pieces(d_qk), _pieces(d_vo)
        self.record = d_vo + 2  # of a query head's part: unnormalised outputs, maximum, sum
        self.module = ir.Module("kvlatent")
        self._work()
        self._decode()

    # --- small words

    def _field(self, name: str) -> ir.Value:
        return self.b.load(self.b.gep(self.call, [LONG(FIELDS.index(name))]), name=name)

    def _at(self, address: ir.Value, index: ir.Value, stored: ir.Type) -> ir.Value:
        """Pointer to element `index` of an array of `stored` at an address."""
        return self.b.gep(self.b.inttoptr(address, stored.as_pointer()), [index])

    def _store(self, value: ir.Value, pointer: ir.Value) -> None:
        self.b.store(value, pointer, align=4)

    def _vector(self, pointer: ir.Value, offset: int, stored: ir.Type, lanes: int) -> ir.Value:
        """Pointer to `lanes` elements at an offset."""
        return self.b.bitcast(self.b.gep(pointer, [LONG(offset)]), ir.VectorType(stored, lanes).as_pointer())

    def _read(self, pointer: ir.Value, pieces: Sequence[tuple[int, int]], stored: ir.Type) -> list[ir.Value]:
        """Pieces of a row as float32 vectors."""
        vectors = []
        for offset, lanes in pieces:
            raw = self.b.load(self._vector(pointer, offset, stored, lanes), align=4 if stored == FLOAT else 2)
            if stored == HALF:  # bfloat16 is the upper half of a float32
                words = self.b.zext(raw, ir.VectorType(WORD, lanes))
                raw = self.b.bitcast(self.b.shl(words, self._splat(WORD(16), lanes)), ir.VectorType(FLOAT, lanes))
            vectors.append(raw if raw.type.element == FLOAT else self.b.fpext(raw, ir.VectorType(FLOAT, lanes)))
        return vectors

    def _prefetch(self, pointer: ir.Value, width: int, stored: ir.Type) -> None:
        """Ask for a row that is needed soon."""
        place = self.b.bitcast(pointer, BYTE.as_pointer())
        function = self.module.globals.get("llvm.prefetch.p0") or ir.Function(
            self.module, ir.FunctionType(ir.VoidType(), [BYTE.as_pointer(), WORD, WORD, WORD]), "llvm.prefetch.p0"
        )
        for offset in range(0, width * (4 if stored == FLOAT else 2), LINE):
            self.b.call(function, [self.b.gep(place, [LONG(offset)]), WORD(0), WORD(3), WORD(1)])

    def _splat(self, value: ir.Value, width: int) -> ir.Value:
        if isinstance(value, ir.Constant):
            return ir.Constant(ir.VectorType(value.type, width), [value.constant] * width)
        vector = ir.VectorType(value.type, width)
        one = self.b.insert_element(ir.Constant(vector, ir.Undefined), value, WORD(0))
        return self.b.shuffle_vector(
            one, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(WORD, width), [0] * width)
        )

    def _call(self, name: str, *values: ir.Value, result: ir.Type | None = None) -> ir.Value:
        """An LLVM intrinsic, named as for the type of its last argument."""
        kind = values[-1].type
        suffix = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"
        full = f"llvm.{name}.{suffix}"
        function = self.module.globals.get(full) or ir.Function(
            self.module, ir.FunctionType(result or kind, [value.type for value in values]), full
        )
        return self.b.call(function, values, fastmath=FAST)

    def _sum(self, vector: ir.Value) -> ir.Value:
        return self._call("vector.reduce.fadd", FLOAT(-0.0), vector, result=FLOAT)

    def _dot(self, left: list[ir.Value], right: list[ir.Value]) -> ir.Value:
        by_lanes: dict[int, ir.Value] = {}
        for x, y in zip(left, right, strict=True):
            lanes = x.type.count
            by_lanes[lanes] = (
                self._multiply_add(x, y, by_lanes[lanes]) if lanes in by_lanes else self.b.fmul(x, y, flags=FAST)
            )
        first, *rest = (self._sum(vector) for vector in by_lanes.values())
        for value in rest:
            first = self.b.fadd(first, value, flags=FAST)
        return first

    def _multiply_add(self, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        return self._call("fma", x, y, z)

    def _least(self, x: ir.Value, y: ir.Value) -> ir.Value:
        return self.b.select(self.b.icmp_signed("<", x, y), x, y)

    def _exp2(self, x: ir.Value) -> ir.Value:
        """2 ** x of float32 lanes for x <= 0, to the last bit or two; 0 below the normal numbers."""
        lanes = x.type.count

        def constant(value: float) -> ir.Value:
            return self._splat(FLOAT(value), lanes)

        floor = self._call("maxnum", x, constant(-126.0))
        whole = self._call("rint", floor)
        rest = self.b.fsub(floor, whole, flags=FAST)
        total = constant(math.log(2) ** 7 / math.factorial(7))
        for k in range(6, -1, -1):
            total = self._multiply_add(total, rest, constant(math.log(2) ** k / math.factorial(k)))
        words = ir.VectorType(WORD, lanes)
        exponent = self.b.add(self.b.fptosi(whole, words), self._splat(WORD(127), lanes))
        power = self.b.bitcast(self.b.shl(exponent, self._splat(WORD(23), lanes)), x.type)
        result = self.b.fmul(total, power, flags=FAST)
        return self.b.select(self.b.fcmp_ordered("<", x, constant(-126.0)), constant(0.0), result)

    def _exp2_of(self, x: ir.Value) -> ir.Value:
        return self.b.extract_element(self._exp2(self._splat(x, 4)), WORD(0))

    @contextmanager
    def _loop(
        self, start: ir.Value, end: ir.Value, step: int = 1, sums: Sequence[ir.Value] = ()
    ) -> Iterator[tuple[ir.Value, list[ir.Value], Callable[[Sequence[ir.Value]], None]]]:
        """Count from start to end; carries `sums`, whose next values the body hands to the function it is given.

        The list of sums holds their last values once the loop is left.
        """
        before = self.b.block
        head, body, after = (self.b.append_basic_block(name) for name in ("head", "body", "after"))
        self.b.branch(head)
        self.b.position_at_end(head)
        index = self.b.phi(LONG)
        carried = [self.b.phi(value.type) for value in sums]
        index.add_incoming(start, before)
        for phi, value in zip(carried, sums, strict=True):
            phi.add_incoming(value, before)
        self.b.cbranch(self.b.icmp_signed("<", index, end), body, after)
        self.b.position_at_end(body)
        handed: list[ir.Value] = []
        yield index, carried, handed.extend
        for phi, value in zip(carried, handed, strict=True):
            phi.add_incoming(value, self.b.block)
        index.add_incoming(self.b.add(index, LONG(step)), self.b.block)
        self.b.branch(head)
        self.b.position_at_end(after)

    # --- the two functions

    def _work(self) -> None:
        """Take the next part until none is left."""
        self.worker = ir.Function(self.module, ir.FunctionType(ir.VoidType(), [LONG.as_pointer()]), "work")
        self.worker.linkage = "internal"
        self.b = ir.IRBuilder(self.worker.append_basic_block("entry"))
        self.call = self.worker.args[0]
        self.weights = self.b.alloca(FLOAT, self.group_size * BLOCK)
        self.weights.align = 64
        fields = {name: self._field(name) for name in FIELDS[:-1]}
        counter = self.b.gep(self.call, [LONG(FIELDS.index("next"))])
        again, body, done = (self.b.append_basic_block(name) for name in ("again", "part", "done"))
        self.b.branch(again)
        self.b.position_at_end(again)
        item = self.b.atomic_rmw("add", counter, LONG(1), "monotonic")
        self.b.cbranch(self.b.icmp_signed("<", item, fields["items"]), body, done)
        self.b.position_at_end(body)
        self._part(item, fields)
        self.b.branch(again)
        self.b.position_at_end(done)
        self.b.ret_void()

    def _part(self, item: ir.Value, fields: dict[str, ir.Value]) -> None:
        """One part of the context of one sequence and key/value head, all its query heads."""
        b = self.b
        pair = b.sdiv(item, fields["parts"])
        batch, head = b.sdiv(pair, fields["heads"]), b.srem(pair, fields["heads"])
        start = b.mul(b.srem(item, fields["parts"]), fields["part"])
        end = self._least(b.add(start, fields["part"]), fields["length"])
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
        with self._loop(start, end, BLOCK) as (first, _, _):
            count = self._least(b.sub(end, first), LONG(BLOCK))
            seen = self._seen(first, count, batch, fields)
            with b.if_then(seen):
                self._logits(first, count, q_rows, fields, k_start, v_start)
                self._hide(first, count, batch, fields)
                self._softmax(outputs)
                self._values(first, count, outputs, fields, v_start)

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
        """Logits of a block into `weights`, -inf behind its last key; its values are asked for meanwhile."""
        b = self.b
        nothing = self._splat(FLOAT(-math.inf), LANES)
        with b.if_then(b.icmp_signed("<", count, LONG(BLOCK)), likely=False):
            for i in range(0, self.group_size * BLOCK, LANES):
                self._store(nothing, self._vector(self.weights, i, FLOAT, LANES))
        with self._loop(LONG(0), count) as (j, _, _):
            key_index = b.add(first, j)
            value = b.add(v_start, b.mul(key_index, fields["v_token"]))
            self._prefetch(self._at(fields["v"], value, self.v_stored), self.d_vo, self.v_stored)
            place = self._at(fields["k"], b.add(k_start, b.mul(key_index, fields["k_token"])), self.k_stored)
            key = self._read(place, self.k_pieces, self.k_stored)
            for g, q_row in enumerate(q_rows):
                logit = self._dot(self._read(q_row, self.k_pieces, FLOAT), key)
                b.store(logit, b.gep(self.weights, [b.add(j, LONG(g * BLOCK))]))

    def _hide(self, first: ir.Value, count: ir.Value, batch: ir.Value, fields: dict[str, ir.Value]) -> None:
        """Logits of keys that may not be looked at become -inf."""
        b = self.b
        masked = b.icmp_unsigned("!=", fields["mask"], LONG(0))
        with b.if_then(masked, likely=False), self._loop(LONG(0), count) as (j, _, _):
            hidden = b.icmp_unsigned("==", self._mask_byte(b.add(first, j), batch, fields), BYTE(0))
            with b.if_then(hidden):
                for g in range(self.group_size):
                    b.store(FLOAT(-math.inf), b.gep(self.weights, [b.add(j, LONG(g * BLOCK))]))

    def _softmax(self, outputs: list[ir.Value]) -> None:
        """Logits to weights relative to the part's maximum so far; what was summed before is brought down to it."""
        b = self.b
        for g, output in enumerate(outputs):
            places = [self._vector(self.weights, g * BLOCK + i, FLOAT, LANES) for i in range(0, BLOCK, LANES)]
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
        self, first: ir.Value, count: ir.Value, outputs: list[ir.Value], fields: dict[str, ir.Value], v_start: ir.Value
    ) -> None:
        """Add the weighted values of a block to all query heads, as many pieces of a row at once as registers hold."""
        b = self.b
        at_once = 1 << max(0, (REGISTERS // self.group_size).bit_length() - 1)
        for i in range(0, len(self.v_pieces), at_once):
            pieces = self.v_pieces[i : i + at_once]
            sums = [vector for output in outputs for vector in self._read(output, pieces, FLOAT)]
            with self._loop(LONG(0), count, sums=sums) as (j, totals, hand):
                index = b.add(v_start, b.mul(b.add(first, j), fields["v_token"]))
                values = self._read(self._at(fields["v"], index, self.v_stored), pieces, self.v_stored)
                added: list[ir.Value] = []
                for g in range(self.group_size):
                    weight = b.load(b.gep(self.weights, [b.add(j, LONG(g * BLOCK))]))
                    for value in values:
                        total = totals[len(added)]
                        added.append(self._multiply_add(self._splat(weight, value.type.count), value, total))
                hand(added)
            for (output, (offset, lanes)), total in zip(product(outputs, pieces), totals, strict=True):
                self._store(total, self._vector(output, offset, FLOAT, lanes))

    def _decode(self) -> None:
        """Run the workers, then merge the parts of every query head by their maxima and sums."""
        void, pointer = ir.VoidType(), LONG.as_pointer()
        function = ir.Function(self.module, ir.FunctionType(void, [pointer, WORD]), "decode")
        self.b = b = ir.IRBuilder(function.append_basic_block("entry"))
        self.call, threads = function.args
        with b.if_else(b.icmp_signed(">", threads, WORD(1))) as (several, one):
            with several:
                worker = ir.FunctionType(void, [pointer])
                start = ir.Function(
                    self.module, ir.FunctionType(void, [worker.as_pointer(), pointer, WORD, WORD]), "GOMP_parallel"
                )
                b.call(start, [self.worker, self.call, threads, WORD(0)])
            with one:
                b.call(self.worker, [self.call])
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
            safe = b.select(b.fcmp_ordered(">", weight, zero), b.fdiv(FLOAT(1.0), weight), zero)
            place = self._at(out, b.mul(r, LONG(self.d_vo)), FLOAT)
            for (offset, lanes), total in zip(self.v_pieces, totals, strict=True):
                scaled = b.fmul(total, self._splat(safe, lanes), flags=FAST)
                self._store(scaled, self._vector(place, offset, FLOAT, lanes))
        b.ret_void()
