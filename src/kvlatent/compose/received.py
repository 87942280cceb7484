"""How much attention each token of a text receives, and how surprising it is, in one pass of any causal LM.

The attention is a function registered with transformers, so no model family is special; it forms the maps of a few
queries at a time and adds up their columns, and a whole map never exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from kvlatent.errors import UserError
from kvlatent.kernels.segment import capped, softmax_beside
from kvlatent.model.graft import spec_in
from kvlatent.model.layers import check_positions, evaluation_mode, token_nll

NAME = "kvlatent_received"
"""What the attention is registered as."""
ROWS = 128
"""Queries whose attention exists at a time."""

_received: ContextVar[Tensor] = ContextVar("received")


class Signals(NamedTuple):
    """What a causal LM says of the tokens of a text."""

    surprisal: Float[Tensor, "seq"]
    """Nats; 0 for the first token, which nothing predicts."""
    received: Float[Tensor, "seq"]
    """Attention summed over queries, heads and layers."""


@torch.no_grad()
def signals(model: PreTrainedModel, ids: Int[Tensor, "seq"]) -> Signals:
    """Measure the tokens of one text, in float32.

    Args:
        model: A stock causal LM on any device; not a student, which never forms attention.
        ids: At least 2 tokens.

    Raises:
        UserError: The text is longer than the model's positions, or the model's attention can't be replaced.
    """
    check_positions(model, len(ids))
    with evaluation_mode(model), _summing(model, len(ids)) as received:
        surprisal = token_nll(model, ids[None].to(model.device))[0].float()
    return Signals(torch.cat((surprisal.new_zeros(1), surprisal)), received)


@contextmanager
def _summing(model: PreTrainedModel, seq: int) -> Iterator[Float[Tensor, "seq"]]:
    """Let a model's layers add what each token receives to the tensor that this gives."""
    before = model.config._attn_implementation
    received = torch.zeros(seq, device=model.device)
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    token = _received.set(received)
    try:
        model.set_attn_implementation(NAME)
        if spec_in(model.config) is not None or model.config._attn_implementation != NAME:
            raise UserError(
                f"{type(model).__name__} never forms attention; give an original model, such as its teacher"
            )
        yield received
    finally:
        model.set_attn_implementation(before)
        _received.reset(token)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, (batch, heads, seq, dim) → (batch, seq, heads, dim), adding up columns."""
    if kwargs.get("position_bias") is not None:
        raise UserError("attention with position_bias is not supported; give another model as the compressor")
    received = _received.get()
    k, v = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    outs, at = [], torch.arange(k.shape[2], device=k.device)
    for rows in at.split(ROWS):
        logits = capped((query[:, :, rows] @ k.mT).float() * scaling, softcap)
        visible = rows[:, None] >= at if attention_mask is None else attention_mask[:, :, rows]
        weights = softmax_beside(logits.masked_fill(~visible, -torch.inf), s_aux)
        received += weights.sum((0, 1, 2))
        outs.append(weights.to(v.dtype) @ v)
    return torch.cat(outs, dim=2).transpose(1, 2), None
