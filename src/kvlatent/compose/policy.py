"""What a policy decides: which tokens a layer's cache keeps.

A policy is one file in `compose/policies/`, a frozen dataclass that overrides what it decides differently. All of them
share the rest: the newest tokens and the first ones are protected, scores choose among the others, and `PolicyCache`
takes what goes out of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from kvlatent.compose.attended import Received
from kvlatent.errors import UserError

if TYPE_CHECKING:
    from kvlatent.compose.evicting import PolicyCache

LEAST = 16
"""Tokens of a sequence that are kept in any case."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Which tokens stay in the cache."""

    name: ClassVar[str]
    """What the command line calls it."""
    sinks: ClassVar[int] = 0
    """First tokens that always stay."""
    steps: ClassVar[bool] = False
    """Whether what a prefill left room for is also kept to while decoding."""
    shortens: ClassVar[bool] = False
    """Whether later layers never see what a layer drops of the first forward pass, which is the shorter for it."""
    ahead: ClassVar[int] = 0
    """From how many positions further on the queries ask that choose; above 0 the newest also asks from its own."""
    similar: ClassVar[tuple[float, float] | None] = None
    """The least cosines of keys before RoPE, and of values, with the code words that they become, if they do."""

    keep: float = 0.5
    """Share of a prompt's tokens that stay, over all layers; of students with a window, of the tokens beyond window and
    sinks, which stay in any case."""

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise UserError(f"keep must be above 0 and at most 1; got {self.keep}")

    def __str__(self) -> str:
        return f"{self.name} {self.keep:g}"

    def budget(self, tokens: int, layer: int, layers: int) -> int:
        """Tokens that a layer keeps of so many, if there are as many.

        Args:
            tokens: Of one sequence, all that were seen and that the layer doesn't hold in any case.
            layer: Index of the layer.
            layers: How many layers the policy acts on.
        """
        return max(LEAST, round(self.keep * tokens))

    def recent(self, tokens: int, kept: int) -> int:
        """Newest of so many tokens that stay before all others, where a layer keeps so many."""
        return 1

    def observed(self, tokens: int) -> int:
        """How many queries, the newest, choose what stays; 0 where attention doesn't."""
        return 0

    def at_once(self, kept: int) -> int:
        """How many tokens go together while decoding where a layer keeps so many, so that they are ranked once."""
        return 1

    def weights(self, count: int) -> Float[Tensor, "count"]:
        """What each of so many queries counts, in order."""
        return torch.full((count,), 1 / count)

    def rank(self, received: Received) -> Float[Tensor, "batch heads slots"]:
        """How much slots are worth; one head stands for all.

        Args:
            received: Attention from the observed queries; 0 at slots that always stay.
        """
        return received.mean(2)

    def generated(self, fresh: int, layer: int, layers: int) -> tuple[int, int] | None:
        """How many slots are looked at, the oldest of the newest so many, which decoding brought, and how many stay."""
        return None

    def cache(self, model: PreTrainedModel) -> PolicyCache:
        """An empty cache that keeps to this policy, for `model.generate(..., past_key_values=...)` and forward passes.

        Raises:
            UserError: The model's cache can't be kept to it.
        """
        from kvlatent.compose.evicting import PolicyCache

        return PolicyCache(self, model)


def chosen(
    worth: Float[Tensor, "batch heads slots"],
    valid: Bool[Tensor, "batch slots"] | None,
    counts: list[int],
    *,
    first: list[int],
    last: list[int],
) -> Bool[Tensor, "batch heads slots"]:
    """The slots that stay: the last, the first, and what is worth most, of every sequence as many as `counts` says.

    Args:
        worth: Of slots.
        valid: Which slots hold a token; None is all.
        counts: How many stay, of each sequence.
        first: How many of the first tokens come before what is worth most.
        last: How many of the last tokens come before these.
    """
    _, _, slots = worth.shape
    device = worth.device
    at = torch.arange(slots, device=device)
    holds = torch.ones(1, slots, dtype=torch.bool, device=device) if valid is None else valid
    place = holds.cumsum(-1) - 1  # among the tokens of a sequence
    rest = holds.sum(-1, keepdim=True) - 1 - place
    early, late, many = (torch.tensor(x, device=device)[:, None] for x in (first, last, counts))
    tier = 1 * holds + 1 * (holds & (place < early)) + 2 * (holds & (rest < late))
    order = worth.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(-1, order, at.expand_as(order))  # 0 is worth most
    protected = torch.where(rest < late, rest, place)  # of the last the newest first, of the first the oldest
    key = torch.where((tier > 1)[:, None], protected[:, None], rank) - slots * tier[:, None]
    standing = key.argsort(-1).argsort(-1)
    return (standing < many[:, None]) & holds[:, None]
