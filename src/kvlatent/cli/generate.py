"""`kvlatent generate`: text from a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, arg

from kvlatent.cli.options import Command, Common, Model, Number


@dataclass(frozen=True, kw_only=True)
class Generate(Command):
    """Let a model continue a prompt, greedily."""

    model: Positional[Model]
    """The model."""
    prompt: Annotated[str, arg(metavar="P")]
    """What to continue."""
    max_new_tokens: Number = 64
    """Tokens at most."""
    chat: bool = False
    """Put the prompt into the model's chat template."""
    common: OmitArgPrefixes[Common] = field(default_factory=Common)

    def run(self) -> dict[str, Any]:
        from kvlatent.evaluation.commands import generate_text

        return generate_text(
            self.model, self.prompt, max_new_tokens=self.max_new_tokens, chat=self.chat, **self.common.place()
        )

    def table(self, result: dict[str, Any]) -> str:
        return result["completion"]
