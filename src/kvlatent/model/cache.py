"""Caches that a step writes in place: one row per head, nothing is copied.

`LatentCache` grows, with a little room set aside ahead; `StaticLatentCache` has all its room from the start, so that a
decode step can be compiled. Layers plug into transformers' `Cache`, so `generate()` pads, searches beams, crops and
offloads with them as with its own. Keys and values have widths of their own, layer by layer. Converted models use
`LatentCache` unless another cache is asked for or passed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

LEAST_ROOM = 64
"""Tokens of room set aside at least."""
ROOM_SHARE = 16
"""Room is a sixteenth of what is held: 6 % of slack at most, and one copied row for each sixteen appended."""

Keys = Float[Tensor, "batch kv_heads seq d_qk"]
Values = Float[Tensor, "batch kv_heads seq d_vo"]
Held = tuple[Float[Tensor, "batch kv_heads held d_qk"], Float[Tensor, "batch kv_heads held d_vo"]]


def room(tokens: int, least: int = LEAST_ROOM) -> int:
    """Tokens of room that a layer sets aside behind `tokens` when it grows."""
    return max(least, tokens // ROOM_SHARE)


class Buffer:
    """A tensor (batch, heads, seq, dim) with room at its end along seq."""

    def __init__(self, held: Tensor, least_room: int = LEAST_ROOM) -> None:
        self.whole, self.start, self.length = held, 0, held.shape[-2]
        self.least_room = least_room

    def held(self) -> Tensor:
        """What is held, as a view."""
        return self.whole.narrow(2, self.start, self.length)

    def append(self, new: Tensor) -> Tensor:
        """Write `new` behind what is held; grow, or close the gap in front, where there is no room."""
        length = self.length + new.shape[-2]
        if self.start + length > self.whole.shape[-2]:
            whole = new.new_empty(*new.shape[:2], length + room(length, self.least_room), new.shape[-1])
            whole.narrow(2, 0, self.length).copy_(self.held())
            self.whole, self.start = whole, 0
        self.whole.narrow(2, self.start + self.length, new.shape[-2]).copy_(new)
        self.length = length
        return self.held()

    def drop_front(self, tokens: int) -> None:
        """Forget the oldest tokens, and give memory back where they were many."""
        self.start, self.length = self.start + tokens, self.length - tokens
        if self.whole.shape[-2] > self.length + 2 * room(self.length, self.least_room):
            held = self.held()
            self.whole = held.new_empty(
                *held.shape[:2], self.length + room(self.length, self.least_room), held.shape[-1]
            )
            self.start = 0
            self.held().copy_(held)


class Buffered:
    """What layers that keep their content in buffers have in common."""

    is_initialized: bool
    device: torch.device

    def buffers(self) -> Iterator[Buffer]:
        """All buffers there are by now."""
        raise NotImplementedError

    def allocated_bytes(self) -> int:
        """Bytes of all buffers, room included."""
        return sum(buffer.whole.nbytes for buffer in self.buffers())

    def offload(self) -> None:
        """Move all buffers to the CPU."""
        self._move("cpu")

    def prefetch(self) -> None:
        """Move all buffers back to the layer's device."""
        if self.is_initialized:
            self._move(self.device)

    def _move(self, device: torch.device | str) -> None:
        for buffer in self.buffers():
            buffer.whole = buffer.whole.to(device, non_blocking=True)


class _InPlace(Buffered):
    """Makes `keys` and `values` of a transformers layer views of buffers; what is assigned to them becomes one."""

    _keys: Buffer | None = None
    _values: Buffer | None = None

    @property
    def keys(self) -> Tensor | None:
        return None if self._keys is None else self._keys.held()

    @keys.setter
    def keys(self, held: Tensor | None) -> None:
        self._keys = None if held is None else Buffer(held)

    @property
    def values(self) -> Tensor | None:
        return None if self._values is None else self._values.held()

    @values.setter
    def values(self, held: Tensor | None) -> None:
        self._values = None if held is None else Buffer(held)

    def buffers(self) -> Iterator[Buffer]:
        """Keys and values."""
        yield from (buffer for buffer in (self._keys, self._values) if buffer is not None)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._keys, self._values = Buffer(key_states[:, :, :0]), Buffer(value_states[:, :, :0])
        self.is_initialized = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder sequences in place, keeping the room."""
        for buffer in self.buffers():
            if buffer.length:
                held = buffer.held()
                held.copy_(held.index_select(0, beam_idx.to(held.device)))


class GrowingLayer(_InPlace, DynamicLayer):
    """A layer that holds every token."""

    def update(self, key_states: Keys, value_states: Values, *args: Any, **kwargs: Any) -> Held:
        """Append, and return all that is held.

        Where gradients flow the tensors are concatenated instead: what autograd has saved must not be overwritten.
        """
        if key_states.requires_grad or value_states.requires_grad:
            return super().update(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self._keys is not None and self._values is not None
        return self._keys.append(key_states), self._values.append(value_states)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, their number given as a negative one (assisted decoding)."""
        check_crop(tokens_to_remove)
        for buffer in self.buffers():
            buffer.length = max(0, buffer.length + tokens_to_remove)


