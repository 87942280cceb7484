"""`kvlatent serve`: an OpenAI-compatible endpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from kvlatent.cli.options import Command, Common, Context, Model, Number


@dataclass(frozen=True, kw_only=True)
class Serve(Command):
    """Serve a model to OpenAI clients: by vLLM if it is installed, otherwise by llama.cpp from an exported GGUF file.

    Ends when interrupted, after the requests in flight. Options not listed here: vllm serve MODEL takes converted
    models too.
    """

    model: Positional[Model]
    """The model."""
    host: Annotated[str, arg(metavar="ADDRESS")] = "127.0.0.1"
    """Where to listen; 0.0.0.0 is every interface, without any password."""
    port: Number = 8000
    """Likewise."""
    engine: Literal["auto", "vllm", "llama.cpp"] = "auto"
    """auto takes the first that is installed."""
    context: Context = None
    """Tokens of a request at most, answer included."""
    common: OmitArgPrefixes[Common] = field(default_factory=Common)

    def run(self) -> dict[str, Any]:
        from kvlatent.serving.commands import serve_model

        return serve_model(
            self.model, host=self.host, port=self.port, engine=self.engine, context=self.context,
            dtype=self.common.dtype, seed=self.common.seed or 0,
        )  # fmt: skip
