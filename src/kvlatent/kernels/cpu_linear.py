"""Linear layers of a decode step on a CPU, at the speed of its memory.

A decode step multiplies a row per sequence by every weight of the model. BLAS libraries are made for more rows: they
copy the weights into an order of their own at every call, which takes several times as long as reading them. Here they
are read in place and once, so nothing is packed, stored twice or changed about them.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvlatent.kernels.cpu_decode import PARTS_PER_THREAD, STORED, available

MOST_ROWS = 16
"""Rows beyond which arithmetic, not memory, takes the time."""
LEAST_BYTES = 16 * 1024
"""Weights below which a call costs more than it saves."""
PART_BYTES = 256 * 1024
"""Bytes of weights that a thread takes at a time, at most."""
AHEAD_BYTES = 32 * 1024
"""Size of a tile up to which the next one is asked for; the processor reads longer rows ahead by itself."""


def linear_outputs(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """What layers of the same input give; in one call of `few_rows` where all are plain and rows are few.

    Layers keep their type, so that whatever looks for `nn.Linear` finds it; one that is quantized, hooked or wrapped is
    called as it is.
    """
    if x.shape[-2:-1] == (1,):
        plain = [layer for layer in layers if type(layer) is nn.Linear and not _hooked(layer)]
        if len(plain) == len(layers) and all(fits(x, layer.weight) for layer in plain):
            return few_rows(x, *plain)
    return [layer(x) for layer in layers]


def _hooked(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))


GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")
"""What a gated FFN is made of: down(act(gate(x)) · up(x))."""


def is_gated(mlp: Any) -> bool:
    """Whether this is one gated FFN; a router with experts isn't."""
    return all(isinstance(getattr(mlp, name, None), nn.Module) for name in GATED)


class GatedFFN(nn.Module):
    """Takes the place of a stock gated FFN, with its layers and parameter names; a decode step reads weights once."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def __init__(self, stock: Any) -> None:
        """Hold the layers of `stock`."""
        super().__init__()
        for name in GATED:
            self.add_module(name, getattr(stock, name))

    def forward(self, x: Tensor) -> Tensor:
        """The stock module's forward."""
        gate, up = linear_outputs(x, self.gate_proj, self.up_proj)
        return linear_outputs(self.act_fn(gate) * up, self.down_proj)[0]


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


def few_rows(x: Float[Tensor, "*rows inputs"], *layers: nn.Linear) -> list[Float[Tensor, "*rows outputs"]]:
    """`x @ weight.T + bias` of layers with weights of one dtype; sums are float32 whatever the dtype."""
    from kvlatent.kernels.cpu_code import WIDEST
    from kvlatent.kernels.cpu_linear_kernel import TILE, build

    parameters = [(layer.weight, layer.bias) for layer in layers]  # looked up once: each time takes microseconds
    inputs, dtype = x.shape[-1], parameters[0][0].dtype
    wide = x.float().contiguous()
    threads = torch.get_num_threads()
    row_bytes = inputs * dtype.itemsize
    outputs = [weight.shape[0] for weight, _ in parameters]
    part = min(PART_BYTES // row_bytes, sum(outputs) // (PARTS_PER_THREAD * threads)) // TILE * TILE or TILE
    ahead = TILE * inputs if TILE * row_bytes <= AHEAD_BYTES else 256
    made, fields, parts = list[Tensor](), [wide.data_ptr(), inputs, ahead, part], 0
    for (weight, _), size in zip(parameters, outputs, strict=True):
        made.append(torch.empty(*x.shape[:-1], size))
        fields += [weight.data_ptr(), made[-1].data_ptr(), size, parts]
        parts += -(-size // part)
    fields += [parts, 0]
    run = build(wide.numel() // inputs, inputs % WIDEST, len(layers), STORED[dtype])
    run(fields, threads)
    for out, (_, bias) in zip(made, parameters, strict=True):
        if bias is not None:
            out += bias
    return made if dtype == torch.float32 else [out.to(x.dtype) for out in made]
