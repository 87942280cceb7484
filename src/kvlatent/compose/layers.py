"""Cache layers from which tokens are taken, of every head its own, and of every sequence its own number.

What stays is a tensor per layer, as long as the sequence that keeps the most; shorter ones have unused slots in front.
A layer counts all tokens it has seen, so that later ones get the positions that they have in the text.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kvlatent.errors import UserError
from kvlatent.model.buffers import Buffer
from kvlatent.model.cache import GrowingLayer, Held, Keys, Others, Values
from kvlatent.model.window_cache import WindowLayer

Slots = Int[Tensor, "batch heads kept"]
"""Which slots stay, in order; one head stands for all."""


class Evicting:
    """What these layers have in common: which columns of their masks are real tokens, and how many there were."""

    visible: Bool[Tensor, "batch columns"] | None
    """Columns that later queries may look at; None is all."""
    tokens: list[int]
    """Real tokens seen, by sequence."""
    budgets: list[int]
    """Slots that the last prefill was given, by sequence."""
    fresh: int
    """Newest slots that decode steps have brought, less those that a policy is done with."""
    announced: bool
    """Whether the model that the cache was made for is about to bring tokens."""

    def _clear(self) -> None:
        self.visible, self.tokens, self.budgets, self.fresh = None, [], [], 0
        self.announced = False

    @property
    def near(self) -> int:
        """Tokens that are held beside the slots, in the window and as sinks, once there are as many."""
        return 0

    @property
    def columns(self) -> int:
        """Columns of masks before the next token's."""
        raise NotImplementedError

    @property
    def slots(self) -> int:
        """Slots of which some may go."""
        raise NotImplementedError

    def valid(self) -> Bool[Tensor, "batch slots"] | None:
        """Which slots hold a token; None is all."""
        raise NotImplementedError

    def take(self, slots: Slots, valid: Bool[Tensor, "batch kept"] | None) -> None:
        """Keep these slots only; invalid ones, in front, hold nothing."""
        raise NotImplementedError

    def slot_buffers(self) -> Iterable[Buffer]:
        """What the slots are made of."""
        raise NotImplementedError

    def drop(self, slot: Int[Tensor, "batch heads"]) -> None:
        """Take out one slot of every head, all of which hold a token; one head stands for all."""
        if last := int(slot.max()):  # slots in front of it move up: they are few, or need no new room
            moved = torch.arange(1, last + 1, device=slot.device)
            moved = moved - 1 * (moved <= slot[..., None])
        for buffer in self.slot_buffers():
            if last:
                front = buffer.held()[:, :, : last + 1]
                front[:, :, 1:] = gathered(front, moved)
            buffer.start, buffer.length = buffer.start + 1, buffer.length - 1  # where what lies behind stays

    def held_tokens(self) -> list[int]:
        """Tokens in the slots, by sequence."""
        valid = self.valid()
        return [self.slots] * len(self.tokens) if valid is None else valid.sum(-1).tolist()

    def note(self, new: Bool[Tensor, "batch new"] | None, position_ids: Int[Tensor, "_ new"], batch: int) -> None:
        """Take down which of the tokens that are about to come are real; None is all."""
        known, self.announced = self.columns, True
        count, device = position_ids.shape[1], position_ids.device
        counts = [count] * batch if new is None else new.sum(-1).tolist()
        if self.tokens:
            counts = [before + more for before, more in zip(self.tokens, counts, strict=True)]
        self.tokens = counts
        if new is None and self.visible is None:
            return
        before = torch.ones(batch, known, dtype=torch.bool, device=device) if self.visible is None else self.visible
        more = torch.ones(batch, count, dtype=torch.bool, device=device) if new is None else new
        self.visible = torch.cat((before, more.expand(batch, -1)), dim=1)

    def expect(self, keys: Tensor) -> None:
        """Check that the tokens were announced.

        Raises:
            UserError: They come from another model, or with gradients.
        """
        if not self.announced:
            raise UserError("this cache belongs to another model: make one with policy.cache(model)")
        if keys.requires_grad:
            raise UserError("a policy drops tokens, which has no gradient; run the model under torch.no_grad()")
        self.announced = False

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse what assisted decoding would need.

        Raises:
            UserError: Always.
        """
        raise UserError("a cache with a policy can't take tokens back, so it takes no assisted decoding")

    def _select_rows(self, indices: Tensor) -> None:
        rows = indices.tolist()
        for name in ("tokens", "budgets"):
            values = getattr(self, name)
            setattr(self, name, [values[row] for row in rows] if values else values)
        if self.visible is not None:
            self.visible = self.visible.index_select(0, indices.to(self.visible.device))

    def _own_bytes(self) -> int:
        return 0 if self.visible is None else self.visible.nbytes


class EvictingLayer(Evicting, GrowingLayer):
    """A layer whose slots are its tokens."""

    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self._clear()

    @property
    def columns(self) -> int:
        """Columns of masks before the next token's."""
        return self.slots

    @property
    def slots(self) -> int:
        """Slots of which some may go."""
        return 0 if self._keys is None else self._keys.length

    def valid(self) -> Bool[Tensor, "batch slots"] | None:
        """Which slots hold a token; None is all."""
        return self.visible

    def update(self, key_states: Keys, value_states: Values, *, kwargs: Others = None) -> Held:
        """Append, and return all that is held."""
        self.expect(key_states)
        self.seen += key_states.shape[2]
        return super().update(key_states, value_states)

    def slot_buffers(self) -> Iterable[Buffer]:
        """Keys and values."""
        return self.buffers()

    def take(self, slots: Slots, valid: Bool[Tensor, "batch kept"] | None) -> None:
        """Keep these slots only."""
        self._keys, self._values = (Buffer(gathered(x.held(), slots)) for x in self.buffers())
        self.visible = valid

    def get_seq_length(self) -> int:
        """Tokens seen, padding included: what positions count from."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the columns of a mask over all tokens seen, and the first of them."""
        return self.seen + query_length, 0

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.seen = 0
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder sequences."""
        super().reorder_cache(beam_idx)
        self._select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences of these indices."""
        super().batch_select_indices(indices)
        self._select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        super().batch_repeat_interleave(repeats)
        self._select_rows(torch.arange(len(self.tokens)).repeat_interleave(repeats))

    def held_bytes(self) -> int:
        """Bytes of keys, values and what tells unused slots."""
        return sum(buffer.held().nbytes for buffer in self.buffers()) + self._own_bytes()

    def allocated_bytes(self) -> int:
        """Bytes of all tensors, reserved capacity included."""
        return super().allocated_bytes() + self._own_bytes()


