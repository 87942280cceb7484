"""Latents as codes of 8, 4, 2 and 1 bits: one row of bytes per token, written once and attended as it is.

A latent's dims come in groups of equal bits, most bits first. Conversion has taken their mean away, scaled them to
equal size and rotated each group, so that its numbers are as good as Gaussian whatever the token; what remains to be
told is the token's size, their root mean square. A number becomes the code of its interval among 2^bits, all as wide as
loses least of a Gaussian (Max, IRE Trans. Inf. Theory 6, 1960), and reads back as the middle of it.

A row is that size in a byte, then the groups one after another. The byte has the five bits of exponent and three of the
mantissa of a float16; codes are made by what it says, so that little is lost by its rounding. Two, four or eight codes
share a byte, and dims that are neighbours lie in neighbouring bytes: of n dims with 4 bits, byte j holds dim j below
and dim j + n/2 above, so that vectors of them come out with a mask and a shift.
"""

from __future__ import annotations

from dataclasses import dataclass

BITS = (1, 2, 4, 8)
"""Bits that a dim may have."""
STEP = {1: 1.5958, 2: 0.9957, 4: 0.3352, 8: 0.0308}
"""Width of an interval, in root mean squares."""
DISTORTION = {1: 0.3634, 2: 0.1188, 4: 0.01154, 8: 8.8e-5, 16: 0.0}
"""Mean squared error of a Gaussian of variance 1 by bits."""
SIZE_BYTES = 1
"""What a row begins with: its root mean square."""
SIZE_SHIFT = 7
"""Bits of a float16 that a size leaves out; above those it has is only a sign."""
LEAST_SIZE, GREATEST_SIZE = 2.0**-17, 61440.0
"""The smallest size above 0, so that nothing divides by zero, and the largest."""

Groups = tuple[tuple[int, int], ...]
"""Numbers of dims, and the bits of each."""


@dataclass(frozen=True)
class Layout:
    """How the keys, or the values, of one layer's latents are written down."""

    groups: Groups

    @property
    def width(self) -> int:
        """Dims."""
        return sum(dims for dims, _ in self.groups)

    @property
    def bits(self) -> float:
        """Average bits of a dim."""
        return sum(dims * bits for dims, bits in self.groups) / self.width

    @property
    def row_bytes(self) -> int:
        """Bytes of one latent of one token."""
        return SIZE_BYTES + sum(plane_bytes(dims, bits) for dims, bits in self.groups)


def bits_of(groups: Groups) -> float:
    """Average bits of a dim; 16 without groups, where dims are numbers."""
    return Layout(groups).bits if groups else 16.0


def plane_bytes(dims: int, bits: int) -> int:
    """Bytes of a group, as many as there are dims in each of its 8 / bits planes."""
    return -(-dims * bits // 8)


def middle(bits: int) -> float:
    """The number that code 0 stands for, in steps."""
    return 0.5 - 2 ** (bits - 1)
