"""What a model is, without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kvlatent.errors import UserError
from kvlatent.model.checkpoints import locate, pick_dtype
from kvlatent.model.families import family_of


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
