"""Caches that a step writes in place: one row per head, nothing is copied.

`LatentCache` grows, with a little capacity reserved ahead; `StaticLatentCache` has all its capacity from the start, so
that a decode step can be compiled. Layers plug into transformers' `Cache`, so `generate()` pads, searches beams, crops
and offloads with them as with its own. Keys and values have widths of their own, layer by layer. Converted models use
`LatentCache` unless another cache is asked for or passed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

from kvlatent.errors import UserError
from kvlatent.model.buffers import Buffer, Buffered, check_crop
from kvlatent.model.fixed_window import FixedWindowLayer
from kvlatent.model.window_cache import WindowLayer

Keys = Float[Tensor, "batch kv_heads seq d_qk"]
Values = Float[Tensor, "batch kv_heads seq d_vo"]
Held = tuple[Float[Tensor, "batch kv_heads held d_qk"], Float[Tensor, "batch kv_heads held d_vo"]]
Others = Mapping[str, Any] | None
"""What a stock attention module was itself given, which it hands to its cache since transformers 5.24; before, nothing.
No layer here depends on it. Anything else that a release may hand over is a `TypeError`."""


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
        """Reorder sequences in place, keeping the reserved capacity."""
        for buffer in self.buffers():
            if buffer.length:
                held = buffer.held()
                held.copy_(held.index_select(0, beam_idx.to(held.device)))


class GrowingLayer(_InPlace, DynamicLayer):
    """A layer that holds every token."""

    def update(self, key_states: Keys, value_states: Values, *, kwargs: Others = None) -> Held:
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

    def update(self, key_states: Keys, value_states: Values, *, kwargs: Others = None) -> Held:
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
    """A layer whose capacity is reserved once and never moves, as compiled code and CUDA graphs want it.

    A first update returns what it was given: a prefill attends to its own tokens, not to the unused capacity.
    """

    is_croppable = True
    empty = True

    def update(self, key_states: Keys, value_states: Values, *, kwargs: Others = None) -> Held:
        """Write behind what is held, and return the whole capacity; its mask says what of it is held.

        Raises:
            ValueError: The first tokens exceed the capacity.
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
        """Forget everything, keep the capacity."""
        super().reset()
        self.empty = True

    def held_bytes(self) -> int:
        """Bytes of the tokens held, without reserved capacity."""
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
    """transformers' `StaticCache` with layers that reorder and crop in place, and a prefill that skips unused capacity.

    Layers with a sliding window shorter than that are transformers' own, which move their content at every step.
    """

    def __init__(self, config: PreTrainedConfig, max_cache_len: int, **kwargs: Any) -> None:
        """Build empty layers for a model; memory is taken at the first update.

        Args:
            config: Of the model; says which layers have a sliding window.
            max_cache_len: Capacity in tokens per sequence.
            kwargs: As of `StaticCache`, such as `offloading`.
        """
        super().__init__(config=config, max_cache_len=max_cache_len, **kwargs)
        write_in_place(self, config)


def write_in_place(cache: Cache, config: PreTrainedConfig) -> None:
    """Replace the empty layers of a transformers cache for a model of this config by ours.

    Raises:
        UserError: The cache is static, and a sliding window of the model shorter than it meets a window of the student.
    """
    sliding, latent = getattr(config, "sliding_window", None), getattr(config, "latent", None) or {}
    near, left_whole = (latent.get("window", 0), latent.get("sinks", 0)), latent.get("whole_layers", ())
    if near[0] and not cache.layers:  # a cache that makes its layers as they come
        cache.layers = [DynamicLayer() for _ in range(config.num_hidden_layers)]
    for index, layer in enumerate(cache.layers):
        if getattr(layer, "is_initialized", True):  # a linear attention's has no keys and stays
            continue
        window, sinks = (0, 0) if index in left_whole else near
        never_rolled = type(layer) is StaticSlidingWindowLayer and layer.max_cache_len < sliding
        if type(layer) is DynamicLayer:
            cache.layers[index] = WindowLayer(window, sinks, phase=index) if window else GrowingLayer()
        elif type(layer) is DynamicSlidingWindowLayer:
            kept = layer.sliding_window
            cache.layers[index] = WindowLayer(window, sinks, kept) if window else RollingLayer(kept)
            cache.layers[index].record_past = layer.record_past  # asked for before assisted decoding
        elif type(layer) is StaticLayer or never_rolled:
            length = layer.max_cache_len
            cache.layers[index] = FixedWindowLayer(length, window, sinks) if window else FixedLayer(length)
        elif window and type(layer) is StaticSlidingWindowLayer:
            raise UserError(
                f"a static cache can't hold both the model's sliding window of {sliding} tokens and the student's own; "
                "take the default cache"
            )


def cache_bytes(cache: Cache) -> int:
    """Return the bytes of all keys and values a cache holds, from its tensors, scales of quantized ones included.

    Raises:
        TypeError: A layer keeps quantized content in a form of its own, outside `keys` and `values`.
    """
    total = 0
    for layer in cache.layers:
        if hasattr(layer, "held_bytes"):
            total += layer.held_bytes()
            continue
        if hasattr(layer, "_quantized_keys"):
            raise TypeError(f"{type(layer).__name__} keeps quantized content that cache_bytes can't see")
        total += sum(x.nbytes for x in _held(layer))
    return total


def allocated_bytes(cache: Cache) -> int:
    """Return the bytes a cache takes, reserved capacity included."""
    total = 0
    for layer in cache.layers:
        own = getattr(layer, "allocated_bytes", None)
        if own is not None:
            total += own()
        else:
            total += sum(x.untyped_storage().nbytes() for x in _held(layer))
    return total


def _held(layer: object) -> list[Tensor]:
    """Keys and values of a transformers layer; a linear attention's has none, and its state isn't counted."""
    return [x for name in ("keys", "values") if (x := getattr(layer, name, None)) is not None]
