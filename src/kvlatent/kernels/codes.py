"""Rows of codes, written and read as tensors; `kernels/layout.py` says what they are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from kvlatent.kernels import cpu_encode
from kvlatent.kernels.layout import GREATEST_SIZE, LEAST_SIZE, SIZE_BYTES, SIZE_SHIFT, STEP, Layout, middle, plane_bytes

ROUNDED_UP = 17 / 16
"""By so much a size is made larger that its nearest byte isn't below it."""


@dataclass(frozen=True)
class Codes(Layout):
    """How the keys, or the values, of one layer's latents are written down."""

    def encode(self, x: Tensor) -> Tensor:
        """Rows of latents: (batch, latents, seq, width) → (batch, latents, seq, row_bytes) uint8."""
        x, at = x.float(), places(self, x.device)
        norms = self._norms(x)
        if cpu_encode.fits(x):
            return cpu_encode.write_rows(x, norms, at, self.row_bytes)
        bits = (norms * at.root).clamp(LEAST_SIZE, GREATEST_SIZE).half().view(torch.int16)
        size = (bits + (1 << SIZE_SHIFT - 1)) >> SIZE_SHIFT  # the nearest
        intervals = (x / (_numbers(size) * at.step) - at.middle).add_(0.5).floor_()
        codes = torch.minimum(intervals.clamp_(min=0), at.most).to(torch.int32) << at.up
        rows = codes.new_zeros(*x.shape[:-1], self.row_bytes).index_add_(-1, at.byte, codes).to(torch.uint8)
        rows[..., :SIZE_BYTES] = size.to(torch.uint8)
        return rows

    def decode(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """What rows say, in a dtype: (batch, latents, seq, row_bytes) → (batch, latents, seq, width)."""
        at = places(self, rows.device)
        size = _numbers(rows[..., :SIZE_BYTES].to(torch.int16))
        codes = (rows.index_select(-1, at.byte) >> at.up.to(torch.uint8)) & at.mask
        return ((codes.float() + at.middle) * (at.step * size)).to(dtype)

    def _norms(self, x: Tensor) -> Tensor:
        """What rows are as long as, (…, 1): their sizes times the root of their width."""
        return torch.linalg.vector_norm(x, dim=-1, keepdim=True)

    def straight_through(self, x: Tensor) -> Tensor:
        """What would be read back of latents, with the gradient of the latents themselves."""
        return x + (self.decode(self.encode(x.detach()), x.dtype) - x.detach())


class WholeCodes(Codes):
    """Rows of 8 bits whose size is told by their largest number, so that none is cut off.

    For whole keys and values, which are not rotated, and some of whose dims are many times as large as the others.
    """

    def __init__(self, width: int) -> None:
        super().__init__(((width, 8),))

    @property
    def reach(self) -> float:
        """What takes a row's largest number to its norm."""
        return ROUNDED_UP * self.width**0.5 / (-STEP[8] * middle(8))

    def _norms(self, x: Tensor) -> Tensor:
        return x.abs().amax(-1, keepdim=True) * self.reach

    def write(self, x: Tensor, rows: Tensor, place: int) -> None:
        """Write one token (batch, heads, 1, width) to a place of rows (batch, heads, places, row_bytes)."""
        if cpu_encode.fits(x) and rows.is_contiguous():
            cpu_encode.write_at(x.float(), self.reach, places(self, x.device), rows, place)
        else:
            rows.narrow(2, place, 1).copy_(self.encode(x))


def _numbers(sizes: Tensor) -> Tensor:
    """Sizes of rows, int16, as float32."""
    return (sizes << SIZE_SHIFT).view(torch.float16).float()


class Places(NamedTuple):
    """Where each dim of a row is, and what its code stands for; one number per dim, but for the first."""

    root: Tensor
    """What turns a row's norm into its root mean square, (1,)."""
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


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
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
        root=torch.tensor([codes.width**-0.5], device=device),
        byte=torch.tensor(byte, device=device),
        up=torch.tensor(up, dtype=torch.int32, device=device),
        mask=torch.tensor(masks, dtype=torch.uint8, device=device),
        most=torch.tensor(masks, dtype=torch.float32, device=device),
        step=torch.tensor([STEP[bits] for bits in bits_of], device=device),
        middle=torch.tensor([middle(bits) for bits in bits_of], device=device),
    )
