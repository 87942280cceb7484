"""Bytes of a cache, from a config alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import DynamicCache, PreTrainedConfig

from kvlatent.model.buffers import reserve
from kvlatent.model.families import linear_layers
from kvlatent.model.graft import head_dim_of, spec_in
from kvlatent.model.spec import near_bytes
from kvlatent.model.window import ALL_FAR, Near
from kvlatent.model.window_cache import LEFT, SLACK

MOST_CONTEXT = 8192
"""Bytes of a sequence are told and budgeted at the model's positions, or at so many tokens if those are more."""
CONTEXTS = (1024, 8192, 32768, 131072)
"""Tokens of the sequences whose bytes are told, as far as a model has positions."""
MOST_TOKENS = 2**40
"""A cache that holds more has no end."""


class LayerCache(NamedTuple):
    """What one layer caches of a sequence."""

    near: Near
    """Tokens held whole."""
    whole: int
    """Bytes of such a token, key and value, or, without any, of all; 0 of linear attention, which holds none."""
    far: tuple[float, float]
    """Bytes of any other token: of its key, and of its value."""
    sliding: int | None
    """The teacher's sliding window; None where every token is held."""

    def held(self, tokens: int) -> tuple[int, int]:
        """How many of so many tokens are held whole, and how many otherwise.

        A layer with a sliding window forgets what the next token won't look at; beside a window of the student's it
        keeps `SLACK` more.
        """
        if not self.whole:
            return 0, 0
        whole = min(tokens, sum(self.near))
        others = tokens - whole
        if self.sliding is not None:
            least = self.sliding - 1 + (SLACK - self.near.window if self.near.window else 0)
            others = min(others, max(0, least))
        return whole, others

    def bytes(self, tokens: int) -> tuple[float, float]:
        """Bytes of the keys and of the values that are held of so many tokens."""
        whole, others = self.held(tokens)
        keys, values = (whole * self.whole / 2 + others * far for far in self.far)
        return keys, values

    def allocated(self, tokens: int, *, grows: bool) -> float:
        """Bytes taken for so many tokens, reserved capacity included.

        Args:
            tokens: Of the sequence.
            grows: Whether the layer is one of `LatentCache`, which reserves capacity to grow in place.
        """
        _, others = self.held(tokens)
        slots = sum(self.near) + LEFT if self.near.window else 0  # taken at once
        if grows and others:
            others += reserve(others) * (1 if self.sliding is None else 2)  # what is dropped in front waits there too
        elif self.sliding is not None and others == self.sliding - 1:
            others += 1  # a view of the tensor that the newest token was joined to
        return slots * self.whole + others * sum(self.far)


def counted_context(config: PreTrainedConfig) -> int:
    """Tokens of the sequence whose bytes are told or budgeted."""
    return int(min(config.max_position_embeddings, MOST_CONTEXT))


def contexts_told(config: PreTrainedConfig) -> tuple[int, ...]:
    """Tokens of the sequences whose bytes are told where nobody says which; the last fills the model's positions."""
    positions = int(config.max_position_embeddings)
    return (*(tokens for tokens in CONTEXTS if tokens < positions), positions)


def whole_token_bytes(config: PreTrainedConfig, element_size: int) -> int:
    """Bytes of one token of one sequence that is held whole in all layers."""
    layers = config.num_hidden_layers - len(linear_layers(config))
    return int(2 * config.num_key_value_heads * head_dim_of(config) * layers * element_size)


def far_token_bytes(config: PreTrainedConfig, element_size: int) -> int:
    """Bytes of one token of one sequence in all layers, beyond a window of the student's and within sliding ones."""
    spec = spec_in(config)
    if spec is None:
        return whole_token_bytes(config, element_size)
    return spec.cache_bytes_per_token(config.num_key_value_heads, element_size)


def window_bytes(config: PreTrainedConfig, element_size: int) -> int:
    """Bytes of the window and the sinks of one sequence, once they are full; 0 for a model without."""
    return sum(sum(layer.near) * layer.whole for layer in layer_caches(config, element_size))


