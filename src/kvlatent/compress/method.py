"""What a reduction of queries and keys is: what it allows, what it decides for a model, what it does to a layer.

Every file in `methods/` makes one (or one of a kind); `methods.METHODS` lists them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from kvlatent.compress.maps import QKReduction
from kvlatent.model.spec import QKMap

if TYPE_CHECKING:
    from kvlatent.compress.statistics import LayerStatistics, Statistics

DISTANCES = torch.logspace(0, 9, 64, base=2)
"""Tokens between query and key that rotations are judged at: 1 to 512, as many near as far."""


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The teacher's heads and the dims asked for: what a method decides from."""

    config: PreTrainedConfig
    """The teacher's."""
    head_dim: int
    """Dims per head before."""
    inv_freq: tuple[float, ...]
    """The teacher's inverse frequencies in radians per token, one per rotary pair."""
    d_qk: tuple[int, ...]
    """Dims per head of each layer after."""
    heads_per_latent: int
    """KV heads that are reduced together."""
    statistics: Statistics | None
    """Calibration statistics of the whole model; only methods that `need_statistics` can count on them."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a method decides for all layers before it reduces one."""

    inv_freq: tuple[float, ...]
    """Inverse frequencies of the student."""
    per_head_frequencies: bool = False
    """Whether every KV head holds its own choice of them."""
    qk_map: QKMap = "before_rope"
    """Where the maps go. Before RoPE, they are folded into W_Q and W_K unless a QK-norm stands between."""
    shared: Any = None
    """Whatever else `reduce` needs that all layers have in common, say rotary pairs."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer, as a method gets to see it."""

    q_heads: int
    kv_heads: int
    head_dim: int
    d_qk: int
    """Dims per head after."""
    heads_per_latent: int
    latent_dims: int
    """Dims after, of all heads that share a latent."""
    statistics: LayerStatistics | None
    """Calibration statistics of this layer; None only for methods that aren't calibrated."""

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.q_heads // self.kv_heads

    def moment(self, name: str) -> Tensor:
        """A second moment of queries (`q…`) by head, or of keys (`k…`) by latent."""
        assert self.statistics is not None
        return self.statistics.mean(name, heads_per_latent=1 if name.startswith("q") else self.heads_per_latent)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to reduce queries and keys."""

    name: str
    """As users write it."""
    plan: Callable[[Heads], Decision]
    """Decide what holds for all layers."""
    reduce: Callable[[Layer, Decision], QKReduction]
    """The maps of one layer. Those of queries leave the scale of the logits as it is."""
    check: Callable[[int, int], None] = lambda _head_dim, _d_qk: None
    """Raise `UserError` for a head_dim and d_qk that the method can't do; called before weights are loaded."""
    calibrated: bool = True
    """Whether layers are reduced by statistics of text."""
    needs_statistics: bool = False
    """Whether `plan` needs statistics of the whole model before the first layer is reduced."""
    one_frequency_list: bool = False
    """Whether all heads of all layers rotate by one list, so that every layer has the same d_qk."""
    takes_window: bool = False
    """Whether its maps can serve far tokens alone, beside a window of whole ones: they come after RoPE."""
    groups_heads: bool = False
    """Whether it can reduce several KV heads together, into one latent."""
