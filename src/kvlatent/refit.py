"""Healing in closed form: ridge regression of a linear layer to what it should give on the student's own inputs."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Ridge:
    """Normal equations of Y ≈ X·Wᵀ + b, summed over batches in float64, solved for W with a pull towards the old W."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear
        self.xx: Tensor | float = 0.0
        self.xy: Tensor | float = 0.0

    def add(
        self,
        x: Float[Tensor, "*batch inputs"],
        y: Float[Tensor, "*batch outputs"],
        *,
        size: Float[Tensor, "*batch outputs"] | None = None,
    ) -> None:
        """Add inputs and wanted outputs of one batch; the products are taken in float32.

        Args:
            x: What the layer is given.
            y: What it should give.
            size: The hidden state that the output becomes part of. Each position counts by the inverse of its mean
                square, because the RMSNorm that follows divides by it; without it all positions count alike.
        """
        x, y = x.flatten(0, -2).float(), y.flatten(0, -2).float()
        if self.linear.bias is not None:
            y = y - self.linear.bias.float()
        if size is not None:
            weight = size.flatten(0, -2).float().square().mean(-1, keepdim=True).rsqrt()
            x, y = x * weight, y * weight
        self.xx = self.xx + (x.T @ x).double()
        self.xy = self.xy + (x.T @ y).double()

    @torch.no_grad()
    def solve(self, *, strength: float) -> None:
        """Move the layer's weight W to argmin ‖Y − XWᵀ − b‖² + λ‖W − W_old‖², λ = `strength` × mean diagonal of XᵀX."""
        assert isinstance(self.xx, Tensor) and isinstance(self.xy, Tensor)
        old = self.linear.weight.double().T
        damping = strength * self.xx.diagonal().mean() * torch.eye(len(old), dtype=old.dtype, device=old.device)
        change = torch.linalg.solve(self.xx + damping, self.xy - self.xx @ old)
        self.linear.weight.copy_((old + change).T)
