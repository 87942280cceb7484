"""`kvlatent convert`: a student from a teacher."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from tyro.conf import OmitArgPrefixes, Positional

from kvlatent.cli.options import Command, Common, Folder, Model
from kvlatent.cli.tables import pairs, span
from kvlatent.compress.config import ConvertConfig


@dataclass(frozen=True, kw_only=True)
class Convert(Command):
    """Make a student with fewer dims per head from a teacher."""

    model: Positional[Model]
    """The teacher."""
    out: Folder
    """The new folder."""
    conversion: OmitArgPrefixes[ConvertConfig] = field(default_factory=ConvertConfig)
    common: OmitArgPrefixes[Common] = field(default_factory=Common)

    def run(self) -> dict[str, Any]:
        from kvlatent.compress.checkpoints import convert_checkpoint

        conversion = self.conversion
        if conversion.d_qk is None and conversion.d_vo is None and conversion.budget is None:
            conversion = replace(conversion, budget=0.5)
        return convert_checkpoint(self.model, self.out, conversion, **self.common.place())

    def table(self, result: dict[str, Any]) -> str:
        return pairs({key: span(value) if isinstance(value, list) else value for key, value in result.items()})
