"""A cache of 8-, 4- or 2-bit numbers over the reduced dims: keys per channel, values per token, the newest as they are.

Keys have channels of very different size, so every channel has its own range, over `GROUP` tokens at a time; values are
scaled token by token (KIVI, arXiv:2402.02750). Codes are written once: what is quantized is never read back and
quantized again. Attention sees dequantized tensors, one layer at a time, so this saves memory, not decode time.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from kvlatent.errors import UserError
from kvlatent.model.buffers import LEAST_RESERVE, Buffer, Buffered, check_crop
from kvlatent.model.cache import GrowingLayer, Held, Keys, LatentCache, Others, Values
from kvlatent.model.graft import spec_in
from kvlatent.model.window_cache import Latents, WindowLayer

GROUP = 128
"""Tokens whose keys share the ranges of their channels; they are quantized together."""
WINDOW = 32
"""Newest tokens that are always in full precision; up to GROUP - 1 more wait for their group to fill."""


class QuantizedCache(LatentCache):
    """A `LatentCache` with quantized layers, for `generate(past_key_values=…)`.

    What a student's window holds stays whole, and its latents become codes. Without a window, the newest tokens stay.
    Layers with a sliding window are as in `LatentCache`.
    """

    def __init__(self, config: PreTrainedConfig, *, bits: int) -> None:
        """Build empty layers for a model.

        Args:
            config: Of the model.
            bits: Per number, 8, 4 or 2.

        Raises:
            UserError: Other `bits`, or a student whose far tokens are codes.
        """
        if bits not in (2, 4, 8):
            raise UserError(f"caches are quantized to 8, 4 or 2 bits; got {bits}")
        if (spec := spec_in(config)) is not None and spec.k_codes:
            raise UserError("this student's far tokens are codes already; let the model make its cache")
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            if type(layer) is GrowingLayer:
                self.layers[index] = QuantizedLayer(bits)
            elif type(layer) is WindowLayer and layer.sliding is None:
                self.layers[index] = WindowLayer(layer.window, layer.sinks, store=partial(QuantizedLatents, bits))


class QuantizedLatents(Latents):
    """Codes and scales of whole groups of tokens, then the rest as it is: the residual, which is `parts`."""

    at_once = 1

    def __init__(self, bits: int, newest: int = 0) -> None:
        """Build an empty store.

        Args:
            bits: Per number.
            newest: Tokens that always stay in the residual.
        """
        super().__init__()
        self.bits, self.newest = bits, newest
        self.codes: list[Buffer] = []  # keys: codes, least, step by group; values: codes, step by token

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.codes[0].length + self.parts[0].length if self.parts else 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take in more tokens; return all, those of groups that were whole before as they are after quantization."""
        if not self.codes:
            empty = keys[:, :, :0], values[:, :, :0]
            rooms = (LEAST_RESERVE, 1, 1, LEAST_RESERVE, LEAST_RESERVE)  # ranges have a row per group, not per token
            coded = (*quantize_keys(empty[0], self.bits), *quantize_values(empty[1], self.bits))
            self.codes = [Buffer(x, least) for x, least in zip(coded, rooms, strict=True)]
            self.parts = [Buffer(x) for x in empty]
        old = self._dequantized()
        super().append(keys, values)
        held = self._with_residual(old)
        surplus = (self.parts[0].length - self.newest) // GROUP * GROUP
        if surplus > 0:
            whole_groups = [buffer.held()[:, :, :surplus] for buffer in self.parts]
            coded = (*quantize_keys(whole_groups[0], self.bits), *quantize_values(whole_groups[1], self.bits))
            for buffer, part in zip(self.codes, coded, strict=True):
                buffer.append(part)
            for buffer in self.parts:
                buffer.drop_front(surplus)
        return held

    def held(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens."""
        return self._with_residual(self._dequantized())

    def _with_residual(self, old: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        residual = [buffer.held() for buffer in self.parts]
        if old[0].shape[2] == 0:
            return residual[0], residual[1]
        return torch.cat((old[0], residual[0]), dim=2), torch.cat((old[1], residual[1]), dim=2)

    def _dequantized(self, start: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values of the groups from token `start`."""
        codes, least, step, v_codes, v_step = (buffer.held() for buffer in self.codes)
        group = start // GROUP
        keys = dequantize_keys(codes[:, :, start:], least[:, :, group:], step[:, :, group:], self.bits)
        values = dequantize_values(v_codes[:, :, start:], v_step[:, :, start:], self.bits)
        keys, values = (
            x[..., : buffer.whole.shape[-1]].to(buffer.whole.dtype)
            for x, buffer in zip((keys, values), self.parts, strict=True)
        )
        return keys, values

    def forget(self, tokens: int) -> None:
        """Never asked for: layers with a sliding window aren't quantized."""
        raise NotImplementedError

    def crop(self, tokens: int) -> None:
        """Let go of the newest tokens, of as many as there are; groups that are cut become residual."""
        remove = min(tokens, self.length)
        if remove > 0 and remove > self.parts[0].length:
            groups = -(-(remove - self.parts[0].length) // GROUP)
            old = self._dequantized(self.codes[0].length - groups * GROUP)
            self.parts = [
                Buffer(torch.cat((x, buffer.held()), dim=2)) for x, buffer in zip(old, self.parts, strict=True)
            ]
            for buffer, rows in zip(self.codes, (GROUP, 1, 1, GROUP, GROUP), strict=True):
                buffer.length -= groups * rows
        for buffer in self.parts:
            buffer.length -= remove

    def buffers(self) -> Iterator[Buffer]:
        """The residual's, then codes and ranges."""
        yield from (*self.parts, *self.codes)


class QuantizedLayer(Buffered, DynamicLayer):
    """A layer of codes for students without a window; `keys` and `values` are the residual."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        super().__init__()  # sets `keys`, and with it the store

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note where numbers are wanted; buffers come with the first ones."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Keys, value_states: Values, *, kwargs: Others = None) -> Held:
        """Append; return all keys and values, those of whole groups as they are after quantization.

        A first update returns what it was given: a prefill attends in full precision.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self.store.append(key_states, value_states)

    @property
    def keys(self) -> Tensor | None:
        """The residual's keys."""
        return self.store.parts[0].held() if self.store.parts else None

    @keys.setter
    def keys(self, held: None) -> None:  # transformers' own code sets it to None only, to empty the layer
        self.store = QuantizedLatents(self.bits, WINDOW)

    @property
    def values(self) -> Tensor | None:
        """The residual's values."""
        return self.store.parts[1].held() if self.store.parts else None

    @values.setter
    def values(self, held: None) -> None:
        """Emptied with the keys."""

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.store.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, their number given as a negative one; groups that are cut become residual."""
        check_crop(tokens_to_remove)
        self.store.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder sequences, codes and all."""
        self.store.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences of these indices."""
        self.store.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        if self.store.parts:
            self.store.select(torch.arange(len(self.store.parts[0].whole)).repeat_interleave(repeats))

    def buffers(self) -> Iterator[Buffer]:
        """The residual's, then codes and ranges."""
        yield from self.store.buffers()

    def held_bytes(self) -> int:
        """Bytes in use: codes, ranges and residual."""
        return sum(buffer.held().nbytes for buffer in self.buffers())


def quantize_keys(keys: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of keys (batch, heads, groups × GROUP, d_qk), and per group and channel the least value and the step.

    Returns:
        Packed codes (batch, heads, tokens, bytes) and two float16 tensors (batch, heads, groups, d_qk).
    """
    groups = keys.float().unflatten(2, (-1, GROUP))
    least, most = groups.amin(3), groups.amax(3)
    least = least.half()
    step = ((most - least.float()) / (2**bits - 1)).clamp(min=2**-24).half()
    codes = ((groups - least.float()[:, :, :, None]) / step.float()[:, :, :, None]).round().clamp(0, 2**bits - 1)
    return _pack(codes.flatten(2, 3).to(torch.uint8), bits), least, step


def dequantize_keys(codes: Tensor, least: Tensor, step: Tensor, bits: int) -> Tensor:
    """Undo `quantize_keys`, in float32; widths that don't fill bytes have some channels too many."""
    groups = _unpack(codes, bits).unflatten(2, (-1, GROUP))[..., : least.shape[-1]].float()
    return (groups * step.float()[:, :, :, None] + least.float()[:, :, :, None]).flatten(2, 3)


def quantize_values(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes of values (batch, heads, tokens, d_vo), symmetric around zero, and the step of every token and head.

    Returns:
        Packed codes (batch, heads, tokens, bytes) and a float16 tensor (batch, heads, tokens, 1).
    """
    most = 2 ** (bits - 1) - 1
    step = (values.float().abs().amax(-1, keepdim=True) / most).clamp(min=2**-24).half()
    codes = (values.float() / step.float()).round().clamp(-most, most) + most
    return _pack(codes.to(torch.uint8), bits), step


def dequantize_values(codes: Tensor, step: Tensor, bits: int) -> Tensor:
    """Undo `quantize_values`, in float32; widths that don't fill bytes have some numbers too many."""
    return (_unpack(codes, bits).float() - (2 ** (bits - 1) - 1)) * step.float()


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Codes of neighbouring numbers in one byte."""
    each = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % each)).unflatten(-1, (-1, each))
    packed = codes[..., 0]
    for place in range(1, each):
        packed = packed | (codes[..., place] << (bits * place))
    return packed


def _unpack(packed: Tensor, bits: int) -> Tensor:
    places = [(packed >> up) & (2**bits - 1) for up in range(0, 8, bits)]
    return torch.stack(places, dim=-1).flatten(-2)
