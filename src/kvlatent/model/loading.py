"""What a model is, without its weights."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers import initialization as init

from kvlatent.errors import UserError
from kvlatent.files import at_home, check_regular
from kvlatent.model.checkpoints import locate, pick_dtype
from kvlatent.model.folder import one_line, read_config, read_tokenizer, weights_dtype


def load_config(model: str) -> PreTrainedConfig:
    """Read the config of a supported model, which may be all there is of it: a file `config.json`.

    Raises:
        UserError: Nothing of that name, not a supported architecture, or nonsense.
    """
    source = str(at_home(model)) if is_config(model) else locate(model)
    if is_config(model):
        check_regular(at_home(model))
        if not at_home(model).is_file():
            raise UserError(f"no such file: {model}")
    with one_line(f"can't load {model}"):
        return read_config(source)


def is_config(model: str) -> bool:
    """Whether a model is named by its config alone."""
    return at_home(model).suffix == ".json"


def is_bare(model: str) -> bool:
    """Whether there is nothing but the config of a model: a file, or a folder without weights of any kind."""
    folder = at_home(model)
    kinds = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth")
    return is_config(model) or (folder.is_dir() and not any(any(folder.glob(kind)) for kind in kinds))


def bare_model(config: PreTrainedConfig, model: str) -> PreTrainedModel:
    """A model without values, on the meta device.

    Args:
        config: From `load_config`.
        model: What it is of, for what is said where it can't be built.

    Raises:
        UserError: It can't be built.
    """
    with one_line(f"can't load {model}"), torch.device("meta"), init.no_init_weights():
        shape: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        shape.tie_weights()
    return shape


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


def told_dtype(config: PreTrainedConfig, dtype: str) -> torch.dtype:
    """The dtype that bytes are told in, weights or not: as asked, or as the config has it, or 16 bits."""
    return stored_dtype(config, dtype) if dtype != "auto" else config.dtype or torch.bfloat16


def weight_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Bytes of all parameters in `dtype`."""
    return sum(p.numel() for p in model.parameters()) * dtype.itemsize
