"""What a model is, without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import initialization as init

from kvlatent.checkpoints import locate, pick_dtype, record_of
from kvlatent.errors import UserError
from kvlatent.export.engines import engine_names
from kvlatent.families import family_of
from kvlatent.modeling import cached_heads, dims_by_layer, head_dim_of, spec_in
from kvlatent.spec import bytes_per_token


def context_of(config: PreTrainedConfig, context: int | None) -> int:
    """The positions that blocks of text are spread over: those asked for, or all that the model has.

    Raises:
        UserError: The model hasn't that many.
    """
    positions: int = config.max_position_embeddings
    if context is not None and not 1 <= context <= positions:
        raise UserError(f"context must be between 1 and the model's {positions} positions; got {context}")
    return context or positions


def batch_size_for(block_size: int) -> int:
    """Blocks per forward where nothing is trained: 2,048 tokens, and at most four blocks."""
    return max(1, min(4, 2048 // block_size))


def load_config(model: str) -> PreTrainedConfig:
    """Read the config of a supported model.

    Raises:
        UserError: Nothing of that name, or not a supported architecture.
    """
    config: PreTrainedConfig = _loaded(model, AutoConfig)
    family_of(config)
    return config


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a model.

    Raises:
        UserError: There is none.
    """
    return _loaded(model, AutoTokenizer)


def _loaded(model: str, kind: Any) -> Any:
    source = locate(model)
    try:
        return kind.from_pretrained(source)
    except Exception as error:  # transformers and the hub raise many kinds
        raise UserError(f"can't load {model}: {' '.join(str(error).split())[:300]}") from None


def describe(model: str) -> dict[str, Any]:
    """Family, dims, layout, engines, size and cache bytes per token of a model, from its config alone."""
    config = load_config(model)
    spec = spec_in(config)
    with torch.device("meta"), init.no_init_weights():
        shape = AutoModelForCausalLM.from_config(config)
        shape.tie_weights()
    d_qk, d_vo = dims_by_layer(config)
    about: dict[str, Any] = {
        "model": model,
        "family": family_of(config).name,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "q_heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": head_dim_of(config),
        "d_qk": list(d_qk),
        "d_vo": list(d_vo),
        "layout": "stock" if spec is None else spec.layout,
        "frequencies": head_dim_of(config) // 2 if spec is None else len(spec.inv_freq),
        "parameters": shape.num_parameters(),
        "positions": config.max_position_embeddings,
        "engines": engine_names(config),
        "cache_bytes_per_token": {
            name: bytes_per_token(d_qk, d_vo, config.num_key_value_heads, size)
            for name, size in (("float32", 4), ("bfloat16", 2))
        },
    }
    if spec is not None:
        about |= {"latents": cached_heads(config), "preset": spec.preset, "teacher": record_of(model).get("teacher")}
    return about


def teacher_name(model: str) -> str:
    """`model` such that it means the same from any working directory."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.exists() else model


def stored_dtype(config: PreTrainedConfig, dtype: str) -> torch.dtype:
    """The dtype that weights are written in: as asked, or as the model read has them."""
    return (config.dtype or torch.float32) if dtype == "auto" else pick_dtype(dtype, torch.device("cpu"))


def weight_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Bytes of all parameters in `dtype`."""
    return sum(p.numel() for p in model.parameters()) * dtype.itemsize