class EvictingWindowLayer(Evicting, WindowLayer):
    """A layer of a student with a window, whose slots are the latents of its far tokens.

    Slots are always the last columns before the window, whatever columns their tokens once had: they have left the
    window either way, and nothing else depends on it.
    """

    is_croppable = False

    def __init__(self, window: int, sinks: int) -> None:
        super().__init__(window, sinks)
        self._clear()

    @property
    def near(self) -> int:
        """Tokens in the window and the sinks."""
        return self.window + self.sinks

    @property
    def columns(self) -> int:
        """Columns of masks before the next token's."""
        return self.length

    @property
    def slots(self) -> int:
        """Slots of which some may go."""
        return self.far.length

    def valid(self) -> Bool[Tensor, "batch slots"] | None:
        """Which slots hold a token; None is all."""
        if self.visible is None:
            return None
        first, columns = self.latents_from, torch.arange(self.slots, device=self.device)
        return self.visible[:, first : first + self.slots] & (columns + first >= self._first_far())

    def _first_far(self) -> Tensor:
        """The first column that isn't a sink's, (batch, 1)."""
        if self.sinks == 0:
            return torch.zeros(1, 1, dtype=torch.long, device=self.device)
        return self.sink_columns()[:, -1:] + 1

    def update(self, key_states: Tensor, *args: Tensor, **kwargs: Tensor) -> Held:  # type: ignore[override]
        """Append, and return what the new queries meet, as `WindowLayer` does."""
        self.expect(key_states)
        return super().update(key_states, *args, **kwargs)  # type: ignore[arg-type,return-value]

    def whole_columns(self) -> Bool[Tensor, "batch columns"]:
        """The columns of the tokens that are held whole."""
        whole = torch.zeros(len(self.tokens), self.length + 1, dtype=torch.bool, device=self.device)
        whole[:, max(0, self.length - self.window) :] = True
        whole = whole.scatter(1, self.sink_columns().expand(len(whole), -1), True)[:, :-1]
        return whole if self.visible is None else whole & self.visible

    def slot_buffers(self) -> Iterable[Buffer]:
        """Latents or codes."""
        return self.far.parts

    def take(self, slots: Slots, valid: Bool[Tensor, "batch kept"] | None) -> None:
        """Keep these slots only."""
        end = self.latents_from + self.slots
        self.far.parts, self.far.ahead = [Buffer(gathered(x.held(), slots)) for x in self.far.parts], 0
        if valid is None or self.visible is None:
            return
        columns = torch.arange(self.length, device=self.device)
        unused = (columns >= self._first_far()) & (columns < end - valid.sum(-1, keepdim=True))
        self.visible = self.visible & ~unused

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._clear()

    def _select(self, indices: Tensor) -> None:
        super()._select(indices)
        self._select_rows(indices)

    def held_bytes(self) -> int:
        """Bytes of the tokens held, and of what tells unused slots."""
        return super().held_bytes() + self._own_bytes()

    def allocated_bytes(self) -> int:
        """Bytes of all tensors, reserved capacity and slack included."""
        return super().allocated_bytes() + self._own_bytes()


def gathered(x: Tensor, slots: Slots) -> Tensor:
    """These slots of (batch, heads, slots, dim), of every head its own or of all the same."""
    batch, heads, _, dim = x.shape
    return x.gather(2, slots.expand(batch, heads, -1)[..., None].expand(-1, -1, -1, dim))


def to_the_right(
    kept: Bool[Tensor, "batch heads slots"],
) -> tuple[Slots, Bool[Tensor, "batch kept"] | None]:
    """The slots that are kept, as many in every head, in order and behind unused ones; and which of them are used."""
    order = torch.where(kept, torch.arange(kept.shape[2], device=kept.device), -1).sort(-1).values
    order = order[..., order.shape[2] - int(kept[:, 0].sum(-1).max()) :]
    valid = order[:, 0] >= 0
    return order.clamp(min=0), None if bool(valid.all()) else valid
