"""Latents as codes of 8, 4, 2 and 1 bits: one row of bytes per token, written once and attended as it is.

A latent's dims come in groups of equal bits, most bits first. Conversion has taken their mean away, scaled them to
equal size and rotated each group, so that its numbers are as good as Gaussian whatever the token; what remains to be
told is the token's size, their root mean square. A number becomes the code of its interval among 2^bits, all as wide as
loses least of a Gaussian (Max, IRE Trans. Inf. Theory 6, 1960), and reads back as the middle of it.

A row is that size as float16, then the groups one after another. Two, four or eight codes share a byte, and dims that
are neighbours lie in neighbouring bytes: of n dims with 4 bits, byte j holds dim j below and dim j + n/2 above, so that
vectors of them come out with a mask and a shift.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

BITS = (1, 2, 4, 8)
"""Bits that a dim may have."""
STEP = {1: 1.5958, 2: 0.9957, 4: 0.3352, 8: 0.0308}
"""Width of an interval, in root mean squares."""
DISTORTION = {1: 0.3634, 2: 0.1188, 4: 0.01154, 8: 8.8e-5, 16: 0.0}
"""Mean squared error of a Gaussian of variance 1 by bits."""
SIZE_BYTES = 2
"""Of a row, the float16 of its root mean square."""
LEAST_SIZE = 2.0**-24

Groups = tuple[tuple[int, int], ...]
"""Numbers of dims, and the bits of each."""


@dataclass(frozen=True)
class Codes:
    """How the keys, or the values, of one layer's latents are written down."""

    groups: Groups

    @property
    def width(self) -> int:
        """Dims."""
        return sum(dims for dims, _ in self.groups)

    @property
    def bits(self) -> float:
        """Of a dim, on average."""
        return sum(dims * bits for dims, bits in self.groups) / self.width

    @property
    def row_bytes(self) -> int:
        """Bytes of one latent of one token."""
        return SIZE_BYTES + sum(plane_bytes(dims, bits) for dims, bits in self.groups)

    def encode(self, x: Tensor) -> Tensor:
        """Rows of latents: (batch, latents, seq, width) → (batch, latents, seq, row_bytes) uint8."""
        x, at = x.float(), places(self, x.device)
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * self.width**-0.5
        size = size.clamp(LEAST_SIZE, torch.finfo(torch.float16).max).half()
        intervals = (x / (size.float() * at.step) - at.middle).add_(0.5).floor_()
        codes = torch.minimum(intervals.clamp_(min=0), at.most).to(torch.int32) << at.up
        rows = codes.new_zeros(*x.shape[:-1], self.row_bytes).index_add_(-1, at.byte, codes).to(torch.uint8)
        rows[..., :SIZE_BYTES] = size.view(torch.uint8)
        return rows

    def decode(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """What rows say, in a dtype: (batch, latents, seq, row_bytes) → (batch, latents, seq, width)."""
        at = places(self, rows.device)
        size = rows[..., :SIZE_BYTES].contiguous().view(torch.float16).float()
        codes = (rows.index_select(-1, at.byte) >> at.up.to(torch.uint8)) & at.mask
        return ((codes.float() + at.middle) * (at.step * size)).to(dtype)

    def straight_through(self, x: Tensor) -> Tensor:
        """What would be read back of latents, with the gradient of the latents themselves."""
        return x + (self.decode(self.encode(x.detach()), x.dtype) - x.detach())


class Places(NamedTuple):
    """Where each dim of a row is, and what its code stands for; one number per dim."""

    byte: Tensor
    up: Tensor
    """Bits below its own in that byte; int32."""
    mask: Tensor
    """Its bits; uint8."""
    most: Tensor
    """The highest code, as float32."""
    step: Tensor
    """Width of an interval, in root mean squares."""
    middle: Tensor
    """What code 0 stands for, in steps."""


@torch.compiler.assume_constant_result
def places(codes: Codes, device: torch.device) -> Places:
    """The places of all dims, on a device; made once, as constants of compiled code."""
    return _places(codes, device)


@cache
def _places(codes: Codes, device: torch.device) -> Places:
    byte, up, bits_of, start = [], [], [], SIZE_BYTES
    for dims, bits in codes.groups:
        each = plane_bytes(dims, bits)
        byte += [start + dim % each for dim in range(dims)]
        up += [dim // each * bits for dim in range(dims)]
        bits_of += [bits] * dims
        start += each
    masks = [2**bits - 1 for bits in bits_of]
    return Places(
        byte=torch.tensor(byte, device=device),
        up=torch.tensor(up, dtype=torch.int32, device=device),
        mask=torch.tensor(masks, dtype=torch.uint8, device=device),
        most=torch.tensor(masks, dtype=torch.float32, device=device),
        step=torch.tensor([STEP[bits] for bits in bits_of], device=device),
        middle=torch.tensor([middle(bits) for bits in bits_of], device=device),
    )


def plane_bytes(dims: int, bits: int) -> int:
    """Bytes of a group, as many as there are dims in each of its 8 / bits planes."""
    return -(-dims * bits // 8)


def middle(bits: int) -> float:
    """The number that code 0 stands for, in steps."""
    return 0.5 - 2 ** (bits - 1)
