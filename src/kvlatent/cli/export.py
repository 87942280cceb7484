"""`kvlatent export`: a model in a form that engines without kvlatent read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from kvlatent.cli.options import Command, Common
from kvlatent.cli.tables import pairs


@dataclass(frozen=True, kw_only=True)
class Export(Command):
    """Write a model in a form that engines without kvlatent read; `doctor` says which forms it can take.

    stock: an ordinary Llama, Mistral or Qwen2 folder for transformers, vLLM and SGLang. gguf: one file for llama.cpp.
    """

    model: Positional[Annotated[str, arg(metavar="DIR")]]
    """A converted model; for gguf also a stock one."""
    to: Literal["stock", "gguf", "vllm"]
    """The form; vllm is refused, because vLLM with kvlatent serves the folder as it is."""
    out: Annotated[Path, arg(metavar="PATH")]
    """The new folder, or the new .gguf file."""
    type: Annotated[
        Literal["f32", "f16", "bf16", "q8_0"] | None, arg(metavar="T", help_behavior_hint="(default: f16)")
    ] = None
    """Of the matrices in a GGUF file: f32, f16, bf16 or q8_0."""
    common: OmitArgPrefixes[Common] = field(default_factory=Common)

    def run(self) -> dict[str, Any]:
        from kvlatent.serving.commands import export_model

        return export_model(self.model, self.out, to=self.to, file_type=self.type, **self.common.place())

    def table(self, result: dict[str, Any]) -> str:
        return pairs({key: value for key, value in result.items() if value is not None})
