"""LLVM code for the CPU at hand: written with llvmlite, built on first use in well under a second, shared by threads.

Vectors are explicit, so nothing is left to a vectoriser, and no compiler is needed on the user's machine.
"""

from __future__ import annotations

import ctypes
import math
import struct
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from llvmlite import binding, ir

WIDEST = 8
"""Lanes of a vector: one AVX2 register of float32; elsewhere LLVM takes two registers, or half of one."""
LINE = 64
"""Bytes of a cache line."""

BIT, BYTE, HALF, WORD, LONG, FLOAT = (*map(ir.IntType, (1, 8, 16, 32, 64)), ir.FloatType())
STORED = {"float32": FLOAT, "float16": ir.HalfType(), "bfloat16": HALF}
FAST = ("reassoc", "contract", "nsz", "arcp")

_engines: list[Any] = []  # compiled code lives as long as its engine


def compiled(code: ir.Module) -> Callable[[Iterable[int], int], None]:
    """Build a module; return its function `run` of a call's fields and the number of threads."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    features = binding.get_host_cpu_features().flatten()
    target = binding.Target.from_default_triple()
    machine = target.create_target_machine(cpu=binding.get_host_cpu_name(), features=features, opt=3, jit=True)
    code.triple, code.data_layout = machine.triple, str(machine.target_data)
    module = binding.parse_assembly(str(code))
    module.verify()
    passes = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=0))
    passes.getModulePassManager().run(module, passes)
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    _engines.append(engine)
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int32)(engine.get_function_address("run"))

    def run(call: Iterable[int], threads: int) -> None:
        fields = array("q", call)  # built in a third of the time of a ctypes array
        function(fields.buffer_info()[0], threads)

    return run


@cache
def float_field(number: float) -> int:
    """A number as a call passes it."""
    return int.from_bytes(struct.pack("<f", number), "little")


@cache
def has(feature: str) -> bool:
    """Whether the CPU at hand has a feature, by LLVM's name of it."""
    return bool(binding.get_host_cpu_features().get(feature))


def element_bytes(stored: ir.Type) -> int:
    """Bytes of a number of a cache or of weights."""
    return 4 if stored == FLOAT else 2


def pieces_of(width: int) -> list[tuple[int, int]]:
    """So many numbers as vectors: (offset, lanes), lanes a power of two."""
    pieces, offset, lanes = [], 0, WIDEST
    while offset < width:
        while lanes > width - offset:
            lanes //= 2
        pieces.append((offset, lanes))
        offset += lanes
    return pieces


class Writer:
    """Writes a module whose threads share items of work: small words, loops, and the sharing itself.

    `fields` names what a call passes, 64 bits each; `items` is the number of items, and `next`, the last one, the
    counter of those taken.
    """

    fields: tuple[str, ...]

    def __init__(self) -> None:
        self.module = ir.Module("kvlatent")

    # --- the sharing

    def write_worker(self, work: Callable[[ir.Value, dict[str, ir.Value]], None]) -> None:
        """Write the function that every thread runs: take the next item, until none is left."""
        self.worker = ir.Function(self.module, ir.FunctionType(ir.VoidType(), [LONG.as_pointer()]), "work")
        self.worker.linkage = "internal"
        self.b = ir.IRBuilder(self.worker.append_basic_block("entry"))
        self.call = self.worker.args[0]
        self.before_items()
        fields = {name: self._field(name) for name in self.fields[:-1]}
        counter = self.b.gep(self.call, [LONG(self.fields.index("next"))])
        again, body, done = (self.b.append_basic_block(name) for name in ("again", "item", "done"))
        self.b.branch(again)
        self.b.position_at_end(again)
        item = self.b.atomic_rmw("add", counter, LONG(1), "monotonic")
        self.b.cbranch(self.b.icmp_signed("<", item, fields["items"]), body, done)
        self.b.position_at_end(body)
        work(item, fields)
        self.b.branch(again)
        self.b.position_at_end(done)
        self.b.ret_void()

    def before_items(self) -> None:
        """What a thread sets up first."""

    def write_run(self, after: Callable[[], None] | None = None) -> None:
        """Write `run`: the worker on all threads of torch's OpenMP, then what `after` writes on one."""
        void, pointer = ir.VoidType(), LONG.as_pointer()
        function = ir.Function(self.module, ir.FunctionType(void, [pointer, WORD]), "run")
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
        if after is not None:
            after()
        b.ret_void()

    # --- small words

    def _field(self, name: str) -> ir.Value:
        return self.b.load(self.b.gep(self.call, [LONG(self.fields.index(name))]), name=name)

    def _float(self, field: ir.Value) -> ir.Value:
        """The number that a field is, as `float_field` writes it."""
        return self.b.bitcast(self.b.trunc(field, WORD), FLOAT)

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

    def _widened(self, vector: ir.Value) -> ir.Value:
        """A vector of fewer lanes than the widest, with zeros behind them."""
        lanes = vector.type.count
        if lanes == WIDEST:
            return vector
        order = ir.Constant(ir.VectorType(WORD, WIDEST), [min(i, lanes) for i in range(WIDEST)])
        return self.b.shuffle_vector(vector, self._splat(FLOAT(0.0), lanes), order)

    def _lines(self, width: int, stored: ir.Type) -> range:
        """Where the cache lines of a row begin, in bytes."""
        return range(0, width * element_bytes(stored), LINE)

    def _prefetch(self, pointer: ir.Value, width: int, stored: ir.Type) -> None:
        """Ask for a row that is needed soon."""
        for line in self._lines(width, stored):
            self._prefetch_line(pointer, line)

    def _prefetch_line(self, pointer: ir.Value, offset: int) -> None:
        """Ask for the cache line so many bytes behind a pointer."""
        place = self.b.bitcast(pointer, BYTE.as_pointer())
        function = self.module.globals.get("llvm.prefetch.p0") or ir.Function(
            self.module, ir.FunctionType(ir.VoidType(), [BYTE.as_pointer(), WORD, WORD, WORD]), "llvm.prefetch.p0"
        )
        self.b.call(function, [self.b.gep(place, [LONG(offset)]), WORD(0), WORD(3), WORD(1)])

    def _splat(self, value: ir.Value, width: int) -> ir.Value:
        if isinstance(value, ir.Constant):
            return ir.Constant(ir.VectorType(value.type, width), [value.constant] * width)
        vector = ir.VectorType(value.type, width)
        one = self.b.insert_element(ir.Constant(vector, ir.Undefined), value, WORD(0))
        return self.b.shuffle_vector(
            one, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(WORD, width), [0] * width)
        )

    def _picked(self, x: ir.Value, y: ir.Value, lanes: Iterable[int]) -> ir.Value:
        """Lanes of two vectors."""
        order = list(lanes)
        return self.b.shuffle_vector(x, y, ir.Constant(ir.VectorType(WORD, len(order)), order))

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
