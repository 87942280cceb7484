"""Quantized caches: error within half a step, bytes with scales, and the same handling as transformers' own layers."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_window import windowed
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvlatent.errors import UserError
from kvlatent.model.cache import allocated_bytes, cache_bytes
from kvlatent.model.graft import spec_of
from kvlatent.model.quantized import (
    GROUP,
    WINDOW,
    QuantizedCache,
    QuantizedLayer,
    dequantize_keys,
    dequantize_values,
    quantize_keys,
    quantize_values,
)


def rows(batch: int, tokens: int, dim: int, seed: int) -> Tensor:
    return torch.randn(batch, 2, tokens, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("d", [4, 7])
def test_codes_are_within_half_a_step(bits: int, d: int) -> None:
    keys = rows(2, 2 * GROUP, d, 0) * torch.logspace(-2, 2, d) + 3  # channels of very different size
    codes, least, step = quantize_keys(keys, bits)
    assert codes.shape == (2, 2, 2 * GROUP, math.ceil(d * bits / 8)) and codes.dtype == torch.uint8
    assert least.shape == step.shape == (2, 2, 2, d)
    error = (dequantize_keys(codes, least, step, bits) - keys).abs().unflatten(2, (2, GROUP))
    assert (error <= 0.51 * step.float()[:, :, :, None] + 0.002 * keys.abs().unflatten(2, (2, GROUP))).all()
    values = rows(2, 5, d, 1) * torch.logspace(-2, 2, 5)[:, None]
    codes, step = quantize_values(values, bits)
    error = (dequantize_values(codes, step, bits)[..., :d] - values).abs()
    assert (error <= 0.51 * step.float() + 0.002 * values.abs()).all()


def test_zeros_and_constants_survive() -> None:
    keys = torch.full((1, 1, GROUP, 2), 5.0)
    torch.testing.assert_close(dequantize_keys(*quantize_keys(keys, 4), 4), keys, rtol=1e-3, atol=0)
    values = torch.zeros(1, 1, 3, 4)
    assert torch.equal(dequantize_values(*quantize_values(values, 4), 4), values)


@settings(max_examples=25)
@given(pieces=st.lists(st.integers(1, 300), min_size=1, max_size=5), bits=st.sampled_from([4, 8]))
def test_newest_tokens_are_exact_and_old_ones_near(pieces: list[int], bits: int) -> None:
    layer, stock = QuantizedLayer(bits), DynamicCache()
    for seed, tokens in enumerate(pieces):
        new = rows(2, tokens, 4, seed), rows(2, tokens, 7, seed + 50)
        got = layer.update(*new)
        wanted = stock.update(*new, 0)
        assert layer.get_seq_length() == stock.get_seq_length()
        for x, y in zip(got, wanted, strict=True):
            assert x.shape == y.shape
            assert torch.equal(x[:, :, -WINDOW:], y[:, :, -WINDOW:])
            assert (x - y).abs().max() < (0.5 if bits == 4 else 0.03)
    held = layer.get_seq_length()
    assert WINDOW <= layer.keys.shape[2] < WINDOW + GROUP or held < WINDOW


def test_reorder_select_repeat_crop_and_reset_do_as_transformers_does() -> None:
    ours, stock = QuantizedLayer(8), DynamicCache()
    new = rows(3, 3 * GROUP, 4, 0), rows(3, 3 * GROUP, 6, 1)
    ours.update(*new)
    stock.update(*new, 0)
    for cache in (ours, stock.layers[0]):
        cache.reorder_cache(torch.tensor([2, 2, 0]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([1, 4]))
        cache.crop(-5)
        cache.crop(-GROUP - 100)  # through a whole group
    more = rows(2, 1, 4, 2), rows(2, 1, 6, 3)
    for got, wanted in zip(ours.update(*more), stock.update(*more, 0), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0.03)
    assert ours.get_seq_length() == stock.get_seq_length() == 3 * GROUP - 5 - GROUP - 100 + 1
    ours.offload()
    ours.prefetch()
    ours.reset()
    assert ours.get_seq_length() == 0 and ours.keys is None
    ours.update(*more)
    assert ours.get_seq_length() == 1


@pytest.mark.parametrize(("bits", "share"), [(8, 0.266), (4, 1 / 7)])
def test_bytes_with_scales_against_the_original_bfloat16_cache(bits: int, share: float) -> None:
    """At half the dims 8-bit codes alone are a quarter; scales and the window come on top."""
    layer, tokens = QuantizedLayer(bits), 8192
    layer.update(rows(1, tokens, 32, 0).bfloat16(), rows(1, tokens, 32, 1).bfloat16())
    cache = DynamicCache()
    cache.layers = [layer]
    groups = (tokens - WINDOW) // GROUP
    codes = 2 * groups * GROUP * (32 + 32) * bits // 8
    scales = 2 * groups * (2 * 32 + GROUP) * 2
    residual = 2 * (tokens - groups * GROUP) * (32 + 32) * 2
    assert cache_bytes(cache) == codes + scales + residual
    original = 2 * tokens * (64 + 64) * 2  # twice the dims, 2 bytes each
    assert cache_bytes(cache) <= share * original
    assert allocated_bytes(cache) <= 1.1 * cache_bytes(cache)


def test_other_widths_are_refused(tiny_student: Callable[..., PreTrainedModel]) -> None:
    with pytest.raises(UserError, match="8, 4 or 2 bits; got 3"):
        QuantizedCache(tiny_student("llama").config, bits=3)


# --- in a model


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beam"])
def test_generation_with_padding_goes_on_as_with_full_precision(
    tiny_student: Callable[..., PreTrainedModel], ids: Tensor, name: str, how: dict[str, int]
) -> None:
    """Eight bits over small random models: logits move by little; the tokens of most steps are the same."""
    student = tiny_student(name)
    prompt = ids[:10].reshape(1, -1)[:, : GROUP + WINDOW + 20].repeat(2, 1)
    mask = torch.ones_like(prompt)
    mask[1, :9] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **how}
    wanted = student.generate(prompt, **options)
    got = student.generate(prompt, past_key_values=QuantizedCache(student.config, bits=8), **options)
    assert got.shape == wanted.shape
    assert (got == wanted).float().mean() > 0.97


def test_chunked_forward_is_near_the_full_one(tiny_student: Callable[..., PreTrainedModel], ids: Tensor) -> None:
    student = tiny_student("llama")
    text = ids.reshape(1, -1)[:, : 2 * GROUP - 6]
    with torch.no_grad():
        full = student(text).logits
        errors = []
        for bits in (4, 8):
            cache = QuantizedCache(student.config, bits=bits)
            pieces = [student(piece, past_key_values=cache).logits for piece in text.split(50, dim=1)]
            errors.append((torch.cat(pieces, dim=1) - full).abs().mean().item())
    assert errors[1] < errors[0] / 4 and errors[1] < 0.02 * full.std()


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_beside_a_window_latents_are_coded_and_the_rest_is_whole(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, name: str
) -> None:
    model = windowed(tiny_teacher(name))
    text = ids.reshape(1, -1).repeat(2, 1)
    spec, caches = spec_of(model), [QuantizedCache(model.config, bits=bits) for bits in (4, 8)]
    assert spec is not None
    steps = [GROUP - 30, *[1] * 60, GROUP - 30, *[1] * 10, 20]  # a group is closed in a step, and in a piece
    with torch.no_grad():
        full = model(text, use_cache=False).logits
        errors = []
        for cache in caches:
            pieces = [model(x, past_key_values=cache).logits for x in text[:, : sum(steps)].split(steps, dim=1)]
            errors.append((torch.cat(pieces, dim=1) - full[:, : sum(steps)]).abs().mean().item())
    assert 1e-5 < errors[1] < errors[0] / 4 and errors[1] < 0.02 * full.std()
    held, latents = sum(steps), 1
    far = held - spec.window - spec.sinks
    groups = far // GROUP
    assert groups == 2 - (far < 2 * GROUP)
    for cache, bits in zip(caches, (4, 8), strict=True):
        d_qk, d_vo = (2 * d[0] for d in (spec.d_qk, spec.d_vo))  # of a latent that two heads share
        codes = groups * GROUP * (d_qk + d_vo) * bits // 8
        scales = groups * (2 * d_qk + GROUP) * 2
        residual = (far - groups * GROUP) * (d_qk + d_vo) * 4
        whole = (spec.window + spec.sinks) * 2 * 2 * spec.head_dim * 4
        assert cache_bytes(cache) == 2 * 2 * (latents * (codes + scales + residual) + whole)


def test_beside_a_window_a_quantized_cache_is_cropped_and_reordered(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor
) -> None:
    model = windowed(tiny_teacher("llama"))
    text = ids.reshape(2, -1)
    cache = QuantizedCache(model.config, bits=8)
    with torch.no_grad():
        model(text[:, :GROUP], past_key_values=cache)
        model(text[:, GROUP : GROUP + 12], past_key_values=cache)  # closes a group
        cache.crop(-40)  # opens it again
        cache.reorder_cache(torch.tensor([1, 1]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3]))
        got = model(text[:, -10:], past_key_values=cache).logits
        joined = torch.cat((text[1:, : GROUP - 28].repeat(2, 1), text[:, -10:]), dim=1)
        wanted = model(joined, use_cache=False).logits[:, -10:]
    assert (got - wanted).abs().mean() < 0.02 * wanted.std()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    for how in ({}, {"num_beams": 3}):
        cache = QuantizedCache(model.config, bits=8)
        tokens = model.generate(text[:, :-2], past_key_values=cache, **options, **how)
        assert (tokens == model.generate(text[:, :-2], use_cache=False, **options, **how)).float().mean() > 0.97
