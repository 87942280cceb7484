"""Cache layers of students with a window: the newest tokens and the sinks whole, all others as latents, in place.

Whole keys and values live in one tensor: a ring of `window` slots, in which a token's column decides its slot, and the
sinks behind it, so that what a decode step meets whole is the tensor's beginning. A token that leaves the ring is
reduced and appended to the latents. The last `SLACK` tokens that left are kept whole once more, so that assisted
decoding can take tokens back.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, StaticLayer

from kvlatent.model.buffers import Buffer, Buffered, check_crop
from kvlatent.model.window import Far, FarMaps, Segment, Whole, at_columns, first_columns, gathered

SLACK = 64
"""Tokens that can be taken back without loss."""

Held = tuple[Whole, Far] | tuple[Segment, Segment]
"""What new queries meet: of several, runs of columns; of one, two segments."""


class WindowLayer(Buffered, DynamicLayer):
    """A layer that grows in place."""

    def __init__(self, window: int, sinks: int, sliding: int | None = None) -> None:
        """Build an empty layer.

        Args:
            window: Newest tokens held whole.
            sinks: First tokens of every sequence held whole.
            sliding: The teacher's sliding window, beyond which latents are forgotten; None forgets nothing.
        """
        super().__init__()
        self.window, self.sinks, self.sliding = window, sinks, sliding
        self.is_sliding = sliding is not None
        self.record_past = False  # set before assisted decoding; here nothing depends on it
        self._empty()

    def _empty(self) -> None:
        self.length = 0
        self.first: Tensor | None = None
        self.whole: list[Tensor] = []  # keys, values: window slots, then the sinks
        self.left: list[Tensor] = []  # the last that left the window, by column modulo SLACK
        self.left_from = 0
        self.latents: list[Buffer] = []
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take memory for the whole tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        for x in (key_states, value_states):
            batch, heads, _, dim = x.shape
            self.whole.append(x.new_zeros(batch, heads, self.window + self.sinks, dim))
            self.left.append(x.new_zeros(batch, heads, SLACK, dim))
        self.is_initialized = True

    @property
    def latents_from(self) -> int:
        """The column of the first latent that is held."""
        kept = self.latents[0].length if self.latents else 0
        return max(self.sinks, self.length - self.window) - kept

    def update(self, key_states: Tensor, value_states: Tensor, maps: FarMaps, mask: Tensor | None) -> Held:
        """Append, and return what the new queries meet.

        Args:
            key_states: Rotated keys, whole, (batch, kv_heads, seq, head_dim).
            value_states: Values, likewise.
            maps: Of the layer.
            mask: True where a query may look, over all columns up to the newest; None is the causal triangle.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.length == 0:
            self.first = first_columns(mask)
        if key_states.shape[2] == 1 and self.length and not key_states.requires_grad:
            return self._step(key_states, value_states, maps, mask)
        return self._extend(key_states, value_states, maps, mask)

    def _step(self, key: Tensor, value: Tensor, maps: FarMaps, mask: Tensor | None) -> tuple[Segment, Segment]:
        slot = self.length % self.window
        if self.length >= self.window:
            oldest = [x[:, :, slot : slot + 1] for x in self.whole]
            self._leave(self.length - self.window, oldest, maps)
        for whole, new in zip(self.whole, (key, value), strict=True):
            whole[:, :, slot] = new[:, :, 0]
        self.length += 1
        self._forget()
        held = min(self.length, self.window + self.sinks)
        latents = [buffer.held() for buffer in self.latents] or list(maps.reduced(key[:, :, :0], value[:, :, :0]))
        near_mask = far_mask = None
        if mask is not None:
            newest, width = self.length - 1, min(self.length, self.window)
            slots = torch.arange(width, device=self.device)
            ring = mask[..., newest - (newest - slots) % self.window]
            columns = self._sink_columns()[:, : held - width]
            inside = columns < self.length - self.window
            sinks = at_columns(mask, columns) & inside[:, None, None]
            near_mask = torch.cat((ring.expand(len(sinks), -1, -1, -1), sinks), dim=-1)
            far_mask = mask[..., self.latents_from : self.latents_from + latents[0].shape[2]]
            if self.first is not None:
                at = torch.arange(latents[0].shape[2], device=self.device) + self.latents_from
                far_mask = far_mask & (at >= self.first[:, None] + self.sinks)[:, None, None]
        near_k, near_v = (x[:, :, :held] for x in self.whole)
        return Segment(k=near_k, v=near_v, mask=near_mask), Segment(k=latents[0], v=latents[1], mask=far_mask)

    def _extend(self, keys: Tensor, values: Tensor, maps: FarMaps, mask: Tensor | None) -> tuple[Whole, Far]:
        start = max(0, self.length - self.window)
        ring = torch.arange(start, self.length, device=self.device) % self.window
        k, v = (torch.cat((x[:, :, ring], new), dim=2) for x, new in zip(self.whole, (keys, values), strict=True))
        before = [buffer.held() for buffer in self.latents]
        first_latent = self.latents_from
        self.length += keys.shape[2]
        leaving = max(0, self.length - self.window - start)
        parts = [x[:, :, :leaving] for x in (k, v)]
        latents = self._leave(start, parts, maps) if leaving else ()
        newest = torch.arange(max(0, self.length - self.window), self.length, device=self.device)
        for whole, new in zip(self.whole, (k, v), strict=True):
            whole.index_copy_(2, newest % self.window, new[:, :, newest - start].detach())
        if latents and latents[0].requires_grad:
            far_k, far_v = (torch.cat(x, dim=2) for x in zip(before, latents, strict=True)) if before else latents
        elif self.latents:
            far_k, far_v = (buffer.held() for buffer in self.latents)
        else:
            far_k, far_v = maps.reduced(k[:, :, :0], v[:, :, :0])
        far = Far(k=far_k, v=far_v, start=first_latent)
        sink_k, sink_v = (x[:, :, self.window :] for x in self.whole)
        if k.requires_grad or v.requires_grad:
            inside = self._sink_columns() >= start
            sink_k, sink_v = (
                torch.where(inside[:, None, :, None], gathered(x, self._sink_columns() - start), held)
                for x, held in ((k, sink_k), (v, sink_v))
            )
        self._forget()
        return Whole(k=k, v=v, start=start, sink_k=sink_k, sink_v=sink_v, sink_columns=self._sink_columns()), far

    def _leave(self, column: int, parts: list[Tensor], maps: FarMaps) -> tuple[Tensor, ...]:
        """Take in whole keys and values that have left the window, `column` being the first of them."""
        count = parts[0].shape[2]
        end = column + count
        kept = torch.arange(max(column, end - SLACK), end, device=self.device)
        self.left_from = max(self.left_from, end - SLACK)
        for whole, left, x in zip(self.whole, self.left, parts, strict=True):
            x = x.detach()
            left.index_copy_(2, kept % SLACK, x[:, :, kept - column])
            columns = self._sink_columns()
            if self.first is not None:
                hit = ((columns >= column) & (columns < end))[:, None, :, None]
                whole[:, :, self.window :] = torch.where(hit, gathered(x, columns - column), whole[:, :, self.window :])
            elif column < self.sinks:
                last = min(end, self.sinks)
                whole[:, :, self.window + column : self.window + last] = x[:, :, : last - column]
        far = max(0, self.sinks - column)
        if far >= count:
            return ()
        latents = maps.reduced(*(x[:, :, far:] for x in parts))
        if not self.latents:
            self.latents = [Buffer(x[:, :, :0].detach()) for x in latents]
        for buffer, new in zip(self.latents, latents, strict=True):
            buffer.append(new.detach())
        return latents

    def _forget(self) -> None:
        """Let go of latents that the teacher's sliding window has left behind."""
        if self.sliding is not None and self.latents:
            beyond = self.length + 1 - self.sliding - SLACK - self.latents_from
            for buffer in self.latents:
                buffer.drop_front(min(buffer.length, max(0, beyond)))

    def _sink_columns(self) -> Tensor:
        columns = torch.arange(self.sinks, device=self.device)[None]
        return columns if self.first is None else columns + self.first[:, None]

    def get_seq_length(self) -> int:
        """Tokens held, padding included."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many columns a mask for the next `query_length` queries has, and the first of them."""
        return self.length + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, their number given as a negative one.

        Raises:
            ValueError: More than `SLACK` are to be taken back, and the window of what remains is no longer held whole.
        """
        check_crop(tokens_to_remove)
        length = max(0, self.length + tokens_to_remove)
        left, left_then = (max(0, n - self.window) for n in (self.length, length))
        if left_then < left and left_then < self.left_from:
            raise ValueError(
                f"at most {left - self.left_from} tokens can be taken back from this cache, which holds its last "
                f"{self.window} tokens whole; got {-tokens_to_remove}"
            )
        back = torch.arange(left_then, left, device=self.device)
        for whole, kept in zip(self.whole, self.left, strict=True):
            whole.index_copy_(2, back % self.window, kept[:, :, back % SLACK])
        for buffer in self.latents:
            buffer.length -= max(0, left - self.sinks) - max(0, left_then - self.sinks)
        self.length = length
        if length == 0:
            self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._empty()

    def _select(self, indices: Tensor) -> None:
        """Keep these sequences, in this order."""
        if not self.is_initialized:
            return
        indices = indices.to(self.device)
        self.whole, self.left = ([x.index_select(0, indices) for x in held] for held in (self.whole, self.left))
        for buffer in self.latents:
            buffer.whole = buffer.whole.index_select(0, indices)
        if self.first is not None and len(self.first) > 1:
            self.first = self.first.index_select(0, indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder sequences."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences of these indices."""
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        if self.is_initialized:
            self._select(torch.arange(len(self.whole[0]), device=self.device).repeat_interleave(repeats))

    def buffers(self) -> Iterator[Buffer]:
        """The latents."""
        yield from self.latents

    def held_bytes(self) -> int:
        """Bytes of the tokens held: latents, and whole ones in the window and among the sinks."""
        if not self.is_initialized:
            return 0
        tokens = min(self.length, self.window + self.sinks)
        whole = sum(x.nbytes // x.shape[2] for x in self.whole) * tokens
        return whole + sum(buffer.held().nbytes for buffer in self.latents)

    def allocated_bytes(self) -> int:
        """Bytes of all tensors, reserved capacity and slack included."""
        return super().allocated_bytes() + sum(x.nbytes for x in (*self.whole, *self.left))

    def _move(self, device: torch.device | str) -> None:
        super()._move(device)
        self.whole, self.left = ([x.to(device, non_blocking=True) for x in held] for held in (self.whole, self.left))


class FixedWindowLayer(StaticLayer):
    """A layer whose tensors never move, as compiled code and CUDA graphs want it; its length is a tensor."""

    is_croppable = False

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
        self.whole = [
            x.new_zeros(batch, x.shape[1], self.window + self.sinks, x.shape[3]) for x in (key_states, value_states)
        ]
        self.latents = [key_states.new_zeros(batch, len(x), places, x.shape[2]) for x in (maps.k, maps.v)]
        self.first = torch.zeros(batch, dtype=torch.long, device=self.device)
        self.cumulative_length = self.cumulative_length.to(self.device)
        if not torch.compiler.is_compiling():
            for x in (*self.whole, *self.latents, self.first, self.cumulative_length):
                torch._dynamo.mark_static_address(x)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, maps: FarMaps, mask: Tensor | None) -> Held:
        """Append, and return what the new queries meet; see `WindowLayer.update`.

        Raises:
            ValueError: The first tokens are more than there is capacity for, or several come later.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states, maps)
        if self.empty:
            self.empty = False
            return self._prefill(key_states, value_states, maps, mask)
        if key_states.shape[2] > 1:
            raise ValueError("a static cache with a window takes its prompt at once, then one token at a time")
        return self._step(key_states, value_states, maps, mask)

    def _prefill(self, keys: Tensor, values: Tensor, maps: FarMaps, mask: Tensor | None) -> tuple[Whole, Far]:
        length = keys.shape[2]
        if length > self.max_cache_len:
            raise ValueError(f"{length} tokens don't fit into a cache for {self.max_cache_len}")
        grown = WindowLayer(self.window, self.sinks)
        whole, far = grown.update(keys, values, maps, mask)
        assert isinstance(whole, Whole) and isinstance(far, Far)
        for mine, its in zip(self.whole, grown.whole, strict=True):
            mine.copy_(its)
        for place, latents in zip(self.latents, (far.k, far.v), strict=True):
            place[:, :, : latents.shape[2]] = latents
        if grown.first is not None:
            self.first.copy_(grown.first)
        self.cumulative_length.fill_(length)
        return whole, far

    def _step(self, key: Tensor, value: Tensor, maps: FarMaps, mask: Tensor | None) -> tuple[Segment, Segment]:
        newest: Tensor = self.cumulative_length
        slot = (newest % self.window)[None]
        leaving = newest - self.window
        oldest = [x.index_select(2, slot) for x in self.whole]
        columns = torch.arange(self.sinks, device=self.device) + self.first[:, None]
        becomes_sink = (columns == leaving)[:, None, :, None]
        trash = self.latents[0].shape[2] - 1
        place = torch.where(leaving >= self.sinks, leaving - self.sinks, trash)[None]
        for whole, old, new in zip(self.whole, oldest, (key, value), strict=True):
            whole[:, :, self.window :] = torch.where(becomes_sink, old, whole[:, :, self.window :])
            whole.index_copy_(2, slot, new)
        for latents, new in zip(self.latents, maps.reduced(*oldest), strict=True):
            latents.index_copy_(2, place, new)
        slots = torch.arange(self.window, device=self.device)
        at = newest - (newest - slots) % self.window
        ring = (at >= 0).expand(len(self.first), -1)
        sinks = columns < newest + 1 - self.window
        beyond = torch.arange(trash + 1, device=self.device) + self.sinks
        far = (beyond <= newest - self.window) & (beyond >= self.first[:, None] + self.sinks)
        near_mask, far_mask = torch.cat((ring, sinks), dim=-1)[:, None, None], far[:, None, None]
        if mask is not None:
            met = torch.cat((at.clamp(min=0).expand(len(self.first), -1), columns), dim=-1)
            near_mask = near_mask & at_columns(mask, met)
            far_mask = far_mask & mask[..., beyond.clamp(max=mask.shape[-1] - 1)]
        self.cumulative_length.add_(1)
        near = Segment(k=self.whole[0], v=self.whole[1], mask=near_mask)
        return near, Segment(k=self.latents[0], v=self.latents[1], mask=far_mask)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many columns a mask for the next `query_length` queries has, and the first of them."""
        return query_length if self.empty else self.max_cache_len, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder sequences in place."""
        if self.is_initialized:
            for x in (*self.whole, *self.latents, self.first):
                x.copy_(x.index_select(0, beam_idx.to(x.device)))

    def reset(self) -> None:
        """Forget everything, keep the capacity."""
        self.cumulative_length.zero_()
        self.empty = True

    def held_bytes(self) -> int:
        """Bytes of the tokens held, without reserved capacity."""
        if not self.is_initialized:
            return 0
        length = int(self.cumulative_length)
        near, far = min(length, self.window + self.sinks), max(0, length - self.window - self.sinks)
        return sum(x.nbytes // x.shape[2] * n for held, n in ((self.whole, near), (self.latents, far)) for x in held)

    def allocated_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.nbytes for x in (*self.whole, *self.latents)) if self.is_initialized else 0
