"""Where blocks of text stand in the context that a student will be used at."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedConfig

from kvlatent.errors import UserError


def block_starts(blocks: int, block_size: int, context: int | None) -> Int[Tensor, "blocks"]:
    """The positions that blocks begin at: every other one 0, the others spread evenly over the context, in no order.

    RoPE makes attention depend on distances alone, so a teacher computes the same wherever a block begins. Maps behind
    RoPE don't: fitted to the first positions, they fail at later ones.

    Args:
        blocks: How many.
        block_size: Tokens per block.
        context: Positions to reach; None, or no more than a block, leaves all blocks at the start.
    """
    starts = torch.zeros(blocks, dtype=torch.long)
    moved, room = blocks // 2, max(0, (context or 0) - block_size)
    if moved:
        evenly = torch.arange(1, moved + 1) * room // moved
        starts[1::2] = evenly[torch.randperm(moved, generator=torch.Generator().manual_seed(0))]
    return starts


def positions_in_blocks(starts: Int[Tensor, "blocks"], block_size: int) -> Int[Tensor, "blocks block_size"]:
    """Positions of every token of blocks that begin at `starts`."""
    return starts[:, None] + torch.arange(block_size, device=starts.device)


def positions_in_documents(ids: Int[Tensor, "batch seq"], separator: int) -> Int[Tensor, "batch seq"]:
    """Positions counted anew from every separator; transformers then keeps documents from seeing each other."""
    at = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return at - torch.where(ids == separator, at, 0).cummax(1).values


def context_of(config: PreTrainedConfig, context: int | None) -> int:
    """The positions that blocks of text are spread over: those asked for, or all that the model has.

    Raises:
        UserError: The model hasn't that many.
    """
    positions: int = config.max_position_embeddings
    if context is not None and not 1 <= context <= positions:
        raise UserError(f"context must be between 1 and the model's {positions} positions; got {context}")
    return context or positions
