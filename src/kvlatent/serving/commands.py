"""`export`, `doctor` and `serve`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

from kvlatent.errors import UserError
from kvlatent.files import refuse_existing
from kvlatent.model.checkpoints import environment, load_model, locate, record_of
from kvlatent.model.graft import dims_by_layer, head_dim_of
from kvlatent.model.loading import load_config, load_tokenizer, stored_dtype
from kvlatent.model.spec import bytes_per_token
from kvlatent.serving.engines import check_gguf, check_stock, diagnose, routes
from kvlatent.serving.export.gguf import FileType, export_gguf
from kvlatent.serving.export.stock import export_stock
from kvlatent.serving.launch import Engine, serve


def export_model(
    model: str, out: Path, *, to: str, file_type: FileType | None, device: str, dtype: str, seed: int
) -> dict[str, Any]:
    """Write a model in a form that engines without kvlatent read.

    Args:
        model: A converted model; for gguf also a stock one.
        out: The new folder (stock) or file (gguf).
        to: `stock` or `gguf`.
        file_type: Of a GGUF file's matrices; None is `f16`.
        device: Ignored; nothing is computed.
        dtype: Of the weights read, and for stock written; `auto` is the checkpoint's.
        seed: Ignored; nothing is random.

    Raises:
        UserError: `out` exists, the form can't hold the model, or the model can't be used.
    """
    if to == "vllm":
        raise UserError(
            "vLLM needs no export: with kvlatent beside it, it serves the folder as it is (kvlatent serve); "
            "for a vLLM without kvlatent take --to stock"
        )
    refuse_existing(out)
    config = load_config(model)
    if to == "stock" and file_type is not None:
        raise UserError("--type is for --to gguf; the dtype of a stock checkpoint is set with --dtype")
    (check_stock if to == "stock" else check_gguf)(config)
    kind = stored_dtype(config, dtype)
    loaded, tokenizer = load_model(model, device="cpu", dtype=str(kind).removeprefix("torch."))
    route = next(route for route in routes(config) if route.form == to)
    if to == "gguf":
        file_type = file_type or "f16"
        export_gguf(loaded, tokenizer, out, file_type=file_type)
    else:
        record = {"teacher": None} | record_of(model)
        step = {"verb": "export", "to": to, "record": environment()}
        export_stock(loaded, tokenizer, out, record=record | {"steps": [*record.get("steps", ()), step]})
    whole = (head_dim_of(config),) * config.num_hidden_layers
    sizes = config.num_key_value_heads, kind.itemsize if to == "stock" else 2  # llama.cpp caches float16
    return {
        "out": str(out),
        "to": to,
        **({"type": file_type} if to == "gguf" else {}),
        "cache_bytes_per_token": route.cache_bytes_per_token(*sizes),
        "student_cache_bytes_per_token": bytes_per_token(*dims_by_layer(config), *sizes),
        "teacher_cache_bytes_per_token": bytes_per_token(whole, whole, *sizes),
        "note": route.note,
    }


def diagnose_model(model: str) -> dict[str, Any]:
    """Which engines run a model, here and elsewhere, with what cache, and why not."""
    return {"model": model, "engines": diagnose(load_config(model))}


def serve_model(
    model: str, *, host: str, port: int, engine: Literal["auto"] | Engine, context: int | None, dtype: str, seed: int
) -> dict[str, Any]:
    """Serve a model to OpenAI clients until interrupted.

    Raises:
        UserError: The model can't be used or has fewer positions than `context`, the engine is not installed, can't run
            the model or failed, or the port is in use.
    """
    config = load_config(model)
    load_tokenizer(model)
    positions = config.max_position_embeddings
    if context is not None and not 1 <= context <= positions:
        raise UserError(f"the model has {positions} positions, so context is 1 to {positions} tokens; got {context}")
    name = Path(model).expanduser().resolve().name if Path(model).expanduser().exists() else model
    return serve(
        locate(model), name=name, host=host, port=port, engine=engine, dtype=dtype, context=context, seed=seed,
        announce=lambda line: print(f"{line}; stop with ^C", file=sys.stderr, flush=True),
    )  # fmt: skip