def layer_caches(config: PreTrainedConfig, element_size: int) -> list[LayerCache]:
    """What each layer of a stock model or a student caches in its default cache.

    Args:
        config: Of the model.
        element_size: Bytes per number.
    """
    spec, heads = spec_in(config), config.num_key_value_heads
    every = near_bytes(head_dim_of(config), 16, heads, element_size)
    found, linear = [], linear_layers(config)
    for index, layer in enumerate(DynamicCache(config=config).layers):
        if index in linear:
            found.append(LayerCache(ALL_FAR, 0, (0, 0), None))
            continue
        near, whole, far = ALL_FAR, every, (every // 2, every // 2)
        if spec is not None and index not in spec.whole_layers:
            near, far = Near(spec.window, spec.sinks), spec.token_bytes(index, heads, element_size)
            whole = near_bytes(spec.head_dim, spec.window_bits, heads, element_size)
        found.append(LayerCache(near, whole, far, layer.sliding_window if layer.is_sliding else None))
    return found


def left_whole(config: PreTrainedConfig) -> tuple[int, ...]:
    """The layers that a budget leaves as they are: linear attention, and sliding windows that end within the context.

    They don't grow with the context, the others do. Where all layers slide, all are reduced.
    """
    tokens, layers = counted_context(config), layer_caches(config, 1)
    linear = linear_layers(config)
    found = tuple(index for index, layer in enumerate(layers) if layer.held(tokens)[1] < tokens)
    return found if len(found) < len(layers) else linear


def reduced_layers(config: PreTrainedConfig) -> list[int]:
    """All other layers."""
    whole = left_whole(config)
    return [index for index in range(config.num_hidden_layers) if index not in whole]


def predicted_cache_bytes(config: PreTrainedConfig, *, batch: int, tokens: int, element_size: int) -> int:
    """Bytes of keys and values that a model's default cache holds, counted layer by layer.

    Args:
        config: Of a stock model or a student.
        batch: Sequences.
        tokens: Cached tokens per sequence.
        element_size: Bytes per number.
    """
    return batch * cache_parts(layer_caches(config, element_size), tokens)["bytes"]


def cache_parts(layers: Sequence[LayerCache], tokens: int) -> dict[str, int]:
    """Bytes of a sequence's cache, and where they are.

    Returns:
        `context` (the tokens), `bytes` (all of them), the same as `keys` and `values`, as `global_layers` and
        `sliding_layers` (those that hold every token, and those with a sliding window), and what of them are tokens
        that a student's window and sinks hold `whole`.
    """
    by_layer = [layer.bytes(tokens) for layer in layers]
    keys, values = (sum(part) for part in zip(*by_layer, strict=True))
    sliding = sum(sum(parts) for layer, parts in zip(layers, by_layer, strict=True) if layer.sliding is not None)
    near = sum(layer.held(tokens)[0] * layer.whole for layer in layers)
    found = {
        "bytes": keys + values, "keys": keys, "values": values, "global_layers": keys + values - sliding,
        "sliding_layers": sliding, "whole": near,
    }  # fmt: skip
    return {"context": tokens} | {name: round(value) for name, value in found.items()}


def most_tokens(layers: Sequence[LayerCache], *, memory: int, batch: int, grows: bool) -> int | None:
    """The most tokens per sequence whose allocated cache fits in so much memory; None where there is no end.

    Whatever positions the model was trained for.

    Args:
        layers: From `layer_caches`.
        memory: Bytes for the cache; less than none fits nothing.
        batch: Sequences.
        grows: Whether the cache is a `LatentCache`, as students have it.
    """

    def fits(tokens: int) -> bool:
        return batch * sum(layer.allocated(tokens, grows=grows) for layer in layers) <= memory

    if not fits(1):
        return 0
    low, high = 1, MOST_TOKENS
    if fits(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
