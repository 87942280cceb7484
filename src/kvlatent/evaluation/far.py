"""What a model makes of far text: the share of far gain that it keeps, and retrieval of pairs and of several keys.

Average perplexity is nearly blind to far tokens, which are what a cache is for: most tokens are predicted as well from
the last hundred. So students are judged by the tokens that need more, with a teacher that forgets all that is far as
the row to beat.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from kvlatent.errors import UserError
from kvlatent.evaluation.perplexity import _token_nll, evaluation_mode

NEAR, SINKS = 128, 4
"""What a teacher sees that forgets the rest: so many newest tokens, and the first ones."""
THRESHOLD = 0.5
"""Nats by which a token's loss must fall when all text is visible, to count as one that needs far text."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FarBaseline:
    """Losses of a teacher with all text visible, and with near text only, (blocks, predicted tokens), in nats."""

    whole: Float[Tensor, "blocks predicted"]
    near_only: Float[Tensor, "blocks predicted"]

    @property
    def needs_far(self) -> Bool[Tensor, "blocks predicted"]:
        """Tokens whose loss falls by at least `THRESHOLD` when far text is visible."""
        return self.near_only - self.whole >= THRESHOLD


def near_only_mask(seq: int, near: int, sinks: int, sliding: int | None = None) -> Bool[Tensor, "1 1 seq seq"]:
    """The causal triangle without what is neither among the newest `near` tokens nor among the first `sinks`."""
    at = torch.arange(seq)
    distance = at[:, None] - at
    mask = (distance >= 0) & ((distance < near) | (at < sinks))
    return (mask if sliding is None else mask & (distance < sliding))[None, None]


@torch.no_grad()
def token_losses(
    model: PreTrainedModel, ids: Int[Tensor, "blocks seq"], *, near: int | None = None, batch_size: int = 2
) -> Float[Tensor, "blocks predicted"]:
    """Nats of every predicted token, float64 on the CPU.

    Args:
        model: On any device.
        ids: Token blocks.
        near: Let the model see this many newest tokens and `SINKS` first ones only.
        batch_size: Blocks per forward.
    """
    kwargs: dict[str, Any] = {}
    if near is not None:
        sliding = getattr(model.config, "sliding_window", None)
        kwargs["attention_mask"] = near_only_mask(ids.shape[1], near, SINKS, sliding).to(model.device)
    losses = []
    with evaluation_mode(model), tqdm(total=ids.numel(), desc="far", unit="tokens", unit_scale=True) as bar:
        for batch in ids.split(batch_size):
            losses.append(_token_nll(model, batch.to(model.device), **kwargs).double().cpu())
            bar.update(batch.numel())
    return torch.cat(losses)


def far_baseline(teacher: PreTrainedModel, ids: Int[Tensor, "blocks seq"], *, batch_size: int = 2) -> FarBaseline:
    """Measure a teacher with and without far text.

    Raises:
        UserError: The blocks hold nothing far.
    """
    if ids.shape[1] <= 2 * NEAR:
        raise UserError(f"far text begins {NEAR} tokens back: give blocks of over {2 * NEAR} (--block-size)")
    return FarBaseline(
        whole=token_losses(teacher, ids, batch_size=batch_size),
        near_only=token_losses(teacher, ids, near=NEAR, batch_size=batch_size),
    )


def far_scores(baseline: FarBaseline, losses: Float[Tensor, "blocks predicted"]) -> dict[str, float]:
    """Judge losses by the tokens that need far text.

    Returns:
        `far_gain_kept`, 1 - (loss - teacher's) / (near-only teacher's - teacher's) over those tokens, and its standard
        error with blocks as samples; `far_perplexity_ratio` over them; `perplexity_ratio` over all tokens and
        `near_only_ratio`, that of the teacher without far text; `far_tokens`, their number, and `far_share`.
    """
    chosen = baseline.needs_far
    lost, gain = (losses - baseline.whole) * chosen, (baseline.near_only - baseline.whole) * chosen
    kept = 1 - float(lost.sum() / gain.sum())
    by_block = (lost - (1 - kept) * gain).sum(1)  # of a ratio of sums: errors of the numerator around it
    stderr = float(by_block.std() * math.sqrt(len(by_block)) / gain.sum()) if len(by_block) > 1 else math.nan
    tokens = int(chosen.sum())
    return {
        "far_gain_kept": kept,
        "far_gain_kept_stderr": stderr,
        "far_perplexity_ratio": math.exp(float(lost.sum()) / tokens),
        "perplexity_ratio": math.exp(float((losses - baseline.whole).mean())),
        "near_only_ratio": math.exp(float((baseline.near_only - baseline.whole).mean())),
        "far_tokens": tokens,
        "far_share": tokens / chosen.numel(),
    }
