"""What tests of policies share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvlatent.model.compatibility import CACHE

Models = Callable[[str], PreTrainedModel]
BEFORE_ROPE = ["stock", "portable", "paper"]
"""Kinds whose keys can be had as they were before RoPE."""
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def padded(text: Tensor, lengths: list[int]) -> dict[str, Tensor]:
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return {"input_ids": torch.where(mask, text[:, : max(lengths)], 0), "attention_mask": mask.long()}


@torch.no_grad()
def logits(model: PreTrainedModel, input_ids: Tensor, cache: Any, **kwargs: Any) -> Tensor:
    return model(input_ids, use_cache=True, **{CACHE: cache}, **kwargs).logits
