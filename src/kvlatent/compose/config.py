"""What is asked of methods that compose with a smaller cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from kvlatent.errors import UserError
from kvlatent.fields import Model, OptionalNumber


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """A prompt, and how much of it stays."""

    model: Positional[Model]
    """The compressor: any causal LM whose tokenizer is fast, best a small one of the reader's family."""
    prompt: Annotated[str, arg(metavar="FILE")]
    """Text, or a conversation as .json (a list of messages with role and content); - reads text from standard input."""
    keep: Annotated[float, arg(metavar="X")] = 0.5
    """Share of the tokens to keep, those that are protected included."""
    stages: OptionalNumber = None
    """Passes, each of which drops some tokens and looks at the rest anew; 1 looks once. One per 100 tokens, at most 15,
    by default."""
    protect: Annotated[tuple[str, ...], arg(metavar="TEXT…", help_behavior_hint="")] = ()
    """Passages that stay whole wherever they occur, such as the question."""
    spread: bool = False
    """Avoid dropping neighbours in one pass."""

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise UserError(f"--keep must be above 0 and at most 1; got {self.keep}")
        if self.stages is not None and not 1 <= self.stages <= 1000:
            raise UserError(f"--stages must be between 1 and 1000; got {self.stages}")
        if "" in self.protect:
            raise UserError("--protect needs text; got an empty one")
