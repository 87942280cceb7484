"""Keys and values as code words: vectors of one direction are written down once, each with its own magnitude.

SpindleKV (arXiv:2507.06517) merges what is similar instead of dropping it. Keys are merged as they were before RoPE,
which makes equal tokens at other places differ, and turned to their positions whenever they are read: that saves
memory and no time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvlatent.compose.layers import Slots, gathered

Vectors = Float[Tensor, "batch heads slots dim"]


def leaders(
    vectors: Float[Tensor, "sets slots dim"], valid: Bool[Tensor, "sets slots"] | None, *, least: float
) -> Int[Tensor, "sets slots"]:
    """Which vector's direction stands for each of a set, its own or that of one at least so similar.

    Greedily, the vector that is similar to the most others stands for all of them, then the next among those that are
    left; of several the first.

    Args:
        vectors: Of any magnitude; those of magnitude 0 are similar to none.
        valid: Which of them are to be merged; others stand for themselves.
        least: The least cosine of two similar vectors.
    """
    units = F.normalize(vectors.float(), dim=-1)
    similar = units @ units.mT >= least
    if valid is not None:
        similar &= valid[:, None] & valid[:, :, None]
    sets, slots, _ = similar.shape
    own = torch.arange(slots, device=vectors.device)
    similar |= own[:, None] == own
    found = own.repeat(sets, 1)
    left, rows = torch.ones_like(found, dtype=torch.bool), torch.arange(sets, device=vectors.device)
    degree = similar.sum(-1)
    while slots and int(degree.max()) > 1:
        best = degree.argmax(-1)
        merged = similar[rows, best] & left & (degree.amax(-1, keepdim=True) > 1)
        found = torch.where(merged, best[:, None], found)
        left &= ~merged
        degree = torch.where(left, degree - (similar & merged[:, None]).sum(-1), 0)
    return found


class Codebook:
    """Vectors of several sets, (batch, heads, slots, dim), each as the index of a code word and a magnitude."""

    def __init__(self, vectors: Vectors, valid: Bool[Tensor, "batch slots"] | None, *, least: float) -> None:
        """Find code words for every sequence and head.

        Args:
            vectors: Of any magnitude.
            valid: Slots that hold a vector; None is all.
            least: The least cosine at which a code word stands for a vector.
        """
        batch, heads, slots, _ = vectors.shape
        self.least, units = least, F.normalize(vectors.float(), dim=-1).to(vectors.dtype).flatten(0, 1)
        real = None if valid is None else valid[:, None].expand(-1, heads, -1).flatten(0, 1)
        found = leaders(vectors.flatten(0, 1), real, least=least)
        own = torch.arange(slots, device=vectors.device)
        is_word = found == own if real is None else (found == own) & real
        number = is_word.flatten().cumsum(0).view_as(found) - 1
        self.words = units[is_word]
        self.owner = is_word.nonzero()[:, 0].int()
        """The set that each word belongs to."""
        index = number.gather(1, found)
        self.index = (index if real is None else torch.where(real, index, 0)).view(batch, heads, slots).int()
        magnitude = torch.linalg.vector_norm(vectors.float(), dim=-1).to(vectors.dtype)
        self.magnitude = magnitude if valid is None else magnitude * valid[:, None]

    @property
    def length(self) -> int:
        """Slots."""
        return self.index.shape[2]

    def read(self) -> Vectors:
        """The vectors, each in the direction of its code word."""
        return self.words[self.index.long()] * self.magnitude[..., None]

    def join(self, new: Vectors) -> None:
        """Take in more vectors, as one of the code words that there are or as one of their own."""
        batch, heads, count, dim = new.shape
        units = F.normalize(new.float(), dim=-1).reshape(-1, dim)
        sets = torch.arange(batch * heads, device=new.device).repeat_interleave(count)
        cosines = (units @ self.words.float().T).masked_fill(sets[:, None] != self.owner, -1.0)
        best, index = cosines.max(-1) if len(self.words) else (cosines.new_full((len(units),), -1.0), 0 * sets)
        alone = best < self.least
        index = torch.where(alone, len(self.words) + alone.cumsum(0) - 1, index)
        self.words = torch.cat((self.words, units[alone].to(new.dtype)))
        self.owner = torch.cat((self.owner, sets[alone].int()))
        self.index = torch.cat((self.index, index.view(batch, heads, count).int()), dim=2)
        magnitude = torch.linalg.vector_norm(new.float(), dim=-1).to(new.dtype)
        self.magnitude = torch.cat((self.magnitude, magnitude), dim=2)

    def take(self, slots: Slots) -> None:
        """Keep these slots, and the code words that they need."""
        self.index, self.magnitude = (gathered(x[..., None], slots)[..., 0] for x in (self.index, self.magnitude))
        needed, index = self.index.unique(return_inverse=True)
        self.words, self.owner, self.index = self.words[needed.long()], self.owner[needed.long()], index.int()

    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held."""
        return self.words, self.owner, self.index, self.magnitude
