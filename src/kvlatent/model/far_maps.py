"""What a cache holds of one layer's whole keys and values, of near tokens and of far ones, and how it is read back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from kvlatent.kernels import cpu_step
from kvlatent.kernels.codes import Codes, WholeCodes


class FarMaps(NamedTuple):
    """How one layer's far tokens are reduced, all maps after RoPE, and how near ones are written down."""

    q: Float[Tensor, "q_heads head_dim latent"]
    k: Float[Tensor, "latents joined latent"]
    v: Float[Tensor, "latents joined latent_v"]
    o: Float[Tensor, "q_heads latent_v head_dim"]
    k_mean: Float[Tensor, "latents 1 latent"] | None = None
    """What is taken from keys before they become codes."""
    v_mean: Float[Tensor, "latents 1 latent_v"] | None = None
    codes: tuple[Codes, Codes] | None = None
    """How keys and values are written down; None is as numbers."""
    near_codes: WholeCodes | None = None
    """How tokens near the queries are written down; None is as numbers."""
    bias: Float[Tensor, "q_heads 1"] | None = None
    """What is added to the logits of far tokens, as errors of keys make their softmax too small or too large."""

    def of(self, dtype: torch.dtype) -> FarMaps:
        """The same in another dtype."""
        if self.q.dtype == dtype:
            return self
        tensors = {name: x.to(dtype) for name, x in self._asdict().items() if isinstance(x, Tensor)}
        return self._replace(**tensors)  # type: ignore[arg-type]

    def held(self, x: Float[Tensor, "batch kv_heads seq head_dim"]) -> Shaped[Tensor, "batch kv_heads seq row"]:
        """What a cache holds of whole keys, or values: the same, or rows of codes."""
        return x if self.near_codes is None else self.near_codes.encode(x)

    def hold(self, x: Float[Tensor, "batch kv_heads 1 head_dim"], rows: Tensor, place: int) -> None:
        """Write one token's whole key, or value, to a place of what a cache holds."""
        if self.near_codes is None:
            rows.narrow(2, place, 1).copy_(x)
        else:
            self.near_codes.write(x, rows, place)

    def met(self, rows: Shaped[Tensor, "batch kv_heads seq row"]) -> Float[Tensor, "batch kv_heads seq head_dim"]:
        """Whole keys, or values, as they are read back."""
        return rows if self.near_codes is None else self.near_codes.decode(rows, self.q.dtype)

    def held_and_met(self, x: Float[Tensor, "batch kv_heads seq head_dim"]) -> tuple[Tensor, Tensor]:
        """What a cache holds, detached, and what is read back of that, with the gradient of `x`."""
        rows = self.held(x.detach())
        return rows, x if self.near_codes is None else x + (self.met(rows) - x).detach()

    def reduced(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of whole keys and values, (batch, kv_heads, seq, head_dim) → (batch, latents, seq, latent)."""
        return mapped(joined(k, self.k.shape[0]), self.k), mapped(joined(v, self.v.shape[0]), self.v)

    def stored(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """What a cache holds of whole keys and values: latents, or rows of codes."""
        latents = self.reduced(k, v)
        if self.codes is None:
            return latents
        assert self.k_mean is not None and self.v_mean is not None
        return self.codes[0].encode(latents[0] - self.k_mean), self.codes[1].encode(latents[1] - self.v_mean)

    def read_keys(self, k: Tensor) -> Tensor:
        """Latents of what a cache holds of keys."""
        if self.codes is None or k.dtype != torch.uint8:
            return k
        assert self.k_mean is not None
        return self.codes[0].decode(k, self.k.dtype) + self.k_mean

    def read(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of what a cache holds."""
        if self.codes is None or v.dtype != torch.uint8:
            return k, v
        assert self.v_mean is not None
        return self.read_keys(k), self.codes[1].decode(v, self.v.dtype) + self.v_mean

    def seen(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of whole keys and values as they would be read back, with gradients."""
        latents = self.reduced(k, v)
        if self.codes is None:
            return latents
        assert self.k_mean is not None and self.v_mean is not None
        keys, values = (
            codes.straight_through(x - mean) + mean
            for codes, x, mean in zip(self.codes, latents, (self.k_mean, self.v_mean), strict=True)
        )
        return keys, values


def mapped(
    x: Float[Tensor, "batch maps seq inputs"], maps: Float[Tensor, "maps inputs outputs"]
) -> Float[Tensor, "batch maps seq outputs"]:
    """Every head's rows times its own map."""
    if cpu_step.fits(x, maps):
        return cpu_step.mapped_rows(x, maps)
    if x.shape[2] != 1 or x.shape[0] == 1:
        return x @ maps
    return torch.bmm(x[:, :, 0].transpose(0, 1), maps).transpose(0, 1)[:, :, None]  # `@` copies a map per sequence


def joined(x: Float[Tensor, "batch heads seq dim"], latents: int) -> Float[Tensor, "batch latents seq joined"]:
    """Keys or values of the heads that share a latent, side by side."""
    if x.shape[1] == latents:
        return x
    if x.shape[2] == 1:
        return x.reshape(x.shape[0], latents, 1, -1)
    return x.unflatten(1, (latents, -1)).transpose(2, 3).flatten(3)
