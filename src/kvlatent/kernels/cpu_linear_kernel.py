"""Linear layers of the same few rows as LLVM code: the weights are read once, in place, at the speed of memory.

A tile is a few rows of weights times a few rows of inputs, its sums in registers. Meanwhile the next tile's weights are
asked for, since a row of a small model is over before the processor has noticed that it is read in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

from llvmlite import ir

from kvlatent.kernels.cpu_code import FLOAT, LONG, STORED, WIDEST, Writer, compiled, pieces_of

TILE = 3
"""Rows of weights in a tile."""
OF_LAYER = ("weight", "out", "outputs", "first")
"""Fields of each layer: addresses, size, and the first part of all that is one of its."""
TILE_ROWS = 4
"""Rows of inputs in a tile, at most; with them, twelve of AVX2's sixteen registers hold sums."""


@cache
def build(rows: int, rest: int, layers: int, stored: str) -> Callable[[Iterable[int], int], None]:
    """Return the kernel for `rows` rows of inputs, `rest` of each beyond whole vectors, and layers of a dtype."""
    return compiled(Kernel(rows, rest, layers, STORED[stored]).module)


class Kernel(Writer):
    """Writes one module: threads take parts of the rows of weights, one layer's after the other's."""

    def __init__(self, rows: int, rest: int, layers: int, stored: ir.Type) -> None:
        # Address and size of the inputs, how many elements ahead weights are asked for, outputs in a part.
        self.fields = ("x", "inputs", "ahead", "part", *(f"{name}{i}" for i in range(layers) for name in OF_LAYER))
        self.fields += ("items", "next")
        super().__init__()
        self.rows, self.rest, self.layers, self.stored = rows, rest, layers, stored
        self.write_worker(self._part)
        self.write_run()

    def _part(self, item: ir.Value, fields: dict[str, ir.Value]) -> None:
        """One part of a layer's outputs; the last tile reaches back where outputs aren't a multiple of it."""
        b = self.b
        for i in range(self.layers):  # the last layer that begins at this part or before it
            begun = b.icmp_signed(">=", item, fields[f"first{i}"])
            of_layer = {name: fields[f"{name}{i}"] for name in OF_LAYER}
            fields = fields | {name: b.select(begun, new, fields[name]) if i else new for name, new in of_layer.items()}
        start = b.mul(b.sub(item, fields["first"]), fields["part"])
        end = self._least(b.add(start, fields["part"]), fields["outputs"])
        last = b.sub(fields["outputs"], LONG(TILE))
        with self._loop(start, end, TILE) as (n, _, _):
            self._tile(self._least(n, last), fields)

    def _tile(self, n: ir.Value, fields: dict[str, ir.Value]) -> None:
        """Outputs n, n + 1, … of all rows."""
        b, inputs = self.b, fields["inputs"]
        weights = [self._at(fields["weight"], b.mul(b.add(n, LONG(j)), inputs), self.stored) for j in range(TILE)]
        blocks = -(-self.rows // TILE_ROWS)
        for block in range(blocks):
            rows = range(self.rows * block // blocks, self.rows * (block + 1) // blocks)
            xs = [self._at(fields["x"], b.mul(LONG(row), inputs), FLOAT) for row in rows]
            sums = [self._splat(FLOAT(0.0), WIDEST)] * (TILE * len(rows))
            whole = b.sub(inputs, LONG(self.rest))
            with self._loop(LONG(0), whole, WIDEST, sums=sums) as (k, totals, hand):
                # Each block asks for its share of the next tile, so that memory never waits; in long rows, just ahead.
                share = b.sdiv(b.add(k, b.mul(inputs, LONG(block))), LONG(blocks))
                soon = b.add(fields["ahead"], b.select(b.icmp_signed("<", fields["ahead"], inputs), k, share))
                for weight in weights:
                    self._prefetch(b.gep(weight, [soon]), WIDEST, self.stored)
                hand(self._products(k, (0, WIDEST), weights, xs, totals))
            for piece in pieces_of(self.rest):
                totals = self._products(whole, piece, weights, xs, totals)
            for i, total in enumerate(totals):
                index = b.add(b.mul(LONG(rows[i // TILE]), fields["outputs"]), b.add(n, LONG(i % TILE)))
                b.store(self._sum(total), self._at(fields["out"], index, FLOAT))

    def _products(
        self, k: ir.Value, piece: tuple[int, int], weights: list[ir.Value], xs: list[ir.Value], totals: list[ir.Value]
    ) -> list[ir.Value]:
        """Add to a tile's sums what one vector of every row, from its number k on, gives."""
        left = [self._widened(self._read(self.b.gep(weight, [k]), [piece], self.stored)[0]) for weight in weights]
        right = [self._widened(self._read(self.b.gep(x, [k]), [piece], FLOAT)[0]) for x in xs]
        pairs = [(x, w) for x in right for w in left]
        return [self._multiply_add(x, w, total) for (x, w), total in zip(pairs, totals, strict=True)]
