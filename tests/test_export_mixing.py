"""Keys mixed for caches of few bits: the same logits, and as much in one dim of a frequency as in another."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from kvlatent.model.graft import cached_heads, spec_of
from kvlatent.model.rope import rotate
from kvlatent.serving.export.mixing import key_mixing, mixed_pairs
from kvlatent.serving.export.plain import plain_weights


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_products_of_rotated_queries_and_keys_stay(name: str, tiny_student: Callable[..., PreTrainedModel]) -> None:
    student = tiny_student(name, "portable", 8, 8)
    latents, width = cached_heads(student.config), spec_of(student).latent_dims[0][0]
    angles = torch.randint(1, 999, (2, 7, 1)) * torch.tensor(spec_of(student).inv_freq)

    def products(mix: bool) -> torch.Tensor:
        weights = dict(plain_weights(student, d_qk=width, d_vo=width, mix_keys=mix))
        generator, heads = torch.Generator().manual_seed(0), []
        for side, at in zip("qk", angles.double(), strict=True):
            projection = f"model.layers.1.self_attn.{side}_proj"
            weight = weights[f"{projection}.weight"].double()
            x = torch.randn(7, weight.shape[1], generator=generator).double() @ weight.T
            x = x + weights.get(f"{projection}.bias", torch.zeros(())).double()
            heads.append(rotate(x.unflatten(1, (-1, width)).transpose(0, 1), at.cos(), at.sin()))
        q, k = heads
        return torch.einsum("lgqd,lkd->lgqk", q.unflatten(0, (latents, -1)), k)

    torch.testing.assert_close(products(mix=True), products(mix=False), rtol=1e-4, atol=1e-4)


def test_dims_of_a_frequency_hold_equally_much(tiny_student: Callable[..., PreTrainedModel]) -> None:
    student = tiny_student("llama", "portable", 8, 8)
    spec, latents, layer = spec_of(student), cached_heads(student.config), student.model.layers[0]
    inv_freq = torch.tensor(spec.inv_freq)
    maps, energy = key_mixing(layer, inv_freq, latents), {}
    for name, given in maps.items():
        weight = getattr(layer.self_attn, name).weight.detach() * layer.input_layernorm.weight.detach()
        pairs = mixed_pairs(weight.unflatten(0, (-1, 2, len(inv_freq))), given)
        energy[name] = pairs.square().sum((1, 3)).unflatten(0, (latents, -1)).sum(1)  # (latents, pairs)
    torch.testing.assert_close(energy["q_proj"], energy["k_proj"])
    assert 1 < len(inv_freq.unique()) < len(inv_freq)
    for frequency in inv_freq.unique():
        held = energy["k_proj"][:, inv_freq == frequency]
        torch.testing.assert_close(held, held.mean(1, keepdim=True).expand_as(held))
