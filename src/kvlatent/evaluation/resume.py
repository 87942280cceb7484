"""Measurements that wait beside an evaluation's output, so that the same command goes on from them after a kill."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from kvlatent.errors import UserError
from kvlatent.evaluation.diagnose import Diagnosis
from kvlatent.evaluation.joined import Rolling
from kvlatent.evaluation.perplexity import Perplexity
from kvlatent.evaluation.retrieval import Retrieval
from kvlatent.evaluation.tasks import TaskScore
from kvlatent.files import begin_work, damaged_work, discard, new_folder, refuse_existing, replaced, sole_writer

KINDS: dict[str, type] = {kind.__name__: kind for kind in (Perplexity, Rolling, Diagnosis, Retrieval, TaskScore)}
"""What a measurement may be, beside plain data."""
WORK = "evaluation"
SETTINGS, RESULT = "settings.json", "eval.json"

Found = TypeVar("Found")


class Measured:
    """What is measured already, in a folder; without one everything is measured, and nothing kept."""

    def __init__(self, out: Path | None) -> None:
        self.out = out
        self.work = None if out is None else out.with_name(f".{out.name}.evaluating")

    def begin(self, settings: dict[str, Any]) -> None:
        """Make the folder, or find in it what a killed evaluation with the same settings has measured.

        Raises:
            UserError: It is of other settings, models or text, or can't be written.
        """
        if self.work is None:
            return
        begin_work(self.work / SETTINGS, settings, what=WORK)

    def once(self, name: str, measure: Callable[[], Found]) -> Found:
        """What a measurement gives, or what it gave before the evaluation was killed.

        Args:
            name: Of the measurement among others.
            measure: Gives plain data, or one of `KINDS`.

        Raises:
            UserError: The file that it is kept in is damaged.
        """
        if self.work is None:
            return measure()
        file = self.work / f"{name}.json"
        if not file.exists():
            found = json.dumps(measure(), default=_plain)
            with replaced(file) as partial:
                partial.write_text(found)
        try:
            kept: Found = json.loads(file.read_bytes(), object_hook=_whole)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise damaged_work(self.work, f"{file.name}: {error}", what=WORK) from None
        return kept

    def finish(self, result: dict[str, Any]) -> dict[str, Any]:
        """Write the output, if there is to be one, and forget the measurements.

        Returns:
            The result, and where it is.
        """
        if self.out is None or self.work is None:
            return result
        with replaced(self.work / RESULT) as partial:  # by which it is known as done if a kill comes in between
            partial.write_text(json.dumps(result, indent=2))
        with new_folder(self.out) as folder:
            (folder / RESULT).write_bytes((self.work / RESULT).read_bytes())
        discard(self.work, of=self.out)
        return result | {"out": str(self.out)}

    def forget_finished(self) -> None:
        """Remove the measurements of an evaluation that is whole: a kill came before that was done."""
        assert self.out is not None and self.work is not None
        files = [folder / RESULT for folder in (self.out, self.work)]
        if all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes():
            discard(self.work, of=self.out)

    def forget_nothing(self) -> None:
        """Remove the folder if nothing was measured that a new start would lose."""
        if self.work is not None and not any(file.name != SETTINGS for file in self.work.glob("*.json")):
            discard(self.work, of=self.out or self.work)


@contextmanager
def measured(out: Path | None) -> Iterator[Measured]:
    """Be the only one that evaluates into a new folder, from the start of the work on.

    Raises:
        UserError: It exists, or another process is writing it.
    """
    found = Measured(out)
    if out is None:
        yield found
        return
    with sole_writer(out):
        found.forget_finished()
        refuse_existing(out)
        try:
            yield found
        except UserError:
            found.forget_nothing()
            raise


def _plain(x: Any) -> dict[str, Any]:
    if isinstance(x, Tensor):
        return {"dtype": str(x.dtype).removeprefix("torch."), "values": x.tolist()}
    return {"kind": type(x).__name__, "fields": vars(x)}


def _whole(data: dict[str, Any]) -> Any:
    if data.keys() == {"dtype", "values"}:
        return torch.tensor(data["values"], dtype=getattr(torch, data["dtype"]))
    if data.keys() == {"kind", "fields"}:
        return KINDS[data["kind"]](**data["fields"])
    return data
