"""`kvlatent rope-plot`: stability curves of rotary frequencies."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from tyro.conf import arg

from kvlatent.cli.options import Command
from kvlatent.cli.tables import text_of
from kvlatent.errors import needs
from kvlatent.evaluation.config import RopePlotConfig


@dataclass(frozen=True, kw_only=True)
class RopePlot(Command):
    """Draw how stable RoPE is over distances: plain, frequency-aware and a model's own frequencies."""

    config: Annotated[RopePlotConfig, arg(name="")] = field(default_factory=RopePlotConfig)

    def run(self) -> dict[str, Any]:
        with needs("report"):
            from kvlatent.evaluation.rope_plot import rope_plot

        return rope_plot(self.config)

    def table(self, result: dict[str, Any]) -> str:
        from kvlatent.evaluation.report.text import aligned

        rows = [
            [row["frequencies"], f"{row['negative']:.1%}", f"{row['least']:.3f}", f"{row['mean']:.3f}"]
            for row in result["curves"]
        ]
        head = f"theta {text_of(result['theta'])}, distances 1 to {result['distance']:,}"
        return f"{aligned([head, 'negative', 'least', 'mean'], rows)}\n\n{result['out']}"
