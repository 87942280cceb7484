"""`kvlatent eval`: how good a model is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, arg

from kvlatent.cli.options import Command, Common, Model, Number, Sources
from kvlatent.cli.tables import side_by_side


@dataclass(frozen=True, kw_only=True)
class Eval(Command):
    """Measure a model: perplexity and bits per byte on held-out text, a needle test, lm-eval tasks.

    Text that the model was calibrated or trained on is refused.
    """

    model: Positional[Model]
    """The model."""
    against: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="")] = None
    """Another one, say its teacher, measured on the same text."""
    text: Sources = ()
    """Held-out text: files, folders, package:NAME, hf:ID."""
    tokens: Number = 16384
    """Tokens of text."""
    block_size: Number = 512
    """Tokens per block; above 512, perplexity is told by position too."""
    needle: bool = False
    """Ask for a code hidden in 1,024, 2,048 and 4,096 tokens of filler."""
    tasks: Annotated[tuple[str, ...], arg(metavar="T…", help_behavior_hint="")] = ()
    """Tasks of lm-eval (pip install kvlatent[eval]), by name or .yaml file; with --against, tested in pairs."""
    limit: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """Samples of each task, from the first; without it, all."""
    common: OmitArgPrefixes[Common] = field(default_factory=Common)

    def run(self) -> dict[str, Any]:
        from kvlatent.evaluation.commands import evaluate_models

        return evaluate_models(
            self.model, against=self.against, text=self.text, tokens=self.tokens, block_size=self.block_size,
            with_needle=self.needle, tasks=self.tasks, limit=self.limit, **self.common.place(),
        )  # fmt: skip

    def table(self, result: dict[str, Any]) -> str:
        table = side_by_side(
            result, ("perplexity", "perplexity_stderr", "perplexity_at", "bits_per_byte", "needle", "tasks")
        )
        lines = [
            f"{task} {metric}: {test['difference']:+.4f} ± {test['stderr']:.4f}, p = {test['p_value']:.3g}"
            for task, tests in result.get("paired", {}).items()
            for metric, test in tests.items()
        ]
        return "\n".join((table, *(["", "on the same samples:", *lines] if lines else [])))
