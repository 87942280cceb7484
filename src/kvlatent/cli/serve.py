"""`kvlatent serve`: an OpenAI-compatible endpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import arg

from kvlatent.cli.options import Command
from kvlatent.serving.config import ServeConfig


@dataclass(frozen=True, kw_only=True)
class Serve(Command):
    """Serve a model to OpenAI clients: by vLLM if it is installed, otherwise by llama.cpp from an exported GGUF file.

    Serving ends when it is interrupted, after the requests in flight. For options not listed here, use vLLM itself:
    `vllm serve MODEL` takes converted models too.
    """

    config: Annotated[ServeConfig, arg(name="")]

    def run(self) -> dict[str, Any]:
        from kvlatent.serving.launch import serve

        return serve(self.config, dtype=self.common.dtype, seed=self.common.seed or 0)
