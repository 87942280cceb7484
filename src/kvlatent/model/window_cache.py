"""Cache layers of students with a window: the newest tokens and the sinks whole, all others as latents, in place.

Whole keys and values, numbers or rows of codes of 8 bits, live in one tensor: a ring of `window` slots, in which a
token's column decides its slot, and the sinks behind it, so that what a decode step meets whole is the tensor's
beginning. A token that leaves the ring is reduced and appended to the latents; where tokens come one by one, some at a
time, before they leave. The last `SLACK` tokens that left are kept whole once more, so that assisted decoding can take
tokens back. What is held is detached: gradients reach the tokens of the same forward pass alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from kvlatent.model.buffers import Buffer, Buffered, check_crop
from kvlatent.model.far_maps import FarMaps
from kvlatent.model.window import NOWHERE, Far, Segment, Whole, at_columns, gathered, next_sinks, sinks_of

SLACK = 64
"""Tokens that can be taken back without loss."""
AHEAD = 32
"""Tokens of the window that become latents together, at most: their maps are read once, and operators called once."""
LEFT = SLACK + AHEAD
"""Places for whole tokens that have left the window or are about to."""

Held = tuple[Whole, Far] | tuple[Segment, Segment]
"""What new queries meet: of several, runs of columns; of one, two segments."""


class Latents:
    """Keys and values of the tokens that have left the window: latents, or rows of codes."""

    at_once = AHEAD
    """Tokens that may be appended before they leave the window, the one that leaves included."""

    def __init__(self) -> None:
        self.parts: list[Buffer] = []  # keys, values
        self.ahead = 0  # tokens written behind those held, which are still in the window

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.parts[0].length if self.parts else 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take in more tokens, and return all of them; tokens that were ahead are written again."""
        self.ahead = 0
        if not self.parts:
            self.parts = [Buffer(x[:, :, :0]) for x in (keys, values)]
        held_keys, held_values = (buffer.append(x) for buffer, x in zip(self.parts, (keys, values), strict=True))
        return held_keys, held_values

    def move(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Hold so many of the tokens ahead or, below zero, put as many of those held ahead; return those held."""
        self.ahead -= tokens
        for buffer in self.parts:
            buffer.length += tokens
        return self.held()

    def held(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens."""
        keys, values = (buffer.held() for buffer in self.parts)
        return keys, values

    def forget(self, tokens: int) -> None:
        """Let go of the oldest tokens, of as many as there are."""
        for buffer in self.parts:
            buffer.drop_front(min(buffer.length, tokens))

    def crop(self, tokens: int) -> None:
        """Let go of the newest tokens, of as many as there are."""
        self.ahead = 0
        for buffer in self.parts:
            buffer.length = max(0, buffer.length - tokens)

    def select(self, indices: Tensor) -> None:
        """Keep these sequences, in this order."""
        for buffer in self.buffers():
            buffer.whole = buffer.whole.index_select(0, indices.to(buffer.whole.device))

    def buffers(self) -> Iterator[Buffer]:
        """All buffers."""
        yield from self.parts


class WindowLayer(Buffered, DynamicLayer):
    """A layer that grows in place."""

    supports_early_init = False  # latents have widths of their own

    def __init__(
        self,
        window: int,
        sinks: int,
        sliding: int | None = None,
        store: Callable[[], Latents] = Latents,
        phase: int = 0,
    ) -> None:
        """Build an empty layer.

        Args:
            window: Newest tokens held whole.
            sinks: First tokens of every sequence held whole.
            sliding: The teacher's sliding window, beyond which latents are forgotten; None forgets nothing.
            store: What makes the place of the latents.
            phase: Any number, say the layer's: layers of unlike phases reduce their tokens at unlike steps.
        """
        super().__init__()
        self.phase = phase
        self.window, self.sinks, self.sliding, self.store = window, sinks, sliding, store
        self.is_sliding = sliding is not None
        self.record_past = False  # set before assisted decoding; here nothing depends on it
        self._empty()

    def _empty(self) -> None:
        self.length = 0
        self.sink_at: Tensor | None = None  # columns (batch, sinks); None, without a mask so far, is the first ones
        self.sinks_known = self.sinks == 0  # of every sequence, so that no others are looked for
        self.whole: list[Tensor] = []  # keys, values: window slots, then the sinks
        self.left: list[Tensor] = []  # the last that left the window, by column modulo LEFT
        self.left_from = 0
        self.far = self.store()
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor, maps: FarMaps | None = None) -> None:
        """Take memory for the whole tokens."""
        assert maps is not None
        self.dtype, self.device = key_states.dtype, key_states.device
        for x in (key_states, value_states):
            none = maps.held(x[:, :, :0].detach())
            batch, heads, _, row = none.shape
            self.whole.append(none.new_zeros(batch, heads, self.window + self.sinks, row))
            self.left.append(none.new_zeros(batch, heads, LEFT, row))
        self.is_initialized = True

    @property
    def latents_from(self) -> int:
        """The column of the first latent that is held."""
        return max(self.sinks, self.length - self.window) - self.far.length

    def update(self, key_states: Tensor, value_states: Tensor, maps: FarMaps, mask: Tensor | None) -> Held:
        """Append, and return what the new queries meet.

        Args:
            key_states: Rotated keys, whole, (batch, kv_heads, seq, head_dim).
            value_states: Values, likewise.
            maps: Of the layer.
            mask: True where a query may look, over all columns up to the newest; None is the causal triangle.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states, maps)
            none = maps.stored(key_states[:, :, :0], value_states[:, :, :0])
            self.far.append(*(x.detach() for x in none))
        if key_states.shape[2] == 1 and self.length and not key_states.requires_grad:
            return self._step(key_states, value_states, maps, mask)
        return self._extend(key_states, value_states, maps, mask)

    def _step(self, key: Tensor, value: Tensor, maps: FarMaps, mask: Tensor | None) -> tuple[Segment, Segment]:
        slot = self.length % self.window
        far = self._oldest_leaves(slot, maps) if self.length >= self.window else self.far.held()
        for whole, new in zip(self.whole, (key, value), strict=True):
            maps.hold(new, whole, slot)
        self.length += 1
        self._find_sinks(mask, 1)
        held = min(self.length, self.window + self.sinks)
        near_mask = far_mask = None
        if mask is not None:
            first_latent = self.latents_from
            newest, width = self.length - 1, min(self.length, self.window)
            slots = torch.arange(width, device=self.device)
            ring = mask[..., newest - (newest - slots) % self.window]
            columns = self.sink_columns()[:, : held - width]
            sinks = at_columns(mask, columns) & (columns < self.length - self.window)[:, None, None]
            near_mask = torch.cat((ring.expand(len(sinks), -1, -1, -1), sinks), dim=-1)
            far_mask = mask[..., first_latent : first_latent + far[0].shape[2]]
            if self.sink_at is not None and self.sinks:  # before its last sink a sequence has no other tokens
                at = torch.arange(far[0].shape[2], device=self.device) + first_latent
                far_mask = far_mask & (at > self.sink_at[:, -1:])[:, None, None]
        self._forget()
        near_k, near_v = (x if held == x.shape[2] else x.narrow(2, 0, held) for x in self.whole)
        return Segment(k=near_k, v=near_v, mask=near_mask), Segment(k=far[0], v=far[1], mask=far_mask)

    def _extend(self, keys: Tensor, values: Tensor, maps: FarMaps, mask: Tensor | None) -> tuple[Whole, Far]:
        before, first_latent = self.length, self.latents_from
        start = max(0, before - self.window)
        ring = torch.arange(start, before, device=self.device) % self.window
        rows, met = [], []
        for whole, new in zip(self.whole, (keys, values), strict=True):
            old, (new_rows, new_met) = whole[:, :, ring], maps.held_and_met(new)
            met.append(torch.cat((maps.met(old), new_met), dim=2))
            rows.append(met[-1].detach() if maps.near_codes is None else torch.cat((old, new_rows), dim=2))
        k, v = met
        self.length += keys.shape[2]
        self._find_sinks(mask, keys.shape[2])
        leaving = max(0, self.length - self.window - start)
        self.left_from = max(self.left_from, start + leaving - SLACK)
        leaving_rows, leaving_met = ([x[:, :, :leaving] for x in parts] for parts in (rows, met))
        far_k, far_v = self._leave(start, leaving_rows, leaving_met, maps)
        newest = torch.arange(max(0, self.length - self.window), self.length, device=self.device)
        for whole, new in zip(self.whole, rows, strict=True):
            whole.index_copy_(2, newest % self.window, new[:, :, newest - start])
        self._forget()
        far = Far(k=far_k, v=far_v, start=first_latent)
        if before == 0:  # as without a cache, gradients and packed documents included
            sink_k, sink_v, columns = sinks_of(k, v, mask, self.sinks)
        else:
            columns = self.sink_columns()
            sink_k, sink_v = (maps.met(x[:, :, self.window :]) for x in self.whole)
        sinks_first = self.sink_at is None
        return Whole(
            k=k, v=v, start=start, sink_k=sink_k, sink_v=sink_v, sink_columns=columns, sinks_first=sinks_first
        ), far

    def _oldest_leaves(self, slot: int, maps: FarMaps) -> tuple[Tensor, Tensor]:
        """Take in the window's oldest token, at a slot, and with it those that leave next; return all latents."""
        column = self.length - self.window
        self.left_from = max(self.left_from, column + 1 - SLACK)
        alone = torch.is_grad_enabled() or self.sliding is not None or column < self.sinks
        if self.far.ahead and not alone:
            return self.far.move(1)
        at_once = 1 if alone else self.far.at_once
        count = min(at_once - (column + self.phase) % at_once, self.window - slot)
        rows = [x.narrow(2, slot, count) for x in self.whole]
        held = self._leave(column, rows, [maps.met(x) for x in rows], maps)
        return held if count == 1 else self.far.move(1 - count)

    def _leave(self, column: int, rows: list[Tensor], parts: list[Tensor], maps: FarMaps) -> tuple[Tensor, Tensor]:
        """Take in what leaves the window, as held and as met, `column` the first of it; return all latents."""
        count = parts[0].shape[2]
        end = column + count
        place, kept = column % LEFT, None
        if place + count > LEFT:
            kept = torch.arange(max(column, end - LEFT), end, device=self.device)
        for whole, left, x in zip(self.whole, self.left, rows, strict=True):
            if kept is None:
                left.narrow(2, place, count).copy_(x)
            else:
                left.index_copy_(2, kept % LEFT, x[:, :, kept - column])
            if self.sink_at is not None and count:
                columns = self.sink_columns()
                hit = ((columns >= column) & (columns < end))[:, None, :, None]
                whole[:, :, self.window :] = torch.where(hit, gathered(x, columns - column), whole[:, :, self.window :])
            elif column < self.sinks:
                last = min(end, self.sinks)
                whole[:, :, self.window + column : self.window + last] = x[:, :, : last - column]
        far = min(count, max(0, self.sinks - column))  # the first columns are sinks, or padding
        leaving = [x[:, :, far:] for x in parts]
        if not (torch.is_grad_enabled() and any(x.requires_grad for x in (*leaving, *maps[:4]))):
            return self.far.append(*maps.stored(*leaving))
        before = maps.read(*self.far.held())
        after = [torch.cat(pair, dim=2) for pair in zip(before, maps.seen(*leaving), strict=True)]
        self.far.append(*(x.detach() for x in maps.stored(*leaving)))
        return after[0], after[1]

    def _find_sinks(self, mask: Tensor | None, new: int) -> None:
        """Note which of the newest tokens, already counted, are the first of their sequences."""
        if self.sinks_known or (mask is None and self.sink_at is None):
            return
        before = self.length - new
        if self.sink_at is None:
            columns = torch.arange(self.sinks, device=self.device)
            self.sink_at = torch.where(columns < before, columns, NOWHERE)[None]
        if mask is None:
            own = torch.ones(1, new, dtype=torch.bool, device=self.device)
        else:
            own = mask[:, 0].diagonal(offset=before, dim1=1, dim2=2)
        self.sink_at = next_sinks(self.sink_at, own, before)
        self.sinks_known = bool((self.sink_at < NOWHERE).all())

    def sink_columns(self) -> Tensor:
        """Where the sinks of each sequence stand; the number of all columns stands for none."""
        if self.sink_at is None:
            return torch.arange(self.sinks, device=self.device).clamp(max=self.length)[None]
        return self.sink_at.clamp(max=self.length)

    def _forget(self) -> None:
        """Let go of latents that the teacher's sliding window has left behind."""
        if self.sliding is not None:
            self.far.forget(max(0, self.length + 1 - self.sliding - SLACK - self.latents_from))

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
        back = torch.arange(left_then, min(left, length), device=self.device)
        for whole, kept in zip(self.whole, self.left, strict=True):
            whole.index_copy_(2, back % self.window, kept[:, :, back % LEFT])
        self.far.crop(max(0, left - self.sinks) - max(0, left_then - self.sinks))
        self.length = length
        if self.sink_at is not None and self.sinks:
            self.sink_at = torch.where(self.sink_at < length, self.sink_at, NOWHERE)
            self.sinks_known = False
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
        self.far.select(indices)
        if self.sink_at is not None and len(self.sink_at) > 1:
            self.sink_at = self.sink_at.index_select(0, indices)

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
        yield from self.far.buffers()

    def held_bytes(self) -> int:
        """Bytes of the tokens held: latents, and whole ones in the window and among the sinks."""
        if not self.is_initialized:
            return 0
        tokens = min(self.length, self.window + self.sinks)
        whole = sum(x.nbytes // x.shape[2] for x in self.whole) * tokens
        return whole + sum(buffer.held().nbytes for buffer in self.buffers())

    def allocated_bytes(self) -> int:
        """Bytes of all tensors, reserved capacity and slack included."""
        return super().allocated_bytes() + sum(x.nbytes for x in (*self.whole, *self.left))

    def _move(self, device: torch.device | str) -> None:
        super()._move(device)
        self.whole, self.left = ([x.to(device, non_blocking=True) for x in held] for held in (self.whole, self.left))
