"""Writing rows of codes on a CPU in one call; a decode step writes two in every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvlatent.kernels import cpu_decode

if TYPE_CHECKING:
    from kvlatent.kernels.codes import Places

ROWS_PER_THREAD = 64
"""Rows below which waking another thread costs more than it gives."""


def fits(x: Tensor) -> bool:
    """Whether `write_rows` can do this: plain tensors on a CPU, no trace."""
    return x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling() and cpu_decode.available()


def write_rows(x: Tensor, norms: Tensor, at: Places, row_bytes: int) -> Tensor:
    """Rows of latents (…, width) of these norms (…, 1): the same bytes as by `Codes.encode` without a kernel."""
    from kvlatent.kernels.cpu_encode_kernel import build_encoder

    x, width = x.contiguous(), x.shape[-1]
    rows = torch.empty(*x.shape[:-1], row_bytes, dtype=torch.uint8)
    items = norms.numel()
    call = (
        x.data_ptr(), norms.data_ptr(), rows.data_ptr(), width, row_bytes,
        *(table.data_ptr() for table in (at.root, at.byte, at.up, at.most, at.step, at.middle)), items, 0,
    )  # fmt: skip
    threads = min(torch.get_num_threads(), 1 + items // ROWS_PER_THREAD)
    build_encoder()(call, threads)
    return rows
