"""What a model makes of far text: the share of far gain that it keeps.

Average perplexity is nearly blind to far tokens, which are what a cache is for: most tokens are predicted as well from
the last hundred. So students are judged by the tokens that need more, with a teacher that forgets all that is far as
the row to beat.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

from kvlatent.evaluation.config import NEAR, SINKS, THRESHOLD
from kvlatent.evaluation.perplexity import Perplexity, perplexity
from kvlatent.model.spec import SLIDING


def near_only_mask(seq: int, *, sliding: int | None = None) -> Bool[Tensor, "1 1 seq seq"]:
    """The causal triangle without what is neither among the newest `NEAR` tokens nor among the first `SINKS`.

    Args:
        seq: Tokens.
        sliding: The teacher's own sliding window.
    """
    at = torch.arange(seq)
    distance = at[:, None] - at
    mask = (distance >= 0) & ((distance < NEAR) | (at < SINKS))
    return (mask if sliding is None else mask & (distance < sliding))[None, None]


def near_only_perplexity(
    teacher: PreTrainedModel, ids: Int[Tensor, "blocks seq"], *, text_bytes: int, batch_size: int
) -> Perplexity:
    """Measure a teacher that sees near text only.

    Args:
        teacher: As for `perplexity`.
        ids: Likewise.
        text_bytes: Likewise.
        batch_size: Likewise.
    """
    sliding, types = getattr(teacher.config, "sliding_window", None), getattr(teacher.config, "layer_types", None)
    visible: Tensor | dict[str, Tensor] = near_only_mask(ids.shape[1], sliding=sliding)
    if types:
        of_types = {kind: sliding if kind == SLIDING else None for kind in types}
        visible = {kind: near_only_mask(ids.shape[1], sliding=window) for kind, window in of_types.items()}
    return perplexity(teacher, ids, text_bytes=text_bytes, batch_size=batch_size, visible=visible)


def far_scores(teacher: Perplexity, near_only: Perplexity, model: Perplexity) -> dict[str, Any]:
    """Judge a model by the tokens that need far text: those whose loss falls by `THRESHOLD` when it is visible.

    Args:
        teacher: With all text visible.
        near_only: The teacher with near text only, on the same blocks.
        model: The model to judge, on the same blocks.

    Returns:
        `far_gain_kept`, 1 - (loss - teacher's) / (near-only teacher's - teacher's) over those tokens, and its standard
        error with blocks as samples, None for one block; `far_perplexity_ratio` over them; `far_tokens`, their number,
        and `far_share`, of all. Without such tokens only the last two.
    """
    gain = near_only.token_nll - teacher.token_nll
    needs_far = gain >= THRESHOLD
    tokens = int(needs_far.sum())
    counts = {"far_tokens": tokens, "far_share": tokens / needs_far.numel()}
    if tokens == 0:
        return counts
    gain, lost = gain * needs_far, (model.token_nll - teacher.token_nll) * needs_far
    kept = 1 - float(lost.sum() / gain.sum())
    by_block = (lost - (1 - kept) * gain).sum(1)  # of a ratio of sums: errors of the numerator around it
    several = len(by_block) > 1
    return {
        "far_gain_kept": kept,
        "far_gain_kept_stderr": float(by_block.std() * math.sqrt(len(by_block)) / gain.sum()) if several else None,
        "far_perplexity_ratio": math.exp(float(lost.sum()) / tokens),
        **counts,
    }
