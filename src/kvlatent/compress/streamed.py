"""Conversion one layer at a time: weights come from the teacher's files, and go into the student's as they are done.

What is done waits in a folder beside the output: statistics, layers, and the hidden states between the last of them and
the next. The same command, given again after a kill, goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvlatent.compress.statistics import Statistics
from kvlatent.errors import UserError
from kvlatent.files import begin_work, damaged_work, discard, replaced
from kvlatent.model.hidden_states import HiddenStates, InMemory, OnDisk
from kvlatent.model.offload import LAYERS, OffloadedLayers, at_hand

WORK = "conversion"
TEXT = "text.safetensors"
"""The calibration text, so that a stream of it is read once."""
REST = "rest.safetensors"
"""The last file that is written: all that is no layer."""


def work_folder(out: Path) -> Path:
    """Where the conversion that will become `out` keeps what is done."""
    return out.with_name(f".{out.name}.converting")


def forget_finished(out: Path) -> None:
    """Remove the work folder of a conversion that is whole in `out`: a kill came before that was done."""
    work = work_folder(out)
    if out.exists() and (work / REST).exists():
        discard(work, of=out)


def file_mark(file: Path) -> str:
    """What tells a file from another one: its path, size and time."""
    found = file.resolve().stat()
    return f"{file.resolve()} {found.st_size} {found.st_mtime_ns}"


@dataclass(frozen=True)
class Stream:
    """A teacher's layers on disk, and the work folder of its conversion."""

    layers: OffloadedLayers
    work: Path
    dtype: torch.dtype
    """Of the weights written."""

    def begin(self, settings: dict[str, Any]) -> None:
        """Make the work folder, or find in it what a killed conversion with the same settings has done.

        Raises:
            UserError: It is of other settings, another teacher or other text, or can't be written.
        """
        settings = settings | {"weights": sorted(map(file_mark, {*self.layers.files.values()}))}
        begin_work(self.work / "convert.json", settings, what=WORK)

    def damaged(self, what: str) -> UserError:
        """What to raise when a file isn't as it was written."""
        return damaged_work(self.work, what, what=WORK)

    def has_work(self) -> bool:
        """Whether statistics or layers are there that a new start would lose."""
        return any(file.name != TEXT for file in self.work.glob("*.safetensors"))

    def file(self, index: int) -> Path:
        """Where layer `index` of the student lies once it is done."""
        return self.work / f"layer-{index:05d}.safetensors"

    def keep(self, index: int, layer: nn.Module) -> None:
        """Write layer `index` of the student, from where no later run does it again."""
        self._write(self.file(index), {f"{LAYERS}{index}.{name}": x for name, x in layer.state_dict().items()})

    def _write(self, file: Path, tensors: dict[str, Tensor]) -> None:
        written = {
            name: x.to("cpu", self.dtype if x.is_floating_point() else None).contiguous() for name, x in tensors.items()
        }
        with replaced(file) as partial_file:
            save_file(written, partial_file, metadata={"format": "pt"})

    def shards(self, student: PreTrainedModel) -> list[Path]:
        """All files of the student, whose embeddings, last norm and output head are written now."""
        rest = {name: x for name, x in student.state_dict().items() if not name.startswith(LAYERS)}
        if student.config.tie_word_embeddings:
            rest.pop("lm_head.weight", None)
        self._write(self.work / REST, rest)
        return [*(self.file(index) for index in range(len(student.model.layers))), self.work / REST]


def visited(stream: Stream | None, layer: nn.Module, index: int) -> AbstractContextManager[None]:
    """For the body of a `with`, decoder layer `index` has the teacher's weights."""
    return at_hand(None if stream is None else stream.layers, layer, index)


def kept_statistics(folder: Path | None, name: str, measure: Callable[[], Statistics]) -> Statistics:
    """What `measure` gives; with a folder, what was kept there under a name once it did."""
    if folder is None:
        return measure()
    file = folder / f"{name}.safetensors"
    if not file.exists():
        folder.mkdir(exist_ok=True)
        measure().save(file)
    return Statistics.load(file)


def layers_done(stream: Stream | None, layers: int) -> int:
    """How many layers an earlier run has converted.

    Raises:
        UserError: Of one of them the file is damaged.
    """
    done = 0
    while stream is not None and done < layers and stream.file(done).exists():
        try:
            with safe_open(stream.file(done), framework="pt") as file:
                file.keys()
        except Exception as error:  # safetensors raises several kinds
            raise stream.damaged(f"{stream.file(done).name}: {error}") from None
        done += 1
    return done


def hidden_states(
    stream: Stream | None,
    name: str,
    embeddings: Iterable[Tensor],
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    *,
    begun: bool,
) -> HiddenStates:
    """Hidden states by batch, at first the embeddings; of a conversion that has `begun`, those before its next layer.

    Args:
        stream: Where on disk; None is in memory.
        name: Of these states among others there.
        embeddings: What the first layer gets, by batch.
        shapes: Of each, (sequences, seq, hidden).
        dtype: Theirs.
        begun: Whether layers are done.
    """
    if stream is None:
        return InMemory([x.cpu() for x in embeddings])
    states = OnDisk(stream.work, name, shapes, dtype, begun=begun, damaged=stream.damaged)
    for at, hidden in enumerate(() if begun else embeddings):
        states.keep(-1, at, hidden)
    return states
