"""Rows of codes on a CPU: how its kernels find their way in them."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from kvlatent.kernels.layout import SIZE_BYTES, STEP, Layout, middle, plane_bytes

LANES = 8
"""Dims of a vector."""


class Vectors(NamedTuple):
    """A row as vectors of eight dims, in bytes of the row: first those of eight bytes, then of four, then of two.

    A lane's byte has the bits of one dim or of several; of fewer bytes than lanes, each is in several lanes.
    """

    eights: int
    """Vectors of eight bytes."""
    fours: int
    """Vectors of eight or four bytes."""
    bytes: Tensor
    """Where each vector's bytes begin, (vectors,) int32."""
    masks: Tensor
    """The bits of a lane's byte that are its dim's, (vectors, 8) int32; none of a lane without a dim."""
    slots: Tensor
    """The lane of each dim, counted over all vectors, (width,) int32."""
    scales: Tensor
    """What a code's bits, where they stand, are to be multiplied by, in root mean squares; (width,) float32."""
    least: Tensor
    """What code 0 stands for, in root mean squares; (width,) float32."""

    lanes: int
    """Of all vectors."""
    fields: tuple[int, ...]
    """Dims, vectors, eights and fours, and the addresses of the tables, as a call passes them."""


@cache
def vectors_of(layout: Layout) -> Vectors:
    """The vectors of a row; planes of any number of bytes are read without a look beyond the row."""
    found: list[tuple[int, int, list[int], list[tuple[int, int]]]] = []  # word, first byte, masks, (dim, lane)
    scales, least = list[float](), list[float]()
    first_dim, start = 0, SIZE_BYTES
    for dims, bits in layout.groups:
        each = plane_bytes(dims, bits)
        for covered, word in _words(each):
            begin = min(covered, each - word)  # the last word ends with the plane, if it has to begin in the one before
            by_vector = LANES // word
            for planes in range(0, 8 // bits, by_vector):
                masks, places = [0] * LANES, []
                for lane in range(LANES):
                    plane, byte = planes + lane // word, begin + lane % word
                    dim = plane * each + byte
                    if plane < 8 // bits and covered <= byte and dim < dims:
                        masks[lane] = (2**bits - 1) << (plane * bits)
                        places.append((first_dim + dim, lane))
                found.append((word, start + begin, masks, places))
        scales += [STEP[bits] * 2.0 ** -(dim // each * bits) for dim in range(dims)]
        least += [STEP[bits] * middle(bits)] * dims
        first_dim, start = first_dim + dims, start + each
    found.sort(key=lambda vector: -vector[0])
    slots = [0] * first_dim
    for i, (_, _, _, places) in enumerate(found):
        for dim, lane in places:
            slots[dim] = LANES * i + lane
    eights, fours = (sum(word >= least_word for word, *_ in found) for least_word in (8, 4))
    tables = (
        torch.tensor([begin for _, begin, _, _ in found], dtype=torch.int32),
        torch.tensor([masks for _, _, masks, _ in found], dtype=torch.int32),
        torch.tensor(slots, dtype=torch.int32),
        torch.tensor(scales),
        torch.tensor(least),
    )
    fields = first_dim, len(found), eights, fours, *(table.data_ptr() for table in tables)
    return Vectors(eights, fours, *tables, lanes=LANES * len(found), fields=fields)


def _words(each: int) -> list[tuple[int, int]]:
    """A plane's bytes as words of 8, 4 and 2: where what is new in a word begins, and its bytes."""
    words, covered = [], 0
    while covered < each:
        word = 8 if each - covered >= 8 else 4 if each - covered > 2 else 2
        words.append((covered, word))
        covered += word
    return words
