"""Latent attention written as that of an ordinary model: scale 1/√d, one frequency list, heads of one size."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from kvlatent.model.graft import cached_heads, identity_spec, spec_of
from kvlatent.model.rope import inverse_frequencies, plain_exponents
from kvlatent.model.spec import LatentSpec
from kvlatent.serving.export.mixing import key_mixing, mixed_pairs


def latent_spec(model: PreTrainedModel) -> LatentSpec:
    """The spec of a converted model, or the one by which a stock model keeps everything."""
    return spec_of(model) or identity_spec(model)


def plain_weights(
    model: PreTrainedModel, *, d_qk: int, d_vo: int, mix_keys: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield the model's parameters by their stock names, with heads of d_qk and d_vo dims and logit scale 1/√d_qk.

    Narrower heads are filled with zeros, which change no logit: queries and keys within the first and second halves of
    their rotary pairs, values at the end. Whatever else multiplies the logits goes into W_Q and its bias.

    Args:
        model: Its queries and keys are reduced inside W_Q and W_K (`folded`), or not at all.
        d_qk: Query/key dims per head to write, at least the model's.
        d_vo: Value/output dims per head to write, likewise.
        mix_keys: Whether to mix queries and keys by `key_mixing`, which changes no logit either.
    """
    spec = latent_spec(model)
    assert spec.qk_map == "folded" and not spec.per_head_frequencies
    to_scale = spec.scale * spec.rope_scaling**2 * d_qk**0.5
    keys, values = spec.latent_dims

    @cache
    def mixing(layer: int) -> dict[str, Tensor]:  # of queries, keys and their biases
        return key_mixing(model.model.layers[layer], torch.tensor(spec.inv_freq), cached_heads(model.config))

    for name, parameter in model.named_parameters():  # a head that is the embeddings comes once, as these
        parts = name.split(".")
        layer = int(parts[2]) if parts[1] == "layers" else 0
        module, value = parts[-2], parameter.detach()
        if module in ("q_proj", "k_proj"):
            if module == "q_proj" and abs(to_scale - 1) > 1e-9:
                value = (value.float() * to_scale).to(value.dtype)
            pairs = value.unflatten(0, (-1, 2, keys[layer] // 2))  # (heads, halves, pairs, …)
            if mix_keys:
                pairs = mixed_pairs(pairs, mixing(layer)[module])
            value = _pad(pairs, 2, d_qk // 2).flatten(0, 2)
        elif module == "v_proj":
            value = _pad(value.unflatten(0, (-1, values[layer])), 1, d_vo).flatten(0, 1)
        elif module == "o_proj" and value.ndim == 2:
            value = _pad(value.unflatten(1, (-1, values[layer])), 2, d_vo).flatten(1)
        yield name, value.contiguous()


def _pad(x: Tensor, dim: int, size: int) -> Tensor:
    missing = size - x.shape[dim]
    if missing == 0:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat((x, x.new_zeros(shape)), dim=dim)


def frequency_factors(model: PreTrainedModel, *, d_qk: int) -> Float[Tensor, "pairs"]:
    """What the plain frequencies of d_qk dims are divided by to give the model's own: 1 everywhere for plain RoPE.

    Pairs that are only padding keep their plain frequency.
    """
    plain = torch.tensor(
        inverse_frequencies(plain_exponents(d_qk), d=d_qk, theta=rope_theta(model)), dtype=torch.float64
    )
    own = torch.tensor(latent_spec(model).inv_freq, dtype=torch.float64)
    factors = torch.ones_like(plain)
    factors[: len(own)] = plain[: len(own)] / own
    factors[(factors - 1).abs() < 1e-6] = 1.0
    return factors


def rope_theta(model: PreTrainedModel) -> float:
    """The base of the teacher's frequencies."""
    return float(model.config.rope_parameters["rope_theta"])
