"""A student as an ordinary Llama, Mistral or Qwen2 checkpoint, for engines that know nothing of kvlatent."""

from __future__ import annotations

import copy
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers import initialization as init

from kvlatent.files import new_folder
from kvlatent.model.checkpoints import RECORD
from kvlatent.model.config import OF_THE_CLASS
from kvlatent.model.families import PREFIX, family_of
from kvlatent.model.folder import head_is_tied
from kvlatent.model.graft import cached_dims, cached_heads
from kvlatent.model.spec import bytes_per_token
from kvlatent.serving.engines import check_stock, stock_dims
from kvlatent.serving.export.plain import frequency_factors, plain_weights, rope_theta


def export_stock(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, *, record: dict[str, Any]
) -> None:
    """Write a student as a checkpoint of its teacher's family, whole or not at all.

    Args:
        model: A converted model.
        tokenizer: Written beside it.
        out: The new folder.
        record: How the student was made.

    Raises:
        UserError: `out` exists, or ordinary attention can't hold the model.
    """
    check_stock(model.config)
    dims = stock_dims(model.config)
    weights = dict(plain_weights(model, d_qk=dims, d_vo=dims))
    size = sum(value.numel() * value.element_size() for value in weights.values())
    stock = _stock_shape(stock_config(model, dims))
    stock.load_state_dict(weights, assign=True, strict=not head_is_tied(model))
    stock.tie_weights()
    stock.generation_config = copy.deepcopy(model.generation_config)
    with new_folder(out, needed_bytes=size + 50_000_000) as partial:
        stock.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        write_both_spellings(partial / "config.json")
        name_tokenizer_for_both(partial / "tokenizer_config.json")
        (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        card = _card(model, record.get("teacher"))
        (partial / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")  # names may be any bytes


def stock_config(model: PreTrainedModel, dims: int) -> PreTrainedConfig:
    """The family's own config with heads of `dims` and the model's frequencies as longrope factors."""
    old = model.config
    model_type = old.model_type.removeprefix(PREFIX)
    fields = old.to_dict()
    for key in (*OF_THE_CLASS, "latent", "rope_parameters"):
        fields.pop(key, None)
    factors = frequency_factors(model, d_qk=dims).tolist()
    fields |= {"head_dim": dims, "num_key_value_heads": cached_heads(old)}
    fields["tie_word_embeddings"] = head_is_tied(model)
    fields["rope_parameters"] = _longrope(factors, old.max_position_embeddings, rope_theta(model))
    module = import_module(f"transformers.models.{model_type}.configuration_{model_type}")
    config: PreTrainedConfig = getattr(module, f"{family_of(old).name}Config")(**fields)
    return config


def _longrope(factors: list[float], positions: int, theta: float) -> dict[str, Any]:
    """Frequencies by factors, the same at every length.

    The original length is the full one, because vLLM takes the attention factor from their ratio and ignores the field.
    """
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": positions,
    }


def write_both_spellings(path: Path) -> None:
    """Say RoPE again in the fields of transformers 4, which silently ignores `rope_parameters` of transformers 5."""
    fields = json.loads(path.read_text())
    rope = fields["rope_parameters"]
    fields["rope_theta"] = rope["rope_theta"]
    fields["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    path.write_text(json.dumps(fields, indent=2) + "\n")


def name_tokenizer_for_both(path: Path) -> None:
    """Say in the words of transformers 4, which 5 understands, what it would refuse: a class and a list of 5's own."""
    fields = json.loads(path.read_text())
    if fields.get("tokenizer_class") == "TokenizersBackend":
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(fields.get("extra_special_tokens"), list):
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    path.write_text(json.dumps(fields, indent=2) + "\n")


def _stock_shape(config: PreTrainedConfig) -> PreTrainedModel:
    model_type = config.model_type
    module = import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    kind = getattr(module, f"{family_of(config).name}ForCausalLM")
    with torch.device("meta"), init.no_init_weights():
        model: PreTrainedModel = kind(config)
    return model


def _card(model: PreTrainedModel, teacher: str | None) -> str:
    """The model card; the numbers in it follow from the config."""
    config = model.config
    dims, (d_qk, d_vo) = stock_dims(config), cached_dims(config)
    widths, heads, size = (dims,) * len(d_qk), cached_heads(config), model.dtype.itemsize
    cached = bytes_per_token(widths, widths, heads, size)
    needed = bytes_per_token(d_qk, d_vo, heads, size)
    padding = f"\nThat includes zeros that fill up the narrower heads; without them it would be {needed:,} bytes."
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- kvlatent
- kv-cache
---

# A {family_of(config).name} model with a smaller KV cache

Made{f" from `{teacher}`" if teacher else ""} with kvlatent: keys and values have {dims} dims per head, and a token
takes {cached:,} bytes of KV cache in the dtype of the weights.{padding if needed < cached else ""}

It is an ordinary {family_of(config).name} checkpoint: whatever honours `head_dim` and longrope loads it, without
kvlatent.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

```bash
vllm serve path/to/this/folder
```

How it was made is in `{RECORD}`.
"""
