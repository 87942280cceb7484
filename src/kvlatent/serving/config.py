"""What an export and a server are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from kvlatent.errors import UserError
from kvlatent.fields import Context, Model, Number

FileType = Literal["f32", "f16", "bf16", "q8_0"]
Engine = Literal["vllm", "llama.cpp"]
CacheType = Literal["fp8", "q8_0", "q8_0+q4_0", "q4_0"]
CACHE_ENGINES: dict[CacheType, Engine] = {
    "fp8": "vllm", "q8_0": "llama.cpp", "q8_0+q4_0": "llama.cpp", "q4_0": "llama.cpp",
}  # fmt: skip
"""Which engine has which type of cache; of two types the first is the keys', the second the values'."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The form that a model is written in."""

    model: Positional[Annotated[str, arg(metavar="DIR")]]
    """The converted model; for gguf also a stock one."""
    to: Literal["stock", "gguf"]
    """The form: an ordinary folder, or one GGUF file. vLLM with kvlatent needs neither."""
    out: Annotated[Path, arg(metavar="PATH")]
    """The new folder, or the new .gguf file."""
    type: Annotated[FileType | None, arg(metavar="T", help_behavior_hint="(default: f16)")] = None
    """Type of the matrices in a GGUF file: f32, f16, bf16 or q8_0."""

    def __post_init__(self) -> None:
        if self.to == "stock" and self.type is not None:
            raise UserError("--type is for --to gguf; the dtype of a stock checkpoint is set with --dtype")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Where and by which engine a model is served."""

    model: Positional[Model]
    """The model to serve."""
    host: Annotated[str, arg(metavar="ADDRESS")] = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every interface, without any password."""
    port: Number = 8000
    """Port to listen on."""
    engine: Literal["auto"] | Engine = "auto"
    """Engine that serves; auto takes the first that is installed."""
    context: Context = None
    """Most tokens of a request, answer included."""
    cache_type: Annotated[CacheType | None, arg(metavar="T", help_behavior_hint="(default: --dtype's)")] = None
    """Quantized type of the cache: fp8 in vLLM takes 0.5 of the bytes of float16; in llama.cpp, for dims in multiples
    of 32, q8_0 takes 0.53, q8_0+q4_0 (keys, values) 0.41 and q4_0 0.28."""

    def __post_init__(self) -> None:
        if self.cache_type is not None and self.engine not in ("auto", has := CACHE_ENGINES[self.cache_type]):
            raise UserError(f"a cache of type {self.cache_type} is {has}'s; {self.engine} doesn't have it")
