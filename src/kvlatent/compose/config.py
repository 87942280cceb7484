"""What is asked of methods that compose with a smaller cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from tyro.conf import Positional, arg

from kvlatent.errors import UserError
from kvlatent.fields import Model, OptionalNumber

Name = Literal["streaming", "snapkv", "tova", "expected-attention", "pyramid-infer", "spindle"]
PolicyName = Annotated[Name | None, arg(metavar=f"{{{','.join(get_args(Name))}}}", help_behavior_hint="")]
Keep = Annotated[float | None, arg(metavar="X", help_behavior_hint="(default: 0.5)")]


def check_policy(policy: str | None, keep: float | None) -> None:
    """Raise `UserError` for a share of tokens without a policy, or out of range."""
    if policy is None and keep is not None:
        raise UserError("keep is the share of tokens that a policy keeps; name a policy too")
    if keep is not None and not 0 < keep <= 1:
        raise UserError(f"keep must be above 0 and at most 1; got {keep}")


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
    words: bool = False
    """Keep words and numbers whole or not at all, by their best token: two thirds of a number are none."""

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise UserError(f"--keep must be above 0 and at most 1; got {self.keep}")
        if self.stages is not None and not 1 <= self.stages <= 1000:
            raise UserError(f"--stages must be between 1 and 1000; got {self.stages}")
        if self.spread and self.words:
            raise UserError("--words keeps neighbours in one, --spread parts them: give one of the two")
        if "" in self.protect:
            raise UserError("--protect needs text; got an empty one")
