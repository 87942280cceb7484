"""Tensors that grow at their end, and layers of a cache that are made of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

LEAST_RESERVE = 64
"""The least capacity in tokens that is reserved."""
RESERVE_SHARE = 16
"""A sixteenth of what is held is reserved: 6 % of slack at most, and one copied row for each sixteen appended."""


def reserve(tokens: int, least: int = LEAST_RESERVE) -> int:
    """Capacity in tokens that a layer reserves behind `tokens` when it grows."""
    return max(least, tokens // RESERVE_SHARE)


class Buffer:
    """A tensor (batch, heads, seq, dim) with reserved capacity at its end along seq."""

    def __init__(self, held: Tensor, least_reserve: int = LEAST_RESERVE) -> None:
        self.whole, self.start, self.length = held, 0, held.shape[-2]
        self.least_reserve = least_reserve

    def held(self) -> Tensor:
        """What is held, as a view."""
        return self.whole.narrow(2, self.start, self.length)

    def append(self, new: Tensor) -> Tensor:
        """Write `new` behind what is held; grow, or close the gap in front, where the capacity is used up."""
        length = self.length + new.shape[-2]
        if self.start + length > self.whole.shape[-2]:
            whole = new.new_empty(*new.shape[:2], length + reserve(length, self.least_reserve), new.shape[-1])
            whole.narrow(2, 0, self.length).copy_(self.held())
            self.whole, self.start = whole, 0
        self.whole.narrow(2, self.start + self.length, new.shape[-2]).copy_(new)
        self.length = length
        return self.held()

    def drop_front(self, tokens: int) -> None:
        """Forget the oldest tokens, and give memory back where they were many."""
        self.start, self.length = self.start + tokens, self.length - tokens
        if self.whole.shape[-2] > self.length + 2 * reserve(self.length, self.least_reserve):
            held = self.held()
            self.whole = held.new_empty(
                *held.shape[:2], self.length + reserve(self.length, self.least_reserve), held.shape[-1]
            )
            self.start = 0
            self.held().copy_(held)


class Buffered:
    """What layers that keep their content in buffers have in common."""

    is_initialized: bool
    device: torch.device

    def buffers(self) -> Iterator[Buffer]:
        """All buffers there are by now."""
        raise NotImplementedError

    def allocated_bytes(self) -> int:
        """Bytes of all buffers, reserved capacity included."""
        return sum(buffer.whole.nbytes for buffer in self.buffers())

    def offload(self) -> None:
        """Move all buffers to the CPU."""
        self._move("cpu")

    def prefetch(self) -> None:
        """Move all buffers back to the layer's device."""
        if self.is_initialized:
            self._move(self.device)

    def _move(self, device: torch.device | str) -> None:
        for buffer in self.buffers():
            buffer.whole = buffer.whole.to(device, non_blocking=True)


def check_crop(tokens_to_remove: int) -> None:
    """Raise `ValueError` for a number that isn't minus a number of tokens; transformers once took a final length."""
    if tokens_to_remove > 0:
        raise ValueError(f"crop takes minus the number of tokens to remove; got {tokens_to_remove}")
