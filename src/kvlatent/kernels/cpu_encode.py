"""Writing rows of codes on a CPU in one call; a decode step writes two in every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from kvlatent.kernels import cpu_decode

if TYPE_CHECKING:
    from kvlatent.kernels.codes import Places

ROWS_PER_THREAD = 64
"""Rows below which waking another thread costs more than it gives."""


def fits(x: Tensor) -> bool:
    """Whether rows can be written here: plain tensors on a CPU, no trace."""
    return x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling() and cpu_decode.available()


def write_rows(x: Tensor, norms: Tensor, at: Places, row_bytes: int) -> Tensor:
    """Rows of latents (…, width) of these norms (…, 1): the same bytes as by `Codes.encode` without a kernel."""
    rows = torch.empty(*x.shape[:-1], row_bytes, dtype=torch.uint8)
    _write(x, norms.data_ptr(), 0, rows.data_ptr(), row_bytes, at, row_bytes)
    return rows


def write_at(
    x: Float[Tensor, "batch heads 1 width"],
    reach: float,
    at: Places,
    rows: UInt8[Tensor, "batch heads places row"],
    place: int,
) -> None:
    """Write rows of one token, whose norms are their largest numbers times `reach`, to a place of contiguous rows."""
    from kvlatent.kernels.cpu_code import float_field

    row_bytes = rows.shape[3]
    _write(x, 0, float_field(reach), rows.data_ptr() + place * row_bytes, rows.shape[2] * row_bytes, at, row_bytes)


def _write(x: Tensor, norms: int, reach: int, rows: int, apart: int, at: Places, row_bytes: int) -> None:
    from kvlatent.kernels.cpu_encode_kernel import build_encoder

    x, width = x.contiguous(), x.shape[-1]
    items = x.numel() // width
    call = (
        x.data_ptr(), norms, reach, rows, apart, width, row_bytes,
        *(table.data_ptr() for table in (at.root, at.byte, at.up, at.most, at.step, at.middle)), items, 0,
    )  # fmt: skip
    build_encoder()(call, min(torch.get_num_threads(), 1 + items // ROWS_PER_THREAD))
