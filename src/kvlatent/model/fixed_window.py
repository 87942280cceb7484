"""A cache layer of students with a window whose tensors never move, as compiled code and CUDA graphs want it."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from kvlatent.model.buffers import Buffer, check_crop
from kvlatent.model.far_maps import FarMaps
from kvlatent.model.window import NOWHERE, Segment, at_columns, next_sinks
from kvlatent.model.window_cache import LEFT, SLACK, Held, WindowLayer


class FixedWindowLayer(StaticLayer):
    """A layer whose tensors never move, as compiled code and CUDA graphs want it; its length is a tensor.

    Single tokens are met without a look at what tensors hold; for several at once, and to crop, the same tensors become
    those of a layer that grows.
    """

    supports_early_init = False  # latents have widths of their own
    is_croppable = True

    cumulative_length: Tensor

    def __init__(self, max_cache_len: int, window: int, sinks: int) -> None:
        """Build an empty layer for at most `max_cache_len` tokens."""
        super().__init__(max_cache_len)
        self.window, self.sinks = window, sinks
        self.empty = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor, maps: FarMaps | None = None) -> None:
        """Take memory for everything; the last latent's place takes what isn't one."""
        assert maps is not None
        self.dtype, self.device = key_states.dtype, key_states.device
        batch = len(key_states)
        places = max(0, self.max_cache_len - self.window - self.sinks) + 1
        empty = key_states[:, :, :0], value_states[:, :, :0]
        self.whole, self.left = (
            [x.new_zeros(batch, x.shape[1], slots, x.shape[3]) for x in map(maps.held, empty)]
            for slots in (self.window + self.sinks, LEFT)
        )
        none = maps.stored(*empty)
        self.latents = [x.new_zeros(batch, x.shape[1], places, x.shape[3]) for x in none]
        self.sink_at = torch.full((batch, self.sinks), NOWHERE, device=self.device)
        self.cumulative_length = self.cumulative_length.to(self.device)
        self.most_left = torch.zeros_like(self.cumulative_length)  # tokens that have ever been outside the window
        if not torch.compiler.is_compiling():
            for x in (*self._tensors(), self.most_left, self.cumulative_length):
                torch._dynamo.mark_static_address(x)
        self.is_initialized = True

    def _tensors(self) -> tuple[Tensor, ...]:
        """All with a row per sequence."""
        return (*self.whole, *self.left, *self.latents, self.sink_at)

    def update(self, key_states: Tensor, value_states: Tensor, maps: FarMaps, mask: Tensor | None) -> Held:
        """Append, and return what the new queries meet; see `WindowLayer.update`.

        Raises:
            ValueError: The tokens are more than there is capacity for.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states, maps)
        if self.empty or key_states.shape[2] > 1:
            self.empty = False
            return self._extend(key_states, value_states, maps, mask)
        return self._step(key_states, value_states, maps, mask)

    def _growing(self) -> WindowLayer:
        """A layer that grows, with the same content in the same tensors."""
        layer = WindowLayer(self.window, self.sinks)
        layer.dtype, layer.device, layer.is_initialized = self.dtype, self.device, True
        layer.length, layer.left_from = int(self.cumulative_length), max(0, int(self.most_left) - SLACK)
        layer.whole, layer.left, layer.sink_at = self.whole, self.left, self.sink_at
        layer.far.parts = [Buffer(x) for x in self.latents]
        for buffer in layer.far.parts:
            buffer.length = max(0, layer.length - self.window - self.sinks)
        return layer

    def _take(self, layer: WindowLayer) -> None:
        """Note what has changed in `layer` outside the tensors that it shares."""
        self.cumulative_length.fill_(layer.length)
        self.sink_at.copy_(layer.sink_at if layer.sink_at is not None else torch.full_like(self.sink_at, NOWHERE))

    def _extend(self, keys: Tensor, values: Tensor, maps: FarMaps, mask: Tensor | None) -> Held:
        layer = self._growing()
        length = layer.length + keys.shape[2]
        if length > self.max_cache_len:
            raise ValueError(f"{length} tokens don't fit into a cache for {self.max_cache_len}")
        held = layer.update(keys, values, maps, None if mask is None else mask[..., :length])
        self._take(layer)
        self.most_left.clamp_(min=length - self.window)
        return held

    def _step(self, key: Tensor, value: Tensor, maps: FarMaps, mask: Tensor | None) -> tuple[Segment, Segment]:
        newest: Tensor = self.cumulative_length
        slot = (newest % self.window)[None]
        leaving = newest - self.window
        oldest = [x.index_select(2, slot) for x in self.whole]
        becomes_sink = (self.sink_at == leaving)[:, None, :, None]
        trash = self.latents[0].shape[2] - 1
        place = torch.where(leaving >= self.sinks, leaving - self.sinks, trash)[None]
        for whole, left, old, new in zip(self.whole, self.left, oldest, (key, value), strict=True):
            whole[:, :, self.window :] = torch.where(becomes_sink, old, whole[:, :, self.window :])
            left.index_copy_(2, (leaving % LEFT)[None], old)  # before the window is full, what is overwritten later
            whole.index_copy_(2, slot, maps.held(new))
        for latents, new in zip(self.latents, maps.stored(*map(maps.met, oldest)), strict=True):
            latents.index_copy_(2, place, new)
        batch = len(self.sink_at)
        seen = torch.ones(batch, 1, dtype=torch.bool, device=self.device)
        if mask is not None:
            seen = mask[:, 0, 0].index_select(1, newest[None])
        self.sink_at.copy_(next_sinks(self.sink_at, seen, newest))
        slots = torch.arange(self.window, device=self.device)
        at = newest - (newest - slots) % self.window
        ring = (at >= 0).expand(batch, -1)
        sinks = self.sink_at <= leaving
        beyond = torch.arange(trash + 1, device=self.device) + self.sinks
        far = (beyond <= leaving).expand(batch, -1)
        if self.sinks:  # before its last sink a sequence has no other tokens
            far = far & (beyond > self.sink_at[:, -1:])
        near_mask, far_mask = torch.cat((ring, sinks), dim=-1)[:, None, None], far[:, None, None]
        if mask is not None:
            met = torch.cat((at.clamp(min=0).expand(batch, -1), self.sink_at), dim=-1)
            near_mask = near_mask & at_columns(mask, met)
            far_mask = far_mask & mask[..., beyond.clamp(max=mask.shape[-1] - 1)]
        self.cumulative_length.add_(1)
        self.most_left.copy_(torch.maximum(self.most_left, leaving + 1))
        near = Segment(k=self.whole[0], v=self.whole[1], mask=near_mask)
        return near, Segment(k=self.latents[0], v=self.latents[1], mask=far_mask)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many columns a mask for the next `query_length` queries has, and the first of them."""
        return query_length if self.empty else self.max_cache_len, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, their number given as a negative one; see `WindowLayer.crop`."""
        check_crop(tokens_to_remove)
        if self.is_initialized and tokens_to_remove:
            layer = self._growing()
            layer.crop(tokens_to_remove)
            self._take(layer)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder sequences in place."""
        if self.is_initialized:
            for x in self._tensors():
                x.copy_(x.index_select(0, beam_idx.to(x.device)))

    def reset(self) -> None:
        """Forget everything, keep the capacity."""
        self.cumulative_length.zero_()
        self.empty = True
        if self.is_initialized:
            self.most_left.zero_()
            self.sink_at.fill_(NOWHERE)

    def offload(self) -> None:
        """Move keys, values and latents to the CPU."""
        self._move("cpu")

    def prefetch(self) -> None:
        """Move them back to the layer's device."""
        if self.is_initialized:
            self._move(self.device)

    def _move(self, device: torch.device | str) -> None:
        if self.is_initialized:
            self.whole, self.left, self.latents = (
                [x.to(device, non_blocking=True) for x in held] for held in (self.whole, self.left, self.latents)
            )

    def held_bytes(self) -> int:
        """Bytes of the tokens held, without reserved capacity."""
        if not self.is_initialized:
            return 0
        length = int(self.cumulative_length)
        near, far = min(length, self.window + self.sinks), max(0, length - self.window - self.sinks)
        return sum(x.nbytes // x.shape[2] * n for held, n in ((self.whole, near), (self.latents, far)) for x in held)

    def allocated_bytes(self) -> int:
        """Bytes of all tensors, slack included."""
        return sum(x.nbytes for x in (*self.whole, *self.left, *self.latents)) if self.is_initialized else 0
