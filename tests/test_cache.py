"""The cache that grows in place: same content as transformers' own, little slack, and every way `generate` uses it."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvlatent.model.cache import FixedLayer, GrowingLayer, LatentCache, RollingLayer, allocated_bytes, cache_bytes
from kvlatent.model.quantized import QuantizedLayer


def rows(batch: int, tokens: int, dim: int, seed: int) -> Tensor:
    return torch.randn(batch, 2, tokens, dim, generator=torch.Generator().manual_seed(seed))


PIECES = st.lists(st.integers(1, 90), min_size=1, max_size=6)


@settings(max_examples=30)
@given(pieces=PIECES, window=st.sampled_from([None, 2, 7, 80]))
def test_content_equals_that_of_transformers(pieces: list[int], window: int | None) -> None:
    ours = GrowingLayer() if window is None else RollingLayer(window)
    stock = DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)
    for seed, tokens in enumerate(pieces):
        assert ours.get_mask_sizes(tokens) == stock.get_mask_sizes(tokens)
        new = rows(3, tokens, 4, seed), rows(3, tokens, 6, seed + 100)
        for got, wanted in zip(ours.update(*new), stock.update(*new), strict=True):
            assert torch.equal(got, wanted)
        assert ours.get_seq_length() == stock.get_seq_length()
        assert torch.equal(ours.keys, stock.keys) and torch.equal(ours.values, stock.values)


@pytest.mark.parametrize("layer", [GrowingLayer(), RollingLayer(7), FixedLayer(9), QuantizedLayer(8)])
def test_what_a_release_may_newly_hand_over_is_refused(layer: DynamicLayer) -> None:
    new = rows(1, 2, 4, 0), rows(1, 2, 6, 1)
    layer.update(*new, kwargs={"position_ids": None})  # as transformers 5.24 does
    with pytest.raises(TypeError, match="block_table"):
        layer.update(*new, block_table=None)
    with pytest.raises(TypeError, match="positional"):
        layer.update(*new, None, None)


def test_a_step_writes_in_place() -> None:
    layer = GrowingLayer()
    layer.update(rows(1, 1000, 4, 0), rows(1, 1000, 6, 1))
    at = layer.keys.data_ptr(), layer.values.data_ptr()
    for seed in range(60):
        layer.update(rows(1, 1, 4, seed), rows(1, 1, 6, seed))
    assert (layer.keys.data_ptr(), layer.values.data_ptr()) == at
    assert layer.keys.shape == (1, 2, 1060, 4) and layer.values.shape == (1, 2, 1060, 6)


@pytest.mark.parametrize("window", [None, 700])
def test_slack_is_at_most_a_tenth(window: int | None) -> None:
    config = LlamaConfig(num_hidden_layers=1)
    cache = LatentCache(config)
    cache.layers = [GrowingLayer() if window is None else RollingLayer(window)]
    cache.update(rows(2, 1024, 4, 0), rows(2, 1024, 8, 1), 0)
    for step in range(800):
        in_use, allocated = cache_bytes(cache), allocated_bytes(cache)
        held = 1024 + step if window is None else window - 1
        assert in_use == 2 * 2 * held * (4 + 8) * 4
        assert allocated <= (1.1 if window is None else 1.2) * in_use
        cache.update(rows(2, 1, 4, step), rows(2, 1, 8, step), 0)


@pytest.mark.parametrize("layer", [GrowingLayer, lambda: RollingLayer(9)], ids=["growing", "rolling"])
def test_reorder_repeat_select_crop_and_reset_do_as_transformers_does(layer: Callable[[], DynamicLayer]) -> None:
    ours = layer()
    stock = DynamicLayer() if isinstance(ours, GrowingLayer) else DynamicSlidingWindowLayer(9)
    for cache in (ours, stock):
        cache.update(rows(3, 5, 4, 0), rows(3, 5, 6, 1))
        cache.reorder_cache(torch.tensor([2, 2, 0]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([1, 4]))
        cache.crop(-2)
        cache.update(rows(2, 1, 4, 2), rows(2, 1, 6, 3))
    assert torch.equal(ours.keys, stock.keys) and torch.equal(ours.values, stock.values)
    assert ours.get_seq_length() == stock.get_seq_length() == 4
    ours.reset()
    assert ours.keys is None and not ours.is_initialized
    ours.update(rows(1, 2, 4, 2), rows(1, 2, 6, 3))
    assert ours.get_seq_length() == 2


def test_crop_refuses_a_final_length() -> None:
    with pytest.raises(ValueError, match="crop takes minus the number of tokens"):
        GrowingLayer().crop(3)


def test_offloaded_buffers_come_back_with_their_capacity() -> None:
    layer = GrowingLayer()
    layer.update(rows(1, 5, 4, 0), rows(1, 5, 6, 1))
    whole = layer.allocated_bytes()
    layer.offload()
    layer.prefetch()
    assert layer.allocated_bytes() == whole == (5 + 64) * 2 * (4 + 6) * 4


def test_gradients_flow_through_cached_keys() -> None:
    layer = GrowingLayer()
    first, second = (rows(1, 2, 4, seed).requires_grad_() for seed in (0, 1))
    layer.update(first, first.detach())
    keys, _ = layer.update(second, second.detach())
    keys.square().sum().backward()
    torch.testing.assert_close(first.grad, 2 * first)
    torch.testing.assert_close(second.grad, 2 * second)


# --- in a model


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_students_grow_in_place_by_default(
    tiny_student: Callable[..., PreTrainedModel], name: str, ids: Tensor
) -> None:
    student = tiny_student(name)
    with torch.no_grad():
        cache = student(ids[:2]).past_key_values
        wanted = student(ids[:2], past_key_values=DynamicCache(config=student.config)).past_key_values
    assert all(isinstance(layer, GrowingLayer | RollingLayer) for layer in cache.layers)
    for ours, stock in zip(cache.layers, wanted.layers, strict=True):
        assert torch.equal(ours.keys, stock.keys) and torch.equal(ours.values, stock.values)
    out = student.generate(ids[:2], max_new_tokens=3, return_dict_in_generate=True, pad_token_id=0)
    assert all(isinstance(layer, GrowingLayer | RollingLayer) for layer in out.past_key_values.layers)
    with torch.no_grad():
        assert student(ids[:2], use_cache=False).past_key_values is None


def test_a_copied_student_keeps_the_default(tiny_student: Callable[..., PreTrainedModel], ids: Tensor) -> None:
    student = copy.deepcopy(tiny_student("llama"))
    with torch.no_grad():
        assert isinstance(student(ids[:1]).past_key_values.layers[0], GrowingLayer)


def test_a_cache_that_is_passed_stays(tiny_student: Callable[..., PreTrainedModel], ids: Tensor) -> None:
    student = tiny_student("llama")
    cache = StaticCache(config=student.config, max_cache_len=40)
    out = student.generate(
        ids[:1], past_key_values=cache, max_new_tokens=3, return_dict_in_generate=True, pad_token_id=0
    )
    assert out.past_key_values is cache


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_assisted_decoding_gives_the_greedy_tokens(
    tiny_student: Callable[..., PreTrainedModel], name: str, ids: Tensor
) -> None:
    student = tiny_student(name)
    assistant = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    plain = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    wanted = student.generate(ids[:1, :9], **plain)
    got = student.generate(ids[:1, :9], assistant_model=assistant, **plain)
    assert torch.equal(got, wanted)


def test_training_mode_gets_gradients_with_the_default_cache(
    tiny_student: Callable[..., PreTrainedModel], ids: Tensor
) -> None:
    student = tiny_student("llama").requires_grad_().eval()
    loss = student(ids[:2], labels=ids[:2], use_cache=True).loss
    loss.backward()
    weight = student.model.layers[0].self_attn.k_proj.weight
    assert weight.grad is not None and weight.grad.abs().sum() > 0
