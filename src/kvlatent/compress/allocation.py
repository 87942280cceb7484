"""What a budget is spent on, and the probes that say how much each layer matters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from jaxtyping import Float
from torch import Tensor

from kvlatent.compress.statistics import Statistics
from kvlatent.errors import UserError
from kvlatent.kernels.layout import Groups, bits_of
from kvlatent.model.spec import side_bytes

T = TypeVar("T")
PROBE_SHARE = 0.5
"""A probe keeps this share of one layer's key dims, or of its value dims, and everything else."""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """Dims per layer that spend a budget, and their bits, and the loss that the curves expect of each."""

    d_qk: tuple[int, ...]
    d_vo: tuple[int, ...]
    qk_loss: tuple[float, ...]
    """What each layer's narrow keys cost on their own, in nats per token."""
    vo_loss: tuple[float, ...]
    """What each layer's narrow values cost, likewise."""
    alternatives: dict[str, float]
    """What other ways to spend the same bytes would cost; all losses added up, as for `expected_loss`."""
    k_codes: tuple[Groups, ...] = ()
    """By layer, the dims of a latent's keys and the bits of each; empty where they aren't codes."""
    v_codes: tuple[Groups, ...] = ()
    """Likewise of values."""
    window_bits: int = 16
    """Bits of the numbers of tokens met whole."""
    whole_layers: tuple[int, ...] = ()
    """Layers that stay the teacher's, since they forget and so don't grow with the context."""

    @property
    def reduction(self) -> dict[str, Any]:
        """What `convert` takes of it."""
        names = "d_qk", "d_vo", "k_codes", "v_codes", "window_bits", "whole_layers"
        return {name: getattr(self, name) for name in names}

    @property
    def bits(self) -> tuple[list[float], list[float]]:
        """Average bits of a dim by layer, of keys and of values; 16 where they aren't codes."""
        none: tuple[Groups, ...] = ((),) * len(self.d_qk)
        return [bits_of(x) for x in self.k_codes or none], [bits_of(x) for x in self.v_codes or none]

    def token_bytes(self, kv_heads: int, heads_per_latent: int, element_size: int) -> list[tuple[int, int]]:
        """Bytes of one far token's key and of its value by layer."""
        heads: Any = {"kv_heads": kv_heads, "heads_per_latent": heads_per_latent, "element_size": element_size}
        none: tuple[Groups, ...] = ((),) * len(self.d_qk)
        keys, values = (
            [side_bytes(d, groups, **heads) for d, groups in zip(dims, codes or none, strict=True)]
            for dims, codes in ((self.d_qk, self.k_codes), (self.d_vo, self.v_codes))
        )
        return list(zip(keys, values, strict=True))

    @property
    def expected_loss(self) -> float:
        """Sum over layers, for keys and values: how plans compare, not a forecast (errors don't simply add up)."""
        return sum(self.qk_loss) + sum(self.vo_loss)


def by_layer(kept: Sequence[int], values: Sequence[T], layers: Iterable[int], other: T) -> tuple[T, ...]:
    """The values of the layers `kept`, in their order, and another for all others."""
    found = dict(zip(kept, values, strict=True))
    return tuple(found.get(layer, other) for layer in layers)


def probe_dims(head_dim: int) -> int:
    """Dims per head that a probe keeps."""
    return max(2, int(PROBE_SHARE * head_dim) // 2 * 2)


def probes_of(statistics: Statistics) -> Float[Tensor, "2 layers"]:
    """Losses from `probe`.

    Raises:
        UserError: The statistics were never probed.
    """
    if statistics.probes is None or statistics.probes.ndim != 2:
        raise UserError("these statistics say nothing about how much each layer matters; calibrate again")
    return statistics.probes
