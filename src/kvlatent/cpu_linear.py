"""Linear layers of a decode step on a CPU, at the speed of its memory.

A decode step multiplies a row per sequence by every weight of the model. BLAS libraries are made for more rows: they
copy the weights into an order of their own at every call, which takes several times as long as reading them. Here they
are read in place and once, so nothing is packed, stored twice or changed about them.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kvlatent.cpu_decode import PARTS_PER_THREAD, STORED, available

MOST_ROWS = 16
"""Rows beyond which arithmetic, not memory, takes the time."""
LEAST_BYTES = 16 * 1024
"""Weights below which a call costs more than it saves."""
PART_BYTES = 256 * 1024
"""Bytes of weights that a thread takes at a time, at most."""
AHEAD_BYTES = 32 * 1024
"""Size of a tile up to which the next one is asked for; the processor reads longer rows ahead by itself."""


class DecodeLinear(nn.Linear):
    """`nn.Linear`, computed by `few_rows` where that is faster; parameters, state and gradients are `nn.Linear`'s."""

    def forward(self, input: Tensor) -> Tensor:
        """Multiply; one position per sequence on a CPU takes the short way."""
        if input.shape[-2:-1] == (1,) and fits(input, self.weight):
            return few_rows(input, self.weight, self.bias)
        return F.linear(input, self.weight, self.bias)


def lean(model: nn.Module) -> None:
    """Let every plain `nn.Linear` of a model be a `DecodeLinear`."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = DecodeLinear


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether `few_rows` can compute this, and fast: on a CPU, no gradients, no trace, no autocast, plain tensors."""
    outputs, inputs = weight.shape
    return (
        x.device.type == "cpu"
        and x.numel() <= MOST_ROWS * inputs
        and weight.nbytes >= LEAST_BYTES
        and outputs >= 8  # more than a tile
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and weight.dtype in STORED
        and x.dtype == weight.dtype
        and weight.is_contiguous()
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and available()
    )


def few_rows(
    x: Float[Tensor, "*rows inputs"], weight: Float[Tensor, "outputs inputs"], bias: Float[Tensor, "outputs"] | None
) -> Float[Tensor, "*rows outputs"]:
    """`x @ weight.T + bias`; sums are float32 whatever the dtype."""
    from kvlatent.cpu_code import WIDEST
    from kvlatent.cpu_linear_kernel import TILE, Kernel, build

    outputs, inputs = weight.shape
    wide = x.float().contiguous()
    out = torch.empty(*x.shape[:-1], outputs)
    run = build(wide.numel() // inputs, inputs % WIDEST, STORED[weight.dtype])
    threads = torch.get_num_threads()
    row_bytes = inputs * weight.element_size()
    part = min(PART_BYTES // row_bytes, outputs // (PARTS_PER_THREAD * threads)) // TILE * TILE or TILE
    ahead = TILE * inputs if TILE * row_bytes <= AHEAD_BYTES else 256
    call = (ctypes.c_int64 * len(Kernel.fields))(
        wide.data_ptr(), weight.data_ptr(), out.data_ptr(), outputs, inputs, part, ahead, -(-outputs // part), 0
    )
    run(call, threads)
    if bias is not None:
        out += bias
    return out.to(x.dtype)
