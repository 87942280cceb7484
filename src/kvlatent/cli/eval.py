"""`kvlatent eval`: how good a model is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import arg

from kvlatent.cli.options import Command
from kvlatent.cli.tables import diagnosis_text, kept_text, side_by_side
from kvlatent.evaluation.config import EvalConfig


@dataclass(frozen=True, kw_only=True)
class Eval(Command):
    """Measure a model: perplexity and bits per byte on held-out text, far text, retrieval, lm-eval tasks.

    Text that the model was calibrated or trained on is refused.
    """

    config: Annotated[EvalConfig, arg(name="")]

    def run(self) -> dict[str, Any]:
        from kvlatent.evaluation.evaluate import evaluate

        return evaluate(self.config, **self.common.place())

    def how_to_resume(self) -> str:
        if self.config.out is None:
            return "nothing was written; with --out the same command goes on"
        return "run the same command again to go on"

    def table(self, result: dict[str, Any]) -> str:
        from kvlatent.evaluation.report.text import models_table, paired_text

        quantities = ("perplexity", "perplexity_stderr", "perplexity_at", "bits_per_byte")
        blocks = [side_by_side(result, (*quantities, "joined", "needle", "retrieval", "tasks", "diagnose"))]
        needles = {f"needle {context}": found for context, found in result.get("needle", {}).items()}
        blocks.append(kept_text({"text": result, **needles, **result.get("retrieval", {})}))
        if "near_only" in result:
            rows = {"teacher": result["against"], result["near_only"]["model"]: result["near_only"], "student": result}
            blocks.append(models_table(rows))
        if "diagnose" in result:
            blocks.append(diagnosis_text(result["diagnose"]))
        return "\n\n".join(filter(None, (*blocks, paired_text(result.get("paired", {})))))
