"""`kvlatent calibrate`: statistics of a teacher."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from kvlatent.cli.options import Command
from kvlatent.compress.config import CalibrateConfig
from kvlatent.fields import Model


@dataclass(frozen=True, kw_only=True)
class Calibrate(Command):
    """Run a teacher over text once and save the statistics that conversion needs."""

    model: Positional[Model]
    """The teacher."""
    out: Annotated[Path, arg(metavar="STATS")]
    """The file to write."""
    asked: Annotated[CalibrateConfig, arg(name="")]

    def run(self) -> dict[str, Any]:
        from kvlatent.compress.checkpoints import calibrate_checkpoint

        return calibrate_checkpoint(self.model, self.out, self.asked, **self.common.place())

    @property
    def spares_memory(self) -> bool:
        return self.asked.offload
