"""`kvlatent sweep`: the students of a grid, and which of them pay."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from kvlatent.cli.options import Command
from kvlatent.errors import UserError, needs


@dataclass(frozen=True, kw_only=True)
class Sweep(Command):
    """Run the students of a recipe's grid, and write one table and plot of their quality against bytes.

    Running it again goes on where it stopped.
    """

    recipe: Positional[Annotated[Path, arg(metavar="RECIPE.yaml")]]
    """The recipe, with `grid:`, values by the name of a student's field, say {budget: [0.5, 0.25],
    heal.loss: [kl, ntp], seed: [0, 1]}."""
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: runs/ and the recipe's name)")] = None
    """The folder of the run folders, one for each seed, with sweep.json, sweep.md and sweep.svg."""

    def run(self) -> dict[str, Any]:
        if self.common.seed is not None:
            raise UserError("the seeds of a sweep stand in its recipe: seed, or grid: seed")
        with needs("heal,report"):
            from kvlatent.cli import grid

        return grid.sweep(
            self.recipe, self.out or Path("runs", self.recipe.stem), device=self.common.device, dtype=self.common.dtype
        )

    def table(self, result: dict[str, Any]) -> str:
        return f"{Path(result['out'], 'sweep.md').read_text(encoding='utf-8')}\n{Path(result['out']) / 'sweep.svg'}"

    def how_to_resume(self) -> str:
        return "run the same command again to go on"
