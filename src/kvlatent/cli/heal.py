"""`kvlatent heal`: training of a student towards its teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import Positional, arg

from kvlatent.cli.options import Command
from kvlatent.errors import needs
from kvlatent.fields import Folder
from kvlatent.healing.config import HealChanges, HealInputs, work_folder


@dataclass(frozen=True, kw_only=True)
class Heal(Command):
    """Train a student towards its teacher: stage 1 layer by layer, stage 2 end to end.

    The defaults are those of the student's preset.
    """

    student: Positional[Folder]
    """The converted model to train."""
    out: Folder
    """The new folder."""
    resume: bool = False
    """Continue the interrupted healing of OUT."""
    restart: bool = False
    """Forget the interrupted healing of OUT, and begin anew."""
    inputs: Annotated[HealInputs, arg(name="")]
    changes: Annotated[HealChanges, arg(name="")]

    def run(self) -> dict[str, Any]:
        with needs("heal"):
            from kvlatent.healing.checkpoint import heal_checkpoint

        return heal_checkpoint(
            str(self.student), self.out, self.inputs, self.changes, resume=self.resume, restart=self.restart,
            **self.common.place(),
        )  # fmt: skip

    def how_to_resume(self) -> str:
        from kvlatent.healing.state import has_state

        work = work_folder(self.out)
        if not has_state(work):
            return "nothing was saved yet"
        return f"the state is in {work}; run the same command with --resume to go on"
