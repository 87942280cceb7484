"""What a converted model keeps of each attention head, and how; stored in `config.json` under `latent`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from kvlatent.errors import UserError, first_error
from kvlatent.kernels.layout import BITS, Groups, Layout

if TYPE_CHECKING:
    from pydantic import BaseModel

Preset = Literal["best", "portable", "paper"]
"""How heads are reduced: our measured best, one shared frequency list for stock engines, or the paper's own recipe."""
Origin = Preset | Literal["none"]
"""The preset that made a spec, or none where nothing was reduced: a graft that still equals its teacher."""
SLIDING = "sliding_attention"
"""What transformers calls layers with a sliding window, in `layer_types`."""
QKMap = Literal["folded", "before_rope", "after_rope"]
"""Where queries and keys go from head_dim to d_qk: inside W_Q and W_K, or by a per-head map before or after RoPE."""


@dataclass(frozen=True, kw_only=True)
class LatentSpec:
    """Per-head dims after conversion, layer by layer, and the rotary frequencies that go with them."""

    preset: Origin
    """The recipe that made it."""
    head_dim: int
    """The teacher's dims per head, for queries, keys and values alike."""
    d_qk: tuple[int, ...]
    """Query/key dims per head of each layer; even, because RoPE rotates pairs."""
    d_vo: tuple[int, ...]
    """Value/output dims per head of each layer."""
    qk_map: QKMap
    """Where queries and keys become d_qk wide."""
    inv_freq: tuple[float, ...]
    """Inverse frequencies of RoPE in radians per token, one per rotary pair."""
    per_head_frequencies: bool
    """Whether every KV head holds its own choice from `inv_freq`; otherwise all heads use the whole list in order."""
    scale: float
    """Multiplier of the attention logits."""
    rope_scaling: float = 1.0
    """Multiplier of cos and sin (the attention factor of YaRN; 1 elsewhere)."""
    sliding_inv_freq: tuple[float, ...] = ()
    """Inverse frequencies of layers with a sliding window, where these have their own."""
    sliding_rope_scaling: float = 1.0
    """Multiplier of their cos and sin."""
    unrotated: tuple[int, ...] = ()
    """Layers whose queries and keys know no positions (NoPE)."""
    heads_per_latent: int = 1
    """KV heads per group: their keys and values are reduced and cached as one, that many times d_qk and d_vo wide."""
    window: int = 0
    """Newest tokens that a query meets with the teacher's own keys and values, itself included; 0 is none."""
    sinks: int = 0
    """First tokens of a sequence that are met so too."""
    window_bits: int = 16
    """Bits of their numbers beside codes: 16 leaves them as they are, 8 makes them codes of their own."""
    k_codes: tuple[Groups, ...] = ()
    """By layer, the dims of a latent's keys and the bits of each; empty where they are numbers of the model's dtype."""
    v_codes: tuple[Groups, ...] = ()
    """Likewise for values."""
    whole_layers: tuple[int, ...] = ()
    """Layers that stay the teacher's: nothing is reduced there, so no window stands beside it."""

    linear_layers: tuple[int, ...] = ()
    """Layers of linear attention, which have no keys and values."""

    def __post_init__(self) -> None:
        lists = "d_qk", "d_vo", "inv_freq", "sliding_inv_freq", "unrotated", "whole_layers", "linear_layers"  # of JSON
        for name in lists:
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("k_codes", "v_codes"):
            groups = tuple(tuple((dims, bits) for dims, bits in layer) for layer in getattr(self, name))
            object.__setattr__(self, name, groups)
        check_dims(self.head_dim, self.d_qk, self.d_vo)
        self._check_whole_layers()
        self._check_codes()
        for name, allowed in (("preset", (*get_args(Preset), "none")), ("qk_map", get_args(QKMap))):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        if self.heads_per_latent < 1 or (self.heads_per_latent > 1 and self.per_head_frequencies):
            raise UserError(
                f"heads per latent must be at least 1, and 1 where heads have frequencies of their own; "
                f"got {self.heads_per_latent}"
            )
        if self.window < 0 or self.sinks < 0 or (self.sinks and not self.window):
            raise UserError(
                f"window and sinks are counts of tokens, sinks only beside a window; got {self.window}, {self.sinks}"
            )
        if self.window and (self.qk_map != "after_rope" or self.per_head_frequencies):
            raise UserError("a window needs keys that are reduced after RoPE with the teacher's frequencies (project)")
        rotated = {self.head_dim} if self.qk_map == "after_rope" else set(self.latent_dims[0])
        if not self.per_head_frequencies and rotated != {2 * len(self.inv_freq)}:
            raise UserError(
                f"a shared list of {len(self.inv_freq)} frequencies rotates {2 * len(self.inv_freq)} dims; "
                f"the layers rotate {sorted(rotated)}"
            )
        if self.sliding_inv_freq and len(self.sliding_inv_freq) != len(self.inv_freq):
            raise UserError(
                f"{len(self.inv_freq)} frequencies and {len(self.sliding_inv_freq)} for layers with a sliding window "
                "can't rotate the same dims"
            )

    def _check_whole_layers(self) -> None:
        whole, layers = self.whole_layers, len(self.d_qk)
        if list(whole) != sorted({*whole} & {*range(layers)}) or len(whole) == layers:
            raise UserError(f"whole_layers are some of the {layers} layers, in order; got {list(whole)}")
        if whole and self.qk_map != "after_rope":
            raise UserError("layers are left whole beside keys that are reduced after RoPE (project)")
        if any({self.d_qk[layer], self.d_vo[layer]} != {self.head_dim} for layer in whole):
            raise UserError(f"layers that are left whole have all {self.head_dim} dims")

    def _check_codes(self) -> None:
        if self.window_bits not in (16, 8) or (self.window_bits == 8 and not self.k_codes):
            raise UserError(f"a window has 16 bits or, beside codes, 8; got {self.window_bits}")
        most = self.head_dim * self.heads_per_latent
        for name, dims in (("k_codes", self.d_qk), ("v_codes", self.d_vo)):
            layers = getattr(self, name)
            if bool(layers) != bool(self.k_codes) or (layers and (len(layers) != len(dims) or not self.window)):
                raise UserError("codes are of the keys and values of every layer, beside a window")
            for index, groups in enumerate(layers):
                if bool(groups) == (index in self.whole_layers) or any(n < 1 or bits not in BITS for n, bits in groups):
                    raise UserError(f"{name} are numbers of dims with {', '.join(map(str, BITS))} bits; got {groups}")
                if sum(n for n, _ in groups) > most:
                    raise UserError(f"{name} are of at most the {most} dims of a latent; got {groups}")

    def seen_by(self, layer: int) -> LatentSpec:
        """The spec as a layer meets it: one that reduces nothing where the layer is left whole."""
        if layer not in self.whole_layers:
            return self
        whole = (self.head_dim,) * len(self.d_qk)
        return replace(
            self, d_qk=whole, d_vo=whole, heads_per_latent=1, qk_map="folded", window=0, sinks=0, window_bits=16,
            k_codes=(), v_codes=(), whole_layers=(),
        )  # fmt: skip

    @property
    def uniform(self) -> bool:
        """Whether every layer has the same dims."""
        return len(set(self.d_qk)) == len(set(self.d_vo)) == 1

    @property
    def latent_dims(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Dims of the keys and of the values that are cached as one, by layer: of a head, or of a group of heads."""
        m = self.heads_per_latent
        keys, values = tuple(m * d for d in self.d_qk), tuple(m * d for d in self.d_vo)
        if self.k_codes:
            keys, values = (
                tuple(Layout(groups).width if groups else whole for groups, whole in zip(codes, dims, strict=True))
                for codes, dims in ((self.k_codes, keys), (self.v_codes, values))
            )
        return keys, values

    def rows_of(self, layer: int) -> tuple[Layout, Layout] | None:
        """How keys and values of a layer's far tokens are written down; None is as numbers of the model's dtype."""
        if not self.k_codes or layer in self.whole_layers:
            return None
        return Layout(self.k_codes[layer]), Layout(self.v_codes[layer])

    def token_bytes(self, layer: int, kv_heads: int, element_size: int) -> tuple[int, int]:
        """Bytes of one far token's key and of its value in the cache of one layer."""
        if layer in self.linear_layers:
            return 0, 0
        heads: Any = {"kv_heads": kv_heads, "heads_per_latent": self.heads_per_latent, "element_size": element_size}
        k_groups, v_groups = (self.k_codes[layer], self.v_codes[layer]) if self.k_codes else ((), ())
        return side_bytes(self.d_qk[layer], k_groups, **heads), side_bytes(self.d_vo[layer], v_groups, **heads)

    @property
    def output_map(self) -> tuple[bool, ...]:
        """By layer, whether a map takes what heads read from a wider latent to head_dim, where W_O then begins."""
        return tuple(self.window > 0 or (self.qk_map != "folded" and d > self.head_dim) for d in self.latent_dims[1])

    @property
    def layout(self) -> Literal["portable", "best"]:
        """`portable` exports as a stock checkpoint (same dims and one frequency list everywhere); `best` needs us."""
        return "portable" if self.uniform and self.qk_map == "folded" and not self.per_head_frequencies else "best"

    def cache_bytes_per_token(self, kv_heads: int, element_size: int) -> int:
        """Bytes one token adds to the cache of a sequence, all layers together."""
        return sum(sum(self.token_bytes(layer, kv_heads, element_size)) for layer in range(len(self.d_qk)))

    def cache_bytes(self, kv_heads: int, element_size: int, tokens: int) -> int:
        """Bytes of the cache of a sequence: latents of far tokens, whole keys and values of the others."""
        near = min(tokens, self.window + self.sinks)
        layers = len(self.d_qk) - len(self.linear_layers)
        whole = layers * near_bytes(self.head_dim, self.window_bits, kv_heads, element_size)
        return (tokens - near) * self.cache_bytes_per_token(kv_heads, element_size) + near * whole

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as in `config.json`."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LatentSpec:
        """Read `to_dict`'s form; unknown, missing and impossible entries are refused."""
        from pydantic import ValidationError  # the command line's help needs this module, and not that one

        if not isinstance(data, Mapping):
            raise UserError(f"the checkpoint's latent spec is damaged: got {str(data)[:60]!r}")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise UserError(f"unknown entries in the checkpoint's latent spec: {', '.join(unknown)}")
        try:
            entries = _entries().model_validate_json(json.dumps(dict(data)))
        except ValidationError as error:
            missing = error.errors()[0]["type"] == "missing"
            wrong = "incomplete" if missing else "damaged"
            raise UserError(f"the checkpoint's latent spec is {wrong}: {first_error(error)}") from None
        return cls(**entries.model_dump())


@cache
def _entries() -> type[BaseModel]:
    """The entries of a spec with their types, to check files by."""
    from pydantic import ConfigDict, create_model

    types = get_type_hints(LatentSpec)
    entries: dict[str, Any] = {
        field.name: (types[field.name], ... if field.default is MISSING else field.default)
        for field in fields(LatentSpec)
    }
    return create_model("Entries", __config__=ConfigDict(strict=True, allow_inf_nan=False), **entries)


def bytes_per_token(d_qk: Sequence[int], d_vo: Sequence[int], kv_heads: int, element_size: int) -> int:
    """Bytes one token adds to a cache with keys and values of these dims per head, one entry per layer."""
    return kv_heads * (sum(d_qk) + sum(d_vo)) * element_size


def near_bytes(head_dim: int, window_bits: int, kv_heads: int, element_size: int) -> int:
    """Bytes of the key and the value of a token that one layer holds whole, by the bits that it has there."""
    return 2 * kv_heads * (head_dim * element_size if window_bits == 16 else Layout(((head_dim, 8),)).row_bytes)


def side_bytes(d: int, groups: Groups, *, kv_heads: int, heads_per_latent: int, element_size: int) -> int:
    """Bytes of one far token's key, or of its value, in the cache of one layer.

    Args:
        d: Dims per head, where they are numbers.
        groups: Dims of a latent and their bits; empty where they are numbers.
        kv_heads: KV heads of the model.
        heads_per_latent: How many of them share a latent.
        element_size: Bytes of a number.
    """
    return Layout(groups).row_bytes * (kv_heads // heads_per_latent) if groups else d * kv_heads * element_size


def check_dims(head_dim: int, d_qk: Sequence[int], d_vo: Sequence[int]) -> None:
    """Raise `UserError` unless every layer's dims are possible for the teacher's `head_dim`."""
    if len(d_qk) != len(d_vo) or not d_qk:
        raise UserError(f"d_qk and d_vo must name every layer; got {len(d_qk)} and {len(d_vo)} entries")
    for d in d_qk:
        if d < 2 or d % 2:
            raise UserError(f"d_qk must be even and at least 2, because RoPE rotates pairs; got {d}")
        if d > head_dim:
            raise UserError(f"d_qk must be at most the model's head_dim {head_dim}; got {d}")
    for d in d_vo:
        if not 1 <= d <= head_dim:
            raise UserError(f"d_vo must be between 1 and the model's head_dim {head_dim}; got {d}")
