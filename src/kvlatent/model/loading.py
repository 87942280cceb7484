"""What a model is, without its weights."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from kvlatent.files import at_home
from kvlatent.model.checkpoints import locate, pick_dtype
from kvlatent.model.folder import one_line, read_config, read_tokenizer, weights_dtype


def load_config(model: str) -> PreTrainedConfig:
    """Read the config of a supported model.

    Raises:
        UserError: Nothing of that name, not a supported architecture, or nonsense.
    """
    source = locate(model)
    with one_line(f"can't load {model}"):
        return read_config(source)


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a model.

    Raises:
        UserError: There is none.
    """
    source = locate(model)
    with one_line(f"can't load {model}"):
        return read_tokenizer(source)


def teacher_name(model: str) -> str:
    """`model` such that it means the same from any working directory."""
    path = at_home(model)
    return str(path.resolve()) if path.exists() else model


def stored_dtype(config: PreTrainedConfig, dtype: str) -> torch.dtype:
    """The dtype that weights are written in: as asked, or as the model read has them."""
    if dtype != "auto":
        return pick_dtype(dtype, torch.device("cpu"))
    return config.dtype or weights_dtype(config._name_or_path)  # older configs don't say


def weight_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Bytes of all parameters in `dtype`."""
    return sum(p.numel() for p in model.parameters()) * dtype.itemsize
