"""`kvlatent generate`: text that a model writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import arg

from kvlatent.cli.options import Command
from kvlatent.evaluation.config import GenerateConfig


@dataclass(frozen=True, kw_only=True)
class Generate(Command):
    """Let a model continue a prompt, greedily."""

    config: Annotated[GenerateConfig, arg(name="")]

    def run(self) -> dict[str, Any]:
        from kvlatent.evaluation.generate import generate

        return generate(self.config, **self.common.place())

    def table(self, result: dict[str, Any]) -> str:
        return result["completion"]
