"""A cache layer whose tokens become code words once a policy has chosen them."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kvlatent.compose.attended import Observer
from kvlatent.compose.codebook import Codebook, Vectors
from kvlatent.compose.hooks import Hooks
from kvlatent.compose.layers import EvictingLayer, Slots, gathered
from kvlatent.errors import UserError
from kvlatent.model.buffers import Buffer
from kvlatent.model.cache import Held, Keys, Others, Values
from kvlatent.model.rope import rotate, turned_back


class CodedLayer(EvictingLayer):
    """A layer that is read from code words; `keys` and `values` are what they say."""

    def __init__(self, hooks: Hooks, index: int, *, keys: float, values: float) -> None:
        """Build an empty layer.

        Args:
            hooks: Of the model, which know its frequencies.
            index: The layer's.
            keys: The least cosine of a key before RoPE and its code word.
            values: The same of values.
        """
        self.hooks, self.index, self.least = hooks, index, (keys, values)
        self.coded: tuple[Codebook, Codebook] | None = None
        super().__init__()

    def _clear(self) -> None:
        super()._clear()
        self.coded = None
        self.positions: Int[Tensor, "batch heads slots"] | None = None

    @property
    def keys(self) -> Tensor | None:
        """Keys at their positions."""
        if self.coded is None:
            return super().keys
        return turned(self.hooks.observer, self.index, self.coded[0].read(), self.positions)

    @keys.setter
    def keys(self, held: Tensor | None) -> None:
        self._keys = None if held is None else Buffer(held)

    @property
    def values(self) -> Tensor | None:
        """Values."""
        return super().values if self.coded is None else self.coded[1].read()

    @values.setter
    def values(self, held: Tensor | None) -> None:
        self._values = None if held is None else Buffer(held)

    @property
    def slots(self) -> int:
        """Tokens held, and unused slots."""
        return super().slots if self.coded is None else self.coded[0].length

    def note(self, new: Bool[Tensor, "batch new"] | None, position_ids: Int[Tensor, "_ new"], batch: int) -> None:
        """Take down which of the tokens that are about to come are real, and their positions."""
        super().note(new, position_ids, batch)
        coming = position_ids.expand(batch, -1)[:, None].int()
        if self.positions is not None:
            coming = torch.cat((self.positions, coming.expand(-1, self.positions.shape[1], -1)), dim=2)
        self.positions = coming

    def update(self, key_states: Keys, value_states: Values, *, kwargs: Others = None) -> Held:
        """Append, as code words once there are some, and return what is read of all."""
        if self.coded is None:
            return super().update(key_states, value_states)
        self.expect(key_states)
        assert self.positions is not None
        count = key_states.shape[2]
        self.seen += count
        positions = self.positions[..., -count:]
        self.coded[0].join(turned(self.hooks.observer, self.index, key_states, positions, back=True))
        self.coded[1].join(value_states)
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def take(self, slots: Slots, valid: Bool[Tensor, "batch kept"] | None) -> None:
        """Keep these slots only."""
        assert self.positions is not None
        self.positions = gathered(
            self.positions.expand(-1, max(slots.shape[1], self.positions.shape[1]), -1)[..., None], slots
        )[..., 0]
        if self.coded is None:
            super().take(slots, valid)
            return
        for codebook in self.coded:
            codebook.take(slots)
        self.visible = valid

    def encode(self) -> None:
        """Write what is held as code words, if it isn't."""
        if self.coded is not None:
            return
        keys, values = self.keys, self.values
        assert keys is not None and values is not None and self.positions is not None
        self.positions = self.positions.expand(-1, keys.shape[1], -1)
        keys = turned(self.hooks.observer, self.index, keys, self.positions, back=True)
        self.coded = (
            Codebook(keys, self.visible, least=self.least[0]),
            Codebook(values, self.visible, least=self.least[1]),
        )
        self._keys = self._values = None
        self.positions = self.positions.contiguous()

    def _select_rows(self, indices: Tensor) -> None:
        raise UserError("code words belong to their sequences, so a cache of them takes no beams and no other order")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refuse."""
        self._select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refuse."""
        self._select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refuse."""
        self._select_rows(torch.arange(repeats))

    def held_bytes(self) -> int:
        """Bytes of code words, indices, magnitudes, positions and what tells unused slots."""
        positions = 0 if self.positions is None else self.positions.nbytes
        coded = sum(x.nbytes for codebook in self.coded or () for x in codebook.tensors())
        return super().held_bytes() + positions + coded

    def allocated_bytes(self) -> int:
        """Bytes of all tensors."""
        return self.held_bytes() if self.coded is not None else super().allocated_bytes()


def turned(
    observer: Observer,
    index: int,
    keys: Vectors,
    positions: Int[Tensor, "batch heads slots"] | None,
    *,
    back: bool = False,
) -> Vectors:
    """A layer's cached keys with their RoPE, or, `back`, without it.

    Args:
        observer: Of the model.
        index: The layer's.
        keys: Without RoPE, or, `back`, with it.
        positions: Where they stand.
        back: Undo it.
    """
    assert positions is not None
    attention, rotary = observer.attention(index), observer.model.model.rotary_emb
    if not attention.turns:
        return keys
    batch, heads, slots, _ = keys.shape
    x = keys.float()
    x = x[..., observer.order.argsort()] if observer.moved else x
    cos, sin = (y.view(batch, -1, slots, y.shape[-1]) for y in rotary(x, positions.flatten(1)))
    if attention.freq_index is not None:
        at = attention.freq_index[None, :, None].expand(batch, -1, slots, -1)
        cos, sin = (y.expand(-1, heads, -1, -1).gather(-1, at) for y in (cos, sin))
    x = (turned_back if back else rotate)(x, cos, sin)
    return (x[..., observer.order] if observer.moved else x).to(keys.dtype)
