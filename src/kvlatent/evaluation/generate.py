"""Text that a model writes."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from kvlatent.compose.evicting import PolicyCache
from kvlatent.compose.policies import policy_of
from kvlatent.data.blocks import check_ids
from kvlatent.data.chats import chat_text
from kvlatent.errors import UserError
from kvlatent.evaluation.config import GenerateConfig
from kvlatent.model.cache import cache_bytes
from kvlatent.model.checkpoints import load_model
from kvlatent.model.compatibility import CACHE
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
    policy = policy_of(config.policy, config.keep)
    cache = None if policy is None else policy.cache(loaded)
    began = time.monotonic()
    completion, new_tokens = complete(
        loaded, tokenizer, config.prompt, config.max_new_tokens, chat=config.chat, cache=cache
    )
    seconds = time.monotonic() - began
    about: dict[str, Any] = {"model": config.model, "prompt": config.prompt}
    if policy is not None and cache is not None:
        about |= {"policy": policy.name, "keep": policy.keep}
        about |= {**cache.kept(), "cache_bytes": cache_bytes(cache)}
    return about | {"completion": completion, "new_tokens": new_tokens, "seconds": seconds}


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    *,
    chat: bool = False,
    cache: PolicyCache | None = None,
) -> tuple[str, int]:
    """Return the greedy continuation as text, and its number of tokens."""
    text = prompt
    if chat:  # whose template writes a beginning-of-text token itself
        text = chat_text(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
    tokens = check_ids(tokenizer(text, add_special_tokens=not chat)["input_ids"], model.config.vocab_size)
    if not tokens:
        raise UserError("the prompt has no tokens; give at least a word")
    if (length := len(tokens) + max_new_tokens) > (positions := model.config.max_position_embeddings):
        raise UserError(f"prompt and max_new_tokens are {length:,} tokens and the model has {positions:,} positions")
    ids = torch.tensor([tokens], device=model.device)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    config = model.generation_config
    # Beams and penalties of the model's own config, which fill unset fields, would make it anything but greedy.
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=config.eos_token_id, pad_token_id=pad)
    try:
        given = {} if cache is None else {CACHE: cache}
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, **given)
    finally:
        model.generation_config = config
    new = output[0, ids.shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True), len(new)
