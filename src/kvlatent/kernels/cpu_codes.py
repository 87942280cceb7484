"""Rows of codes on a CPU: how its kernels find their way in them."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from kvlatent.kernels.layout import SIZE_BYTES, STEP, Layout, middle, plane_bytes

LANES = 16
"""Dims of a vector."""
WORDS = 16, 8, 4, 2
"""Bytes that a vector's dims are in; of less than sixteen, lanes hold several planes."""

LIFT = {1: 7, 2: 6, 4: 4, 8: 1}
"""Bits by which codes are lifted, so that a step of few bits is about as much as one of many: then queries times steps
keep their precision as integers."""


class Vectors(NamedTuple):
    """A row as vectors of sixteen dims, in bytes of the row: first those of sixteen bytes, then of eight, four and two.

    A lane's byte has the bits of one dim or of several; of fewer bytes than lanes, each is in several lanes.
    """

    ends: tuple[int, ...]
    """Vectors whose bytes are at least as many as each of `WORDS`."""
    bytes: Tensor
    """Where each vector's bytes begin, (vectors,) int32."""
    masks: Tensor
    """The bits of a lane's byte that are its dim's, (vectors, 16) int16; none of a lane without a dim."""
    lifts: Tensor
    """What makes of those bits where they stand a code times 2^`LIFT`, (vectors, 16) int16."""
    slots: Tensor
    """The lane of each dim, counted over all vectors, (width,) int32."""
    scales: Tensor
    """What a lifted code is to be multiplied by, in root mean squares; (width,) float32."""
    least: Tensor
    """What is to be added to it before; (width,) float32."""

    lanes: int
    """Of all vectors."""
    fields: tuple[int, ...]
    """Dims, `ends`, and the addresses of the tables, as a call passes them."""


@cache
def vectors_of(layout: Layout) -> Vectors:
    """The vectors of a row; planes of any number of bytes are read without a look beyond the row."""
    found: list[tuple[int, int, list[int], list[int], list[tuple[int, int]]]] = []
    scales, least = list[float](), list[float]()
    first_dim, start = 0, SIZE_BYTES
    for dims, bits in layout.groups:
        each = plane_bytes(dims, bits)
        covered = 0
        for word in _words(each, start + each, 8 // bits):
            begin = min(covered, each - word)  # the last word ends with the plane, wherever it has to begin
            by_vector = LANES // word
            for planes in range(0, 8 // bits, by_vector):
                masks, lifts, places = [0] * LANES, [0] * LANES, []
                for lane in range(LANES):
                    plane, byte = planes + lane // word, begin + lane % word
                    dim = plane * each + byte
                    if plane < 8 // bits and covered <= byte and dim < dims:
                        masks[lane] = (2**bits - 1) << (plane * bits)
                        lifts[lane] = 2 ** (LIFT[bits] - plane * bits)
                        places.append((first_dim + dim, lane))
                found.append((word, start + begin, masks, lifts, places))
            covered += word
        scales += [STEP[bits] / 2 ** LIFT[bits]] * dims
        least += [middle(bits) * 2 ** LIFT[bits]] * dims
        first_dim, start = first_dim + dims, start + each
    found.sort(key=lambda vector: -vector[0])
    slots = [0] * first_dim
    for i, (*_, places) in enumerate(found):
        for dim, lane in places:
            slots[dim] = LANES * i + lane
    ends = tuple(sum(word >= least_word for word, *_ in found) for least_word in WORDS)
    _, begins, masks_of, lifts_of, _ = zip(*found, strict=True)
    tables = (
        torch.tensor(begins, dtype=torch.int32),
        torch.tensor(masks_of, dtype=torch.int16),
        torch.tensor(lifts_of, dtype=torch.int16),
        torch.tensor(slots, dtype=torch.int32),
        torch.tensor(scales),
        torch.tensor(least),
    )
    fields = first_dim, *ends, *(table.data_ptr() for table in tables)
    return Vectors(ends, *tables, lanes=LANES * len(found), fields=fields)


@cache
def _words(left: int, room: int, planes: int) -> list[int]:
    """Words that cover so many bytes of each plane with the fewest vectors, within `room` bytes of a row."""
    if left <= 0:
        return []
    if left >= WORDS[0]:
        return [WORDS[0], *_words(left - WORDS[0], room, planes)]
    covers = [[word, *_words(left - word, room, planes)] for word in WORDS if word <= max(left, room)]
    return min(covers, key=lambda words: sum(-(-planes * word // LANES) for word in words))
