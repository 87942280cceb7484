"""A gated FFN with frozen weights and LoRA that keeps little for its backward pass: x, gate and up, not what they make.

Two thirds of what a student's layer keeps for the backward pass are its FFN's activations, and half of those are cheap
to recompute. LoRA's part is added in place. Values and gradients are peft's.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from kvlatent.kernels.segment import computed_in

FFN = ("gate_proj", "up_proj", "down_proj")
"""Linears of an FFN, which are trained through LoRA."""


def keep_little(mlp: nn.Module) -> None:
    """Let the FFN of a layer keep little, if it is SiLU and plain LoRA throughout; any other stays as it is."""
    if isinstance(mlp.act_fn, nn.SiLU | SiLUActivation) and all(_is_plain(getattr(mlp, name, None)) for name in FFN):
        mlp.forward = MethodType(_forward, mlp)


def _is_plain(layer: Any) -> bool:
    """Whether a layer is exactly x Wᵀ + scale · B A x: no subclass, quantized weight, bias or variant such as DoRA."""
    return (
        type(layer) is Linear
        and type(layer.base_layer) is nn.Linear
        and layer.base_layer.bias is None
        and not layer.lora_variant
        and not any(layer.lora_bias.values())
    )


def keep_all(mlp: nn.Module) -> None:
    """Undo `keep_little`."""
    vars(mlp).pop("forward", None)


def _forward(mlp: nn.Module, x: Tensor) -> Tensor:
    weights: list[Tensor] = []
    for layer in (getattr(mlp, name) for name in FFN):
        weights += (layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    return _GatedFFN.apply(x, mlp.down_proj.scaling["default"], computed_in(x), *weights)  # type: ignore[union-attr, index]


def _linear(x: Tensor, w: Tensor, low: Tensor, b: Tensor, scale: float) -> Tensor:
    """x Wᵀ + scale · low Bᵀ, where low = x Aᵀ."""
    return (x @ w.mT).addmm_(low, b.mT, alpha=scale)


class _GatedFFN(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)), each of the three a frozen W and scale · B A."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, dtype: torch.dtype, *weights: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            gate_w, gate_a, gate_b, up_w, up_a, up_b, down_w, down_a, down_b = (w.to(dtype) for w in weights)
            rows = x.to(dtype).flatten(0, -2)
            gate_low, up_low = rows @ gate_a.mT, rows @ up_a.mT
            gate = _linear(rows, gate_w, gate_low, gate_b, scale)
            up = _linear(rows, up_w, up_low, up_b, scale)
            inner = F.silu(gate).mul_(up)
            down_low = inner @ down_a.mT
            out = _linear(inner, down_w, down_low, down_b, scale)
        ctx.save_for_backward(rows, gate, up, gate_low, up_low, down_low, *weights)
        ctx.scale, ctx.dtypes = scale, (dtype, x.dtype)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        rows, gate, up, gate_low, up_low, down_low, *weights = ctx.saved_tensors
        scale, (dtype, x_dtype) = ctx.scale, ctx.dtypes
        with torch.autocast(grad_output.device.type, enabled=False):
            gate_w, gate_a, gate_b, up_w, up_a, up_b, down_w, down_a, down_b = (w.to(dtype) for w in weights)
            grad = grad_output.to(dtype).flatten(0, -2)
            act = F.silu(gate)
            by_low = (grad @ down_b).mul_(scale)
            by_down = by_low.mT @ act.mul(up), (grad.mT @ down_low).mul_(scale)
            by_inner = (grad @ down_w).addmm_(by_low, down_a)
            by_gate = torch.ops.aten.silu_backward(up.mul(by_inner), gate)
            of_up = act.mul_(by_inner)
            by_gate_low, by_up_low = (by_gate @ gate_b).mul_(scale), (of_up @ up_b).mul_(scale)
            gate_grads = by_gate_low.mT @ rows, (by_gate.mT @ gate_low).mul_(scale)
            up_grads = by_up_low.mT @ rows, (of_up.mT @ up_low).mul_(scale)
            by_x = None
            if ctx.needs_input_grad[0]:
                by_x = (by_gate @ gate_w).addmm_(of_up, up_w).addmm_(by_gate_low, gate_a).addmm_(by_up_low, up_a)
                by_x = by_x.to(x_dtype).view(*grad_output.shape[:-1], -1)
        grads = (None, *gate_grads, None, *up_grads, None, *by_down)
        return by_x, None, None, *(g if g is None else g.to(w.dtype) for g, w in zip(grads, weights, strict=True))
