"""A model with grouped queries as the same function with a KV head for every query head, to be the teacher of a recipe.

    python benchmarks/expand_mha.py smollm2 --out smollm2-mha
    sed 's|^model: .*|model: smollm2-mha|' recipes/paper/table2-smollm2.yaml > table2-mha.yaml
    kvlatent run table2-mha.yaml

KV-Latent's tables for Llama-2-7B are of such a model. Rows of W_K and W_V are repeated for the query heads that share
them, so keys and values, and with them all logits, are what they were; the cache holds each of them as often. What is
reduced of such a model is redundant by construction, more so than in one that was trained without groups: read its
tables as those of the reduction's mechanics. Prints the largest difference of logits, which is 0 on one machine.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as init

from kvlatent import UserError, load_model
from kvlatent.model.families import FAMILIES
from kvlatent.model.loading import load_config, stored_dtype

APART = [name for name, family in FAMILIES.items() if family.on_engines]
"""Model types whose W_K and W_V are matrices of their own."""


def expanded(model: PreTrainedModel) -> PreTrainedModel:
    """Return the same function with `num_key_value_heads` equal to `num_attention_heads`.

    Args:
        model: A stock model of a type in `APART`; it is not changed.

    Raises:
        UserError: Another type, or no query heads share keys and values.
    """
    config = copy.deepcopy(model.config)
    if config.model_type not in APART:
        raise UserError(f"{config.model_type} can't be expanded; only {', '.join(APART)} can")
    groups = config.num_attention_heads // config.num_key_value_heads
    if groups == 1:
        raise UserError("no query heads share keys and values in this model: there is nothing to expand")
    head_dim = model.model.layers[0].self_attn.head_dim
    config.num_key_value_heads = config.num_attention_heads
    weights = {
        name: value.unflatten(0, (-1, head_dim)).repeat_interleave(groups, dim=0).flatten(0, 1)
        if ".k_proj." in name or ".v_proj." in name
        else value
        for name, value in model.state_dict().items()
    }
    with init.no_init_weights():
        wide: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    wide.load_state_dict(weights)
    wide.tie_weights()
    return wide.to(model.device).eval()


def main() -> int:
    """Write the checkpoint, and print how far its logits are from the model's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the checkpoint")
    asked = parser.parse_args()
    try:
        if asked.out.exists():
            raise UserError(f"{asked.out} exists; choose another --out")
        model, tokenizer = load_model(asked.model, device="cpu", dtype="float32")
        dtype = stored_dtype(load_config(asked.model), "auto")
        expanded(model).to(dtype).save_pretrained(asked.out)
        tokenizer.save_pretrained(asked.out)
        wide, _ = load_model(str(asked.out), device="cpu", dtype="float32")
    except UserError as error:
        print(f"expand_mha: {error}", file=sys.stderr)
        return 2
    ids = torch.randint(model.config.vocab_size, (1, 256), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (wide(ids).logits - model(ids).logits).abs().max().item()
    heads = {"kv_heads": model.config.num_key_value_heads, "expanded": wide.config.num_key_value_heads}
    print(json.dumps({"out": str(asked.out), **heads, "largest_logit_difference": difference}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
