"""Text that a model writes."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlatent.errors import UserError
from kvlatent.evaluation.config import GenerateConfig
from kvlatent.model.checkpoints import load_model
from kvlatent.model.loading import load_config


def generate(config: GenerateConfig, *, device: str = "auto", dtype: str = "auto", seed: int = 0) -> dict[str, Any]:
    """Let a model continue a prompt greedily.

    Raises:
        UserError: The model can't be used, or it has no chat template where one is asked for.
    """
    load_config(config.model)
    loaded, tokenizer = load_model(config.model, device=device, dtype=dtype)
    if config.chat and not tokenizer.chat_template:
        raise UserError(f"{config.model} has no chat template; leave --chat out")
    torch.manual_seed(seed)
    began = time.monotonic()
    completion, new_tokens = complete(loaded, tokenizer, config.prompt, config.max_new_tokens, chat=config.chat)
    seconds = time.monotonic() - began
    about = {"model": config.model, "prompt": config.prompt}
    return about | {"completion": completion, "new_tokens": new_tokens, "seconds": seconds}


def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int, *, chat: bool = False
) -> tuple[str, int]:
    """Return the greedy continuation as text, and its number of tokens."""
    if chat:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    ids, mask = inputs["input_ids"].to(model.device), inputs["attention_mask"].to(model.device)
    plain = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}  # the last three only when sampling
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    output = model.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=pad, **plain)
    new = output[0, ids.shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True), len(new)