class RollingLayer(_InPlace, DynamicSlidingWindowLayer):
    """A layer that holds the last `sliding_window - 1` tokens: those the next one will look at."""

    def update(self, key_states: Keys, value_states: Values, *args: Any, **kwargs: Any) -> Held:
        """Append, forget what is out of the window, and return what the new tokens look at.

        Where gradients flow, and while the past is recorded for `crop`, transformers' own layer does it.
        """
        if self.record_past or key_states.requires_grad or value_states.requires_grad:
            return super().update(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self._keys is not None and self._values is not None
        self.cumulative_length += key_states.shape[-2]
        keys, values = self._keys.append(key_states), self._values.append(value_states)
        for buffer in (self._keys, self._values):
            buffer.drop_front(max(0, buffer.length - self.sliding_window + 1))
        return keys, values


class FixedLayer(StaticLayer):
    """A layer whose room is set aside once and never moves, as compiled code and CUDA graphs want it.

    A first update returns what it was given: a prefill attends to its own tokens, not to the room behind them.
    """

    is_croppable = True
    empty = True

    def update(self, key_states: Keys, value_states: Values, *args: Any, **kwargs: Any) -> Held:
        """Write behind what is held, and return the whole room; its mask says what of it is held.

        Raises:
            ValueError: The first tokens are more than there is room for.
        """
        prefill, self.empty = self.empty, False
        if prefill and key_states.shape[-2] > self.max_cache_len:
            raise ValueError(f"{key_states.shape[-2]} tokens don't fit into a cache for {self.max_cache_len}")
        held = super().update(key_states, value_states)
        return (key_states, value_states) if prefill else held

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys the next `query_length` queries will meet, and the position of the first."""
        return query_length if self.empty else self.max_cache_len, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder sequences in place."""
        if self.is_initialized:
            for whole in (self.keys, self.values):
                whole.copy_(whole.index_select(0, beam_idx.to(whole.device)))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, their number given as a negative one (assisted decoding)."""
        check_crop(tokens_to_remove)
        self.cumulative_length.add_(tokens_to_remove).clamp_(min=0)

    def reset(self) -> None:
        """Forget everything, keep the room."""
        super().reset()
        self.empty = True

    def held_bytes(self) -> int:
        """Bytes of the tokens held, without the room behind them."""
        if not self.is_initialized:
            return 0
        return (self.keys.nbytes + self.values.nbytes) // self.max_cache_len * int(self.cumulative_length)


class LatentCache(DynamicCache):
    """transformers' `DynamicCache` with layers that grow in place."""

    def __init__(self, config: PreTrainedConfig, **kwargs: Any) -> None:
        """Build empty layers for a model.

        Args:
            config: Of the model; says which layers have a sliding window.
            kwargs: As of `DynamicCache`, such as `offloading`.
        """
        super().__init__(config=config, **kwargs)
        write_in_place(self, config)


class StaticLatentCache(StaticCache):
    """transformers' `StaticCache` with layers that reorder and crop in place, and a prefill that skips unused room.

    Layers with a sliding window shorter than the room are transformers' own, which move their content at every step.
    """

    def __init__(self, config: PreTrainedConfig, max_cache_len: int, **kwargs: Any) -> None:
        """Build empty layers for a model; memory is taken at the first update.

        Args:
            config: Of the model; says which layers have a sliding window.
            max_cache_len: Tokens per sequence that there is room for.
            kwargs: As of `StaticCache`, such as `offloading`.
        """
        super().__init__(config=config, max_cache_len=max_cache_len, **kwargs)
        write_in_place(self, config)


def write_in_place(cache: Cache, config: PreTrainedConfig) -> None:
    """Replace the empty layers of a transformers cache for a model of this config by ours."""
    window = getattr(config, "sliding_window", None)
    for index, layer in enumerate(cache.layers):
        if layer.is_initialized:
            continue
        if type(layer) is DynamicLayer:
            cache.layers[index] = GrowingLayer()
        elif type(layer) is DynamicSlidingWindowLayer:
            cache.layers[index] = RollingLayer(layer.sliding_window)
            cache.layers[index].record_past = layer.record_past  # asked for before assisted decoding
        elif type(layer) is StaticLayer or (
            type(layer) is StaticSlidingWindowLayer and layer.max_cache_len < window  # never full, never rolled
        ):
            cache.layers[index] = FixedLayer(layer.max_cache_len)


def check_crop(tokens_to_remove: int) -> None:
    """Raise `ValueError` for a number that isn't minus a number of tokens; transformers once took a final length."""
    if tokens_to_remove > 0:
        raise ValueError(f"crop takes minus the number of tokens to remove; got {tokens_to_remove}")


def cache_bytes(cache: Cache) -> int:
    """Return the bytes of all keys and values a cache holds, from its tensors, scales of quantised ones included.

    Raises:
        TypeError: A layer keeps quantised content in a form of its own, outside `keys` and `values`.
    """
    total = 0
    for layer in cache.layers:
        if hasattr(layer, "held_bytes"):
            total += layer.held_bytes()
            continue
        if hasattr(layer, "_quantized_keys"):
            raise TypeError(f"{type(layer).__name__} keeps quantised content that cache_bytes can't see")
        total += sum(x.nbytes for x in (layer.keys, layer.values) if x is not None)
    return total


def allocated_bytes(cache: Cache) -> int:
    """Return the bytes a cache takes, the room it has set aside included."""
    total = 0
    for layer in cache.layers:
        own = getattr(layer, "allocated_bytes", None)
        if own is not None:
            total += own()
        else:
            total += sum(x.untyped_storage().nbytes() for x in (layer.keys, layer.values) if x is not None)
    return total
