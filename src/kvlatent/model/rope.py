"""Rotary frequencies: the plain list, the paper's frequency-aware list, and the stability curve that motivates it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from kvlatent.errors import UserError
from kvlatent.model.families import rope_by_length
from kvlatent.model.spec import SLIDING, LatentSpec


def plain_exponents(d: int) -> list[int]:
    """Exponents e of `theta ** (-e / d)` in ordinary RoPE: 0, 2, …, d - 2."""
    return list(range(0, d, 2))


def frequency_aware_exponents(d: int) -> list[int]:
    """Exponents of the paper's list (Eq. 11, as its authors coded it), d / 2 of them.

    The highest-frequency quarter is dropped and the lowest-frequency quarter sampled twice as densely;
    d = 16 gives 4, 6, 8, 10, 12, 13, 14, 15.

    Raises:
        UserError: `d` is not a multiple of 4, so the quarters are not whole.
    """
    if d < 4 or d % 4:
        raise UserError(f"frequency-aware RoPE needs a d_qk that is a multiple of 4; got {d}")
    return list(range(d // 4, 3 * d // 4, 2)) + list(range(3 * d // 4, d))


def inverse_frequencies(exponents: list[int], *, d: int, theta: float) -> tuple[float, ...]:
    """`theta ** (-e / d)` in radians per token, rounded to float32 as transformers computes it."""
    powers = theta ** (torch.tensor(exponents, dtype=torch.float32) / d)
    return tuple((1.0 / powers).tolist())


def frequencies_of(rotary: nn.Module, head_dim: int, layer_type: str | None = None) -> tuple[tuple[float, ...], float]:
    """Inverse frequencies of a stock rotary embedding, 0 for pairs that stand still, and its multiplier of cos and sin.

    Args:
        rotary: The stock module.
        head_dim: Dims per head, of which it may rotate the first ones only.
        layer_type: Of a module that has frequencies for each type of layers.
    """
    prefix = f"{layer_type}_" if layer_type else ""
    own: list[float] = getattr(rotary, f"{prefix}inv_freq").float().tolist()
    scaling = float(getattr(rotary, f"{prefix}attention_scaling"))
    return (*own, *[0.0] * (head_dim // 2 - len(own))), scaling


def stability(inv_freq: tuple[float, ...], distances: Tensor) -> Tensor:
    """Mean cosine over rotary pairs at each distance: (1/d)·1ᵀR(x)1 (Eq. 10).

    Args:
        inv_freq: Frequencies in radians per token.
        distances: Distances in tokens, any shape.

    Returns:
        Values in [-1, 1], float64, of the shape of `distances`. Negative values and wide swings mean that a key's
        weight depends on where it stands more than on what it says.
    """
    return torch.cos(distances.double()[..., None] * torch.tensor(inv_freq, dtype=torch.float64)).mean(-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (j, j + d/2) of `x` (batch, heads, seq, d) by angles given as cos, sin (…, seq, d/2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def turned_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What `rotate` has turned as it was before, whatever cos and sin were multiplied by."""
    size = cos.square() + sin.square()
    return rotate(x, cos / size, -sin / size)


