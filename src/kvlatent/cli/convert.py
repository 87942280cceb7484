"""`kvlatent convert`: a student from a teacher."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

from tyro.conf import Positional, arg

from kvlatent.cli.options import Command
from kvlatent.cli.tables import pairs, span
from kvlatent.compress.config import ConvertConfig
from kvlatent.fields import Folder, Model


@dataclass(frozen=True, kw_only=True)
class Convert(Command):
    """Make a student with fewer dims per head from a teacher."""

    model: Positional[Model]
    """The teacher."""
    out: Folder
    """The new folder."""
    asked: Annotated[ConvertConfig, arg(name="")]

    def run(self) -> dict[str, Any]:
        from kvlatent.compress.checkpoints import convert_checkpoint

        conversion = self.asked
        if conversion.d_qk is None and conversion.d_vo is None and conversion.budget is None:
            conversion = replace(conversion, budget=0.5)
        return convert_checkpoint(self.model, self.out, conversion, **self.common.place())

    def table(self, result: dict[str, Any]) -> str:
        return pairs({key: span(value) if isinstance(value, list) else value for key, value in result.items()})

    @property
    def spares_memory(self) -> bool:
        return self.asked.offload

    def how_to_resume(self) -> str:
        return "run the same command again to go on" if self.asked.offload else super().how_to_resume()
