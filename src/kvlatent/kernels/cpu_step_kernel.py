"""What a decode step does between its linear layers and its caches, as LLVM code: rotations, and maps of heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache

from llvmlite import ir

from kvlatent.kernels.cpu_code import FLOAT, LONG, WIDEST, Writer, compiled
from kvlatent.kernels.cpu_linear_kernel import TILE_ROWS

SUMS = 8
"""Vectors of sums in a tile: few enough for registers, and enough that no sum waits for itself."""


@cache
def build_turn() -> Callable[[Iterable[int], int], None]:
    """Return the kernel that rotates queries and keys: a function of the call's fields and of threads."""
    return compiled(Turn().module)


@cache
def build_maps(rows: int, vectors: int, merging: bool) -> Callable[[Iterable[int], int], None]:
    """Return the kernel of heads' maps for so many sequences, and outputs of at least so many vectors."""
    blocks = -(-rows // TILE_ROWS)
    return _maps(rows, min(vectors, SUMS // -(-rows // blocks)), merging)


@cache
def _maps(rows: int, vectors: int, merging: bool) -> Callable[[Iterable[int], int], None]:
    return compiled(Maps(rows, vectors, merging).module)


class Turn(Writer):
    """Rotates the pairs (j, j + half) of one token's queries and keys; an item is a sequence.

    Every product is rounded before it is added, so that the results are those of `rotate` in torch.
    """

    fields = ("q", "k", "q_out", "k_out", "cos", "sin", "angles", "q_heads", "k_heads", "half", "items", "next")
    """Addresses; `angles` is how far apart two sequences' cosines are, 0 where all stand at one position."""

    def __init__(self) -> None:
        super().__init__()
        self.write_worker(self._sequence)
        self.write_run()

    def _sequence(self, item: ir.Value, fields: dict[str, ir.Value]) -> None:
        b, half = self.b, fields["half"]
        angles = b.mul(item, fields["angles"])
        for side in "qk":
            heads = fields[f"{side}_heads"]
            first = b.mul(item, heads)
            with self._loop(first, b.add(first, heads)) as (head, _, _), self._loop(LONG(0), half, WIDEST) as (j, _, _):
                low = b.add(b.mul(head, b.mul(half, LONG(2))), j)
                high = b.add(low, half)

                def read(name: str, index: ir.Value) -> ir.Value:
                    return b.load(self._vector(self._at(fields[name], index, FLOAT), 0, FLOAT, WIDEST), align=4)

                def write(value: ir.Value, index: ir.Value, out: ir.Value = fields[f"{side}_out"]) -> None:
                    self._store(value, self._vector(self._at(out, index, FLOAT), 0, FLOAT, WIDEST))

                cos, sin = (read(name, b.add(angles, j)) for name in ("cos", "sin"))
                one, other = read(side, low), read(side, high)
                write(b.fsub(b.fmul(one, cos), b.fmul(other, sin)), low)
                write(b.fadd(b.fmul(other, cos), b.fmul(one, sin)), high)


class Maps(Writer):
    """Multiplies a row of every sequence and head by the head's map; an item is a head, so that its map is read once.

    Merging, the products are what far tokens give, and the output is that over near and far tokens together.
    """

    def __init__(self, rows: int, vectors: int, merging: bool) -> None:
        """Write it for so many sequences; tiles are so many vectors wide."""
        # Addresses and sizes; sums are largest logits and sums of weights in turns.
        self.fields = ("x", "maps", "out", "heads", "inputs", "outputs")
        self.fields += ("near", "near_sums", "far_sums", "bias") if merging else ()
        self.fields += ("items", "next")
        super().__init__()
        self.rows, self.vectors, self.merging = rows, vectors, merging
        self.write_worker(self._head)
        self.write_run()

    def _head(self, head: ir.Value, fields: dict[str, ir.Value]) -> None:
        b, inputs, outputs = self.b, fields["inputs"], fields["outputs"]
        width = self.vectors * WIDEST
        size = b.mul(inputs, outputs)
        maps = self._at(fields["maps"], b.mul(head, size), FLOAT)
        last = b.sub(outputs, LONG(width))
        blocks = -(-self.rows // TILE_ROWS)
        for block in range(blocks):
            rows = range(self.rows * block // blocks, self.rows * (block + 1) // blocks)
            places = [b.add(b.mul(LONG(row), fields["heads"]), head) for row in rows]
            xs = [self._at(fields["x"], b.mul(place, inputs), FLOAT) for place in places]
            shares = [self._share(place, head, fields) for place in places] if self.merging else []
            with self._loop(LONG(0), outputs, width) as (n, _, _):
                first = self._least(n, last)  # the last tile reaches back
                after = b.add(n, LONG(width))
                soon = b.select(b.icmp_signed("<", after, outputs), self._least(after, last), size)
                sums = [self._splat(FLOAT(0.0), WIDEST)] * (self.vectors * len(rows))
                with self._loop(LONG(0), inputs, sums=sums) as (i, totals, hand):
                    row = b.gep(maps, [b.mul(i, outputs)])
                    self._prefetch(b.gep(row, [soon]), width, FLOAT)
                    pieces = [(WIDEST * n, WIDEST) for n in range(self.vectors)]
                    columns = self._read(b.gep(row, [first]), pieces, FLOAT)
                    numbers = [self._splat(b.load(b.gep(x, [i])), WIDEST) for x in xs]
                    pairs = [(number, column) for number in numbers for column in columns]
                    hand([self._multiply_add(x, y, total) for (x, y), total in zip(pairs, totals, strict=True)])
                for i, total in enumerate(totals):
                    column = b.add(first, LONG(WIDEST * (i % self.vectors)))
                    place = b.add(b.mul(places[i // self.vectors], outputs), column)
                    if self.merging:
                        near = b.load(self._row(fields["near"], place), align=4)
                        share = self._splat(shares[i // self.vectors], WIDEST)
                        total = self._multiply_add(share, b.fsub(total, near), near)
                    self._store(total, self._row(fields["out"], place))

    def _row(self, address: ir.Value, index: ir.Value) -> ir.Value:
        """Pointer to the vector that begins at a number."""
        return self._vector(self._at(address, index, FLOAT), 0, FLOAT, WIDEST)

    def _share(self, place: ir.Value, head: ir.Value, fields: dict[str, ir.Value]) -> ir.Value:
        """How much of the softmax over both segments is the far one's; of nothing, 0."""
        b = self.b

        (near, near_weight), (far, far_weight) = (
            [b.load(self._at(fields[f"{side}_sums"], b.add(b.mul(place, LONG(2)), LONG(i)), FLOAT)) for i in (0, 1)]
            for side in ("near", "far")
        )
        bias = b.load(self._at(fields["bias"], head, FLOAT))
        far = self._multiply_add(bias, FLOAT(math.log2(math.e)), far)
        top = self._call("maxnum", near, far)
        near_weight, far_weight = (
            b.fmul(weight, self._exp2_of(b.fsub(largest, top)))
            for weight, largest in ((near_weight, near), (far_weight, far))
        )
        total = b.fadd(near_weight, far_weight)
        return b.select(b.fcmp_ordered(">", total, FLOAT(0.0)), b.fdiv(far_weight, total), FLOAT(0.0))
