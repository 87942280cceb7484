"""`kvlatent run`: a recipe, the whole way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from kvlatent.cli.options import Command
from kvlatent.errors import needs


@dataclass(frozen=True, kw_only=True)
class Run(Command):
    """Follow a recipe the whole way: convert, heal, evaluate, bench, generate, report.

    Running it again goes on where it stopped, or prints the results that are there.
    """

    recipe: Positional[Annotated[Path, arg(metavar="RECIPE.yaml")]]
    """The recipe."""
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: runs/ and the recipe's name)")] = None
    """The run folder."""

    def run(self) -> dict[str, Any]:
        with needs("heal,report"):
            from kvlatent.cli import recipe as pipeline

        out = self.out or Path("runs", self.recipe.stem)
        return pipeline.run(self.recipe, out, **(self.common.place() | {"seed": self.common.seed}))

    def table(self, result: dict[str, Any]) -> str:
        from kvlatent.evaluation.report.text import summary_table

        return f"{summary_table(result)}\n\n{Path(result['out']) / 'report.html'}"

    def how_to_resume(self) -> str:
        return "run the same command again to go on"
