"""Bytes of a cache, from a config alone."""

from __future__ import annotations

from transformers import DynamicCache, PreTrainedConfig

from kvlatent.model.graft import head_dim_of, spec_in
from kvlatent.model.window import ALL_FAR, Near
from kvlatent.model.window_cache import SLACK

MOST_CONTEXT = 8192
"""Bytes of a sequence are told and budgeted at the model's positions, or at so many tokens if those are more."""


def counted_context(config: PreTrainedConfig) -> int:
    """Tokens of the sequence whose bytes are told or budgeted."""
    return int(min(config.max_position_embeddings, MOST_CONTEXT))


def near_tokens(config: PreTrainedConfig) -> Near:
    """Tokens that a model meets whole, beside latents."""
    spec = spec_in(config)
    return ALL_FAR if spec is None else Near(spec.window, spec.sinks)


def whole_token_bytes(config: PreTrainedConfig, element_size: int) -> int:
    """Bytes of one token of one sequence that is held whole in all layers."""
    return int(2 * config.num_key_value_heads * head_dim_of(config) * config.num_hidden_layers * element_size)


def far_token_bytes(config: PreTrainedConfig, element_size: int) -> int:
    """Bytes that one more token of one sequence adds in all layers that hold every token, beyond a window."""
    spec = spec_in(config)
    if spec is None:
        return whole_token_bytes(config, element_size)
    return spec.cache_bytes_per_token(config.num_key_value_heads, element_size)


def predicted_cache_bytes(config: PreTrainedConfig, *, batch: int, tokens: int, element_size: int) -> int:
    """Bytes of keys and values that a model's default cache holds, counted layer by layer.

    Tokens within a window and sinks are held whole, all others with the layer's dims and bits. A layer with a sliding
    window of the teacher's forgets what the next token won't look at; beside a window of the student's it keeps `SLACK`
    more.

    Args:
        config: Of a stock model or a student.
        batch: Sequences.
        tokens: Cached tokens per sequence.
        element_size: Bytes per number.
    """
    near, spec, heads = near_tokens(config), spec_in(config), config.num_key_value_heads
    whole_bytes = 2 * head_dim_of(config) * heads * element_size
    total = 0
    for index, layer in enumerate(DynamicCache(config=config).layers):
        whole = min(tokens, sum(near))
        others = tokens - whole
        if layer.is_sliding:
            least = layer.sliding_window - 1 + (SLACK - near.window if near.window else 0)
            others = min(others, max(0, least))
        far_bytes = whole_bytes if spec is None else spec.token_bytes(index, heads, element_size)
        total += whole_bytes * whole + far_bytes * others
    return int(batch * total)
