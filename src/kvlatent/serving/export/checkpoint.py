"""A checkpoint, written in a form that engines without kvlatent read."""

from __future__ import annotations

from typing import Any

from kvlatent.errors import needs
from kvlatent.files import new_output
from kvlatent.model.checkpoints import environment, load_model, record_of
from kvlatent.model.loading import load_config, stored_dtype
from kvlatent.model.sizes import far_token_bytes, whole_token_bytes
from kvlatent.serving.config import ExportConfig
from kvlatent.serving.engines import check_gguf, check_stock, routes
from kvlatent.serving.export.stock import export_stock


def export(config: ExportConfig, *, dtype: str = "auto") -> dict[str, Any]:
    """Write a model in a form that engines without kvlatent read.

    Args:
        config: The model and the form.
        dtype: Dtype of the weights read, and for stock written; `auto` is the checkpoint's.

    Raises:
        UserError: `out` exists, the form can't hold the model, or the model can't be used.
    """
    with new_output(config.out):
        shape = load_config(config.model)
        (check_stock if config.to == "stock" else check_gguf)(shape)
        if config.to == "gguf":
            with needs("gguf"):
                from kvlatent.serving.export.gguf import export_gguf
        kind = stored_dtype(shape, dtype)
        loaded, tokenizer = load_model(config.model, device="cpu", dtype=str(kind).removeprefix("torch."))
        route = next(route for route in routes(shape) if route.form == config.to)
        about: dict[str, Any] = {"out": str(config.out), "to": config.to}
        if config.to == "gguf":
            about["type"] = config.type or "f16"
            export_gguf(loaded, tokenizer, config.out, file_type=about["type"])
        else:
            record = {"teacher": None} | record_of(config.model)
            step = {"verb": "export", "to": config.to, "record": environment()}
            export_stock(loaded, tokenizer, config.out, record=record | {"steps": [*record.get("steps", ()), step]})
        sizes = shape.num_key_value_heads, kind.itemsize if config.to == "stock" else 2  # llama.cpp caches float16
        return about | {
            "cache_bytes_per_token": route.cache_bytes_per_token(*sizes),
            "student_cache_bytes_per_token": far_token_bytes(shape, sizes[1]),
            "teacher_cache_bytes_per_token": whole_token_bytes(shape, sizes[1]),
            "note": route.note,
        }
