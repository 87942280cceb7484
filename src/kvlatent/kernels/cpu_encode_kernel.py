"""Writing rows of codes, as LLVM code for every layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

from llvmlite import ir

from kvlatent.kernels.cpu_code import BYTE, FLOAT, HALF, LONG, WORD, Writer, compiled
from kvlatent.kernels.layout import GREATEST_SIZE, LEAST_SIZE, SIZE_SHIFT


def number_of(b: ir.IRBuilder, size: ir.Value) -> ir.Value:
    """A row's size, as the byte has it, as a float."""
    bits = b.shl(b.zext(size, HALF), HALF(SIZE_SHIFT))
    return b.fpext(b.bitcast(bits, ir.HalfType()), FLOAT)


@cache
def build_encoder() -> Callable[[Iterable[int], int], None]:
    """Return the kernel that writes rows: a function of the call's fields and of threads."""
    return compiled(Encoder().module)


class Encoder(Writer):
    """Writes one module: an item is a row. Every step is that of `Codes.encode`, so that rows are the same."""

    fields = (
        *("x", "norms", "reach", "rows", "apart", "width", "row_bytes"),
        *("root", "bytes", "ups", "most", "steps", "middles", "items", "next"),
    )
    """Addresses and sizes; those from `root` to `middles` are of `codes.Places`.

    Without norms a row's is its largest number times the float `reach`. `apart` is the bytes between rows' beginnings.
    """

    def __init__(self) -> None:
        super().__init__()
        self.write_worker(self._row)
        self.write_run()

    def _row(self, item: ir.Value, fields: dict[str, ir.Value]) -> None:
        b = self.b

        def number(name: str, index: ir.Value) -> ir.Value:
            return b.load(self._at(fields[name], index, FLOAT))

        row = self._at(fields["rows"], b.mul(item, fields["apart"]), BYTE)
        numbers = b.mul(item, fields["width"])
        with self._loop(LONG(0), fields["row_bytes"]) as (i, _, _):
            b.store(BYTE(0), b.gep(row, [i]))
        with b.if_else(b.icmp_signed("==", fields["norms"], LONG(0))) as (by_largest, given):
            with by_largest:
                with self._loop(LONG(0), fields["width"], sums=[FLOAT(0.0)]) as (dim, most, hand):
                    hand([self._call("maxnum", most[0], self._call("fabs", number("x", b.add(numbers, dim))))])
                largest, of_largest = b.fmul(most[0], self._float(fields["reach"])), b.block
            with given:
                norm, of_given = number("norms", item), b.block
        size = b.phi(FLOAT)
        size.add_incoming(largest, of_largest)
        size.add_incoming(norm, of_given)
        size = b.fmul(size, number("root", LONG(0)))
        size = self._call("minnum", self._call("maxnum", size, FLOAT(LEAST_SIZE)), FLOAT(GREATEST_SIZE))
        bits = b.bitcast(b.fptrunc(size, ir.HalfType()), HALF)
        nearest = b.trunc(b.lshr(b.add(bits, HALF(1 << SIZE_SHIFT - 1)), HALF(SIZE_SHIFT)), BYTE)
        b.store(nearest, row)
        size = number_of(b, nearest)
        with self._loop(LONG(0), fields["width"]) as (dim, _, _):
            step = b.fmul(size, number("steps", dim))
            interval = b.fsub(b.fdiv(number("x", b.add(numbers, dim)), step), number("middles", dim))
            code = self._call("floor", b.fadd(interval, FLOAT(0.5)))
            code = self._call("minnum", self._call("maxnum", code, FLOAT(0.0)), number("most", dim))
            up = b.load(self._at(fields["ups"], dim, WORD))
            place = b.gep(row, [b.load(self._at(fields["bytes"], dim, LONG))])
            bits = b.trunc(b.shl(b.fptosi(code, WORD), up), BYTE)
            b.store(b.or_(b.load(place), bits), place)
