"""`kvlatent compress-prompt`: a prompt with fewer tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import arg

from kvlatent.cli.options import Command
from kvlatent.compose.config import PromptConfig


@dataclass(frozen=True, kw_only=True)
class CompressPrompt(Command):
    """Drop the tokens of a prompt that a small model predicts well and hardly attends to (DAC).

    Prints the shorter prompt; --json also tells its tokens, and a conversation's messages.
    """

    config: Annotated[PromptConfig, arg(name="")]

    def run(self) -> dict[str, Any]:
        from kvlatent.compose.prompt import compress_file

        return compress_file(self.config, **self.common.place())

    def table(self, result: dict[str, Any]) -> str:
        return result["text"]
