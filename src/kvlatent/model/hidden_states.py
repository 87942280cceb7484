"""Hidden states of a text between two decoder layers, where all of it passes one layer before the next: in memory or on
disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor


class HiddenStates(Protocol):
    """Hidden states by batch, each (sequences, seq, hidden) on the host."""

    def before(self, layer: int, at: int) -> Float[Tensor, "batch seq hidden"]:
        """Input of `layer` in batch `at`, which its output may have taken the place of."""

    def keep(self, layer: int, at: int, output: Float[Tensor, "batch seq hidden"]) -> None:
        """Store the output of `layer` in batch `at`."""


class InMemory:
    """One hidden state per token."""

    def __init__(self, states: Sequence[Tensor]) -> None:
        self.states = list(states)

    def before(self, layer: int, at: int) -> Tensor:
        """What was stored last, whatever the layer."""
        return self.states[at]

    def keep(self, layer: int, at: int, output: Tensor) -> None:
        """Store it in place of what was there."""
        self.states[at] = output.cpu()


class OnDisk:
    """Two hidden states per token: those before a layer and those after it, in two files that swap roles.

    A layer reads one file and writes the other, so a run killed in the middle of a layer finds its input whole. Files
    of sums beside them tell whether it really is: a machine that crashed may have lost some of it.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype,
        *,
        begun: bool,
        damaged: Callable[[str], Exception],
    ) -> None:
        """Map the files.

        Args:
            folder: Where they lie.
            name: Of these states among others there.
            shapes: (sequences, seq, hidden) of every batch.
            dtype: Of the states.
            begun: Whether they are there already, from a run that was killed.
            damaged: Makes what is raised, from what is wrong.
        """
        self.damaged = damaged

        def mapped(suffix: str, count: int, kind: torch.dtype) -> Tensor:
            file = folder / f"hidden-{name}-{suffix}.bin"
            if begun and (not file.is_file() or file.stat().st_size != count * kind.itemsize):
                raise damaged(f"{file.name}: not of the size it had")
            return torch.from_file(str(file), shared=True, size=count, dtype=kind)

        counts = [torch.Size(shape).numel() for shape in shapes]
        sides = [mapped(str(side), sum(counts), dtype).split(counts) for side in (0, 1)]
        self.sides = [[x.view(shape) for x, shape in zip(side, shapes, strict=True)] for side in sides]
        self.sums = [mapped(f"{side}-sums", len(shapes), torch.int64) for side in (0, 1)]

    def before(self, layer: int, at: int) -> Tensor:
        """Input of `layer` in batch `at`.

        Raises:
            UserError: It isn't what was stored.
        """
        side = layer % 2
        if _sum_of(hidden := self.sides[side][at]) != self.sums[side][at]:
            raise self.damaged(f"hidden states before layer {layer}: they aren't those that were written")
        return hidden

    def keep(self, layer: int, at: int, output: Tensor) -> None:
        """Store the output of `layer` in batch `at`; the embeddings are the output of layer -1."""
        side = (layer + 1) % 2
        self.sides[side][at].copy_(output)
        self.sums[side][at] = _sum_of(self.sides[side][at])


def forget(folder: Path, name: str) -> None:
    """Delete the files of states of that name, which are large."""
    for file in folder.glob(f"hidden-{name}-*.bin"):
        file.unlink()


def _sum_of(hidden: Tensor) -> Tensor:
    """The sum of a tensor's bits, which no rounding changes; never 0, so that an emptied file doesn't pass."""
    whole_number = {2: torch.int16, 4: torch.int32, 8: torch.int64}[hidden.element_size()]
    return hidden.contiguous().view(whole_number).abs().sum(dtype=torch.int64) + 1
