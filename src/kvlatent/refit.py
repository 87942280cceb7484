"""Healing in closed form: ridge regression of a linear layer to what it should have given on the student's own inputs."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Ridge:
    """Normal equations of Y ≈ X·Wᵀ, summed over batches in float64, solved with a pull towards the old weights."""

    def __init__(self) -> None:
        self.xx: Tensor | float = 0.0
        self.xy: Tensor | float = 0.0

    def add(self, x: Float[Tensor, "*batch inputs"], y: Float[Tensor, "*batch outputs"]) -> None:
        """Add inputs and wanted outputs of one batch; the products are taken in float32."""
        x, y = x.flatten(0, -2).float(), y.flatten(0, -2).float()
        self.xx = self.xx + (x.T @ x).double()
        self.xy = self.xy + (x.T @ y).double()

    @torch.no_grad()
    def solve(self, linear: nn.Linear, *, strength: float) -> None:
        """Move `linear.weight` to argmin ‖Y − XWᵀ‖² + λ‖W − W_old‖², λ = `strength` × mean diagonal of XᵀX."""
        assert isinstance(self.xx, Tensor) and isinstance(self.xy, Tensor)
        old = linear.weight.double().T
        damping = strength * self.xx.diagonal().mean() * torch.eye(len(old), dtype=old.dtype, device=old.device)
        change = torch.linalg.solve(self.xx + damping, self.xy - self.xx @ old, left=True)
        linear.weight.copy_((old + change).T)
