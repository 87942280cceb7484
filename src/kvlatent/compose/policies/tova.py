"""TOVA (arXiv:2401.06104): a cache of fixed size, from which the token goes that the newest query attends to least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from kvlatent.compose.attended import Received
from kvlatent.compose.policy import Policy


@dataclass(frozen=True, kw_only=True)
class TOVA(Policy):
    """Keep what the newest query attends to, over all heads of a layer, in prefill and while decoding."""

    name: ClassVar[str] = "tova"
    steps: ClassVar[bool] = True

    def recent(self, tokens: int, kept: int) -> int:
        return 0

    def observed(self, tokens: int) -> int:
        return 1

    def at_once(self, kept: int) -> int:
        """One of 32, up to 16: ranking costs a second attention, and a token that ranks so low seldom rises again."""
        return max(1, min(16, kept // 32))

    def rank(self, received: Received) -> Float[Tensor, "batch 1 slots"]:
        return received.mean((1, 2))[:, None]
