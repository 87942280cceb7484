"""`kvlatent export`: a model in a form that engines without kvlatent read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import arg

from kvlatent.cli.options import Command
from kvlatent.cli.tables import pairs
from kvlatent.serving.config import ExportConfig


@dataclass(frozen=True, kw_only=True)
class Export(Command):
    """Write a model in a form that engines without kvlatent read; `doctor` says which forms it can take.

    stock: an ordinary Llama, Mistral or Qwen2 folder for transformers, vLLM and SGLang. gguf: one file for llama.cpp.
    """

    config: Annotated[ExportConfig, arg(name="")]

    def run(self) -> dict[str, Any]:
        from kvlatent.serving.export.checkpoint import export

        return export(self.config, dtype=self.common.dtype)

    def table(self, result: dict[str, Any]) -> str:
        return pairs({key: value for key, value in result.items() if value is not None})