class Lengthened(NamedTuple):
    """Frequencies of inputs that are longer than a model's training was at first."""

    after: int
    """The longest input that has the plain ones."""
    inv_freq: tuple[float, ...] = ()
    """Of all longer inputs (longrope); where there are none, theta grows with the length (dynamic)."""
    theta: float = 0.0
    factor: float = 1.0
    dims: int = 0
    """How many of a head's dims rotate."""

    @classmethod
    def of(cls, config: PreTrainedConfig, spec: LatentSpec) -> Lengthened | None:
        """Those that a config asks for, over the pairs of a spec."""
        if not rope_by_length(config):
            return None
        rope = config.rope_parameters
        dims, theta = int(spec.head_dim * rope.get("partial_rotary_factor", 1.0)), rope["rope_theta"]
        if rope["rope_type"] == "dynamic":
            return cls(config.max_position_embeddings, theta=theta, factor=rope["factor"], dims=dims)
        with torch.device("cpu"):  # models are built on the meta device
            powers = theta ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims)
            own = (1.0 / (torch.tensor(rope["long_factor"], dtype=torch.float32) * powers)).tolist()
        return cls(rope["original_max_position_embeddings"], inv_freq=(*own, *[0.0] * (spec.head_dim // 2 - len(own))))

    def grown(self, length: Tensor, pairs: int) -> Tensor:
        """Frequencies (pairs,) by NTK-aware scaling to this length, a scalar tensor, as transformers computes them."""
        growth = self.factor * length / self.after - (self.factor - 1)
        theta = self.theta * growth ** (self.dims / (self.dims - 2))
        exponents = torch.arange(0, self.dims, 2, dtype=torch.float32, device=length.device) / self.dims
        return F.pad(1.0 / theta**exponents, (0, pairs - len(exponents)))


def query_growth(config: PreTrainedConfig, position_ids: Tensor) -> Tensor | None:
    """What queries at these positions (batch, seq) are multiplied by, (batch, 1, seq, 1); None is 1 everywhere.

    Llama 4 and models after it let the logits grow beyond the positions that they were first trained on.
    """
    rope = config.rope_parameters or {}
    if (beta := rope.get("llama_4_scaling_beta")) is None:
        return None
    lengths = torch.floor(position_ids / rope["original_max_position_embeddings"])
    return (1 + beta * torch.log(1 + lengths))[:, None, :, None]


class LatentRotaryEmbedding(nn.Module):
    """cos and sin of `position × frequency` for all inverse frequencies, once per forward; heads pick from them.

    `rope_type`, `config`, `original_inv_freq` and `compute_default_rope_parameters` are what transformers asks of a
    rotary embedding when it fills the buffers of a model built on the meta device.
    """

    rope_type, config = "default", None
    inv_freq: Tensor
    original_inv_freq: Tensor

    def __init__(
        self,
        inv_freq: tuple[float, ...],
        scaling: float,
        *,
        partial: bool = False,
        sliding: LatentRotaryEmbedding | None = None,
        lengthened: Lengthened | None = None,
    ) -> None:
        """Hold the frequencies of all layers.

        Args:
            inv_freq: Of each pair, in radians per token.
            scaling: Multiplier of cos and sin.
            partial: Whether pairs of frequency 0 are outside RoPE, and so not multiplied.
            sliding: What layers with a sliding window have instead.
            lengthened: What longer inputs have instead.
        """
        super().__init__()
        self.partial, self.sliding, self.lengthened = partial, sliding, lengthened
        other = lengthened.inv_freq if lengthened is not None else ()
        self.longer = LatentRotaryEmbedding(other, scaling) if other else None
        self.exact, self.scaling = inv_freq, scaling
        self.inv_freq = nn.Buffer(torch.tensor(inv_freq, dtype=torch.float32), persistent=False)
        self.original_inv_freq = nn.Buffer(self.inv_freq.clone(), persistent=False)

    @classmethod
    def of(cls, spec: LatentSpec, config: PreTrainedConfig) -> LatentRotaryEmbedding:
        """The one that a student's spec and config describe."""
        own = spec.sliding_inv_freq
        sliding = cls(own, spec.sliding_rope_scaling) if own else None
        partial = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0) != 1
        lengthened = Lengthened.of(config, spec)
        return cls(spec.inv_freq, spec.rope_scaling, partial=partial, sliding=sliding, lengthened=lengthened)

    def compute_default_rope_parameters(self, config: None) -> tuple[Tensor, float]:
        """Return the inverse frequencies (pairs,) in radians per token and the multiplier of cos and sin."""
        return torch.tensor(self.exact, dtype=torch.float32), self.scaling

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)  # model.to(bfloat16) must not round the frequencies: follow its device only
        if self.inv_freq.dtype != torch.float32:
            self.inv_freq = torch.tensor(self.exact, dtype=torch.float32, device=self.inv_freq.device)
        return self

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str = "") -> tuple[Tensor, Tensor]:
        """Return cos and sin, each (batch, seq, pairs), in the dtype of `x`; `position_ids` is (batch, seq).

        Models that could see images give each token three positions, (3, batch, seq), which are equal in text.
        """
        position_ids = position_ids[0] if position_ids.ndim == 3 else position_ids
        if self.sliding is not None and layer_type == SLIDING:
            return self.sliding(x, position_ids)
        with torch.autocast(x.device.type, enabled=False):
            angles = position_ids[..., None].float() * self._frequencies(position_ids)
            scaling: Tensor | float = self.scaling
            if self.partial and scaling != 1:
                scaling = torch.where(self.inv_freq == 0, 1.0, scaling)
            return (angles.cos() * scaling).to(x.dtype), (angles.sin() * scaling).to(x.dtype)

    def _frequencies(self, position_ids: Tensor) -> Tensor:
        """Those of an input that ends at the last of these positions."""
        if self.lengthened is None:
            return self.inv_freq
        length = position_ids.max() + 1
        grown = self.lengthened.grown(length, len(self.inv_freq)) if self.longer is None else self.longer.inv_freq
        return torch.where(length > self.lengthened.after, grown, self.inv_freq)
