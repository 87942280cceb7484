"""SpindleKV (arXiv:2507.06517): eviction that falls linearly over layers, and what stays as code words.

No code was published; what second-hand sources leave open is chosen here. Eviction is by the mean of a group's query
heads, so a codebook belongs to one KV head and sees no token twice. The share is that of tokens; what the codebook
saves comes on top and shows in the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvlatent.compose.policy import LEAST, Policy

WINDOW = 32
"""Queries that choose, which stay themselves in half of what a layer keeps."""
LEAST_SHARE, TURNING = 0.05, 0.525
"""The least share of a layer, and the mean share from which on the first layer keeps all."""
KEYS, VALUES = 0.98, 0.95
"""The least cosine of a vector and its code word: keys before RoPE, and values."""


@dataclass(frozen=True, kw_only=True)
class SpindleKV(Policy):
    """Keep less in every next layer, of what the prompt's last 32 queries attend to, and write it as code words."""

    name: ClassVar[str] = "spindle"
    similar: ClassVar[tuple[float, float] | None] = (KEYS, VALUES)

    def budget(self, tokens: int, layer: int, layers: int) -> int:
        return max(LEAST, round(shares(self.keep, layers)[layer] * tokens))

    def recent(self, tokens: int, kept: int) -> int:
        return min(WINDOW, kept // 2)

    def observed(self, tokens: int) -> int:
        return WINDOW


def shares(mean: float, layers: int) -> list[float]:
    """Shares of tokens by layer, a line with this mean."""
    if mean <= LEAST_SHARE or layers == 1:
        return [mean] * layers
    first, last = (2 * mean - LEAST_SHARE, LEAST_SHARE) if mean <= TURNING else (1.0, 2 * mean - 1)
    return [first + (last - first) * layer / (layers - 1) for layer in range(layers)]
