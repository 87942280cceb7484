"""SnapKV (arXiv:2404.14469): what the end of the prompt attends to, by head, and the neighbours of that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kvlatent.compose.attended import Received
from kvlatent.compose.policy import Policy

WINDOW, POOL = 32, 7
"""Queries that choose, which stay themselves in half of what a layer keeps, and tokens over which scores are pooled."""


@dataclass(frozen=True, kw_only=True)
class SnapKV(Policy):
    """Keep what the prompt's last 32 queries attend to, in every head, and those tokens themselves."""

    name: ClassVar[str] = "snapkv"

    def recent(self, tokens: int, kept: int) -> int:
        return min(WINDOW, kept // 2)

    def observed(self, tokens: int) -> int:
        return WINDOW

    def rank(self, received: Received) -> Float[Tensor, "batch heads slots"]:
        return F.max_pool1d(received.mean(2), POOL, stride=1, padding=POOL // 2)
