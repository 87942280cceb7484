"""`kvlatent calibrate`: statistics of a teacher."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, arg

from kvlatent.cli.options import Command, Common, Model
from kvlatent.compress.config import CalibrateConfig


@dataclass(frozen=True, kw_only=True)
class Calibrate(Command):
    """Run a teacher over text once and save the statistics that conversion needs."""

    model: Positional[Model]
    """The teacher."""
    out: Annotated[Path, arg(metavar="STATS")]
    """The file to write."""
    calibration: OmitArgPrefixes[CalibrateConfig] = field(default_factory=CalibrateConfig)
    common: OmitArgPrefixes[Common] = field(default_factory=Common)

    def run(self) -> dict[str, Any]:
        from kvlatent.compress.checkpoints import calibrate_checkpoint

        return calibrate_checkpoint(self.model, self.out, self.calibration, **self.common.place())
