"""Expected Attention (arXiv:2510.00636): what the text to come is expected to attend to.

The paper takes future queries for normally distributed, as those of the text are before RoPE, and turns their mean and
covariance to the positions ahead; here the newest queries themselves are turned, which needs no distribution. To their
mean the newest query's own attention is added, which knows what is asked for at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from kvlatent.compose.attended import Received
from kvlatent.compose.policy import Policy

QUERIES, WINDOW = 128, 32
"""Queries that choose, and tokens that stay themselves in half of what a layer keeps."""


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(Policy):
    """Keep what the newest query attends to and 128 would from 128 positions further on, and the newest 32 tokens."""

    name: ClassVar[str] = "expected-attention"
    ahead: ClassVar[int] = QUERIES

    def recent(self, tokens: int, kept: int) -> int:
        return min(WINDOW, kept // 2)

    def observed(self, tokens: int) -> int:
        return QUERIES

    def rank(self, received: Received) -> Float[Tensor, "batch heads slots"]:
        return received.mean(2)
