"""Healing in closed form: ridge regression of a linear layer to what it should give on the student's own inputs."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

_BLOCKS = 8
"""Rows of blocks that XᵀX is computed in; half of it follows by symmetry."""


class Ridge:
    """Normal equations of Y ≈ X·Wᵀ + b, summed over batches in float64, solved for W with a pull towards the old W."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear
        inputs, outputs, device = linear.in_features, linear.out_features, linear.weight.device
        # Only the blocks of xx on and above the diagonal are computed; what is below them stays zero.
        self.xx = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.xy = torch.zeros(inputs, outputs, dtype=torch.float64, device=device)

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
        at = 0
        for rows in x.T.tensor_split(_BLOCKS):
            self.xx[at : at + len(rows), at:] += rows @ x[:, at:]
            at += len(rows)
        self.xy += x.T @ y

    @torch.no_grad()
    def solve(self, *, strength: float) -> None:
        """Move the layer's weight W to argmin ‖Y − XWᵀ − b‖² + λ‖W − W_old‖², λ = `strength` × mean diagonal of XᵀX."""
        damping = strength * self.xx.diagonal().mean()
        xx = self.xx + damping * torch.eye(len(self.xx), dtype=self.xx.dtype, device=self.xx.device)
        wanted = self.xy + damping * self.linear.weight.double().T
        factor = torch.linalg.cholesky(xx, upper=True)  # looks at the upper triangle only
        self.linear.weight.copy_(torch.cholesky_solve(wanted, factor, upper=True).T)
