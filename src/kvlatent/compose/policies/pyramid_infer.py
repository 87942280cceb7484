"""PyramidInfer (arXiv:2405.12532): fewer tokens in every next layer, in the prefill itself.

What a layer drops of a prompt no later layer computes. The share that stays falls along a cosine from layer to layer;
its decay is solved for the share that is wanted over all layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from kvlatent.compose.attended import Received
from kvlatent.compose.policy import Policy

RECENT, LEAST_CONTEXT, LAST_WEIGHT = 0.2, 64, 1.2
"""Share of the prompt that always stays and whose queries choose, the least that a layer is reduced to, and what the
newest query counts beside the oldest of these."""
BLOCK, GENERATED, GENERATED_DECAY = 16, 0.9, 0.1
"""Tokens that are reduced at a time while decoding, the share of them that the first layer keeps, and the decay."""
STEEPEST = -64.0
"""The lowest decay tried: beyond it only the newest tokens are left behind the first layer."""


@dataclass(frozen=True, kw_only=True)
class PyramidInfer(Policy):
    """Keep less in every next layer, which never sees what earlier ones dropped; a shorter prefill too."""

    name: ClassVar[str] = "pyramid-infer"
    sinks: ClassVar[int] = 4
    shortens: ClassVar[bool] = True

    def budget(self, tokens: int, layer: int, layers: int) -> int:
        return schedule(tokens, solved_decay(tokens, layers, self.keep), layers, newest(tokens, self.keep))[layer]

    def recent(self, tokens: int, kept: int) -> int:
        return newest(tokens, self.keep)

    def observed(self, tokens: int) -> int:
        return newest(tokens, self.keep)

    def weights(self, count: int) -> Float[Tensor, "count"]:
        return torch.linspace(1, LAST_WEIGHT, count) / count

    def rank(self, received: Received) -> Float[Tensor, "batch 1 slots"]:
        return received.mean((1, 2))[:, None]

    def generated(self, fresh: int, layer: int, layers: int) -> tuple[int, int] | None:
        """A block as soon as as many newer tokens have come; 14 of 16 stay in the first layer, fewer in later ones."""
        return (BLOCK, int(BLOCK * GENERATED * share(layer, layers, GENERATED_DECAY))) if fresh >= 2 * BLOCK else None


def newest(tokens: int, keep: float) -> int:
    """Newest tokens of a prompt, which stay in every layer and choose."""
    return int(tokens * min(RECENT, 0.4 * keep)) + 1


def share(layer: int, layers: int, decay: float) -> float:
    """What stays in a layer of the tokens that reach it, the newest left out: d + (1 - d)·(1 + cos(π·l/L))/2."""
    return max(0.0, 1 - (1 - decay) * (1 - math.cos(math.pi * layer / layers)) / 2)


def schedule(tokens: int, decay: float, layers: int, recent: int) -> list[int]:
    """Tokens that each layer keeps of a prompt: the newest, and never less than the sinks of all earlier ones."""
    kept, left = [], tokens
    for layer in range(layers):
        earlier = max(PyramidInfer.sinks, int((left - recent) * share(layer, layers, decay)))
        left = min(left, max(LEAST_CONTEXT, recent + earlier))
        kept.append(left)
    return kept


@cache
def solved_decay(tokens: int, layers: int, keep: float) -> float:
    """The decay whose schedule keeps most of all that keep no more than a share, by bisection.

    1 keeps all. It falls below 0 where the cosine alone drops too little. A share is missed that the first layer, which
    drops nothing, exceeds alone, or with `LEAST_CONTEXT` in all others.
    """
    recent = newest(tokens, keep)
    low, high = STEEPEST, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if sum(schedule(tokens, middle, layers, recent)) <= keep * tokens * layers:
            low = middle
        else:
            high = middle
    return low
