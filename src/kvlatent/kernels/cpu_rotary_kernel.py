"""RoPE of one position per sequence, and the map that reduces it, as LLVM code."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir

from kvlatent.kernels.cpu_code import FAST, FLOAT, LONG, Writer, compiled, pieces_of

REGISTERS = 12
"""Vectors of sums that are held at once."""


@cache
def build(width: int, reduced: int | None, own_frequencies: bool) -> Callable[[Any, int], None]:
    """Return the kernel for heads of `width` dims: a map to `reduced` dims or none, frequencies by head or for all."""
    return compiled(Kernel(width, reduced, own_frequencies).module)


class Kernel(Writer):
    """Writes one module: threads take heads, each of them in all sequences, so that a head's map is read once."""

    fields = ("x", "cos", "sin", "frequencies", "map", "out", "batch", "group", "angles", "items", "next")
    """Addresses, and sizes: sequences, heads that share frequencies, and angles from one sequence to the next."""

    def __init__(self, width: int, reduced: int | None, own_frequencies: bool) -> None:
        super().__init__()
        self.width, self.reduced, self.own_frequencies = width, reduced, own_frequencies
        self.write_worker(self._head)
        self.write_run()

    def before_items(self) -> None:
        """Set room aside for a rotated row."""
        self.row = self.b.alloca(FLOAT, self.width)
        self.row.align = 64

    def _head(self, head: ir.Value, fields: dict[str, ir.Value]) -> None:
        b = self.b
        with self._loop(LONG(0), fields["batch"]) as (sequence, _, _):
            place = b.add(b.mul(sequence, fields["items"]), head)
            x = self._at(fields["x"], b.mul(place, LONG(self.width)), FLOAT)
            rotated = self.row
            if self.reduced is None:
                rotated = self._at(fields["out"], b.mul(place, LONG(self.width)), FLOAT)
            self._rotate(x, rotated, head, sequence, fields)
            if self.reduced is not None:
                self._reduce(head, place, self.reduced, fields)

    def _rotate(
        self, x: ir.Value, rotated: ir.Value, head: ir.Value, sequence: ir.Value, fields: dict[str, ir.Value]
    ) -> None:
        """Rotate the pairs (j, j + width / 2) of a row."""
        b, half = self.b, LONG(self.width // 2)
        start = b.mul(sequence, fields["angles"])
        of_head = b.mul(b.sdiv(head, fields["group"]), half)
        with self._loop(LONG(0), half) as (j, _, _):
            entry = b.load(self._at(fields["frequencies"], b.add(of_head, j), LONG)) if self.own_frequencies else j
            cos, sin = (b.load(self._at(fields[name], b.add(start, entry), FLOAT)) for name in ("cos", "sin"))
            there = b.add(j, half)
            first, second = b.load(b.gep(x, [j])), b.load(b.gep(x, [there]))
            crossed = b.fneg(b.fmul(second, sin, flags=FAST))
            b.store(self._multiply_add(first, cos, crossed), b.gep(rotated, [j]))
            b.store(self._multiply_add(second, cos, b.fmul(first, sin, flags=FAST)), b.gep(rotated, [there]))

    def _reduce(self, head: ir.Value, place: ir.Value, reduced: int, fields: dict[str, ir.Value]) -> None:
        """Multiply the rotated row by the head's map."""
        b, pieces = self.b, pieces_of(reduced)
        size = LONG(self.width * reduced)
        of_head = self._at(fields["map"], b.mul(head, size), FLOAT)
        out = self._at(fields["out"], b.mul(place, LONG(reduced)), FLOAT)
        for i in range(0, len(pieces), REGISTERS):
            now = pieces[i : i + REGISTERS]
            sums = [self._splat(FLOAT(0.0), lanes) for _, lanes in now]
            with self._loop(LONG(0), LONG(self.width), sums=sums) as (j, totals, hand):
                number = b.load(b.gep(self.row, [j]))
                row = self._read(b.gep(of_head, [b.mul(j, LONG(reduced))]), now, FLOAT)
                hand(
                    [
                        self._multiply_add(self._splat(number, values.type.count), values, total)
                        for values, total in zip(row, totals, strict=True)
                    ]
                )
            for (offset, lanes), total in zip(now, totals, strict=True):
                self._store(total, self._vector(out, offset, FLOAT, lanes))
